"""Weights in fewer bits: quantise the linears of a model, widen them, and what either loses.

Quantising is what QLoRA does to a base: its frozen weights take 4 bits each, and LoRA's pairs,
which are trained, stay in float32. How a packed weight is stored, and how it is widened, is in
packed.py. Knows layers, not LoRA.

NF4 cuts a weight into blocks of 64 numbers. Each block is divided by its largest absolute value,
its scale, and each number becomes the nearest of 16 between -1 and 1, which are dense where normal
numbers are. The scales are quantised as well, to 8 bits, in blocks of 256: 4.13 bits a weight.

Source: Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", section 3.
"""

import numpy as np

from .backend import to_numpy
from .nn import AdaptedModule, LinearLayer, digest_of
from .packed import (
    BLOCKS,
    NF4,
    NF4_BLOCK,
    SCALE_BLOCK,
    STRIDE,
    PackedTensor,
    Source,
    float8_table,
    nf4_scales,
)
from .tensor import Tensor

# What `quantize` makes.
KINDS = ("NF4", *BLOCKS)


def quantize(model, kind, *, on_layer=None):
    """A copy of `model` whose linears keep their weights in few bits, frozen; the rest is shared.

    kind: "nf4" (see above), "q8_0", "q4_0" or "q4_1" (as in GGUF files). Embeddings, norms, biases
    and the head stay as they are. A weight that is packed already is widened and quantised again:
    `stored_as(model)` tells of it. Each new tensor remembers in `source` which weight it was made
    of. `on_layer(name)` is called after each layer, to show progress.
    Shapes: as `model`.
    Raises: ValueError for another kind, a model that carries an adapter or is not float32, a weight
    whose rows are no multiple of 32 (Q kinds), or one with numbers too large, inf or nan.
    Source: Dettmers et al. 2023, section 3; llama.cpp's quantize_row_*_ref.
    """
    kind = kind.upper()
    if kind not in KINDS:
        kinds = ", ".join(k.lower() for k in KINDS)
        raise ValueError(f"quantize: kind must be one of {kinds}, got {kind.lower()!r}")
    packed = {}
    for name, module in model.named_modules():
        if isinstance(module, AdaptedModule):
            raise ValueError(
                f"quantize: {name} carries an adapter; quantise the base, then attach to it"
            )
        if isinstance(module, LinearLayer):
            packed[f"{name}.weight"] = quantized(f"{name}.weight", module.weight, kind)
            if on_layer is not None:
                on_layer(name)
    return model.rebuild(lambda name, x: packed.get(name))


def quantized(name, weight, kind):
    """The PackedTensor of the tensor `weight`, called `name`, on its backend; kind: as in KINDS.

    Raises: as `quantize`.
    """
    if weight.dtype != np.float32:
        raise ValueError(
            f"quantize: {name} is {weight.dtype}, and a packed weight stands for float32; "
            'write model.astype("float32") first'
        )
    values = to_numpy(weight.data)
    if not np.isfinite(values).all():
        raise ValueError(f"quantize: {name} holds inf or nan, which no code stands for")
    if kind == "NF4":
        arrays = quantized_nf4(values)
    else:
        arrays = [quantized_blocks(name, values, kind)]
    tensor = PackedTensor(kind, values.shape, *arrays)
    if not tensor.packed.is_finite():
        raise ValueError(
            f"quantize: {name} has numbers up to {np.abs(values).max():.3g}, whose scale is too "
            f"large for {kind}; use nf4"
        )
    tensor.source = Source(
        kind=storage_of(weight),
        digest=digest_of(weight),
        error=relative_error(tensor.data, values),
    )
    return tensor.to_device(weight.xp)


def relative_error(quantised, values):
    """‖quantised - values‖ / ‖values‖ in Frobenius's norm, a float; 0 for a weight of zeros."""
    norm = np.linalg.norm(values)
    return float(np.linalg.norm(quantised - values) / norm) if norm else 0.0


