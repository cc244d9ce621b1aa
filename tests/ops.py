"""Every operation of the engine, once: how to call it, its formula in plain NumPy, its inputs, and its edges.

The gradient, dtype, backend and sabotage tests all run over `OPS`; a test asserts that no public op is missing.
A formula shares no code with the op, and is written as the definition is, with loops where that is plainest.
"""

import contextlib
import functools
import importlib
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest

from minilora import functional as F
from minilora import lean, packed, tensor
from minilora.backend import get_array_module, to_device
from minilora.stack import pad_and_stack

# The modules whose ops call `record`; a test asserts that there are no others.
RECORDERS = [F, lean, packed, importlib.import_module("minilora.stack"), tensor]


@contextlib.contextmanager
def record_replaced(stand_in):
    """Within this block every op calls `stand_in(y, *edges)` in the place of `record`."""
    with pytest.MonkeyPatch.context() as patch:
        for module in RECORDERS:
            patch.setattr(module, "record", stand_in)
        yield


class Op(NamedTuple):
    """An operation, and what the suites need to know of it."""

    name: str
    function: Callable  # (*tensors) -> Tensor
    formula: Callable  # (*float64 arrays) -> array
    shapes: Callable  # (n, m, k) -> one shape for each input
    edges: int  # how many gradients one call records
    positive: tuple = ()  # the inputs that must stay away from zero
    dims: tuple = (3, 3, 3)  # n, m, k that make as many gradients square as possible: then they can be transposed


def draw(op, rng, dims=None):
    """Random float64 inputs for `op`: nothing about them is symmetric or constant."""
    shapes = op.shapes(*(dims or op.dims))
    return [rng.uniform(0.5 if i in op.positive else -2, 2, shape) for i, shape in enumerate(shapes)]


def like(tensor, host):
    """The host array as a constant beside `tensor`: on its backend, in its dtype if it holds floats."""
    host = host.astype(tensor.dtype) if host.dtype.kind == "f" else host
    return to_device(host, get_array_module(tensor.data))


MATRIX = np.arange(12.0).reshape(4, 3) / 7 - 0.6
REPEATS = np.array([0, 0, -1])
RATES = (0.2, 0.5, 0.0, 0.7)
token_ids = lambda V: np.array([[0, 1, 0], [V - 1, 2, 0]]) % V  # some rows twice, some never


def some_targets(shape, V):
    targets = np.arange(math.prod(shape)) * 2 % V
    targets[1::3] = F.IGNORE
    return targets.reshape(shape)


def angles(x, n_head):
    T, half = x.shape[1], x.shape[2] // n_head // 2
    return np.outer(np.arange(1.0, T + 1), 0.3 + np.arange(half))


def rotary(x):
    angle = angles(x, 2)
    return F.rotary(x, like(x, np.cos(angle)), like(x, np.sin(angle)), 2)


def rotary_formula(x):
    heads = x.reshape(*x.shape[:2], 2, 2, -1)
    turned = (heads[..., 0, :] + 1j * heads[..., 1, :]) * np.exp(1j * angles(x, 2))[:, None, :]
    return np.stack([turned.real, turned.imag], -2).reshape(x.shape)


