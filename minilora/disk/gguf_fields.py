"""The settings of a GGUF file as the fields of transformers' config.json, or refused by name.

Knows what llama.cpp's converter writes for llama, mistral, qwen2 and qwen3. Whatever a file holds
that is not computed here is an error, also if its name is new.
Source: convert_hf_to_gguf.py and src/llama-model.cpp of llama.cpp.
"""

import numpy as np

# The architectures that are read, and what transformers calls their classes. A mistral is a llama.
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# Tensors that decide fields: llama.cpp's names.
EMBEDDING = "token_embd.weight"
HEAD = "output.weight"
ROPE_FACTORS = "rope_freqs.weight"
# Settings of an architecture that are read below, or say nothing about the computation.
_READ = (
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.value_length", "attention.layer_norm_rms_epsilon", "attention.sliding_window",
    "rope.dimension_count", "rope.freq_base", "rope.scale_linear", "rope.scaling.type",
    "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned",
    "tensor_data_layout",
)  # fmt: skip
# Settings that would change the computation, and the values under which they do not.
_NEUTRAL = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "use_parallel_residual": (False,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (0,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "embedding_scale": (0, 1),
    "residual_scale": (0, 1),
    "rope.scaling.attn_factor": (1,),
}
# The ids that end a text, in this order.
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")


class _Settings:
    """The settings of one architecture, by their names without it."""

    def __init__(self, path, settings):
        self.path = path
        self.settings = settings
        self.architecture = self.scalar("general.architecture")

    def refuse(self, why):
        raise ValueError(f"{self.path}: {why}")

    def scalar(self, name, default=None):
        """The number or text called `name`; ValueError if it is a list."""
        value = self.settings.get(name, default)
        if isinstance(value, (list, np.ndarray)):
            self.refuse(f"{name} must be one value, and is a list of {len(value)}")
        return value

    def get(self, key, default=None):
        return self.scalar(f"{self.architecture}.{key}", default)

    def count(self, key, default=None):
        """A whole number from 1 on. A list, one for each block, must hold one number only."""
        value = self.settings.get(f"{self.architecture}.{key}", default)
        if value is None:
            self.refuse(f"{self.architecture}.{key} is absent")
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()
        if isinstance(value, np.ndarray):
            self.refuse(
                f"{self.architecture}.{key} differs between blocks, which is not computed here"
            )
        if type(value) is not int or value < 1:
            self.refuse(
                f"{self.architecture}.{key} must be a whole number from 1 on, got {value!r}"
            )
        return value

    def positive(self, key, default=None):
        """A finite number above 0."""
        value = self.get(key, default)
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            self.refuse(f"{self.architecture}.{key} must be a positive number, got {value!r:.50}")
        return value


def fields_of(path, settings, stored):
    """The fields of transformers' `config.json`; ValueError for what is not computed here."""
    its = _Settings(path, settings)
    _check_kind(its)
    _check_settings(its)
    hidden_size = its.count("embedding_length")
    heads = its.count("attention.head_count")
    head_dim = its.count("attention.key_length", default=max(hidden_size // heads, 1))
    if its.get("attention.key_length") is None and heads * head_dim != hidden_size:
        its.refuse(
            f"{heads} heads do not divide {hidden_size} channels, and there is no key_length"
        )
    for key in ("attention.value_length", "rope.dimension_count"):
        if its.count(key, default=head_dim) != head_dim:
            its.refuse(
                f"{its.architecture}.{key}={its.get(key)} is not the size of a head, {head_dim}; "
                "that is not computed here"
            )
    layers = its.count("block_count")
    if layers > len(stored):
        its.refuse(f"it claims {layers} blocks and holds {len(stored)} tensors")
    rope_theta = its.positive("rope.freq_base", default=10000.0)
    ends = end_ids(path, settings)
    if len(ends) == 1:
        ends = ends[0]
    fields = {
        "model_type": its.architecture,
        "architectures": [ARCHITECTURES[its.architecture]],
        "hidden_act": "silu",
        "num_hidden_layers": layers,
        "hidden_size": hidden_size,
        "intermediate_size": its.count("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": its.count("attention.head_count_kv", default=heads),
        "head_dim": head_dim,
        "vocab_size": _vocab_size(its, stored),
        "max_position_embeddings": its.count("context_length"),
        "rms_norm_eps": its.positive("attention.layer_norm_rms_epsilon"),
        "rope_theta": rope_theta,
        "rope_scaling": _rope_scaling(its, stored, rope_theta, head_dim),
        "tie_word_embeddings": HEAD not in stored,
        "bos_token_id": _token_id(path, settings, "bos_token_id"),
        "eos_token_id": ends or None,
    }
    if its.architecture != "qwen2":
        # A qwen2 has biases on q, k and v without a word in its configuration.
        fields["attention_bias"] = "blk.0.attn_q.bias" in stored
    if fields["num_attention_heads"] % fields["num_key_value_heads"]:
        its.refuse(f"{heads} heads do not divide among {fields['num_key_value_heads']} key heads")
    return fields


def _check_kind(its):
    """Raise ValueError unless this is a whole model of an architecture that is read here."""
    if its.architecture not in ARCHITECTURES:
        its.refuse(
            f"its architecture is {its.architecture!r}; only {', '.join(ARCHITECTURES)} "
            "(and mistral, which is written as llama) are read"
        )
    kind = its.scalar("general.type", "model")
    if kind != "model":
        its.refuse(f"general.type={kind!r} is no model; expected the model itself")
    parts = its.scalar("split.count", 0)
    if parts not in (0, 1):
        its.refuse(
            f"it is one of {parts} parts; join them: llama-gguf-split --merge FIRST WHOLE.gguf"
        )
    # Before the second, the blocks were laid out otherwise.
    version = its.scalar("general.quantization_version", 2)
    if version != 2:
        its.refuse(f"general.quantization_version={version!r}; only 2 is read. Convert it again")


def _check_settings(its):
    """Raise ValueError for a setting under which something else is computed than here."""
    for name, value in its.settings.items():
        key = name.removeprefix(f"{its.architecture}.")
        if key == name or key in _READ:
            continue
        neutral = _NEUTRAL.get(key, ())
        if isinstance(value, (np.ndarray, list)) or value not in neutral:
            its.refuse(f"{name}={value!r:.60} is not computed here")
    context = its.count("context_length")
    window = its.get("attention.sliding_window", 0)
    # 0 stands for none.
    if window != 0 and its.count("attention.sliding_window") < context:
        its.refuse(
            f"{its.architecture}.attention.sliding_window={window} is shorter than the context, "
            f"{context}; that is not computed here"
        )


def _vocab_size(its, stored):
    """The rows of the embedding, which the settings must agree with."""
    if EMBEDDING not in stored:
        its.refuse(f"there is no tensor {EMBEDDING}")
    rows = stored[EMBEDDING].shape[0]
    if its.count("vocab_size", default=rows) != rows:
        its.refuse(
            f"{its.architecture}.vocab_size={its.get('vocab_size')}, "
            f"and {EMBEDDING} has {rows} rows"
        )
    return rows


def _rope_scaling(its, stored, rope_theta, head_dim):
    """transformers' `rope_scaling`: None, linear, or llama3."""
    # Without a type, llama.cpp takes a factor for linear.
    kind = its.get("rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        its.refuse(f"{its.architecture}.rope.scaling.type={kind!r:.50} is not computed here")
    # The second name is the older one.
    key = "rope.scaling.factor"
    if its.get(key) is None:
        key = "rope.scale_linear"
    # llama.cpp takes 0 for no scaling.
    scaled = kind == "linear" and its.get(key, 0) not in (0, 1)
    if scaled:
        factor = its.positive(key)
    if ROPE_FACTORS in stored:
        if scaled:
            its.refuse(f"it has both rope.scaling.factor={factor} and {ROPE_FACTORS}")
        return _llama3_scaling(its, stored[ROPE_FACTORS], rope_theta, head_dim)
    if scaled:
        return {"rope_type": "linear", "factor": factor}
    return None


def _llama3_scaling(its, array, rope_theta, head_dim):
    """The llama3 settings under which rope_freqs, what each frequency is divided by, come about.

    The converter writes the divisors alone. Whatever settings give the same ones compute the same,
    so the first that do are taken, Llama 3's own before others.
    """
    if its.architecture != "llama" or array.kind != "F32" or array.shape != (head_dim // 2,):
        its.refuse(f"tensor {ROPE_FACTORS} {array.shape}, {array.kind}, is not computed here")
    divisors = array.data
    if (divisors == 1).all():
        return None
    factor = float(str(divisors[-1]))
    contexts = [8192, its.get("rope.scaling.original_context_length")]
    contexts += [2**power for power in range(1, 24)]
    for context in contexts:
        if type(context) is not int or not 1 < factor < float("inf"):
            continue
        scaling = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": context,
        }
        # float32 arithmetic gave the divisors; half a millionth is more than it loses.
        expected = _llama3_divisors(scaling, rope_theta, head_dim)
        if np.allclose(divisors, expected, rtol=1e-5, atol=0):
            return scaling
    its.refuse(f"{ROPE_FACTORS} is not what llama3's rule gives; that is not computed here")


def _llama3_divisors(scaling, rope_theta, head_dim):
    """What llama3's rule divides each of the head_dim / 2 frequencies by.

    Source: transformers' `_compute_llama3_parameters`, as llama.cpp's converter writes it.
    """
    frequencies = rope_theta ** -(np.arange(0, head_dim, 2) / head_dim)
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    low = scaling["low_freq_factor"]
    high = scaling["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / scaling["factor"] + smooth)


def _token_id(path, settings, key):
    """An id in the settings of the tokenizer; None if it is not set."""
    value = settings.get(f"tokenizer.ggml.{key}")
    tokens = settings.get("tokenizer.ggml.tokens")
    if value is None or not isinstance(tokens, list):
        return None
    if type(value) is not int or not 0 <= value < len(tokens):
        raise ValueError(
            f"{path}: tokenizer.ggml.{key}={value!r:.50} must be one of its {len(tokens)} tokens"
        )
    return value


def end_ids(path, settings):
    """The ids any of which ends a text: the end of a text, of a turn, of a message."""
    ids = [_token_id(path, settings, key) for key in _ENDS]
    return list(dict.fromkeys(token for token in ids if token is not None))
