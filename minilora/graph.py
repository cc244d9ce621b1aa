"""Nodes, edges, and the one walk that carries gradients along them. Knows nothing of values or of operations.

A result remembers its inputs as edges; an edge holds a vector-Jacobian product (VJP), the function that turns
a gradient of the result into gradients of those inputs. An operation states its VJPs; chaining, adding up,
ordering and freeing are written here, once.
"""

import contextlib
import contextvars

_recording = contextvars.ContextVar("recording", default=True)  # one value per thread


@contextlib.contextmanager
def no_grad():
    """Within this block (and this thread) no graph is recorded and dropout does nothing.

    Shapes: touches no array. Raises: nothing of its own. Source: PyTorch's `torch.no_grad`.

    >>> from minilora import Tensor
    >>> w = Tensor([2.0], requires_grad=True)
    >>> with no_grad():
    ...     (w * w).requires_grad
    False
    """
    token = _recording.set(False)
    try:
        yield
    finally:
        _recording.reset(token)


def is_recording():
    """False inside `no_grad()`, True elsewhere."""
    return _recording.get()


class Node:
    """A tensor's place in the graph: `edges` to its inputs, each `(nodes, vjp)`, but never its values.

    It is an object apart from the Tensor so that an edge keeps alive only what its VJP closes over.
    A leaf (a parameter) has no edges; it is where `grad` comes to rest.
    """

    __slots__ = ("shape", "edges", "grad", "__weakref__")

    def __init__(self, shape, edges=()):
        self.shape, self.edges, self.grad = shape, edges, None


def count_consumers(root):
    """{node: how many inputs of others it is} for `root` and every node below it, each visited once."""
    consumers, unseen = {root: 0}, [root]
    while unseen:
        for nodes, _ in unseen.pop().edges:
            for node in nodes:
                if node is None:
                    continue
                if node not in consumers:
                    consumers[node] = 0
                    unseen.append(node)
                consumers[node] += 1
    return consumers


def backpropagate(root, dy):
    """Carry the gradient `dy` of `root` down to every leaf below it, and add it to the leaf's `grad`.

    A node's gradient is complete once each of its consumers has added a part, so consumers are counted
    first and each node is visited once. Recursing along every path instead would double the work at
    every residual connection: 2^n visits for n of them.
    """
    consumers = count_consumers(root)
    gradients, complete, sums = {root: dy}, [root], set()
    while complete:
        node = complete.pop()
        dnode = gradients.pop(node)  # an interior gradient is freed as soon as it has been passed on
        if not node.edges:  # a leaf. The copy: VJPs may return views, and .grad must own its memory
            total = dnode.copy() if node.grad is None else node.grad + dnode
            node.grad = total[...]  # an array even where NumPy makes a number of a 0-d sum
        for nodes, vjp in node.edges:
            ds = vjp(dnode)
            for source, d in zip(nodes, ds if isinstance(ds, tuple) else (ds,), strict=True):
                if source is None:
                    continue
                d = unbroadcast(d, source.shape)
                if source not in gradients:
                    gradients[source] = d
                elif source not in sums:  # never in place what a VJP returned: others may hold it
                    gradients[source] = gradients[source] + d
                    sums.add(source)
                else:
                    gradients[source] += d
                consumers[source] -= 1
                if consumers[source] == 0:
                    complete.append(source)


def unbroadcast(d, shape):
    """Sum the gradient `d` over the axes that broadcasting added or stretched, back to `shape`."""
    if d.shape == shape:
        return d
    added = d.ndim - len(shape)
    stretched = tuple(i for i in range(max(added, 0), d.ndim) if shape[i - added] == 1 != d.shape[i])
    summed = d.sum(axis=(*range(added), *stretched), keepdims=True)
    if summed.shape[added:] != shape or added < 0:
        raise ValueError(f"a VJP returned a gradient of shape {d.shape} for an input of shape {shape}")
    return summed.reshape(shape)
