"""A batch in parts: loss and gradient of the whole, the same bits each time, and nothing shared but arrays."""

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora import GPT, GPTConfig, LoRAConfig, attach, stack
from minilora.disk.peft import init_peft_adapter
from minilora.functional import IGNORE
from minilora.graph import is_recording, no_grad
from minilora.nn import Module
from minilora.tensor import Tensor
from minilora.training import parts as P
from minilora.training.parts import Replicas, add_gradients

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=8, vocab_size=11, block_size=8)


def adapted(dropout=0.0, seed=0, dtype="float64"):
    """A model whose q, k and v share one lora_A, and its adapter, which is not at zero."""
    rng = np.random.default_rng(seed)
    base = GPT(CONFIG, rng, dtype)
    adapter = init_peft_adapter(base, LoRAConfig(2, 4, "all-linear", dropout), rng)
    for p in adapter.parameters():
        p.data[...] = rng.normal(size=p.shape) * 0.3
    return attach(base, adapter, rng=np.random.default_rng(5)), adapter


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


def agrees_with_one_piece(model, n, ids, targets):
    """1e-12 is a margin, thousands of times what float64 leaves of so small a model."""
    whole, expected = in_one_piece(model, ids, targets), taken(model)
    with Replicas(model, n) as replicas:
        assert replicas.backward(ids, targets) == pytest.approx(whole, rel=1e-12)
    for name, d in taken(model).items():
        assert np.abs(d - expected[name]).max() <= 1e-12 * (1 + np.abs(expected[name]).max()), name


@given(st.integers(1, 4), st.integers(1, 7), st.integers(0, 10))
def test_parts_give_the_loss_and_the_gradient_of_the_whole(n, rows, seed):
    ids, targets = batch(rows, seed)
    targets[0, 0] = 3  # one of them carries a loss
    agrees_with_one_piece(adapted()[0], n, ids, targets)


