"""GPT-2's c_attn and back: q_proj, k_proj and v_proj as one LoRA pair, exactly as strong. Knows arrays, opens no file.

One A serves the three, and B has rows for each. Pairs that were trained apart are put together block by block: their
A's under each other, and in B the columns of each beside its own rows, with zeros elsewhere.
"""

import numpy as np

from ..backend import to_numpy
from .gpt2 import CONV1D


def parts_of(file, names):
    """Our last names of the parts of the module `file`, in the order of its rows; none if it is not fused.

    `names` are our modules in it: a model of another kind may have a c_attn of its own.
    """
    ours = [part.rpartition(".")[2] for part in CONV1D.get(".".join(file.split(".")[-2:]), ())]
    return ours if len(ours) > 1 and names[0].rpartition(".")[2] in ours else []


def join(file, adapter, names):
    """(A, B, columns) as a file has them, for the pairs `names` of `adapter` that are one module `file` there.

    `columns` is {name: (start, stop)}, which columns of B are whose; empty where all parts share one A.
    Raises: ValueError if the parts have different scalings: one module has one.
    """
    pairs, parts = {name.rpartition(".")[2]: adapter.pairs[name] for name in names}, parts_of(file, names)
    if not parts:
        (pair,) = pairs.values()
        return to_numpy(pair.lora_A.data), to_numpy(pair.lora_B.data), {}
    if len({adapter.pairs[name].scaling for name in names}) > 1:
        shown = ", ".join(f"{name} {adapter.pairs[name].scaling:g}" for name in names)
        raise ValueError(f"{file} can have one scaling, but its parts have several ({shown}): train them with one")
    distinct, spans, r = {}, {}, 0
    for pair in pairs.values():
        A = pair.lora_A
        if id(A) not in distinct:
            distinct[id(A)], spans[id(A)] = to_numpy(A.data), (r, r + len(A.data))
            r += len(A.data)
    rows = next(iter(pairs.values())).lora_B.shape[0]
    B = np.zeros((len(parts), rows, r), next(iter(distinct.values())).dtype)
    for part, pair in pairs.items():
        B[parts.index(part), :, slice(*spans[id(pair.lora_A)])] = to_numpy(pair.lora_B.data)
    shared = len(distinct) == 1 and len(pairs) == len(B)
    columns = {} if shared else {name: spans[id(adapter.pairs[name].lora_A)] for name in names}
    return np.concatenate(list(distinct.values())), B.reshape(-1, r), columns


def take_apart(file, A, B, names, columns):
    """{our module: ((start, stop) of its rows of A, its lora_B)}: what `join` joined; without columns, one A for all.

    Raises: ValueError if B cannot be split, or has entries outside the `columns` that are said to be in use.
    """
    if not parts_of(file, names):
        return {names[0]: ((0, len(A)), B)}
    mine = {name: tuple(columns[name]) for name in names if name in columns} or dict.fromkeys(names, (0, len(A)))
    if len(B) % len(names):
        raise ValueError(f"{file}: lora_B {B.shape} cannot be split into {len(names)} parts")
    rest, pieces = B.reshape(len(names), -1, B.shape[1]).copy(), {}
    for name, (start, stop) in mine.items():
        block = rest[names.index(name), :, start:stop]
        pieces[name] = (start, stop), block.copy()
        block[:] = 0
    if rest.any():
        raise ValueError(f"{file}: lora_B has entries outside the columns that its metadata give to {', '.join(mine)}")
    return pieces
