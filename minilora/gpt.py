"""A GPT: token ids in, logits out. Knows nothing of LoRA.

Shapes: B batch, T time (positions), S positions in the key/value cache, C channels (n_embd),
H heads, D = C / H, V vocabulary.
"""

import sys
from dataclasses import dataclass

import numpy as np

from . import functional as F
from .backend import get_array_module, on_host, to_device
from .graph import is_recording
from .lean import attention, gelu, linear_cross_entropy
from .nn import Embedding, LayerNorm, Linear, Module, normal_or_zeros
from .tensor import Tensor


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
            if not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
                self._refuse(name, "be finite and positive")

    def _refuse(self, name, need):
        raise ValueError(f"GPTConfig: {name} must {need}, got {getattr(self, name)!r}")


class KeyValueCache:
    """One layer's keys and values of up to `size` positions: a new token goes through alone."""

    def __init__(self, size):
        self.size = size
        # How many positions are taken, and the array (2, B, size, C) that holds keys and values.
        self.length = 0
        self.keys_and_values = None

    def extend(self, k, v):
        """Append k, v (B, T, C); returns all keys and all values as Tensors (B, S + T, C)."""
        B, T, C = k.shape
        stop = self.length + T
        cached = self.keys_and_values
        if cached is None:
            cached = get_array_module(k.data).empty((2, B, self.size, C), k.dtype)
        if cached.shape != (2, B, self.size, C) or cached.dtype != k.dtype or stop > self.size:
            raise ValueError(
                f"a cache of {cached.shape[1:]} {cached.dtype}, {self.length} positions taken, "
                f"cannot go on with {k.shape} {k.dtype}: make one for each batch, and long enough"
            )
        cached[0, :, self.length : stop] = k.data
        cached[1, :, self.length : stop] = v.data
        self.keys_and_values = cached
        self.length = stop
        return Tensor(cached[0, :, :stop]), Tensor(cached[1, :, :stop])


class Attention(Module):
    """Causal self-attention, (B, T, C) -> (B, T, C).

    The projections are separate layers, so that each can carry its own LoRA.
    """

    def __init__(self, config, rng, dtype):
        C = config.n_embd
        self.n_head = config.n_head
        self.q_proj = Linear.init(C, C, rng, dtype)
        self.k_proj = Linear.init(C, C, rng, dtype)
        self.v_proj = Linear.init(C, C, rng, dtype)
        self.o_proj = Linear.init(C, C, rng, dtype)

    def __call__(self, x, rope=None, cache=None, rng=None):
        q = self.q_proj(x, rng)
        k = self.k_proj(x, rng)
        v = self.v_proj(x, rng)
        if rope is not None:
            cos, sin = rope
            q = F.rotary(q, cos, sin, self.n_head)
            k = F.rotary(k, cos, sin, self.n_head)
        if cache is not None:
            k, v = cache.extend(k, v)
        return self.o_proj(attention(q, k, v, self.n_head), rng)


class MLP(Module):
    """Two linears around a gelu, (B, T, C) -> (B, T, C)."""

    def __init__(self, config, rng, dtype):
        self.up_proj = Linear.init(config.n_embd, config.n_inner, rng, dtype)
        self.down_proj = Linear.init(config.n_inner, config.n_embd, rng, dtype)

    def __call__(self, x, rng=None):
        return self.down_proj(gelu(self.up_proj(x, rng)), rng)


class Block(Module):
    """x + attn(ln_1(x)), then x + mlp(ln_2(x)): (B, T, C) -> (B, T, C)."""

    def __init__(self, config, rng, dtype):
        self.ln_1 = _layer_norm(config, dtype)
        self.attn = Attention(config, rng, dtype)
        self.ln_2 = _layer_norm(config, dtype)
        self.mlp = MLP(config, rng, dtype)

    def __call__(self, x, rope=None, cache=None, rng=None):
        x = x + self.attn(self.ln_1(x), rope, cache, rng)
        return x + self.mlp(self.ln_2(x), rng)


def _layer_norm(config, dtype):
    weight = Tensor(np.ones(config.n_embd, dtype), requires_grad=True)
    bias = Tensor(np.zeros(config.n_embd, dtype), requires_grad=True)
    return LayerNorm(weight, bias, config.layer_norm_epsilon)


class GPT(Module):
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
        self.ln_f = _layer_norm(config, dtype)
        if not config.tie_word_embeddings:
            self.lm_head = table(config.vocab_size)

    def __call__(self, ids, *, cache=None, rng=None):
        return self.head(self.hidden(ids, cache, rng))

    def hidden(self, ids, cache=None, rng=None):
        """Ids to the states that the head reads: (B, T) -> (B, T, C).

        `cache`, from `new_cache`, holds the positions before these ids, and takes these up.
        """
        start = cache[0].length if cache else 0
        ids = self._checked(ids, start, cache)
        positions = np.arange(start, start + ids.shape[1])
        x = self.wte(ids)
        rope = None
        if self.config.positions == "learned":
            x = x + self.wpe(positions)
        else:
            rope = self._rope(positions)
        for i, block in enumerate(self.h):
            x = block(x, rope, None if cache is None else cache[i], rng)
        return self.ln_f(x)

    def head(self, hidden):
        """Hidden states to logits: (..., C) -> (..., V)."""
        return F.linear(hidden, self._head_weight())

    def loss(self, ids, targets, rng=None):
        """Mean next-token loss in nats: ids and targets (B, T) -> a scalar Tensor.

        A target of -100 carries no loss. `rng`: as in `model(ids, rng=...)`.
        """
        return linear_cross_entropy(self.hidden(ids, rng=rng), self._head_weight(), targets)

    def new_cache(self, size):
        """An empty key/value cache of `size` positions, for one batch: one for each block."""
        return [KeyValueCache(size) for _ in self.h]

    def _head_weight(self):
        table = self.wte if self.config.tie_word_embeddings else self.lm_head
        return table.weight

    def _checked(self, ids, start, cache):
        """`ids` on the host, if the model can read them after `start` positions."""
        ids = on_host(ids)
        if cache is not None and len(cache) != len(self.h):
            raise ValueError(
                f"GPT: the cache has {len(cache)} layers, the model {len(self.h)}: "
                "make it with model.new_cache(size)"
            )
        if cache is not None and is_recording():
            raise ValueError(
                "GPT: a cache carries no gradients back to earlier positions; "
                "use it under no_grad()"
            )
        if ids.ndim != 2 or ids.size == 0:
            raise ValueError(f"GPT: ids must have shape (B, T) with B, T >= 1, got {ids.shape}")
        stop = start + ids.shape[1]
        if stop > self.config.block_size:
            raise ValueError(
                f"GPT: {stop} positions do not fit in a context of {self.config.block_size} "
                "(block_size); shorten the input"
            )
        return ids

    def _rope(self, positions):
        """cos and sin of the rotary angles, (T, D/2), as the model's arrays are."""
        D = self.config.n_embd // self.config.n_head
        angles = positions[:, None] * self.config.rope_theta ** (-np.arange(0, D, 2) / D)
        table = self.wte.weight.data
        xp = get_array_module(table)
        cos = to_device(np.cos(angles).astype(table.dtype), xp)
        sin = to_device(np.sin(angles).astype(table.dtype), xp)
        return cos, sin
