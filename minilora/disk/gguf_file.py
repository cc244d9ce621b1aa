"""A GGUF file: its settings and its tensors, checked against its size. Knows no model.

The library `gguf` knows the types of numbers and widens them. The header is read here: the
library's reader believes every count, so that a damaged file keeps it busy without end, and makes
an array of each token (2 s and 160 MB for 49,152 tokens).
Source: the GGUF specification, versions 2 and 3 (github.com/ggml-org/ggml, docs/gguf.md).
"""

import struct
from collections import namedtuple
from pathlib import Path

import numpy as np

from .lfs import check_no_pointer
from .reading import check_regular

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MOST_DIMENSIONS = 4
LONGEST_NAME = 255
# Texts in one list. No vocabulary is as large; a damaged count is.
MOST_TEXTS = 2**24
ALIGNMENT = "general.alignment"
# What a setting may hold, by the number of its type: how `struct` reads it.
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_LENGTH = struct.Struct("<Q")
_FLOAT32 = 6
_STRING = 8
_ARRAY = 9
# Types whose numbers are stored as they are, not in blocks.
_PLAIN = {"F32": "<f4", "F16": "<u2", "BF16": "<u2"}

# `kind` is the library's name of a type ("F32", "Q4_1"), `shape` has the slowest axis first, as
# NumPy has it. `data` is a read-only map of the file: float32 of `shape` for F32, bits as uint16 of
# `shape` for F16 and BF16, bytes of shape (..., bytes per row) for every other type.
StoredArray = namedtuple("StoredArray", "kind shape data")


def read_gguf(path):
    """({name: setting}, {name: StoredArray}) of a GGUF file.

    A setting is an int, float, bool or str, a list of str, or a NumPy array of numbers. Numbers
    stored as float32 are the shortest decimal ones that round to them: 1e-05, not
    9.999999747378752e-06. The file is mapped: only its header is read.
    Raises: FileNotFoundError, or ValueError that names the file and what is wrong with it.
    """
    path = Path(path)
    data = _mapped(path)
    header = _Header(path, data)
    header.check_start()
    tensor_count = header.number("Q")
    setting_count = header.number("Q")
    header.check_room(tensor_count, 24, "tensors")
    header.check_room(setting_count, 13, "settings")
    settings = {}
    for _ in range(setting_count):
        name = header.name("setting")
        if name in settings:
            header.refuse(f"{name} is set twice")
        settings[name] = header.setting(name)
    entries = {}
    for _ in range(tensor_count):
        name = header.name("tensor")
        if name in entries:
            header.refuse(f"tensor {name} is listed twice")
        entries[name] = header.tensor_entry(name)
    alignment = settings.get(ALIGNMENT, 32)
    if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
        header.refuse(f"{ALIGNMENT} must be a power of two from 8 on, got {alignment!r:.50}")
    return settings, _arrays(header, entries, alignment)


