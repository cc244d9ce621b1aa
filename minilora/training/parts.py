"""A step is a sum over the parts of its batches. Knows models that have a `loss`; nothing of LoRA.

Who computes a part changes no bit: each part has gradients of its own, a generator of its own and
one thread of BLAS, and the sums over parts are made in their order. How many parts a batch is cut
into, and how many workers compute them, are therefore two settings.
"""

import contextlib
from collections import deque
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextvars import copy_context
from dataclasses import dataclass

import numpy as np

from ..backend import get_array_module, on_host
from ..functional import IGNORE
from ..packed import StoredTensor
from ..tensor import Tensor
from .threads import blas_threads, check_parts, limit_this_thread


@dataclass(frozen=True)
class Part:
    """Some rows of a batch: ids and targets (rows, T), and what belongs to them alone.

    `share` is the fraction of the step's targets that is theirs: the weight of their mean loss.
    `rng` is what their dropout draws from, or None for no dropout.
    """

    ids: np.ndarray
    targets: np.ndarray
    share: float
    rng: np.random.Generator | None


class Replica:
    """A model over the same arrays as another, with gradients of its own."""

    def __init__(self, model):
        self.model = model.map_tensors(_twin)
        self.leaves = trainable(self.model)

    def put(self, arrays):
        """Compute with these arrays in the place of the leaves' own, from now on."""
        for leaf, array in zip(self.leaves, arrays, strict=True):
            leaf.data = array


def _twin(t):
    """A Tensor over the same array, with a gradient of its own; what is stored has none."""
    return t if isinstance(t, StoredTensor) else Tensor(t.data, t.requires_grad)


class Workers:
    """`n` workers for the parts of each batch of `model`, and the sums over their parts.

    Who they are is a subclass's to say. Its `submit_step(part)` gives a Future of the part's
    `part_gradients`, and `submit(function, part)` one of `function(model, part)`, without a graph.
    """

    def __init__(self, model, parts, n):
        self.parts = parts
        self.n = n
        self.leaves = trainable(model)

    def backward(self, batches, *, seed=None, step=0):
        """The mean loss over the batches of one step, a float; its gradient is added to the model.

        With a `seed`, layers drop out: each part draws from a generator that seed, step and the
        number of the part determine. At most `n` gradients exist beside their sum.

        Shapes: `batches` is a list of (ids, targets), each (B, T), cut along B. A target of -100
        carries no loss; a part all of whose targets are -100 is not computed.
        Raises: as `model.loss`, with the gradients left as they were.
        """
        work = cut(batches, self.parts, seed, step)
        loss = 0.0
        sums = [None] * len(self.leaves)
        with contextlib.closing(in_order(self.submit_step, work, self.n)) as results:
            for part_loss, gradients in results:
                loss += part_loss
                add_gradients(sums, gradients)
        for p, d in zip(self.leaves, sums, strict=True):
            if d is not None:
                p.grad = d if p.grad is None else p.grad + d
        return loss

    def evaluate(self, function, batches):
        """`function(model, part)` of every Part of `batches`, (ids, targets), in their order.

        `function` is found by its name, so that other processes find it too.
        """
        work = (part for batch in batches for part in cut([batch], self.parts))
        return in_order(lambda part: self.submit(function, part), work, self.n)


def in_order(submit, tasks, n):
    """The results of `submit(task)`, a Future, in the order of the tasks; at most `n` exist.

    Whoever leaves early closes this generator, which waits until nobody computes any more.
    """
    under_way = deque()
    try:
        for task in tasks:
            under_way.append(submit(task))
            if len(under_way) == n:
                yield under_way[0].result()
                under_way.popleft()
        while under_way:
            yield under_way[0].result()
            under_way.popleft()
    finally:
        # Nothing is left but after an error or Ctrl-C.
        for future in under_way:
            future.cancel()
        wait(under_way)


