"""Llama's family in files, as transformers writes it: llama, mistral, qwen2 and qwen3.

Their modules are called as ours are, behind "model.", and their weights lie as ours do. What is
left to read is the configuration: some of its fields change what a model computes, and an absent
field means another thing in each kind. What is not computed here is refused by the field's name.
Knows fields and names, opens no file.
"""

from ..llama import Llama, LlamaConfig
from .family import Family, check_fields, head_is_tied
from .rotary_fields import read_rotary, written_rotary

# {model_type: the class of transformers that is one}
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_REQUIRED = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size",
    "max_position_embeddings",
)  # fmt: skip
# For what is absent here transformers has defaults that fit one model alone, the same for all
# sizes: 32 key/value heads in a Qwen.
_ALSO_REQUIRED = {
    "llama": (),
    "mistral": ("num_key_value_heads",),
    "qwen2": ("num_key_value_heads",),
    "qwen3": ("num_key_value_heads", "head_dim"),
}
# Fields that change what a model computes. The first value stands for an absent field.
_SUPPORTED = {
    # One function under two names.
    "hidden_act": ("silu", "swish"),
    "mlp_bias": (False, None),
    "pretraining_tp": (1, None),
    "partial_rotary_factor": (1, None),
}
# What transformers takes for absent fields.
_RMS_NORM_EPS = 1e-6
_SLIDING_WINDOW = 4096
_MAX_WINDOW_LAYERS = 28
# What is written anew for each model; another program's fields beside them stay.
_WRITTEN_ANEW = ("torch_dtype", "quantization_config", *_SUPPORTED)


def _read_config(folder, fields, tensors):
    model_type = fields["model_type"]
    required = (*_REQUIRED, *_ALSO_REQUIRED[model_type])
    missing = [key for key in required if key not in fields]
    if missing:
        raise ValueError(f"no {', '.join(missing)}: this does not describe a {model_type}")
    _check_not_quantized(fields)
    check_fields(fields, _SUPPORTED)
    rope_theta, rope_scaling = read_rotary(fields)
    attention_bias, output_bias = _read_biases(fields)
    tied = head_is_tied(
        folder, fields, tensors, embedding="embed_tokens.weight", head="lm_head.weight",
        default=False,
    )  # fmt: skip
    if not tied and tensors and "lm_head.weight" not in tensors:
        raise ValueError(
            "the tensors have no lm_head.weight, though tie_word_embeddings is not true; if the "
            'head is the embedding, add "tie_word_embeddings": true'
        )
    config = LlamaConfig(
        num_hidden_layers=fields["num_hidden_layers"],
        hidden_size=fields["hidden_size"],
        intermediate_size=fields["intermediate_size"],
        num_attention_heads=fields["num_attention_heads"],
        num_key_value_heads=fields.get("num_key_value_heads"),
        head_dim=fields.get("head_dim"),
        vocab_size=fields["vocab_size"],
        max_position_embeddings=fields["max_position_embeddings"],
        rms_norm_eps=_given(fields, "rms_norm_eps", _RMS_NORM_EPS),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tie_word_embeddings=tied,
        attention_bias=attention_bias,
        output_bias=output_bias,
        qk_norm=model_type == "qwen3",
    )
    _check_window(fields)
    return config


def _given(fields, key, default):
    """The field `key`, or `default` where it is absent or null."""
    value = fields.get(key)
    return default if value is None else value


def _check_not_quantized(fields):
    quantization = fields.get("quantization_config")
    if quantization is None:
        return
    method = quantization
    if isinstance(quantization, dict):
        method = quantization.get("quant_method")
    raise ValueError(
        f"quantization_config: weights quantised by {method!r} are not read; take the model that "
        "they were made from, or a .gguf file of it"
    )


def _check_window(fields):
    """Raise ValueError if some layer looks back less far than the context is long."""
    layer_types = fields.get("layer_types")
    if not isinstance(layer_types, (list, type(None))):
        raise ValueError(f"layer_types must be a list of texts, got {layer_types!r:.100}")
    for kind in layer_types or ():
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(
                f"layer_types: {kind!r} changes what the model computes; only 'full_attention' is "
                "implemented"
            )
    window = _window(fields)
    context = fields["max_position_embeddings"]
    if window is None:
        return
    if not isinstance(window, int) or window < context:
        raise ValueError(
            f"sliding_window={window!r} is shorter than the context, max_position_embeddings="
            f"{context}, and is not implemented; a context of {window!r} has no use for it: lower "
            "max_position_embeddings"
        )


