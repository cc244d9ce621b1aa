"""Arrays as safetensors: one file or several, mapped, verified, rounded, written. Knows no model.

What is read stays in its file: an array is a read-only map of the file's bytes. So reading takes no
time and no memory of its own, and two processes that read one file share one copy of it. A map
keeps the bytes of the file that was opened, also after a newer file was renamed to its name, which
is how this library saves. (A program that writes into the file itself changes them.)
"""

import contextlib
import functools
import hashlib
import json
import math
import mmap
import os
import re
import sys
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..packed import STRIDE, Packed
from .checks import check_same_tensors, json_object
from .lfs import check_no_pointer
from .reading import LARGEST_INDEX, check_regular, read_object

# Where a file that is written here notes the digests of its tensors, and that of its other notes.
DIGESTS = "minilora.sha256"
_DAMAGED = (
    "the file is damaged, so take it from a copy, or make it anew (if a program changed it on "
    f"purpose, have it leave out {DIGESTS} of the metadata)"
)
# What tensors can be saved in.
DTYPES = ("float16", "bfloat16", "float32", "float64")
# Of the name of a tensor, which is shown and matched.
LONGEST_NAME = 1000
# {a type of safetensors: NumPy's}. bfloat16 is not among them: NumPy has none.
_NUMPY_TYPES = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4",
    "U64": "<u8", "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8",
}  # fmt: skip


def write_tensors(path, arrays, metadata):
    """Write {name: array} and {str: str} as one safetensors file: equal ones give equal bytes.

    Beside the metadata the digests are noted that `check_digests` compares. Raises: OSError.
    """
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    digests = {
        "tensors": {name: digest_of_array(array) for name, array in sorted(arrays.items())},
        "metadata": _digest_of_metadata(metadata),
    }
    metadata = {**metadata, DIGESTS: json.dumps(digests)}
    try:
        # Straight to the disk: no second copy in memory.
        save_file(arrays, path, metadata)
    except SafetensorError as error:
        raise _as_os_error(path, error) from None
    _sort_metadata(path)


def _as_os_error(path, error):
    """An OSError for one of safetensors, which tells the number of the system's in its text."""
    number = re.search(r"os error (\d+)", str(error))
    if number is None:
        return OSError(f"{path} could not be written: {error}")
    return OSError(int(number[1]), os.strerror(int(number[1])), str(path))


def _sort_metadata(path):
    """Put the metadata of a file in the order of their names. The library writes them in any."""
    with open(path, "r+b") as file:
        header, data_start = _header(file)
        ordered = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
        text = json.dumps(ordered, ensure_ascii=False, separators=(",", ":")).encode()
        # It is as long as it was, but for the spaces at its end: the order alone has changed.
        file.seek(8)
        file.write(text.ljust(data_start - 8))


def digest_of_array(array):
    """The SHA-256 of an array's type, shape and bytes, in hexadecimal digits."""
    size = array.dtype.itemsize
    digest = hashlib.sha256(f"{array.dtype.name} {array.shape}".encode())
    # As numbers without a sign, little-endian as in the file: the hash knows no bfloat16.
    digest.update(array.reshape(-1).view(f"u{size}").astype(f"<u{size}", copy=False))
    return digest.hexdigest()


def _digest_of_metadata(metadata):
    notes = {name: text for name, text in metadata.items() if name != DIGESTS}
    return hashlib.sha256(json.dumps(notes, sort_keys=True).encode()).hexdigest()


def noted_digests(path, metadata):
    """{tensor name: digest} as the metadata of a file note it, {} for a file that has none.

    Raises: ValueError that names the file if the note is damaged, or another one of the metadata.
    """
    note = json_object(f"{path}: its {DIGESTS}", metadata.get(DIGESTS))
    if note is None:
        return {}
    digests = note.get("tensors")
    if not isinstance(digests, dict) or note.get("metadata") != _digest_of_metadata(metadata):
        raise ValueError(f"{path}: its metadata are not those that were saved; {_DAMAGED}")
    return digests


def check_digests(path, tensors, metadata):
    """Raise ValueError, with the file's name, unless it holds the very bytes that were written.

    A flipped bit of a value is a value too: nothing but a digest tells. A file that another program
    wrote has none, and passes.
    """
    digests = noted_digests(path, metadata)
    if not digests:
        return
    check_same_tensors(f"{path}, its tensors and their digests", tensors, list(digests))
    for name, array in tensors.items():
        Claim(path, name, array, digests[name]).check()


class Claim:
    """What a file says of the bytes of one of its tensors. To check it reads them, once."""

    def __init__(self, path, name, array, digest):
        self.path = path
        self.name = name
        self.array = array
        self.digest = digest

    @functools.cached_property
    def _holds(self):
        found = digest_of_array(self.array)
        # The model may hold a turned copy. What it does use of the file comes back by itself.
        release_pages([self.array])
        return found == self.digest

    def check(self):
        """Raise ValueError unless the bytes are those that were saved."""
        if not self._holds:
            raise ValueError(
                f"{self.path}: the values of {self.name} are not those that were saved; {_DAMAGED}"
            )


