"""Arrays as safetensors: one file or several, read, widened, rounded, written. Knows no model."""

import contextlib
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.numpy import save_file

from .checks import check_same_tensors, json_object

# What tensors can be saved in.
DTYPES = ("float16", "bfloat16", "float32", "float64")


def write_tensors(path, arrays, metadata):
    """Write {name: array} and {str: str} as one safetensors file. Raises: OSError."""
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    try:
        # Straight to the disk: no second copy in memory.
        save_file(arrays, path, metadata)
    except SafetensorError as error:
        # The library's own error is no OSError, even where the disk is full.
        raise OSError(f"{path} could not be written: {error}") from None


def read_tensors(path):
    """({name: array}, metadata) of one safetensors file."""
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}
            tensors = {name: file.get_tensor(name) for name in dtypes if dtypes[name] != "BF16"}
        if "BF16" in dtypes.values():
            tensors |= _read_bfloat16(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from None
    except (TypeError, AttributeError) as error:
        # A type that NumPy does not have.
        raise ValueError(f"{path}: {error}; save it again as float32") from None
    for name, array in tensors.items():
        if array.dtype == np.float16:
            tensors[name] = array.astype(np.float32)
    return tensors, metadata


def _read_bfloat16(path):
    """{name: float32 array} of the bfloat16 tensors of a file."""
    tensors = {}
    for name, view in deserialize(path.read_bytes()):
        if view["dtype"] == "BF16":
            # NumPy has no bfloat16. It is the upper half of a float32.
            halves = np.frombuffer(view["data"], "<u2").reshape(view["shape"])
            tensors[name] = (halves.astype(np.uint32) << 16).view(np.float32)
    return tensors


def read_shards(index):
    """{name: array} of the files that an index names.

    Each file must hold exactly the tensors that the index places there.
    """
    file_of = json_object(index, index.read_bytes()).get("weight_map")
    is_map = isinstance(file_of, dict) and len(file_of) > 0
    if not is_map or not all(isinstance(file, str) for file in file_of.values()):
        raise ValueError(
            f"{index}: weight_map must name the file of each tensor, got {file_of!r:.200}"
        )
    tensors = {}
    for file in sorted(set(file_of.values())):
        path = index.parent / file
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{index}: {file!r} is not the name of a safetensors file beside it")
        if not path.exists():
            raise FileNotFoundError(
                f"{path} does not exist, but {index.name} places tensors there; fetch it again"
            )
        shard, _ = read_tensors(path)
        check_same_tensors(path, shard, [name for name in file_of if file_of[name] == file])
        tensors |= shard
    return tensors


def read_metadata(path):
    """The metadata of a safetensors file; None where there is no sound file."""
    with contextlib.suppress(OSError, SafetensorError), safe_open(path, framework="np") as file:
        return file.metadata()
    return None


def rounded(name, array, dtype):
    """`array` in the dtype called `dtype`, one of DTYPES, rounded to nearest.

    float64 goes to bfloat16 by way of float32.
    Raises: ValueError if there is no such dtype, or if a finite number overflows.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if dtype == "bfloat16":
        from ml_dtypes import bfloat16 as dtype
    with np.errstate(over="ignore"):
        new = array.astype(dtype)
    overflows = not np.isfinite(new.astype(array.dtype)).all()
    if overflows and np.isfinite(array).all():
        largest = np.abs(array).max()
        raise ValueError(
            f"{name}: {largest:.3g} is too large for {new.dtype.name}; save it as float32"
        )
    return new
