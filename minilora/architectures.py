"""The shapes of models that everyone talks of, and models of a shape that hold no numbers.

Knows configurations and layers, opens no file. The shapes are those of the `config.json` that each
model was published with; GPT-3's is table 2.1 of its paper.
"""

from .gpt import GPT, GPTConfig
from .llama import Llama, LlamaConfig
from .lora import Adapter, LoRAPair, target_ranks
from .nn import LinearLayer, in_place_of_all, normal_or_zeros
from .packed import PackedTensor, layout_of

# Layers take memory, though their numbers do not.
MOST_LAYERS = 10_000


def _gpt2(n_layer, n_head, n_embd):
    return GPTConfig(n_layer, n_head, n_embd, vocab_size=50257, block_size=1024)


def _llama3(layers, channels, inner, heads, factor, tied=False):
    """A Llama 3.1 or 3.2: 8 heads of keys and values, a context stretched `factor` times."""
    return LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=channels,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling={
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        tie_word_embeddings=tied,
    )


def _qwen(layers, channels, inner, heads, kv_heads, vocabulary, context, tied):
    return LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=channels,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=context,
        rope_theta=1000000.0,
        tie_word_embeddings=tied,
        attention_bias=True,
    )


def _mistral(vocabulary, context, theta):
    return LlamaConfig(
        num_hidden_layers=32,
        hidden_size=4096,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=vocabulary,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        rope_theta=theta,
    )


# {name: GPTConfig or LlamaConfig}
PRESETS = {
    "gpt2": _gpt2(12, 12, 768),
    "gpt2-medium": _gpt2(24, 16, 1024),
    "gpt2-large": _gpt2(36, 20, 1280),
    "gpt2-xl": _gpt2(48, 25, 1600),
    "gpt3-175b": GPTConfig(96, 96, 12288, vocab_size=50257, block_size=2048),
    "llama-2-7b": LlamaConfig(32, 4096, 11008, 32, 32000, 4096, rms_norm_eps=1e-5),
    "llama-3.1-8b": _llama3(32, 4096, 14336, 32, factor=8.0),
    "llama-3.1-70b": _llama3(80, 8192, 28672, 64, factor=8.0),
    "llama-3.2-1b": _llama3(16, 2048, 8192, 32, factor=32.0, tied=True),
    "qwen2.5-0.5b": _qwen(24, 896, 4864, 14, 2, 151936, 32768, tied=True),
    "qwen2.5-7b": _qwen(28, 3584, 18944, 28, 4, 152064, 131072, tied=False),
    # The first version looks back 4,096 positions; within these it computes as any other.
    "mistral-7b": _mistral(32000, 4096, 10000.0),
    "mistral-7b-v0.3": _mistral(32768, 32768, 1000000.0),
    "smollm2-135m": LlamaConfig(
        num_hidden_layers=30,
        hidden_size=576,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=100000.0,
        tie_word_embeddings=True,
    ),
    "minilora-demo": GPTConfig(
        3, 4, 96, vocab_size=96, block_size=128, positions="rope", rope_theta=100.0
    ),
}


def blank(config, dtype="float32"):
    """A model of this shape that takes no memory: in each tensor one number stands for all.

    It is there to be counted, not to compute. Shapes: as `GPT` and `Llama`.
    Raises: TypeError if `config` is neither a GPTConfig nor a LlamaConfig; ValueError for more
    layers than any model has, or shapes that no array can have.
    """
    if isinstance(config, GPTConfig):
        kind = GPT
    elif isinstance(config, LlamaConfig):
        kind = Llama
    else:
        raise TypeError(
            f"blank: expected a GPTConfig or a LlamaConfig, got {type(config).__name__}; "
            "PRESETS has those of known models"
        )
    if config.n_layer > MOST_LAYERS:
        raise ValueError(
            f"blank: a model of {config.n_layer:,} layers; at most {MOST_LAYERS:,} are counted"
        )
    try:
        return kind(config, None, dtype)
    except ValueError as error:
        raise ValueError(f"blank: no array has the shapes of {config} ({error})") from None


def blank_quantized(model, kind="NF4"):
    """A copy of a plain model as `quantize` would make it, whose packed weights take no memory.

    Raises: ValueError for a kind that there is not, or whose blocks do not fill the rows.
    """
    packed = {}
    for name, module in model.named_modules():
        if isinstance(module, LinearLayer):
            packed[f"{name}.weight"] = _blank_packed(kind, module.weight.shape)
    return model.rebuild(lambda name, x: packed.get(name))


def _blank_packed(kind, shape):
    arrays = [in_place_of_all(0, *layout) for layout in layout_of(kind, shape)]
    return PackedTensor(kind, shape, *arrays)


def blank_adapter(model, config):
    """An adapter for `model` as `init_adapter` would make it, of matrices that take no memory.

    `attach(model, adapter, check_base=False)` gives a model to be counted.
    Shapes: as `init_adapter`. Raises: as `init_adapter`.
    """
    modules = dict(model.named_modules())
    pairs = {}
    for name, r in target_ranks(model, config).items():
        layer = modules[name]
        A = normal_or_zeros(None, 0, (r, layer.in_features), layer.dtype)
        B = normal_or_zeros(None, 0, (layer.out_features, r), layer.dtype)
        pairs[name] = LoRAPair(A, B, config.scaling_of(name))
    return Adapter(config, pairs, None)
