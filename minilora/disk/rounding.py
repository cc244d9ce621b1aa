"""A merged model in fewer bits: what rounding does to each update, said before anything is written.

Rounding a weight W + ΔW to 16 bits moves it by up to half a unit in its last place. Where ΔW is
smaller than that, the file holds little but the base's weight, and the adapter is gone without a
trace. The model hardly suffers; the update does. So it is, and more so, where the sum is quantised
again as the base was. Knows adapted layers, not what they adapt.
"""

from collections import Counter, namedtuple

import numpy as np
from tqdm import tqdm

from ..backend import to_numpy
from ..lora import LoRALinear, merge
from ..nn import AdaptedLayer
from ..packed import PackedTensor
from ..quant import KINDS, quantized
from ..tensor import Tensor
from .models import save_model
from .tensor_file import rounded

# The largest rounding error that is stored unasked, as a share of a module's update.
LIMIT = 0.1
# What `quantize` makes, as its users write it.
_LOWER_KINDS = tuple(kind.lower() for kind in KINDS)

Rounding = namedtuple("Rounding", "module size error unmoved weights")


def rounding_report(model, dtype, merged=None):
    """What merging `model` and storing it in `dtype` does to each update.

    `dtype` is one that files have, "float32", "float16", "bfloat16" or "float64", or a kind that
    `quantize` makes: "nf4", "q8_0", "q4_0", "q4_1".

    Returns a list of Rounding, in the model's order. `size` is ‖ΔW‖ / ‖W‖. `error` is
    ‖stored - (W + ΔW)‖ / ‖ΔW‖, above 1 where more than the update was rounded away. `unmoved` is
    the share of its `weights` that are stored as the base's would be. Norms are Frobenius's, in
    float64. A module whose update is zero loses nothing: its error is 0. `merged` is merge(model),
    if that has been done.
    Raises: ValueError if no layer carries an adapter, or a merged weight overflows in `dtype`.
    Source: the definition of rounding; error ≈ 0.42 u ‖W + ΔW‖ / ‖ΔW‖ for u = 2⁻²⁴, 2⁻¹¹, 2⁻⁸
    (float32, float16, bfloat16) and normal weights; at most 1, where all is lost, if the base's
    weights exist in `dtype`.
    """
    if merged is None:
        merged = merge(model)
    plain = dict(merged.named_modules())
    layers = {n: layer for n, layer in model.named_modules() if isinstance(layer, AdaptedLayer)}
    report = []
    with tqdm(
        layers.items(), desc="rounding", unit="layer", delay=1, leave=False, disable=None
    ) as bar:
        for name, layer in bar:
            weight = to_numpy(layer.linear.weight.data)
            update = to_numpy(_exact_update(layer))
            total = to_numpy(plain[name].weight.data)
            if dtype in _LOWER_KINDS:
                stored = _requantised(name, total, dtype)
                base = _requantised(name, weight, dtype)
            else:
                stored = rounded(name, total, dtype)
                # Only what is stored must fit: the base alone may overflow.
                with np.errstate(over="ignore"):
                    base = weight.astype(stored.dtype)
            report.append(_measured(name, weight.astype(np.float64), update, stored, base))
    return report


def _exact_update(layer):
    """What merging an adapted layer adds to its weight, in float64."""
    if isinstance(layer, LoRALinear):
        return layer.pair.astype(np.float64).delta()
    wide = layer.astype(np.float64)
    return wide.merged().weight.data - wide.linear.weight.data


def _requantised(name, weight, kind):
    """The values of an array after `quantize` has been at it."""
    return quantized(f"{name}.weight", Tensor(weight), kind.upper()).data


def _measured(name, W, update, stored, base):
    """The Rounding of one module: W and its update in float64, the sum and the base as stored."""
    lost = np.linalg.norm(stored.astype(np.float64) - (W + update))
    update_norm = np.linalg.norm(update)
    base_norm = np.linalg.norm(W)
    # An update of zero loses nothing; of a base of zero it is all there is.
    error = lost / update_norm if update_norm else 0.0
    size = update_norm / base_norm if base_norm else update_norm
    unmoved = np.mean(stored == base)
    return Rounding(name, float(size), float(error), float(unmoved), W.size)


def save_merged(
    model, folder, *, dtype="float32", like=None, quantize=None, allow_rounding=False, say=print
):
    """Merge an adapted model and write it as a plain one, with `save_model`.

    A weight that the base holds in few bits is widened before the update is added. `quantize`, a
    kind that the function of that name makes, quantises the sums once more; what is written is
    their values, in `dtype`. `say` gets what became of the update.
    Shapes: as `save_model`; dtype is "float32", "float16", "bfloat16" or "float64".
    Raises: ValueError, before anything is written and unless allow_rounding=True, if the rounding
    of a module is more than a tenth (LIMIT) of its update; and as `merge` and `save_model`.
    Source: as `rounding_report`.
    """
    merged = merge(model)
    stored_as = dtype if quantize is None else f"{quantize.upper()}, in {dtype}"
    report = rounding_report(model, quantize or dtype, merged)
    for line in _what_is_done(model, quantize):
        say(line)
    worst = _worst(report)
    size = np.mean([line.size for line in report])
    # Modules differ in size: a mean over them is no share of weights.
    n_weights = sum(line.weights for line in report)
    unmoved = sum(line.unmoved * line.weights for line in report) / n_weights
    say(
        f"merged {len(report)} updates, on average {size:.1e} of their weights, to be stored as "
        f"{stored_as}:\n  {unmoved:.1%} of the weights stay what they were; the worst rounding is "
        f"{worst.error:.2g} of an update, in {worst.module}"
    )
    if worst.error > LIMIT and not allow_rounding:
        raise ValueError(
            f"stored as {stored_as}, {worst.module} is rounded by {worst.error:.0%} of its update "
            f"(limit {LIMIT:.0%}): changes below half a unit in the last place are lost. Save as "
            "float32, or allow the rounding"
        )
    if quantize is not None:
        merged = _quantised_again(merged, [line.module for line in report], quantize)
    save_model(merged, folder, dtype=dtype, like=like)


def _what_is_done(model, quantize):
    """What happens to weights of few bits, as lines."""
    kinds = Counter()
    for _, layer in model.named_modules():
        if isinstance(layer, AdaptedLayer) and isinstance(layer.linear.weight, PackedTensor):
            kinds[layer.linear.weight.kind] += 1
    lines = [
        f"widened {n} weights from {kind} before the updates are added" for kind, n in kinds.items()
    ]
    if quantize is not None:
        lines.append(f"the sums are quantised again, as {quantize.upper()}")
    return lines


def _quantised_again(merged, modules, kind):
    """`merged` with the weights of `modules` as they are after quantising: widened again."""
    weights = {f"{name}.weight" for name in modules}

    def replace(name, x):
        if name not in weights:
            return None
        return Tensor(_requantised(name.removesuffix(".weight"), to_numpy(x.data), kind))

    return merged.rebuild(replace)


def _worst(report):
    """The line of a report whose update suffers most."""
    return max(report, key=lambda line: line.error)
