"""LoRA: a frozen weight and, beside it, a trainable low-rank update. Knows nothing of GPT.

    y = x Wᵀ + b + scaling · (x Aᵀ) Bᵀ        ΔW = scaling · B A        scaling = alpha / r

Shapes: W (out, in), lora_A (r, in), lora_B (out, r). A starts random and B zero, so ΔW starts as
exactly zero. (Tutorials that print A (d, r), B (r, d) and "BAx" cannot be run: that product does
not exist.)

The base is never written. `attach` returns a new model that shares its arrays, `merge` a new plain
model. To detach, or to un-merge, is to go on using the base. There is no merged flag and no active
adapter to get wrong.
"""

import math

from . import functional as F
from .fits import base_errors, check_fits, pair_errors
from .lora_config import check_patterns, find_targets
from .nn import AdaptedLayer, AdaptedModule, LinearLayer, Module, table_rows, uniform
from .packed import StoredTensor
from .quant import stored_as
from .tensor import Tensor


class LoRAPair(Module):
    """One update, ΔW = scaling · B A: lora_A (r, in), lora_B (out, r), and the number `scaling`.

    A call gives what the update adds to the output of its layer: x (..., in) -> (..., out).
    Raises: ValueError with both shapes unless A and B have one r.
    """

    def __init__(self, lora_A, lora_B, scaling):
        _check_one_rank(lora_A, lora_B)
        self.lora_A = lora_A
        self.lora_B = lora_B
        # A Python float: a NumPy float64 would widen a float32 weight in `delta`.
        self.scaling = float(scaling)

    r = property(lambda self: self.lora_A.shape[0])
    in_features = property(lambda self: self.lora_A.shape[1])
    out_features = property(lambda self: self.lora_B.shape[0])

    def __call__(self, x):
        thin = F.linear(x, self.lora_A)  # (..., r)
        # Scaled here, where it costs least: a row has r numbers, later out_features.
        return F.linear(thin * self.scaling, self.lora_B)

    def delta(self):
        """ΔW as an array (out, in)."""
        return self.scaling * (self.lora_B.data @ self.lora_A.data)

    def beside(self, linear, dropout):
        """The layer in which this pair stands beside the layer `linear`."""
        return LoRALinear(linear, self, dropout)


def _check_one_rank(lora_A, lora_B):
    if lora_A.ndim != 2 or lora_B.ndim != 2 or lora_A.shape[0] != lora_B.shape[1]:
        raise ValueError(
            f"LoRAPair: lora_A {lora_A.shape}, lora_B {lora_B.shape}: "
            "need (r, in) and (out, r) with one r"
        )


class LoRALinear(AdaptedLayer):
    """y = linear(x) + pair(x): x (..., in) -> (..., out).

    No VJP is written for it: a pair is two more `linear`s. Called with a generator, it drops out
    elements of what the pair reads, at the rate `dropout`.
    """

    transparent = ("linear", "pair")

    def __init__(self, linear, pair, dropout=0.0):
        self.linear = linear
        self.pair = pair
        self.dropout = dropout

    def __call__(self, x, rng=None):
        update = self.pair(F.dropout(x, self.dropout, rng))
        return self.linear(x, rng) + update

    def merged(self):
        """The plain layer with ΔW in its weight, W + scaling · B A, in an array of its own."""
        return self.linear.plus(self.pair.delta())


class Adapter(Module):
    """What LoRA learns, as data apart from any model.

    It is trained, saved, loaded, stacked and refused as one object. `pairs` maps a module's name to
    its LoRAPair, and is all that computes. `config`, a LoRAConfig, is the recipe by which they were
    made. `base_fingerprint` is that of the model they belong to (`model.fingerprint()`), or None if
    it is unknown; `base_stored`, {tensor: kind}, says which of its weights were stored in few bits
    (`stored_as(model)`), and `base_rows`, {tensor: how many}, how long its tables were
    (`table_rows(model)`). The optimizer is given `parameters()`.

    Raises: ValueError if there is no pair.
    Source: Hu et al. 2021, section 4.1.
    """

    def __init__(self, config, pairs, base_fingerprint, base_stored=None, base_rows=None):
        if not pairs:
            raise ValueError(
                "Adapter: no pair of lora_A and lora_B; use init_adapter or load_adapter"
            )
        self.config = config
        self.pairs = dict(pairs)
        self.base_fingerprint = base_fingerprint
        self.base_stored = dict(base_stored or {})
        self.base_rows = dict(base_rows or {})

    def with_pairs(self, config, pairs):
        """An adapter of other pairs, for the same base."""
        return Adapter(config, pairs, self.base_fingerprint, self.base_stored, self.base_rows)

    def named_parameters(self):
        """(name, Tensor) for every lora_A and lora_B: `h.0.attn.q_proj.lora_A`."""
        for name, p in super().named_parameters():
            yield name.removeprefix("pairs."), p

    def adapted(self, name, module):
        """The layer that stands for `module`, called `name`, in an adapted model; None: itself."""
        if name not in self.pairs:
            return None
        return self.pairs[name].beside(module, self.config.dropout)

    def fit_errors(self, modules, fingerprint):
        """Why this adapter does not belong on a base of these modules: lines, or none.

        The fingerprint is compared where the layers fit.
        """
        return pair_errors(self.pairs, modules) or base_errors(self.base_fingerprint, fingerprint)


