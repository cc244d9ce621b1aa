"""Text that is written on: greedy, drawn, stopped, in rows; and what is refused. A GPT serves as the model."""

import math

import numpy as np
import pytest
from hypothesis import given
from strategies import gpt_logits, gpts_and_ids, seeds, tiny_gpt

from minilora.generate import generate
from minilora.gpt import GPTConfig
from minilora.tensor import Tensor


def without_a_cache(model, ids, n):
    for _ in range(n):
        ids = np.concatenate([ids, gpt_logits(model, ids)[:, -1].argmax(-1)[:, None]], axis=1)
    return ids


@given(gpts_and_ids())
def test_greedy_generation_takes_the_likeliest_token_that_the_whole_text_gives(case):
    model, ids = case
    n = model.config.block_size - ids.shape[1]
    assert np.array_equal(generate(model, ids, n), without_a_cache(model, ids, n))


@given(gpts_and_ids(), seeds)
def test_with_top_k_of_one_a_draw_is_greedy_whatever_the_temperature(case, seed):
    model, ids = case
    n = model.config.block_size - ids.shape[1]
    drawn = generate(model, ids, n, temperature=3.0, top_k=1, rng=np.random.default_rng(seed))
    assert np.array_equal(drawn, generate(model, ids, n))


def test_a_low_temperature_is_greedy_too():
    model, ids = tiny_gpt(), np.array([[1, 2], [3, 4]])
    drawn = generate(model, ids, 6, temperature=1e-6, rng=np.random.default_rng(0))
    assert np.array_equal(drawn, generate(model, ids, 6))


def test_the_same_generator_draws_the_same_text_and_another_one_another():
    model, ids = tiny_gpt(), np.array([[1, 2]] * 4)
    text = lambda seed: generate(model, ids, 6, temperature=1.0, rng=np.random.default_rng(seed))
    assert np.array_equal(text(3), text(3))
    assert not np.array_equal(text(3), text(4))


@pytest.mark.parametrize("temperature, top_k", [(1.0, None), (0.5, None), (2.0, 3)])
def test_drawn_tokens_follow_the_softmax_of_the_logits(temperature, top_k):
    """Pearson's χ² over 7 tokens (6 degrees of freedom) stays below its 99.9 % quantile, 22.5, at this seed."""
    n, model = 4000, tiny_gpt()
    logits = gpt_logits(model, [[1, 2]])[0, -1] / temperature
    kept = np.sort(logits)[-(top_k or 7) :]
    p = np.where(np.isin(logits, kept), np.exp(logits), 0)
    expected = n * p / p.sum()
    drawn = generate(model, np.tile([[1, 2]], (n, 1)), 1, temperature=temperature, top_k=top_k,
                     rng=np.random.default_rng(0))[:, -1]
    counts = np.bincount(drawn, minlength=7)
    assert counts[expected == 0].sum() == 0
    assert ((counts - expected) ** 2 / np.where(expected == 0, 1, expected)).sum() < 22.5


def test_tokens_outside_the_top_k_are_never_drawn_however_hot():
    model, ids = tiny_gpt(), np.tile([[1, 2]], (200, 1))
    likeliest = set(np.argsort(gpt_logits(model, [[1, 2]])[0, -1])[-2:])
    for temperature in (1e3, 1e300):
        drawn = generate(model, ids, 1, temperature=temperature, top_k=2, rng=np.random.default_rng(0))[:, -1]
        assert set(drawn) <= likeliest


def test_where_logits_tie_top_k_still_keeps_no_more_than_k():
    flat = tiny_gpt().map_tensors(lambda t: Tensor(0 * t.data))  # every token is as likely as every other
    drawn = generate(flat, np.tile([[1]], (100, 1)), 1, temperature=1.0, top_k=2, rng=np.random.default_rng(0))[:, -1]
    assert len(set(drawn)) <= 2


