"""A GPT: token ids in, logits out. Knows nothing of LoRA.

Shapes: B batch, T time (positions), S positions in the key/value cache, C channels (n_embd), H heads, V vocabulary.
"""

import sys
from dataclasses import dataclass

import numpy as np

from . import functional as F
from .backend import get_array_module, on_host, to_device
from .graph import is_recording
from .nn import Embedding, LayerNorm, Linear, Module, normal
from .tensor import Tensor


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT, in GPT-2's names.

    Shapes: n_layer blocks of n_head heads over n_embd channels, vocab_size tokens, at most block_size positions;
    the MLP is n_inner wide (default 4 · n_embd). positions: "learned" vectors as in GPT-2, or "rope", rotary
    angles position · rope_theta^(-2i/D), with which a small model learns far sooner. tie_word_embeddings: the head is
    the embedding table itself.
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
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"GPTConfig: {name} must be a whole number of at least 1, got {getattr(self, name)!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"GPTConfig: n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if self.positions not in ("learned", "rope"):
            raise ValueError(f'GPTConfig: positions must be "learned" or "rope", got {self.positions!r}')
        if not isinstance(self.tie_word_embeddings, bool):
            raise ValueError(f"GPTConfig: tie_word_embeddings must be True or False, got {self.tie_word_embeddings!r}")
        if self.positions == "rope" and self.n_embd // self.n_head % 2:
            raise ValueError(f"GPTConfig: rope turns pairs, but a head has {self.n_embd // self.n_head} channels (odd)")
        for name in ("rope_theta", "layer_norm_epsilon"):
            if not isinstance(getattr(self, name), (int, float)) or not 0 < getattr(self, name) <= sys.float_info.max:
                raise ValueError(f"GPTConfig: {name} must be finite and positive, got {getattr(self, name)!r}")


class Attention(Module):
    """Causal self-attention, (B, T, C) -> (B, T, C), with separate projections so that each can carry its own LoRA."""

    def __init__(self, config, rng, dtype):
        C = config.n_embd
        self.n_head = config.n_head
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (Linear.init(C, C, rng, dtype) for _ in range(4))

    def __call__(self, x, rope, cache):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if rope:
            q, k = F.rotary(q, *rope, self.n_head), F.rotary(k, *rope, self.n_head)
        if cache is not None:
            k, v = cache.extend(k, v)
        return self.o_proj(F.attention(q, k, v, self.n_head))


class MLP(Module):
    """Two linears around a gelu, (B, T, C) -> (B, T, C)."""

    def __init__(self, config, rng, dtype):
        self.up_proj = Linear.init(config.n_embd, config.n_inner, rng, dtype)
        self.down_proj = Linear.init(config.n_inner, config.n_embd, rng, dtype)

    def __call__(self, x):
        return self.down_proj(F.gelu(self.up_proj(x)))


class Block(Module):
    """x + attn(ln_1(x)), then x + mlp(ln_2(x)): (B, T, C) -> (B, T, C)."""

    def __init__(self, config, rng, dtype):
        self.ln_1 = _layer_norm(config, dtype)
        self.attn = Attention(config, rng, dtype)
        self.ln_2 = _layer_norm(config, dtype)
        self.mlp = MLP(config, rng, dtype)

    def __call__(self, x, rope, cache):
        x = x + self.attn(self.ln_1(x), rope, cache)
        return x + self.mlp(self.ln_2(x))


def _layer_norm(config, dtype):
    ones, zeros = np.ones(config.n_embd, dtype), np.zeros(config.n_embd, dtype)
    return LayerNorm(Tensor(ones, requires_grad=True), Tensor(zeros, requires_grad=True), config.layer_norm_epsilon)


