"""A merged model in fewer bits: what rounding does to the update is measured, and told, before anything is written.

Rounding a weight W + ΔW to 16 bits moves it by up to half a unit in its last place. Where ΔW is smaller than that,
what is stored is mostly the base's weight, and the adapter is gone without a trace. The model hardly suffers; the
update does.
"""

from collections import namedtuple

import numpy as np
from tqdm import tqdm

from ..backend import to_numpy
from ..lora import LoRALinear, merge
from .folder import rounded
from .gpt2 import save_model

LIMIT = 0.1  # the largest rounding error that is stored unasked, as a share of a module's update

Rounding = namedtuple("Rounding", "module size error unmoved weights")


def rounding_report(model, dtype, merged=None):
    """What merging `model` and storing it in `dtype` does to each update: a list of Rounding, in the model's order.

    Shapes: none. `merged` is merge(model), if that has been done. `size` is ‖ΔW‖ / ‖W‖; `error` is
    ‖stored - (W + ΔW)‖ / ‖ΔW‖, above 1 where more than the update was rounded away; `unmoved` is the share of its
    `weights` that are stored as the base's would be. Norms are Frobenius's, in float64. A module whose update is zero
    loses nothing: its error is 0.
    Raises: ValueError if no layer carries an adapter, or a merged weight overflows in `dtype`.
    Source: the definition of rounding; error ≈ 0.42 u ‖W + ΔW‖ / ‖ΔW‖ for u = 2⁻²⁴, 2⁻¹¹, 2⁻⁸ (float32, float16,
    bfloat16) and normal weights; at most 1, where all is lost, if the base's weights exist in `dtype`.
    """
    report, plain = [], dict((merged or merge(model)).named_modules())
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LoRALinear)]
    with tqdm(layers, desc="rounding", unit="layer", delay=1, leave=False) as bar:
        for name, layer in bar:
            W = to_numpy(layer.linear.weight.data).astype(np.float64)
            update = to_numpy(layer.pair.astype(np.float64).delta())
            stored = rounded(name, to_numpy(plain[name].weight.data), dtype)
            with np.errstate(over="ignore"):  # only what is stored must fit
                base = W.astype(stored.dtype)
            lost, size, whole = map(np.linalg.norm, (stored.astype(np.float64) - (W + update), update, W))
            error = lost / size if size else 0.0
            unmoved = float(np.mean(stored == base))
            report.append(Rounding(name, float(size / (whole or 1)), float(error), unmoved, W.size))
    return report


def save_merged(model, folder, *, dtype="float32", like=None, allow_rounding=False, say=print):
    """Merge an adapted model and write it as a plain one (`save_model`); `say` is told what became of the update.

    Shapes: as `save_model`; dtype is "float32", "float16", "bfloat16" or "float64".
    Raises: ValueError, before anything is written and unless allow_rounding=True, if the rounding of a module
    is more than a tenth (LIMIT) of its update; and as `merge` and `save_model`.
    Source: as `rounding_report`.
    """
    merged = merge(model)
    report = rounding_report(model, dtype, merged)
    worst, size = max(report, key=lambda r: r.error), np.mean([r.size for r in report])
    unmoved = sum(r.unmoved * r.weights for r in report) / sum(r.weights for r in report)
    say(f"merged {len(report)} updates, on average {size:.1e} of their weights, to be stored as {dtype}:\n"
        f"  {unmoved:.1%} of the weights stay what they were; the worst rounding is {worst.error:.2g} of an update, in "
        f"{worst.module}")
    if worst.error > LIMIT and not allow_rounding:
        raise ValueError(
            f"stored as {dtype}, {worst.module} is rounded by {worst.error:.0%} of its update (limit {LIMIT:.0%}): "
            "what is below half a unit in the last place is lost. Save as float32, or allow the rounding"
        )
    save_model(merged, folder, dtype=dtype, like=like)
