"""Named tensors in a tree, and trees rebuilt out of place. Knows nothing of GPT or of LoRA."""

import copy
import hashlib
import math

import numpy as np

from . import functional as F
from .backend import get_array_module, to_device, to_numpy
from .tensor import Tensor


class Module:
    """Anything that holds Tensors and Modules as attributes, in lists or in dicts. No registration, no train/eval mode.

    Names are the dotted paths of PyTorch: `h.0.attn.q_proj.weight`. A Module is never changed in place by
    this library: `rebuild` and everything made with it return a new tree that shares what did not change.
    """

    def named_children(self):
        """(name, Tensor or Module) for each direct child, in order of definition; items of a list are `name.0`, ..."""
        for key, value in vars(self).items():
            yield from _children(key, value)

    def named_modules(self, prefix=""):
        """(dotted name, Module) for this module (named `prefix`) and every one below it."""
        yield prefix, self
        for name, child in self.named_children():
            if isinstance(child, Module):
                yield from child.named_modules(f"{prefix}.{name}".lstrip("."))

    def named_parameters(self):
        """(dotted name, Tensor) for every Tensor in the tree, frozen ones too; a shared Tensor appears once."""
        seen = set()
        for path, module in self.named_modules():
            for name, child in module.named_children():
                if isinstance(child, Tensor) and id(child) not in seen:
                    seen.add(id(child))
                    yield f"{path}.{name}".lstrip("."), child

    def parameters(self):
        """The Tensors of `named_parameters()`, as a list."""
        return [p for _, p in self.named_parameters()]

    def rebuild(self, replace):
        """A copy of the tree in which `replace(dotted name, x)` stands for each x it does not return None for.

        x is every Module, this one (named "") first, and every Tensor. A Module for which it returns None is
        rebuilt from its own parts; a Tensor is shared. This tree is not touched.
        """
        return _rebuilt("", self, replace)

    def frozen(self):
        """The same model over the same arrays with no trainable tensor: nothing records an edge to it."""
        return self.map_tensors(lambda t: Tensor(t.data))

    def trainable_copy(self):
        """An independent model with arrays of its own, all of them trainable: for full fine-tuning."""
        return self.map_tensors(lambda t: Tensor(t.data.copy(), requires_grad=True))

    def astype(self, dtype):
        """A copy in another float dtype (float64 is for checking), on the same backend."""
        return self.map_tensors(lambda t: Tensor(t.data.astype(dtype), t.requires_grad))

    def to_device(self, xp):
        """A copy whose arrays belong to the array module `xp`, numpy or cupy."""
        return self.map_tensors(lambda t: Tensor(to_device(t.data.copy(), xp), t.requires_grad))

    def map_tensors(self, f):
        """A copy in which each Tensor t is f(t); a Tensor that is shared stays shared."""
        done = {id(t): f(t) for t in self.parameters()}
        return self.rebuild(lambda _, t: done[id(t)] if isinstance(t, Tensor) else None)

    def fingerprint(self):
        """{name: 16 hex digits of the SHA-256 of shape and values} for every tensor: which base is this?

        Values are hashed as float32, so that a float64 copy made for checking is still the same base.
        """
        return {name: _digest(p.data) for name, p in self.named_parameters()}


def _children(name, value):
    """(dotted name, Tensor or Module) for what `value` is, or holds if it is a list, tuple or dict."""
    if isinstance(value, (Tensor, Module)):
        yield name, value
    elif isinstance(value, (list, tuple, dict)):
        for i, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _children(f"{name}.{i}", item)


def _rebuilt(name, value, replace):
    """`value`, or if there are children in it a copy in which each has been replaced or rebuilt."""
    if not any(True for _ in _children(name, value)):
        return value
    if isinstance(value, Tensor):
        new = replace(name, value)
        return value if new is None else new
    if isinstance(value, Module):
        new = replace(name, value)
        if new is None:
            new = copy.copy(value)
            for key, part in vars(value).items():
                setattr(new, key, _rebuilt(f"{name}.{key}".lstrip("."), part, replace))
        return new
    if isinstance(value, dict):
        return {i: _rebuilt(f"{name}.{i}", item, replace) for i, item in value.items()}
    items = [_rebuilt(f"{name}.{i}", item, replace) for i, item in enumerate(value)]
    return tuple(items) if isinstance(value, tuple) else items


def _digest(array):
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(to_numpy(array), "<f4")
    digest = hashlib.sha256(repr(values.shape).encode())
    digest.update(values.reshape(-1))  # not copied: a model may be large
    return digest.hexdigest()[:16]


def uniform(rng, bound, shape, like):
    """A trainable Tensor, uniform in ±bound, drawn by NumPy, with the dtype and backend of the array `like`."""
    drawn = check_rng(rng).uniform(-bound, bound, shape).astype(like.dtype)
    return Tensor(to_device(drawn, get_array_module(like)), requires_grad=True)


def normal(rng, std, shape, dtype):
    """A trainable Tensor of normal numbers with standard deviation `std`, drawn by NumPy in float64, then cast.

    Zeros if `rng` is None: memory that is not touched until a loader puts the real numbers in their place.
    """
    if rng is None:
        return Tensor(np.zeros(shape, dtype), requires_grad=True)
    return Tensor((check_rng(rng).standard_normal(shape) * std).astype(dtype), requires_grad=True)


def check_rng(rng):
    """`rng`, if it is a `numpy.random.Generator`; a TypeError that says how to make one if not."""
    if not isinstance(rng, np.random.Generator):
        raise TypeError(f"rng must be a numpy.random.Generator, got {rng!r}; write np.random.default_rng(seed)")
    return rng


class Linear(Module):
    """y = x Wᵀ + b with weight (out, in), bias (out,) or None: x (..., in) -> (..., out)."""

    def __init__(self, weight, bias=None):
        if weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):
            got = f"{weight.shape} and {None if bias is None else bias.shape}"
            raise ValueError(f"Linear: weight (out, in) and bias (out,) expected, got {got}")
        self.weight, self.bias = weight, bias

    @classmethod
    def init(cls, in_features, out_features, rng, dtype="float32"):
        """Weights normal with variance 1 / in, so that outputs are as large as inputs; bias zero."""
        weight = normal(rng, 1 / math.sqrt(in_features), (out_features, in_features), dtype)
        return cls(weight, Tensor(np.zeros(out_features, dtype), requires_grad=True))

    def __call__(self, x):
        return F.linear(x, self.weight, self.bias)


class Embedding(Module):
    """Row ids[...] of weight (V, C): ids (...) -> (..., C)."""

    def __init__(self, weight):
        self.weight = weight

    def __call__(self, ids):
        return F.embedding(self.weight, ids)


class LayerNorm(Module):
    """Layer normalisation with weight and bias (C,): x (..., C) -> (..., C)."""

    def __init__(self, weight, bias, eps=1e-5):
        self.weight, self.bias, self.eps = weight, bias, eps

    def __call__(self, x):
        return F.layer_norm(x, self.weight, self.bias, self.eps)