def _mapped(path):
    """The bytes of a file as a read-only array that occupies no memory of its own."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    check_regular(path)
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty; fetch it again")
    # A plain array over the map: NumPy's own class of maps is slow to take views of.
    return np.asarray(np.memmap(path, np.uint8, mode="r"))


class _Header:
    """Reads a header from its start on, and nothing behind the end of the file."""

    def __init__(self, path, data):
        self.path = path
        self.data = data
        self.bytes = memoryview(data)
        self.offset = 0

    def refuse(self, why):
        raise ValueError(f"{self.path}: {why}")

    def check_start(self):
        """Raise ValueError unless the file starts as one that can be read here."""
        start = bytes(self.bytes[:24])
        if start[: len(MAGIC)] != MAGIC:
            check_no_pointer(self.path)
            self.refuse(f"not a GGUF file: it starts with {start[:4]!r}, not {MAGIC!r}")
        self.offset = len(MAGIC)
        version = self.number("I")
        if version not in VERSIONS:
            if int.from_bytes(struct.pack(">I", version), "little") in VERSIONS:
                self.refuse("big-endian; only little-endian files are read. Convert it again")
            self.refuse(f"version {version} of GGUF; only 2 and 3 are read. Convert it again")

    def take(self, length):
        """Where the next `length` bytes begin; ValueError if the file ends before them."""
        begin = self.offset
        if length > len(self.bytes) - begin:
            self.refuse(
                f"its header needs {length:,} bytes from byte {begin:,} on, and the file ends at "
                f"{len(self.bytes):,}: it is cut off or damaged; fetch it again"
            )
        self.offset = begin + length
        return begin

    def check_room(self, count, size, what):
        """Raise ValueError unless the rest of the file can hold `count` things of `size` bytes."""
        room = len(self.bytes) - self.offset
        if count * size > room:
            self.refuse(
                f"it claims {count:,} {what}, more than the {room:,} bytes behind that can hold: "
                "it is cut off or damaged; fetch it again"
            )

    def number(self, code):
        begin = self.take(struct.calcsize(f"<{code}"))
        return struct.unpack_from(f"<{code}", self.bytes, begin)[0]

    def text(self, what):
        # A vocabulary has hundreds of thousands of these.
        length = _LENGTH.unpack_from(self.bytes, self.take(8))[0]
        begin = self.take(length)
        try:
            return str(self.bytes[begin : begin + length], "utf-8")
        except UnicodeDecodeError:
            self.refuse(f"{what} at byte {begin:,} is not UTF-8: damaged; fetch it again")

    def name(self, of):
        """The name of a setting or a tensor, fit to be shown in an error."""
        begin = self.offset
        name = self.text(f"the name of a {of}")
        if len(name) > LONGEST_NAME or not name.isprintable():
            self.refuse(f"the name of a {of} at byte {begin:,} is {name!r:.50}: damaged")
        return name

    def setting(self, name):
        kind = self.number("I")
        if kind == _STRING:
            return self.text(name)
        if kind == _ARRAY:
            return self.array(name)
        if kind not in _SCALARS:
            self.refuse(f"{name} is of the unknown type {kind}")
        value = self.number(_SCALARS[kind])
        if kind == _FLOAT32:
            return float(str(np.float32(value)))
        return value

    def array(self, name):
        kind = self.number("I")
        count = self.number("Q")
        if kind == _STRING:
            self.check_room(count, 8, f"texts in {name}")
            if count > MOST_TEXTS:
                self.refuse(f"{name} claims {count:,} texts; {MOST_TEXTS:,} are read at the most")
            return [self.text(name) for _ in range(count)]
        if kind not in _SCALARS:
            self.refuse(f"{name} is a list of the unknown type {kind}")
        dtype = np.dtype(f"<{_SCALARS[kind]}")
        begin = self.take(count * dtype.itemsize)
        return np.frombuffer(self.bytes, dtype, count, begin)

    def tensor_entry(self, name):
        """(shape, number of the type, offset) of a tensor, as the header gives them."""
        dimensions = self.number("I")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            self.refuse(f"tensor {name} has {dimensions} dimensions; 1 to {MOST_DIMENSIONS} exist")
        # The fastest axis comes first in the file.
        shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]
        return shape, self.number("I"), self.number("Q")


def _arrays(header, entries, alignment):
    """{name: StoredArray}; ValueError unless the tensors fill the rest of the file in order."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    start = _rounded_up(header.offset, alignment)
    expected = 0
    arrays = {}
    for name, (shape, number, offset) in entries.items():
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            header.refuse(
                f"tensor {name} is of type {number}, which the library gguf does not know"
            )
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if 0 in shape or shape[-1] % block:
            header.refuse(f"tensor {name} {shape}: rows of {kind.name} hold {block} n numbers")
        row_bytes = shape[-1] // block * block_bytes
        size = row_bytes
        for side in shape[:-1]:
            size *= side
        # No gap and no overlap: a wrong shape, type or offset shows in the tensor behind it.
        if offset != expected:
            header.refuse(
                f"tensor {name} starts at {offset:,}, where those before it end at {expected:,}: "
                "damaged; fetch it again"
            )
        end = start + offset + size
        if end > len(header.bytes):
            header.refuse(
                f"tensor {name} {shape} ends at byte {end:,}, and the file at "
                f"{len(header.bytes):,}: it is cut off or damaged; fetch it again"
            )
        data = header.data[end - size : end]
        if kind.name in _PLAIN:
            data = data.view(_PLAIN[kind.name]).reshape(shape)
        else:
            data = data.reshape(*shape[:-1], row_bytes)
        arrays[name] = StoredArray(kind.name, shape, data)
        expected = _rounded_up(offset + size, alignment)
    if len(header.bytes) > start + expected:
        surplus = len(header.bytes) - start - expected
        header.refuse(
            f"{surplus:,} bytes stand behind its last tensor: two downloads in one file? "
            "Fetch it again"
        )
    return arrays


def _rounded_up(number, multiple):
    return -(-number // multiple) * multiple
