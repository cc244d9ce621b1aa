"""A batch in parts, each on a thread with a replica of the model. Knows models that have a `loss`; nothing of LoRA."""

from concurrent.futures import ThreadPoolExecutor, wait
from contextvars import copy_context

import numpy as np

from ..backend import get_array_module, on_host
from ..functional import IGNORE
from ..tensor import Tensor


class Replicas:
    """`model` and n - 1 twins, which share its arrays but own their gradients, so that there is nothing to lock.

    NumPy computes outside Python's lock: threads then share out what BLAS leaves to one core, all that is not a matrix
    multiplication. Each should have its share of BLAS's threads (`process.blas_threads`). With n = 1 there is no
    thread, and nothing but `model.loss` and its `backward`. Dropout draws other numbers for another n. A model from
    `stack` has as many rows as its batch, so it takes n = 1.
    Raises: ValueError unless n is at least 1.
    """

    def __init__(self, model, n):
        if n < 1:
            raise ValueError(f"Replicas: n must be at least 1, got {n}")
        self.models = [model, *(model.map_tensors(lambda t: Tensor(t.data, t.requires_grad)) for _ in range(n - 1))]
        self.leaves = [[p for p in m.parameters() if p.requires_grad] for m in self.models]
        self.modules = [[module for _, module in m.named_modules()] for m in self.models]
        self.generators = {}  # id: (generator of the model, [(number of the module that draws from it, attribute)])
        for i, module in enumerate(self.modules[0]):
            for key, value in vars(module).items():
                if isinstance(value, np.random.Generator):
                    self.generators.setdefault(id(value), (value, []))[1].append((i, key))
        self.pool = ThreadPoolExecutor(max(1, n - 1))  # no thread is started before there is work for it

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        self.pool.shutdown()

    def backward(self, ids, targets):
        """The mean loss of a batch, as a float; its gradient is added to the `.grad` of the tensors of `model`.

        Shapes: ids and targets (B, T), cut along B; a target of -100 carries no loss, and a part without any other is
        not computed. The sum over the parts is made in their order: the same batch and n give the same bits.
        Raises: as `model.loss`, with the gradients left as they were.
        """
        ids, targets, n = on_host(ids), on_host(targets), len(self.models)
        if ids.shape != targets.shape:
            raise ValueError(f"Replicas: ids {ids.shape}, targets {targets.shape}: one target for each id")
        parts = zip(np.array_split(ids, n), np.array_split(targets, n), strict=True)
        parts = [part for part in parts if _carrying(part)] or [(ids, targets)]  # if none does, the model says so
        whole = max(1, _carrying((ids, targets)))
        work = [(model, *part, _carrying(part) / whole) for model, part in zip(self.models, parts, strict=False)]
        self._refresh_twins()
        before, others = [p.grad for p in self.leaves[0]], []
        try:
            for each in work[1:]:
                others.append(self.pool.submit(copy_context().run, _backward, *each))
            losses = [_backward(*work[0]), *(other.result() for other in others)]
        except BaseException:  # Ctrl-C as well
            for p, d in zip(self.leaves[0], before, strict=True):
                p.grad = d
            raise
        finally:
            wait(others)
        add_gradients(*self.leaves)
        return sum(losses)

    def _refresh_twins(self):
        """The model's arrays, no gradients, and for each generator of the model one of their own, drawn from it."""
        for modules, leaves in zip(self.modules[1:], self.leaves[1:], strict=True):
            for p, q in zip(self.leaves[0], leaves, strict=True):
                q.data, q.grad = p.data, None
            for generator, places in self.generators.values():
                own = np.random.default_rng(generator.integers(2**63))
                for i, key in places:
                    setattr(modules[i], key, own)


def _carrying(part):
    """How many targets of (ids, targets) carry a loss."""
    return np.count_nonzero(part[1] != IGNORE)


def _backward(model, ids, targets, share):
    """The share that a part has in the loss of its batch; what it gives to the gradient is added to the model's."""
    loss = model.loss(ids, targets)
    loss.backward(get_array_module(loss.data).full_like(loss.data, share))
    return float(share) * loss.item()


def add_gradients(leaves, *others):
    """Move the gradients of `others`, lists of Tensors like `leaves`, into those of `leaves`, in their order.

    Where replicas meet: gradients from other processes, or from other machines, would be added here as well.
    """
    for p, *replicas in zip(leaves, *others, strict=True):
        for q in replicas:
            if q.grad is not None:
                if p.grad is not None:
                    q.grad += p.grad  # in the array of the twin, which nobody else holds
                p.grad, q.grad = q.grad, None
