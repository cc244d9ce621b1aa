"""Batches of token ids: random_windows of a text, and pairs of prompt and answer. Knows no model, no tokenizer."""

import numpy as np

from ..functional import IGNORE


def random_windows(ids, batch, length, rng):
    """Endless (inputs, targets), both (batch, length): random stretches of `ids` and the same moved on by one.

    Raises: ValueError if the text is shorter than one stretch.
    """
    if len(ids) < length + 1 or batch < 1:
        raise ValueError(f"random_windows: {len(ids)} tokens hold no stretch of {length} + 1, or batch {batch} < 1")
    while True:
        starts = rng.integers(0, len(ids) - length, batch)
        stretch = ids[starts[:, None] + np.arange(length + 1)]
        yield stretch[:, :-1], stretch[:, 1:]


def consecutive_windows(ids, length, batch):
    """(inputs, targets), both (at most batch, length), once through `ids` in consecutive_windows that share no target.

    What is left at the end and fills no stretch is not used.
    Raises: ValueError if the text is shorter than one stretch.
    """
    n = (len(ids) - 1) // length
    if n < 1:
        raise ValueError(f"a text of {len(ids)} tokens is shorter than one stretch of {length} + 1")
    inputs, targets = ids[: n * length].reshape(n, length), ids[1 : n * length + 1].reshape(n, length)
    for start in range(0, n, batch):
        yield inputs[start : start + batch], targets[start : start + batch]


def pad_pairs(pairs):
    """(inputs, targets), both (len(pairs), T), from (prompt ids, answer ids): the loss is on the answers alone.

    Rows are filled up on the right with token 0, which carries no loss there and, being later, is seen by no answer.
    Raises: ValueError for an empty list, an empty prompt or an empty answer.
    """
    if not pairs or not all(len(prompt) and len(answer) for prompt, answer in pairs):
        raise ValueError(f"pad_pairs: no (prompt, answer) pairs, or an empty side among them: {pairs!r:.200}")
    longest = max(len(prompt) + len(answer) for prompt, answer in pairs) - 1
    inputs, targets = np.zeros((len(pairs), longest), np.int64), np.full((len(pairs), longest), IGNORE)
    for row, (prompt, answer) in enumerate(pairs):
        ids = np.concatenate([prompt, answer])
        inputs[row, : len(ids) - 1] = ids[:-1]
        targets[row, len(prompt) - 1 : len(ids) - 1] = ids[len(prompt) :]
    return inputs, targets


def pair_batches(pairs, batch, rng):
    """Endless `pad_pairs`ed batches of (prompt ids, answer ids), in a new random order on each pass.

    Raises: ValueError if there are fewer pairs than one batch takes.
    """
    if len(pairs) < batch:
        raise ValueError(f"pair_batches: {len(pairs)} pairs do not make one batch of {batch}")
    while True:
        order = rng.permutation(len(pairs))
        for start in range(0, len(pairs) - batch + 1, batch):
            yield pad_pairs([pairs[i] for i in order[start : start + batch]])
