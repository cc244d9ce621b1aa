"""A batch in parts: loss and gradient of the whole, the same bits each time, and nothing shared but arrays."""

import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import learned, seeds, small_gpt

from minilora import LoRAConfig, attach, stack
from minilora.disk.peft import init_peft_adapter
from minilora.functional import IGNORE
from minilora.graph import is_recording, no_grad
from minilora.training.parts import PartWorkers, add_gradients, cut, part_gradients, part_rng


def adapted(dropout=0.0, dtype="float64"):
    """A model whose q, k and v share one lora_A, and its adapter, which is not at zero."""
    base = small_gpt(dtype=dtype)
    config = LoRAConfig(2, 4, "all-linear", dropout)
    adapter = learned(init_peft_adapter(base, config, np.random.default_rng(0)))
    return attach(base, adapter), adapter


def batch(rows, seed=1):
    """ids and targets (rows, 6), of which about a third carry no loss, and at least one does."""
    rng = np.random.default_rng(seed)
    ids, targets = rng.integers(0, 11, (2, rows, 6))
    targets[rng.random(targets.shape) < 0.3] = IGNORE
    targets[0, 0] = 3
    return ids, targets


def take_gradients(model):
    """{name: gradient} of the model's trainable tensors, which have none afterwards."""
    gradients = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            gradients[name] = p.grad
            p.grad = None
    return gradients


def same(gradients, others):
    """Are two dicts of gradients equal to the bit?"""
    return gradients.keys() == others.keys() and all(np.array_equal(d, others[name]) for name, d in gradients.items())


def plain_step(model, ids, targets):
    """(loss, gradients) of the batch in one piece, by the engine alone."""
    loss = model.loss(ids, targets)
    loss.backward()
    return loss.item(), take_gradients(model)


def agrees_with_the_plain_step(model, parts, ids, targets, threads=1):
    """1e-12 is a margin, thousands of times what float64 leaves of so small a model."""
    expected_loss, expected = plain_step(model, ids, targets)
    with PartWorkers(model, parts, threads) as workers:
        assert workers.backward([(ids, targets)]) == pytest.approx(expected_loss, rel=1e-12)
    for name, d in take_gradients(model).items():
        assert np.abs(d - expected[name]).max() <= 1e-12 * (1 + np.abs(expected[name]).max()), name


@given(st.integers(1, 4), st.data(), st.integers(1, 7), seeds)
def test_parts_give_the_loss_and_the_gradient_of_the_whole(parts, data, rows, seed):
    threads = data.draw(st.integers(1, parts))
    model, _ = adapted()
    agrees_with_the_plain_step(model, parts, *batch(rows, seed), threads)


def test_of_a_full_model_too_whose_head_is_its_embedding():
    model = small_gpt(dtype="float64")
    agrees_with_the_plain_step(model, 2, *batch(4), threads=2)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_one_part_is_the_plain_step_to_the_bit(dtype):
    model, _ = adapted(dtype=dtype)
    ids, targets = batch(3)
    expected_loss, expected = plain_step(model, ids, targets)
    with PartWorkers(model) as workers:
        assert workers.backward([(ids, targets)]) == expected_loss
    assert same(take_gradients(model), expected)


# Who computes a part.


def step_with_dropout(parts, threads, ids, targets, dropout=0.4, seed=7, step=3):
    """(loss, gradients) of a step whose layers drop out, in float32."""
    model, _ = adapted(dropout, dtype="float32")
    with PartWorkers(model, parts, threads) as workers:
        loss = workers.backward([(ids, targets)], seed=seed, step=step)
    return loss, take_gradients(model)


def who_computes_a_part_changes_no_bit(parts, ids, targets):
    loss, gradients = step_with_dropout(parts, 1, ids, targets)
    for threads in range(2, parts + 1):
        other_loss, other_gradients = step_with_dropout(parts, threads, ids, targets)
        assert other_loss == loss
        assert same(other_gradients, gradients)


@given(st.integers(2, 4), st.integers(1, 7), seeds)
def test_who_computes_a_part_changes_no_bit_with_dropout_too(parts, rows, seed):
    who_computes_a_part_changes_no_bit(parts, *batch(rows, seed))


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_same_batch_gives_the_same_bits_each_time(n, dropout):
    ids, targets = batch(5)

    def two_steps():
        model, _ = adapted(dropout, dtype="float32")
        with PartWorkers(model, n, n) as workers:
            losses = [workers.backward([(ids, targets)], seed=0, step=step) for step in range(2)]
        return losses, take_gradients(model)

    first_losses, first_gradients = two_steps()
    for _ in range(19):
        losses, gradients = two_steps()
        assert losses == first_losses
        assert same(gradients, first_gradients)


