"""Text that is written on: greedy, drawn, stopped, in rows; and what is refused. A GPT serves as the model."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import gpt_logits, gpts_and_ids, rngs, seeds, tiny_gpt

from minilora.generate import generate, generate_tokens
from minilora.gpt import GPTConfig
from minilora.graph import is_recording, no_grad
from minilora.llama import Llama, LlamaConfig
from minilora.quant import quantize, widen
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


class Fixed:
    """A model whose next token always has the same probabilities."""

    def __init__(self, *p):
        self.logits = np.log(p)
        self.config = GPTConfig(n_layer=1, n_head=1, n_embd=1, vocab_size=len(p), block_size=16)

    def new_cache(self, size):
        return []

    def hidden(self, ids, cache):
        return Tensor(np.tile(self.logits, (*ids.shape, 1)))

    def head(self, hidden):
        return hidden


def drawn_from(p, n=500, seed=0, **how):
    """The tokens that are drawn at all, of `n` draws."""
    ids = np.zeros((n, 1), int)
    return set(generate(Fixed(*p), ids, 1, rng=np.random.default_rng(seed), **{"temperature": 1.0, **how})[:, 1])


@pytest.mark.parametrize("top_p, expected", [
    (1e-9, {1}), (0.499, {1}), (0.501, {1, 3}), (0.749, {1, 3}), (0.751, {0, 1, 3}), (0.874, {0, 1, 3}),
    (0.876, {0, 1, 2, 3}), (1.0, {0, 1, 2, 3}), (1, {0, 1, 2, 3}),
])  # fmt: skip
def test_the_nucleus_is_the_fewest_likeliest_tokens_that_make_up_top_p(top_p, expected):
    assert drawn_from([0.125, 0.5, 0.125, 0.25], top_p=top_p) <= expected
    # Among equals the first counts as the likelier.
    assert drawn_from([0.125, 0.5, 0.125, 0.25], top_p=top_p) == expected


def test_the_nucleus_is_of_what_temperature_and_top_k_have_left():
    p = [0.4, 0.3, 0.2, 0.1]
    assert drawn_from(p, top_p=0.5) == {0, 1}
    # Of the two likeliest the first has 4/7.
    assert drawn_from(p, top_p=0.5, top_k=2) == {0}
    assert drawn_from(p, top_p=0.6, top_k=2) == {0, 1}
    assert drawn_from(p, top_p=0.5, temperature=0.25) == {0}
    assert drawn_from(p, top_p=0.95, temperature=100.0) == {0, 1, 2, 3}


def test_a_top_p_of_one_leaves_nothing_out():
    p = [1.0, *[1e-17] * 3]
    assert drawn_from(p, top_p=1.0, temperature=1e6) == {0, 1, 2, 3}
    rngs = [np.random.default_rng(3), np.random.default_rng(3)]
    ids = np.zeros((50, 1), int)
    with_it = generate(Fixed(*p), ids, 5, temperature=20.0, top_p=1.0, rng=rngs[0])
    assert np.array_equal(with_it, generate(Fixed(*p), ids, 5, temperature=20.0, rng=rngs[1]))


@given(rngs, st.floats(0.05, 0.95))
def test_each_row_has_a_nucleus_of_its_own(rng, top_p):
    model = tiny_gpt()
    ids = rng.integers(0, 7, (40, 3))
    drawn = generate(model, ids, 1, temperature=1.0, top_p=top_p, rng=rng)[:, -1]
    for row, token in zip(gpt_logits(model, ids)[:, -1], drawn, strict=True):
        p = np.exp(row) / np.exp(row).sum()
        likelier = p[p > p[token]].sum()
        assert likelier < top_p + 1e-12


@pytest.mark.parametrize("temperature", [5e-324, 1e-308, 1e-6])
def test_no_temperature_is_so_low_that_it_breaks(temperature):
    assert drawn_from([0.2, 0.5, 0.3], n=20, temperature=temperature) == {1}
    assert drawn_from([0.2, 0.5, 0.3], n=20, temperature=temperature, top_p=0.5, top_k=2) == {1}


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


@pytest.mark.parametrize("stop", [(5, 0), {0, 5}, [5, 0, 5], np.array([0, 5]), range(0, 6, 5)], ids=str)
def test_any_of_several_stop_tokens_ends_a_row_which_is_filled_with_its_own(stop):
    told = generate(Counting(), np.array([[4], [5], [2]]), 9, stop=stop)
    assert told.tolist() == [[4, 5, 5, 5], [5, 6, 0, 0], [2, 3, 4, 5]]


def test_no_stop_tokens_are_none_and_one_may_be_numpys():
    ids = np.array([[4]])
    assert generate(Counting(), ids, 3, stop=[]).tolist() == generate(Counting(), ids, 3).tolist() == [[4, 5, 6, 0]]
    assert generate(Counting(), ids, 3, stop=np.int64(6)).tolist() == [[4, 5, 6]]


# Prompts of different lengths.


class Summing:
    """A model whose next token is the sum, modulo 7, of all the tokens that a row has."""

    config = GPTConfig(n_layer=1, n_head=1, n_embd=7, vocab_size=7, block_size=16)

    def new_cache(self, size, starts=None):
        return {"size": size, "starts": starts, "read": None}

    def hidden(self, ids, cache):
        before = cache["read"]
        read = ids if before is None else np.concatenate([before, ids], axis=1)
        assert read.shape[1] <= cache["size"]
        cache["read"] = read
        starts = np.zeros(len(ids), int) if cache["starts"] is None else cache["starts"]
        own = np.arange(read.shape[1]) >= starts[:, None]
        sums = np.cumsum(np.where(own, read, 0), axis=1)[:, -ids.shape[1] :]
        return Tensor(np.eye(7)[sums % 7])

    def head(self, hidden):
        return hidden


@given(st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=5), min_size=1, max_size=4),
       st.sets(st.integers(0, 6), max_size=2), st.sampled_from([list, tuple]))  # fmt: skip
def test_a_prompt_among_longer_ones_gives_the_ids_that_it_gives_alone(prompts, stop, kind):
    together = generate(Summing(), kind(np.array(p) for p in prompts), 6, stop=stop)
    assert isinstance(together, list) and len(together) == len(prompts)
    for prompt, row in zip(prompts, together, strict=True):
        assert row.tolist() == generate(Summing(), np.array([prompt]), 6, stop=stop)[0].tolist()


@given(gpts_and_ids(), rngs)
def test_a_gpt_gives_each_prompt_of_a_batch_what_it_gives_it_alone(case, rng):
    model, ids = case
    n = model.config.block_size - ids.shape[1]
    prompts = [row[rng.integers(0, ids.shape[1]) :] for row in ids]
    together = generate(model, prompts, n)
    for prompt, row in zip(prompts, together, strict=True):
        assert np.array_equal(row, generate(model, prompt[None], n)[0])


@given(seeds, st.lists(st.integers(1, 9), min_size=1, max_size=4), st.booleans())
def test_so_does_a_llama(seed, lengths, qk_norm):
    config = LlamaConfig(num_hidden_layers=2, hidden_size=8, intermediate_size=12, num_attention_heads=4, vocab_size=7,
                         max_position_embeddings=16, num_key_value_heads=2, head_dim=4, qk_norm=qk_norm)  # fmt: skip
    rng = np.random.default_rng(seed)
    model = Llama(config, rng, "float64")
    prompts = [rng.integers(0, 7, length) for length in lengths]
    for prompt, row in zip(prompts, generate(model, prompts, 6), strict=True):
        assert np.array_equal(row, generate(model, prompt[None], 6)[0])


def test_a_packed_base_and_its_widened_twin_write_the_same():
    config = LlamaConfig(num_hidden_layers=2, hidden_size=32, intermediate_size=64, num_attention_heads=4,
                         vocab_size=50, max_position_embeddings=32)
    packed = quantize(Llama(config, np.random.default_rng(0)), "nf4")
    ids = np.array([[1, 2, 3]])
    assert np.array_equal(generate(packed, ids, 20), generate(widen(packed), ids, 20))


def test_prompts_of_one_length_are_the_rows_of_an_array():
    model, ids = tiny_gpt(), np.array([[1, 2], [3, 4]])
    assert np.array_equal(generate(model, list(ids), 4), generate(model, ids, 4))
    assert np.array_equal(generate(model, [[1, 2], [3, 4]], 4), generate(model, ids, 4))


def test_prompts_of_different_lengths_may_ask_for_nothing_and_are_not_changed():
    prompts = [np.array([1, 2, 3]), np.array([4])]
    assert [row.tolist() for row in generate(Summing(), prompts, 0)] == [[1, 2, 3], [4]]
    generate(Summing(), prompts, 3)
    assert [row.tolist() for row in prompts] == [[1, 2, 3], [4]]


# Token by token.


def test_a_token_is_there_before_the_next_one_is_computed():
    model, ids = Counting(), np.array([[1], [3]])
    read = []
    hidden = model.hidden
    model.hidden = lambda ids, cache: read.append(ids.tolist()) or hidden(ids, cache)
    tokens = generate_tokens(model, ids, 9, stop=5)
    assert read == []
    assert next(tokens).tolist() == [2, 4] and read == [[[1], [3]]]
    assert next(tokens).tolist() == [3, 5] and read[1:] == [[[2], [4]]]
    tokens.close()
    assert len(read) == 2
    assert [token.tolist() for token in generate_tokens(model, ids, 9, stop=5)] == [[2, 4], [3, 5], [4, 5], [5, 5]]


def test_what_is_wrong_is_said_before_the_first_token_is_asked_for():
    with pytest.raises(ValueError, match="stop must"):
        generate_tokens(Counting(), np.array([[1]]), 2, stop=7)


def test_between_two_tokens_a_caller_may_record_and_write_into_what_it_was_given():
    tokens = generate_tokens(Counting(), np.array([[1]]), 3)
    for expected in (2, 3, 4):
        token = next(tokens)
        assert is_recording() and token.tolist() == [expected]
        token[:] = 6


@given(gpts_and_ids(), st.integers(1, 7))
def test_a_text_goes_on_from_a_cache_that_holds_its_beginning(case, split):
    model, ids = case
    split = min(split, ids.shape[1] - 1)
    n = model.config.block_size - ids.shape[1]
    cache = model.new_cache(model.config.block_size)
    with no_grad():
        model.hidden(ids[:, :split], cache)
    tokens = generate_tokens(model, ids[:, split:], n, cache=cache)
    new = [token.tolist() for token in tokens]
    assert new == generate(model, ids, n)[:, ids.shape[1] :].T.tolist()


def test_a_cache_is_not_gone_on_from_with_prompts_of_different_lengths():
    with pytest.raises(ValueError, match="different lengths"):
        generate_tokens(Counting(), [[1], [2, 3]], 2, cache=[])


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
    (1, {"stop": [3, 7]}, ["stop must", "0 .. 6", "got 7"]),
    (1, {"top_p": 0.0}, ["top_p must", "(0, 1]", "got 0.0"]),
    (1, {"top_p": 1.5, "temperature": 1.0, "rng": RNG}, ["top_p must", "(0, 1]", "got 1.5"]),
    (1, {"top_p": math.nan}, ["top_p must", "got nan"]),
])
def test_generation_names_the_option_that_is_wrong_and_its_range(n, options, says):
    with pytest.raises(ValueError) as caught:
        generate(tiny_gpt(), np.array([[1, 2]]), n, **options)
    assert all(part in str(caught.value) for part in says)


@pytest.mark.parametrize("stop", ["5", 5.0, [5, "6"], [[5]]], ids=str)
def test_a_stop_that_is_no_token_id_is_refused(stop):
    with pytest.raises(TypeError, match="stop must be None, a token id or a collection"):
        generate(Counting(), np.array([[1]]), 2, stop=stop)


@pytest.mark.parametrize("ids, n, error, says", [
    ([], 1, ValueError, ["rows of shape (T,)", "got []"]),
    ([np.array([1]), np.array([], int)], 1, ValueError, ["got [(1,), (0,)]"]),
    ([np.array([[1]])], 1, ValueError, ["got [(1, 1)]"]),
    ([[1], [2, 7]], 1, ValueError, ["token ids of row 1", "0 .. 6"]),
    ([[1.5]], 1, TypeError, ["token ids of row 0", "integers"]),
    ([[1], list(range(6))], 3, ValueError, ["(2, 6)", "3 new tokens", "8"]),
])  # fmt: skip
def test_prompts_that_do_not_fit_are_refused_with_their_row(ids, n, error, says):
    with pytest.raises(error) as caught:
        generate(tiny_gpt(), ids, n)
    assert all(part in str(caught.value) for part in says)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "rng": RNG}], ids=["greedy", "drawn"])
def test_a_model_that_computes_nan_does_not_generate_text_as_if_nothing_were_wrong(options):
    broken = tiny_gpt().map_tensors(lambda t: Tensor(t.data * math.nan))
    with pytest.raises(ValueError, match="nan|finite"):
        generate(broken, np.array([[1, 2]]), 3, **options)


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", ["ln_f.weight", "ln_f.bias", "wte.weight", "h.0.mlp.down_proj.bias"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_one_parameter_that_is_not_finite_gives_no_tokens(name, number):
    model = tiny_gpt().trainable_copy()
    dict(model.named_parameters())[name].data.reshape(-1)[5] = number
    with pytest.raises(ValueError, match="logits are inf or nan"):
        generate(model, np.array([[1, 2]]), 3)
