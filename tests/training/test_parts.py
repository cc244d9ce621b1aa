"""A batch in parts: loss and gradient of the whole, the same bits each time, and nothing shared but arrays."""

import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora import GPT, GPTConfig, LoRAConfig, attach, stack
from minilora.disk.peft import init_peft_adapter
from minilora.functional import IGNORE
from minilora.graph import is_recording, no_grad
from minilora.tensor import Tensor
from minilora.training import parts as P
from minilora.training.parts import PartWorkers, add_gradients, cut, part_rng

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=8, vocab_size=11, block_size=8)


def adapted(dropout=0.0, seed=0, dtype="float64"):
    """A model whose q, k and v share one lora_A, and its adapter, which is not at zero."""
    rng = np.random.default_rng(seed)
    base = GPT(CONFIG, rng, dtype)
    adapter = init_peft_adapter(base, LoRAConfig(2, 4, "all-linear", dropout), rng)
    for p in adapter.parameters():
        p.data[...] = rng.normal(size=p.shape) * 0.3
    return attach(base, adapter), adapter


def batch(rows, seed=1):
    rng = np.random.default_rng(seed)
    ids, targets = rng.integers(0, 11, (2, rows, 6))
    return ids, np.where(rng.random(targets.shape) < 0.3, IGNORE, targets)


def in_one_piece(model, ids, targets):
    loss = model.loss(ids, targets)
    loss.backward()
    return loss.item()


def taken(model):
    """{name: gradient} of the model's trainable tensors, which are cleared."""
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    for p in model.parameters():
        if p.requires_grad:
            p.grad = None
    return found


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def agrees_with_one_piece(model, n, ids, targets, threads=1):
    """1e-12 is a margin, thousands of times what float64 leaves of so small a model."""
    whole, expected = in_one_piece(model, ids, targets), taken(model)
    with PartWorkers(model, n, threads) as workers:
        assert workers.backward(ids, targets) == pytest.approx(whole, rel=1e-12)
    for name, d in taken(model).items():
        assert np.abs(d - expected[name]).max() <= 1e-12 * (1 + np.abs(expected[name]).max()), name


@given(st.integers(1, 4), st.data(), st.integers(1, 7), st.integers(0, 10))
def test_parts_give_the_loss_and_the_gradient_of_the_whole(n, data, rows, seed):
    ids, targets = batch(rows, seed)
    targets[0, 0] = 3  # one of them carries a loss
    agrees_with_one_piece(adapted()[0], n, ids, targets, data.draw(st.integers(1, n)))


def result(parts, threads, ids, targets, dropout=0.4, seed=7, step=3):
    """The loss and the gradients of a step whose layers drop out, in float32."""
    model, _ = adapted(dropout, dtype="float32")
    with PartWorkers(model, parts, threads) as workers:
        loss = workers.backward(ids, targets, seed=seed, step=step)
    return loss, taken(model)


def who_computes_a_part_changes_no_bit(parts, ids, targets):
    loss, gradients = result(parts, 1, ids, targets)
    for threads in range(2, parts + 1):
        other_loss, other_gradients = result(parts, threads, ids, targets)
        assert other_loss == loss and same(other_gradients, gradients)


@given(st.integers(2, 4), st.integers(1, 7), st.integers(0, 10))
def test_who_computes_a_part_changes_no_bit_with_dropout_too(parts, rows, seed):
    ids, targets = batch(rows, seed)
    targets[0, 0] = 3
    who_computes_a_part_changes_no_bit(parts, ids, targets)


def test_of_a_full_model_too_whose_head_is_its_embedding():
    model = GPT(CONFIG, np.random.default_rng(0), "float64")
    agrees_with_one_piece(model, 2, *batch(4), threads=2)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_one_part_is_the_plain_step_to_the_bit(dtype):
    (model, _), (ids, targets) = adapted(dtype=dtype), batch(3)
    whole, expected = in_one_piece(model, ids, targets), taken(model)
    with PartWorkers(model) as workers:
        assert workers.backward(ids, targets) == whole
    assert same(taken(model), expected)


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_same_batch_gives_the_same_bits_each_time(n, dropout):
    ids, targets = batch(5)
    found = []
    for _ in range(20):
        model, _ = adapted(dropout, dtype="float32")
        with PartWorkers(model, n, n) as workers:
            losses = [workers.backward(ids, targets, seed=0, step=step) for step in range(2)]
        found.append((losses, taken(model)))
    assert all(losses == found[0][0] and same(gradients, found[0][1]) for losses, gradients in found)


@pytest.mark.parametrize("rows, silent, parts", [(1, [], 1), (2, [], 2), (4, [0, 1, 2], 1), (5, [0, 1, 3], 2)], ids=str)
def test_a_part_that_carries_no_loss_is_not_computed(rows, silent, parts, monkeypatch):
    (model, _), (ids, targets) = adapted(), batch(rows)
    targets[silent] = IGNORE
    computed, real = [], P.part_gradients
    monkeypatch.setattr(P, "part_gradients", lambda *work: computed.append(work) or real(*work))
    agrees_with_one_piece(model, 3, ids, targets)
    assert len(computed) == parts