def test_after_its_stop_token_a_row_is_filled_and_generation_ends_with_the_last_row():
    model, ids = tiny_gpt(), np.array([[1, 2], [3, 4], [6, 6]])
    free = generate(model, ids, 6)
    stop = free[0, 3]
    stopped = generate(model, ids, 6, stop=int(stop))
    for row, free_row in zip(stopped, free, strict=True):
        ends = np.flatnonzero(free_row[2:] == stop)
        n = 2 + ends[0] if ends.size else len(row)
        assert np.array_equal(row[:n], free_row[: len(row)][:n]) and (row[n:] == stop).all()
    alone = generate(model, ids[:1], 6, stop=int(stop))
    first = 2 + int(np.flatnonzero(free[0, 2:] == stop)[0])
    assert alone.shape == (1, first + 1) and alone[0, -1] == stop


class Counting:
    """A model that says 4 after 3, 5 after 4, and 0 after 6."""

    config = GPTConfig(n_layer=1, n_head=1, n_embd=7, vocab_size=7, block_size=16)

    def new_cache(self, size):
        return []

    def hidden(self, ids, cache):
        return Tensor(np.eye(7)[(ids + 1) % 7])

    def head(self, hidden):
        return hidden


def test_a_row_that_has_stopped_says_nothing_more_while_others_go_on():
    told = generate(Counting(), np.array([[4], [1], [3]]), 9, stop=5)
    assert told.tolist() == [[4, 5, 5, 5, 5], [1, 2, 3, 4, 5], [3, 4, 5, 5, 5]]
    ends_with_it = generate(Counting(), np.array([[5], [3]]), 3, stop=5)  # a stop in the prompt stops nothing
    assert ends_with_it.tolist() == [[5, 6, 0, 1], [3, 4, 5, 5]]


def test_a_model_without_a_cache_is_refused_since_it_would_read_each_token_alone():
    model = Counting()
    model.new_cache = lambda size: None
    with pytest.raises(ValueError, match="made no cache"):
        generate(model, np.array([[3]]), 2)


def test_a_row_continues_as_it_does_alone():
    model, ids = tiny_gpt("rope"), np.array([[1, 2, 3], [4, 5, 6], [0, 0, 1]])
    together = generate(model, ids, 5)
    assert all(np.array_equal(together[i : i + 1], generate(model, ids[i : i + 1], 5)) for i in range(3))


def test_generation_keeps_the_prompt_records_nothing_and_may_ask_for_nothing():
    model, ids = tiny_gpt(), np.array([[1, 2, 3]])
    before = ids.copy()
    text = generate(model, ids, 3)
    assert np.array_equal(text[:, :3], before) and np.array_equal(ids, before) and text.shape == (1, 6)
    assert all(p.grad is None for p in model.parameters())
    assert np.array_equal(generate(model, ids, 0), ids)


RNG = np.random.default_rng(0)


@pytest.mark.parametrize("n, options, says", [
    (7, {}, ["(1, 2)", "7 new tokens", "8"]),
    (-1, {}, ["-1 new tokens"]),
    (1, {"temperature": -1.0, "rng": RNG}, ["at least 0, got -1.0"]),
    (1, {"temperature": 1.0}, ["temperature 1.0", "rng"]),
    (1, {"temperature": math.nan, "rng": RNG}, ["temperature must be finite", "got nan"]),
    (1, {"temperature": math.inf, "rng": RNG}, ["temperature must be finite", "got inf"]),
    (1, {"top_k": 0}, ["top_k must", "1 .. 7", "got 0"]),
    (1, {"top_k": 8, "temperature": 1.0, "rng": RNG}, ["top_k must", "1 .. 7", "got 8"]),
    (1, {"stop": 7}, ["stop must", "0 .. 6", "got 7"]),
    (1, {"stop": -1}, ["stop must", "0 .. 6", "got -1"]),
])
def test_generation_names_the_option_that_is_wrong_and_its_range(n, options, says):
    with pytest.raises(ValueError) as caught:
        generate(tiny_gpt(), np.array([[1, 2]]), n, **options)
    assert all(part in str(caught.value) for part in says)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "rng": RNG}], ids=["greedy", "drawn"])
def test_a_model_that_computes_nan_does_not_generate_text_as_if_nothing_were_wrong(options):
    broken = tiny_gpt().map_tensors(lambda t: Tensor(t.data * math.nan))
    with pytest.raises(ValueError, match="nan|finite"):
        generate(broken, np.array([[1, 2]]), 3, **options)
