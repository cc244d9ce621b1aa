"""Frozen weights that stay as a file stores them, widened where they are used. Knows arrays.

A 4-bit weight takes an eighth of the memory of its float32 values. It is widened whole, and then
goes through the same product as any other: so the results are those of the widened model to the
bit. The wide array lives as long as the product, forward and once more backward.

A packed weight is rows of blocks. In a block some numbers q of few bits share a scale d, and with
Q4_1 an offset m as well. All arrays keep the layout of the files they come from:

    Q8_0    32 weights in 34 bytes: d, 32 numbers of 8 bits             w = d q
    Q4_0    32 weights in 18 bytes: d, 32 numbers of 4 bits             w = d (q - 8)
    Q4_1    32 weights in 20 bytes: d, m, 32 numbers of 4 bits          w = d q + m
    NF4     64 weights in 32 bytes, 4 bits each; 8 bits for a scale     w = d table[q]
    F16, BF16    one weight in 2 bytes

Source: llama.cpp's ggml-quants.c for Q8_0, Q4_0 and Q4_1; NF4 is explained in quant.py.
Shapes: weight (out, in) or any other; n blocks.
"""

import math
import threading
import weakref
from collections import namedtuple

import numpy as np

from .backend import get_array_module, to_device
from .functional import check_linear
from .kernels import times_rows
from .tensor import Tensor, check_same, record

# {kind: (weights in a block, bytes of a block)}, as in GGUF files.
BLOCKS = {"Q8_0": (32, 34), "Q4_0": (32, 18), "Q4_1": (32, 20)}
HALVES = ("F16", "BF16")
# How many weights are widened at a time: what a processor's cache holds.
STRIDE = 1 << 18
# The 16 numbers of NF4 split the normal distribution into parts of equal probability, with one that
# is exactly zero. Source: Dettmers et al. 2023, "QLoRA", appendix E.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
NF4_BLOCK = 64
# Of how many scales of NF4 the scales share one of their own.
SCALE_BLOCK = 256

# What a packed tensor was quantised from: how that was stored, the digest of its values, and
# ‖difference‖ / ‖values‖.
Source = namedtuple("Source", "kind digest error")


class Packed:
    """A weight as it is stored: its kind, its shape, and the arrays that hold it.

    Q8_0, Q4_0, Q4_1: one uint8 array (rows, bytes of a row). F16, BF16: one uint16 array of `shape`
    that holds the bits. NF4: codes (n, 32) uint8, scales (n,) uint8, scale_scales (n / 256,)
    float32, and the mean of the scales, (1,) float32.
    Raises: ValueError for an unknown kind, or arrays that do not hold a weight of `shape`.
    """

    def __init__(self, kind, shape, *arrays):
        self.kind = kind
        self.shape = tuple(shape)
        self.arrays = arrays
        self.lock = threading.Lock()
        # The values, as long as somebody holds them: threads that compute parts of a batch meet
        # at the same weight, and the largest, the head, would be there twice.
        self.held_values = lambda: None
        layout = [(array.shape, array.dtype.name) for array in arrays]
        expected = layout_of(kind, self.shape)
        if layout != expected:
            raise ValueError(f"a {kind} of {self.shape} is stored in {expected}, got {layout}")

    size = property(lambda self: math.prod(self.shape))
    nbytes = property(lambda self: sum(array.nbytes for array in self.arrays))
    xp = property(lambda self: get_array_module(*self.arrays))

    def widened(self):
        """The values: a float32 array of `shape`, which nobody may write.

        It is made anew, unless another thread still holds the last one.
        """
        with self.lock:
            y = self.held_values()
            if y is None:
                y = self._values()
                if isinstance(y, np.ndarray):
                    y.flags.writeable = False
                    self.held_values = weakref.ref(y)
        # The last block of NF4 may be filled up.
        return y.reshape(-1)[: self.size].reshape(self.shape)

    def _values(self):
        if self.kind == "NF4":
            return self._widened_nf4()
        return self._widened_rows(*self.arrays, self.shape)

    def rows(self, ids):
        """The values of some rows, widened alone: ids (...) integers -> float32 (..., in)."""
        if self.kind == "NF4":
            return self.widened()[ids]
        return self._widened_rows(self.arrays[0][ids], (*ids.shape, *self.shape[1:]))

    def is_finite(self):
        """Is no value inf or nan? Where weights share scales, only those are looked at."""
        xp = self.xp
        if self.kind == "NF4":
            return all(bool(xp.isfinite(scales).all()) for scales in self.arrays[2:])
        if self.kind in HALVES:
            return _halves_are_finite(self.arrays[0].reshape(-1), self.kind)
        n_scales = 2 if self.kind == "Q4_1" else 1
        blocks = self.arrays[0].reshape(-1, BLOCKS[self.kind][1])
        return bool(xp.isfinite(_float16s(blocks[:, : 2 * n_scales])).all())

    def _widened_rows(self, stored, shape):
        y = self.xp.empty(shape, np.float32)
        if y.size == 0:
            return y
        if self.kind in HALVES:
            widen = _from_bfloat16 if self.kind == "BF16" else _from_float16
            widen(stored, y)
            return y
        n_weights, n_bytes = BLOCKS[self.kind]
        blocks = stored.reshape(-1, n_bytes)
        values = y.reshape(-1, n_weights)
        widen = {"Q8_0": _from_q8_0, "Q4_0": _from_q4_0, "Q4_1": _from_q4_1}[self.kind]
        step = STRIDE // n_weights
        for start in range(0, len(blocks), step):
            part = slice(start, start + step)
            widen(blocks[part], values[part])
        return y

    def _widened_nf4(self):
        codes, scale_codes, scale_scales, mean = self.arrays
        xp = self.xp
        y = xp.empty((len(codes), NF4_BLOCK), np.float32)
        scales = nf4_scales(scale_codes, scale_scales, mean)
        # A byte holds two weights, the first in its upper half. A table has the pair of each byte
        # as the two parts of a complex number: one look-up instead of two.
        first, second = np.divmod(np.arange(256), 16)
        numbers = np.array(NF4, np.float32)
        table = to_device(np.stack([numbers[first], numbers[second]], axis=1), xp)
        table = table.view(np.complex64).reshape(-1)
        pairs = y.view(np.complex64)
        step = STRIDE // NF4_BLOCK
        for start in range(0, len(codes), step):
            part = slice(start, start + step)
            pairs[part] = table[codes[part]]
            y[part] *= scales[part, None]
        return y


