"""The ops of a decoder as a textbook has them, each with its derivatives. Knows no modules.

These are to be read. The models run the norms, gelu, swiglu, attention and the loss from `lean.py`:
the same functions in less memory and time.

Shapes: B batch, T time (positions), S positions attended to (S >= T), C channels, H heads,
D = C / H, G heads in a group, V vocabulary, N rows. A gradient of `x` is called `dx`.
Constants come from `math`: a NumPy scalar would turn float32 into float64.
"""

import math

import numpy as np

from .backend import check_rng, get_array_module, on_host, to_device
from .kernels import times_rows
from .tensor import check_same, record

# A target with this value carries no loss.
IGNORE = -100


def linear(x, weight, bias=None):
    """y = x Wᵀ + b: x (..., in), weight (out, in), bias (out,) or None -> (..., out).

    Raises: ValueError with both shapes if they do not fit.
    """
    check_same("linear", x, weight, bias)
    check_linear(x, weight, bias)
    W = weight.data
    x_shape = x.shape

    # Leading axes become rows: one matrix multiplication each way.
    X = x.data.reshape(-1, W.shape[1])  # (N, in)
    Y = times_rows(X, W)  # X Wᵀ, (N, out)
    if bias is not None:
        Y += bias.data

    # The VJP of x needs W, which is there anyway, and not X. Where W is frozen, only x has an edge,
    # and X is freed. The VJP of the bias may have the shape of y: the engine sums over the rows.
    n_out = W.shape[0]
    rows = lambda dy: dy.reshape(-1, n_out)  # (N, out)
    return record(
        Y.reshape(*x_shape[:-1], n_out),
        (x, lambda dy: (rows(dy) @ W).reshape(x_shape)),
        (weight, lambda dy: rows(dy).T @ X),
        (bias, lambda dy: dy),
    )


def check_linear(x, weight, bias):
    """Raise ValueError, with both shapes, unless x, weight and bias (or None) fit together."""
    if weight.ndim != 2 or x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear: x {x.shape} does not fit weight {weight.shape}: "
            "the last axes must be equal, weight is (out, in)"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"linear: bias {bias.shape} does not fit weight {weight.shape}: one number for each row"
        )


def embedding(weight, ids):
    """Row `ids[...]` of the table: weight (V, C), ids (...) integers on the host -> (..., C).

    Its derivative is that of indexing, `Tensor.__getitem__`: a token that occurs twice collects
    both gradients.
    Raises: TypeError if ids are not integers, ValueError if one lies outside 0 .. V-1.
    """
    ids = check_ids("token ids", ids, weight.shape[0])
    return weight[to_device(ids, get_array_module(weight.data))]


def layer_norm(x, weight, bias, eps=1e-5):
    """y = (x - mean) / sqrt(var + eps) * weight + bias over the last axis: (..., C) -> (..., C).

    Source: Ba, Kiros & Hinton 2016, "Layer Normalization". Derived in examples/layer_norm.md.
    """
    check_layer_norm(x, weight, bias)
    w = weight.data
    xp = get_array_module(w)
    centred = x.data - x.data.mean(-1, keepdims=True)
    var = (centred * centred).mean(-1, keepdims=True)  # (..., 1)
    rstd = 1 / xp.sqrt(var + eps)
    normed = centred * rstd  # (..., C)

    def dx(dy):
        d = dy * w
        along = (d * normed).mean(-1, keepdims=True)
        return (d - d.mean(-1, keepdims=True) - normed * along) * rstd

    return record(
        normed * w + bias.data,
        (x, dx),
        (weight, lambda dy: dy * normed),
        (bias, lambda dy: dy),
    )


def check_layer_norm(x, weight, bias):
    """Raise TypeError or ValueError, with the three shapes, unless they fit together."""
    check_same("layer_norm", x, weight, bias)
    if not x.shape[-1:] == weight.shape == bias.shape:
        raise ValueError(
            f"layer_norm: x {x.shape}, weight {weight.shape}, bias {bias.shape}: "
            "the last axes must be equal"
        )


