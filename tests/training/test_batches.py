"""Batches of windows and of pairs: what is in them, in which order, and what cannot be made."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

from minilora.disk.characters import ALPHABET, decode, encode_pairs
from minilora.functional import IGNORE
from minilora.training.batches import consecutive_windows, pad_pairs, pair_batches, random_windows

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


# Pairs of prompt and answer.


@given(st.lists(st.tuples(sides, sides), min_size=1, max_size=4))
def test_the_loss_of_pairs_is_on_the_answers_alone(pairs):
    inputs, targets = pad_pairs(encode_pairs(pairs))
    for (prompt, answer), input_row, target_row in zip(pairs, inputs, targets, strict=True):
        n = len(prompt) + len(answer) - 1
        assert decode(input_row[:n]) == (prompt + answer)[:-1]
        assert decode(target_row[len(prompt) - 1 : n]) == answer
        assert (target_row[: len(prompt) - 1] == IGNORE).all()
        assert (target_row[n:] == IGNORE).all()


@pytest.mark.parametrize("pairs", [[], [("a", "b"), ("a", "")], [("", "b")]], ids=["no pair", "answer", "prompt"])
def test_no_pairs_and_an_empty_side_are_refused(pairs):
    with pytest.raises(ValueError, match="no .* pairs, or an empty side"):
        pad_pairs(encode_pairs(pairs))


def test_pairs_may_be_tokens_of_any_vocabulary():
    inputs, targets = pad_pairs([(np.array([50_000, 7]), np.array([9, 50_256])), ([1], [2])])
    assert inputs.tolist() == [[50_000, 7, 9], [1, 0, 0]]
    assert targets.tolist() == [[IGNORE, 9, 50_256], [2, IGNORE, IGNORE]]


def prompts_of(n):
    """`n` prompts of one length. With an answer of one token, such a prompt is its whole input."""
    return [f"Q{i} " for i in range(10, 10 + n)]


def pairs_of(prompts):
    return encode_pairs([(prompt, "a") for prompt in prompts])


def test_every_pair_comes_once_in_a_pass():
    prompts = prompts_of(8)
    stream = pair_batches(pairs_of(prompts), 4, np.random.default_rng(0))
    rows = np.concatenate([next(stream)[0], next(stream)[0]])
    assert sorted(decode(row) for row in rows) == prompts


def test_the_order_is_another_in_each_pass_and_for_each_generator():
    prompts = prompts_of(32)
    orders = set()
    for seed in (0, 0, 1):
        stream = pair_batches(pairs_of(prompts), 32, np.random.default_rng(seed))
        for _ in range(3):
            inputs, _ = next(stream)
            orders.add(decode(inputs))
    # Three orders for each of two seeds: the same seed gives the same ones again.
    assert len(orders) == 6
    assert "".join(prompts) not in orders


def test_fewer_pairs_than_a_batch_are_refused():
    with pytest.raises(ValueError, match="1 pairs .* batch of 2"):
        next(pair_batches([([1], [2])], 2, np.random.default_rng(0)))
