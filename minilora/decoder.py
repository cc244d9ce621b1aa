"""What every decoder does with ids, positions, attention, a cache and a head. Knows no model.

A decoder reads token ids from left to right and says, at each position, what comes next. GPT-2 and
Llama differ in their norms, their MLPs and their positions; what they share is written here once.

Shapes: B batch, T time (positions), S positions in the key/value cache, P keys in front, C
channels, H heads, D = C / H, V vocabulary. Keys and values may have fewer heads than queries.
"""

import numpy as np

from . import functional as F
from .backend import get_array_module, on_host, to_device
from .graph import is_recording
from .lean import attention, linear_cross_entropy
from .nn import Module
from .tensor import Tensor


class KeyValueCache:
    """One layer's keys and values of up to `size` positions: a new token goes through alone.

    `starts`, (B,) integers, are the columns where the rows of a batch begin, if prompts of several
    lengths were filled up on the left; None if all begin at column 0.
    """

    def __init__(self, size, starts=None):
        self.size = size
        self.starts = starts
        # How many positions are taken, how many keys stand in front of them, and the array
        # (2, B, front + size, C) that holds keys and values.
        self.length = 0
        self.n_front = 0
        self.keys_and_values = None

    def extend(self, k, v, front=None):
        """Append k, v (B, T, C); returns all keys and all values as Tensors (B, P + S + T, C).

        `front`, two Tensors (B, P, C), stands before all positions. It is copied at the first call.
        """
        B, T, C = k.shape
        cached = self.keys_and_values
        n_front = self.n_front
        if cached is None:
            n_front = 0 if front is None else front[0].shape[1]
            cached = get_array_module(k.data).empty((2, B, n_front + self.size, C), k.dtype)
            for i in range(2 if n_front else 0):
                cached[i, :, :n_front] = front[i].data
        start = n_front + self.length
        stop = start + T
        expected = (2, B, n_front + self.size, C)
        if cached.shape != expected or cached.dtype != k.dtype or stop > n_front + self.size:
            raise ValueError(
                f"a cache of {cached.shape[1:]} {cached.dtype}, {self.length} positions taken, "
                f"cannot go on with {k.shape} {k.dtype}: make one for each batch, and long enough"
            )
        cached[0, :, start:stop] = k.data
        cached[1, :, start:stop] = v.data
        self.keys_and_values = cached
        self.n_front = n_front
        self.length += T
        return Tensor(cached[0, :, :stop]), Tensor(cached[1, :, :stop])

    def hidden(self):
        """Which keys no query sees: booleans (B, P + S) on the host, or None. It is padding."""
        if self.starts is None:
            return None
        columns = np.arange(-self.n_front, self.length)
        return (columns >= 0) & (columns < np.asarray(self.starts)[:, None])