def linear_names(model):
    """The names of the linear layers of `model`, in its order, also of those with an adapter."""
    kinds = (LinearLayer, AdaptedLayer)
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def adapted_names(model):
    """The names of the modules of `model` that carry an adapter."""
    return [name for name, module in model.named_modules() if isinstance(module, AdaptedModule)]


def target_ranks(model, config, allow_large_r=False):
    """{name of a linear: r}: what an adapter of this LoRAConfig adapts in `model`, in its order.

    Raises: as `init_adapter`.
    """
    carrying = adapted_names(model)
    if carrying:
        raise ValueError(
            f"init_adapter: {carrying[0] or 'the model'} already carries an adapter; "
            "call it on the base, or on merge(model)"
        )
    modules = dict(model.named_modules())
    names = find_targets(linear_names(model), config.target_modules)
    check_patterns(config, names)
    ranks = {}
    for name in names:
        layer = modules[name]
        ranks[name] = config.r_of(name)
        if ranks[name] > min(layer.in_features, layer.out_features) and not allow_large_r:
            place = "" if ranks[name] == config.r else " in rank_pattern"
            raise ValueError(
                f"init_adapter: r={ranks[name]} exceeds min(in, out) of {name}, weight "
                f"{(layer.out_features, layer.in_features)}; a smaller r{place} expresses the "
                "same updates, or pass allow_large_r=True"
            )
    return ranks


def init_adapter(model, config, rng, *, allow_large_r=False):
    """A new adapter for `model`: A random and B zero, so that attaching it changes nothing.

    A is uniform in ±1/√in, which is Kaiming-uniform(√5) over fan-in = in.

    Shapes: for each targeted weight (out, in), lora_A (r, in) and lora_B (out, r), in its dtype and
    on its backend. `rng` is a `numpy.random.Generator`.
    Raises: ValueError if a pattern matches nothing, the model already carries an adapter, or r
    exceeds min(in, out) of a weight (such a rank costs more than it can express) without
    allow_large_r=True.
    Source: Hu et al. 2021, section 4.1; A as in the authors' code.
    """
    modules = dict(model.named_modules())
    pairs = {}
    for name, r in target_ranks(model, config, allow_large_r).items():
        layer = modules[name]
        bound = 1 / math.sqrt(layer.in_features)
        A = uniform(rng, bound, (r, layer.in_features), layer.dtype, layer.xp)
        B = Tensor(layer.xp.zeros((layer.out_features, r), layer.dtype), requires_grad=True)
        pairs[name] = LoRAPair(A, B, config.scaling_of(name))
    return Adapter(config, pairs, model.fingerprint(), stored_as(model), table_rows(model))


def attach(base, adapter, *, check_base=True):
    """A new model: `base`, frozen, with the adapter's updates added. `base` itself is not touched.

    The new model shares every array with `base` and with `adapter`, and only the adapter's tensors
    are trainable. Called with a generator, `model.loss(ids, targets, rng=rng)`, it applies the
    adapter's dropout. check_base=False skips the fingerprint: for a base changed on purpose.

    An adapter is anything with `adapted(name, module)`, the module that stands for one of the
    base's, or None where that one stays; and `fit_errors` (see fits.py).

    Shapes: the new model takes and returns what `base` does.
    Raises: ValueError with the reasons why the two do not fit: modules absent, of another shape or
    adapted already, or else another base; TypeError for another dtype or backend. Nothing has
    changed then.
    Source: Hu et al. 2021, eq. 3.
    """
    check_fits("attach", base, adapter, check_base)

    # The base is frozen first. The adapter's tensors come in afterwards, and stay trainable.
    return base.frozen().rebuild(adapter.adapted)


def merge(model):
    """A new plain model with ΔW added into each adapted weight: no extra work at inference.

    Adapted weights are new arrays, all others are shared with the base, so every tensor is frozen
    (`trainable_copy()` gives a model to train on). The base and the adapter are not touched.

    Shapes: as `model`.
    Raises: ValueError if no layer carries an adapter, if what one does is no change of weights, if
    rows carry different ones, or if a merged weight would not be finite.
    Source: Hu et al. 2021, section 4.1 ("No Additional Inference Latency").
    """
    if not adapted_names(model):
        raise ValueError(
            "merge: no layer of this model carries an adapter; call it on what attach returned"
        )

    def replace(name, child):
        if not isinstance(child, AdaptedModule):
            return None
        plain = child.merged()
        for part, p in plain.named_parameters():
            # What is stored in few bits is as it was.
            if not isinstance(p, StoredTensor) and not p.xp.isfinite(p.data).all():
                raise ValueError(
                    f"merge: the merged {part} of {name} is not finite; "
                    "the adapter holds inf or nan"
                )
        return plain

    return model.rebuild(replace)


def check_plain(who, adapter):
    """Raise ValueError unless every pair of `adapter` is plain LoRA, whose update is a product."""
    for name, pair in adapter.pairs.items():
        if type(pair) is not LoRAPair:
            raise ValueError(
                f"{who}: {name} has a {type(pair).__name__}, whose update is not a product of two "
                "factors; only plain LoRA is added, compressed and stacked, so merge it instead"
            )