def rms_norm(x, weight, eps=1e-6):
    """y = x / sqrt(mean(x²) + eps) * weight over the last axis: (..., C) -> (..., C).

    Layer normalisation without the mean and without the bias.
    Source: Zhang & Sennrich 2019, "Root Mean Square Layer Normalization", eq. 4.
    """
    check_rms_norm(x, weight)
    w = weight.data
    X = x.data
    rstd = 1 / get_array_module(w).sqrt((X * X).mean(-1, keepdims=True) + eps)  # (..., 1)
    normed = X * rstd  # (..., C)

    def dx(dy):
        d = dy * w
        along = (d * normed).mean(-1, keepdims=True)
        return (d - normed * along) * rstd

    return record(normed * w, (x, dx), (weight, lambda dy: dy * normed))


def check_rms_norm(x, weight):
    """Raise TypeError or ValueError, with both shapes, unless they fit together."""
    check_same("rms_norm", x, weight)
    if weight.ndim != 1 or x.shape[-1:] != weight.shape:
        raise ValueError(
            f"rms_norm: x {x.shape}, weight {weight.shape}: the last axes must be equal"
        )


def gelu(x):
    """0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³))), element by element: GPT-2's `gelu_new`.

    Source: Hendrycks & Gimpel 2016, "Gaussian Error Linear Units".
    """
    c = math.sqrt(2 / math.pi)
    a = 0.044715
    X = x.data
    # X * X * X, never X**3: NumPy's power takes many times as long.
    t = get_array_module(X).tanh(c * (X + a * (X * X * X)))

    def dx(dy):
        dt_dx = (1 - t * t) * c * (1 + 3 * a * (X * X))
        return dy * (0.5 * (1 + t) + 0.5 * X * dt_dx)

    return record(0.5 * X * (1 + t), (x, dx))


def swiglu(gate, up):
    """silu(gate) * up, element by element, with silu(g) = g sigmoid(g).

    Shapes: both (..., C) -> (..., C). Raises: ValueError with both shapes if they differ.
    Source: Shazeer 2020, "GLU Variants Improve Transformer", eq. 6.
    """
    check_swiglu(gate, up)
    g = gate.data
    u = up.data
    # sigmoid(g) by tanh, which cannot overflow: exp(-g) would for a g far below zero.
    s = 0.5 * (1 + get_array_module(g).tanh(0.5 * g))
    silu = g * s
    # d silu / dg = s + g s (1 - s)
    return record(
        silu * u,
        (gate, lambda dy: dy * u * (s + silu * (1 - s))),
        (up, lambda dy: dy * silu),
    )


def check_swiglu(gate, up):
    """Raise TypeError or ValueError, with both shapes, unless they are alike."""
    check_same("swiglu", gate, up)
    if gate.shape != up.shape:
        raise ValueError(f"swiglu: gate {gate.shape}, up {up.shape}: both must have one shape")


def concatenate(tensors, axis=0):
    """Tensors one after the other along `axis`; the other axes are alike.

    Raises: ValueError with the shapes if they do not fit.
    """
    tensors = tuple(tensors)
    if not tensors:
        raise ValueError("concatenate: there is no tensor to concatenate")
    check_same("concatenate", *tensors)
    xp = get_array_module(*[t.data for t in tensors])
    shapes = [t.shape for t in tensors]
    try:
        y = xp.concatenate([t.data for t in tensors], axis=axis)
    except ValueError:
        shown = ", ".join(map(str, shapes))
        raise ValueError(
            f"concatenate: shapes {shown} differ in another axis than {axis}"
        ) from None
    ends = np.cumsum([shape[axis] for shape in shapes])[:-1].tolist()
    return record(y, (tensors, lambda dy: tuple(xp.split(dy, ends, axis=axis))))


