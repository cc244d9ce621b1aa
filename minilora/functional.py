"""The closed list of neural-network ops: each is its forward with its VJPs under it. Knows no modules, no parameters.

Shapes: B batch, T time (positions), S positions attended to (S >= T), C channels, H heads, D = C / H, V vocabulary.
A gradient of `x` is called `dx`. Constants come from `math`: a NumPy scalar would turn float32 into float64.
"""

import math

import numpy as np

from .backend import get_array_module, on_host, to_device
from .graph import is_recording
from .tensor import check_same, record

IGNORE = -100  # a target with this value carries no loss
QUERIES, LOGITS = 64, 256  # rows of attention's scores, and rows of logits, that exist at a time


def linear(x, weight, bias=None):
    """y = x Wᵀ + b: x (..., in), weight (out, in), bias (out,) -> (..., out).

    A weight with a leading batch axis, (B, out, in), applies its own matrix to each x[b] of (B, T, in).
    Raises: ValueError with both shapes if `in` differs.
    """
    check_same("linear", x, weight, bias)
    X, W = x.data, weight.data
    x_shape = X.shape
    if W.ndim < 2 or X.ndim < 1 or x_shape[-1] != W.shape[-1] or (W.ndim > 2 and x_shape[:-2] != W.shape[:-2]):
        raise ValueError(f"linear: x {x_shape} does not fit weight {W.shape}: last axes (and batch axes) must be equal")
    if bias is not None and bias.shape != W.shape[-2:-1]:
        raise ValueError(f"linear: bias {bias.shape} does not fit weight {W.shape}: one number per row of it")
    # One matrix multiplication each way: leading axes are folded into rows, unless each has its own matrix.
    fold = (lambda a: a.reshape(-1, a.shape[-1])) if W.ndim == 2 else (lambda a: a)
    X = fold(X)
    y = X @ W.swapaxes(-1, -2)
    if bias is not None:
        y += bias.data
    return record(
        y.reshape(*x_shape[:-1], W.shape[-2]),
        (x, lambda dy: (fold(dy) @ W).reshape(x_shape)),
        (weight, lambda dy: fold(dy).swapaxes(-1, -2) @ X),
        (bias, lambda dy: dy),
    )


def embedding(weight, ids):
    """Row `ids[...]` of the table: weight (V, C), ids (...) integers on the host -> (..., C).

    Raises: TypeError if ids are not integers, ValueError if one lies outside 0 .. V-1.
    """
    rows = check_ids("token ids", ids, weight.shape[0])
    return weight[to_device(rows, get_array_module(weight.data))]  # a token that occurs twice collects both gradients


def layer_norm(x, weight, bias, eps=1e-5):
    """y = (x - mean) / sqrt(var + eps) * weight + bias over the last axis: (..., C) -> (..., C).

    Source: Ba, Kiros & Hinton 2016, "Layer Normalization". Derived in full in examples/layer_norm.md.
    """
    check_same("layer_norm", x, weight, bias)
    if not x.shape[-1:] == weight.shape == bias.shape:
        raise ValueError(f"layer_norm: x {x.shape}, weight {weight.shape}, bias {bias.shape}: the last axes must match")
    w, xp = weight.data, get_array_module(weight.data)
    ones = xp.ones((w.size, 1), w.dtype)  # row @ ones is its sum, several times faster than .sum()
    normed = x.data - (x.data @ ones) / w.size
    rstd = 1 / xp.sqrt(_dot(normed, normed) / w.size + eps)
    normed *= rstd

    def dx(dy):
        d = dy * w
        along = _dot(d, normed) / w.size
        d -= (d @ ones) / w.size
        d -= normed * along
        d *= rstd
        return d

    y = normed * w
    y += bias.data
    return record(y, (x, dx), (weight, lambda dy: dy * normed), (bias, lambda dy: dy))


def gelu(x):
    """0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³))), element by element: GPT-2's `gelu_new`.

    Source: Hendrycks & Gimpel 2016, "Gaussian Error Linear Units". Never x**3: NumPy's power is far slower than x*x*x.
    """
    c, a = math.sqrt(2 / math.pi), 0.044715
    x_, xp = x.data, get_array_module(x.data)
    square = xp.square(x_, out=xp.empty_like(x_))
    s = xp.multiply(square, c * a, out=xp.empty_like(x_))
    s += c  # in place where the array is ours: half the time of this op is fetching fresh memory
    s *= x_
    xp.tanh(s, out=s)
    s += 1
    s *= 0.5  # s = (1 + t) / 2 with t = tanh(c (x + a x³))
    y, d = x_ * s, None
    if is_recording() and x.requires_grad:  # the derivative is made now: it is all that is kept, neither x nor s
        d = square
        d *= 6 * c * a
        d += 2 * c
        d *= y
        xp.subtract(1, s, out=s)
        d *= s
        d -= s
        d += 1  # s + x s (1 - s) 2 c (1 + 3 a x²), as 1 - t² = 4 s (1 - s)
    return record(y, (x, lambda dy: dy * d))


