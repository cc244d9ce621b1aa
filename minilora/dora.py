"""DoRA: LoRA turns the rows of a weight, and a magnitude of its own says how long each is.

    W' = m · (W + ΔW) / ‖W + ΔW‖        ΔW = scaling · B A

The norm is taken over each row, which belongs to one output. m (out,) starts as the norms of W, so
that W' starts as W. A LoRA layer beside it: lora.py. Knows layers, and nothing of GPT.

The norm counts as a constant in the backward, as the paper proposes (section 4.3) and PEFT does: it
saves memory and changes results little. So what is computed here is not the derivative of the loss
with respect to A and B, but a part of it; that of m is whole.

Source: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", eq. 5 and 11.
"""

from . import functional as F
from .lora import LoRAPair, init_adapter
from .nn import AdaptedLayer, Linear
from .tensor import Tensor


class DoRAPair(LoRAPair):
    """LoRA's pair and `magnitude` (out,): how long each row of the weight is to be.

    `delta()` is what is added to W before its rows are given their lengths.
    Raises: ValueError with the shapes unless they fit.
    """

    def __init__(self, lora_A, lora_B, scaling, magnitude):
        super().__init__(lora_A, lora_B, scaling)
        if magnitude.shape != lora_B.shape[:1]:
            raise ValueError(
                f"DoRAPair: lora_B {lora_B.shape}, magnitude {magnitude.shape}: "
                "need (out, r) and (out,)"
            )
        self.magnitude = magnitude

    def beside(self, linear, dropout):
        """The layer in which this pair stands beside the layer `linear`."""
        return DoRALinear(linear, self, dropout)

    def row_norms(self, weight):
        """‖W + ΔW‖ of each row, an array (out,), for the array `weight` (out, in)."""
        return row_norms(weight + self.delta())


class DoRALinear(AdaptedLayer):
    """y = x W'ᵀ + b: x (..., in) -> (..., out). W' is not made: the outputs are scaled.

    Called with a generator, it drops out elements of what the update reads, at the rate `dropout`.
    The update is then all that DoRA adds to the layer, as in PEFT: W' - W.
    """

    transparent = ("linear", "pair")

    def __init__(self, linear, pair, dropout=0.0):
        self.linear = linear
        self.pair = pair
        self.dropout = dropout

    def __call__(self, x, rng=None):
        pair = self.pair
        weight = self.linear.weight
        # No edge leads to the norm: that is what makes it a constant in the backward.
        scale = pair.magnitude / Tensor(pair.row_norms(weight.data))
        read = F.dropout(x, self.dropout, rng)
        rows = Linear(weight)(read)  # x Wᵀ, without the bias
        if read is x:
            # One product with W serves the base and the update.
            y = (rows + pair(x)) * scale
            return y if self.linear.bias is None else y + self.linear.bias
        return self.linear(x, rng) + rows * (scale - 1) + pair(read) * scale

    def merged(self):
        """The plain layer with W' as its weight, in an array of its own."""
        pair = self.pair
        weight = self.linear.weight.data
        scale = pair.magnitude.data / pair.row_norms(weight)
        return Linear(Tensor(scale[:, None] * (weight + pair.delta())), self.linear.bias)


def row_norms(weight):
    """Euclid's norm of each row of an array: (out, in) -> (out,)."""
    return (weight * weight).sum(-1) ** 0.5


def init_dora(model, config, rng, *, allow_large_r=False):
    """A new adapter for `model` whose pairs are DoRA's. Attaching it changes nothing.

    Not even rounding does: ‖W + 0‖ is computed from the numbers that m was, so that m / ‖W + 0‖ is
    exactly one.

    Shapes, dtype and backend: as `init_adapter`, and magnitude (out,) for each weight (out, in).
    Raises: as `init_adapter`; ValueError for a weight with a row of zeros, which has no direction,
    or a layer that does not offer its weight.
    Source: Liu et al. 2024, section 4.1.
    """
    adapter = init_adapter(model, config, rng, allow_large_r=allow_large_r)
    return with_magnitudes("init_dora", model, adapter)


def with_magnitudes(who, model, adapter):
    """A DoRA adapter with the factors of `adapter`, a new LoRA one for `model`.

    Raises: as `init_dora`.
    """
    modules = dict(model.named_modules())
    pairs = {}
    for name, pair in adapter.pairs.items():
        layer = modules[name]
        if not isinstance(layer, Linear):
            raise ValueError(
                f"{who}: {name} is {type(layer).__name__}; DoRA needs a Linear, whose weight it "
                "can read"
            )
        # As the layer will compute them: with ΔW, though that is zero.
        norms = row_norms(layer.weight.data + pair.delta())
        if not norms.all():
            raise ValueError(
                f"{who}: row {int(norms.argmin())} of {name}.weight is zero: it has no direction "
                "that DoRA could keep; leave the layer out of target_modules, or use LoRA"
            )
        magnitude = Tensor(norms, requires_grad=True)
        pairs[name] = DoRAPair(pair.lora_A, pair.lora_B, pair.scaling, magnitude)
    return adapter.with_pairs(adapter.config, pairs)
