"""Named tensors in a tree, rebuilt out of place; four layers. Knows nothing of GPT or of LoRA."""

import copy
import hashlib
import math

import numpy as np

from . import functional as F
from .backend import check_rng, get_array_module, to_device, to_numpy
from .lean import layer_norm, rms_norm
from .packed import PackedTensor, StoredTensor, packed_linear
from .tensor import Tensor, check_same_layout


class Module:
    """Anything that holds Tensors and Modules as attributes, in lists or in dicts.

    There is no registration and no train/eval mode. Names are the dotted paths of PyTorch:
    `h.0.attn.q_proj.weight`. The tree is never changed in place: `rebuild`, and all that is made
    with it, returns a new tree that shares whatever did not change. Only an optimizer and
    `load_state_dict` write into arrays.

    A class that wraps another layer names that attribute in `transparent`: the parts of the wrapped
    layer then keep the names they had without the wrapper.
    """

    transparent = ()

    def named_children(self):
        """(name, Tensor or Module) for each direct child, in order of definition.

        The items of a list `h` are named `h.0`, `h.1`, ...
        """
        for key, value in vars(self).items():
            if key in self.transparent:
                yield from value.named_children()
            else:
                yield from _children(key, value)

    def named_modules(self, prefix=""):
        """(dotted name, Module) for this module (named `prefix`) and every one below it."""
        yield prefix, self
        for name, child in self.named_children():
            if isinstance(child, Module):
                yield from child.named_modules(_joined(prefix, name))

    def named_parameters(self):
        """(dotted name, Tensor) for every Tensor, frozen ones too; a shared one comes once."""
        yielded = set()
        for path, module in self.named_modules():
            for name, child in module.named_children():
                if isinstance(child, Tensor) and id(child) not in yielded:
                    yielded.add(id(child))
                    yield _joined(path, name), child

    def parameters(self):
        """The Tensors of `named_parameters()`, as a list."""
        return [p for _, p in self.named_parameters()]

    def state_dict(self):
        """{dotted name: array} of `named_parameters()`: the module's own arrays, not copies.

        Only a weight that is stored in few bits has no such array: there it is a widened one.

        Raises: ValueError if a wrapper and the layer in it have tensors of one name.
        """
        state = {}
        for name, p in self.named_parameters():
            if name in state:
                raise ValueError(f"two tensors are called {name}: rename that of the wrapper")
            state[name] = p.data
        return state

    def load_state_dict(self, state):
        """Write the arrays of `state` into the module's own, as an optimizer would.

        Raises: ValueError that shows both sides, before anything changes, unless `state` has the
        names, shapes and dtypes of `state_dict()`, and every tensor is trainable: the array of a
        frozen one may belong to other models as well.
        """
        frozen = [name for name, p in self.named_parameters() if not p.requires_grad]
        if frozen:
            raise ValueError(
                f"load_state_dict: {frozen[0]} is frozen, and its array may be shared; "
                "load into an adapter, or into model.trainable_copy()"
            )
        own_state = self.state_dict()
        check_same_layout("load_state_dict", state, own_state)
        for name, array in own_state.items():
            array[...] = to_device(state[name], get_array_module(array))

    def rebuild(self, replace):
        """A copy of the tree in which `replace(dotted name, x)` stands for x, unless it is None.

        x is every Module, this one (named "") first, and every Tensor. A Module for which `replace`
        returns None is rebuilt from its own parts; such a Tensor is shared. A layer inside a
        wrapper is not offered, because it has no name of its own; its Tensors are.
        """
        new = replace("", self)
        return _rebuilt_parts("", self, replace) if new is None else new

    def frozen(self):
        """A view of the model in which nothing is trainable; the arrays are shared.

        A Tensor without requires_grad has no node, so `record` makes no edge to it.
        """
        return self.map_tensors(lambda t: t if isinstance(t, StoredTensor) else Tensor(t.data))

    def trainable_copy(self):
        """An independent model with arrays of its own, all trainable: for full fine-tuning.

        Weights that are stored in fewer bits become float32.
        """
        return self.map_tensors(lambda t: Tensor(t.data.copy(), requires_grad=True))

    def astype(self, dtype):
        """A copy in another float dtype (float64 is for checking), on the same backend."""
        return self.map_tensors(lambda t: Tensor(t.data.astype(dtype), t.requires_grad))

    def to_device(self, xp):
        """A copy whose arrays belong to the array module `xp`, numpy or cupy.

        What nobody can write, the tensors of a file, may be shared instead of copied.
        """

        def moved(t):
            if isinstance(t, StoredTensor):
                return t.to_device(xp)
            return Tensor(to_device(t.data.copy(), xp), t.requires_grad)

        return self.map_tensors(moved)

    def map_tensors(self, f):
        """A copy in which each Tensor t is f(t); a Tensor that is shared stays shared."""
        mapped = {id(t): f(t) for t in self.parameters()}
        return self.rebuild(lambda _, t: mapped[id(t)] if isinstance(t, Tensor) else None)

    def fingerprint(self):
        """{name: 16 hex digits of the SHA-256 of shape and values} of every tensor.

        It tells which base this is. Values are hashed as float32: a copy in float64, made for
        checking, is still the same base, and so is a base whose weights are stored in fewer bits
        and widened to these values. What a file holds is hashed once, and verified by the way.
        """
        return {name: digest_of(p) for name, p in self.named_parameters()}


