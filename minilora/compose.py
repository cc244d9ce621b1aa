"""Adapters as matrices: weighted sums, best approximations, and the adapter between two models.

    Σ w ΔW = [w₁s₁B₁ | w₂s₂B₂ | ...] [A₁ ; A₂ ; ...]        ranks add, and nothing is lost
    ΔW ≈ its r largest singular values                      rank r, and the least is lost

Results have scaling 1: the strength of an update is in its lora_B, and alpha = r records that. They
are computed in float64 and rounded once, to the dtype of the adapter. Knows adapters and the
weights of models, no files.

Shapes: lora_A (r, in), lora_B (out, r), ΔW (out, in).
"""

import sys
from collections import Counter
from typing import NamedTuple

import numpy as np

from .backend import to_device, to_numpy
from .lora import Adapter, LoRAPair, adapted_names, check_plain, linear_names
from .lora_config import LoRAConfig, as_pattern, find_targets
from .low_rank import best_of_product, best_of_rank, distance, product_norm, singular_values
from .nn import table_rows
from .quant import stored_as
from .tensor import Tensor, check_same, check_same_layout


class Compressed(NamedTuple):
    """An adapter that stands for an update of a higher rank, and what it lacks.

    errors: {module: Distance of the adapter's ΔW, as it is stored, from the update}.
    left_out: {tensor: Distance} of the tensors that changed and that no pair stands for: how far
    each moved from the base. `compress` leaves out none.
    """

    adapter: Adapter
    errors: dict
    left_out: dict


def combine(adapters, weights, *, check_base=True):
    """One adapter whose update is Σ weight · ΔW of the `adapters`: their factors side by side.

    Weights may be negative. Ranks add; targets, ranks and scalings may differ, and pairs that share
    their lora_A in every adapter still do. Each entry of lora_B is rounded once. With
    check_base=False the adapters may be of different bases. The result says which base it belongs
    to if they all say the same.

    Raises: ValueError if there are no adapters, not as many weights, a weight or a product is not
    finite, shapes differ, a pair is not plain LoRA, or the bases differ; TypeError for anything
    that is no Adapter, other dtypes or other backends.
    """
    adapters = list(adapters)
    weights = _checked_weights(weights, len(adapters))
    for adapter in adapters:
        _check_plain("combine", adapter)
        _check_finite("combine", adapter)
    if check_base:
        _check_one_base(adapters)
    pairs = {}
    # {the lora_A's that stand under each other: the Tensor that holds them}
    joined = {}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.pairs):
        terms = []
        for weight, adapter in zip(weights, adapters, strict=True):
            if name in adapter.pairs:
                terms.append((weight, adapter.pairs[name]))
        _check_summable(name, terms)
        pairs[name] = _side_by_side(name, terms, joined)
    fingerprint = _common_base(adapters)
    rows = {}
    if fingerprint is not None:
        # The tables are those of one base, but an adapter of an earlier version does not say.
        for adapter in adapters:
            rows |= adapter.base_rows
    return Adapter(_config_of(pairs), pairs, fingerprint, _all_stored(adapters), rows)


def compress(adapter, r):
    """The best adapter of rank r, module by module: no other is nearer in Frobenius's norm.

    Both factors are reduced by QR, and an SVD of the small (r, r) core between them gives the
    singular values: ΔW itself is never formed. A pair whose rank is r or less is left as it is.
    Pairs that share a lora_A, as the parts of PEFT's c_attn do, are one matrix (all their rows) of
    rank r, and share one again.

    Returns a Compressed.
    Raises: ValueError if r is no whole number of at least 1, a pair is not plain LoRA or holds inf
    or nan, or a factor with its scaling outgrows the dtype; TypeError for anything that is no
    Adapter.
    Source: Eckart and Young 1936.
    """
    _check_rank("compress", r)
    _check_plain("compress", adapter)
    _check_finite("compress", adapter)
    pairs = {}
    errors = {}
    for names in _sharing_A(adapter.pairs):
        old = [adapter.pairs[name] for name in names]
        A, B = _joint_factors(old)
        like = old[0].lora_A
        new_A, new_B, lost_A, lost_B = best_of_product(r, A, B, like.dtype)
        _check_stored(names, new_A, new_B)
        shared_A = _trainable(new_A, like.xp)
        start = 0
        for name, pair in zip(names, old, strict=True):
            rows = slice(start, start + pair.out_features)
            start += pair.out_features
            pairs[name] = LoRAPair(shared_A, _trainable(new_B[rows], like.xp), 1.0)
            lost = product_norm(lost_A, lost_B[rows])
            errors[name] = distance(lost, product_norm(A, B[rows]))
    # In the order of the adapter, which the groups may have left.
    pairs = {name: pairs[name] for name in adapter.pairs}
    errors = {name: errors[name] for name in adapter.pairs}
    config = _config_of(pairs)
    result = adapter.with_pairs(config, pairs)
    return Compressed(result, errors, {})


