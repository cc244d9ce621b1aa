"""The training loop and what is measured after it."""

import math
import re
import weakref
from functools import partial
from itertools import islice, repeat

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import blas_threads_in_a_loss, character_gpt, contents, seeds, two_blas_threads
from tqdm import tqdm

from minilora import Adam, generate
from minilora.disk.characters import decode, encode, encode_pairs
from minilora.optim import clip_grad_norm
from minilora.training import loop
from minilora.training.batches import Row, answer_rows, consecutive_windows, pad_rows, row_batches
from minilora.training.loop import exact_match, exact_rows, heldout_loss, train
from minilora.training.parts import PartWorkers


@pytest.fixture
def model():
    return character_gpt()


def batches_of(text, n=4, length=8):
    """The same batch for ever: the windows at 0, 1, ... n - 1 of the text."""
    ids = encode(text)
    windows = np.stack([ids[start : start + length + 1] for start in range(n)])
    return repeat((windows[:, :-1], windows[:, 1:]))


def abc():
    return batches_of("abcabcabcabcabc")


def test_training_lowers_the_loss_and_returns_one_loss_per_step(model):
    losses = train(model, Adam(model.parameters(), lr=1e-2), abc(), 30, quiet=True)
    assert len(losses) == 30
    # 0.001 to 0.003 over seeds 0, 1, 2 and four processors' kernels.
    assert losses[-1] < 0.5 * losses[0]


def five_steps(dtype="float32", **how):
    """(losses, contents of the model) of a model from one seed after five steps."""
    model = character_gpt(seed=3, dtype=dtype)
    losses = train(model, Adam(model.parameters()), batches_of("hello, hello, hello"), 5, quiet=True, **how)
    return losses, contents(model)


def test_the_same_seed_gives_the_same_losses_to_the_bit():
    assert five_steps() == five_steps()


def test_parts_learn_as_the_whole_does_and_give_the_same_bits_on_any_number_of_threads():
    """1e-12 of the loss is a margin, thousands of times what float64 leaves of five steps."""
    whole, _ = five_steps("float64")
    in_parts = five_steps("float64", parts=3)
    assert in_parts[0] == pytest.approx(whole, rel=1e-12)
    for threads in (1, 2, 3, 3):
        assert five_steps("float64", parts=3, threads=threads) == in_parts


@pytest.mark.parametrize("parts, threads, expected", [(1, 1, 2), (2, 1, 1), (2, 2, 1), (3, 2, 1)], ids=str)
def test_each_part_has_one_thread_of_blas_whoever_computes_it(model, monkeypatch, parts, threads, expected):
    """A batch in one part has all there are."""
    found = blas_threads_in_a_loss(monkeypatch)
    with two_blas_threads():
        train(model, Adam(model.parameters()), abc(), 1, quiet=True, parts=parts, threads=threads)
        heldout_loss(model, list(islice(abc(), 1)), parts=parts, threads=threads)
    assert found == {expected}


def test_a_step_takes_as_many_batches_as_it_accumulates_and_is_that_of_one_batch_of_all_their_rows():
    def run(batch, **how):
        model = character_gpt(seed=3)
        rows = np.random.default_rng(1).integers(0, 96, (24, 9))
        batches = ((rows[i : i + batch, :-1], rows[i : i + batch, 1:]) for i in range(0, 24, batch))
        return train(model, Adam(model.parameters()), batches, 3, quiet=True, seed=0, **how), contents(model)

    whole = run(8, parts=4)
    assert run(4, accumulate=2, parts=2) == run(2, accumulate=4, parts=1) == whole
    assert run(4, accumulate=2, parts=2, threads=2) == whole


def test_batches_that_end_within_a_step_are_named_and_no_batch_a_step_is_refused(model):
    fingerprint = model.fingerprint()
    with pytest.raises(ValueError, match="ended after 0 of 1"):
        train(model, Adam(model.parameters()), islice(abc(), 2), 1, quiet=True, accumulate=3)
    with pytest.raises(ValueError, match="at least one batch, got accumulate 0"):
        train(model, Adam(model.parameters()), abc(), 1, quiet=True, accumulate=0)
    assert model.fingerprint() == fingerprint


