"""Prefix tuning: in each layer, keys and values that every query sees. Knows no model.

Attention goes over P learned keys and the keys of the text. The learned ones have no position: the
first token stays at position 0. What a prefix adds depends on the query through a softmax, and so
no weight computes the same: it cannot be merged. Nor is there a prefix that changes nothing, for
whatever P keys take from the softmax is missing elsewhere: a new prefix is not the identity.

Source: Li & Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation".
"""

from .backend import check_rng
from .decoder import SelfAttention
from .fits import not_a
from .graph import no_grad
from .method import Method, check_length, modules_of_kind
from .nn import AdaptedModule, Module
from .tensor import Tensor


class Prefix(Module):
    """The keys and the values, each (P, C), that one layer's attention sees before all others."""

    def __init__(self, prefix_keys, prefix_values):
        self.prefix_keys = prefix_keys
        self.prefix_values = prefix_values

    def beside(self, module):
        """The attention `module` with this prefix."""
        return PrefixedAttention(module, self)

    def misfit(self, name, module):
        """Why this cannot stand before `module`, called `name`, as a line; None if it can."""
        if not isinstance(module, SelfAttention):
            return not_a("attention", name, module)
        n = module.k_proj.out_features
        shape = self.prefix_keys.shape
        if shape == self.prefix_values.shape and len(shape) == 2 and shape[0] > 0 and shape[1] == n:
            return None
        return (
            f"{name}: {n} channels of keys, but prefix_keys {shape} and prefix_values "
            f"{self.prefix_values.shape}"
        )


class PrefixedAttention(AdaptedModule):
    """Attention that sees a prefix, (B, T, C) -> (B, T, C): it is called as SelfAttention is."""

    transparent = ("attention", "prefix")

    def __init__(self, attention, prefix):
        self.attention = attention
        self.prefix = prefix

    def __call__(self, x, rope=None, cache=None, rng=None):
        keys = for_each_row(self.prefix.prefix_keys, len(x.data))
        values = for_each_row(self.prefix.prefix_values, len(x.data))
        return self.attention(x, rope, cache, rng, front=(keys, values))

    def merged(self):
        """Refused: there is no weight to which it could be added."""
        raise ValueError(
            "merge: a prefix gives attention further keys and values, mixed in by a softmax, so no "
            "weight computes what it does; keep the base and the prefix apart"
        )


def for_each_row(vectors, B):
    """The same vectors for every row of a batch: (P, C) -> (B, P, C)."""
    return Tensor(vectors.xp.zeros((B, 1, 1), vectors.dtype)) + vectors


def init_prefix(base, length, rng):
    """A prefix of `length` keys and values for each attention of `base`.

    It starts as what the base itself computes from so many tokens, which `rng` draws: keys and
    values of the size that the base's queries expect. Li & Liang found this start far better than
    random numbers (section 7.4), and so they need no further network to train through.

    Shapes: prefix_keys and prefix_values (length, C), with C as k_proj and v_proj give, in the
    base's dtype and on its backend.
    Raises: ValueError if `length` is below 1 or does not fit in the context, or if the base has no
    attention or carries an adapter.
    Source: Li & Liang 2021, section 4.2.
    """
    check_length("init_prefix", "length", length)
    names = modules_of_kind("init_prefix", base, SelfAttention, "attention")
    ids = check_rng(rng).integers(0, base.config.vocab_size, (1, length))
    caches = base.new_cache(length)
    with no_grad():
        base.hidden(ids, caches)
    parts = {}
    for name, cache in zip(names, caches, strict=True):
        keys, values = cache.keys_and_values[:, 0]
        parts[name] = Prefix(
            Tensor(keys.copy(), requires_grad=True), Tensor(values.copy(), requires_grad=True)
        )
    return Method(parts, base.fingerprint())