def test_the_parts_are_computed_at_the_same_time_and_no_thread_is_left(monkeypatch):
    model, _ = adapted()
    n_before = threading.active_count()
    meeting = threading.Barrier(3)

    def after_the_others_came(replica, part):
        meeting.wait(timeout=60)
        return part_gradients(replica, part)

    monkeypatch.setattr("minilora.training.parts.part_gradients", after_the_others_came)
    with PartWorkers(model, 3, 3) as workers:
        # Or the barrier is broken.
        workers.backward([batch(6)])
        assert threading.active_count() == n_before + 3
    assert threading.active_count() == n_before


def test_what_holds_in_the_callers_thread_holds_in_the_others(monkeypatch):
    """Recording, and what NumPy does about an overflow, are of a context, and a thread would begin with a new one."""
    model, _ = adapted()
    contexts = []

    def look(replica, part):
        is_caller = threading.current_thread() is threading.main_thread()
        contexts.append((is_caller, is_recording(), np.geterr()["over"]))
        return 0.0, []

    monkeypatch.setattr("minilora.training.parts.part_gradients", look)
    monkeypatch.setattr("minilora.training.parts.add_gradients", lambda sums, gradients: None)
    with PartWorkers(model, 2, 2) as workers, no_grad(), np.errstate(over="raise"):
        workers.backward([batch(4)])
    assert contexts == [(False, False, "raise")] * 2


# Parts without a loss.


@pytest.mark.parametrize("rows, silent, computed", [
    (1, [], 1), (2, [], 2), (4, [0, 1, 2], 1), (5, [0, 1, 3], 2),
], ids=str)  # fmt: skip
def test_a_part_that_carries_no_loss_is_not_computed(rows, silent, computed, monkeypatch):
    model, _ = adapted()
    ids, targets = batch(rows)
    targets[:, 1] = 5
    targets[silent] = IGNORE
    parts = []

    def listed(replica, part):
        parts.append(part)
        return part_gradients(replica, part)

    monkeypatch.setattr("minilora.training.parts.part_gradients", listed)
    agrees_with_the_plain_step(model, 3, ids, targets)
    assert len(parts) == computed


def test_after_an_error_no_thread_computes_on(monkeypatch):
    model, _ = adapted()
    begun, raised, finished = threading.Event(), threading.Event(), threading.Event()
    ids, targets = batch(4)
    ids[:, 0] = [9, 1, 1, 1]

    def interrupted(replica, part):
        if part.ids[0, 0] == 9:
            assert begun.wait(60)
            raised.set()
            raise KeyboardInterrupt
        begun.set()
        assert raised.wait(60)
        time.sleep(0.1)
        finished.set()
        return part_gradients(replica, part)

    monkeypatch.setattr("minilora.training.parts.part_gradients", interrupted)
    with PartWorkers(model, 2, 2) as workers:
        with pytest.raises(KeyboardInterrupt):
            workers.backward([(ids, targets)])
        assert finished.is_set()


# What is shared and what is not.


def test_replicas_share_every_array_and_own_every_gradient():
    model, adapter = adapted()
    fingerprint = model.fingerprint()
    with PartWorkers(model, 3, 3) as workers:
        workers.backward([batch(6)])
        assert 1 <= len(workers.idle_replicas) <= 3
        for replica in workers.idle_replicas:
            for p, twin in zip(model.parameters(), replica.model.parameters(), strict=True):
                assert p is not twin
                assert p.data is twin.data
                # The model's leaves own the sum; a replica holds nothing on.
                assert twin.grad is None
    assert all(p.grad is not None for p in adapter.parameters())
    assert model.fingerprint() == fingerprint


def test_a_gradient_that_is_there_is_added_to():
    model, _ = adapted()
    ids, targets = batch(4)
    with PartWorkers(model, 2, 2) as workers:
        workers.backward([(ids, targets)])
        once = {name: d.copy() for name, d in take_gradients(model).items()}
        workers.backward([(ids, targets)])
        workers.backward([(ids, targets)])
    for name, d in take_gradients(model).items():
        assert np.allclose(d, 2 * once[name], rtol=1e-12)


def test_an_update_in_place_is_seen_by_every_replica():
    model, adapter = adapted()
    ids, targets = batch(4)
    with PartWorkers(model, 2, 2) as workers:
        workers.backward([(ids, targets)])
        take_gradients(model)
        for p in adapter.parameters():
            p.data *= 1.5
        loss = workers.backward([(ids, targets)])
    assert loss == pytest.approx(model.loss(ids, targets).item(), rel=1e-12)


