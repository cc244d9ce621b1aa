"""The same functions as in functional.py, in less memory and time. Skip it on a first reading.

Each computes what its textbook form computes; a test proves both equal, values and gradients.
Arrays are made block by block, results are written into arrays the op owns, and what would be large
to keep is computed again for the gradient.

Shapes: as in functional.py: B batch, T time, S positions attended to, C channels, H heads,
D = C / H, G heads in a group, V vocabulary.
"""

import functools
import math

from .backend import get_array_module, to_device
from .functional import (
    check_attention,
    check_layer_norm,
    check_rms_norm,
    check_swiglu,
    rows_with_loss,
)
from .graph import is_recording
from .kernels import (
    block_length,
    column_sum,
    gelu_kernel,
    has_kernels,
    row_dot,
    row_mean,
    row_mean_dot,
    row_sum,
    swiglu_kernel,
)
from .packed import StoredTensor
from .tensor import check_same, record

# How many queries have scores at a time, and how many rows have logits: fewer, where the logits of
# so many would take more than LOGIT_BYTES. On a GPU there are more, see `block_length`; but of
# queries no more than have a mask of a few megabytes.
QUERY_BLOCK = 64
MOST_QUERIES = 1024
LOGIT_ROWS = 256
LOGIT_BYTES = 1 << 25
# Of how many numbers gelu is computed at a time: a part of what a processor's cache holds.
GELU_BLOCK = 1 << 18
# The score of a key that is hidden from every query of its row. Its probability is zero beside any
# other key, and where a query sees no other, the row is finite still.
HIDDEN = -1e30
# A float32 times this is still a float32 of full precision, if it was above 1e-18.
TINY = 1e-20


def layer_norm(x, weight, bias, eps=1e-5):
    """`functional.layer_norm`, in place, with the means over channels as `row_mean` makes them."""
    check_layer_norm(x, weight, bias)
    w = weight.data
    xp = get_array_module(w)
    normed = x.data - row_mean(x.data)
    var = row_mean_dot(normed, normed)  # (..., 1)
    rstd = 1 / xp.sqrt(var + eps)
    normed *= rstd  # (..., C)

    def dx(dy):
        d = dy * w
        along = row_mean_dot(d, normed)
        d -= row_mean(d)
        d -= normed * along
        d *= rstd
        return d

    y = normed * w
    y += bias.data
    return record(y, (x, dx), (weight, lambda dy: dy * normed), (bias, lambda dy: dy))


def rms_norm(x, weight, eps=1e-6):
    """`functional.rms_norm`, in place, with the sums as `row_dot` makes them.

    The layers that read y keep it, if they carry LoRA. So x / rms is not kept beside it where the
    weight comes from a file: for the gradient it is y / weight.
    """
    check_rms_norm(x, weight)
    w = weight.data
    X = x.data
    C = w.size
    rstd = row_dot(X, X)
    rstd *= 1 / C
    rstd += eps
    rstd **= -0.5  # (..., 1)
    y = X * rstd
    can_divide = isinstance(weight, StoredTensor) and weight.once(no_number_is_tiny)
    kept = None if can_divide else y.copy()
    y *= w  # (..., C)
    normed = lambda: y / w if kept is None else kept

    def dx(dy):
        # Σ d normed, with d = dy w
        along = row_dot(dy, y)
        along *= 1 / C
        d = normed() * -along
        d += dy * w
        d *= rstd
        return d

    return record(y, (x, dx), (weight, lambda dy: dy * normed()))


def no_number_is_tiny(w):
    """Is no number of `w` zero, or so small that what was multiplied by it has lost digits?"""
    return bool(abs(w).min() > TINY)


def swiglu(gate, up):
    """`functional.swiglu`, in place, with nothing kept for the gradients but the derivatives.

    With s = sigmoid(g):

        y = g s u        dy/du = g s        dy/dg = u (s + g s (1 - s))
    """
    check_swiglu(gate, up)
    g = gate.data
    u = up.data
    xp = get_array_module(g)
    if has_kernels(xp):
        y, dgate, dup = swiglu_kernel(xp)(g, u)
        return record(y, (gate, lambda dy: dy * dgate), (up, lambda dy: dy * dup))
    s = xp.multiply(g, 0.5, out=xp.empty_like(g))
    xp.tanh(s, out=s)
    s += 1
    s *= 0.5
    silu = g * s
    y = silu * u
    if not (_needs_gradient(gate) or _needs_gradient(up)):
        return record(y)
    # silu - silu s + s, times u: in the array of s, which is not needed any more.
    s *= 1 - silu
    s += silu
    s *= u
    return record(y, (gate, lambda dy: dy * s), (up, lambda dy: dy * silu))