def layout_of(kind, shape):
    """[(shape, dtype name)] of the arrays that store a weight of `shape`.

    Raises: ValueError for an unknown kind, or rows that its blocks do not fill.
    """
    if kind in HALVES:
        return [(shape, "uint16")]
    if kind in BLOCKS and len(shape) == 2:
        n_weights, n_bytes = BLOCKS[kind]
        if shape[1] % n_weights:
            raise ValueError(
                f"a {kind} has blocks of {n_weights} weights, which do not fill rows of {shape[1]}"
            )
        return [((shape[0], shape[1] // n_weights * n_bytes), "uint8")]
    if kind == "NF4":
        n = -(-math.prod(shape) // NF4_BLOCK)
        n_scales = -(-n // SCALE_BLOCK)
        return [
            ((n, NF4_BLOCK // 2), "uint8"),
            ((n,), "uint8"),
            ((n_scales,), "float32"),
            ((1,), "float32"),
        ]
    kinds = ", ".join([*BLOCKS, *HALVES, "NF4"])
    raise ValueError(
        f"a weight {shape} cannot be stored as {kind!r}; there are {kinds} (blocks fill matrices)"
    )


# Each of these writes the values of stored blocks, (n, bytes), into an array (n, weights).


def _from_q8_0(blocks, y):
    y[...] = _contiguous(blocks[:, 2:]).view(np.int8)
    y *= _float16s(blocks[:, :2])


def _from_q4_0(blocks, y):
    _unpack(blocks[:, 2:], y)
    y -= 8
    y *= _float16s(blocks[:, :2])


def _from_q4_1(blocks, y):
    _unpack(blocks[:, 4:], y)
    y *= _float16s(blocks[:, :2])
    y += _float16s(blocks[:, 2:4])


def _unpack(stored, y):
    # The lower halves of 16 bytes are the first 16 weights, the upper halves the others.
    y[:, :16] = stored & 15
    y[:, 16:] = stored >> 4


def _float16s(stored):
    """Two bytes of each row, (n, 2), as a float32 column; four as two columns."""
    return _contiguous(stored).view(np.float16).astype(np.float32)


def _contiguous(array):
    return get_array_module(array).ascontiguousarray(array)


def _halves_are_finite(bits, kind):
    # All bits of the exponent are set in inf and nan alone.
    exponent = 0x7F80 if kind == "BF16" else 0x7C00
    for start in range(0, len(bits), STRIDE):
        part = bits[start : start + STRIDE] & exponent
        if (part == exponent).any():
            return False
    return True


def _from_float16(bits, y):
    y[...] = _contiguous(bits).view(np.float16)


def _from_bfloat16(bits, y):
    # A bfloat16 is the upper half of a float32.
    wide = y.view(np.uint32)
    wide[...] = bits
    wide <<= 16


def nf4_scales(codes, scale_scales, mean):
    """The scale of each block of NF4, float32 (n,): mean + scale of 256 scales · table[code]."""
    xp = get_array_module(codes)
    table = to_device(float8_table(), xp)
    y = table[codes]
    y *= xp.repeat(scale_scales, SCALE_BLOCK)[: len(y)]
    y += mean
    return y


def float8_table():
    """The values of the 256 codes of an 8-bit float, E4M3, divided by its largest, 448.

    One bit for the sign, 4 for the exponent, 3 for the fraction. Two codes would be nan; here they
    are ±448 once more. Source: Micikevicius et al. 2022, "FP8 Formats for Deep Learning", table 1.
    """
    code = np.arange(256)
    exponent = (code >> 3) & 15
    fraction = code & 7
    normal = (1 + fraction / 8) * 2.0 ** (exponent - 7)
    subnormal = fraction / 8 * 2.0**-6
    value = np.where(exponent == 0, subnormal, normal)
    value = np.minimum(value, 448)
    return (np.where(code & 128, -value, value) / 448).astype(np.float32)


class StoredTensor(Tensor):
    """A frozen tensor over an array that nobody can write: what a file holds.

    So what is asked of its values is computed once. A GPU's arrays have no such lock: there it is a
    promise. `claim`, or None, is what the file says of the bytes: its `check()` raises ValueError
    if they are others.
    """

    __slots__ = ("_answers", "claim")

    def __init__(self, data, claim=None):
        super().__init__(data)
        self.data = _read_only(self.data)
        self._answers = {}
        self.claim = claim

    def to_device(self, xp):
        """The same tensor in the memory of `xp`."""
        return StoredTensor(to_device(self.data, xp), self.claim)

    def verify(self):
        """Raise ValueError unless the values are those that were saved, if their file tells."""
        if self.claim is not None:
            self.claim.check()

    def once(self, question):
        """`question(self.data)`: the function is called the first time alone."""
        if question not in self._answers:
            self._answers[question] = question(self.data)
        return self._answers[question]


def _read_only(array):
    """`array`, or a view of it that nobody can write."""
    if not isinstance(array, np.ndarray) or not array.flags.writeable:
        return array
    view = array.view()
    view.flags.writeable = False
    return view


class PackedTensor(StoredTensor):
    """A frozen tensor that stays as it is stored. Each time `data` is read, it is widened anew.

    `packed` is the Packed of its kind, shape and arrays. Its values are float32; its shape and size
    are known without widening, and `nbytes` is what is stored. `source` is a Source if it was
    quantised here, None if it came so from a file.
    """

    __slots__ = ("packed", "source")

    def __init__(self, kind, shape, *arrays):
        self.packed = Packed(kind, shape, *map(_read_only, arrays))
        self.source = None
        self.claim = None
        self.node = None
        self._answers = {}

    data = property(lambda self: self.packed.widened())
    kind = property(lambda self: self.packed.kind)
    shape = property(lambda self: self.packed.shape)
    ndim = property(lambda self: len(self.packed.shape))
    size = property(lambda self: self.packed.size)
    dtype = property(lambda self: np.dtype(np.float32))
    nbytes = property(lambda self: self.packed.nbytes)
    xp = property(lambda self: self.packed.xp)

    def __repr__(self):
        return f"PackedTensor({self.kind}, {self.shape})"

    def __reduce__(self):
        return _packed_tensor, (self.source, self.kind, self.shape, *self.packed.arrays)

    def to_device(self, xp):
        """The same tensor in the memory of `xp`."""
        if xp is self.xp:
            return self
        arrays = [to_device(array, xp) for array in self.packed.arrays]
        moved = PackedTensor(self.kind, self.shape, *arrays)
        moved.source = self.source
        moved.claim = self.claim
        return moved


def _packed_tensor(source, *arguments):
    """A copy of a PackedTensor: what copy and pickle call."""
    tensor = PackedTensor(*arguments)
    tensor.source = source
    return tensor


def packed_linear(x, weight, bias=None):
    """`functional.linear` with a PackedTensor: it is widened for y, and once more for dx.

    Shapes: x (..., in), weight (out, in), bias (out,) or None -> (..., out), in the dtype of x.
    Raises: ValueError or TypeError with both sides if they do not fit.
    """
    packed = weight.packed
    check_linear(x, weight, bias)
    # An empty array stands for the weight: it is where the weight is, and takes the dtype of x.
    check_same("linear", x, Tensor(packed.xp.empty(0, x.dtype)), bias)
    x_shape = x.shape
    dtype = x.dtype
    n_out, n_in = weight.shape
    Y = times_rows(x.data.reshape(-1, n_in), packed.widened().astype(dtype, copy=False))
    if bias is not None:
        Y += bias.data

    def dx(dy):
        W = packed.widened().astype(dtype, copy=False)
        return (dy.reshape(-1, n_out) @ W).reshape(x_shape)

    return record(Y.reshape(*x_shape[:-1], n_out), (x, dx), (bias, lambda dy: dy))