def extract(base, tuned, r, target_modules="all-linear", *, on_layer=None):
    """The best adapter of rank r for what fine-tuning did to `base`: a truncated SVD of W' - W.

    `tuned` has the layers of `base`. A targeted linear that did not change gets no pair; where
    min(in, out) is less than r, that is its rank, and nothing is lost. LoRA holds changes of linear
    weights: what else changed (embeddings, norms, biases, linears that were not targeted) is in
    `left_out`. `on_layer(name)` is called after each module, to show progress.

    Returns a Compressed. Its adapter belongs to `base`.
    Raises: ValueError if r is no whole number of at least 1, a model carries an adapter, the two
    differ in layers, shapes, dtypes or configuration, a weight is not finite, a target matches
    nothing, or no targeted linear changed.
    Source: Eckart and Young 1936.
    """
    _check_rank("extract", r)
    _check_same_model(base, tuned)
    modules = dict(base.named_modules())
    tuned_modules = dict(tuned.named_modules())
    pairs = {}
    errors = {}
    held = set()
    for name in find_targets(linear_names(base), target_modules):
        layer = modules[name]
        update = _difference(f"{name}.weight", layer.weight, tuned_modules[name].weight)
        held.add(f"{name}.weight")
        if update.any():
            A, B = best_of_rank(r, update, layer.dtype)
            pairs[name] = LoRAPair(_trainable(A, layer.xp), _trainable(B, layer.xp), 1.0)
            lost = update - B.astype(np.float64) @ A.astype(np.float64)
            errors[name] = distance(np.linalg.norm(lost), np.linalg.norm(update))
        if on_layer is not None:
            on_layer(name)
    left_out = _moved(base, tuned, held)
    if not pairs:
        elsewhere = ", ".join(list(left_out)[:4]) or "nothing"
        raise ValueError(
            f"extract: none of the {len(held)} targeted linears changed, so there is no update to "
            f"hold; what changed elsewhere: {elsewhere}"
        )
    config = _config_of(pairs)
    adapter = Adapter(config, pairs, base.fingerprint(), stored_as(base), table_rows(base))
    return Compressed(adapter, errors, left_out)


def spectrum(pair):
    """The singular values of a pair's ΔW, the largest first, without forming it.

    Shapes: a LoRAPair -> float64 (min(r, in, out),), on the host.
    Raises: TypeError for anything that is not plain LoRA.
    """
    if type(pair) is not LoRAPair:
        raise TypeError(f"spectrum: expected a LoRAPair, got {type(pair).__name__}")
    return singular_values(*_joint_factors([pair]))


# What is computed.


def _side_by_side(name, terms, joined):
    """The LoRAPair that is the sum of `terms`, [(weight, pair)], for the module `name`.

    Its lora_A is that of `joined` if the same ones have been put under each other before.
    """
    xp = terms[0][1].lora_A.xp
    key = tuple(id(pair.lora_A) for _, pair in terms)
    if key not in joined:
        A = xp.concatenate([pair.lora_A.data for _, pair in terms])
        joined[key] = Tensor(A, requires_grad=True)
    columns = [_times(pair.lora_B.data, weight * pair.scaling) for weight, pair in terms]
    B = xp.concatenate(columns, axis=1)
    if not xp.isfinite(B).all():
        weights = ", ".join(f"{weight:g}" for weight, _ in terms)
        raise ValueError(
            f"combine: lora_B of {name} outgrows {B.dtype.name} with the weights {weights}; "
            "give smaller ones"
        )
    return LoRAPair(joined[key], Tensor(B, requires_grad=True), 1.0)


def _joint_factors(pairs):
    """(A, B) of pairs with one lora_A, in float64: their updates, scaled, under each other."""
    A = to_numpy(pairs[0].lora_A.data).astype(np.float64)
    B = [pair.scaling * to_numpy(pair.lora_B.data).astype(np.float64) for pair in pairs]
    return A, np.concatenate(B)


def _times(array, number):
    """`array` times a Python float, rounded once."""
    with np.errstate(over="ignore", invalid="ignore"):
        return (array.astype(np.float64) * number).astype(array.dtype)


def _difference(name, before, after):
    """The values of one Tensor less those of another, in float64 on the host."""
    difference = to_numpy(after.data).astype(np.float64) - to_numpy(before.data)
    if not np.isfinite(difference).all():
        raise ValueError(f"extract: {name} is not finite in one of the two models")
    return difference


def _moved(base, tuned, held):
    """{tensor: Distance} of the tensors that differ and are not among the names `held`."""
    after = dict(tuned.named_parameters())
    moved = {}
    for name, p in base.named_parameters():
        if name in held:
            continue
        difference = _difference(name, p, after[name])
        if difference.any():
            size = np.linalg.norm(to_numpy(p.data).astype(np.float64))
            moved[name] = distance(np.linalg.norm(difference), size)
    return moved


# What results are made of.


def _trainable(array, xp):
    return Tensor(to_device(array, xp), requires_grad=True)


