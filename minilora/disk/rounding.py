"""A merged model in fewer bits: what rounding does to each update, said before anything is written.

Rounding a weight W + ΔW to 16 bits moves it by up to half a unit in its last place. Where ΔW is
smaller than that, the file holds little but the base's weight, and the adapter is gone without a
trace. The model hardly suffers; the update does. Knows adapted layers, not what they adapt.
"""

from collections import namedtuple

import numpy as np
from tqdm import tqdm

from ..backend import to_numpy
from ..lora import LoRALinear, merge
from .models import save_model
from .tensor_file import rounded

# The largest rounding error that is stored unasked, as a share of a module's update.
LIMIT = 0.1

Rounding = namedtuple("Rounding", "module size error unmoved weights")


def rounding_report(model, dtype, merged=None):
    """What merging `model` and storing it in `dtype` does to each update.

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
    layers = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)
    }
    report = []
    with tqdm(layers.items(), desc="rounding", unit="layer", delay=1, leave=False) as bar:
        for name, layer in bar:
            W = to_numpy(layer.linear.weight.data).astype(np.float64)
            update = to_numpy(layer.pair.astype(np.float64).delta())
            stored = rounded(name, to_numpy(plain[name].weight.data), dtype)
            report.append(_measured(name, W, update, stored))
    return report


def _measured(name, W, update, stored):
    """The Rounding of one module: W and its update in float64, and the sum as it is stored."""
    # Only what is stored must fit: the base alone may overflow.
    with np.errstate(over="ignore"):
        base = W.astype(stored.dtype)
    lost = np.linalg.norm(stored.astype(np.float64) - (W + update))
    update_norm = np.linalg.norm(update)
    base_norm = np.linalg.norm(W)
    # An update of zero loses nothing; of a base of zero it is all there is.
    error = lost / update_norm if update_norm else 0.0
    size = update_norm / base_norm if base_norm else update_norm
    unmoved = np.mean(stored == base)
    return Rounding(name, float(size), float(error), float(unmoved), W.size)


def save_merged(model, folder, *, dtype="float32", like=None, allow_rounding=False, say=print):
    """Merge an adapted model and write it as a plain one, with `save_model`.

    `say` gets what became of the update.
    Shapes: as `save_model`; dtype is "float32", "float16", "bfloat16" or "float64".
    Raises: ValueError, before anything is written and unless allow_rounding=True, if the rounding
    of a module is more than a tenth (LIMIT) of its update; and as `merge` and `save_model`.
    Source: as `rounding_report`.
    """
    merged = merge(model)
    report = rounding_report(model, dtype, merged)
    worst = _worst(report)
    size = np.mean([line.size for line in report])
    # Modules differ in size: a mean over them is no share of weights.
    n_weights = sum(line.weights for line in report)
    unmoved = sum(line.unmoved * line.weights for line in report) / n_weights
    say(
        f"merged {len(report)} updates, on average {size:.1e} of their weights, to be stored as "
        f"{dtype}:\n  {unmoved:.1%} of the weights stay what they were; the worst rounding is "
        f"{worst.error:.2g} of an update, in {worst.module}"
    )
    if worst.error > LIMIT and not allow_rounding:
        raise ValueError(
            f"stored as {dtype}, {worst.module} is rounded by {worst.error:.0%} of its update "
            f"(limit {LIMIT:.0%}): changes below half a unit in the last place are lost. Save as "
            "float32, or allow the rounding"
        )
    save_model(merged, folder, dtype=dtype, like=like)


def _worst(report):
    """The line of a report whose update suffers most."""
    return max(report, key=lambda line: line.error)
