"""A batch in parts, each on a thread with a replica of the model. Knows models that have a `loss`; nothing of LoRA."""

from concurrent.futures import ThreadPoolExecutor, wait
from contextvars import copy_context

import numpy as np

from .backend import get_array_module, on_host
from .functional import IGNORE
from .tensor import Tensor


class Replicas:
    """`model` and n - 1 twins, which share its arrays but own their gradients, so that there is nothing to lock.

    NumPy computes outside Python's lock: threads then share out what BLAS leaves to one core, all that is not a matrix
    multiplication. Each should have its share of BLAS's threads (`process.blas_threads`). With n = 1 there is no
    thread, and nothing but `model.loss` and its `backward`. Dropout draws other numbers for another n.
    Raises: ValueError unless n is at least 1.
    """

    def __init__(self, model, n):
        if n < 1:
            raise ValueError(f"Replicas: n must be at least 1, got {n}")
        twins = [model.map_tensors(lambda t: Tensor(t.data, t.requires_grad)) for _ in range(n - 1)]
        self.models = [model, *twins]
        self.leaves = [[p for p in m.parameters() if p.requires_grad] for m in self.models]
        self.random = [[
            (theirs, key, generator) for (_, ours), (_, theirs) in
            zip(model.named_modules(), twin.named_modules(), strict=True)
            for key, generator in vars(ours).items() if isinstance(generator, np.random.Generator)
        ] for twin in twins]  # fmt: skip
        self.pool = ThreadPoolExecutor(n)  # no thread is started before there is work for it

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        self.pool.shutdown()

    def backward(self, ids, targets):
        """The mean loss of a batch, as a float; its gradient is added to the `.grad` of the tensors of `model`.

        Shapes: ids and targets (B, T), cut along B; a target of -100 carries no loss. The sum over the parts is made
        in their order: the same batch and the same n give the same bits.
        Raises: as `model.loss`.
        """
        ids, targets, n = on_host(ids), on_host(targets), len(self.models)
        if ids.shape != targets.shape:
            raise ValueError(f"Replicas: ids {ids.shape}, targets {targets.shape}: one target for each id")
        parts = list(zip(range(n), np.array_split(ids, n), np.array_split(targets, n), strict=True))
        carrying = [np.count_nonzero(part[2] != IGNORE) for part in parts]
        if n == 1 or not all(carrying):  # too few rows, or labels in too few of them: the model alone
            return _backward(self.models[0], ids, targets, 1)
        for leaves, random in zip(self.leaves[1:], self.random, strict=True):
            for p in leaves:
                p.grad = None
            own = {id(generator): np.random.default_rng(generator.integers(2**63)) for _, _, generator in random}
            for module, key, generator in random:
                setattr(module, key, own[id(generator)])
        shares = [c / sum(carrying) for c in carrying]
        work = [(self.models[i], *part, share) for (i, *part), share in zip(parts, shares, strict=True)]
        others = [self.pool.submit(copy_context().run, _backward, *each) for each in work[1:]]
        try:
            losses = [_backward(*work[0]), *(other.result() for other in others)]
        finally:
            wait(others)
        add_gradients(*self.leaves)
        return sum(losses)


def _backward(model, ids, targets, share):
    """The share that a part has in the loss of its batch; what it gives to the gradient is added to the model's."""
    loss = model.loss(ids, targets)
    loss.backward(get_array_module(loss.data).full_like(loss.data, share))
    return float(share) * loss.item()


def add_gradients(leaves, *others):
    """Add the gradients of `others`, lists of Tensors like `leaves`, to those of `leaves`, in their order.

    Where replicas meet: gradients from other processes, or from other machines, would be added here as well.
    """
    for p, *replicas in zip(leaves, *others, strict=True):
        for q in replicas:
            if q.grad is not None:
                p.grad = q.grad if p.grad is None else p.grad + q.grad