def _config_of(pairs):
    """The LoRAConfig that says r = alpha of each pair, whose scaling is 1.

    What most pairs have is the default. There is no dropout: nothing was trained.
    """
    ranks = {name: pair.r for name, pair in pairs.items()}
    [(r, _)] = Counter(ranks.values()).most_common(1)
    # The first match counts, so that the key of x.y must not come before that of z.x.y.
    longest_first = sorted(ranks, key=len, reverse=True)
    others = {as_pattern(name): ranks[name] for name in longest_first if ranks[name] != r}
    return LoRAConfig(
        r=r, alpha=r, target_modules=tuple(pairs), rank_pattern=others, alpha_pattern=others
    )


def _sharing_A(pairs):
    """The names of `pairs` in lists: those with one lora_A together."""
    groups = {}
    for name, pair in pairs.items():
        groups.setdefault(id(pair.lora_A), []).append(name)
    return list(groups.values())


def _common_base(adapters):
    """The fingerprint of the base if all adapters say the same one, else None."""
    first = adapters[0].base_fingerprint
    same = all(adapter.base_fingerprint == first for adapter in adapters)
    return first if same else None


def _all_stored(adapters):
    """{tensor: kind} of what was stored in few bits for any of them; the first that says so."""
    stored = {}
    for adapter in reversed(adapters):
        stored |= adapter.base_stored
    return stored


# What is refused.


def _check_rank(who, r):
    if not isinstance(r, (int, np.integer)) or isinstance(r, bool) or r < 1:
        raise ValueError(f"{who}: r must be a whole number of at least 1, got {r!r}")


def _checked_weights(weights, n):
    """The weights of `n` adapters as floats."""
    weights = list(weights)
    if n == 0:
        raise ValueError("combine: there are no adapters; give at least one")
    if len(weights) != n:
        raise ValueError(f"combine: {n} adapters and {len(weights)} weights; give one for each")
    numbers = []
    for weight in weights:
        number = weight.item() if isinstance(weight, np.generic) else weight
        is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
        # No comparison holds for nan.
        if not is_number or not abs(number) <= sys.float_info.max:
            raise ValueError(f"combine: weights must be finite numbers, got {weight!r}")
        numbers.append(float(number))
    return numbers


def _check_plain(who, adapter):
    if not isinstance(adapter, Adapter):
        raise TypeError(
            f"{who}: expected an Adapter, got {type(adapter).__name__}; of a stack give the "
            "adapters in it"
        )
    check_plain(who, adapter)


def _check_finite(who, adapter):
    for name, p in adapter.named_parameters():
        if not p.xp.isfinite(p.data).all():
            raise ValueError(f"{who}: {name} holds inf or nan; lower the learning rate")


def _check_stored(names, A, B):
    """Raise ValueError unless the new factors of the modules `names` are finite as stored."""
    if not (np.isfinite(A).all() and np.isfinite(B).all()):
        raise ValueError(
            f"compress: the factors of {', '.join(names)} outgrow {B.dtype.name} once scaling is "
            "in lora_B; convert the adapter first, adapter.astype('float64')"
        )


def _check_summable(name, terms):
    """Raise unless the pairs of `terms`, [(weight, pair)], have one shape, dtype and backend."""
    tensors = [p for _, pair in terms for p in (pair.lora_A, pair.lora_B)]
    check_same(f"combine: {name}", *tensors)
    first = terms[0][1]
    for _, pair in terms:
        shape = (pair.out_features, pair.in_features)
        if shape != (first.out_features, first.in_features):
            raise ValueError(
                f"combine: {name} is {(first.out_features, first.in_features)} for one adapter and "
                f"{shape} for another; they belong to different bases"
            )


def _check_one_base(adapters):
    """Raise ValueError if two of the adapters say that they belong to different bases."""
    first = None
    for number, adapter in enumerate(adapters, 1):
        fingerprint = adapter.base_fingerprint
        if fingerprint is None:
            continue
        if first is None:
            first = (number, fingerprint)
        names = fingerprint | first[1]
        differing = [n for n in names if fingerprint.get(n) != first[1].get(n)]
        if differing:
            raise ValueError(
                f"combine: adapters {first[0]} and {number} belong to different bases: "
                f"{len(differing)} of {len(names)} tensors differ, {differing[0]} first. Add "
                "adapters of one base; or pass check_base=False if it was changed on purpose"
            )


def _check_same_model(base, tuned):
    """Raise ValueError unless the two differ in the values of their tensors alone."""
    for title, model in (("base", base), ("tuned model", tuned)):
        carrying = adapted_names(model)
        if carrying:
            raise ValueError(
                f"extract: {carrying[0]} of the {title} carries an adapter; merge it first"
            )
    check_same_layout(
        "extract: the tuned model is not of the base's shape",
        dict(tuned.named_parameters()),
        dict(base.named_parameters()),
    )
    ours = _settings(base)
    theirs = _settings(tuned)
    differing = [key for key in ours | theirs if ours.get(key) != theirs.get(key)]
    if differing:
        fields = ", ".join(f"{key} {ours.get(key)!r} and {theirs.get(key)!r}" for key in differing)
        raise ValueError(
            f"extract: base and tuned model compute in different ways ({fields}), which no adapter "
            "holds; give both one configuration if that makes no difference"
        )


def _settings(model):
    """{field: value} of a model's configuration; {} if it has none."""
    return vars(model.config) if hasattr(model, "config") else {}