def gelu(x):
    """`functional.gelu`, in place, and with nothing kept for the gradient but the derivative.

    With u = c (x + a x³) and s = (1 + tanh u) / 2, which is sigmoid(2u):

        y = x s        dy/dx = s + 2 c x (1 + 3 a x²) s (1 - s)
    """
    c = math.sqrt(2 / math.pi)
    a = 0.044715
    X = x.data
    xp = get_array_module(X)
    if has_kernels(xp):
        y, derivative = gelu_kernel(xp)(X)
        return record(y, (x, lambda dy: dy * derivative))
    flat = X.reshape(-1)
    y = xp.empty_like(flat)
    derivative = xp.empty_like(flat) if _needs_gradient(x) else None
    # In blocks, all steps find their numbers in the cache. Two arrays of a block are written over:
    # to fetch fresh memory at each step would take half the time of this op.
    scratch = xp.empty((2, min(GELU_BLOCK, flat.size)), X.dtype)
    for start in range(0, flat.size, GELU_BLOCK):
        block = slice(start, start + GELU_BLOCK)
        X_block = flat[block]
        square, s = scratch[:, : X_block.size]
        if derivative is not None:
            square = derivative[block]
        xp.square(X_block, out=square)
        xp.multiply(square, c * a, out=s)
        s += c
        s *= X_block  # u
        xp.tanh(s, out=s)
        s += 1
        s *= 0.5  # s
        y_block = xp.multiply(X_block, s, out=y[block])
        if derivative is None:
            continue
        # The derivative is made now, from x², y and s, so that neither x nor s is kept.
        # As y = x s it is 2 c (1 + 3 a x²) y (1 - s) + s, and s = 1 - (1 - s).
        d = square
        d *= 6 * c * a
        d += 2 * c  # 2 c (1 + 3 a x²)
        d *= y_block
        one_minus_s = xp.subtract(1, s, out=s)
        d *= one_minus_s
        d -= one_minus_s
        d += 1
    y = y.reshape(X.shape)
    if derivative is None:
        return record(y)
    derivative = derivative.reshape(X.shape)
    return record(y, (x, lambda dy: dy * derivative))


def attention(q, k, v, n_head, hidden=None):
    """`functional.attention` in blocks of queries; the gradient computes the probabilities again.

    Only QUERY_BLOCK positions have scores in memory at a time, against the keys that the last of
    them sees. Of the softmax, each row's largest score and sum are kept; all of it is kept only
    where there are no more keys than QUERY_BLOCK. The G queries of a group lie one after the other,
    as G rows of the matrix that meets their one key: so keys and values are not repeated, and a
    product sums their gradients.

    `hidden`, a boolean array (B, S), says which keys no query of a batch row sees: those of the
    padding before a short prompt.
    Source: Dao et al. 2022, "FlashAttention", algorithms 1 and 4.
    """
    n_kv_head = check_attention(q, k, v, n_head)
    B, T, C = q.shape
    S = k.shape[1]
    D = C // n_head
    G = n_head // n_kv_head
    scale = 1 / math.sqrt(D)
    xp = get_array_module(q.data)

    def split(a):
        # (B, T, C) -> (B, n_kv_head, T * G, D), and G = 1 for keys and values.
        heads = a.reshape(B, a.shape[1], n_kv_head, -1, D)
        return heads.swapaxes(1, 2).reshape(B, n_kv_head, -1, D)

    def join(a, n_positions):
        groups = a.reshape(B, n_kv_head, n_positions, -1, D)
        return groups.swapaxes(1, 2).reshape(B, n_positions, -1)

    Q = split(q.data * scale)
    K = split(k.data)  # (B, n_kv_head, S, D)
    V = split(v.data)
    O = xp.empty_like(Q)
    row_max = xp.empty((B, n_kv_head, 1, T * G), Q.dtype)
    sums = xp.empty((B, n_kv_head, 1, T * G), Q.dtype)
    mask = None
    if hidden is not None:
        mask = to_device(hidden, xp)[:, None, :, None] * xp.asarray(HIDDEN, Q.dtype)

    # The rows of each block, and the keys up to the last that one of them sees. Keys start at 0: a
    # causal query sees all before it.
    blocks = []
    step = min(MOST_QUERIES, block_length(xp, QUERY_BLOCK, B * n_head * S * Q.itemsize))
    for start in range(0, T, step):
        stop = min(start + step, T)
        blocks.append((slice(start * G, stop * G), slice(0, S - T + stop)))

    def scores(queries, keys):
        # Keys come first, (B, n_kv_head, keys, queries): NumPy takes a maximum over the last axis
        # but one several times faster than over the last.
        block = K[:, :, keys] @ Q[:, :, queries].swapaxes(-1, -2)
        n = block.shape[-1] // G
        # A single position, as in generation, sees every key.
        if n > 1:
            # The last n keys are the block's own positions.
            own = block[:, :, -n:]
            own += _future(xp, str(Q.device), n, G, Q.dtype.char)
        if mask is not None:
            block += mask[:, :, keys]
        return block

    kept = None
    for queries, keys in blocks:
        E = scores(queries, keys)
        row_max[..., queries] = E.max(axis=-2, keepdims=True)
        E -= row_max[..., queries]
        xp.exp(E, out=E)
        sums[..., queries] = column_sum(E)
        O[:, :, queries] = E.swapaxes(-1, -2) @ V[:, :, keys]
        if S <= QUERY_BLOCK:
            # There is one block, and it is small.
            kept = E
    # P = E / sums. A sum divides a row of the output, D numbers, not a row of E, S of them.
    O /= sums.swapaxes(-1, -2)
    y = join(O, T)

    def dqkv(dy):
        # Divided by the sums, dO turns E into P wherever the two are multiplied below.
        dO = split(dy) / sums.swapaxes(-1, -2)
        dQ = xp.empty_like(Q)
        dK = xp.zeros_like(K)
        dV = xp.zeros_like(V)
        # Σ dP P over the keys is Σ dO O over the channels. O is in y, which others keep as well.
        along = row_dot(dO, split(y)).swapaxes(-1, -2)
        for queries, keys in blocks:
            E = kept
            if E is None:
                E = scores(queries, keys)
                E -= row_max[..., queries]
                xp.exp(E, out=E)
            # A slice with a name, for `dV[:, :, keys] += ...` would copy the sum onto itself.
            dV_seen = dV[:, :, keys]
            dV_seen += E @ dO[:, :, queries]
            # dP, and from here the VJP of softmax in place.
            dscores = V[:, :, keys] @ dO[:, :, queries].swapaxes(-1, -2)
            dscores -= along[..., queries]
            dscores *= E
            dQ[:, :, queries] = (dscores.swapaxes(-1, -2) @ K[:, :, keys]) * scale
            dK_seen = dK[:, :, keys]
            dK_seen += dscores @ Q[:, :, queries]
        return join(dQ, T), join(dK, S), join(dV, S)

    return record(y, ((q, k, v), dqkv))