def _joined(path, name):
    return f"{path}.{name}" if path else name


def _children(name, value):
    """(dotted name, Tensor or Module) for `value`, or for the items of a list, tuple or dict."""
    if isinstance(value, (Tensor, Module)):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _children(f"{name}.{key}", item)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _children(f"{name}.{i}", item)


def _rebuilt(name, value, replace):
    """What stands for `value` in the new tree: a replacement, a rebuilt copy, or `value` itself."""
    if isinstance(value, Tensor):
        new = replace(name, value)
        return value if new is None else new
    if isinstance(value, Module):
        new = replace(name, value)
        return _rebuilt_parts(name, value, replace) if new is None else new
    if next(_children(name, value), None) is None:
        # A number, a text, a configuration, an empty list: there is nothing in it to rebuild.
        return value
    if isinstance(value, dict):
        return {key: _rebuilt(f"{name}.{key}", item, replace) for key, item in value.items()}
    items = [_rebuilt(f"{name}.{i}", item, replace) for i, item in enumerate(value)]
    return tuple(items) if isinstance(value, tuple) else items


def _rebuilt_parts(name, module, replace):
    """A copy of `module` with every part rebuilt."""
    new = copy.copy(module)
    for key, part in vars(module).items():
        if key in module.transparent:
            # The wrapped layer has no name of its own, so `replace` is asked for its parts alone.
            setattr(new, key, _rebuilt_parts(name, part, replace))
        else:
            setattr(new, key, _rebuilt(_joined(name, key), part, replace))
    return new


def digest_of(tensor):
    """16 hex digits of the SHA-256 of a tensor's shape and of its values as float32.

    Raises: ValueError if its file says that other values were saved.
    """
    if isinstance(tensor, StoredTensor):
        tensor.verify()
        return tensor.once(_digest)
    return _digest(tensor.data)


def _digest(array):
    # A float64 too large for float32 becomes inf, which is as good a value to hash as any.
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(to_numpy(array), "<f4")
    digest = hashlib.sha256(repr(values.shape).encode())
    # The hash reads the array itself: a model may be too large to copy.
    digest.update(values.reshape(-1))
    return digest.hexdigest()[:16]


def uniform(rng, bound, shape, dtype, xp):
    """A trainable Tensor, uniform in ±bound, drawn by NumPy and moved to the array module `xp`."""
    values = check_rng(rng).uniform(-bound, bound, shape).astype(dtype)
    return Tensor(to_device(values, xp), requires_grad=True)


def normal_or_zeros(rng, std, shape, dtype):
    """A trainable Tensor of normal numbers with standard deviation `std`, drawn in float64.

    Without `rng` it holds zeros, all of them in the place of one: a loader puts the real numbers
    there.
    """
    if rng is None:
        return Tensor(in_place_of_all(0, shape, dtype), requires_grad=True)
    values = check_rng(rng).standard_normal(shape) * std
    return Tensor(values.astype(dtype), requires_grad=True)


def constant(value, rng, shape, dtype):
    """A trainable Tensor that is `value` throughout: a bias, or the weight of a norm.

    Without `rng` one number stands in the place of all, as in `normal_or_zeros`.
    """
    if rng is None:
        return Tensor(in_place_of_all(value, shape, dtype), requires_grad=True)
    return Tensor(np.full(shape, value, dtype), requires_grad=True)


