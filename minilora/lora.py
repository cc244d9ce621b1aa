"""LoRA: a frozen weight plus a trainable low-rank update. Knows Linear layers; knows nothing of GPT.

    y = x Wᵀ + b + scaling · (x Aᵀ) Bᵀ        ΔW = scaling · B A        scaling = alpha / r

Shapes: W (out, in), lora_A (r, in), lora_B (out, r). (Tutorials that print A (d, r), B (r, d) and "BAx" cannot
be run: that product does not exist.) A starts random and B zero, so ΔW starts as exactly zero.

The base is never written. `attach` returns a new model that shares its arrays, `merge` a new plain model; to
detach, or to un-merge, is to go on using the base. There is no merged flag and no active adapter to get wrong.
"""

import math

from . import functional as F
from .backend import get_array_module
from .lora_config import check_patterns, find_targets
from .nn import Linear, Module, check_rng, uniform
from .tensor import Tensor


class LoRAPair(Module):
    """The two factors of one update: lora_A (r, in) and lora_B (out, r)."""

    def __init__(self, lora_A, lora_B):
        self.lora_A, self.lora_B = lora_A, lora_B


class LoRALinear(Linear):
    """A Linear with an adapter beside it: weight and bias keep their names and arrays, lora_A and lora_B are added.

    It needs no gradient of its own: it is two more `linear`s.
    """

    def __init__(self, linear, lora_A, lora_B, scaling, dropout=0.0, rng=None):
        super().__init__(linear.weight, linear.bias)
        self.lora_A, self.lora_B = lora_A, lora_B
        self.scaling, self.dropout, self.rng = scaling, dropout, rng

    def __call__(self, x):
        thin = F.linear(F.dropout(x, self.dropout, self.rng), self.lora_A)  # (..., r)
        update = F.linear(thin * self.scaling, self.lora_B)  # scaled while it is thin
        return F.linear(x, self.weight, self.bias) + update

    def merged(self):
        """The plain Linear with weight W + scaling · B A, in an array of its own."""
        return Linear(Tensor(self.weight.data + self.scaling * (self.lora_B.data @ self.lora_A.data)), self.bias)


class Adapter(Module):
    """What LoRA learns, as data apart from any model: trained, saved, loaded, stacked and refused as one object.

    Shapes: `pairs` maps a module's name to its LoRAPair, lora_A (r, in) and lora_B (out, r); `config` is a LoRAConfig;
    `base_fingerprint` is that of the model it belongs to (`model.fingerprint()`), or None if that is unknown.
    `parameters()` and `named_parameters()` (`h.0.attn.q_proj.lora_A`) are what the optimizer is given.
    Raises: ValueError if there is no pair, or, naming the module and both shapes, if one is not of rank
    `config.rank(name)`.
    Source: Hu et al. 2021, section 4.1.
    """

    def __init__(self, config, pairs, base_fingerprint):
        if not pairs:
            raise ValueError("Adapter: no pair of lora_A and lora_B; use init_adapter or load_adapter")
        for name, pair in pairs.items():
            A, B = pair.lora_A.shape, pair.lora_B.shape
            if len(A) != 2 or len(B) != 2 or not A[0] == B[1] == config.rank(name):
                raise ValueError(f"{name}: lora_A {A}, lora_B {B}: need (r, in), (out, r) with r={config.rank(name)}")
        self.config, self.pairs, self.base_fingerprint = config, dict(pairs), base_fingerprint

    def named_parameters(self):
        """(name, Tensor) for every lora_A and lora_B, named by the module they adapt."""
        return ((name.removeprefix("pairs."), p) for name, p in super().named_parameters())

    def layer(self, name, linear, rng):
        """The layer that stands for the Linear `name` in an adapted model."""
        pair = self.pairs[name]
        return LoRALinear(linear, pair.lora_A, pair.lora_B, self.config.scaling(name), self.config.dropout, rng)

    def misfits(self, modules, fingerprint):
        """Why this adapter does not belong on these modules, as lines; none if it does."""
        lines = []
        for name, pair in self.pairs.items():
            module, A, B = modules.get(name), pair.lora_A, pair.lora_B
            if isinstance(module, LoRALinear):
                lines.append(f"{name} already carries LoRA; merge first, or use stack")
            elif not isinstance(module, Linear):
                lines.append(f"{name} is adapted, but the base has {type(module).__name__} there, not Linear")
            elif module.weight.shape != (B.shape[0], A.shape[1]):
                lines.append(f"{name}: weight {module.weight.shape}, but lora_A {A.shape} and lora_B {B.shape}")
            else:
                F.check_same(f"attaching an adapter to {name}", module.weight, A, B)
        if self.base_fingerprint is not None and fingerprint is not None and not lines:
            names = self.base_fingerprint.keys() | fingerprint.keys()
            shared = self.base_fingerprint.keys() & fingerprint.keys()
            for name in sorted(names, key=lambda name: (name in shared, name)):  # what only one has tells most
                ours, theirs = self.base_fingerprint.get(name, "absent"), fingerprint.get(name, "absent")
                if ours != theirs:
                    lines.append(f"{name}: made for {ours}, this base has {theirs}")
        return lines