# Several batches in one step, and rows that were filled up.


def padded_batch(rows, seed):
    """Rows of 1 to 9 tokens, of which the last ones are learned, filled up as `pad_rows` does; some learn nothing."""
    rng = np.random.default_rng(seed)
    ids, targets = rng.integers(0, 11, (2, rows, 9))
    for i, length in enumerate(rng.integers(1, 10, rows)):
        first = rng.integers(0, length)
        ids[i, length:] = 0
        targets[i, :first] = IGNORE
        targets[i, length:] = IGNORE
    targets[rng.random(rows) < 0.2] = IGNORE
    targets[0, 0] = 3
    return ids, targets


def one_step(batches, parts, threads=1, dtype="float32"):
    """(loss, gradients) of a step with dropout on these batches."""
    model, _ = adapted(0.4, dtype)
    with PartWorkers(model, parts, threads) as workers:
        loss = workers.backward(batches, seed=5, step=2)
    return loss, take_gradients(model)


def batches_apart_are_the_parts_of_one(n, rows, parts, threads, seed):
    ids, targets = padded_batch(n * rows, seed)
    loss, gradients = one_step([(ids, targets)], n * parts)
    apart = []
    for i in range(n):
        of_batch = slice(i * rows, (i + 1) * rows)
        # Filled up alone, a batch has fewer columns.
        is_used = (targets[of_batch] != IGNORE).any(axis=0)
        stop = 1 + np.flatnonzero(is_used)[-1] if is_used.any() else 9
        apart.append((ids[of_batch, :stop], targets[of_batch, :stop]))
    other_loss, other_gradients = one_step(apart, parts, threads)
    assert other_loss == loss
    assert same(other_gradients, gradients)


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.data(), seeds)
def test_n_batches_in_p_parts_are_one_batch_in_n_times_p(n, rows, parts, data, seed):
    batches_apart_are_the_parts_of_one(n, rows, parts, data.draw(st.integers(1, parts)), seed)


def test_a_part_ends_with_its_last_target_and_loses_nothing_by_it():
    ids, targets = padded_batch(6, seed=3)
    work = cut([(ids, targets)], 3)
    assert {part.ids.shape for part in work} == {part.targets.shape for part in work}
    assert all((part.targets[:, -1] != IGNORE).any() for part in work)
    assert sum(np.count_nonzero(part.targets != IGNORE) for part in work) == np.count_nonzero(targets != IGNORE)
    model, _ = adapted()
    agrees_with_the_plain_step(model, 3, ids, targets)