class PartWorkers(Workers):
    """`threads` of this process, which compute the `parts` of each batch.

    Each has a replica, which shares the model's arrays and owns its gradients, so there is nothing
    to lock. BLAS spreads only matrix multiplications over the cores; threads spread the rest,
    because NumPy computes outside Python's lock. Within this context each part computes with one
    thread of BLAS; a batch in one part, with as many as BLAS takes. A model from `stack` fixes the
    rows of its batch, so it takes one part.

    Raises: ValueError unless 1 <= threads <= parts; on entering, if another training of this
    process computes with another number of threads of BLAS.
    """

    def __init__(self, model, parts=1, threads=1):
        check_parts(parts, threads)
        super().__init__(model, parts, threads)
        self.model = model
        # Made where they are needed: to evaluate takes none.
        self.idle_replicas = deque()
        # A pool starts no thread before there is work for it.
        self.pool = _ThisThread()
        if threads > 1:
            self.pool = ThreadPoolExecutor(threads, initializer=limit_this_thread, initargs=(1,))
        self.blas = contextlib.nullcontext()
        if all(p.xp is np for p in model.parameters()):
            # By parts, not by threads: BLAS on another number of threads may round differently.
            self.blas = blas_threads(None if parts == 1 else 1)

    def __enter__(self):
        self.blas.__enter__()
        return self

    def __exit__(self, *raised):
        self.pool.shutdown()
        self.blas.__exit__(*raised)

    def submit_step(self, part):
        """A Future of what a replica makes of the part."""
        return self._run(self._step, part)

    def submit(self, function, part):
        """A Future of `function(model, part)`."""
        return self._run(function, self.model, part)

    def _run(self, function, *arguments):
        # The context carries no_grad() and np.errstate into the thread.
        return self.pool.submit(copy_context().run, function, *arguments)

    def _step(self, part):
        try:
            replica = self.idle_replicas.pop()
        except IndexError:
            replica = Replica(self.model)
        # Adam writes in place, but another optimizer may put new arrays into the model.
        replica.put([leaf.data for leaf in self.leaves])
        result = part_gradients(replica, part)
        self.idle_replicas.append(replica)
        return result


class _ThisThread(Executor):
    """An executor of no threads: what is submitted is computed at once."""

    def submit(self, function, *arguments):
        future = Future()
        future.set_result(function(*arguments))
        return future


def cut(batches, parts, seed=None, step=0):
    """The batches of one step as a list of Parts, those without a loss left out.

    Each batch is cut at row i · rows // parts, for i below `parts`. N batches of B rows in P parts
    are therefore the very parts of one batch of N·B rows in N·P parts. Each part ends with its last
    target: whatever else its batch was filled up for comes later, where nothing looks.
    """
    batches = [_checked(ids, targets) for ids, targets in batches]
    n_targets = sum(np.count_nonzero(targets != IGNORE) for _, targets in batches)
    if n_targets == 0:
        # Let the model raise: it says why there is no loss.
        ids, targets = batches[0]
        return [Part(ids, targets, 1.0, part_rng(seed, step, 0))]
    work = []
    for i, (ids, targets) in enumerate(batches):
        rows = len(ids)
        for j in range(parts):
            chosen = slice(j * rows // parts, (j + 1) * rows // parts)
            has_loss = targets[chosen] != IGNORE
            columns = np.flatnonzero(has_loss.any(axis=0))
            if columns.size:
                where = (chosen, slice(columns[-1] + 1))
                share = np.count_nonzero(has_loss) / n_targets
                rng = part_rng(seed, step, i * parts + j)
                work.append(Part(ids[where], targets[where], share, rng))
    return work


def _checked(ids, targets):
    """Both on the host, where each id (B, T) has a target."""
    ids = on_host(ids)
    targets = on_host(targets)
    if ids.shape != targets.shape or ids.ndim != 2:
        raise ValueError(
            f"ids {ids.shape}, targets {targets.shape}: both are (B, T), one target for each id"
        )
    return ids, targets


def part_rng(seed, step, part):
    """The generator from which one part of one step draws its dropout; None without a seed."""
    if seed is None:
        return None
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(step, part)))


def part_gradients(replica, part):
    """(the part's share of the loss, the gradients of the replica's leaves)."""
    leaves = replica.leaves
    for p in leaves:
        p.grad = None
    loss = replica.model.loss(part.ids, part.targets, rng=part.rng)
    loss.backward(get_array_module(loss.data).full_like(loss.data, part.share))
    gradients = [p.grad for p in leaves]
    # The replica lets go of them: the caller owns them now, and they are not held twice.
    for p in leaves:
        p.grad = None
    return part.share * loss.item(), gradients


def add_gradients(sums, gradients):
    """Add `gradients`, arrays or None, to the list `sums` of the same, in whose place they are.

    The arrays become those of `sums`. Where replicas meet, also those of other processes and of
    other machines.
    """
    for i, d in enumerate(gradients):
        if d is None:
            continue
        if sums[i] is not None:
            # In the array of the part, which nobody else holds.
            d += sums[i]
        sums[i] = d


def trainable(model):
    """The tensors of `model` that a gradient is for."""
    return [p for p in model.parameters() if p.requires_grad]