def check_fits(who, base, adapter, check_base=True):
    """Raise ValueError with every reason why `adapter` (or a Stack) does not belong on `base`."""
    if not hasattr(adapter, "misfits"):
        raise TypeError(f"{who}: expected an Adapter or a stack of them, got {type(adapter).__name__}")
    lines = adapter.misfits(dict(base.named_modules()), base.fingerprint() if check_base else None)
    if lines:
        more = f"\n  ... and {len(lines) - 8} more" * (len(lines) > 8)
        raise ValueError(f"{who}: this adapter does not fit this base; give the one it was trained on:\n  "
                         + "\n  ".join(lines[:8]) + more)


def linear_names(model):
    """The names of the Linear layers of `model`, in its order: what can be adapted."""
    return [name for name, module in model.named_modules() if isinstance(module, Linear)]


def init_adapter(model, config, rng, *, allow_large_r=False):
    """A new adapter for `model`: A uniform in ±1/√in, B zero, so that attaching it changes nothing.

    Shapes: for each targeted weight (out, in), lora_A (r, in) and lora_B (out, r), in its dtype and on its backend.
    `rng` is a `numpy.random.Generator`.
    Raises: ValueError if a pattern matches nothing, the model already carries an adapter, or r exceeds min(in, out)
    of a weight (such a rank costs more than it can express) without allow_large_r=True.
    Source: Hu et al. 2021, section 4.1; A as in the authors' code, Kaiming-uniform(√5) over fan-in = in.
    """
    modules, pairs = dict(model.named_modules()), {}
    adapted = [name for name, module in modules.items() if isinstance(module, LoRALinear)]
    if adapted:
        raise ValueError(f"init_adapter: {adapted[0]} already carries LoRA; call it on the base, or on merge(model)")
    names = find_targets(linear_names(model), config.target_modules)
    check_patterns(config, names)
    for name in names:
        W, r = modules[name].weight.data, config.rank(name)
        if r > min(W.shape) and not allow_large_r:
            raise ValueError(
                f"init_adapter: r={r} exceeds min(in, out) of {name}, weight {W.shape}; "
                "a smaller r expresses the same updates, or pass allow_large_r=True"
            )
        A = uniform(rng, 1 / math.sqrt(W.shape[1]), (r, W.shape[1]), W)
        B = Tensor(get_array_module(W).zeros((W.shape[0], r), W.dtype), requires_grad=True)
        pairs[name] = LoRAPair(A, B)
    return Adapter(config, pairs, model.fingerprint())


def attach(base, adapter, *, rng=None, check_base=True):
    """A new model: `base`, frozen, with the adapter's updates added. `base` itself is not touched.

    Shapes: the new model takes and returns what `base` does; it shares every array with `base` and with `adapter`.
    `rng` draws the adapter's dropout and is needed to train if there is any. The result holds only the adapter's
    tensors as trainable. check_base=False skips the fingerprint: for a base changed on purpose.
    Raises: ValueError listing every misfit: modules absent, of another shape or adapted already, another base;
    TypeError for another dtype or backend. Nothing has changed then.
    Source: Hu et al. 2021, eq. 3.
    """
    if rng is not None:
        check_rng(rng)
    check_fits("attach", base, adapter, check_base)
    return base.frozen().rebuild(
        lambda name, child: adapter.layer(name, child, rng) if name in adapter.pairs else None
    )


def merge(model):
    """A new plain model with ΔW added into each adapted weight: no extra work at inference.

    Shapes: as `model`. Adapted weights are new arrays, all others are shared with the base, so every tensor is
    frozen (`trainable_copy()` gives a model to train on). The base and the adapter are not touched.
    Raises: ValueError if no layer carries an adapter, if rows carry different ones, or if a merged weight would
    not be finite.
    Source: Hu et al. 2021, section 4.1 ("No Additional Inference Latency").
    """
    adapted = [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]
    if not adapted:
        raise ValueError("merge: no layer of this model carries an adapter; call it on what attach returned")

    def replace(name, child):
        if not isinstance(child, LoRALinear):
            return None
        plain = child.merged()
        if not get_array_module(plain.weight.data).isfinite(plain.weight.data).all():
            raise ValueError(f"merge: the merged weight of {name} is not finite; the adapter holds inf or nan")
        return plain

    return model.rebuild(replace)
