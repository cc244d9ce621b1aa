"""The memory of training, by part, and how people write many bytes. Knows numbers, not arrays.

Where numbers have 16 bits, Adam works in float32: on moments, and on a copy of what is trained,
the master copy, out of which the 16 bits are rounded after each step.
Source: Micikevicius et al. 2018, "Mixed Precision Training", section 3.1.
"""

from collections import namedtuple

from .packed import PackedTensor
from .step_cost import itemsize_of, step_cost

_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")


class TrainingBytes(namedtuple("TrainingBytes", "weights gradients moments master activations")):
    """Bytes of each part. Their sum is `together`."""

    together = property(sum)


def training_bytes(trained, frozen_bytes=0, *, dtype="float32", moments_dtype=None, activations=0):
    """The TrainingBytes of Adam on `trained` numbers beside `frozen_bytes` of weights.

    `dtype` is that of what is trained and of its gradients. The two moments are in `moments_dtype`;
    None for float32, or for float64 with that. `activations`, in bytes, are passed on.
    Raises: ValueError for a dtype that there is not, or a number below zero.

    >>> training_bytes(7_000_000_000).together
    112000000000
    >>> training_bytes(7_000_000_000, dtype="bfloat16").moments
    56000000000
    """
    numbers = {"trained": trained, "frozen_bytes": frozen_bytes, "activations": activations}
    for what, n in numbers.items():
        if n < 0:
            raise ValueError(f"training_bytes: {what} must be at least 0, got {n}")
    size = itemsize_of(dtype)
    full_size = max(size, itemsize_of("float32"))
    moment_size = full_size
    if moments_dtype is not None:
        moment_size = itemsize_of(moments_dtype)
    return TrainingBytes(
        weights=frozen_bytes + trained * size,
        gradients=trained * size,
        moments=2 * trained * moment_size,
        master=trained * full_size if size < full_size else 0,
        activations=activations,
    )


def model_training_bytes(model, batch, length, dtype="float32"):
    """The TrainingBytes of a step of `model` on `batch` rows of `length` tokens.

    What requires a gradient is trained; weights that are stored in few bits stay so, the rest is in
    `dtype`. The model may be one without numbers (`blank`).
    Raises: as `step_cost`.
    """
    cost = step_cost(model, batch, length, dtype)
    trained = 0
    frozen_bytes = 0
    for p in model.parameters():
        if p.requires_grad:
            trained += p.size
        elif isinstance(p, PackedTensor):
            frozen_bytes += p.nbytes
        else:
            frozen_bytes += p.size * itemsize_of(dtype)
    return training_bytes(trained, frozen_bytes, dtype=dtype, activations=cost.activations)


def human_bytes(n):
    """A number of bytes with three digits, in decimal units: 27.3 MB. Nothing becomes 0.0 GB.

    >>> human_bytes(27_262_976), human_bytes(999), human_bytes(999_999)
    ('27.3 MB', '999 B', '1.00 MB')
    """
    return _with_prefix(n, "B")


def human_flops(n):
    """A number of operations, as `human_bytes`: 98.7 TFLOP."""
    return _with_prefix(n, "FLOP")


def _with_prefix(n, unit):
    if n < 1000:
        return f"{n:,} {unit}"
    power = 0
    # 999,500 has 1000 of the smaller unit once it is rounded to three digits.
    while n >= 999.5 and power + 1 < len(_PREFIXES):
        n /= 1000
        power += 1
    digits = 2
    if n >= 99.95:
        digits = 0
    elif n >= 9.995:
        digits = 1
    return f"{n:,.{digits}f} {_PREFIXES[power]}{unit}"