@functools.lru_cache(maxsize=8)
def _future(xp, device, n, G, dtype):
    """-inf where a key comes after a query: (keys n, queries n * G), for every layer the same.

    Below the diagonal lies the future. `device` is that on which `xp` makes arrays.
    """
    mask = xp.tril(xp.full((n, n), -math.inf, dtype), -1)
    return xp.repeat(mask, G, axis=1)


def linear_cross_entropy(x, weight, targets):
    """`functional.linear_cross_entropy` in blocks of rows, with the gradients made on the way.

    Logits exist for few rows at a time, and for no row without a loss. Where a gradient is
    needed, it is made while they exist: only a factor is missing then, the gradient of the loss.
    """
    check_same("linear_cross_entropy", x, weight)
    shape = x.shape
    W = weight.data
    if W.ndim != 2 or shape[-1:] != W.shape[1:]:
        raise ValueError(f"linear_cross_entropy: x {shape} does not fit weight {W.shape}")
    xp = get_array_module(x.data)
    rows, columns = rows_with_loss(targets, shape[:-1], len(W))
    n = rows.size
    rows = to_device(rows, xp)
    columns = to_device(columns, xp)
    X = x.data.reshape(-1, shape[-1])
    loss = 0
    dX = None
    dW = None
    if _needs_gradient(x):
        dX = xp.zeros_like(X)
    if _needs_gradient(weight):
        dW = xp.zeros_like(W)

    row_bytes = len(W) * W.itemsize
    step = block_length(xp, min(LOGIT_ROWS, max(1, LOGIT_BYTES // row_bytes)), row_bytes)
    for start in range(0, n, step):
        block = slice(start, start + step)
        X_block = X[rows[block]]
        E = X_block @ W.T  # the logits, (at most LOGIT_ROWS, V)
        at_target = (xp.arange(len(E)), columns[block])
        E -= E.max(axis=-1, keepdims=True)
        target_logit = E[at_target]
        xp.exp(E, out=E)
        sums = row_sum(E)
        loss += (xp.log(sums[:, 0]) - target_logit).sum()
        # E / sums is now the softmax minus one at the target. The division is left to the thin
        # arrays below: X and dX have C columns, E has V.
        E[at_target] -= sums[:, 0]
        if dX is not None:
            dX[rows[block]] = (E @ W) / sums
        if dW is not None:
            dW += E.T @ (X_block / sums)

    return record(
        xp.asarray(loss / n),
        (x, lambda dy: (dX * (dy / n)).reshape(shape)),
        (weight, lambda dy: dW * (dy / n)),
    )


def _needs_gradient(t):
    return is_recording() and t.requires_grad
