"""The command compare: a base and adapters on files of data, each on each. Knows no arguments."""

import math
from collections import Counter, namedtuple
from pathlib import Path

from tqdm import tqdm

from ..disk.checks import errors_name
from ..disk.models import load_model_config
from ..disk.peft import load_adapter
from ..disk.tokenizer import load_tokenizer
from ..lora import attach
from ..training.datasets import Rows, load_data
from ..training.loop import exact_rows, heldout_loss
from .folders import find_sources
from .generation import load_base
from .messages import visible

# The exponential of a loss above this is not a float any more.
LARGEST_EXPONENT = 700

# What one model does on one file: nats per token, and, where the file has answers, for how many of
# its rows greedy decoding gives what is learned of them, of how many; None for a text.
Measured = namedtuple("Measured", "loss exact rows")


def compare(
    base,
    adapters,
    files,
    xp,
    log,
    *,
    batch,
    length,
    quantize=None,
    accept_base=(),
    too_long=None,
    parts=1,
    threads=1,
):
    """Print the loss of a model on each of the `files`, without and with each of the `adapters`.

    Where a file has answers, print how many of them greedy decoding gives as well.

    `base` is what `find_base` takes, `adapters` are folders; `batch` is how many rows are computed
    at once, `length` how many tokens a row of text has (None: as `load_data`). `quantize` is what
    the base is packed as, None to leave it as it is stored; `accept_base` as for
    `load_adapter`; `too_long` what becomes of rows longer than the context: "cut", "drop", or None:
    refused. `parts` and `threads` are those of `heldout_loss`.
    Raises: ValueError or OSError, before anything is measured, for what does not fit.
    """
    path = find_sources(base, adapters)
    # What is wrong with the data is said before a base is packed.
    data = _load_all(path, files, length, too_long, log)
    model = load_base(path, xp, quantize, log)
    loaded = [
        load_adapter(folder, model, accept_base=accept_base, say=log) for folder in adapters
    ]
    for file, examples in zip(files, data, strict=True):
        log(f"data {file}: {examples}")
    how = {"parts": parts, "threads": threads}
    rows = [_measure_all(model, data, batch, "the base", how)]
    for folder, adapter in zip(adapters, loaded, strict=True):
        # One at a time: all of them share the base.
        adapted = attach(model, adapter, check_base=False)
        rows.append(_measure_all(adapted, data, batch, str(folder), how))
    if len(adapters) == 1 and len(files) == 1:
        lines = _table_of_two(rows[0][0], rows[1][0])
    else:
        lines = _matrices(["the base", *map(str, adapters)], _short(files), rows)
    for line in lines:
        log(line)


def _load_all(base, files, length, too_long, log):
    """The Text or Rows of each file: `length` is for the texts, `too_long` for the others."""
    tokenizer = load_tokenizer(base)
    context = load_model_config(base).block_size
    is_text = {file: Path(file).suffix == ".txt" for file in files}
    data = []
    for file in files:
        # With files of one kind, load_data refuses the option of the other.
        of_texts = length if is_text[file] or not any(is_text.values()) else None
        of_rows = too_long if not is_text[file] or all(is_text.values()) else None
        data.append(load_data(file, tokenizer, context, of_texts, too_long=of_rows, log=log))
    return data


def _measure_all(model, data, batch, label, how):
    """[Measured on each of the `data`]; `how` says in which parts, on which threads."""
    return [_measure(model, examples, batch, label, how) for examples in data]


def _measure(model, examples, batch, label, how):
    label = visible(label)
    bar = tqdm(
        examples.epoch(batch), desc=label, unit="batch", delay=1, leave=False, disable=None
    )
    with errors_name(label):
        loss = heldout_loss(model, bar, **how)
    if not isinstance(examples, Rows) or not examples.has_answers:
        return Measured(loss, None, None)
    is_exact = exact_rows(model, examples.rows, batch, **how)
    return Measured(loss, sum(is_exact), len(is_exact))


def _table_of_two(without, with_it):
    """The lines for one adapter on one file."""
    lines = [f"{'nats per token':<20} {'loss':>8} {'perplexity':>11}"]
    for name, measured in (("without the adapter", without), ("with it", with_it)):
        perplexity = math.exp(min(measured.loss, LARGEST_EXPONENT))
        lines.append(f"{name:<20} {measured.loss:>8.4f} {perplexity:>11.5g}")
    lines.append(f"{'difference':<20} {with_it.loss - without.loss:>+8.4f}")
    if without.exact is not None:
        lines.append(
            f"exact answers, of {without.rows}: {without.exact} without the adapter, "
            f"{with_it.exact} with it"
        )
    return lines


def _short(files):
    """What the files are called at the head of a column: their names, if these differ."""
    count = Counter(Path(file).name for file in files)
    return [Path(file).name if count[Path(file).name] == 1 else str(file) for file in files]


def _matrices(names, columns, rows):
    """The lines of a table of losses, and of one of exact answers where there are answers."""
    losses = [[f"{measured.loss:.4f}" for measured in row] for row in rows]
    lines = _matrix("nats per token", names, columns, losses)
    with_answers = [i for i, measured in enumerate(rows[0]) if measured.exact is not None]
    if with_answers:
        exact = [[f"{row[i].exact} of {row[i].rows}" for i in with_answers] for row in rows]
        lines += _matrix("exact answers", names, [columns[i] for i in with_answers], exact)
    return lines


def _matrix(title, names, columns, cells):
    """Lines: `cells`, texts, with a name before each row and one above each column."""
    first = max(map(len, [title, *names]))
    lines = []
    for name, row in zip([title, *names], [columns, *cells], strict=True):
        line = f"{name:<{first}}"
        for i, cell in enumerate(row):
            width = max(len(each[i]) for each in [columns, *cells])
            line += f"  {cell:>{width}}"
        lines.append(line)
    return lines