def test_replicas_share_every_array_and_own_every_gradient():
    model, adapter = adapted()
    before = model.fingerprint()
    with PartWorkers(model, 3, 3) as workers:
        workers.backward(*batch(6))
        for twin in workers.replicas:
            pairs = list(zip(model.parameters(), twin.parameters(), strict=True))
            assert all(p.data is q.data and p is not q for p, q in pairs)
            shared = [p for p, q in pairs if p.requires_grad and q.grad is not None and p.grad is not q.grad
                      and np.shares_memory(p.grad, q.grad)]  # fmt: skip
            assert shared == []
    assert all(p.grad is not None for p in adapter.parameters()) and model.fingerprint() == before


def test_a_gradient_that_is_there_is_added_to():
    (model, _), (ids, targets) = adapted(), batch(4)
    with PartWorkers(model, 2, 2) as workers:
        workers.backward(ids, targets)
        once = {name: d.copy() for name, d in taken(model).items()}
        workers.backward(ids, targets)
        workers.backward(ids, targets)
    assert all(np.allclose(d, 2 * once[name], rtol=1e-12) for name, d in taken(model).items())


def test_an_update_in_place_is_seen_by_every_replica():
    (model, adapter), (ids, targets) = adapted(), batch(4)
    with PartWorkers(model, 2, 2) as workers:
        workers.backward(ids, targets)
        taken(model)
        for p in adapter.parameters():
            p.data *= 1.5
        loss = workers.backward(ids, targets)
    assert loss == pytest.approx(model.loss(ids, targets).item(), rel=1e-12)


def test_each_part_of_each_step_draws_numbers_of_its_own_and_the_seed_says_which(monkeypatch):
    gradients, real = [], P.add_gradients
    monkeypatch.setattr(P, "add_gradients", lambda leaves, ds: gradients.append(ds[-1].copy()) or real(leaves, ds))
    ids, targets = batch(1)
    ids, targets = np.repeat(ids, 2, axis=0), np.repeat(targets, 2, axis=0)  # two parts of one and the same row
    losses = [result(2, 2, ids, targets, seed=seed, step=step)[0] for seed, step in ((1, 0), (1, 1), (2, 0))]
    assert len(set(losses)) == 3
    assert not np.allclose(gradients[0], gradients[1]), "the parts of one step"
    assert result(2, 2, ids, targets, seed=1, step=1)[0] == losses[1]
    draws = {part_rng(seed, step, part).random() for seed in (0, 1) for step in (0, 1) for part in (0, 1)}
    assert len(draws) == 8


def test_without_a_seed_nothing_drops_out():
    ids, targets = batch(4)
    assert result(2, 1, ids, targets, seed=None)[0] == result(2, 1, ids, targets, dropout=0.0)[0]
    assert result(2, 1, ids, targets)[0] != result(2, 1, ids, targets, dropout=0.0)[0]


def test_a_part_keeps_its_generator_where_another_part_carries_no_loss():
    ids, targets = batch(4)
    targets[:2] = IGNORE
    (part,) = cut(ids, targets, 2, seed=5, step=1)
    assert part.rng.random() == part_rng(5, 1, 1).random()


@pytest.mark.parametrize("row", [0, 3], ids=["in the caller's part", "in the other"])
def test_an_error_in_a_part_is_raised_and_leaves_everything_as_it_was(row):
    (model, adapter), (ids, targets) = adapted(), batch(4)
    with PartWorkers(model, 2, 2) as workers:
        workers.backward(ids, targets)
        before = [p.grad for p in adapter.parameters()]
        wrong = ids.copy()
        wrong[row, 0] = 99
        with pytest.raises(ValueError, match=r"token ids lie in .* 99"):
            workers.backward(wrong, targets)
        assert all(p.grad is d for p, d in zip(adapter.parameters(), before, strict=True))
        taken(model)
        workers.backward(ids, targets)
        found = taken(model)
    with PartWorkers(model, 2, 2) as workers:
        workers.backward(ids, targets)
    assert same(found, taken(model))


def test_ctrl_c_leaves_the_gradients_as_they_were(monkeypatch):
    (model, adapter), (ids, targets) = adapted(), batch(4)
    real = P.part_gradients

    def struck(replica, part):
        real(replica, part)
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt

    monkeypatch.setattr(P, "part_gradients", struck)
    with PartWorkers(model, 2, 2) as workers, pytest.raises(KeyboardInterrupt):
        workers.backward(ids, targets)
    assert all(p.grad is None for p in adapter.parameters())


