"""(IA)³: a factor for each key, each value and each channel inside the MLP. Knows no model.

    k = l_k · (W_k x + b)        v = l_v · (W_v x + b)        MLP: W_down (l · h)

Every factor starts as one, so that nothing changes at first. It is the smallest of the relatives,
and like LoRA it can be merged: a factor of an output is one of a row of W, a factor of an input one
of a column.

Source: Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than
In-Context Learning", section 3.3.
"""

from .backend import check_rng
from .decoder import FeedForward, SelfAttention
from .fits import not_a
from .method import Method, modules_of_kind
from .nn import AdaptedLayer, Linear, Module
from .tensor import Tensor


class Factors(Module):
    """Factors `ia3_l` of the outputs of a linear layer, (out,), or of its inputs, (in,)."""

    def __init__(self, ia3_l, of_inputs):
        self.ia3_l = ia3_l
        self.of_inputs = of_inputs

    def beside(self, linear):
        """The layer `linear` with these factors."""
        return ScaledLinear(linear, self)

    def misfit(self, name, module):
        """Why these are no factors for `module`, called `name`, as a line; None if they are."""
        if not isinstance(module, Linear):
            return not_a("a linear layer", name, module)
        if self.ia3_l.shape == (_n_factors(module, self.of_inputs),):
            return None
        side = "inputs" if self.of_inputs else "outputs"
        return f"{name}: weight {module.weight.shape}, but {self.ia3_l.shape} factors of {side}"


class ScaledLinear(AdaptedLayer):
    """y = l · linear(x), or linear(l · x): x (..., in) -> (..., out)."""

    transparent = ("linear", "factors")

    def __init__(self, linear, factors):
        self.linear = linear
        self.factors = factors

    def __call__(self, x, rng=None):
        if self.factors.of_inputs:
            return self.linear(x * self.factors.ia3_l, rng)
        return self.linear(x, rng) * self.factors.ia3_l

    def merged(self):
        """The plain layer with the factors in its weight, and in its bias, in new arrays."""
        factors = self.factors.ia3_l.data
        weight = self.linear.weight.data
        bias = self.linear.bias
        if self.factors.of_inputs:
            return Linear(Tensor(weight * factors), bias)
        if bias is not None:
            bias = Tensor(bias.data * factors)
        return Linear(Tensor(weight * factors[:, None]), bias)


def init_ia3(base, rng=None):
    """Factors for the keys, the values and the MLP's inner channels of `base`, all of them one.

    Nothing is drawn; `rng` is there because every init has one.

    Shapes: for k_proj and v_proj (out,), for down_proj (in,), in the base's dtype and backend.
    Raises: ValueError if the base has no attention, or carries an adapter.
    Source: Liu et al. 2022, section 3.3.
    """
    if rng is not None:
        check_rng(rng)
    halves = (SelfAttention, FeedForward)
    parts = {}
    for name, module in modules_of_kind("init_ia3", base, halves, "attention").items():
        if isinstance(module, SelfAttention):
            parts[f"{name}.k_proj"] = _ones(module.k_proj, of_inputs=False)
            parts[f"{name}.v_proj"] = _ones(module.v_proj, of_inputs=False)
        else:
            parts[f"{name}.down_proj"] = _ones(module.down_proj, of_inputs=True)
    return Method(parts, base.fingerprint())


def _ones(linear, of_inputs):
    ones = linear.xp.ones(_n_factors(linear, of_inputs), linear.dtype)
    return Factors(Tensor(ones, requires_grad=True), of_inputs)


def _n_factors(linear, of_inputs):
    return linear.in_features if of_inputs else linear.out_features
