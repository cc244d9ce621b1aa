"""A step is a sum over the parts of its batch. Knows models that have a `loss`; nothing of LoRA.

Who computes a part changes no bit: each part has gradients of its own and a generator of its own,
and the sums over parts are made in their order. How many parts a batch is cut into, and how many
threads compute them, are therefore two settings.
"""

from concurrent.futures import ThreadPoolExecutor, wait
from contextvars import copy_context
from dataclasses import dataclass

import numpy as np

from ..backend import get_array_module, on_host
from ..functional import IGNORE
from ..packed import StoredTensor
from ..tensor import Tensor


@dataclass(frozen=True)
class Part:
    """Some rows of a batch: ids and targets (rows, T), and what belongs to them alone.

    `share` is the fraction of the batch's targets that is theirs: the weight of their mean loss.
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


def _twin(t):
    """A Tensor over the same array, with a gradient of its own; what is stored has none."""
    return t if isinstance(t, StoredTensor) else Tensor(t.data, t.requires_grad)


class PartWorkers:
    """`threads` replicas of `model`, which compute the `parts` of each batch.

    A replica shares the model's arrays and owns its gradients, so there is nothing to lock. BLAS
    spreads only matrix multiplications over the cores; threads spread the rest, because NumPy
    computes outside Python's lock. With one thread the parts are computed one after the other. The
    gradients of all parts of a step exist at once. A model from `stack` fixes the rows of its
    batch, so it takes one part.

    Raises: ValueError unless 1 <= threads <= parts.
    """

    def __init__(self, model, parts=1, threads=1):
        check_parts(parts, threads)
        self.parts = parts
        self.leaves = trainable(model)
        self.replicas = [Replica(model) for _ in range(threads)]
        # This thread computes as well. The pool starts no thread before there is work for it.
        self.pool = ThreadPoolExecutor(max(1, threads - 1))

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        self.pool.shutdown()

    def backward(self, ids, targets, *, seed=None, step=0):
        """The mean loss of a batch, a float; its gradient is added to the `.grad` of the model.

        With a `seed`, layers drop out: each part draws from a generator that seed, step and the
        number of the part determine.

        Shapes: ids and targets (B, T), cut along B. A target of -100 carries no loss; a part all
        of whose targets are -100 is not computed.
        Raises: as `model.loss`, with the gradients left as they were.
        """
        work = cut(ids, targets, self.parts, seed, step)
        for replica in self.replicas:
            # Adam writes in place, but another optimizer may put new arrays into the model.
            for twin, leaf in zip(replica.leaves, self.leaves, strict=True):
                twin.data = leaf.data
        n_threads = len(self.replicas)
        work_of_thread = [work[i::n_threads] for i in range(n_threads)]
        other_threads = []
        try:
            for i in range(1, n_threads):
                # The context carries no_grad() and np.errstate into the thread.
                run = copy_context().run
                other_threads.append(
                    self.pool.submit(run, _compute, self.replicas[i], work_of_thread[i])
                )
            results = [_compute(self.replicas[0], work_of_thread[0])]
            results += [thread.result() for thread in other_threads]
        finally:
            # Even after an error or Ctrl-C: wait until no thread computes any more.
            wait(other_threads)
        # Part i was computed by thread i % n_threads, as its number i // n_threads.
        in_order = [results[i % n_threads][i // n_threads] for i in range(len(work))]
        for _, gradients in in_order:
            add_gradients(self.leaves, gradients)
        return sum(loss for loss, _ in in_order)


def check_parts(parts, threads):
    """Raise ValueError unless 1 <= threads <= parts."""
    if not 1 <= threads <= parts:
        raise ValueError(
            f"parts {parts}, threads {threads}: a batch is cut into at least one part, "
            "and no more threads can work than there are parts"
        )


def cut(ids, targets, parts, seed=None, step=0):
    """The batch as a list of at most `parts` Parts, those without a loss left out."""
    ids = on_host(ids)
    targets = on_host(targets)
    if ids.shape != targets.shape:
        raise ValueError(f"ids {ids.shape}, targets {targets.shape}: one target for each id")
    n_targets = np.count_nonzero(targets != IGNORE)
    if n_targets == 0:
        # Let the model raise: it says why there is no loss.
        return [Part(ids, targets, 1.0, part_rng(seed, step, 0))]
    work = []
    pieces = zip(np.array_split(ids, parts), np.array_split(targets, parts), strict=True)
    for i, (part_ids, part_targets) in enumerate(pieces):
        n = np.count_nonzero(part_targets != IGNORE)
        if n:
            work.append(Part(part_ids, part_targets, n / n_targets, part_rng(seed, step, i)))
    return work


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


def _compute(replica, work):
    """What one thread does: its parts, one after the other."""
    return [part_gradients(replica, part) for part in work]


def add_gradients(leaves, gradients):
    """Add `gradients`, arrays or None, into the `.grad` of `leaves`, in their order.

    The arrays become the leaves' own. Where replicas meet: gradients from other processes, or from
    other machines, would be added here as well.
    """
    for p, d in zip(leaves, gradients, strict=True):
        if d is None:
            continue
        if p.grad is not None:
            # In the array of the part, which nobody else holds.
            d += p.grad
        p.grad = d


def trainable(model):
    """The tensors of `model` that a gradient is for."""
    return [p for p in model.parameters() if p.requires_grad]