def test_the_parts_are_computed_at_the_same_time_and_no_thread_is_left(monkeypatch):
    (model, _), (ids, targets) = adapted(), batch(6)
    meeting, real, before = threading.Barrier(3), P.part_gradients, threading.active_count()
    monkeypatch.setattr(P, "part_gradients", lambda *work: (meeting.wait(timeout=60), real(*work))[1])
    with PartWorkers(model, 3, 3) as workers:
        workers.backward(ids, targets)  # or the barrier is broken
        assert threading.active_count() == before + 2
    assert threading.active_count() == before


def test_what_holds_in_the_callers_thread_holds_in_the_others(monkeypatch):
    """Recording, and what NumPy does about an overflow, are of a context, and a thread would begin with a new one."""
    (model, _), (ids, targets) = adapted(dtype="float32"), batch(4)
    seen = []

    def look(replica, part):
        here = threading.current_thread() is threading.main_thread()
        seen.append((here, is_recording(), np.geterr()["over"]))
        return 0.0, []

    monkeypatch.setattr(P, "part_gradients", look)
    monkeypatch.setattr(P, "add_gradients", lambda *leaves: None)
    with PartWorkers(model, 2, 2) as workers, no_grad(), np.errstate(over="raise"):
        workers.backward(ids, targets)
    assert sorted(seen) == [(False, False, "raise"), (True, False, "raise")]


def test_what_does_not_fit_is_refused():
    (model, adapter), (ids, targets) = adapted(), batch(4)
    for parts, threads in ((0, 0), (2, 0), (0, 1), (2, 3)):
        with pytest.raises(ValueError, match=f"parts {parts}, threads {threads}"):
            PartWorkers(model, parts, threads)
    with PartWorkers(model, 2, 2) as workers:
        with pytest.raises(ValueError, match="none of 24 targets"):
            workers.backward(ids, np.full_like(targets, IGNORE))
        with pytest.raises(ValueError, match=r"\(4, 6\).*\(3, 6\)"):
            workers.backward(ids, targets[:3])
    stacked = attach(GPT(CONFIG, np.random.default_rng(0), "float64"), stack([adapter] * 4), check_base=False)
    with PartWorkers(stacked, 2) as workers, pytest.raises(ValueError, match="stacks 4 adapters.*got input"):
        workers.backward(ids, targets)


def test_add_gradients_adds_in_order_and_skips_what_is_not_there():
    leaves = [Tensor(np.zeros(2, np.float32), requires_grad=True) for _ in range(2)]
    part = lambda *values: [None if value is None else np.full(2, value, np.float32) for value in values]
    for gradients in (part(1, None), part(1e8, None), part(-1e8, 4)):
        add_gradients(leaves, gradients)
    assert leaves[0].grad.tolist() == [0, 0]  # (1 + 1e8) - 1e8 in float32: the order of the sum is that of the parts
    assert leaves[1].grad.tolist() == [4, 4]


def wrong_share(real):
    def cut(*arguments):
        return [replace(part, share=0.5) for part in real(*arguments)]

    return cut


def twice(real):
    def add(leaves, gradients):
        real(leaves, gradients)
        for p in leaves:
            p.grad = 2 * p.grad

    return add


PLANTED = {
    "a mean of means": ("cut", wrong_share),
    "the sum left out": ("add_gradients", lambda real: lambda leaves, gradients: None),
    "twice the sum": ("add_gradients", twice),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_each_planted_bug_is_killed(bug, monkeypatch):
    name, wrong = PLANTED[bug]
    ids, targets = batch(4)
    targets[:2] = np.where(np.arange(6) < 4, IGNORE, targets[:2])  # the halves do not weigh the same
    monkeypatch.setattr(P, name, wrong(getattr(P, name)))
    with pytest.raises((AssertionError, TypeError)):
        agrees_with_one_piece(adapted()[0], 2, ids, targets)


def test_a_replica_that_keeps_an_older_gradient_is_noticed(monkeypatch):
    def forgetful(replica, part):
        loss = replica.loss(part.ids, part.targets)
        loss.backward(np.full_like(loss.data, part.share))
        return part.share * loss.item(), [p.grad for p in P._leaves(replica)]

    monkeypatch.setattr(P, "part_gradients", forgetful)
    with pytest.raises(AssertionError):
        test_a_gradient_that_is_there_is_added_to()


SHARED = {
    "one generator for all parts, whoever comes first": lambda seed, step, part: SHARED_RNG,
    "a generator for the step, not for the part": lambda seed, step, part: np.random.default_rng(seed),
}
SHARED_RNG = np.random.default_rng(0)


@pytest.mark.parametrize("bug", SHARED)
def test_a_generator_shared_by_the_parts_is_noticed(bug, monkeypatch):
    monkeypatch.setattr(P, "part_rng", SHARED[bug])
    with pytest.raises(AssertionError):
        who_computes_a_part_changes_no_bit(3, *batch(6))
        test_each_part_of_each_step_draws_numbers_of_its_own_and_the_seed_says_which(monkeypatch)