class GPT(Module):
    """A GPT. Its head is its embedding table, transposed, unless the config unties the two.

    Shapes: `model(ids)`: ids (B, T) integers on the host -> logits Tensor (B, T, V), float32 unless `dtype` says
    otherwise. `rng` is a `numpy.random.Generator`: the same seed gives the same weights on every backend; None leaves
    them zero, for a loader.
    Raises: ValueError for ids that are empty, out of range or longer than block_size; TypeError if not integers.
    Source: Radford et al. 2019 (GPT-2), section 2.3; weights drawn with variance 1 / fan-in.

    >>> config = GPTConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=11, block_size=16)
    >>> GPT(config, np.random.default_rng(0))(np.array([[1, 2, 3]])).shape
    (1, 3, 11)
    """

    def __init__(self, config, rng, dtype="float32"):
        self.config = config
        table = lambda rows: Embedding(normal(rng, config.n_embd**-0.5, (rows, config.n_embd), dtype))
        self.wte = table(config.vocab_size)
        if config.positions == "learned":
            self.wpe = table(config.block_size)
        self.h = [Block(config, rng, dtype) for _ in range(config.n_layer)]
        self.ln_f = _layer_norm(config, dtype)
        if not config.tie_word_embeddings:
            self.lm_head = table(config.vocab_size)

    def __call__(self, ids, cache=None):
        return self.head(self.hidden(ids, cache))

    def head(self, hidden):
        """Logits of hidden states: (..., C) -> (..., V)."""
        return F.linear(hidden, self._head_weight())

    def _head_weight(self):
        return (self.wte if self.config.tie_word_embeddings else self.lm_head).weight

    def hidden(self, ids, cache=None):
        """What the head reads, (B, T) -> (B, T, C). `cache`: one KeyValueCache per block, whose positions go on."""
        ids, start = on_host(ids), cache[0].length if cache else 0
        if cache and is_recording():
            raise ValueError("GPT: a cache carries no gradients back to earlier positions; use it under no_grad()")
        if ids.ndim != 2 or ids.size == 0:
            raise ValueError(f"GPT: ids must have shape (B, T) with B, T >= 1, got {ids.shape}")
        if start + ids.shape[1] > self.config.block_size:
            raise ValueError(
                f"GPT: {start + ids.shape[1]} positions do not fit in a context of {self.config.block_size} "
                "(block_size); shorten the input"
            )
        x, rope = self.wte(ids), None
        positions = np.arange(start, start + ids.shape[1])
        if self.config.positions == "learned":
            x = x + self.wpe(positions)
        else:
            rope = self._rope(positions)
        for block, layer_cache in zip(self.h, cache or [None] * len(self.h), strict=True):
            x = block(x, rope, layer_cache)
        return self.ln_f(x)

    def loss(self, ids, targets):
        """Mean next-token loss in nats: ids and targets (B, T) -> scalar Tensor; a target of -100 carries no loss."""
        return F.linear_cross_entropy(self.hidden(ids), self._head_weight(), targets)

    def _rope(self, positions):
        """cos and sin (T, D/2) of the rotary angles."""
        D = self.config.n_embd // self.config.n_head
        angles = positions[:, None] * self.config.rope_theta ** (-np.arange(0, D, 2) / D)
        table = self.wte.weight.data
        return tuple(to_device(f(angles).astype(table.dtype), get_array_module(table)) for f in (np.cos, np.sin))


class KeyValueCache:
    """One layer's keys and values of up to `size` positions: a new token then goes through the layer alone."""

    def __init__(self, size):
        self.size, self.length, self.held = size, 0, None  # held: an array (2, B, size, C)

    def extend(self, k, v):
        """Append k, v (B, T, C) to what is held; returns all of it as Tensors (B, S + T, C)."""
        (B, T, C), start = k.shape, self.length
        whole = (2, B, self.size, C)
        held = get_array_module(k.data).empty(whole, k.dtype) if self.held is None else self.held
        if held.shape != whole or held.dtype != k.dtype or start + T > self.size:
            raise ValueError(f"a cache of {held.shape[1:]} {held.dtype}, {start} positions taken, cannot go on with "
                             f"{k.shape} {k.dtype}: make one for each batch, and long enough")
        held[0, :, start : start + T], held[1, :, start : start + T] = k.data, v.data
        self.held, self.length = held, start + T
        return tuple(Tensor(a) for a in held[:, :, : self.length])
