"""What the command line does with folders, besides training and writing: merge, compare.

Knows folders and models, and no arguments.
"""

import math
from pathlib import Path

from tqdm import tqdm

from ..disk.folder import check_unused
from ..disk.models import TENSORS, load_model, load_model_config
from ..disk.peft import load_adapter
from ..disk.rounding import save_merged
from ..disk.tokenizer import load_tokenizer
from ..lora import attach
from ..training.datasets import load_data
from ..training.loop import heldout_loss
from .folders import find_sources
from .generation import load_base

# The exponential of a loss above this is not a float any more.
LARGEST_EXPONENT = 700


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


def compare(
    base,
    adapter,
    data,
    xp,
    log,
    *,
    batch,
    length,
    quantize=None,
    other_precision=False,
    too_long=None,
):
    """Print the loss of a model on the file `data`, without and with an adapter.

    `base` is what `find_base` takes, `adapter` a folder; `batch` is how many rows are computed at
    once, `length` how many tokens a row of text has (None: as `load_data`). `quantize` is what the
    base is packed as, None to leave it as it is stored; `other_precision` as for `load_adapter`;
    `too_long` what becomes of rows longer than the context: "cut", "drop", or None: refused.
    """
    base = find_sources(base, [adapter])
    # What is wrong with the data is said before a base is packed.
    context = load_model_config(base).block_size
    examples = load_data(data, load_tokenizer(base), context, length, too_long=too_long, log=log)
    model = load_base(base, xp, quantize, log)
    loaded = load_adapter(adapter, model, other_precision=other_precision, say=log)
    adapted = attach(model, loaded, check_base=False)
    log(f"data {data}: {examples}")
    without = _loss(model, examples, batch, "without")
    with_it = _loss(adapted, examples, batch, "with")
    log(f"{'nats per token':<20} {'loss':>8} {'perplexity':>11}")
    log(f"{'without the adapter':<20} {without:>8.4f} {_perplexity(without):>11.5g}")
    log(f"{'with it':<20} {with_it:>8.4f} {_perplexity(with_it):>11.5g}")
    log(f"{'difference':<20} {with_it - without:>+8.4f}")


def _loss(model, examples, batch, label):
    """Nats per token of `examples`, once through them."""
    bar = tqdm(examples.epoch(batch), desc=label, unit="batch", delay=1, leave=False)
    return heldout_loss(model, bar)


def _perplexity(loss):
    return math.exp(min(loss, LARGEST_EXPONENT))