def test_parts_beside_workers_are_refused(model):
    with PartWorkers(model, 2) as workers:
        for how in ({"parts": 2}, {"parts": 2, "threads": 2}):
            with pytest.raises(ValueError, match="beside workers"):
                train(model, Adam(model.parameters()), abc(), 1, quiet=True, workers=workers, **how)
            with pytest.raises(ValueError, match="beside workers"):
                heldout_loss(model, [], workers=workers, **how)


def test_the_schedule_gives_the_rate_of_each_step(model):
    rates = []
    adam = Adam(model.parameters())
    adam.step = rates.append
    train(model, adam, abc(), 3, schedule=lambda step: step / 10, quiet=True)
    assert rates == [0.0, 0.1, 0.2]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_loss_that_is_not_finite_stops_before_any_parameter_changes(model):
    model.ln_f.bias.data[0] = np.nan
    fingerprint = model.fingerprint()
    with pytest.raises(ValueError, match="loss is nan at step 0; no step was taken yet, so the model itself holds"):
        train(model, Adam(model.parameters()), abc(), 3, quiet=True)
    assert model.fingerprint() == fingerprint


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_held_out_loss_that_is_not_finite_is_refused(model, number):
    model.ln_f.weight.data[0] = number
    with pytest.raises(ValueError, match="heldout_loss: the loss is nan: .* lower the alpha"):
        heldout_loss(model, list(islice(abc(), 1)))


def test_batches_that_run_out_early_are_named(model):
    with pytest.raises(ValueError, match="ended after 2 of 3"):
        train(model, Adam(model.parameters()), islice(abc(), 2), 3, quiet=True)


@pytest.mark.parametrize("how, complaint", [
    ({"steps": 0}, "steps must be at least 1, got 0"),
    ({"steps": -1}, "steps must be at least 1, got -1"),
    ({"steps": 1, "threads": 0}, "parts 1, threads 0"),
    ({"steps": 1, "parts": 2, "threads": 3}, "parts 2, threads 3"),
], ids=str)  # fmt: skip
def test_training_for_no_steps_or_on_no_thread_is_refused(model, how, complaint):
    with pytest.raises(ValueError, match=complaint):
        train(model, Adam(model.parameters()), abc(), quiet=True, **how)


def norms_at_each_step(model, max_norm):
    """The norm of the gradient that the optimizer finds at three steps, in which no parameter moves."""
    norms = []
    adam = Adam(model.parameters())

    def measure(lr):
        squares = sum(float((p.grad**2).sum()) for p in adam.params)
        norms.append(math.sqrt(squares))

    adam.step = measure
    train(model, adam, abc(), 3, max_norm=max_norm, quiet=True)
    return norms


def test_each_step_sees_the_gradient_of_its_own_batch_alone(model):
    first, second, third = norms_at_each_step(model, math.inf)
    assert first == second == third > 0.1


def test_gradients_are_clipped_before_the_step(model):
    assert norms_at_each_step(model, 0.05) == pytest.approx([0.05] * 3, rel=1e-5)


def test_no_graph_lives_on_into_the_next_step(model, no_garbage_collector):
    """Two graphs at once would double the memory that training takes."""
    graphs = []
    n_alive = []
    true_loss = model.loss

    def loss(ids, targets, rng=None):
        n_alive.append(sum(graph() is not None for graph in graphs))
        result = true_loss(ids, targets, rng)
        graphs.append(weakref.ref(result.node))
        return result

    model.loss = loss
    train(model, Adam(model.parameters()), abc(), 3, quiet=True)
    assert n_alive == [0, 0, 0]
    assert len(graphs) == 3


def test_an_empty_batch_is_refused(model):
    empty = np.zeros((0, 8), int)
    with pytest.raises(ValueError, match=r"\(0, 8\)"):
        train(model, Adam(model.parameters()), [(empty, empty)], 1, quiet=True)


