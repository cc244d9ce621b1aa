"""What a GPU computes in another way than a processor. Knows arrays, no tensors.

A processor wants arrays in blocks that fit its cache, and sums as products of matrices. A GPU wants
few calls, for each launches a kernel: some 10 µs of Python, however little is computed. So blocks
are larger there, and a formula of many operations is one kernel. A test counts the calls of a step.

Skip it on a first reading: each function says what it computes.
"""

import functools

import numpy as np

from .backend import get_array_module

# So many bytes a block of rows may take on a GPU.
GPU_BLOCK_BYTES = 1 << 29
# From how many numbers on a weight is taken for larger than its share of a processor's cache.
DOT_SIZE = 1 << 17


def block_length(xp, on_host, row_bytes):
    """How many rows of `row_bytes` bytes to make at a time: `on_host`, or on a GPU more."""
    return on_host if xp is np else max(1, GPU_BLOCK_BYTES // row_bytes)


def times_rows(x, w):
    """x wᵀ, each row of x times each row of w: (N, in) and (out, in) -> (N, out).

    A single row, as in generation, reads all of w for one number each. On the host a dot product
    with each of its rows then takes half the time of BLAS's product, unless a cache holds w.
    """
    if len(x) == 1 and get_array_module(w) is np:
        if w.size >= DOT_SIZE and w.flags.c_contiguous:
            return np.vecdot(x, w)[None]
    return x @ w.T


def row_sum(a):
    """Σ a over the last axis, which stays: (..., C) -> (..., 1).

    On the host a product with a column of ones takes a fraction of the time of `.sum(-1)`.
    """
    xp = get_array_module(a)
    if xp is np:
        return a @ _ones(a.shape[-1], a.dtype.char)[:, None]
    return a.sum(-1, keepdims=True)


def row_mean(a):
    """The mean over the last axis, which stays: (..., C) -> (..., 1)."""
    if get_array_module(a) is np:
        return row_sum(a) / a.shape[-1]
    return a.mean(-1, keepdims=True)


def column_sum(a):
    """Σ a over the last axis but one, which stays: (..., R, C) -> (..., 1, C)."""
    xp = get_array_module(a)
    if xp is np:
        return _ones(a.shape[-2], a.dtype.char)[None] @ a
    return a.sum(-2, keepdims=True)


def row_dot(a, b):
    """Σ a b over the last axis, which stays: (..., C) and (..., C) -> (..., 1)."""
    xp = get_array_module(a, b)
    if xp is np:
        return np.vecdot(a, b)[..., None]
    if has_kernels(xp):
        return _dot_kernel(xp)(a, b, axis=-1, keepdims=True)
    return (a * b).sum(-1, keepdims=True)


def row_mean_dot(a, b):
    """The mean of a b over the last axis, which stays: (..., C) and (..., C) -> (..., 1)."""
    xp = get_array_module(a, b)
    if has_kernels(xp):
        return _mean_dot_kernel(xp)(a, b, axis=-1, keepdims=True)
    return row_dot(a, b) / a.shape[-1]


def sum_of_squares(arrays):
    """Σ a² over all numbers of all `arrays`, of one backend: a scalar of it."""
    xp = get_array_module(*arrays)
    if xp is np:
        return sum(np.vecdot(a, a).sum() for a in map(np.atleast_1d, arrays))
    if not has_kernels(xp):
        return sum((a * a).sum() for a in arrays)
    return xp.stack([_dot_kernel(xp)(a, a) for a in arrays]).sum()


def has_kernels(xp):
    """Can `xp` make a kernel of several operations? CuPy can."""
    # NumPy is asked most often, and takes long to say what it has not.
    return xp is not np and hasattr(xp, "ElementwiseKernel")


@functools.lru_cache(maxsize=32)
def _ones(n, dtype):
    """A vector of ones that many sums share, so that nobody may write it."""
    ones = np.ones(n, dtype)
    ones.flags.writeable = False
    return ones


@functools.cache
def _dot_kernel(xp):
    return xp.ReductionKernel("T a, T b", "T y", "a * b", "a + b", "y = a", "0", "minilora_dot")


@functools.cache
def _mean_dot_kernel(xp):
    # Of how many numbers each is the mean: CuPy's own mean counts them like this.
    mean = "y = a / T(_in_ind.size() / _out_ind.size())"
    return xp.ReductionKernel("T a, T b", "T y", "a * b", "a + b", mean, "0", "minilora_mean_dot")


@functools.cache
def gelu_kernel(xp):
    """The kernel x -> (y, dy/dx) of GELU; the formulas are those of `lean.gelu`."""
    return xp.ElementwiseKernel(
        "T x",
        "T y, T derivative",
        """
        const T c = 0.79788456080286535588;  // sqrt(2 / pi)
        const T a = 0.044715;
        const T square = x * x;
        const T s = (T(1) + tanh(x * (c + c * a * square))) * T(0.5);
        y = x * s;
        derivative = s + (T(2) * c + T(6) * c * a * square) * y * (T(1) - s);
        """,
        "minilora_gelu",
    )


@functools.cache
def swiglu_kernel(xp):
    """The kernel (g, u) -> (y, dy/dg, dy/du) of SwiGLU; the formulas are those of `lean.swiglu`."""
    return xp.ElementwiseKernel(
        "T g, T u",
        "T y, T dgate, T dup",
        """
        const T s = (T(1) + tanh(g * T(0.5))) * T(0.5);
        dup = g * s;
        y = dup * u;
        dgate = u * (s + dup * (T(1) - s));
        """,
        "minilora_swiglu",
    )


@functools.cache
def adam_kernel(xp):
    """The kernel that updates a parameter w and its moments in place, as `optim.Adam` does it."""
    return xp.ElementwiseKernel(
        "T g, T new_in_m, T new_in_v, T decay, T rate, T v_root, T eps",
        "T w, T m, T v",
        """
        m += new_in_m * (g - m);
        v += new_in_v * (g * g - v);
        w *= decay;
        w -= rate * (m / (sqrt(v) / v_root + eps));
        """,
        "minilora_adam",
    )
