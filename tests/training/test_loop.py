"""The training loop and what is measured after it."""

import math
import re
import weakref
from functools import partial
from itertools import islice

import numpy as np
import pytest
import threadpoolctl
from strategies import contents
from tqdm import tqdm

from minilora import GPT, Adam, GPTConfig, generate
from minilora.disk.characters import decode, encode, encode_pairs
from minilora.training.batches import consecutive_windows, pad_pairs, pair_batches
from minilora.training.loop import exact_match, heldout_loss, train

TINY = GPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=96, block_size=32, positions="rope")


@pytest.fixture
def model():
    return GPT(TINY, np.random.default_rng(0))


def batches_of(text, n=4, length=8):
    ids = encode(text)
    rows = np.stack([ids[i : i + length + 1] for i in range(n)])
    while True:
        yield rows[:, :-1], rows[:, 1:]


def test_training_lowers_the_loss_and_returns_one_loss_per_step(model):
    losses = train(model, Adam(model.parameters(), lr=1e-2), batches_of("abcabcabcabcabc"), 30, quiet=True)
    assert len(losses) == 30
    assert losses[-1] < 0.5 * losses[0]  # 0.001 to 0.003 over seeds 0, 1, 2 and four processors' kernels


def test_the_same_seed_gives_the_same_losses_to_the_bit():
    runs = []
    for _ in range(2):
        model = GPT(TINY, np.random.default_rng(3))
        runs.append(train(model, Adam(model.parameters()), batches_of("hello, hello, hello"), 5, quiet=True))
    assert runs[0] == runs[1]


def test_parts_learn_as_the_whole_does_and_give_the_same_bits_on_any_number_of_threads():
    """1e-12 of the loss is a margin, thousands of times what float64 leaves of five steps."""
    runs = []
    for parts, threads in ((1, 1), (2, 1), (2, 2), (2, 2)):
        model = GPT(TINY, np.random.default_rng(3), "float64")
        batches = batches_of("hello, hello, hello")
        losses = train(model, Adam(model.parameters()), batches, 5, quiet=True, parts=parts, threads=threads)
        runs.append((losses, contents(model)))
    assert runs[1] == runs[2] == runs[3]
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-12)


@pytest.mark.parametrize("cores, parts, threads, share", [(4, 2, 2, 2), (4, 2, 1, 2), (4, 3, 3, 1),
                                                                 (2, 4, 2, 1)], ids=str)  # fmt: skip