def rotary(x, cos, sin, n_head):
    """Turn each pair of channels (i, i + D/2) of every head by its position's angle: x (B, T, C) -> (B, T, C).

    cos, sin are arrays (T, D/2). After it, a query and a key meet at an angle that tells only their distance.
    Source: Su et al. 2021, "RoFormer", eq. 34, with the halves paired as in GPT-NeoX.
    """
    shape, xp = x.shape, get_array_module(x.data, cos, sin)
    fits = x.ndim == 3 and n_head >= 1 and shape[2] % (2 * n_head) == 0
    if not fits or not cos.shape == sin.shape == (shape[1], shape[2] // (2 * n_head)):
        raise ValueError(f"rotary: x {shape}, cos {cos.shape}, sin {sin.shape} do not fit with {n_head} heads of pairs")
    if not cos.dtype == sin.dtype == x.dtype:
        raise TypeError(f"rotary: x is {x.dtype}, cos {cos.dtype}, sin {sin.dtype}; make the angles as x is")
    cos = xp.tile(xp.concatenate([cos, cos], axis=1), n_head)  # (T, C), the same for every head
    sin = xp.tile(xp.concatenate([-sin, sin], axis=1), n_head)

    def turn(a, sin):
        partner = a.reshape(*shape[:2], n_head, 2, -1)[..., ::-1, :].reshape(shape)  # the other one of each pair
        return a * cos + partner * sin

    return record(turn(x.data, sin), (x, lambda dy: turn(dy, -sin)))  # back: by the opposite angle


def attention(q, k, v, n_head):
    """Causal attention in `n_head` heads: q (B, T, C), k and v (B, S, C) -> (B, T, C).

    Query t is position S - T + t (with a key/value cache S > T) and sees keys 0 .. S - T + t.
    Raises: ValueError with the three shapes if they do not fit.
    Source: Vaswani et al. 2017, "Attention Is All You Need", eq. 1; in blocks, with the probabilities made again for
    the gradient and not kept, as Dao et al. 2022, "FlashAttention", algorithms 1 and 4.
    """
    check_same("attention", q, k, v)
    (B, T, C), S = q.shape if q.ndim == 3 else (0, 0, 0), k.shape[1] if k.ndim == 3 else 0
    if not k.shape == v.shape == (B, S, C) or S < T or n_head < 1 or C % n_head:
        raise ValueError(f"attention: q {q.shape}, k {k.shape}, v {v.shape} do not fit with {n_head} heads")
    xp, scale = get_array_module(q.data), 1 / math.sqrt(C // n_head)
    split = lambda a: a.reshape(B, -1, n_head, C // n_head).swapaxes(1, 2)  # (B, T, C) -> (B, H, T, D), a view
    join = lambda a: a.swapaxes(1, 2).reshape(B, -1, C)  # and back
    Q, K, V = split(q.data * scale), split(k.data), split(v.data)
    O, (tops, totals) = xp.empty_like(Q), xp.empty((2, B, n_head, 1, T), Q.dtype)  # in memory O is as Q: (B, T, H, D)
    # A block of queries and the keys that its last one sees: what lies beyond is never computed.
    blocks = [(slice(t, t + QUERIES), slice(S - T + t + QUERIES)) for t in range(0, T, QUERIES)]

    def scores(rows, seen):  # keys first: NumPy takes a maximum over the first axis several times faster
        block = K[:, :, seen] @ Q[:, :, rows].swapaxes(-1, -2)
        n = block.shape[-1]
        if n > 1:
            block[:, :, -n:] += xp.tril(xp.full((n, n), -math.inf, Q.dtype), -1)  # the future is out of sight
        return block

    for rows, seen in blocks:
        P = scores(rows, seen)
        tops[..., rows] = P.max(axis=-2, keepdims=True)
        P -= tops[..., rows]
        xp.exp(P, out=P)
        totals[..., rows] = xp.ones((1, P.shape[-2]), P.dtype) @ P
        O[:, :, rows] = P.swapaxes(-1, -2) @ V[:, :, seen]
    O /= totals.swapaxes(-1, -2)  # D numbers a row are divided, not S

    def dqkv(dy):
        dO, dQ, dK, dV = split(dy) / totals.swapaxes(-1, -2), *map(xp.zeros_like, (Q, K, V))
        along = _dot(dO, O).swapaxes(-1, -2)  # Σ dP P = Σ dO O
        for rows, seen in blocks:
            P = scores(rows, seen)
            P -= tops[..., rows]
            xp.exp(P, out=P)
            dV[:, :, seen] += P @ dO[:, :, rows]
            dS = V[:, :, seen] @ dO[:, :, rows].swapaxes(-1, -2)  # dP, and from here softmax's VJP in place
            dS -= along[..., rows]
            dS *= P
            dQ[:, :, rows] = (dS.swapaxes(-1, -2) @ K[:, :, seen]) * scale
            dK[:, :, seen] += dS @ Q[:, :, rows]
        return join(dQ), join(dK), join(dV)

    return record(join(O), ((q, k, v), dqkv))


def linear_cross_entropy(x, weight, targets):
    """Mean of -log softmax(x Wᵀ)[target], in nats: x (..., C), weight (V, C), targets (...) integers -> a scalar.

    A target of -100 carries no loss, and its row is not computed. Logits exist for LOGITS rows at a time, never all at
    once: the gradients are made on the way, where they still do.
    Raises: ValueError if shapes differ, a target lies outside 0 .. V-1, or all are -100; TypeError if not integers.
    """
    check_same("linear_cross_entropy", x, weight)
    xp, targets, shape, W = get_array_module(x.data), on_host(targets), x.shape, weight.data
    if W.ndim != 2 or shape[-1:] != W.shape[1:] or targets.shape != shape[:-1]:
        raise ValueError(f"linear_cross_entropy: x {shape}, weight {W.shape}, targets {targets.shape} do not fit")
    (rows,) = np.nonzero(targets.reshape(-1) != IGNORE)
    if rows.size == 0:
        raise ValueError(f"linear_cross_entropy: none of {targets.size} targets carries a loss (all are {IGNORE})")
    columns = to_device(check_ids("targets", targets.reshape(-1)[rows], len(W)), xp)
    rows, n, X, loss = to_device(rows, xp), rows.size, x.data.reshape(-1, shape[-1]), 0
    dX = xp.zeros_like(X) if is_recording() and x.requires_grad else None
    dW = 0 if is_recording() and weight.requires_grad else None
    for block in (slice(start, start + LOGITS) for start in range(0, n, LOGITS)):
        X_block = X[rows[block]]
        z = X_block @ W.T
        at_target = (xp.arange(len(z)), columns[block])
        z -= z.max(axis=-1, keepdims=True)
        right = z[at_target]
        xp.exp(z, out=z)
        total = z @ xp.ones((len(W), 1), z.dtype)
        loss += (xp.log(total[:, 0]) - right).sum()
        z[at_target] -= total[:, 0]  # z / total is softmax minus one-hot; it is divided below, where rows are thin
        if dX is not None:
            dX[rows[block]] = (z @ W) / total
        if dW is not None:
            dW += z.T @ (X_block / total)
    dx = lambda dy: (dX * (dy / n)).reshape(shape)
    return record(xp.asarray(loss / n), (x, dx), (weight, lambda dy: dW * (dy / n)))


def dropout(x, p, rng):
    """While a graph is recorded: each element is zero with probability p, else divided by 1 - p. Otherwise x itself.

    `p` is a number, or an array that broadcasts against x (one rate per batch row); `rng` a `numpy.random.Generator`.
    Raises: ValueError if p is outside [0, 1), or p > 0 and there is no rng. Source: Srivastava et al. 2014.
    """
    if not np.all((0 <= np.asarray(p)) & (np.asarray(p) < 1)):
        raise ValueError(f"dropout: p must lie in [0, 1), got {p}")
    if not np.any(p) or not is_recording():
        return x
    if rng is None:
        raise ValueError(f"dropout of {p} needs a random generator: pass rng, or compute under no_grad()")
    kept = (rng.random(x.shape) >= p) / (1 - p)
    mask = to_device(kept.astype(x.dtype), get_array_module(x.data))
    return record(x.data * mask, (x, lambda dy: dy * mask))


def check_ids(what, ids, n):
    """`ids` as a NumPy array, if they are integers in 0 .. n-1. On the host, where token ids are made, this is free."""
    ids = on_host(ids)
    if ids.dtype.kind not in "iu":
        raise TypeError(f"{what} must be integers, got {ids.dtype}")
    if ids.size and not (0 <= ids.min() and ids.max() < n):
        raise ValueError(f"{what} lie in {ids.min()} .. {ids.max()}, but must lie in 0 .. {n - 1}")
    return ids


def _dot(a, b):
    """Σ a b over the last axis, which stays: (..., C) and (..., C) -> (..., 1)."""
    return get_array_module(a).einsum("...i,...i->...", a, b)[..., None]
