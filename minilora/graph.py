"""Nodes, edges, and the one walk that carries gradients along them. Knows no operation.

A result remembers its inputs as edges. An edge holds a vector-Jacobian product (VJP): the function
that turns a gradient of the result into gradients of those inputs. An operation states its VJPs;
chaining, adding up, ordering and freeing are written here, once.
"""

import contextlib
import contextvars

# A context variable: each thread has a value of its own.
_recording = contextvars.ContextVar("recording", default=True)


@contextlib.contextmanager
def no_grad():
    """Within this block, in this thread, no graph is recorded. Values are what they are outside it.

    Source: PyTorch's `torch.no_grad`.

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
    """A tensor's place in the graph: `edges` to its inputs, each `(nodes, vjp)`, but no values.

    Node and Tensor are separate objects: an edge then keeps alive only what its VJP uses, not the
    input's values. A leaf (a parameter) has no edges; `grad` comes to rest there.
    """

    # With __weakref__ a test can watch when a node is freed.
    __slots__ = ("shape", "edges", "grad", "__weakref__")

    def __init__(self, shape, edges=()):
        self.shape = shape
        self.edges = edges
        self.grad = None


def count_consumers(root):
    """{node: how often it is an input of another} for `root` and every node below it."""
    consumers = {root: 0}
    unvisited = [root]
    while unvisited:
        for nodes, _ in unvisited.pop().edges:
            for node in nodes:
                # An input that needs no gradient has no node.
                if node is None:
                    continue
                if node not in consumers:
                    consumers[node] = 0
                    unvisited.append(node)
                consumers[node] += 1
    return consumers


def backpropagate(root, dy):
    """Carry the gradient `dy` of `root` down to every leaf below, and add it to the leaf's `grad`.

    A node's gradient is complete once each of its consumers has added its part. Consumers are
    counted first, so each node is visited once. To recurse along every path instead would double
    the work at every residual connection: 2^n visits for n of them.
    """
    consumers = count_consumers(root)
    sums = GradientSums()
    sums.add(root, dy)
    complete = [root]
    while complete:
        node = complete.pop()
        dnode = sums.pop(node)
        if not node.edges:
            add_to_leaf(node, dnode)
        for nodes, vjp in node.edges:
            gradients = vjp(dnode)
            if not isinstance(gradients, tuple):
                gradients = (gradients,)
            for source, d in zip(nodes, gradients, strict=True):
                if source is None:
                    continue
                sums.add(source, unbroadcast(d, source.shape))
                consumers[source] -= 1
                if consumers[source] == 0:
                    complete.append(source)


class GradientSums:
    """The gradients of nodes on the way: of each, the sum of what consumers have added so far."""

    def __init__(self):
        self.gradients = {}
        # The nodes whose sum is in an array made here, into which more may be added in place.
        self.in_own_array = set()

    def add(self, node, d):
        """Add `d` to the sum of `node`."""
        if node not in self.gradients:
            self.gradients[node] = d
        elif node not in self.in_own_array:
            # A new array at the first addition: a VJP may have returned a view someone else holds.
            self.gradients[node] = self.gradients[node] + d
            self.in_own_array.add(node)
        else:
            self.gradients[node] += d

    def pop(self, node):
        """The sum of `node`, forgotten here, so that it is freed once it has been passed on."""
        return self.gradients.pop(node)


def add_to_leaf(leaf, d):
    """Add `d` to the `grad` of a leaf, in an array that no one else holds."""
    # The copy: a VJP may return a view, and .grad must own its memory.
    total = d.copy() if leaf.grad is None else leaf.grad + d
    # The sum of two 0-d arrays is a NumPy number, not an array; [...] makes it one.
    leaf.grad = total[...]


def unbroadcast(d, shape):
    """Sum the gradient `d` over the axes that broadcasting added or stretched, back to `shape`.

    Raises: ValueError with both shapes if `d` is not of a shape that `shape` broadcasts to.
    """
    if d.shape == shape:
        return d
    wrong = f"a VJP returned a gradient of shape {d.shape} for an input of shape {shape}"
    n_added = d.ndim - len(shape)
    if n_added < 0:
        raise ValueError(wrong)
    axes = list(range(n_added))
    for axis in range(n_added, d.ndim):
        if shape[axis - n_added] == 1 and d.shape[axis] != 1:
            axes.append(axis)
    summed = d.sum(axis=tuple(axes), keepdims=True)
    if summed.shape[n_added:] != shape:
        raise ValueError(wrong)
    return summed.reshape(shape)