def test_each_part_has_its_share_of_the_cores_whoever_computes_it(model, monkeypatch, cores, parts, threads, share):
    seen, real = set(), GPT.loss

    def look(self, ids, targets, rng=None):
        seen.update(pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas")
        return real(self, ids, targets)

    monkeypatch.setattr(GPT, "loss", look)
    monkeypatch.setattr("minilora.training.loop.cores", lambda: cores)
    train(model, Adam(model.parameters()), batches_of("abcabcabcabcabc"), 1, quiet=True, parts=parts,
          threads=threads)
    assert seen == {share}


def test_the_schedule_gives_the_rate_of_each_step(model):
    steps, adam = [], Adam(model.parameters())
    adam.step = steps.append
    train(model, adam, batches_of("abcabcabcabcabc"), 3, schedule=lambda step: step / 10, quiet=True)
    assert steps == [0.0, 0.1, 0.2]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_loss_that_is_not_finite_stops_before_any_parameter_changes(model):
    model.ln_f.bias.data[0] = np.nan
    before = model.fingerprint()
    with pytest.raises(ValueError, match="loss is nan at step 0"):
        train(model, Adam(model.parameters()), batches_of("abcabcabcabcabc"), 3, quiet=True)
    assert model.fingerprint() == before


def test_batches_that_run_out_early_are_named(model):
    few = [next(batches_of("abcabcabcabcabc"))] * 2
    with pytest.raises(ValueError, match="ended after 2 of 3"):
        train(model, Adam(model.parameters()), few, 3, quiet=True)


@pytest.mark.parametrize("few, told", [({"steps": 0}, "steps must be at least 1, got 0"),
                                       ({"steps": -1}, "steps must be at least 1, got -1"),
                                       ({"threads": 0}, "parts 1, threads 0"),
                                       ({"parts": 2, "threads": 3}, "parts 2, threads 3")], ids=str)  # fmt: skip
def test_training_for_no_steps_or_on_no_thread_is_refused(model, few, told):
    with pytest.raises(ValueError, match=told):
        train(model, Adam(model.parameters()), batches_of("abcabcabcabcabc"), **{"steps": 1, "quiet": True, **few})


def norms_at_each_step(model, max_norm):
    """The norm of the gradient that the optimizer finds at three steps, in which no parameter moves."""
    adam, norms = Adam(model.parameters()), []
    adam.step = lambda lr: norms.append(math.sqrt(sum(float((p.grad**2).sum()) for p in adam.params)))
    train(model, adam, batches_of("abcabcabcabcabc"), 3, max_norm=max_norm, quiet=True)
    return norms


def test_each_step_sees_the_gradient_of_its_own_batch_alone(model):
    first, second, third = norms_at_each_step(model, math.inf)
    assert first == second == third > 0.1


def test_gradients_are_clipped_before_the_step(model):
    assert norms_at_each_step(model, 0.05) == pytest.approx([0.05] * 3, rel=1e-5)


def test_no_graph_lives_on_into_the_next_step(model, no_garbage_collector):
    """Two graphs at once would double the memory that training takes."""
    graphs, alive, real = [], [], model.loss

    def loss(ids, targets, rng=None):
        alive.append(sum(graph() is not None for graph in graphs))
        made = real(ids, targets, rng)
        graphs.append(weakref.ref(made.node))
        return made

    model.loss = loss
    train(model, Adam(model.parameters()), batches_of("abcabcabcabcabc"), 3, quiet=True)
    assert alive == [0, 0, 0] and len(graphs) == 3


def test_an_empty_batch_is_refused(model):
    with pytest.raises(ValueError, match=r"\(0, 8\)"):
        train(model, Adam(model.parameters()), [(np.zeros((0, 8), int), np.zeros((0, 8), int))], 1, quiet=True)


def test_the_progress_bar_tells_loss_and_speed(model, capfd, monkeypatch):
    monkeypatch.setattr("minilora.training.loop.tqdm", partial(tqdm, mininterval=0))
    train(model, Adam(model.parameters()), batches_of("abcabcabcabcabc"), 3, label="learning")
    shown = capfd.readouterr().err
    assert re.search(r"learning: 100%.* 3/3 .*loss \d\.\d+, [\d,]+ tokens/s", shown)


def test_the_heldout_loss_is_the_mean_over_the_text_and_does_not_depend_on_the_batch(model):
    """In float64, where 1e-12 is a margin, thousands of times what another batch leaves of rounding."""
    model, ids = model.astype("float64"), encode("the quick brown fox jumps over the lazy dog.")
    alone = [model.loss(ids[None, i : i + 8], ids[None, i + 1 : i + 9]).item() for i in range(0, 40, 8)]
    for batch in (1, 2, 5):
        assert heldout_loss(model, consecutive_windows(ids, 8, batch)) == pytest.approx(np.mean(alone), rel=1e-12)


def test_the_heldout_loss_of_questions_is_the_mean_over_the_tokens_of_the_answers(model):
    """Not the mean of the batches' means: here one batch has two tokens that count, the other thirteen."""
    model, pairs = model.astype("float64"), encode_pairs([("one ", "1\n"), ("count to six ", "1 2 3 4 5 6\n")])
    means = [model.loss(*pad_pairs([pair])).item() for pair in pairs]
    right = np.average(means, weights=[len(answer) for _, answer in pairs])
    one_by_one = (pad_pairs([pair]) for pair in pairs[::-1])
    for batches in ([pad_pairs(pairs)], [pad_pairs([pair]) for pair in pairs], one_by_one):
        assert heldout_loss(model, batches) == pytest.approx(right, rel=1e-12)
    assert abs(right - np.mean(means)) > 1e-3


def test_the_heldout_loss_of_nothing_is_refused(model):
    with pytest.raises(ValueError, match="no batch"):
        heldout_loss(model, [])


def test_the_heldout_loss_shows_a_bar_only_under_a_label(model, capfd):
    batches = [pad_pairs(encode_pairs([("one ", "1\n")]))]
    heldout_loss(model, batches)
    assert capfd.readouterr().err == ""
    heldout_loss(model, batches, "before")
    assert "before:   0%" in capfd.readouterr().err


# Going on.


def four_steps(start=0, stop=4, model=None, adam=None):
    """(model, Adam, [(steps done, loss)], rates) after the steps start .. stop of a run of four."""
    model = model or GPT(TINY, np.random.default_rng(3))
    adam = adam or Adam(model.parameters())
    calls, rates, pairs = [], [], encode_pairs([(f"{i}+{i}=", f"{2 * i}\n") for i in range(7)])
    batches = islice(pair_batches(pairs, 3, np.random.default_rng(4)), start, stop)
    after = lambda done, loss: calls.append((done, loss))
    schedule = lambda step: rates.append(0.01 * (step + 1)) or rates[-1]
    train(model, adam, batches, stop, schedule=schedule, quiet=True, start=start, on_step=after)
    return model, adam, calls, rates


def test_after_each_step_the_hook_is_told_how_many_are_done_and_the_loss():
    model = GPT(TINY, np.random.default_rng(0))
    adam, calls = Adam(model.parameters()), []
    after = lambda done, loss: calls.append((done, adam.steps, loss))
    losses = train(model, adam, batches_of("abcabcabcabcabc"), 3, quiet=True, on_step=after)
    assert calls == [(1, 1, losses[0]), (2, 2, losses[1]), (3, 3, losses[2])]


def test_a_run_in_two_parts_is_the_run_in_one_to_the_bit():
    whole, _, calls, rates = four_steps()
    half, adam, first, _ = four_steps(stop=2)
    fresh = Adam(half.parameters())
    fresh.load_state_dict(adam.state_dict())
    again, _, second, late = four_steps(2, 4, half, fresh)
    assert contents(again) == contents(whole)
    assert first + second == calls and [done for done, _ in calls] == [1, 2, 3, 4]
    assert late == rates[2:]


def test_a_run_that_goes_on_at_its_end_has_nothing_to_do(model):
    assert train(model, Adam(model.parameters()), [], 3, quiet=True, start=3) == []


@pytest.mark.parametrize("start", [-1, 4])
def test_a_start_outside_the_run_is_refused(model, start):
    with pytest.raises(ValueError, match=rf"start must lie in 0 \.\. 3.*got {start}"):
        train(model, Adam(model.parameters()), [], 3, quiet=True, start=start)


def test_the_bar_of_a_run_that_goes_on_starts_where_it_stood(model, capfd, monkeypatch):
    monkeypatch.setattr("minilora.training.loop.tqdm", partial(tqdm, mininterval=0))
    train(model, Adam(model.parameters()), batches_of("abcabcabcabcabc"), 3, label="learning", start=1)
    shown = capfd.readouterr().err
    assert " 1/3 " in shown and " 3/3 " in shown and " 0/3 " not in shown


# Exact answers.


def test_exact_match_agrees_with_greedy_decoding():
    """No token is chosen by less than 0.3: over seeds and processors' kernels 0.1 to 0.8, far above all rounding."""
    rng = np.random.default_rng(1)
    model = GPT(TINY, rng)
    pairs = [("2+2=", "4\n"), ("capital of peru? ", "lima\n"), ("q ", "ok\n"), ("rr ", "no\n")]
    loop = iter(lambda: pad_pairs(encode_pairs(pairs)), None)
    train(model, Adam(model.parameters(), lr=1e-2), loop, 60, quiet=True)
    probes = pairs + [(prompt + " ", answer) for prompt, answer in pairs] + [("2+2=", "5\n"), ("q ", "okay\n")]
    decoded = []
    for prompt, answer in probes:
        ids = encode(prompt)[None]
        decoded.append(decode(generate(model, ids, len(answer))[0, ids.shape[1] :]) == answer)
    assert exact_match(model, encode_pairs(probes)) == decoded
    assert True in decoded and False in decoded
