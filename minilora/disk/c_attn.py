"""GPT-2's c_attn: several of our linears joined to one module of a file, and taken apart again.

One A serves q_proj, k_proj and v_proj, and B has rows for each. Pairs that were trained apart are
put together block by block: their A's under each other, and in B the columns of each beside its own
rows, with zeros elsewhere. Knows arrays, opens no file.
"""

import numpy as np

from ..backend import to_numpy


def join(their_name, parts, pairs):
    """(A, B, columns) as a file has them, for `pairs`, {our module: LoRAPair}.

    `parts` are our modules in the module `their_name` of the file, in the order of its rows. Some
    of them, or all, have a pair. `columns` is {our module: (start, stop)}, which columns of B are
    whose; empty where all parts share one A.
    Shapes: A (r, in), B (out, r), with r the sum over distinct A's.
    Raises: ValueError if the parts have different scalings: one module has one.
    """
    if len(parts) == 1:
        (pair,) = pairs.values()
        return to_numpy(pair.lora_A.data), to_numpy(pair.lora_B.data), {}
    if len({pair.scaling for pair in pairs.values()}) > 1:
        differing = ", ".join(f"{name} {pair.scaling:g}" for name, pair in pairs.items())
        raise ValueError(
            f"{their_name} can have one scaling, but its parts have several ({differing}): "
            "train them with one"
        )
    # Which rows of the joined A each distinct A gets. A shared one is written once.
    distinct = {id(pair.lora_A): to_numpy(pair.lora_A.data) for pair in pairs.values()}
    spans = {}
    r = 0
    for key, A in distinct.items():
        spans[key] = (r, r + len(A))
        r += len(A)
    columns = {name: spans[id(pair.lora_A)] for name, pair in pairs.items()}

    first = next(iter(pairs.values()))
    blocks = np.zeros((len(parts), first.out_features, r), first.lora_B.dtype)
    for name, pair in pairs.items():
        start, stop = columns[name]
        blocks[parts.index(name), :, start:stop] = to_numpy(pair.lora_B.data)
    A = np.concatenate(list(distinct.values()))
    B = blocks.reshape(-1, r)
    # PEFT's own form needs no note of whose columns are whose.
    if len(distinct) == 1 and len(pairs) == len(parts):
        return A, B, {}
    return A, B, columns


def check_all_parts(their_name, parts, pairs):
    """Raise ValueError unless each of `parts`, our modules in `their_name`, is among `pairs`.

    A file of DoRA has a magnitude for each row of a module. Without the base nobody knows what that
    is where nothing was learned.
    """
    absent = [name for name in parts if name not in pairs]
    if absent:
        raise ValueError(
            f"{their_name} has one magnitude for all its rows, but {', '.join(absent)} has no pair "
            "to say its own: adapt all of its parts, or use LoRA"
        )


def join_magnitudes(their_name, parts, pairs):
    """The magnitude (out,) of the module `their_name` in a file, for DoRA's `pairs`; as `join`.

    Raises: as `check_all_parts`.
    """
    check_all_parts(their_name, parts, pairs)
    return np.concatenate([to_numpy(pairs[name].magnitude.data) for name in parts])


def take_apart(their_name, A, B, names, columns):
    """{our module: ((start, stop) of its rows of A, its lora_B)}: what `join` joined.

    `names` are our modules in the module `their_name`, in the order of its rows. Without `columns`
    there is one A for all of them.
    Raises: ValueError if B cannot be split, or has entries outside the `columns`.
    """
    whole = (0, len(A))
    if len(names) == 1:
        return {names[0]: (whole, B)}
    if len(B) % len(names):
        raise ValueError(
            f"{their_name}: lora_B {B.shape} cannot be split into {len(names)} parts"
        )
    spans = {name: _span(columns[name], len(A)) for name in names if name in columns}
    if not spans:
        spans = dict.fromkeys(names, whole)
    # What is left of B once every part has its block must be zero: nothing is dropped in silence.
    rest = B.reshape(len(names), -1, B.shape[1]).copy()
    pieces = {}
    for name, (start, stop) in spans.items():
        block = rest[names.index(name), :, start:stop]
        pieces[name] = ((start, stop), block.copy())
        block[:] = 0
    if rest.any():
        raise ValueError(
            f"{their_name}: lora_B has entries outside the columns that its metadata give to "
            f"{', '.join(spans)}"
        )
    return pieces


def _span(columns, r):
    """(start, stop) of a note on columns; ValueError unless it is a part of `r` columns."""
    start, stop = columns
    if type(start) is not int or type(stop) is not int or not 0 <= start < stop <= r:
        raise ValueError(f"its metadata give columns {columns} of lora_B, which has {r}")
    return start, stop
