"""The training loop and what is measured after it."""

import math
import re
import weakref
from functools import partial

import numpy as np
import pytest
from tqdm import tqdm

from minilora import GPT, Adam, GPTConfig, generate
from minilora.data import decode, encode, pack
from minilora.train import exact_match, heldout_loss, train

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
    assert losses[-1] < 0.5 * losses[0]


def test_the_same_seed_gives_the_same_losses_to_the_bit():
    runs = []
    for _ in range(2):
        model = GPT(TINY, np.random.default_rng(3))
        runs.append(train(model, Adam(model.parameters()), batches_of("hello, hello, hello"), 5, quiet=True))
    assert runs[0] == runs[1]


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


@pytest.mark.parametrize("steps", [0, -1])
def test_training_for_no_steps_is_refused(model, steps):
    with pytest.raises(ValueError, match=f"steps must be at least 1, got {steps}"):
        train(model, Adam(model.parameters()), batches_of("abcabcabcabcabc"), steps, quiet=True)


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

    def loss(ids, targets):
        alive.append(sum(graph() is not None for graph in graphs))
        made = real(ids, targets)
        graphs.append(weakref.ref(made.node))
        return made

    model.loss = loss
    train(model, Adam(model.parameters()), batches_of("abcabcabcabcabc"), 3, quiet=True)
    assert alive == [0, 0, 0] and len(graphs) == 3


def test_an_empty_batch_is_refused(model):
    with pytest.raises(ValueError, match=r"\(0, 8\)"):
        train(model, Adam(model.parameters()), [(np.zeros((0, 8), int), np.zeros((0, 8), int))], 1, quiet=True)


def test_the_progress_bar_tells_loss_and_speed(model, capfd, monkeypatch):
    monkeypatch.setattr("minilora.train.tqdm", partial(tqdm, mininterval=0))
    train(model, Adam(model.parameters()), batches_of("abcabcabcabcabc"), 3, label="learning")
    shown = capfd.readouterr().err
    assert re.search(r"learning: 100%.* 3/3 .*loss \d\.\d+, [\d,]+ tokens/s", shown)


def test_the_heldout_loss_is_the_mean_over_the_text_and_does_not_depend_on_the_batch(model):
    ids = encode("the quick brown fox jumps over the lazy dog.")
    stretches = [model.loss(ids[None, i : i + 8], ids[None, i + 1 : i + 9]).item() for i in range(0, 40, 8)]
    for batch in (1, 2, 5):
        assert heldout_loss(model, ids, 8, batch) == pytest.approx(np.mean(stretches), rel=1e-6)


def test_a_text_too_short_for_one_stretch_is_refused(model):
    with pytest.raises(ValueError, match=r"8 tokens .* 8 \+ 1"):
        heldout_loss(model, encode("12345678"), 8)


def test_exact_match_agrees_with_greedy_decoding():
    rng = np.random.default_rng(1)
    model = GPT(TINY, rng)
    pairs = [("2+2=", "4\n"), ("capital of peru? ", "lima\n"), ("q ", "ok\n"), ("rr ", "no\n")]
    loop = iter(lambda: pack(pairs), None)
    train(model, Adam(model.parameters(), lr=1e-2), loop, 60, quiet=True)
    probes = pairs + [(prompt + " ", answer) for prompt, answer in pairs] + [("2+2=", "5\n"), ("q ", "okay\n")]
    decoded = []
    for prompt, answer in probes:
        ids = encode(prompt)[None]
        decoded.append(decode(generate(model, ids, len(answer))[0, ids.shape[1] :]) == answer)
    assert exact_match(model, probes) == decoded
    assert True in decoded and False in decoded