def rotary(x, cos, sin, n_head):
    """Turn each pair of channels (i, i + D/2) of every head by the angle of its position.

    The score of a rotated query and key then depends only on the distance of their positions.
    Shapes: x (B, T, C) -> (B, T, C); cos and sin are arrays (T, D/2), or (B, T, D/2) where rows
    differ in their positions, in the dtype of x.
    Source: Su et al. 2021, "RoFormer", eq. 34, with the halves paired as in GPT-NeoX.
    """
    xp = get_array_module(x.data, cos, sin)
    if x.ndim != 3 or n_head < 1 or x.shape[2] % (2 * n_head):
        raise ValueError(f"rotary: x {x.shape} does not fit with {n_head} heads of pairs")
    B, T, C = x.shape
    D = C // n_head
    if cos.shape != sin.shape or cos.shape not in ((T, D // 2), (B, T, D // 2)):
        raise ValueError(
            f"rotary: x {x.shape}, cos {cos.shape}, sin {sin.shape} do not fit with {n_head} heads"
        )
    if not cos.dtype == sin.dtype == x.dtype:
        raise TypeError(
            f"rotary: x is {x.dtype}, cos {cos.dtype}, sin {sin.dtype}; make the angles as x is"
        )
    # Both halves of a head have the same angles, and all heads do: (T, D/2) -> (T, 1, D).
    # first' = first cos - second sin, second' = second cos + first sin: hence the minus.
    cos = xp.concatenate([cos, cos], axis=-1)[..., None, :]
    sin = xp.concatenate([-sin, sin], axis=-1)[..., None, :]

    def turn(a, signed_sin):
        heads = a.reshape(B, T, n_head, D)
        # The partner of each channel: the halves in the other order.
        halves = a.reshape(B, T, n_head, 2, D // 2)
        partner = halves[:, :, :, ::-1].reshape(B, T, n_head, D)
        return (heads * cos + partner * signed_sin).reshape(B, T, C)

    # The gradient is turned back by the opposite angle.
    return record(turn(x.data, sin), (x, lambda dy: turn(dy, -sin)))


def attention(q, k, v, n_head):
    """softmax(q kᵀ / √D + mask) v in each of `n_head` heads, causal.

    Query t is position S - T + t (with a key/value cache S > T) and sees keys 0 .. S - T + t. Keys
    and values may have fewer heads: each then serves a group of G queries' heads, one after the
    other (grouped queries; one head for all of them is called multi-query).
    Shapes: q (B, T, C), k and v (B, S, C / G) -> (B, T, C). D = C / n_head.
    Raises: ValueError with the three shapes if they do not fit.
    Source: Vaswani et al. 2017, "Attention Is All You Need", eq. 1; Ainslie et al. 2023, "GQA".
    """
    n_kv_head = check_attention(q, k, v, n_head)
    B, T, C = q.shape
    S = k.shape[1]
    D = C // n_head
    scale = 1 / math.sqrt(D)
    xp = get_array_module(q.data)
    # (B, T, C) -> (B, n_kv_head, G, T, D) and back; keys and values have one head for a group.
    split = lambda a: a.reshape(B, a.shape[1], n_kv_head, -1, D).transpose(0, 2, 3, 1, 4)
    join = lambda a: a.transpose(0, 3, 1, 2, 4).reshape(B, a.shape[3], -1)
    Q = split(q.data)
    K = split(k.data)  # (B, n_kv_head, 1, S, D)
    V = split(v.data)  # the values, not the vocabulary

    # A query must not see later positions: a score of -∞ becomes probability zero.
    mask = xp.triu(xp.full((T, S), -math.inf, Q.dtype), S - T + 1)
    scores = (Q @ K.swapaxes(-1, -2)) * scale + mask  # (B, n_kv_head, G, T, S)
    # The largest score of a row is subtracted, so that exp cannot overflow. P does not change.
    E = xp.exp(scores - scores.max(-1, keepdims=True))
    P = E / E.sum(-1, keepdims=True)
    O = P @ V  # (B, n_kv_head, G, T, D)

    def dqkv(dy):
        dO = split(dy)
        dV = P.swapaxes(-1, -2) @ dO
        dP = dO @ V.swapaxes(-1, -2)
        # The VJP of softmax.
        dscores = P * (dP - (dP * P).sum(-1, keepdims=True))
        dQ = (dscores @ K) * scale
        dK = (dscores.swapaxes(-1, -2) @ Q) * scale
        # A key and a value collect the gradients of all heads of their group.
        over_group = lambda a: a.sum(2, keepdims=True)
        return join(dQ), join(over_group(dK)), join(over_group(dV))

    return record(join(O), ((q, k, v), dqkv))


def check_attention(q, k, v, n_head):
    """The number of heads of k and v, if attention can be computed.

    Raises: TypeError or ValueError, with the three shapes, if it cannot.
    """
    check_same("attention", q, k, v)
    q_shape = q.shape
    k_shape = k.shape
    v_shape = v.shape
    fits = len(q_shape) == len(k_shape) == 3 and n_head >= 1 and q_shape[-1] % n_head == 0
    fits = fits and 0 not in q_shape and 0 not in k_shape
    if fits:
        B, T, C = q_shape
        S = k_shape[1]
        D = C // n_head
        n_kv_head = k_shape[2] // D
        fits = k_shape == v_shape == (B, S, n_kv_head * D) and S >= T
        fits = fits and n_kv_head >= 1 and n_head % n_kv_head == 0
    if not fits:
        raise ValueError(
            f"attention: q {q_shape}, k {k_shape}, v {v_shape} do not fit with {n_head} heads"
        )
    return n_kv_head


def cross_entropy(logits, targets):
    """Mean of -log softmax(logits)[target], in nats: logits (..., V), targets (...) -> a scalar.

    A target of -100 carries no loss.
    Raises: ValueError if shapes differ, a target lies outside 0 .. V-1, or all are -100;
    TypeError if they are not integers.
    """
    shape = logits.shape
    xp = get_array_module(logits.data)
    rows, columns = rows_with_loss(targets, shape[:-1], shape[-1])
    n = rows.size
    at_target = (xp.arange(n), to_device(columns, xp))
    row_index = to_device(rows, xp)
    Z = logits.data.reshape(-1, shape[-1])[row_index]  # (n, V)
    Z = Z - Z.max(-1, keepdims=True)
    log_p = Z - xp.log(xp.exp(Z).sum(-1, keepdims=True))

    def dlogits(dy):
        # The probabilities, minus one where the target is; the rows without a loss stay zero.
        dZ = xp.exp(log_p)
        dZ[at_target] -= 1
        d = xp.zeros((math.prod(shape[:-1]), shape[-1]), dZ.dtype)
        d[row_index] = dZ * (dy / n)
        return d.reshape(shape)

    return record(xp.asarray(-log_p[at_target].mean()), (logits, dlogits))


def linear_cross_entropy(x, weight, targets):
    """The loss of the head: x (..., C), weight (V, C), targets (...) integers -> a scalar.

    All logits are in memory at once, and so are their gradients.
    Raises: as `linear` and `cross_entropy`.
    """
    return cross_entropy(linear(x, weight), targets)


def rows_with_loss(targets, shape, V):
    """(rows, columns) on the host: which of the flattened targets carry a loss, and their ids.

    Raises: ValueError if `targets` are not of that shape, one lies outside 0 .. V-1, or all are
    -100; TypeError if they are not integers.
    """
    targets = on_host(targets)
    if targets.shape != shape:
        raise ValueError(f"targets {targets.shape} do not fit inputs {shape}: one for each")
    targets = targets.reshape(-1)
    rows = np.flatnonzero(targets != IGNORE)
    if rows.size == 0:
        raise ValueError(f"none of {targets.size} targets carries a loss (all are {IGNORE})")
    return rows, check_ids("targets", targets[rows], V)


def dropout(x, p, rng):
    """Zero each element with probability p and divide the others by 1 - p.

    Without `rng`, or where p is zero, this is x itself.

    `p` is a number, or an array that broadcasts against x (one rate for each batch row); `rng` a
    `numpy.random.Generator` or None.
    Raises: ValueError if p is outside [0, 1), TypeError for another kind of generator.
    Source: Srivastava et al. 2014.
    """
    if rng is None:
        return x
    if not np.all((0 <= np.asarray(p)) & (np.asarray(p) < 1)):
        raise ValueError(f"dropout: p must lie in [0, 1), got {p}")
    if not np.any(p):
        return x
    # NumPy draws, in float32 whatever x is, and booleans are moved, a byte each: one seed drops the
    # same on every backend and in every dtype.
    xp = get_array_module(x.data)
    drawn = check_rng(rng).random(x.shape, np.float32)
    kept = to_device(drawn >= np.asarray(p, np.float32), xp)
    scale = 1 / (1 - p)
    if np.ndim(scale):
        scale = to_device(scale.astype(x.dtype), xp)

    def drop(a):
        y = a * kept
        y *= scale
        return y

    return record(drop(x.data), (x, drop))


def check_ids(what, ids, n):
    """`ids` as a NumPy array, if they are integers in 0 .. n-1. Ids are made on the host."""
    ids = on_host(ids)
    if ids.dtype.kind not in "iu":
        raise TypeError(f"{what} must be integers, got {ids.dtype}")
    if ids.size and not (0 <= ids.min() and ids.max() < n):
        raise ValueError(f"{what} lie in {ids.min()} .. {ids.max()}, but must lie in 0 .. {n - 1}")
    return ids
