"""A decoder of Llama's family: Llama, Mistral, Qwen2, Qwen3, SmolLM2. Knows nothing of LoRA.

It differs from GPT-2 in its norms (RMSNorm), its MLP (SwiGLU), its positions (rotary) and in that
several heads of queries share one head of keys and values. Modules have transformers' names.

Shapes: B batch, T time (positions), C channels (hidden_size), D channels of a head (head_dim).
"""

import math
import sys
from dataclasses import dataclass, replace

import numpy as np

from .decoder import Decoder, FeedForward, SelfAttention, rotary_tables
from .lean import swiglu
from .nn import Embedding, Linear, Module, RMSNorm, constant, normal_or_zeros

_SIZES = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings",
)  # fmt: skip
_FLAGS = ("tie_word_embeddings", "attention_bias", "output_bias", "qk_norm")
# {kind of scaling: the numbers it needs}
_SCALINGS = {
    "linear": ("factor",),
    "llama3": (
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama, in transformers' names.

    num_hidden_layers blocks over hidden_size channels; num_attention_heads heads of queries and
    num_key_value_heads of keys and values (default: as many), each head_dim wide (default:
    hidden_size / num_attention_heads); an MLP intermediate_size wide; at most
    max_position_embeddings positions, whose angles are position · rope_theta^(-2i/D), slowed down
    by rope_scaling: {"rope_type": "linear", "factor"} or {"rope_type": "llama3", "factor",
    "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}.
    attention_bias: q, k and v have a bias; output_bias: so has o. qk_norm: queries and keys are
    normalised, head by head, before they are turned.
    Raises: ValueError that names the field and its value.
    Source: Touvron et al. 2023 (Llama); transformers' LlamaConfig, Qwen2Config and Qwen3Config.
    """

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    vocab_size: int
    max_position_embeddings: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False

    def __post_init__(self):
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None and _is_size(self.num_attention_heads):
            if not _is_size(self.hidden_size) or self.hidden_size % self.num_attention_heads:
                self._refuse(
                    "hidden_size",
                    f"be a multiple of {self.num_attention_heads} heads, or give head_dim",
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        for name in _SIZES:
            if not _is_size(getattr(self, name)):
                self._refuse(name, "be a whole number of at least 1")
        if self.num_attention_heads % self.num_key_value_heads:
            self._refuse(
                "num_attention_heads",
                f"be a multiple of {self.num_key_value_heads}, num_key_value_heads",
            )
        if self.head_dim % 2:
            self._refuse("head_dim", "be even: rotary positions turn pairs of channels")
        for name in ("rope_theta", "rms_norm_eps"):
            if not _is_positive(getattr(self, name)):
                self._refuse(name, "be finite and positive")
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                self._refuse(name, "be True or False")
        if self.rope_scaling is not None and not _is_scaling(self.rope_scaling):
            kinds = " or ".join(f"{kind} with {', '.join(_SCALINGS[kind])}" for kind in _SCALINGS)
            self._refuse("rope_scaling", f"be None or a dict of rope_type {kinds}")

    def _refuse(self, name, need):
        raise ValueError(f"LlamaConfig: {name} must {need}, got {getattr(self, name)!r}")

    def shortened(self, n):
        """The same with a context of n positions fewer."""
        return replace(self, max_position_embeddings=self.max_position_embeddings - n)

    # What generation and training ask of every model's configuration.
    n_layer = property(lambda self: self.num_hidden_layers)
    block_size = property(lambda self: self.max_position_embeddings)


def _is_size(value):
    return type(value) is int and value >= 1


def _is_positive(value):
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return 0 < value <= sys.float_info.max


def _is_scaling(value):
    if not isinstance(value, dict) or value.get("rope_type") not in _SCALINGS:
        return False
    names = _SCALINGS[value["rope_type"]]
    if value.keys() != {"rope_type", *names} or not all(_is_positive(value[n]) for n in names):
        return False
    # Between the two factors frequencies are blended.
    low = value.get("low_freq_factor", 0)
    return value.get("high_freq_factor", math.inf) > low


class Attention(SelfAttention):
    """Causal self-attention with grouped queries, (B, T, C) -> (B, T, C)."""

    def __init__(self, config, rng, dtype):
        C = config.hidden_size
        n_q = config.num_attention_heads * config.head_dim
        n_kv = config.num_key_value_heads * config.head_dim
        self.n_head = config.num_attention_heads
        self.q_proj = Linear.init(C, n_q, rng, dtype, bias=config.attention_bias)
        self.k_proj = Linear.init(C, n_kv, rng, dtype, bias=config.attention_bias)
        self.v_proj = Linear.init(C, n_kv, rng, dtype, bias=config.attention_bias)
        self.o_proj = Linear.init(n_q, C, rng, dtype, bias=config.output_bias)
        self.q_norm = None
        self.k_norm = None
        if config.qk_norm:
            self.q_norm = _norm(config.head_dim, config, rng, dtype)
            self.k_norm = _norm(config.head_dim, config, rng, dtype)

    def normed(self, x, which):
        """Queries or keys, each head normalised for itself where the model has that."""
        norm = self.q_norm if which == "q" else self.k_norm
        if norm is None:
            return x
        B, T, C = x.shape
        return norm(x.reshape(B, T, -1, norm.weight.shape[0])).reshape(B, T, C)


class MLP(FeedForward):
    """down(silu(gate(x)) * up(x)), (B, T, C) -> (B, T, C)."""

    def __init__(self, config, rng, dtype):
        C = config.hidden_size
        self.gate_proj = Linear.init(C, config.intermediate_size, rng, dtype, bias=False)
        self.up_proj = Linear.init(C, config.intermediate_size, rng, dtype, bias=False)
        self.down_proj = Linear.init(config.intermediate_size, C, rng, dtype, bias=False)

    def __call__(self, x, rng=None):
        return self.down_proj(swiglu(self.gate_proj(x, rng), self.up_proj(x, rng)), rng)


class Block(Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): (B, T, C) -> (B, T, C)."""

    def __init__(self, config, rng, dtype):
        self.input_layernorm = _norm(config.hidden_size, config, rng, dtype)
        self.self_attn = Attention(config, rng, dtype)
        self.post_attention_layernorm = _norm(config.hidden_size, config, rng, dtype)
        self.mlp = MLP(config, rng, dtype)

    def __call__(self, x, rope=None, cache=None, rng=None):
        x = x + self.self_attn(self.input_layernorm(x), rope, cache, rng)
        return x + self.mlp(self.post_attention_layernorm(x), rng)


def _norm(n, config, rng, dtype):
    return RMSNorm(constant(1, rng, n, dtype), config.rms_norm_eps)


class Llama(Decoder):
    """A decoder of Llama's family; its head is its embedding table if the config ties the two.

    Weights are drawn from `rng`, a `numpy.random.Generator`: one seed gives the same weights on
    every backend. Without it they are zero, for a loader to fill.

    Shapes: `model(ids)`: ids (B, T) integers on the host -> logits Tensor (B, T, V), in `dtype`.
    A call is given a generator, `model(ids, rng=...)`, if and only if layers are to drop out.
    Raises: ValueError for ids that are empty, out of range or longer than the context; TypeError if
    they are not integers.
    Source: Touvron et al. 2023, "LLaMA", section 2.2; Ainslie et al. 2023 (grouped queries).

    >>> config = LlamaConfig(num_hidden_layers=1, hidden_size=8, intermediate_size=16,
    ...                      num_attention_heads=2, num_key_value_heads=1, vocab_size=11,
    ...                      max_position_embeddings=16)
    >>> Llama(config, np.random.default_rng(0))(np.array([[1, 2, 3]])).shape
    (1, 3, 11)
    """

    def __init__(self, config, rng, dtype="float32"):
        self.config = config
        C = config.hidden_size
        table = lambda: Embedding(normal_or_zeros(rng, C**-0.5, (config.vocab_size, C), dtype))
        self.embed_tokens = table()
        self.layers = [Block(config, rng, dtype) for _ in range(config.num_hidden_layers)]
        self.norm = _norm(C, config, rng, dtype)
        if not config.tie_word_embeddings:
            self.lm_head = table()

    def embedded(self, ids):
        """Ids to vectors: (B, T) -> (B, T, C)."""
        return self.embed_tokens(ids)

    def states(self, x, positions, cache=None, rng=None):
        """Vectors (B, T, C) at their positions (T,) or (B, T) to the states that the head reads."""
        rope = rotary_tables(positions, frequencies(self.config), x)
        for i, block in enumerate(self.layers):
            x = block(x, rope, None if cache is None else cache[i], rng)
        return self.norm(x)

    def blocks(self):
        """The layers, in order."""
        return self.layers

    def head_layer(self):
        """The Embedding whose table is the head."""
        return self.embed_tokens if self.config.tie_word_embeddings else self.lm_head


def frequencies(config):
    """By how many radians each pair of channels turns from one position to the next: (D/2,).

    Source: Su et al. 2021, section 3.2.2; Chen et al. 2023, "Position Interpolation" (linear);
    transformers' `_compute_llama3_parameters` (llama3).
    """
    D = config.head_dim
    plain = config.rope_theta ** (-np.arange(0, D, 2) / D)
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    slow = plain / scaling["factor"]
    if scaling["rope_type"] == "linear":
        return slow
    # Llama 3.1: pairs that turn often within the first context stay, those that turn seldom are
    # slowed down, and between the two they are blended.
    low = scaling["low_freq_factor"]
    high = scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * plain / (2 * math.pi)
    blend = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - blend) * slow + blend * plain
