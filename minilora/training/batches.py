"""Batches of token ids: windows of a text, and rows of which a part is learned. Knows no model.

Shapes: B batch, T time. A batch is (inputs, targets), both (B, T): each target is the token after
its input. A target of -100 carries no loss.
"""

from collections import namedtuple

import numpy as np

from ..functional import IGNORE

# Of how many batches the rows are sorted by length together: at most so many, and so few that a
# pass over all rows has this many pieces.
MOST_BATCHES = 32
PIECES = 4


def random_windows(ids, batch, length, rng):
    """Endless batches of windows from anywhere in `ids`: inputs and targets (batch, length).

    Raises: ValueError if the text is shorter than one window.
    """
    if batch < 1:
        raise ValueError(f"random_windows: batch must be at least 1, got {batch}")
    _check_long_enough(ids, length)
    while True:
        starts = rng.integers(0, len(ids) - length, batch)
        windows = ids[starts[:, None] + np.arange(length + 1)]  # (batch, length + 1)
        yield windows[:, :-1], windows[:, 1:]


def consecutive_windows(ids, length, batch):
    """Batches, once through `ids`, of windows that share no target: (at most batch, length).

    The end of the text, where it fills no window, is not used.
    Raises: ValueError if the text is shorter than one window.
    """
    _check_long_enough(ids, length)
    n = (len(ids) - 1) // length
    inputs = ids[: n * length].reshape(n, length)
    targets = ids[1 : n * length + 1].reshape(n, length)
    for start in range(0, n, batch):
        yield inputs[start : start + batch], targets[start : start + batch]


def _check_long_enough(ids, length):
    if len(ids) < length + 1:
        raise ValueError(
            f"a text of {len(ids)} tokens is shorter than one window of {length} + 1; "
            "use more text or a smaller length"
        )


class Row(namedtuple("Row", "ids has_loss")):
    """Token ids (N,), and booleans (N,): which of them are learned. The first never is.

    What is learned may be an answer at the end, or several of them, with questions in between.
    """

    __slots__ = ()


def answer_row(prompt, answer):
    """The Row of a prompt and its answer, both ids, which learns the answer alone.

    Raises: ValueError for an empty prompt or an empty answer.
    """
    if len(prompt) == 0 or len(answer) == 0:
        raise ValueError(
            f"a prompt of {len(prompt)} tokens and an answer of {len(answer)}: neither may be empty"
        )
    ids = np.concatenate([prompt, answer])
    return Row(ids, np.arange(len(ids)) >= len(prompt))


def answer_rows(pairs):
    """The Rows of (prompt ids, answer ids)."""
    return [answer_row(prompt, answer) for prompt, answer in pairs]


def pad_rows(rows):
    """One batch of Rows: inputs and targets, both (len(rows), T).

    Short rows are filled up on the right with token 0. There it carries no loss, and nothing that
    does sees it, because it comes later.
    Raises: ValueError for an empty list, or a row that learns nothing.
    """
    if not rows or not all(has_loss[1:].any() for _, has_loss in rows):
        raise ValueError(f"pad_rows: no rows, or one that learns nothing: {rows!r:.200}")
    longest = max(len(ids) for ids, _ in rows) - 1
    inputs = np.zeros((len(rows), longest), np.int64)
    targets = np.full((len(rows), longest), IGNORE)
    for i, (ids, has_loss) in enumerate(rows):
        n = len(ids) - 1
        inputs[i, :n] = ids[:-1]
        targets[i, :n] = np.where(has_loss[1:], ids[1:], IGNORE)
    return inputs, targets


def row_batches(rows, batch, rng):
    """Endless `pad_rows` batches of Rows of about one length, in a new order on each pass.

    On each pass every row comes once. The pass is shuffled, cut into pieces of several batches, and
    each piece sorted by length, so that little is filled up; then the batches are shuffled. Rows
    that fill no batch at the end of a pass begin the next one, and come last among its own: no
    batch holds a row twice.
    Raises: ValueError if there are fewer rows than one batch takes.
    """
    if len(rows) < batch:
        raise ValueError(f"row_batches: {len(rows)} rows do not make one batch of {batch}")
    lengths = np.array([len(ids) for ids, _ in rows])
    # As many batches in a piece as leave some pieces in a pass: in one piece, rows of one length
    # would always be together.
    piece = batch * int(np.clip(len(rows) // (batch * PIECES), 1, MOST_BATCHES))
    left = np.empty(0, np.int64)
    while True:
        fresh = rng.permutation(len(rows))
        is_left = np.isin(fresh, left)
        order = np.concatenate([left, fresh[~is_left], fresh[is_left]])
        n = len(order) - len(order) % batch
        left = order[n:]
        chosen = []
        for start in range(0, n, piece):
            part = order[start : min(start + piece, n)]
            chosen += np.split(part[np.argsort(lengths[part], kind="stable")], len(part) // batch)
        for i in rng.permutation(len(chosen)):
            yield pad_rows([rows[j] for j in chosen[i]])


def length_batches(rows, batch):
    """Each of the Rows once, in `pad_rows` batches of at most `batch` rows of about one length."""
    by_length = sorted(rows, key=lambda row: len(row.ids))
    return [pad_rows(by_length[i : i + batch]) for i in range(0, len(rows), batch)]