def test_the_progress_bar_tells_loss_and_speed(model, capfd, monkeypatch):
    monkeypatch.setattr("minilora.training.loop.tqdm", partial(tqdm, mininterval=0))
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    train(model, Adam(model.parameters()), abc(), 3, label="learning")
    shown = capfd.readouterr().err
    assert re.search(r"learning: 100%.* 3/3 .*loss \d\.\d+, [\d,]+ tokens/s", shown)


# The held-out loss. In float64, where 1e-12 is a margin: thousands of times what another batch leaves of rounding.


def test_the_heldout_loss_is_the_mean_over_the_text_and_does_not_depend_on_the_batch():
    model = character_gpt(dtype="float64")
    ids = encode("the quick brown fox jumps over the lazy dog.")
    alone = [model.loss(ids[None, i : i + 8], ids[None, i + 1 : i + 9]).item() for i in range(0, 40, 8)]
    for batch in (1, 2, 5):
        batches = consecutive_windows(ids, 8, batch)
        assert heldout_loss(model, batches) == pytest.approx(np.mean(alone), rel=1e-12)


def test_the_heldout_loss_of_questions_is_the_mean_over_the_tokens_of_the_answers():
    """Not the mean of the batches' means: here one batch has two tokens that count, the other thirteen."""
    model = character_gpt(dtype="float64")
    answers = ["1\n", "1 2 3 4 5 6\n"]
    rows = answer_rows(encode_pairs(zip(["one ", "count to six "], answers, strict=True)))
    means = [model.loss(*pad_rows([row])).item() for row in rows]
    over_tokens = np.average(means, weights=[len(answer) for answer in answers])
    together = [pad_rows(rows)]
    apart = [pad_rows([row]) for row in rows]
    from_a_generator = (pad_rows([row]) for row in rows[::-1])
    for batches in (together, apart, from_a_generator):
        assert heldout_loss(model, batches) == pytest.approx(over_tokens, rel=1e-12)
    assert abs(over_tokens - np.mean(means)) > 1e-3


def test_parts_give_the_heldout_loss_of_the_whole_and_threads_change_no_bit():
    rng = np.random.default_rng(0)
    for dtype, margin in (("float64", 1e-12), ("float32", 1e-5)):
        model = character_gpt(dtype=dtype)
        batches = [rng.integers(0, 96, (2, rows, 8)) for rows in (5, 5, 2)]
        whole = heldout_loss(model, batches)
        in_parts = heldout_loss(model, batches, parts=3)
        assert in_parts == pytest.approx(whole, rel=margin)
        for threads in (2, 3, 3):
            assert heldout_loss(model, batches, parts=3, threads=threads) == in_parts


def test_the_heldout_loss_of_nothing_is_refused(model):
    with pytest.raises(ValueError, match="no batch"):
        heldout_loss(model, [])


def test_the_heldout_loss_shows_a_bar_only_under_a_label_and_on_a_terminal(model, capfd, monkeypatch):
    batches = [pad_rows(answer_rows(encode_pairs([("one ", "1\n")])))]
    heldout_loss(model, batches, "before")
    assert capfd.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    heldout_loss(model, batches)
    assert capfd.readouterr().err == ""
    heldout_loss(model, batches, "before")
    assert "before:   0%" in capfd.readouterr().err


# Going on.


def steps_of_a_run(start, stop, model, adam):
    """Take the steps start .. stop of one run; returns ([(steps done, loss)], rates)."""
    calls = []
    rates = []
    rows = answer_rows(encode_pairs([(f"{i}+{i}=", f"{2 * i}\n") for i in range(7)]))
    batches = islice(row_batches(rows, 3, np.random.default_rng(4)), start, stop)

    def schedule(step):
        rates.append(0.01 * (step + 1))
        return rates[-1]

    def on_step(done, loss, norm):
        calls.append((done, loss))

    train(model, adam, batches, stop, schedule=schedule, quiet=True, start=start, on_step=on_step)
    return calls, rates


