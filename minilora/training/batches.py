"""Batches of token ids: windows of a text, and pairs of prompt and answer. Knows no model.

Shapes: B batch, T time. A batch is (inputs, targets), both (B, T): each target is the token after
its input. A target of -100 carries no loss.
"""

import numpy as np

from ..functional import IGNORE


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


def pad_pairs(pairs):
    """One batch of (prompt ids, answer ids), with the loss on the answers alone: (len(pairs), T).

    Short rows are filled up on the right with token 0. There it carries no loss, and no answer sees
    it, because it comes later.
    Raises: ValueError for an empty list, an empty prompt or an empty answer.
    """
    if not pairs or any(len(side) == 0 for pair in pairs for side in pair):
        raise ValueError(
            f"pad_pairs: no (prompt, answer) pairs, or an empty side among them: {pairs!r:.200}"
        )
    longest = max(len(prompt) + len(answer) for prompt, answer in pairs) - 1
    inputs = np.zeros((len(pairs), longest), np.int64)
    targets = np.full((len(pairs), longest), IGNORE)
    for row, (prompt, answer) in enumerate(pairs):
        ids = np.concatenate([prompt, answer])
        inputs[row, : len(ids) - 1] = ids[:-1]
        targets[row, len(prompt) - 1 : len(ids) - 1] = ids[len(prompt) :]
    return inputs, targets


def pair_batches(pairs, batch, rng):
    """Endless `pad_pairs` batches of (prompt ids, answer ids), in a new order on each pass.

    Raises: ValueError if there are fewer pairs than one batch takes.
    """
    if len(pairs) < batch:
        raise ValueError(f"pair_batches: {len(pairs)} pairs do not make one batch of {batch}")
    while True:
        order = rng.permutation(len(pairs))
        for start in range(0, len(pairs) - batch + 1, batch):
            yield pad_pairs([pairs[i] for i in order[start : start + batch]])