def _window(fields):
    """How many positions some layer looks back, itself included; None for all of them."""
    model_type = fields["model_type"]
    layer_types = fields.get("layer_types")
    window = fields.get("sliding_window", _SLIDING_WINDOW)
    if model_type == "mistral":
        # In each layer, whatever layer_types say.
        return window
    if layer_types is not None:
        slides = "sliding_attention" in layer_types
    else:
        # Layers from this number on.
        first = fields.get("max_window_layers", _MAX_WINDOW_LAYERS)
        slides = not isinstance(first, int) or first < fields["num_hidden_layers"]
    if model_type == "llama":
        # transformers' Llama has no window. Whoever says of its layers that they slide means one.
        return window if layer_types is not None and slides else None
    if not fields.get("use_sliding_window", False) or not slides:
        return None
    return window


def _read_biases(fields):
    """(has q, k, v a bias?, has o one?)"""
    model_type = fields["model_type"]
    if model_type == "qwen2":
        # Whatever its fields say.
        return True, False
    if model_type == "mistral":
        check_fields(fields, {"attention_bias": (False, None)})
        return False, False
    bias = _given(fields, "attention_bias", False)
    if not isinstance(bias, bool):
        raise ValueError(f"attention_bias must be true or false, got {bias!r}")
    return bias, bias


def _write_config(model, fields, dtype):
    config = model.config
    model_type = _written_type(config, fields.get("model_type"))
    settings = {}
    if fields.get("model_type") in _ARCHITECTURES:
        settings = {key: fields[key] for key in fields if key not in _WRITTEN_ANEW}
    if len(settings.get("layer_types") or ()) != config.num_hidden_layers:
        settings.pop("layer_types", None)
    written = {
        **settings,
        "model_type": model_type,
        "architectures": [_ARCHITECTURES[model_type]],
        "hidden_act": "silu",
        "num_hidden_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        **written_rotary(config),
        "tie_word_embeddings": config.tie_word_embeddings,
        "dtype": dtype,
        # Without a tokenizer there is no end-of-text token to name: transformers' default, 2, may
        # mean anything.
        "bos_token_id": fields.get("bos_token_id"),
        "eos_token_id": fields.get("eos_token_id"),
    }
    if model_type in ("llama", "qwen3"):
        written["attention_bias"] = config.attention_bias
    if model_type == "llama":
        written["mlp_bias"] = False
    if model_type == "mistral":
        # Absent it would be 4096.
        written.setdefault("sliding_window", None)
    return written


def _written_type(config, wanted):
    """The model_type of transformers that computes as `config` says: `wanted` if that does."""
    able = []
    if config.qk_norm:
        if config.attention_bias == config.output_bias:
            able.append("qwen3")
    elif config.attention_bias and not config.output_bias:
        able.append("qwen2")
    elif config.attention_bias == config.output_bias:
        able.append("llama")
        if not config.attention_bias:
            able.append("mistral")
    if not able:
        raise ValueError(
            f"no kind of model that transformers has computes with attention_bias="
            f"{config.attention_bias}, output_bias={config.output_bias}, qk_norm={config.qk_norm}; "
            f"only {', '.join(_ARCHITECTURES)} are written"
        )
    return wanted if wanted in able else able[0]


def _count(config):
    """How many numbers a model of this configuration holds, but for biases and norms."""
    C = config.hidden_size
    heads = config.num_attention_heads + config.num_key_value_heads
    block = 2 * C * heads * config.head_dim + 3 * C * config.intermediate_size
    tables = 1 if config.tie_word_embeddings else 2
    return config.num_hidden_layers * block + tables * C * config.vocab_size


def _describe(config):
    """The shape of a model, for people."""
    extras = ""
    if config.attention_bias:
        extras += ", biases on q, k, v"
        if config.output_bias:
            extras += " and o"
    if config.qk_norm:
        extras += ", norms on q and k"
    if config.rope_scaling:
        extras += f", rotary positions scaled ({config.rope_scaling['rope_type']})"
    return (
        f"{config.num_hidden_layers} blocks of {config.num_attention_heads} heads of "
        f"{config.head_dim} over {config.num_key_value_heads} of keys and values, "
        f"{config.hidden_size} channels, {config.intermediate_size} in the MLP{extras}"
    )


_LINEARS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
LLAMA = Family(
    title="Llama's family",
    model_types=tuple(_ARCHITECTURES),
    model=Llama,
    block=r"layers\.\d+\.",
    parts={name: (name,) for name in _LINEARS},
    # LlamaForCausalLM has it before every name but that of its head, a bare LlamaModel has none.
    prefix="model.",
    # Angles that old files carry. They are computed from rope_theta.
    unused=r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
    read_config=_read_config,
    write_config=_write_config,
    count=_count,
    describe=_describe,
    note="vLLM serves adapters of Llama's family as they are, without a merge (by its source: it "
    "was not run)",
)
