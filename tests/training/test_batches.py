"""Batches of windows and of rows: what is in them, in which order, and what cannot be made."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

from minilora.disk.characters import ALPHABET, decode, encode_pairs
from minilora.functional import IGNORE
from minilora.training.batches import (
    Row,
    answer_rows,
    consecutive_windows,
    length_batches,
    pad_rows,
    random_windows,
    row_batches,
)

sides = st.text(alphabet=ALPHABET, min_size=1, max_size=40)


# Windows of a text.


@given(st.integers(2, 20), st.integers(1, 5), seeds)
def test_a_window_and_its_targets_are_the_text_one_step_apart(length, batch, seed):
    text = np.arange(30)
    inputs, targets = next(random_windows(text, batch, length, np.random.default_rng(seed)))
    assert inputs.shape == targets.shape == (batch, length)
    assert (inputs == inputs[:, :1] + np.arange(length)).all()
    assert (targets == inputs + 1).all()


def test_windows_reach_both_ends_of_the_text():
    inputs, targets = next(random_windows(np.arange(6), 64, 4, np.random.default_rng(0)))
    assert inputs.min() == 0
    assert targets.max() == 5


def test_a_text_shorter_than_a_window_is_refused():
    with pytest.raises(ValueError, match=r"4 tokens .* 4 \+ 1"):
        next(random_windows(np.arange(4), 1, 4, np.random.default_rng(0)))


@pytest.mark.parametrize("batch", [0, -1])
def test_a_batch_of_no_windows_is_refused(batch):
    with pytest.raises(ValueError, match=f"at least 1, got {batch}"):
        next(random_windows(np.arange(9), batch, 4, np.random.default_rng(0)))


@given(st.integers(1, 30), st.integers(1, 7), st.integers(1, 3))
def test_consecutive_windows_go_once_through_the_text_and_leave_out_less_than_one(n, length, batch):
    if n < length + 1:
        with pytest.raises(ValueError, match=rf"text of {n} tokens .* {length} \+ 1"):
            next(consecutive_windows(np.arange(n), length, batch))
        return
    all_targets = []
    for inputs, targets in consecutive_windows(np.arange(n), length, batch):
        assert inputs.shape == targets.shape
        assert 1 <= len(inputs) <= batch
        assert (targets == inputs + 1).all()
        all_targets += targets.reshape(-1).tolist()
    assert all_targets == list(range(1, len(all_targets) + 1))
    assert n - 1 - len(all_targets) < length


# Rows, of which a part is learned.


@given(st.lists(st.tuples(sides, sides), min_size=1, max_size=4))
def test_the_loss_of_prompts_and_answers_is_on_the_answers_alone(pairs):
    inputs, targets = pad_rows(answer_rows(encode_pairs(pairs)))
    for (prompt, answer), input_row, target_row in zip(pairs, inputs, targets, strict=True):
        n = len(prompt) + len(answer) - 1
        assert decode(input_row[:n]) == (prompt + answer)[:-1]
        assert decode(target_row[len(prompt) - 1 : n]) == answer
        assert (target_row[: len(prompt) - 1] == IGNORE).all()
        assert (target_row[n:] == IGNORE).all()


@pytest.mark.parametrize("prompt, answer", [("a", ""), ("", "b")])
def test_an_empty_side_is_refused(prompt, answer):
    with pytest.raises(ValueError, match="neither may be empty"):
        answer_rows(encode_pairs([("a", "b"), (prompt, answer)]))


@pytest.mark.parametrize("rows", [[], [Row(np.array([1, 2]), np.array([True, False]))],
                                  [Row(np.array([1]), np.array([True]))]],
                         ids=["no row", "the first token", "one token"])  # fmt: skip
def test_rows_that_learn_nothing_are_refused(rows):
    with pytest.raises(ValueError, match="no rows, or one that learns nothing"):
        pad_rows(rows)


def test_rows_may_be_tokens_of_any_vocabulary_and_learn_in_several_places():
    inputs, targets = pad_rows(answer_rows([(np.array([50_000, 7]), np.array([9, 50_256])), ([1], [2])]))
    assert inputs.tolist() == [[50_000, 7, 9], [1, 0, 0]]
    assert targets.tolist() == [[IGNORE, 9, 50_256], [2, IGNORE, IGNORE]]
    two_answers = Row(np.array([5, 6, 7, 8, 9]), np.array([False, True, False, False, True]))
    assert pad_rows([two_answers])[1].tolist() == [[6, IGNORE, IGNORE, 9]]


def rows_of(lengths):
    """Row number i begins with the token i, and is so long."""
    return [Row(np.array([i] + [0] * (n - 1)), np.arange(n) > 0) for i, n in enumerate(lengths)]


def numbers_of(batches):
    return [inputs[:, 0].tolist() for inputs, _ in batches]


@given(st.integers(1, 40), st.integers(1, 7), seeds, st.integers(1, 3))
def test_every_row_comes_once_in_a_pass(n, batch, seed, n_passes):
    """Also where batches do not come out even: what is left of a pass begins the next."""
    if n < batch:
        return
    rng = np.random.default_rng(seed)
    stream = row_batches(rows_of(rng.integers(2, 9, n)), batch, rng)
    passes = n_passes * n // batch
    in_batches = list(numbers_of(islice(stream, passes)))
    assert all(len(set(numbers)) == batch for numbers in in_batches)
    counts = Counter(i for numbers in in_batches for i in numbers)
    assert sum(counts.values()) == passes * batch
    first_pass = islice(row_batches(rows_of([2] * n), batch, rng), n // batch)
    first = Counter(i for numbers in numbers_of(first_pass) for i in numbers)
    assert set(first.values()) == {1}
    assert all(n_passes - 1 <= counts[i] <= n_passes for i in range(n))


def test_the_order_is_another_in_each_pass_and_for_each_generator():
    orders = set()
    for seed in (0, 0, 1):
        stream = row_batches(rows_of([2] * 32), 4, np.random.default_rng(seed))
        for _ in range(3):
            orders.add(str(numbers_of(islice(stream, 8))))
    # Three orders for each of two seeds: the same seed gives the same ones again.
    assert len(orders) == 6


def test_rows_are_not_always_beside_the_same_ones():
    stream = row_batches(rows_of(range(2, 42)), 4, np.random.default_rng(0))
    together = {frozenset(numbers) for numbers in numbers_of(islice(stream, 50))}
    assert len(together) > 40
    lengths = [inputs.shape[1] for inputs, _ in islice(stream, 10)]
    assert lengths != sorted(lengths)


def test_batches_of_a_pass_are_in_no_order_of_length():
    stream = row_batches(rows_of(range(2, 66)), 2, np.random.default_rng(0))
    lengths = np.array([inputs.shape[1] for inputs, _ in islice(stream, 32)]).reshape(4, 8)
    assert all((np.diff(piece) < 0).sum() >= 2 for piece in lengths)


def padding(batches):
    filled = total = 0
    for inputs, _ in batches:
        # Here the token 0 stands for nothing else than filling.
        filled += int((inputs == 0).sum())
        total += inputs.size
    return filled / total


def test_little_is_filled_up():
    """Lengths as people's answers have them; rows in no order are filled up to nearly twice their size."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4, 0.7, 800).astype(int), 4, 400)
    rows = [Row(np.ones(n, int), np.arange(n) > 0) for n in lengths]
    shares = padding(islice(row_batches(rows, 8, rng), 300))
    in_no_order = padding(pad_rows([rows[i] for i in rng.permutation(800)[:8]]) for _ in range(300))
    assert shares < 0.15
    assert in_no_order > 0.4
    assert padding(length_batches(rows, 8)) < 0.05


def test_batches_by_length_hold_each_row_once():
    rows = rows_of([5, 2, 9, 2, 7])
    assert numbers_of(length_batches(rows, 2)) == [[1, 3], [0, 4], [2]]


def test_fewer_rows_than_a_batch_are_refused():
    with pytest.raises(ValueError, match="1 rows .* batch of 2"):
        next(row_batches(answer_rows([([1], [2])]), 2, np.random.default_rng(0)))