def softmax_formula(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def attention_formula(q, k, v, n_head=2, starts=None):
    """A head of queries reads the head of keys and values that its group shares, from its row's start on."""
    y, (B, T, C), S = np.zeros_like(q), q.shape, k.shape[1]
    D = C // n_head
    group = n_head // (k.shape[2] // D)
    for b in range(B):
        first = 0 if starts is None else starts[b]
        for h in range(n_head):
            head, shared = slice(h * D, h * D + D), slice(h // group * D, h // group * D + D)
            for t in range(T):
                seen = slice(first, S - T + t + 1)
                scores = k[b, seen, shared] @ q[b, t, head] / np.sqrt(D)
                y[b, t, head] = softmax_formula(scores) @ v[b, seen, shared]
    return y


starts = lambda B: np.arange(B) % 2  # where the rows of a batch begin, if some are filled up by one key


def padded_attention(q, k, v):
    """Queries after the padding: the padding's own would see no key."""
    hidden = np.arange(k.shape[1]) < starts(len(k.data))[:, None]
    return lean.attention(q, k, v, 2, hidden)


def bits_of(n_out, n_in):
    """A weight of that shape as bfloat16: the upper halves of float32 numbers."""
    values = np.sin(1.0 + np.arange(n_out * n_in, dtype=np.float32)).reshape(n_out, n_in)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def packed_linear(n_out):
    def linear(x, bias=None):
        weight = packed.PackedTensor("BF16", (n_out, x.shape[-1]), bits_of(n_out, x.shape[-1]))
        return packed.packed_linear(x, weight.to_device(get_array_module(x.data)), bias)

    return linear


def packed_linear_formula(n_out):
    def formula(x, bias=0.0):
        weight = (bits_of(n_out, x.shape[-1]).astype(np.uint32) << 16).view(np.float32)
        return linear_formula(x, weight.astype(np.float64), bias)

    return formula


def rms_norm_formula(x, weight):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * weight


def swiglu_formula(gate, up):
    return gate / (1 + np.exp(-gate)) * up


def loss_of(function):
    """`function(x, weight, targets)`, as a function of Tensors alone."""
    return lambda x, weight: function(x, weight, some_targets(x.shape[:-1], weight.shape[0]))


def cross_entropy(logits):
    return F.cross_entropy(logits, some_targets(logits.shape[:-1], logits.shape[-1]))


def cross_entropy_formula(logits):
    return linear_cross_entropy_formula(logits, np.eye(logits.shape[-1]))


def linear_cross_entropy_formula(x, weight):
    rows, targets = x.reshape(-1, x.shape[-1]), some_targets(x.shape[:-1], len(weight)).ravel()
    losses = [-np.log(softmax_formula(weight @ h)[t]) for h, t in zip(rows, targets, strict=True) if t >= 0]
    return np.mean(losses)


def in_blocks_of_two(function):
    """The op with its blocks so small that even these inputs need several, and a last one that is cut short."""

    @functools.wraps(function)
    def small(*tensors):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lean, "QUERY_BLOCK", 2)
            patch.setattr(lean, "LOGIT_ROWS", 2)
            patch.setattr(lean, "GELU_BLOCK", 2)
            return function(*tensors)

    return small


def gelu_formula(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def layer_norm_formula(x, weight, bias):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * weight + bias


def linear_formula(x, weight, bias=0.0):
    return np.einsum("...i,oi->...o", x, weight) + bias


def dropout_formula(x, p=0.4):
    drawn = np.random.default_rng(7).random(x.shape, np.float32)
    return np.where(drawn < np.float32(p), 0, x / (1 - p))


def rates(n):
    return np.array(RATES[:n]).reshape(n, 1)


def stack_formula(a, b):
    rows = np.zeros((3, max(len(a), len(b)), max(a.shape[1], b.shape[1])))
    rows[0, : a.shape[0], : a.shape[1]] = a
    rows[2, : b.shape[0], : b.shape[1]] = b
    return rows


OPS = [
    # operators of Tensor; with a number there is one edge, with a tensor there are two
    Op("x + y", lambda x, y: x + y, np.add,
       shapes=lambda n, m, k: [(n, m), (m,)], edges=2),
    Op("x + x", lambda x: x + x, lambda x: 2 * x,
       shapes=lambda n, m, k: [(n, m)], edges=2),
    Op("number + x", lambda x: 1.5 + x, lambda x: 1.5 + x,
       shapes=lambda n, m, k: [(n, m)], edges=1),
    Op("array + x", lambda x: like(x, MATRIX[0]) + x, lambda x: MATRIX[0] + x,
       shapes=lambda n, m, k: [(n, 3)], edges=1),
    Op("x - y", lambda x, y: x - y, np.subtract,
       shapes=lambda n, m, k: [(n, 1), (m,)], edges=2),
    Op("number - x", lambda x: 2 - x, lambda x: 2 - x,
       shapes=lambda n, m, k: [(n, m)], edges=2),
    Op("-x", lambda x: -x, np.negative,
       shapes=lambda n, m, k: [(n, m)], edges=1),
    Op("x * y", lambda x, y: x * y, np.multiply,
       shapes=lambda n, m, k: [(n, 1, m), (k, 1)], edges=2),
    Op("x * number", lambda x: x * 0.7, lambda x: x * 0.7,
       shapes=lambda n, m, k: [(n, m)], edges=1),
    Op("x / y", lambda x, y: x / y, np.divide,
       shapes=lambda n, m, k: [(n, m), (n, m)], edges=2, positive=(1,)),
    Op("x / number", lambda x: x / 3, lambda x: x / 3,
       shapes=lambda n, m, k: [(n, m)], edges=1),
    Op("number / x", lambda x: 2 / x, lambda x: 2 / x,
       shapes=lambda n, m, k: [(n, m)], edges=1, positive=(0,)),
    Op("matrix @ matrix", lambda a, b: a @ b, np.matmul,
       shapes=lambda n, m, k: [(n, m), (m, k)], edges=2),
    Op("stack @ matrix", lambda a, b: a @ b, np.matmul,
       shapes=lambda n, m, k: [(k, n, m), (m, n)], edges=2),
    Op("stack @ stack", lambda a, b: a @ b, np.matmul,
       shapes=lambda n, m, k: [(2, 1, n, m), (k, m, n)], edges=2),
    Op("vector @ vector", lambda a, b: a @ b, np.dot,
       shapes=lambda n, m, k: [(m,), (m,)], edges=6),
    Op("vector @ matrix", lambda a, b: a @ b, np.dot,
       shapes=lambda n, m, k: [(m,), (m, k)], edges=4),
    Op("stack @ vector", lambda a, b: a @ b, np.dot,
       shapes=lambda n, m, k: [(k, n, m), (m,)], edges=4),
    Op("array @ x", lambda x: like(x, MATRIX) @ x, lambda x: MATRIX @ x,
       shapes=lambda n, m, k: [(3, m)], edges=1),
    Op("sum", lambda x: x.sum(), np.sum,
       shapes=lambda n, m, k: [(n, m)], edges=1),
    Op("sum over an axis", lambda x: x.sum(-2), lambda x: x.sum(-2),
       shapes=lambda n, m, k: [(k, n, m)], edges=1),
    Op("sum, axes kept", lambda x: x.sum((0, -1), keepdims=True), lambda x: x.sum((0, -1), keepdims=True),
       shapes=lambda n, m, k: [(n, m, k)], edges=1),
    Op("mean", lambda x: x.mean(), np.mean,
       shapes=lambda n, m, k: [(n, m)], edges=2),
    Op("mean over an axis", lambda x: x.mean(0), lambda x: x.mean(0),
       shapes=lambda n, m, k: [(n, m)], edges=2),
    Op("reshape", lambda x: x.reshape(-1, 2), lambda x: x.reshape(-1, 2),
       shapes=lambda n, m, k: [(n, m, 2)], edges=1, dims=(2, 2, 2)),
    Op("transpose", lambda x: x.transpose(), np.transpose,
       shapes=lambda n, m, k: [(n, m, k)], edges=1),
    Op("transpose, axes named", lambda x: x.transpose(1, -1, 0), lambda x: np.moveaxis(x, 0, -1),
       shapes=lambda n, m, k: [(n, m, k)], edges=1),
    Op("exp", lambda x: x.exp(), np.exp,
       shapes=lambda n, m, k: [(n, m)], edges=1),
    Op("log", lambda x: x.log(), np.log,
       shapes=lambda n, m, k: [(n, m)], edges=1, positive=(0,)),
    Op("tanh", lambda x: x.tanh(), np.tanh,
       shapes=lambda n, m, k: [(n, m)], edges=1),
    Op("x[integer]", lambda x: x[0], lambda x: x[0],
       shapes=lambda n, m, k: [(n, m)], edges=1),
    Op("x[slices]", lambda x: x[::-2, 1:], lambda x: x[::-2, 1:],
       shapes=lambda n, m, k: [(n, m + 1)], edges=1, dims=(3, 2, 3)),
    Op("x[..., None, 0]", lambda x: x[..., None, 0], lambda x: x[..., None, 0],
       shapes=lambda n, m, k: [(n, m, k)], edges=1),
    Op("x[repeated rows]", lambda x: x[like(x, REPEATS)], lambda x: x[REPEATS],
       shapes=lambda n, m, k: [(n, m)], edges=1),
    Op("x[rows, columns]", lambda x: x[like(x, REPEATS), like(x, REPEATS)], lambda x: x[REPEATS, REPEATS],
       shapes=lambda n, m, k: [(n, m)], edges=1),
    # functional
    Op("linear", F.linear, linear_formula,
       shapes=lambda n, m, k: [(n, m), (k, m), (k,)], edges=3),
    Op("linear, no bias", F.linear, linear_formula,
       shapes=lambda n, m, k: [(n, m), (k, m)], edges=2),
    Op("linear of a vector", F.linear, linear_formula,
       shapes=lambda n, m, k: [(m,), (k, m), (k,)], edges=3),
    Op("linear of a batch", F.linear, linear_formula,
       shapes=lambda n, m, k: [(n, 2, m), (k, m), (k,)], edges=3, dims=(3, 2, 2)),
    Op("embedding", lambda w: F.embedding(w, token_ids(w.shape[0])), lambda w: w[token_ids(len(w))],
       shapes=lambda n, m, k: [(n + 1, m)], edges=1, dims=(3, 4, 3)),
    Op("layer_norm", F.layer_norm, layer_norm_formula,
       shapes=lambda n, m, k: [(n, m), (m,), (m,)], edges=3),
    Op("layer_norm of a batch", F.layer_norm, layer_norm_formula,
       shapes=lambda n, m, k: [(k, n, m), (m,), (m,)], edges=3),
    Op("gelu", F.gelu, gelu_formula,
       shapes=lambda n, m, k: [(n, m)], edges=1),
    Op("rotary", rotary, rotary_formula,
       shapes=lambda n, m, k: [(n, m, 4 * k)], edges=1, dims=(2, 4, 1)),
    Op("attention", lambda q, k, v: F.attention(q, k, v, 2), attention_formula,
       shapes=lambda n, m, k: [(n, m, 2 * k)] * 3, edges=3, dims=(2, 4, 2)),
    Op("attention, one head", lambda q, k, v: F.attention(q, k, v, 1), lambda q, k, v: attention_formula(q, k, v, 1),
       shapes=lambda n, m, k: [(n, m, k)] * 3, edges=3),
    Op("attention after a cache", lambda q, k, v: F.attention(q, k, v, 2), attention_formula,
       shapes=lambda n, m, k: [(n, m, 2 * k), (n, m + 2, 2 * k), (n, m + 2, 2 * k)], edges=3, dims=(2, 2, 2)),
    Op("attention to itself", lambda x: F.attention(x, x, x, 2), lambda x: attention_formula(x, x, x),
       shapes=lambda n, m, k: [(n, m, 2 * k)], edges=3, dims=(2, 4, 2)),
    Op("attention, grouped queries", lambda q, k, v: F.attention(q, k, v, 4),
       lambda q, k, v: attention_formula(q, k, v, 4),
       shapes=lambda n, m, k: [(n, m, 4 * k), (n, m, 2 * k), (n, m, 2 * k)], edges=3, dims=(2, 4, 1)),
    Op("attention, one head of keys, after a cache", lambda q, k, v: F.attention(q, k, v, 3),
       lambda q, k, v: attention_formula(q, k, v, 3),
       shapes=lambda n, m, k: [(n, m, 3 * k), (n, m + 1, k), (n, m + 1, k)], edges=3, dims=(2, 3, 4)),
    Op("rms_norm", F.rms_norm, rms_norm_formula,
       shapes=lambda n, m, k: [(n, m), (m,)], edges=2),
    Op("rms_norm of a batch", F.rms_norm, rms_norm_formula,
       shapes=lambda n, m, k: [(k, n, m), (m,)], edges=2),
    Op("swiglu", F.swiglu, swiglu_formula,
       shapes=lambda n, m, k: [(n, m), (n, m)], edges=2),
    Op("concatenate", lambda *parts: F.concatenate(parts), lambda *parts: np.concatenate(parts),
       shapes=lambda n, m, k: [(n, m), (k, m), (m, m)], edges=3),
    Op("concatenate along the last axis", lambda *parts: F.concatenate(parts, axis=-1),
       lambda *parts: np.concatenate(parts, -1),
       shapes=lambda n, m, k: [(2, n, m), (2, n, k)], edges=2),
    Op("cross_entropy", cross_entropy, cross_entropy_formula,
       shapes=lambda n, m, k: [(n, m, k)], edges=1, dims=(2, 3, 3)),
    Op("linear_cross_entropy", loss_of(F.linear_cross_entropy), linear_cross_entropy_formula,
       shapes=lambda n, m, k: [(n, m, k), (m, k)], edges=3, dims=(2, 3, 3)),
    Op("dropout", lambda x: F.dropout(x, 0.4, np.random.default_rng(7)), dropout_formula,
       shapes=lambda n, m, k: [(n, m)], edges=1),
    Op("dropout, a rate each", lambda x: F.dropout(x, rates(x.shape[0]), np.random.default_rng(7)),
       lambda x: dropout_formula(x, rates(len(x))),
       shapes=lambda n, m, k: [(n, m)], edges=1),
    # lean: the same formulas
    Op("lean layer_norm", lean.layer_norm, layer_norm_formula,
       shapes=lambda n, m, k: [(n, m), (m,), (m,)], edges=3),
    Op("lean layer_norm of a batch", lean.layer_norm, layer_norm_formula,
       shapes=lambda n, m, k: [(k, n, m), (m,), (m,)], edges=3),
    Op("lean gelu", lean.gelu, gelu_formula,
       shapes=lambda n, m, k: [(n, m)], edges=1),
    Op("lean gelu, in blocks", in_blocks_of_two(lean.gelu), gelu_formula,
       shapes=lambda n, m, k: [(n, m)], edges=1),
    Op("lean attention", lambda q, k, v: lean.attention(q, k, v, 2), attention_formula,
       shapes=lambda n, m, k: [(n, m, 2 * k)] * 3, edges=3, dims=(2, 4, 2)),
    Op("lean attention, one head", lambda q, k, v: lean.attention(q, k, v, 1),
       lambda q, k, v: attention_formula(q, k, v, 1),
       shapes=lambda n, m, k: [(n, m, k)] * 3, edges=3),
    Op("lean attention after a cache", lambda q, k, v: lean.attention(q, k, v, 2), attention_formula,
       shapes=lambda n, m, k: [(n, m, 2 * k), (n, m + 2, 2 * k), (n, m + 2, 2 * k)], edges=3, dims=(2, 2, 2)),
    Op("lean attention to itself", lambda x: lean.attention(x, x, x, 2), lambda x: attention_formula(x, x, x),
       shapes=lambda n, m, k: [(n, m, 2 * k)], edges=3, dims=(2, 4, 2)),
    Op("lean attention, in blocks", in_blocks_of_two(lambda q, k, v: lean.attention(q, k, v, 2)), attention_formula,
       shapes=lambda n, m, k: [(n, m, 2 * k)] * 3, edges=3, dims=(2, 4, 2)),
    Op("lean attention after a cache, in blocks", in_blocks_of_two(lambda q, k, v: lean.attention(q, k, v, 2)),
       attention_formula,
       shapes=lambda n, m, k: [(n, m, 2 * k), (n, m + 1, 2 * k), (n, m + 1, 2 * k)], edges=3, dims=(2, 3, 2)),
    Op("lean attention, grouped queries", lambda q, k, v: lean.attention(q, k, v, 4),
       lambda q, k, v: attention_formula(q, k, v, 4),
       shapes=lambda n, m, k: [(n, m, 4 * k), (n, m, 2 * k), (n, m, 2 * k)], edges=3, dims=(2, 4, 1)),
    Op("lean attention, grouped, after a cache, in blocks",
       in_blocks_of_two(lambda q, k, v: lean.attention(q, k, v, 4)),
       lambda q, k, v: attention_formula(q, k, v, 4),
       shapes=lambda n, m, k: [(n, m, 4 * k), (n, m + 1, 2 * k), (n, m + 1, 2 * k)], edges=3, dims=(2, 3, 1)),
    Op("lean attention after padding", padded_attention,
       lambda q, k, v: attention_formula(q, k, v, 2, starts(len(q))),
       shapes=lambda n, m, k: [(n, m, 2 * k), (n, m + 1, 2 * k), (n, m + 1, 2 * k)], edges=3, dims=(2, 3, 2)),
    Op("lean rms_norm", lean.rms_norm, rms_norm_formula,
       shapes=lambda n, m, k: [(n, m), (m,)], edges=2),
    Op("lean rms_norm of a batch", lean.rms_norm, rms_norm_formula,
       shapes=lambda n, m, k: [(k, n, m), (m,)], edges=2),
    Op("lean swiglu", lean.swiglu, swiglu_formula,
       shapes=lambda n, m, k: [(n, m), (n, m)], edges=2),
    Op("lean linear_cross_entropy", loss_of(lean.linear_cross_entropy), linear_cross_entropy_formula,
       shapes=lambda n, m, k: [(n, m, k), (m, k)], edges=2, dims=(2, 3, 3)),
    Op("lean linear_cross_entropy, in blocks", in_blocks_of_two(loss_of(lean.linear_cross_entropy)),
       linear_cross_entropy_formula,
       shapes=lambda n, m, k: [(n, m, k), (m, k)], edges=2, dims=(2, 4, 4)),
    # packed
    Op("packed linear", packed_linear(3), packed_linear_formula(3),
       shapes=lambda n, m, k: [(n, m), (3,)], edges=2),
    Op("packed linear of a batch, no bias", packed_linear(2), packed_linear_formula(2),
       shapes=lambda n, m, k: [(k, n, m)], edges=1),
    # stack
    Op("pad_and_stack", lambda a, b: pad_and_stack([a, None, b]), stack_formula,
       shapes=lambda n, m, k: [(n, m), (k, m + 1)], edges=2, dims=(3, 3, 4)),
]  # fmt: skip


def refuses(call, exception, shown):
    """`call()` raises `exception`, and its message holds every part of `shown`."""
    with pytest.raises(exception) as error:
        call()
    assert [part for part in shown if part not in str(error.value)] == []