class SelfAttention(Module):
    """Causal self-attention, (B, T, C) -> (B, T, C).

    The projections are separate layers, so that each can carry its own LoRA. A model's own class
    makes them: q_proj, k_proj, v_proj and o_proj, and n_head. It may change queries and keys before
    they are turned, in `normed`.
    """

    def normed(self, x, which):
        """Queries or keys as they come from their projection; `which` is "q" or "k"."""
        return x

    def __call__(self, x, rope=None, cache=None, rng=None, front=None):
        """`rope` is (cos, sin) of the positions, or None; `cache` a KeyValueCache, or None.

        `front`, keys and values (B, P, C), is seen by every query, as if it stood before position
        0: what prefix tuning learns.
        """
        q = self.normed(self.q_proj(x, rng), "q")
        k = self.normed(self.k_proj(x, rng), "k")
        v = self.v_proj(x, rng)
        if rope is not None:
            cos, sin = rope
            D = 2 * cos.shape[-1]
            q = F.rotary(q, cos, sin, q.shape[-1] // D)
            k = F.rotary(k, cos, sin, k.shape[-1] // D)
        hidden = None
        if cache is not None:
            k, v = cache.extend(k, v, front)
            hidden = cache.hidden()
        elif front is not None:
            k = F.concatenate([front[0], k], axis=1)
            v = F.concatenate([front[1], v], axis=1)
        return self.o_proj(attention(q, k, v, self.n_head, hidden), rng)


class FeedForward(Module):
    """The other half of a block, an MLP, (B, T, C) -> (B, T, C). `down_proj` is its last layer."""


class Decoder(Module):
    """Token ids in, logits out. A model's own class has `config`, with vocab_size and block_size.

    It has `embedded(ids)` and `states(x, positions, cache, rng)`, of which `hidden` is made;
    `blocks()`, the list of its layers; and `head_layer()`, the Embedding whose table is the head.

    Shapes: `model(ids)`: ids (B, T) integers on the host -> logits Tensor (B, T, V), in `dtype`.
    A call is given a generator, `model(ids, rng=...)`, if and only if layers are to drop out.
    Raises: ValueError for ids that are empty, out of range or longer than block_size; TypeError if
    they are not integers.
    """

    def __call__(self, ids, *, cache=None, rng=None):
        return self.head(self.hidden(ids, cache, rng))

    def hidden(self, ids, cache=None, rng=None):
        """Ids to the states that the head reads: (B, T) -> (B, T, C).

        `cache`, from `new_cache`, holds the positions before these ids, and takes these up.
        """
        ids, positions = self.checked(ids, cache)
        return self.states(self.embedded(ids), positions, cache, rng)

    def head(self, hidden):
        """Hidden states to logits: (..., C) -> (..., V)."""
        return F.linear(hidden, self.head_layer().table())

    def loss(self, ids, targets, rng=None):
        """Mean next-token loss in nats: ids and targets (B, T) -> a scalar Tensor.

        A target of -100 carries no loss. `rng`: as in `model(ids, rng=...)`.
        """
        states = self.hidden(ids, rng=rng)
        return linear_cross_entropy(states, self.head_layer().table(), targets)

    def new_cache(self, size, starts=None):
        """An empty key/value cache of `size` positions, for one batch: one for each block.

        `starts`: where each row begins, if short prompts are filled up on the left.
        """
        return [KeyValueCache(size, starts) for _ in self.blocks()]

    def checked(self, ids, cache=None, n_before=0):
        """(ids, positions), on the host, if the model can read `ids` after what the cache holds.

        The positions are those of `n_before` vectors that come first, and of the ids.
        Shapes: positions (n_before + T,), or (B, n_before + T) where the rows of a cache begin at
        different columns.
        """
        who = type(self).__name__
        ids = on_host(ids)
        n_blocks = len(self.blocks())
        if cache is not None and len(cache) != n_blocks:
            raise ValueError(
                f"{who}: the cache has {len(cache)} layers, the model {n_blocks}: "
                "make it with model.new_cache(size)"
            )
        if cache is not None and is_recording():
            raise ValueError(
                f"{who}: a cache carries no gradients back to earlier positions; "
                "use it under no_grad()"
            )
        if ids.ndim != 2 or ids.size == 0:
            raise ValueError(f"{who}: ids must have shape (B, T) with B, T >= 1, got {ids.shape}")
        start = cache[0].length if cache else 0
        stop = start + n_before + ids.shape[1]
        if stop > self.config.block_size:
            raise ValueError(
                f"{who}: {stop} positions do not fit in a context of {self.config.block_size} "
                "(block_size); shorten the input"
            )
        positions = np.arange(start, stop)
        if cache and cache[0].starts is not None:
            # Padding has the position of the first token; nobody looks at it.
            positions = np.maximum(positions - np.asarray(cache[0].starts)[:, None], 0)
        return ids, positions


def rotary_tables(positions, frequencies, like):
    """cos and sin of position · frequency, (..., D/2), as arrays like those of the Tensor `like`.

    Shapes: positions (...) integers, frequencies (D/2,) in radians, both on the host.
    """
    angles = positions[..., None] * frequencies
    xp = get_array_module(like.data)
    cos = to_device(np.cos(angles).astype(like.dtype), xp)
    sin = to_device(np.sin(angles).astype(like.dtype), xp)
    return cos, sin
