"""The graph: order, sums, freeing and freezing. What flows is counted, and what is held is watched."""

import contextlib
import gc
import threading
import types
import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ops import OPS, draw, record_replaced
from strategies import arrays, rngs, shapes

from minilora import Tensor, no_grad
from minilora import functional as F
from minilora.graph import Node, is_recording, unbroadcast
from minilora.tensor import record


def leaf(*values):
    return Tensor(np.array(values), requires_grad=True)


@contextlib.contextmanager
def watched(around):
    """Every VJP recorded within this block is replaced by `around(vjp)`."""
    watching = lambda y, *edges: record(y, *[(inputs, around(vjp)) for inputs, vjp in edges])
    with record_replaced(watching):
        yield


@contextlib.contextmanager
def no_garbage_collector():
    """Within this block an object dies only because nothing refers to it."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# --- the sums are right ----------------------------------------------------------------------------------------------


def test_a_diamond_adds_up_both_sides():
    x = leaf(3.0)
    square, triple = x * x, 3.0 * x
    (square * triple).sum().backward()  # 3 x³
    assert x.grad == 9 * 3.0**2


def test_a_leaf_used_twice_in_one_operation_gets_both_parts():
    x = leaf(2.0, 5.0)
    (x * x).sum().backward()
    assert np.array_equal(x.grad, [4, 10])


@given(st.integers(1, 20))
def test_fan_out_adds_up_every_use(n):
    x = leaf(1.0, 2.0)
    h = x * 3.0
    total = h
    for i in range(1, n):
        total = total + h * float(i)
    total.backward(np.array([1.0, 10.0]))
    factor = 3 * (1 + n * (n - 1) / 2)
    assert np.array_equal(x.grad, [factor, 10 * factor])


def test_a_sum_is_never_made_in_an_array_that_a_vjp_returned():
    """Both sides of an addition are given one array: what is added to one of them must not reach the other."""
    x, z = leaf(1.0, 2.0), leaf(5.0, 6.0)
    h, g = x * 1.0, z * 1.0
    y = (h + g) * 2.0 + (h + g) * 4.0 + (h + g) * 8.0
    y.backward(np.array([1.0, 10.0]))
    assert np.array_equal(x.grad, [14, 140]) and np.array_equal(z.grad, [14, 140])


def test_one_tensor_in_all_places_of_a_shared_edge_gets_the_sum():
    x = np.random.default_rng(0).normal(size=(2, 3, 4))
    dy = np.random.default_rng(1).normal(size=(2, 3, 4))
    same, apart = Tensor(x, requires_grad=True), [Tensor(x, requires_grad=True) for _ in range(3)]
    F.attention(same, same, same, 2).backward(dy)
    F.attention(*apart, 2).backward(dy)
    assert np.allclose(same.grad, sum(t.grad for t in apart), rtol=1e-14)


@pytest.mark.parametrize("trainable", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_a_shared_edge_serves_only_the_inputs_that_want_a_gradient(trainable):
    rng = np.random.default_rng(0)
    qkv, dy = rng.normal(size=(3, 2, 3, 4)), rng.normal(size=(2, 3, 4))
    every = [Tensor(x, requires_grad=True) for x in qkv]
    some = [Tensor(x, requires_grad=i in trainable) for i, x in enumerate(qkv)]
    for tensors in (every, some):
        F.attention(*tensors, 2).backward(dy)
    for i in range(3):
        assert np.array_equal(some[i].grad, every[i].grad) if i in trainable else some[i].grad is None


@given(rngs)
def test_backward_twice_accumulates_exactly_twice_the_gradient(rng):
    x, w = (Tensor(rng.normal(size=(3, 3)), requires_grad=True) for _ in range(2))
    loss = ((x @ w).tanh() * x).sum()
    loss.backward()
    once = x.grad.copy(), w.grad.copy()
    loss.backward()
    assert np.array_equal(x.grad, 2 * once[0]) and np.array_equal(w.grad, 2 * once[1])


@given(arrays(shapes()))
def test_a_leaf_is_its_own_gradient(x):
    t, dy = Tensor(x, requires_grad=True), np.full(x.shape, 3.0)
    t.backward(dy)
    assert np.array_equal(t.grad, dy) and not np.shares_memory(t.grad, dy)


@given(shapes(0, 3), st.data())
def test_unbroadcast_is_the_transpose_of_broadcasting(shape, data):
    """Σ broadcast(x) · d = Σ x · unbroadcast(d) for every x: in whole numbers, so exactly."""
    narrow = tuple(data.draw(st.sampled_from([1, n])) for n in shape)
    narrow = narrow[data.draw(st.integers(0, len(shape))) :]
    rng = data.draw(rngs)
    x, d = (rng.integers(-4, 5, s).astype(float) for s in (narrow, shape))
    back = unbroadcast(d, narrow)
    assert back.shape == narrow
    assert np.sum(np.broadcast_to(x, shape) * d) == np.sum(x * back)


@pytest.mark.parametrize("d, shape", [((2, 3), (2,)), ((3,), (2, 3)), ((2, 2), (2, 1, 2)), ((), (1,)), ((2,), (3,))])
def test_a_vjp_of_the_wrong_shape_is_named_with_both_shapes(d, shape):
    with pytest.raises(ValueError) as error:
        record(np.zeros(2), (Tensor(np.zeros(shape), True), lambda dy: np.zeros(d))).backward(np.ones(2))
    assert str(d) in str(error.value) and str(shape) in str(error.value)


def test_a_shared_edge_with_too_few_gradients_is_an_error():
    y = record(np.zeros(2), ((leaf(1.0, 2.0), leaf(3.0, 4.0)), lambda dy: (dy,)))
    with pytest.raises(ValueError):
        y.backward(np.ones(2))


# --- the walk is linear and does not recurse -------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 10, 60])
def test_each_vjp_of_n_residual_blocks_is_called_exactly_once(n):
    """Along paths there would be 2ⁿ visits: with 60 blocks this test would not end."""
    made, called = [], []

    def around(vjp):
        made.append(vjp)
        return lambda dy: (called.append(vjp), vjp(dy))[1]

    with watched(around):
        x = h = leaf(0.1, 0.2)
        for _ in range(n):
            h = h + (h * 0.5).tanh()
        h.sum().backward()
    constants = n  # 0.5 is an input without a gradient: its edge was made and dropped
    assert len(called) == len(made) - constants == 4 * n + 1
    assert len(set(map(id, called))) == len(called)
    assert x.grad is not None


def test_a_chain_of_20000_operations_runs_backward_and_is_deleted():
    x = h = leaf(1.0)
    for _ in range(20_000):
        h = -h
    h.backward()
    assert x.grad == 1.0
    with no_garbage_collector():
        last = weakref.ref(h.node)
        del h
        assert last() is None


# --- what is kept, what is freed, what is shared ---------------------------------------------------------------------


def test_only_leaves_have_a_gradient_afterwards():
    x = leaf(1.0, 2.0)
    h = x * 2.0
    y = h.sum()
    y.backward()
    assert (h.grad, y.grad) == (None, None) and np.array_equal(x.grad, [2, 2])
    x.grad = None
    assert x.grad is None


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_a_gradient_shares_memory_with_nothing(op):
    """Not with the cotangent, the data, another gradient, or the array that was there before: all may be written."""
    tensors = [Tensor(x, requires_grad=True) for x in draw(op, np.random.default_rng(0))]
    y = op.function(*tensors)
    dy = np.ones(y.shape)
    y.backward(dy)
    first = [t.grad for t in tensors]
    y.backward(dy)
    arrays = [dy, y.data, *first, *(t.grad for t in tensors), *(t.data for t in tensors)]
    for gradient in [*first, *(t.grad for t in tensors)]:
        assert isinstance(gradient, np.ndarray) and gradient.flags.writeable
        assert not any(np.shares_memory(gradient, a) for a in arrays if a is not gradient)


@pytest.mark.parametrize("shape", [(), (2,)], ids=str)
def test_a_gradient_is_an_array_like_its_tensor(shape, xp):
    x = Tensor(xp.full(shape, 2.0, np.float32), requires_grad=True)
    for _ in range(2):
        (x * x).sum().backward()
        assert type(x.grad) is xp.ndarray and (x.grad.shape, x.grad.dtype) == (shape, np.float32)


def test_interior_gradients_are_freed_while_backward_runs():
    """Along a chain of 30 operations at most a few of their 30 gradients are alive at once, and in the end none."""
    seen, alive = [], []

    def around(vjp):
        def watching(dy):
            seen.append(weakref.ref(dy))
            alive.append(sum(ref() is not None for ref in seen))
            return vjp(dy)

        return watching

    with watched(around), no_garbage_collector():
        x = h = leaf(*np.linspace(0, 1, 5))
        for _ in range(30):
            h = h.tanh()
        h.backward(np.ones(5))
        assert len(seen) == 30 and max(alive) <= 3
        assert [ref() for ref in seen] == [None] * 30
        assert x.grad is not None


def test_a_forward_leaves_no_reference_cycles():
    """When the result is dropped, its whole graph goes at once, without waiting for the garbage collector."""
    with no_garbage_collector():
        for op in OPS:
            y = op.function(*[Tensor(x, requires_grad=True) for x in draw(op, np.random.default_rng(0))])
            node, data = weakref.ref(y.node), weakref.ref(y.data)
            del y
            assert (node(), data()) == (None, None), op.name


def contents(x):
    """What a closure can reach: through functions, containers and objects, but not into arrays, modules or types."""
    seen, unseen = {}, [x]
    while unseen:
        x = unseen.pop()
        if id(x) in seen or isinstance(x, (np.ndarray, types.ModuleType, type)):
            continue
        seen[id(x)] = x
        if isinstance(x, types.FunctionType):
            unseen += [cell.cell_contents for cell in x.__closure__ or ()]
            unseen += [*(x.__defaults__ or ()), *(x.__kwdefaults__ or {}).values()]
        elif isinstance(x, (tuple, list, set)):
            unseen += x
        elif isinstance(x, dict):
            unseen += x.values()
        elif hasattr(x, "__dict__"):
            unseen += vars(x).values()
    return seen.values()


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_vjps_hold_arrays_and_never_tensors_or_nodes(op):
    vjps = []
    with watched(lambda vjp: vjps.append(vjp) or vjp):
        op.function(*[Tensor(x, requires_grad=True) for x in draw(op, np.random.default_rng(0))])
    assert len(vjps) > 0
    assert [x for x in contents(vjps) if isinstance(x, (Tensor, Node))] == []


def test_the_search_for_tensors_finds_them():
    t = leaf(1.0)
    holder = types.SimpleNamespace(inside=[{"deep": (t,)}])
    for vjp in (lambda dy: dy * t, lambda dy, t=t: dy, lambda dy: holder):
        assert any(x is t for x in contents([vjp]))


# --- freezing is an edge that is not there ---------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4,), (5, 4), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_a_frozen_linear_lets_go_of_its_input_and_a_trainable_one_keeps_it(shape, trainable):
    weight, bias = (Tensor(np.ones(s), requires_grad=trainable) for s in ((3, 4), (3,)))
    below = Tensor(np.ones(shape), requires_grad=True)  # so that there is a graph to go through
    with no_garbage_collector():
        h = below + 1.0
        activation = weakref.ref(h.data)
        y = F.linear(h, weight, bias)
        del h
        assert (activation() is not None) == trainable
        y.backward(np.ones(y.shape))
        assert np.array_equal(below.grad, np.full(shape, 3.0)) and (weight.grad is not None) == trainable
        del y
        assert activation() is None


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_nothing_is_recorded_of_frozen_inputs_or_without_a_graph(op):
    inputs = draw(op, np.random.default_rng(0))
    assert not op.function(*map(Tensor, inputs)).requires_grad
    leaves = [Tensor(x, requires_grad=True) for x in inputs]
    with no_grad():
        y = op.function(*leaves)
    assert not y.requires_grad or y is leaves[0] and op.name.startswith("dropout")  # which does nothing then


def test_an_absent_input_has_no_edge():
    assert record(np.zeros(2), (None, lambda dy: dy)).node is None
    y = record(np.zeros(2), (None, lambda dy: dy), (leaf(1.0), lambda dy: dy[:1]))
    assert len(y.node.edges) == 1


def test_a_frozen_tensor_refuses_a_gradient_and_a_backward():
    frozen = Tensor([1.0])
    with pytest.raises(ValueError, match="requires_grad=True"):
        frozen.grad = np.ones(1)
    with pytest.raises(ValueError, match="nothing to differentiate"):
        (frozen * 2.0).backward()


# --- no_grad ---------------------------------------------------------------------------------------------------------


def test_no_grad_nests_and_ends_with_its_block():
    states = [is_recording()]
    with no_grad():
        states.append(is_recording())
        with no_grad():
            states.append(is_recording())
        states.append(is_recording())
    assert [*states, is_recording()] == [True, False, False, False, True]


def test_no_grad_ends_with_an_exception_too():
    with pytest.raises(KeyError), no_grad():
        raise KeyError
    assert is_recording() and (leaf(1.0) * 2.0).requires_grad


def test_no_grad_serves_as_a_decorator():
    assert no_grad()(is_recording)() is False and is_recording()


def test_no_grad_belongs_to_its_thread():
    """Another thread records while this one does not, and the reverse."""
    inside, done, seen = threading.Event(), threading.Event(), {}

    def other():
        with no_grad():
            seen["other, in its own block"] = is_recording()
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(10)
    seen["here, meanwhile"] = is_recording()
    with no_grad():
        fresh = threading.Thread(target=lambda: seen.update({"fresh, from within a block": is_recording()}))
        fresh.start()
        fresh.join()
    done.set()
    thread.join()
    assert seen == {"other, in its own block": False, "here, meanwhile": True, "fresh, from within a block": True}


def test_a_graph_made_before_may_be_walked_without_recording():
    x = leaf(3.0)
    y = x * x
    with no_grad():
        y.backward()
    assert x.grad == 6.0