def in_place_of_all(value, shape, dtype):
    """An array that takes the memory of one number, and that nobody may write."""
    return np.broadcast_to(np.array(value, dtype), shape)


class LinearLayer(Module):
    """A layer that can carry LoRA, however it stores its weight: x (..., in) -> (..., out).

    It has `in_features` and `out_features`, the `dtype` and the array module `xp` in which it
    computes, `plus(update)`, and is called with x and `rng`, from which dropout draws.
    """


class AdaptedModule(Module):
    """A module that stands for another one, which it holds, in a model that carries an adapter.

    It names what it holds in `transparent`: parameters keep the names they had without it.
    `merged()` is the plain module that computes the same, or a ValueError that says why there is
    none.
    """


class AdaptedLayer(AdaptedModule):
    """A layer that holds another one, `linear`, and changes what that computes.

    Parameters keep the names they had without it: `q_proj.weight`, not `q_proj.linear.weight`.
    """

    transparent = ("linear",)


class Linear(LinearLayer):
    """y = x Wᵀ + b with weight (out, in), bias (out,) or None. It has no dropout.

    A weight that is stored in fewer bits, a PackedTensor, is widened for each product.
    """

    def __init__(self, weight, bias=None):
        bias_shape = None if bias is None else bias.shape
        if weight.ndim != 2 or bias_shape not in (None, weight.shape[:1]):
            raise ValueError(
                "Linear: weight (out, in) and bias (out,) expected, "
                f"got {weight.shape} and {bias_shape}"
            )
        self.weight = weight
        self.bias = bias

    @classmethod
    def init(cls, in_features, out_features, rng, dtype="float32", bias=True):
        """Weights normal with variance 1 / in: outputs are as large as inputs. The bias is zero.

        With bias=False there is none.
        """
        std = 1 / math.sqrt(in_features)
        weight = normal_or_zeros(rng, std, (out_features, in_features), dtype)
        if not bias:
            return cls(weight)
        return cls(weight, constant(0, rng, out_features, dtype))

    out_features = property(lambda self: self.weight.shape[0])
    in_features = property(lambda self: self.weight.shape[1])
    dtype = property(lambda self: self.weight.dtype)
    xp = property(lambda self: self.weight.xp)

    def __call__(self, x, rng=None):
        if isinstance(self.weight, PackedTensor):
            return packed_linear(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)

    def plus(self, update):
        """A plain layer with the array `update` (out, in) added to the weight, in a new array."""
        return Linear(Tensor(self.weight.data + update), self.bias)


def table_rows(model):
    """{tensor: how many rows it has} of the tables of `model`: what an Embedding reads."""
    return {
        f"{name}.weight": module.weight.shape[0]
        for name, module in model.named_modules()
        if isinstance(module, Embedding)
    }


class Embedding(Module):
    """Row ids[...] of weight (V, C): ids (...) -> (..., C)."""

    def __init__(self, weight):
        self.weight = weight

    def __call__(self, ids):
        if isinstance(self.weight, PackedTensor):
            # Frozen: there is no gradient to record. Only the rows that are asked for are widened.
            ids = F.check_ids("token ids", ids, self.weight.shape[0])
            return Tensor(self.weight.packed.rows(to_device(ids, self.weight.xp)))
        return F.embedding(self.weight, ids)

    def table(self):
        """The weight (V, C) as a Tensor that can stand in a product: widened, if it is packed."""
        if isinstance(self.weight, PackedTensor):
            return Tensor(self.weight.data)
        return self.weight


class LayerNorm(Module):
    """Layer normalisation with weight and bias (C,): x (..., C) -> (..., C)."""

    def __init__(self, weight, bias, eps=1e-5):
        self.weight = weight
        self.bias = bias
        self.eps = eps

    def __call__(self, x):
        return layer_norm(x, self.weight, self.bias, self.eps)


class RMSNorm(Module):
    """Root mean square normalisation with weight (C,): x (..., C) -> (..., C)."""

    def __init__(self, weight, eps=1e-6):
        self.weight = weight
        self.eps = eps

    def __call__(self, x):
        return rms_norm(x, self.weight, self.eps)