def quantized_nf4(values):
    """The four arrays in which a Packed of kind NF4 stores `values`, on the host.

    Each number becomes the nearest that its block can express.
    """
    n = -(-values.size // NF4_BLOCK)
    # The last block is filled up with zeros.
    blocks = np.zeros((n, NF4_BLOCK), np.float32)
    blocks.reshape(-1)[: values.size] = values.reshape(-1)
    scale_arrays = _quantized_scales(np.abs(blocks).max(axis=1))
    # Nearest to what the block will be widened to, so with its scale as it was rounded.
    scales = nf4_scales(*scale_arrays)
    scales[scales == 0] = 1
    borders = [(low + high) / 2 for low, high in zip(NF4[:-1], NF4[1:], strict=True)]
    stored = np.empty((n, NF4_BLOCK // 2), np.uint8)
    step = STRIDE // NF4_BLOCK
    for start in range(0, n, step):
        part = slice(start, start + step)
        codes = _how_many_below(borders, blocks[part] / scales[part, None])
        stored[part] = codes[:, ::2] << 4
        stored[part] |= codes[:, 1::2]
    return [stored, *scale_arrays]


def _how_many_below(borders, x):
    """How many of the sorted `borders` lie below each x: its place among them, as uint8.

    To compare with each of fifteen numbers is several times faster than to search.
    """
    place = np.zeros(x.shape, np.uint8)
    for border in borders:
        place += x > np.float32(border)
    return place


def _quantized_scales(scales):
    """(codes, scales of scales, mean): float32 scales (n,) in 8 bits each, in blocks of 256."""
    mean = scales.mean(dtype=np.float32, keepdims=True)
    n = -(-scales.size // SCALE_BLOCK)
    blocks = np.zeros((n, SCALE_BLOCK), np.float32)
    blocks.reshape(-1)[: scales.size] = scales - mean
    scale_scales = np.abs(blocks).max(axis=1)
    divisor = np.where(scale_scales == 0, 1, scale_scales)
    # Half of the codes are negative, and ±448 and ±0 come twice: search among the distinct ones.
    table, code_of = np.unique(float8_table(), return_index=True)
    borders = (table[:-1] + table[1:]) / 2
    codes = code_of[np.searchsorted(borders, blocks / divisor[:, None])].astype(np.uint8)
    return codes.reshape(-1)[: scales.size].copy(), scale_scales, mean


def quantized_blocks(name, values, kind):
    """The bytes of a matrix in one of GGUF's kinds: (rows, in) -> uint8 (rows, bytes of a row)."""
    n_weights, n_bytes = BLOCKS[kind]
    rows = len(values)
    if values.ndim != 2 or values.shape[1] % n_weights:
        raise ValueError(
            f"quantize: {name} {values.shape} has rows that are no multiple of {n_weights} numbers,"
            f" a block of {kind}; use nf4"
        )
    blocks = values.reshape(-1, n_weights)
    stored = np.empty((len(blocks), n_bytes), np.uint8)
    step = STRIDE // n_weights
    fill = {"Q8_0": _to_q8_0, "Q4_0": _to_q4_0, "Q4_1": _to_q4_1}[kind]
    for start in range(0, len(blocks), step):
        part = slice(start, start + step)
        fill(blocks[part], stored[part])
    return stored.reshape(rows, -1)


# Each of these writes blocks (n, 32) as they are stored, (n, bytes); d, m, q: as in packed.py.


def _to_q8_0(blocks, stored):
    d = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    q = blocks * _inverse(d)
    # Halves are rounded away from zero, as llama.cpp does.
    q = np.trunc(q + np.copysign(np.float32(0.5), q))
    stored[:, :2] = _as_float16(d)
    stored[:, 2:] = q.astype(np.int8).view(np.uint8)


def _to_q4_0(blocks, stored):
    largest = np.abs(blocks).argmax(axis=1)
    # The number that is largest in absolute value becomes -8.
    d = np.take_along_axis(blocks, largest[:, None], axis=1) / np.float32(-8)
    q = np.trunc(blocks * _inverse(d) + np.float32(8.5)).astype(np.uint8)
    stored[:, :2] = _as_float16(d)
    stored[:, 2:] = _packed_halves(q)


def _to_q4_1(blocks, stored):
    m = blocks.min(axis=1, keepdims=True)
    d = (blocks.max(axis=1, keepdims=True) - m) / np.float32(15)
    q = np.trunc((blocks - m) * _inverse(d) + np.float32(0.5)).astype(np.uint8)
    stored[:, :2] = _as_float16(d)
    stored[:, 2:4] = _as_float16(m)
    stored[:, 4:] = _packed_halves(q)


def _inverse(d):
    # Of a number so small that it has no inverse in float32, zero is the nearest code.
    with np.errstate(divide="ignore", over="ignore"):
        inverse = 1 / d
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def _as_float16(column):
    # What is too large becomes inf, and is refused.
    with np.errstate(over="ignore"):
        return column.astype(np.float16).view(np.uint8)


def _packed_halves(q):
    """Numbers of 4 bits, (n, 32), two to a byte: the first 16 in the lower halves."""
    q = np.minimum(q, 15)
    return q[:, :16] | (q[:, 16:] << 4)


def widen(model):
    """A copy of `model` in which every packed weight is float32; the rest is shared.

    Its logits are those of `model` to the bit: a packed weight is widened to the same numbers each
    time it is used. Generation uses a weight for every token, and widens once.
    """
    return model.map_tensors(lambda t: Tensor(t.data) if isinstance(t, PackedTensor) else t)


def stored_as(model):
    """{tensor name: kind} of the packed weights of `model`; {} if there are none."""
    return {n: t.kind for n, t in model.named_parameters() if isinstance(t, PackedTensor)}


def storage_of(tensor):
    """How the values of a tensor are stored: "Q4_1", "NF4", "float32", ..."""
    return tensor.kind if isinstance(tensor, PackedTensor) else tensor.dtype.name
