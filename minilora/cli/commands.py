"""What the command line does with folders, besides training and writing: merge.

Knows folders and models, and no arguments.
"""

from pathlib import Path

from ..disk.folder import check_unused
from ..disk.models import TENSORS, load_model
from ..disk.peft import load_adapter
from ..disk.rounding import save_merged
from ..lora import attach
from .folders import find_sources


def merge_folders(
    base, adapter, out, log, *, dtype, allow_rounding, quantize=None, other_precision=False
):
    """Merge the adapter in the folder `adapter` into the model in `base`; write it to `out`.

    `base` is what `find_base` takes, `other_precision` as for `load_adapter`; the other options are
    those of `save_merged`.
    Raises: ValueError if `out` is not empty, or as `save_merged`.
    """
    check_unused(out)
    base = find_sources(base, [adapter])
    model = load_model(base)
    loaded = load_adapter(adapter, model, other_precision=other_precision, say=log)
    adapted = attach(model, loaded, check_base=False)
    save_merged(
        adapted,
        out,
        dtype=dtype,
        like=base,
        quantize=quantize,
        allow_rounding=allow_rounding,
        say=log,
    )
    size = (Path(out) / TENSORS).stat().st_size
    log(f"kept in {out}: a plain model, {size / 1e6:,.1f} MB")