def test_after_each_step_the_hook_is_told_how_many_are_done_the_loss_and_the_norm(model, monkeypatch):
    calls = []
    norms = []
    monkeypatch.setattr(loop, "clip_grad_norm", lambda *given: norms.append(clip_grad_norm(*given)) or norms[-1])
    adam = Adam(model.parameters())

    def on_step(done, loss, norm):
        calls.append((done, adam.steps, loss, norm))

    losses = train(model, adam, abc(), 3, max_norm=1e-3, quiet=True, on_step=on_step)
    assert calls == [(n, n, losses[n - 1], norms[n - 1]) for n in (1, 2, 3)]
    assert min(norms) > 1e-3


def test_the_hook_may_end_the_run_after_a_step(model):
    losses = train(model, Adam(model.parameters()), abc(), 5, quiet=True, on_step=lambda done, loss, norm: done == 2)
    assert len(losses) == 2
    go_on = lambda done, loss, norm: False
    assert len(train(model, Adam(model.parameters()), abc(), 3, quiet=True, on_step=go_on)) == 3


def test_a_run_in_two_parts_is_the_run_in_one_to_the_bit():
    whole = character_gpt(seed=3)
    calls, rates = steps_of_a_run(0, 4, whole, Adam(whole.parameters()))

    model = character_gpt(seed=3)
    first_adam = Adam(model.parameters())
    first_calls, first_rates = steps_of_a_run(0, 2, model, first_adam)
    second_adam = Adam(model.parameters())
    second_adam.load_state_dict(first_adam.state_dict())
    second_calls, second_rates = steps_of_a_run(2, 4, model, second_adam)

    assert contents(model) == contents(whole)
    assert first_calls + second_calls == calls
    assert [done for done, _ in calls] == [1, 2, 3, 4]
    assert first_rates + second_rates == rates


def test_a_run_that_goes_on_at_its_end_has_nothing_to_do(model):
    assert train(model, Adam(model.parameters()), [], 3, quiet=True, start=3) == []


@pytest.mark.parametrize("start", [-1, 4])
def test_a_start_outside_the_run_is_refused(model, start):
    with pytest.raises(ValueError, match=rf"start must lie in 0 \.\. 3.*got {start}"):
        train(model, Adam(model.parameters()), [], 3, quiet=True, start=start)


def test_the_bar_of_a_run_that_goes_on_starts_where_it_stood(model, capfd, monkeypatch):
    monkeypatch.setattr("minilora.training.loop.tqdm", partial(tqdm, mininterval=0))
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    train(model, Adam(model.parameters()), abc(), 3, label="learning", start=1)
    shown = capfd.readouterr().err
    assert " 1/3 " in shown
    assert " 3/3 " in shown
    assert " 0/3 " not in shown


# Exact answers.


def decodes_to(model, prompt, answer):
    """Is `answer` what greedy decoding gives after `prompt`?"""
    ids = encode(prompt)[None]
    text = decode(generate(model, ids, len(answer))[0, ids.shape[1] :])
    return text == answer


def test_exact_match_agrees_with_greedy_decoding():
    """No token is chosen by less than 0.3: over seeds and processors' kernels 0.1 to 0.8, far above all rounding."""
    model = character_gpt(seed=1)
    pairs = [("2+2=", "4\n"), ("capital of peru? ", "lima\n"), ("q ", "ok\n"), ("rr ", "no\n")]
    batches = repeat(pad_rows(answer_rows(encode_pairs(pairs))))
    train(model, Adam(model.parameters(), lr=1e-2), batches, 60, quiet=True)
    with_another_space = [(prompt + " ", answer) for prompt, answer in pairs]
    probes = [*pairs, *with_another_space, ("2+2=", "5\n"), ("q ", "okay\n")]
    decoded = [decodes_to(model, prompt, answer) for prompt, answer in probes]
    assert exact_match(model, encode_pairs(probes)) == decoded
    assert True in decoded
    assert False in decoded