def test_of_a_full_model_too_whose_head_is_its_embedding():
    model = GPT(CONFIG, np.random.default_rng(0), "float64")
    agrees_with_one_piece(model, 2, *batch(4))
    assert model.wte.weight.grad is None and len(Replicas(model, 2).leaves[1]) == len(model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_one_part_is_the_plain_step_to_the_bit(dtype):
    (model, _), (ids, targets) = adapted(dtype=dtype), batch(3)
    whole, expected = in_one_piece(model, ids, targets), taken(model)
    with Replicas(model, 1) as replicas:
        assert replicas.backward(ids, targets) == whole
    assert same(taken(model), expected)


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_same_batch_gives_the_same_bits_each_time(n, dropout):
    ids, targets = batch(5)
    found = []
    for _ in range(20):
        model, _ = adapted(dropout, dtype="float32")
        with Replicas(model, n) as replicas:
            losses = [replicas.backward(ids, targets) for _ in range(2)]
        found.append((losses, taken(model)))
    assert all(losses == found[0][0] and same(gradients, found[0][1]) for losses, gradients in found)


@pytest.mark.parametrize("rows, silent, parts", [(1, [], 1), (2, [], 2), (4, [0, 1, 2], 1), (5, [0, 1, 3], 2)], ids=str)
def test_a_part_that_carries_no_loss_is_not_computed(rows, silent, parts, monkeypatch):
    (model, _), (ids, targets) = adapted(), batch(rows)
    targets[silent] = IGNORE
    computed, real = [], P._backward
    monkeypatch.setattr(P, "_backward", lambda *work: computed.append(work) or real(*work))
    agrees_with_one_piece(model, 3, ids, targets)
    assert len(computed) == parts


def test_replicas_share_every_array_and_own_every_gradient():
    model, adapter = adapted()
    before = model.fingerprint()
    with Replicas(model, 3) as replicas:
        replicas.backward(*batch(6))
        for twin in replicas.models[1:]:
            pairs = list(zip(model.parameters(), twin.parameters(), strict=True))
            assert all(p.data is q.data and p is not q for p, q in pairs)
            assert all(p.grad is None or not np.shares_memory(p.grad, q.grad) for p, q in pairs)
    assert all(p.grad is not None for p in adapter.parameters()) and model.fingerprint() == before


def test_a_gradient_that_is_there_is_added_to():
    (model, _), (ids, targets) = adapted(), batch(4)
    with Replicas(model, 2) as replicas:
        replicas.backward(ids, targets)
        once = {name: d.copy() for name, d in taken(model).items()}
        replicas.backward(ids, targets)
        replicas.backward(ids, targets)
    assert all(np.allclose(d, 2 * once[name], rtol=1e-12) for name, d in taken(model).items())


def test_an_update_in_place_is_seen_by_every_replica():
    (model, adapter), (ids, targets) = adapted(), batch(4)
    with Replicas(model, 2) as replicas:
        replicas.backward(ids, targets)
        taken(model)
        for p in adapter.parameters():
            p.data *= 1.5
        loss = replicas.backward(ids, targets)
    assert loss == pytest.approx(model.loss(ids, targets).item(), rel=1e-12)


def test_parts_drop_out_different_numbers_and_the_models_generator_says_which(monkeypatch):
    gradients = []
    look = lambda *leaves: gradients.append([each[-1].grad for each in leaves]) or add_gradients(*leaves)
    monkeypatch.setattr(P, "add_gradients", look)
    (model, _), (ids, targets) = adapted(0.5), batch(1)
    ids, targets = np.repeat(ids, 2, axis=0), np.repeat(targets, 2, axis=0)  # two parts of one and the same row
    with Replicas(model, 2) as replicas:
        seen = [replicas.backward(ids, targets) for _ in range(3)]
        state = model.h[0].mlp.up_proj.rng.bit_generator.state
        later = replicas.backward(ids, targets)
    first, second = gradients[0]
    assert len({*seen, later}) == 4 and not np.allclose(first, second)
    model, _ = adapted(0.5)
    model.h[0].mlp.up_proj.rng.bit_generator.state = state  # all that a run needs to go on
    with Replicas(model, 2) as replicas:
        assert replicas.backward(ids, targets) == later


@pytest.mark.parametrize("row", [0, 3], ids=["in the caller's part", "in the other"])
def test_an_error_in_a_part_is_raised_and_leaves_everything_as_it_was(row):
    (model, adapter), (ids, targets) = adapted(), batch(4)
    with Replicas(model, 2) as replicas:
        replicas.backward(ids, targets)
        before = [p.grad for p in adapter.parameters()]
        wrong = ids.copy()
        wrong[row, 0] = 99
        with pytest.raises(ValueError, match=r"token ids lie in .* 99"):
            replicas.backward(wrong, targets)
        assert all(p.grad is d for p, d in zip(adapter.parameters(), before, strict=True))
        taken(model)
        replicas.backward(ids, targets)
        found = taken(model)
    with Replicas(model, 2) as replicas:
        replicas.backward(ids, targets)
    assert same(found, taken(model))


def test_ctrl_c_leaves_the_gradients_as_they_were(monkeypatch):
    (model, adapter), (ids, targets) = adapted(), batch(4)
    real = P._backward

    def struck(m, *part):
        real(m, *part)
        if m is model:
            raise KeyboardInterrupt

    monkeypatch.setattr(P, "_backward", struck)
    with Replicas(model, 2) as replicas, pytest.raises(KeyboardInterrupt):
        replicas.backward(ids, targets)
    assert all(p.grad is None for p in adapter.parameters())


def test_the_parts_are_computed_at_the_same_time_and_no_thread_is_left(monkeypatch):
    (model, _), (ids, targets) = adapted(), batch(6)
    meeting, real, before = threading.Barrier(3), P._backward, threading.active_count()
    monkeypatch.setattr(P, "_backward", lambda *work: (meeting.wait(timeout=60), real(*work))[1])
    with Replicas(model, 3) as replicas:
        replicas.backward(ids, targets)  # or the barrier is broken
        assert threading.active_count() == before + 2
    assert threading.active_count() == before


def test_what_holds_in_the_callers_thread_holds_in_the_others(monkeypatch):
    """Recording, and what NumPy does about an overflow, are of a context, and a thread would begin with a new one."""
    (model, _), (ids, targets) = adapted(dtype="float32"), batch(4)
    seen = []

    def look(m, *part):
        seen.append((m is model, is_recording(), np.geterr()["over"]))
        return 0.0

    monkeypatch.setattr(P, "_backward", look)
    with Replicas(model, 2) as replicas, no_grad(), np.errstate(over="raise"):
        replicas.backward(ids, targets)
    assert sorted(seen) == [(False, False, "raise"), (True, False, "raise")]


def test_what_does_not_fit_is_refused():
    (model, adapter), (ids, targets) = adapted(), batch(4)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Replicas(model, 0)
    with Replicas(model, 2) as replicas:
        with pytest.raises(ValueError, match="none of 24 targets"):
            replicas.backward(ids, np.full_like(targets, IGNORE))
        with pytest.raises(ValueError, match=r"\(4, 6\).*\(3, 6\)"):
            replicas.backward(ids, targets[:3])
    stacked = attach(GPT(CONFIG, np.random.default_rng(0), "float64"), stack([adapter] * 4), check_base=False)
    with Replicas(stacked, 2) as replicas, pytest.raises(ValueError, match="stacks 4 adapters.*got input"):
        replicas.backward(ids, targets)


def test_add_gradients_adds_in_order_and_skips_what_is_not_there():
    a, b, c = ([Tensor(np.zeros(2, np.float32), requires_grad=True) for _ in range(2)] for _ in range(3))
    for t, value in ((a[0], 1), (b[0], 1e8), (c[0], -1e8), (c[1], 4)):
        t.grad = np.full(2, value, np.float32)
    kept = c[1].grad
    add_gradients(a, b, c)
    assert a[0].grad.tolist() == [0, 0]  # (1 + 1e8) - 1e8 in float32: the order of the sum is the order of the parts
    assert a[1].grad.tolist() == [4, 4] and kept.tolist() == [4, 4]
    assert all(t.grad is None for t in (*b, *c))  # moved, and not held twice


PLANTED = {
    "a mean of means": ("_backward", lambda real: lambda model, ids, targets, share: real(model, ids, targets, 0.5)),
    "the sum left out": ("add_gradients", lambda real: lambda *leaves: None),
    "twice the sum": ("add_gradients", lambda real: lambda ours, *others: [
        real(ours, *others), *(setattr(p, "grad", 2 * p.grad) for p in ours if p.grad is not None)]),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_each_planted_bug_is_killed(bug, monkeypatch):
    name, wrong = PLANTED[bug]
    ids, targets = batch(4)
    targets[:2] = np.where(np.arange(6) < 4, IGNORE, targets[:2])  # the halves do not weigh the same
    monkeypatch.setattr(P, name, wrong(getattr(P, name)))
    with pytest.raises(AssertionError):
        agrees_with_one_piece(adapted()[0], 2, ids, targets)


def test_a_twin_that_keeps_an_older_gradient_is_noticed(monkeypatch):
    def copied(leaves, *others):
        for p, *replicas in zip(leaves, *others, strict=True):
            p.grad = sum((q.grad for q in replicas), p.grad)

    monkeypatch.setattr(P, "add_gradients", copied)
    test_a_gradient_that_is_there_is_added_to()  # twins are cleared twice: where they are read, and before each batch
    monkeypatch.setattr(Replicas, "_refresh_twins", lambda self: None)
    with pytest.raises(AssertionError):
        test_a_gradient_that_is_there_is_added_to()


def test_a_generator_shared_by_the_parts_is_noticed(monkeypatch):
    """The planted bug: twins that draw from the model's own generator, whoever comes first."""
    real = Replicas.__init__

    def shared(self, model, n):
        real(self, model, n)
        self.generators = {}

    monkeypatch.setattr(Replicas, "__init__", shared)
    model, _ = adapted(0.5)
    with Replicas(model, 2) as replicas:
        generators = {id(m.h[0].mlp.up_proj.rng) for m in replicas.models}
    assert len(generators) == 1, "the bug is planted"
    with pytest.raises(AssertionError):
        test_the_generators_are_apart()


def test_the_generators_are_apart():
    model, _ = adapted(0.5)
    with Replicas(model, 3) as replicas:
        replicas.backward(*batch(6))
        assert len({id(m.h[0].mlp.up_proj.rng) for m in replicas.models}) == 3
        layers = [module for _, module in replicas.models[1].named_modules() if hasattr(module, "rng")]
        assert len({id(module.rng) for module in layers}) == 1  # as in the model: one for all of its layers
    assert isinstance(model, Module)
