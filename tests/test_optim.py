"""Adam against the textbook, clipping and the schedule at their edges, and what they refuse. Knows no models."""

import math
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import agree, hunt, nearly, rngs, sides

from minilora import optim
from minilora.backend import to_numpy
from minilora.optim import SCHEDULES, Adam, _blocks, clip_grad_norm, warmup_constant, warmup_cosine, warmup_linear
from minilora.tensor import Tensor


def textbook_adamw(p, gradients, lr, betas, eps, weight_decay):
    """Algorithm 2 of Loshchilov & Hutter 2019, as printed there, in plain NumPy."""
    (b1, b2), m, v = betas, np.zeros_like(p), np.zeros_like(p)
    for t, g in enumerate(gradients, start=1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
        p = p - lr * (m_hat / (np.sqrt(v_hat) + eps) + weight_decay * p)
    return p


@st.composite
def optimisations(draw):
    """(start, gradients of a few steps, Adam's settings)."""
    rng, shape, steps = draw(rngs), (draw(sides), draw(sides)), draw(st.integers(1, 8))
    options = {
        "lr": draw(st.floats(1e-4, 1.0)),
        "betas": (draw(st.sampled_from([0.0, 0.5, 0.9])), draw(st.sampled_from([0.5, 0.9, 0.999]))),
        "eps": draw(st.sampled_from([1e-8, 1e-3])),
        "weight_decay": draw(st.sampled_from([0.0, 0.01, 0.5])),
    }
    return rng.standard_normal(shape), list(rng.standard_normal((steps, *shape))), options


def is_the_textbook(case):
    """Adam's steps are the textbook's, to float64 rounding: 1e-12 is a margin of a few thousand roundings."""
    start, gradients, options = case
    p = Tensor(start.copy(), requires_grad=True)
    adam = Adam([p], **options)
    for g in gradients:
        p.grad = g
        adam.step()
    assert np.allclose(p.data, textbook_adamw(start, gradients, **options), rtol=1e-12, atol=1e-12)


@given(optimisations())
def test_adam_takes_the_steps_of_the_textbook(case):
    is_the_textbook(case)


@pytest.mark.parametrize("shape", [(70_001,), (301, 256), (3, 50_000), (2, 70_000), (2**16,)], ids=str)
@pytest.mark.parametrize("of", ["whole", "columns"])
def test_in_blocks_the_steps_are_the_same_to_the_bit(shape, of, monkeypatch):
    """Several blocks with a last one that is cut short; rows that are larger than a block; and views with gaps."""
    found = []
    for block in (2**62, 2**16, 1000):
        monkeypatch.setattr("minilora.optim.BLOCK", block)
        rng = np.random.default_rng(0)
        start = rng.normal(size=(*shape, 2))[..., 0] if of == "columns" else rng.normal(size=shape)
        p = Tensor(start, requires_grad=True)
        adam = Adam([p], lr=0.1, weight_decay=0.1)
        for _ in range(2):
            p.grad = rng.normal(size=shape)
            adam.step()
        found.append((p.data.tobytes(), adam.m[0].tobytes(), adam.v[0].tobytes()))
        blocks = list(_blocks(p.data, p.grad))
        assert sum(len(w) for w, _ in blocks) == shape[0]
        assert all(w.size <= max(block, w[0].size) and np.shares_memory(w, p.data) for w, _ in blocks)
    assert found[0] == found[1] == found[2]


def end_of_a_run(threads):
    """What three steps make of two tensors whose blocks lie on any thread: parameters and moments, to the bit."""
    rng = np.random.default_rng(0)
    params = [Tensor(rng.standard_normal(shape, np.float32), requires_grad=True) for shape in ((500, 7), (333,))]
    adam = Adam(params, lr=0.1, weight_decay=0.1, threads=threads)
    for _ in range(3):
        for p in params:
            p.grad = rng.standard_normal(p.shape, np.float32)
        adam.step()
    return [a.tobytes() for a in (*(p.data for p in params), *adam.m, *adam.v)]


@pytest.fixture
def threads_pay_at_once(monkeypatch):
    monkeypatch.setattr("minilora.optim.BLOCK", 100)
    monkeypatch.setattr("minilora.optim.THREADS_PAY", 0)


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_threads_change_no_bit(threads, threads_pay_at_once):
    assert end_of_a_run(threads) == end_of_a_run(1)


@pytest.mark.parametrize("forgotten", ["block", "numbers"])
def test_a_block_that_a_thread_leaves_out_or_updates_otherwise_is_seen(forgotten, threads_pay_at_once, monkeypatch):
    update = optim._update
    calls = []

    def spoilt(numbers, eps, block):
        calls.append(block)
        if len(calls) == 7:
            if forgotten == "block":
                return
            numbers = (*numbers[:3], numbers[3] * 1.01, numbers[4])
        update(numbers, eps, block)

    expected = end_of_a_run(1)
    monkeypatch.setattr("minilora.optim._update", spoilt)
    assert end_of_a_run(2) != expected


def test_few_numbers_start_no_thread_and_many_do(monkeypatch):
    started = []
    pool = optim.ThreadPoolExecutor
    monkeypatch.setattr("minilora.optim.ThreadPoolExecutor", lambda n: started.append(n) or pool(n))
    end_of_a_run(3)
    assert started == []
    monkeypatch.setattr("minilora.optim.THREADS_PAY", 500 * 7 + 333)
    end_of_a_run(3)
    assert started == [3] * 3


def test_what_numpy_is_told_to_raise_is_raised_from_a_thread_too(threads_pay_at_once):
    p = Tensor(np.ones(300), requires_grad=True)
    p.grad = np.full(300, 1e200)
    with np.errstate(over="raise"), pytest.raises(FloatingPointError):
        Adam([p], threads=2).step()


def test_adam_needs_a_thread():
    with pytest.raises(ValueError, match="threads=0"):
        Adam([Tensor([1.0], requires_grad=True)], threads=0)


def adam_with(correction=True, coupled=False, eps_inside=False):
    """A `step` in plain code, with one of the classic bugs."""

    def step(self):
        self.steps += 1
        (b1, b2), t = self.betas, self.steps if correction else math.inf
        for p, m, v in zip(self.params, self.m, self.v, strict=True):
            g = p.grad + self.weight_decay * p.data if coupled else p.grad
            m += (1 - b1) * (g - m)
            v += (1 - b2) * (g * g - v)
            m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
            if not coupled:
                p.data *= 1 - self.lr * self.weight_decay
            p.data -= self.lr * m_hat / (np.sqrt(v_hat + self.eps) if eps_inside else np.sqrt(v_hat) + self.eps)

    return step


@pytest.mark.parametrize("bug", [{"correction": False}, {"coupled": True}, {"eps_inside": True}], ids=str)
def test_each_planted_bug_in_adam_is_killed(monkeypatch, bug):
    monkeypatch.setattr(Adam, "step", adam_with(**bug))
    with pytest.raises(AssertionError):
        hunt(optimisations(), is_the_textbook)


def test_the_step_without_a_bug_planted_the_same_way_survives(monkeypatch):
    monkeypatch.setattr(Adam, "step", adam_with())
    hunt(optimisations(), is_the_textbook)


def test_the_first_step_moves_every_number_by_the_learning_rate_however_large_its_gradient():
    p = Tensor(np.zeros(3), requires_grad=True)
    p.grad = np.array([1e-3, 1.0, -1e6])
    Adam([p], lr=0.5).step()
    assert np.allclose(p.data, [-0.5, -0.5, 0.5], rtol=1e-4)


def test_a_rate_given_to_a_step_stands_for_that_step_alone():
    p = Tensor(np.zeros(1), requires_grad=True)
    adam = Adam([p], lr=0.5)
    for lr, moved in ((0.0, 0.0), (None, -0.5), (0.25, -0.75)):
        p.grad = np.ones(1)
        adam.step(lr)
        assert p.data == pytest.approx(moved, abs=1e-6)


def test_decay_follows_the_rate_of_the_step():
    p = Tensor([2.0], requires_grad=True)
    adam = Adam([p], lr=1.0, weight_decay=0.5)
    for lr, after in ((0.0, 2.0), (0.5, 1.5), (None, 0.75)):
        p.grad = np.zeros(1)
        adam.step(lr)
        assert p.data.tolist() == [after]


def test_a_tensor_given_twice_moves_once():
    p = Tensor([3.0], requires_grad=True)
    adam = Adam([p, p], lr=1.0)
    p.grad = np.ones(1)
    adam.step()
    assert p.data == pytest.approx(2.0, abs=1e-6)


@pytest.mark.parametrize("state", [{}, {"steps": 1}, {"steps": 1, "moments": {}, "more": 2}], ids=str)
def test_a_state_with_other_keys_is_refused(state):
    with pytest.raises(ValueError, match="expected the keys steps and moments, got"):
        Adam([Tensor([1.0], requires_grad=True)]).load_state_dict(state)


def test_frozen_tensors_hold_no_moments_and_stay_as_they_are():
    frozen, free = Tensor(np.ones((50, 50))), Tensor(np.ones((2, 3)), requires_grad=True)
    adam = Adam([frozen, free])
    assert adam.params == [free] and [a.shape for a in adam.m + adam.v] == [(2, 3), (2, 3)]
    (free * 2.0).sum().backward()
    adam.step()
    assert (frozen.data == 1).all() and (free.data < 1).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_parameters_are_updated_in_place_and_keep_their_dtype(dtype):
    array = np.ones(3, dtype)
    p = Tensor(array, requires_grad=True)
    adam = Adam([p], weight_decay=0.1)
    (p * p).sum().backward()
    adam.step()
    assert p.data is array and (array < 1).all() and array.dtype == adam.m[0].dtype == adam.v[0].dtype == dtype


def test_zero_grad_forgets_so_that_backward_starts_anew():
    p = Tensor(np.ones(2), requires_grad=True)
    adam = Adam([p])
    for _ in range(2):
        adam.zero_grad()
        (p * 3.0).sum().backward()
    assert np.array_equal(p.grad, [3, 3])


def test_every_backend_takes_the_same_steps(xp):
    results = {}
    for module in (np, xp):
        p = Tensor(module.asarray(np.linspace(-1, 1, 6, dtype="float32").reshape(2, 3)), requires_grad=True)
        adam = Adam([p], lr=0.1, weight_decay=0.1)
        for _ in range(3):
            adam.zero_grad()
            (p * p * p).sum().backward()
            norm = clip_grad_norm([p], 0.5)
            adam.step()
        assert isinstance(norm, float)
        results[module] = p.data
    # The host sums the squares of a gradient in an order of its own, and so rounds the norm.
    assert isinstance(results[xp], xp.ndarray) and nearly(results[xp], results[np])


def test_a_missing_gradient_is_refused_before_anything_moves():
    used, unused = (Tensor(np.ones(n), requires_grad=True) for n in (2, 3))
    adam = Adam([used, unused])
    used.sum().backward()
    with pytest.raises(ValueError, match=r"no gradient for 1 of 2 tensors \(\(3,\)\).*backward"):
        adam.step()
    assert (used.data == 1).all() and adam.steps == 0


@pytest.mark.parametrize("options", [{"lr": -1.0}, {"lr": math.nan}, {"lr": math.inf}, {"betas": (1.0, 0.9)},
                                     {"betas": (0.9, -0.1)}, {"eps": 0.0}, {"eps": math.nan}, {"weight_decay": -0.1},
                                     {"weight_decay": math.nan}, {"weight_decay": math.inf}], ids=str)
def test_hyper_parameters_out_of_range_are_refused_by_name_and_value(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError) as caught:
        Adam([Tensor(np.ones(1), requires_grad=True)], **options)
    assert f"{name}={value}" in str(caught.value)


@pytest.mark.parametrize("lr", [math.nan, math.inf, -1.0])
def test_a_rate_of_a_step_that_is_no_rate_is_refused_before_anything_moves(lr):
    p = Tensor(np.ones(2), requires_grad=True)
    adam = Adam([p])
    p.grad = np.ones(2)
    with pytest.raises(ValueError, match=f"learning rate must be finite.*got {lr}"):
        adam.step(lr=lr)
    assert adam.steps == 0 and np.array_equal(p.data, [1, 1]) and not adam.m[0].any()


def test_what_is_no_tensor_is_refused_with_what_to_pass():
    with pytest.raises(TypeError, match=r"expected Tensors, got ndarray; pass model\.parameters\(\)"):
        Adam([Tensor(np.ones(1), requires_grad=True), np.ones(2)])


@pytest.mark.parametrize("params", [[], [Tensor(np.ones(1))]], ids=["none", "frozen"])
def test_an_optimizer_with_nothing_to_train_is_refused(params):
    with pytest.raises(ValueError, match=r"none of these tensors is trainable; pass adapter.parameters\(\)"):
        Adam(params)


# --- going on ----------------------------------------------------------------------------------------------------


def stepped(adam, gradients):
    for g in gradients:
        adam.params[0].grad = g
        adam.step()
    return adam


def goes_on_to_the_bit(case, forget=()):
    """Any number of steps, then a new Adam over a copy of the parameters, then the rest: nothing tells them apart."""
    start, gradients, options = case
    whole = stepped(Adam([Tensor(start.copy(), requires_grad=True)], **options), gradients)
    for k in range(len(gradients) + 1):
        first = stepped(Adam([Tensor(start.copy(), requires_grad=True)], **options), gradients[:k])
        second = Adam([Tensor(first.params[0].data.copy(), requires_grad=True)], **options)
        moments = first.state_dict()["moments"]
        state = {name: 0 * moment if name in forget else moment.copy() for name, moment in moments.items()}
        second.load_state_dict({"steps": 0 if "steps" in forget else first.steps, "moments": state})
        stepped(second, gradients[k:])
        assert second.params[0].data.tobytes() == whole.params[0].data.tobytes()
        assert [a.tobytes() for a in second.m + second.v] == [a.tobytes() for a in whole.m + whole.v]
        assert second.steps == whole.steps == len(gradients)


@given(optimisations())
def test_an_adam_restored_goes_on_to_the_bit(case):
    goes_on_to_the_bit(case)


@pytest.mark.parametrize("forgotten", ["m.0", "v.0", "steps"])
def test_an_adam_that_forgets_any_of_it_is_found_out(forgotten):
    with pytest.raises(AssertionError):
        hunt(optimisations(), lambda case: goes_on_to_the_bit(case, forget=(forgotten,)))


def test_a_state_moves_between_backends_and_is_not_shared(xp):
    ours, theirs = (Adam([Tensor(m.asarray([1.0, 2.0]), requires_grad=True)]) for m in (np, xp))
    ours.params[0].grad = np.array([3.0, 4.0])
    ours.step()
    theirs.load_state_dict(ours.state_dict())
    assert isinstance(theirs.m[0], xp.ndarray) and agree(xp, theirs.m[0], ours.m[0])
    ours.step()
    assert not np.array_equal(to_numpy(theirs.m[0]), ours.m[0]) and theirs.steps == 1


@pytest.mark.parametrize("state, steps, told", [
    ({"m.0": np.ones(3), "v.0": np.ones(2)}, 1, r"m.0 is \(\(3,\), 'float64'\), not \(\(2,\), 'float64'\)"),
    ({"m.0": np.ones(2), "v.0": np.ones(2, "float32")}, 1, "v.0.*float32.*not.*float64"),
    ({"m.0": np.ones(2)}, 1, "1 arrays do not fit.*v.0 is absent"),
    ({"m.0": np.ones(2), "v.0": np.ones(2), "m.1": np.ones(2)}, 1, "1 arrays do not fit.*m.1.*not absent"),
    ({"m.0": np.ones(2), "v.0": np.ones(2)}, -1, "at least 0, got -1"),
], ids=["shape", "dtype", "too few", "too many", "steps"])  # fmt: skip
def test_a_state_that_does_not_fit_is_refused_and_nothing_changes(state, steps, told):
    adam = Adam([Tensor(np.zeros(2), requires_grad=True)])
    with pytest.raises(ValueError, match=told):
        adam.load_state_dict({"steps": steps, "moments": state})
    assert adam.steps == 0 and not adam.m[0].any() and not adam.v[0].any()


# --- clipping ----------------------------------------------------------------------------------------------------


def with_gradients(*gradients):
    tensors = [Tensor(np.zeros(np.shape(g)), requires_grad=True) for g in gradients]
    for t, g in zip(tensors, gradients, strict=True):
        t.grad = np.array(g)
    return tensors


def test_clipping_scales_all_gradients_together_by_exactly_the_ratio_of_norms():
    params = [*with_gradients([3.0, 0.0], [[4.0]]), Tensor(np.zeros(2)), Tensor(np.zeros(2), requires_grad=True)]
    assert clip_grad_norm(params, 2.5) == 5.0
    assert np.array_equal(params[0].grad, [1.5, 0.0]) and np.array_equal(params[1].grad, [[2.0]])
    assert params[2].grad is None and params[3].grad is None


@pytest.mark.parametrize("limit", [5.0, 5.5, math.inf])
def test_gradients_within_the_limit_are_left_as_they_are(limit):
    (p,) = with_gradients([3.0, 4.0])
    before = p.grad
    assert clip_grad_norm([p], limit) == 5.0
    assert p.grad is before and np.array_equal(before, [3, 4])


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_norm_that_is_not_finite_is_refused_before_anything_is_scaled(broken):
    params = with_gradients([30.0, 40.0], [broken])
    with pytest.raises(ValueError, match=r"gradient norm is (nan|inf): lower the learning rate"):
        clip_grad_norm(params, 1.0)
    assert np.array_equal(params[0].grad, [30, 40])


@pytest.mark.parametrize("limit", [-1.0, math.nan])
def test_a_limit_that_is_no_norm_is_refused(limit):
    """A negative limit would turn every gradient round; nan would clip nothing and say nothing."""
    (p,) = with_gradients([3.0, 4.0])
    with pytest.raises(ValueError, match="max_norm"):
        clip_grad_norm([p], limit)
    assert np.array_equal(p.grad, [3, 4])


# --- the schedule ------------------------------------------------------------------------------------------------


def test_the_rate_warms_up_to_its_peak_and_falls_to_its_final_share():
    rate = lambda step: warmup_cosine(step, total=100, peak=2.0, warmup=10, final=0.1)
    assert [rate(step) for step in (0, 4, 9, 10)] == [0.2, 1.0, 2.0, 2.0]
    assert rate(55) == pytest.approx(2.0 * (0.1 + 0.9 / 2))  # half way down the cosine
    assert rate(100) == rate(1000) == pytest.approx(0.2)


@given(st.integers(1, 60), st.integers(0, 20), st.floats(1e-4, 1.0), st.floats(0.0, 1.0))
def test_the_rate_never_leaves_its_range_and_never_rises_after_the_warm_up(total, warmup, peak, final):
    for schedule in (warmup_cosine, warmup_linear):
        never_leaves_its_range_nor_rises(partial(schedule, final=final), total, warmup, peak, final)
    never_leaves_its_range_nor_rises(warmup_constant, total, warmup, peak, 1.0)


def never_leaves_its_range_nor_rises(schedule, total, warmup, peak, final):
    rates = [schedule(step, total, peak, warmup) for step in range(total + warmup + 5)]
    assert all(0 <= rate <= peak * (1 + 1e-12) for rate in rates)
    falling = rates[max(0, warmup - 1) :]
    assert all(later <= rate * (1 + 1e-12) for rate, later in zip(falling, falling[1:], strict=False))
    assert rates[-1] == pytest.approx(final * peak)


def test_a_line_falls_evenly_and_a_constant_does_not_fall():
    assert [warmup_linear(step, 12, 2.0, 2, final=0.5) for step in (0, 1, 2, 7, 12)] == [1.0, 2.0, 2.0, 1.5, 1.0]
    assert [warmup_constant(step, 12, 2.0, 2) for step in (0, 1, 2, 7, 12)] == [1.0, 2.0, 2.0, 2.0, 2.0]


@pytest.mark.parametrize("schedule", SCHEDULES.values())
def test_without_a_warm_up_the_first_rate_is_the_peak(schedule):
    assert schedule(0, 10, 3.0) == 3.0