class Watched:
    """A model of which `exact_match` may ask two things, and how many logits it made at once."""

    def __init__(self, model):
        self.model = model
        self.config = model.config
        self.parameters = model.parameters
        self.sizes = []

    def hidden(self, ids):
        return self.model.hidden(ids)

    def head(self, hidden):
        logits = self.model.head(hidden)
        self.sizes.append(logits.shape)
        return logits


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 9)), min_size=1, max_size=12), seeds, st.integers(1, 5))
def test_exact_match_makes_logits_only_where_an_answer_is_and_few_at_once(lengths, seed, batch):
    rng = np.random.default_rng(seed)
    model = character_gpt(seed=2)
    pairs = [(rng.integers(0, 96, n_prompt), rng.integers(0, 96, n_answer)) for n_prompt, n_answer in lengths]
    # Half of them are what the model says.
    for i in range(0, len(pairs), 2):
        prompt, answer = pairs[i]
        pairs[i] = (prompt, generate(model, prompt[None], len(answer))[0, len(prompt) :])
    ids = [np.concatenate(pair)[None, :-1] for pair in pairs]
    logits = [np.sort(model(row).data[0, -len(answer) :]) for row, (_, answer) in zip(ids, pairs, strict=True)]
    # No token is chosen by so little that rounding could choose another.
    assume(all((row[:, -1] - row[:, -2]).min() > 1e-4 for row in logits))
    watched = Watched(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minilora.training.loop.LOGIT_ROWS", 7)
        found = exact_match(watched, pairs, batch)
    assert found == [generate(model, prompt[None], len(answer))[0, len(prompt) :].tolist() == list(answer)
                     for prompt, answer in pairs]  # fmt: skip
    assert all(n <= 7 for n, _ in watched.sizes)
    assert sum(n for n, _ in watched.sizes) == sum(len(answer) for _, answer in pairs)


def test_exact_match_is_told_of_models_on_other_devices(device_xp):
    model, rng = character_gpt(seed=1), np.random.default_rng(0)
    pairs = [(rng.integers(1, 96, 3), rng.integers(1, 96, n)) for n in (1, 2, 3)]
    # Answers that greedy decoding gives, and one that it does not.
    pairs = [(prompt, generate(model, prompt[None], len(answer))[0, 3:]) for prompt, answer in pairs] + pairs[:1]
    assert exact_match(model.to_device(device_xp), pairs) == exact_match(model, pairs) == [True] * 3 + [False]


def test_of_several_answers_in_a_row_each_must_be_right():
    """The second answer is asked for after the right first one, whatever the model says itself."""
    model = character_gpt(seed=1)
    ids = encode("ab cd ef")
    asked = np.array([3, 6])
    right = ids.copy()
    has_loss = np.zeros(len(ids), bool)
    has_loss[asked] = True
    for i in asked:
        right[i] = model(right[None, :i]).data[0, -1].argmax()
    wrong = [right.copy() for _ in asked]
    for row, i in zip(wrong, asked, strict=True):
        row[i] = (row[i] + 1) % 96
    rows = [Row(row, has_loss) for row in (right, *wrong)]
    assert exact_rows(model, rows) == [True, False, False]


def test_exact_match_in_parts_on_threads_is_that_of_the_whole():
    model, rng = character_gpt(seed=1), np.random.default_rng(0)
    pairs = [(rng.integers(1, 96, 1 + i % 4), rng.integers(1, 96, 1 + i % 3)) for i in range(11)]
    for i in (0, 3, 4, 9):
        prompt, answer = pairs[i]
        pairs[i] = (prompt, generate(model, prompt[None], len(answer))[0, len(prompt) :])
    whole = exact_match(model, pairs, batch=4)
    assert 4 <= sum(whole) < 11
    for parts, threads in ((3, 1), (3, 2), (5, 5)):
        assert exact_match(model, pairs, batch=4, parts=parts, threads=threads) == whole


def test_exact_match_of_nothing_is_nothing():
    assert exact_match(character_gpt(seed=1), []) == []