@given(st.integers(1, 9), st.integers(1, 9))
def test_a_batch_is_cut_at_whole_shares_of_its_rows(rows, parts):
    ids = np.arange(rows)[:, None]
    work = cut([(ids, ids)], parts)
    assert np.concatenate([part.ids for part in work]).tolist() == ids.tolist()
    assert {len(part.ids) for part in work} <= {rows // parts, -(-rows // parts)}


def the_share_of_the_batch(batches, parts, seed=None, step=0):
    return [replace(part, share=part.share * len(batches)) for part in cut(batches, parts, seed, step)]


def as_numpy_splits(batches, parts, seed=None, step=0):
    work = []
    for i, (ids, targets) in enumerate(batches):
        for j, (a, b) in enumerate(zip(np.array_split(ids, parts), np.array_split(targets, parts), strict=True)):
            for part in cut([(a, b)], 1) if (b != IGNORE).any() else []:
                share = (b != IGNORE).sum() / sum((t != IGNORE).sum() for _, t in batches)
                work.append(replace(part, share=share, rng=part_rng(seed, step, i * parts + j)))
    return work


def without_trimming(batches, parts, seed=None, step=0):
    T = max(ids.shape[1] for ids, _ in batches)
    wide = lambda a, fill: np.pad(a, ((0, 0), (0, T - a.shape[1])), constant_values=fill)
    return [replace(part, ids=wide(part.ids, 0), targets=wide(part.targets, IGNORE))
            for part in cut(batches, parts, seed, step)]  # fmt: skip


def each_batch_counts_its_own_parts(batches, parts, seed=None, step=0):
    n_targets = [np.count_nonzero(targets != IGNORE) for _, targets in batches]
    return [replace(part, share=np.count_nonzero(part.targets != IGNORE) / sum(n_targets))
            for batch, n in zip(batches, n_targets, strict=True) if n for part in cut([batch], parts, seed, step)]


@pytest.mark.parametrize("bug", [
    the_share_of_the_batch, as_numpy_splits, without_trimming, each_batch_counts_its_own_parts,
])  # fmt: skip
def test_what_the_cut_must_not_hang_on_is_noticed(bug, monkeypatch):
    monkeypatch.setattr("minilora.training.parts.cut", bug)
    with pytest.raises((AssertionError, ValueError)):
        for seed in range(8):
            batches_apart_are_the_parts_of_one(2, 5, 2, 1, seed)


def test_no_more_gradients_exist_than_workers_and_they_are_added_in_the_order_of_the_parts(monkeypatch):
    """The first part of each pair takes longest, and the sum is not the sooner for it."""
    model, _ = adapted()
    order, n_begun = [], []

    def late(replica, part):
        n_begun.append(part.ids[0, 1])
        assert len(n_begun) - len(order) <= 2
        time.sleep(0.02 * (part.ids[0, 1] % 2 == 0))
        return part.share, [np.full(1, float(part.ids[0, 1]))] + [None] * (len(replica.leaves) - 1)

    def listed(sums, gradients):
        order.append(int(gradients[0][0]))
        add_gradients(sums, gradients)

    monkeypatch.setattr("minilora.training.parts.part_gradients", late)
    monkeypatch.setattr("minilora.training.parts.add_gradients", listed)
    ids, targets = batch(6)
    ids[:, 1] = range(6)
    with PartWorkers(model, 6, 2) as workers:
        workers.backward([(ids, np.abs(targets) % 11)])
    assert order == list(range(6))


# Without a graph.


def test_what_is_evaluated_comes_in_the_order_of_the_parts_and_leaves_no_gradient():
    model, adapter = adapted()
    ids, targets = batch(7)
    for threads in (1, 2, 3):
        with PartWorkers(model, 3, threads) as workers, no_grad():
            found = list(workers.evaluate(lambda model, part: part.ids[:, 0].tolist(), [(ids, targets)] * 2))
        assert sum(found, []) == ids[:, 0].tolist() * 2
        assert len(workers.idle_replicas) == 0
    assert all(p.grad is None for p in adapter.parameters())


# What is drawn.


def test_each_part_of_each_step_draws_numbers_of_its_own_and_the_seed_says_which(monkeypatch):
    ids, targets = batch(1)
    # Two parts of one and the same row.
    twice = np.repeat(ids, 2, axis=0), np.repeat(targets, 2, axis=0)
    last_gradients = []

    def listed(sums, gradients):
        last_gradients.append(gradients[-1].copy())
        add_gradients(sums, gradients)

    monkeypatch.setattr("minilora.training.parts.add_gradients", listed)
    losses = {}
    for seed, step in ((1, 0), (1, 1), (2, 0)):
        losses[seed, step], _ = step_with_dropout(2, 2, *twice, seed=seed, step=step)
    assert len(set(losses.values())) == 3
    assert not np.allclose(last_gradients[0], last_gradients[1]), "the parts of one step"
    assert step_with_dropout(2, 2, *twice, seed=1, step=1)[0] == losses[1, 1]
    draws = {part_rng(seed, step, part).random() for seed in (0, 1) for step in (0, 1) for part in (0, 1)}
    assert len(draws) == 8


def test_without_a_seed_nothing_drops_out():
    ids, targets = batch(4)
    no_dropout, _ = step_with_dropout(2, 1, ids, targets, dropout=0.0)
    assert step_with_dropout(2, 1, ids, targets, seed=None)[0] == no_dropout
    assert step_with_dropout(2, 1, ids, targets)[0] != no_dropout


def test_a_part_keeps_its_generator_where_another_part_carries_no_loss():
    ids, targets = batch(4)
    targets[:2] = IGNORE
    targets[2:, 0] = 3
    [part] = cut([(ids, targets)], 2, seed=5, step=1)
    assert part.rng.random() == part_rng(5, 1, 1).random()


# Errors.


@pytest.mark.parametrize("row", [0, 3], ids=["in the first part", "in the other"])
def test_an_error_in_a_part_is_raised_and_leaves_everything_as_it_was(row):
    model, adapter = adapted()
    ids, targets = batch(4)
    with PartWorkers(model, 2, 2) as workers:
        workers.backward([(ids, targets)])
        before = [p.grad for p in adapter.parameters()]
        wrong = ids.copy()
        wrong[row, 0] = 99
        with pytest.raises(ValueError, match=r"token ids lie in .* 99"):
            workers.backward([(wrong, targets)])
        assert all(p.grad is d for p, d in zip(adapter.parameters(), before, strict=True))
        take_gradients(model)
        workers.backward([(ids, targets)])
        after_the_error = take_gradients(model)
    with PartWorkers(model, 2, 2) as workers:
        workers.backward([(ids, targets)])
    assert same(after_the_error, take_gradients(model))


@pytest.mark.parametrize("threads", [1, 2])
def test_ctrl_c_leaves_the_gradients_as_they_were(monkeypatch, threads):
    """Also where the first part has been added to the sum."""
    model, adapter = adapted()
    n_computed = []

    def interrupted(replica, part):
        n_computed.append(1)
        if len(n_computed) == 3:
            raise KeyboardInterrupt
        return part_gradients(replica, part)

    monkeypatch.setattr("minilora.training.parts.part_gradients", interrupted)
    with PartWorkers(model, 4, threads) as workers, pytest.raises(KeyboardInterrupt):
        workers.backward([batch(4)])
    assert all(p.grad is None for p in adapter.parameters())


@pytest.mark.parametrize("parts, threads", [(0, 0), (2, 0), (0, 1), (2, 3)])
def test_threads_without_a_part_and_no_threads_are_refused(parts, threads):
    model, _ = adapted()
    with pytest.raises(ValueError, match=f"parts {parts}, threads {threads}"):
        PartWorkers(model, parts, threads)


def test_a_batch_without_a_loss_and_shapes_that_differ_are_refused():
    model, _ = adapted()
    ids, targets = batch(4)
    with PartWorkers(model, 2, 2) as workers:
        with pytest.raises(ValueError, match="none of 24 targets"):
            workers.backward([(ids, np.full_like(targets, IGNORE))])
        with pytest.raises(ValueError, match=r"\(4, 6\).*\(3, 6\)"):
            workers.backward([(ids, targets[:3])])


def test_a_stack_takes_no_part_of_its_batch():
    _, adapter = adapted()
    stacked = attach(small_gpt(dtype="float64"), stack([adapter] * 4))
    with PartWorkers(stacked, 2) as workers, pytest.raises(ValueError, match="stacks 4 adapters.*got input"):
        workers.backward([batch(4)])


def test_add_gradients_adds_in_order_and_skips_what_is_not_there():
    sums = [None, None]
    add_gradients(sums, [np.full(2, 1, np.float32), None])
    add_gradients(sums, [np.full(2, 1e8, np.float32), None])
    add_gradients(sums, [np.full(2, -1e8, np.float32), np.full(2, 4, np.float32)])
    # (1 + 1e8) - 1e8 in float32: the order of the sum is that of the parts.
    assert [d.tolist() for d in sums] == [[0, 0], [4, 4]]


# Planted bugs.


def a_mean_of_means(batches, parts, seed=None, step=0):
    return [replace(part, share=0.5) for part in cut(batches, parts, seed, step)]


def no_sum(sums, gradients):
    pass


def twice_the_sum(sums, gradients):
    add_gradients(sums, gradients)
    sums[:] = [2 * d for d in sums]


@pytest.mark.parametrize("name, bug", [
    ("cut", a_mean_of_means), ("add_gradients", no_sum), ("add_gradients", twice_the_sum),
], ids=["a mean of means", "the sum left out", "twice the sum"])  # fmt: skip
def test_each_planted_bug_is_killed(name, bug, monkeypatch):
    model, _ = adapted()
    ids, targets = batch(4)
    # The halves do not weigh the same.
    targets[:2, :4] = IGNORE
    monkeypatch.setattr(f"minilora.training.parts.{name}", bug)
    with pytest.raises((AssertionError, TypeError)):
        agrees_with_the_plain_step(model, 2, ids, targets)


def test_a_replica_that_keeps_an_older_gradient_is_noticed(monkeypatch):
    def forgetful(replica, part):
        loss = replica.model.loss(part.ids, part.targets)
        loss.backward(np.full_like(loss.data, part.share))
        return part.share * loss.item(), [p.grad for p in replica.leaves]

    monkeypatch.setattr("minilora.training.parts.part_gradients", forgetful)
    with pytest.raises(AssertionError):
        test_a_gradient_that_is_there_is_added_to()


ONE_RNG = np.random.default_rng(0)


def one_rng_for_all(seed, step, part):
    return ONE_RNG


def one_rng_for_a_step(seed, step, part):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("bug", [one_rng_for_all, one_rng_for_a_step])
def test_a_generator_shared_by_the_parts_is_noticed(bug, monkeypatch):
    monkeypatch.setattr("minilora.training.parts.part_rng", bug)
    with pytest.raises(AssertionError):
        who_computes_a_part_changes_no_bit(3, *batch(6))
        test_each_part_of_each_step_draws_numbers_of_its_own_and_the_seed_says_which(monkeypatch)
