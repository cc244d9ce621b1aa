"""BitFit: train the biases of a model and nothing else. Knows layers, and no model.

A bias is one number for each output of a layer: about one in a thousand of a GPT's numbers. Each
linear layer and each norm that has one gets a copy that is trained. The base keeps its own.

Source: Ben Zaken et al. 2022, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based
Masked Language-models".
"""

import copy

from .backend import check_rng
from .fits import not_a
from .method import Method, modules_of_kind
from .nn import AdaptedModule, LayerNorm, Linear, Module
from .tensor import Tensor

# The kinds of layers that have a bias.
WITH_BIAS = (Linear, LayerNorm)


class Bias(Module):
    """The `bias` (out,) that a layer has in place of its own."""

    def __init__(self, bias):
        self.bias = bias

    def beside(self, module):
        """`module` with this bias."""
        return Rebiased(_with_bias(module, self.bias))

    def misfit(self, name, module):
        """Why this is no bias for `module`, called `name`, as a line; None if it is."""
        if not isinstance(module, WITH_BIAS) or module.bias is None:
            return not_a("a layer with a bias", name, module)
        if module.bias.shape == self.bias.shape:
            return None
        return f"{name}: bias {module.bias.shape}, but {self.bias.shape} was learned"


class Rebiased(AdaptedModule):
    """A layer with a bias that is trained: it is called as the layer is."""

    transparent = ("module",)

    def __init__(self, module):
        self.module = module

    def __call__(self, *arguments):
        return self.module(*arguments)

    def merged(self):
        """The plain layer with the learned bias, in an array of its own."""
        return _with_bias(self.module, Tensor(self.module.bias.data.copy()))


def _with_bias(module, bias):
    """A copy of a layer that shares all but its bias."""
    new = copy.copy(module)
    new.bias = bias
    return new


def init_bias_only(base, rng=None):
    """A copy of every bias of `base`, to be trained: at first it changes nothing.

    Nothing is drawn; `rng` is there because every init has one.

    Shapes: as the base's biases, in their dtype and on their backend.
    Raises: ValueError if no layer has a bias, as in most Llamas, or the base carries an adapter.
    Source: Ben Zaken et al. 2022, section 3.
    """
    if rng is not None:
        check_rng(rng)
    layers = modules_of_kind("init_bias_only", base, WITH_BIAS, "linear layer and no norm")
    parts = {}
    for name, layer in layers.items():
        if layer.bias is not None:
            parts[name] = Bias(Tensor(layer.bias.data.copy(), requires_grad=True))
    if not parts:
        raise ValueError(
            f"init_bias_only: no layer of this {type(base).__name__} has a bias; use LoRA or (IA)³"
        )
    return Method(parts, base.fingerprint())
