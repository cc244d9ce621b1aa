"""A GPT: token ids in, logits out. Knows nothing of LoRA.

Attention, cache and head are in decoder.py: every decoder has them.

Shapes: B batch, T time (positions), C channels (n_embd), H heads, D = C / H, V vocabulary.
"""

import sys
from dataclasses import dataclass, replace

import numpy as np

from .decoder import Decoder, FeedForward, SelfAttention, rotary_tables
from .lean import gelu
from .nn import Embedding, LayerNorm, Linear, Module, constant, normal_or_zeros


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT, in GPT-2's names.

    n_layer blocks of n_head heads over n_embd channels, vocab_size tokens, at most block_size
    positions; the MLP is n_inner wide (default 4 · n_embd). positions: "learned" vectors as in
    GPT-2, or "rope", rotary angles position · rope_theta^(-2i/D), with which a small model learns
    far sooner. tie_word_embeddings: the head is the embedding table itself.
    Raises: ValueError that names the field and its value.
    Source: Radford et al. 2019 (GPT-2); Su et al. 2021 (RoPE).
    """

    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int
    block_size: int
    positions: str = "learned"
    rope_theta: float = 10000.0
    n_inner: int | None = None
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True

    def __post_init__(self):
        if self.n_inner is None:
            object.__setattr__(self, "n_inner", 4 * self.n_embd)
        for name in ("n_layer", "n_head", "n_embd", "vocab_size", "block_size", "n_inner"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                self._refuse(name, "be a whole number of at least 1")
        if self.n_embd % self.n_head:
            self._refuse("n_embd", f"be a multiple of n_head {self.n_head}")
        if self.positions not in ("learned", "rope"):
            self._refuse("positions", 'be "learned" or "rope"')
        if not isinstance(self.tie_word_embeddings, bool):
            self._refuse("tie_word_embeddings", "be True or False")
        if self.positions == "rope" and self.n_embd // self.n_head % 2:
            raise ValueError(
                f"GPTConfig: rope turns pairs of channels, but n_embd {self.n_embd} gives each of "
                f"{self.n_head} heads {self.n_embd // self.n_head}"
            )
        for name in ("rope_theta", "layer_norm_epsilon"):
            value = getattr(self, name)
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not 0 < value <= sys.float_info.max:
                self._refuse(name, "be finite and positive")

    def _refuse(self, name, need):
        raise ValueError(f"GPTConfig: {name} must {need}, got {getattr(self, name)!r}")

    def shortened(self, n):
        """The same with a context of n positions fewer."""
        return replace(self, block_size=self.block_size - n)


class Attention(SelfAttention):
    """Causal self-attention, (B, T, C) -> (B, T, C), with as many heads of keys as of queries."""

    def __init__(self, config, rng, dtype):
        C = config.n_embd
        self.n_head = config.n_head
        self.q_proj = Linear.init(C, C, rng, dtype)
        self.k_proj = Linear.init(C, C, rng, dtype)
        self.v_proj = Linear.init(C, C, rng, dtype)
        self.o_proj = Linear.init(C, C, rng, dtype)


class MLP(FeedForward):
    """Two linears around a gelu, (B, T, C) -> (B, T, C)."""

    def __init__(self, config, rng, dtype):
        self.up_proj = Linear.init(config.n_embd, config.n_inner, rng, dtype)
        self.down_proj = Linear.init(config.n_inner, config.n_embd, rng, dtype)

    def __call__(self, x, rng=None):
        return self.down_proj(gelu(self.up_proj(x, rng)), rng)


class Block(Module):
    """x + attn(ln_1(x)), then x + mlp(ln_2(x)): (B, T, C) -> (B, T, C)."""

    def __init__(self, config, rng, dtype):
        self.ln_1 = _layer_norm(config, rng, dtype)
        self.attn = Attention(config, rng, dtype)
        self.ln_2 = _layer_norm(config, rng, dtype)
        self.mlp = MLP(config, rng, dtype)

    def __call__(self, x, rope=None, cache=None, rng=None):
        x = x + self.attn(self.ln_1(x), rope, cache, rng)
        return x + self.mlp(self.ln_2(x), rng)


def _layer_norm(config, rng, dtype):
    weight = constant(1, rng, config.n_embd, dtype)
    bias = constant(0, rng, config.n_embd, dtype)
    return LayerNorm(weight, bias, config.layer_norm_epsilon)


class GPT(Decoder):
    """A GPT. Its head is its embedding table, transposed, unless the config unties the two.

    Weights are drawn from `rng`, a `numpy.random.Generator`: one seed gives the same weights on
    every backend. Without it they are zero, for a loader to fill.

    Shapes: `model(ids)`: ids (B, T) integers on the host -> logits Tensor (B, T, V), in `dtype`.
    A call is given a generator, `model(ids, rng=...)`, if and only if layers are to drop out.
    Raises: ValueError for ids that are empty, out of range or longer than block_size; TypeError if
    they are not integers.
    Source: Radford et al. 2019 (GPT-2), section 2.3; weights drawn with variance 1 / fan-in.

    >>> config = GPTConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=11, block_size=16)
    >>> GPT(config, np.random.default_rng(0))(np.array([[1, 2, 3]])).shape
    (1, 3, 11)
    """

    def __init__(self, config, rng, dtype="float32"):
        self.config = config
        table = lambda rows: Embedding(
            normal_or_zeros(rng, config.n_embd**-0.5, (rows, config.n_embd), dtype)
        )
        self.wte = table(config.vocab_size)
        if config.positions == "learned":
            self.wpe = table(config.block_size)
        self.h = [Block(config, rng, dtype) for _ in range(config.n_layer)]
        self.ln_f = _layer_norm(config, rng, dtype)
        if not config.tie_word_embeddings:
            self.lm_head = table(config.vocab_size)

    def embedded(self, ids):
        """Ids to vectors: (B, T) -> (B, T, C)."""
        return self.wte(ids)

    def states(self, x, positions, cache=None, rng=None):
        """Vectors (B, T, C) at their positions (T,) or (B, T) to the states that the head reads."""
        rope = None
        if self.config.positions == "learned":
            x = x + self.wpe(positions)
        else:
            rope = self._rope(positions, x)
        for i, block in enumerate(self.h):
            x = block(x, rope, None if cache is None else cache[i], rng)
        return self.ln_f(x)

    def blocks(self):
        """The layers, in order."""
        return self.h

    def head_layer(self):
        """The Embedding whose table is the head."""
        return self.wte if self.config.tie_word_embeddings else self.lm_head

    def _rope(self, positions, x):
        """cos and sin of the rotary angles, (T, D/2), as the Tensor x is."""
        D = self.config.n_embd // self.config.n_head
        frequencies = self.config.rope_theta ** (-np.arange(0, D, 2) / D)
        return rotary_tables(positions, frequencies, x)