def read_tensors(path):
    """({name: array}, metadata) of one safetensors file, each array as it is stored.

    Arrays are read-only. They are maps of the file, or copies where it cannot be mapped: on
    Windows, where a mapped file cannot be replaced, on file systems without maps, and for a tensor
    that does not lie where its type may. bfloat16 is the type of that name of `ml_dtypes`;
    `widened` makes it float32.
    Raises: ValueError that names the file if it is damaged, truncated or no safetensors file, a
    pointer of Git LFS, or holds a type that is not read. FileNotFoundError.
    """
    check_no_pointer(path)
    # All comes from one open file: one that is renamed to this name meanwhile is not read in part.
    with _open_sound(path) as file:
        header, data_start = _header(file)
        metadata = header.pop("__metadata__", None) or {}
        file_map = _map_of(file)
        tensors = {}
        for name, entry in header.items():
            if len(name) > LONGEST_NAME or not name.isprintable():
                raise ValueError(f"{path}: the name of a tensor is {name!r:.100}: damaged")
            code = entry["dtype"]
            if code != "BF16" and code not in _NUMPY_TYPES:
                raise ValueError(
                    f"{path}: {name} is stored as {code}, which is not read; save it again as "
                    "float32"
                )
            start = data_start + entry["data_offsets"][0]
            tensors[name] = _array(file, file_map, code, entry["shape"], start)
    return tensors, metadata


def _open_sound(path):
    """The file at `path`, open, whose sizes were found to fit its length. Raises: ValueError."""
    while True:
        with contextlib.ExitStack() as closes:
            file = closes.enter_context(open(path, "rb"))
            _check_sizes(path)
            # The library opened the name itself, which may be that of another file by now.
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                closes.pop_all()
                return file


def _check_sizes(path):
    """Raise ValueError unless the library finds that all sizes in a file fit its length."""
    try:
        # Nothing is read through it: it would copy.
        with safe_open(path, framework="np"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from None


def _header(file):
    """(the JSON in front of the data, where the data start) of an open, sound file."""
    length = int.from_bytes(file.read(8), "little")
    return json.loads(file.read(length)), 8 + length


def _map_of(file):
    """The bytes of a file as a map that nobody can write, None where there can be none."""
    if sys.platform == "win32":
        return None
    with contextlib.suppress(OSError):
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return None


def _array(file, file_map, code, shape, start):
    """The read-only array of safetensors' type `code` that begins at byte `start` of a file."""
    dtype = np.dtype("<u2" if code == "BF16" else _NUMPY_TYPES[code])
    size = math.prod(shape)
    if file_map is None or start % dtype.itemsize:
        file.seek(start)
        array = np.fromfile(file, dtype, size)
    else:
        array = np.frombuffer(file_map, dtype, size, start)
    # The file is little-endian. This copies on the few machines that are not.
    array = array.astype(dtype.newbyteorder("="), copy=False)
    if code == "BF16":
        from ml_dtypes import bfloat16

        array = array.view(bfloat16)
    array.flags.writeable = False
    return array.reshape(shape)


def release_pages(arrays):
    """Give back the memory in which the system holds what was read of mapped files.

    The arrays stay valid: what is read again comes from the file again. Where a system cannot be
    asked to, nothing happens.
    """
    maps = {}
    for array in arrays:
        # What an array is a view of, down to the map of its file, if there is one.
        owner = array
        while owner is not None and not isinstance(owner, mmap.mmap):
            owner = owner.obj if isinstance(owner, memoryview) else getattr(owner, "base", None)
        if owner is not None:
            maps[id(owner)] = owner
    for file_map in maps.values():
        with contextlib.suppress(AttributeError, OSError, ValueError):
            file_map.madvise(mmap.MADV_DONTNEED)


def half_kind(array):
    """What a PackedTensor calls an array of 16-bit floats: "F16" or "BF16"; None for any other."""
    # NumPy itself has no bfloat16.
    return {"float16": "F16", "bfloat16": "BF16"}.get(array.dtype.name)


def widened(array):
    """A float16 or bfloat16 array as float32, which changes no value; any other as it is."""
    kind = half_kind(array)
    if kind is None:
        return array
    return Packed(kind, array.shape, array.view(np.uint16)).widened()


def all_finite(array):
    """Does an array of floats, of 16, 32 or 64 bits, hold neither inf nor nan?

    It takes no memory of the array's size, and for float32 less time than to read it from a disk.
    """
    kind = half_kind(array)
    if kind is not None:
        return Packed(kind, array.shape, array.view(np.uint16)).is_finite()
    flat = array.reshape(-1)
    for start in range(0, flat.size, STRIDE):
        block = flat[start : start + STRIDE]
        # A sum of squares is finite only if each of them is; large numbers may overflow in it.
        with np.errstate(over="ignore", invalid="ignore"):
            square = np.dot(block, block)
        if not np.isfinite(square) and not np.isfinite(block).all():
            return False
    return True


def read_shards(index):
    """{name: array} of the files that an index names.

    Each file must hold exactly the tensors that the index places there. Arrays as `read_tensors`
    gives them.
    """
    check_no_pointer(index)
    file_of = read_object(index, LARGEST_INDEX).get("weight_map")
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
    with contextlib.suppress(OSError, ValueError, SafetensorError):
        check_regular(path)
        with safe_open(path, framework="np") as file:
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
        new = array.astype(dtype, copy=False)
    if not all_finite(new) and all_finite(array):
        largest = np.abs(array).max()
        raise ValueError(
            f"{name}: {largest:.3g} is too large for {new.dtype.name}; save it as float32"
        )
    return new
