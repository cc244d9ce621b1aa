"""Adapters as they were first: a small MLP after each half of a block. Knows no model.

    y = h + up(gelu(down(h)))        h: what attention, or the MLP, computed

`down` leads to few channels, `up` back. `up` starts as zero, so that nothing changes at first. The
gelu lies between them: no weight computes the same, and it cannot be merged.

Source: Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", section 2.1.
"""

from .decoder import FeedForward, SelfAttention
from .fits import not_a
from .lean import gelu
from .method import Method, check_length, modules_of_kind
from .nn import AdaptedModule, Linear, Module, uniform
from .tensor import Tensor

HALVES = (SelfAttention, FeedForward)


class Bottleneck(Module):
    """What is added to a state: up(gelu(down(h))), (..., C) -> (..., C)."""

    def __init__(self, down, up):
        self.down = down
        self.up = up

    def __call__(self, h):
        return self.up(gelu(self.down(h)))

    def beside(self, module):
        """`module` with this after it."""
        return WithBottleneck(module, self)

    def misfit(self, name, module):
        """Why this cannot follow `module`, called `name`, as a line; None if it can."""
        if not isinstance(module, HALVES):
            return not_a("attention or an MLP", name, module)
        n = _n_channels(module)
        down = self.down.weight.shape
        up = self.up.weight.shape
        if n == down[1] and up == (n, down[0]):
            return None
        return f"{name}: {n} channels, but down.weight {down} and up.weight {up}"


class WithBottleneck(AdaptedModule):
    """y = h + bottleneck(h), where h is what `module` gives: it is called as the module is."""

    transparent = ("module", "bottleneck")

    def __init__(self, module, bottleneck):
        self.module = module
        self.bottleneck = bottleneck

    def __call__(self, *arguments):
        h = self.module(*arguments)
        return h + self.bottleneck(h)

    def merged(self):
        """Refused: there is no weight to which it could be added."""
        raise ValueError(
            "merge: a bottleneck has a gelu between its two layers, so no weight computes what it "
            "does; keep the base and the bottleneck apart"
        )


def init_bottleneck(base, n_inner, rng, *, after_attention=True):
    """A bottleneck of `n_inner` channels after each attention and each MLP of `base`.

    With after_attention=False there is one after each MLP alone (Pfeiffer et al. 2021).

    Shapes: down.weight (n_inner, C), up.weight (C, n_inner) and a bias for each, in the base's
    dtype and on its backend. `down` is uniform in ±1/√C, the rest zero.
    Raises: ValueError if n_inner is below 1, or if the base has no MLP or carries an adapter.
    Source: Houlsby et al. 2019, section 2.1.
    """
    check_length("init_bottleneck", "n_inner", n_inner)
    halves = HALVES if after_attention else FeedForward
    parts = {}
    for name, module in modules_of_kind("init_bottleneck", base, halves, "MLP").items():
        like = module.parameters()[0]
        parts[name] = _new_bottleneck(_n_channels(module), n_inner, rng, like.dtype, like.xp)
    return Method(parts, base.fingerprint())


def _new_bottleneck(C, n_inner, rng, dtype, xp):
    zeros = lambda *shape: Tensor(xp.zeros(shape, dtype), requires_grad=True)
    down = Linear(uniform(rng, C**-0.5, (n_inner, C), dtype, xp), zeros(n_inner))
    return Bottleneck(down, Linear(zeros(C, n_inner), zeros(C)))


def _n_channels(module):
    """C, how many numbers a half of a block gives for each position."""
    last = module.o_proj if isinstance(module, SelfAttention) else module.down_proj
    return last.out_features
