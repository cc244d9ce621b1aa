"""The header of a GGUF file: read as the library reads it, and refused where it cannot be true."""

import os
import re
import struct
import tracemalloc

import gguf
import numpy as np
import pytest
from gguf_files import settings_of, write_gguf

from minilora.disk.gguf_file import MOST_TEXTS, read_gguf


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.gguf"


def text(value):
    value = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(value)) + value


def entry(name, shape, kind=0, offset=0):
    """A tensor in a header; `shape` has the fastest axis first, as in the file."""
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def setting(name, code, packed):
    return text(name) + struct.pack("<I", code) + packed


def write(path, settings=(), entries=(), data=b"", version=3, counts=None, alignment=32):
    """A file from its parts, as its writer pads it."""
    counts = (len(entries), len(settings)) if counts is None else counts
    header = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(settings) + b"".join(entries)
    path.write_bytes(header + bytes(-len(header) % alignment) + data)


def refused(path, complaint):
    with pytest.raises(ValueError, match=complaint) as caught:
        read_gguf(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_all_settings_and_tensors_are_those_of_the_library(path):
    write_gguf(path, kind="Q4_1", kinds={"up_proj": "F16", "down_proj": "BF16", "embed": "Q8_0"})
    settings, arrays = read_gguf(path)
    reader = gguf.GGUFReader(path)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert settings.keys() == fields.keys()
    for name, field in fields.items():
        ours = settings[name].tolist() if isinstance(settings[name], np.ndarray) else settings[name]
        if field.types[0] == gguf.GGUFValueType.FLOAT32:
            assert np.float32(ours) == np.float32(field.contents())
        else:
            assert ours == field.contents() and type(ours) is type(field.contents()), name
    assert list(arrays) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        array = arrays[tensor.name]
        assert (array.kind, array.shape) == (tensor.tensor_type.name, tuple(tensor.shape.tolist()[::-1]))
        assert array.data.tobytes() == tensor.data.tobytes() and not array.data.flags.writeable
        assert array.data.shape == (array.shape if array.kind in ("F32", "F16", "BF16") else tensor.data.shape)


@pytest.mark.parametrize("code, packed, value", [
    (0, b"\xff", 255), (1, b"\xff", -1), (2, b"\xff\xff", 65535), (3, b"\xff\xff", -1), (4, b"\xff" * 4, 2**32 - 1),
    (5, b"\xff" * 4, -1), (6, struct.pack("<f", 1e-5), 1e-5), (7, b"\x01", True), (8, text("é"), "é"),
    (10, b"\xff" * 8, 2**64 - 1), (11, b"\xff" * 8, -1), (12, struct.pack("<d", 0.1), 0.1),
    (9, struct.pack("<IQ", 8, 2) + text("a") + text(""), ["a", ""]), (9, struct.pack("<IQ", 8, 0), []),
])  # fmt: skip
def test_a_setting_of_every_type_is_read(code, packed, value, path):
    write(path, [setting("x", code, packed)])
    settings, arrays = read_gguf(path)
    assert settings == {"x": value} and type(settings["x"]) is type(value) and arrays == {}


@pytest.mark.parametrize("code, packed, value", [(5, struct.pack("<2i", -1, 7), [-1, 7]),
                                                 (7, b"\x00\x01", [False, True]),
                                                 (6, struct.pack("<2f", 0.5, -2), [0.5, -2])])  # fmt: skip
def test_a_list_of_numbers_is_an_array(code, packed, value, path):
    write(path, [setting("x", 9, struct.pack("<IQ", code, 2) + packed)])
    assert read_gguf(path)[0]["x"].tolist() == value


@pytest.mark.parametrize("version", [2, 3])
def test_both_versions_are_read(version, path):
    write(path, entries=[entry("x", [4, 2])], data=np.arange(8, dtype="<f4").tobytes(), version=version)
    assert read_gguf(path)[1]["x"].data.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_the_alignment_of_the_file_is_honoured(path):
    entries = [entry("x", [1]), entry("y", [1], offset=64)]
    write(path, [setting("general.alignment", 4, struct.pack("<I", 64))], entries,
          struct.pack("<f60xf", 1, 2), alignment=64)  # fmt: skip
    assert [array.data.tolist() for array in read_gguf(path)[1].values()] == [[1], [2]]


@pytest.mark.parametrize("alignment", [0, 1, 4, 24, 33])
def test_another_alignment_is_refused(alignment, path):
    write(path, [setting("general.alignment", 4, struct.pack("<I", alignment))])
    refused(path, f"alignment must be a power of two from 8 on, got {alignment}")


@pytest.mark.parametrize("start, complaint", [
    (b"", "is empty"),
    (b"GG", "not a GGUF file: it starts with b'GG'"),
    (b"\x80\x02}q\x00", "not a GGUF file"),
    (b"PK\x03\x04" + bytes(100), "not a GGUF file"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n", "pointer of Git LFS.*git lfs pull"),
    (b"GGUF" + struct.pack(">I", 3) + bytes(16), "big-endian"),
    (b"GGUF" + struct.pack("<I", 1) + bytes(16), "version 1 of GGUF; only 2 and 3"),
    (b"GGUF" + struct.pack("<I", 4) + bytes(16), "version 4 of GGUF"),
    (b"GGUF\x03\x00", "cut off"),
    (b"GGUF" + struct.pack("<IQ", 3, 0), "cut off"),
])  # fmt: skip
def test_what_is_no_gguf_file_says_what_it_is(start, complaint, path):
    path.write_bytes(start)
    refused(path, complaint)


def test_the_library_writes_a_big_endian_file_that_is_refused(path):
    write_gguf(path, endianess=gguf.GGUFEndian.BIG)
    refused(path, "big-endian")


def test_what_is_no_file_is_refused_without_opening_it(path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
        read_gguf(path)
    path.mkdir()
    refused(path, "is a (folder|pipe), where a file is needed")
    path.rmdir()
    if hasattr(os, "mkfifo"):
        # Opening it would wait for somebody to write.
        os.mkfifo(path)
        refused(path, "is a (folder|pipe), where a file is needed")


HUGE = [2**31, 2**32 + 1, 2**62, 2**64 - 1]


@pytest.mark.parametrize("count", HUGE)
@pytest.mark.parametrize("what", ["tensors", "settings", "text", "texts", "numbers", "name", "side"])
def test_a_count_that_lies_is_refused_before_memory_is_asked_for(what, count, path):
    packed = struct.pack("<Q", count)
    x = [entry("x", [4])]
    if what == "tensors":
        write(path, entries=x, data=bytes(32), counts=(count, 0))
    elif what == "settings":
        write(path, entries=x, data=bytes(32), counts=(1, count))
    elif what == "text":
        write(path, [setting("a", 8, packed + b"text")], x, bytes(32))
    elif what == "texts":
        write(path, [setting("a", 9, struct.pack("<I", 8) + packed)], x, bytes(32))
    elif what == "numbers":
        write(path, [setting("a", 9, struct.pack("<I", 5) + packed)], x, bytes(32))
    elif what == "name":
        write(path, [packed + b"name"], x, bytes(32))
    else:
        write(path, entries=[entry("x", [count, 2])], data=bytes(32))
    tracemalloc.start()
    refused(path, "damaged; fetch it again")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**21


def test_more_texts_than_any_vocabulary_has_are_refused_though_the_file_could_hold_them(path):
    write(path, [setting("tokens", 9, struct.pack("<IQ", 8, MOST_TEXTS + 1))])
    with open(path, "r+b") as file:
        file.truncate(8 * MOST_TEXTS + 2**20)  # a sparse file of empty texts
    refused(path, rf"tokens claims {MOST_TEXTS + 1:,} texts")


@pytest.mark.parametrize("settings, complaint", [
    ([setting("a", 13, b"")], "a is of the unknown type 13"),
    ([setting("a", 9, struct.pack("<IQ", 9, 0))], "a is a list of the unknown type 9"),
    ([setting("a", 9, struct.pack("<IQ", 99, 0))], "a is a list of the unknown type 99"),
    ([setting("a", 7, b"\0"), setting("a", 7, b"\0")], "a is set twice"),
    ([setting("a", 8, text(b"\xff"))], "a at byte .* is not UTF-8"),
    ([setting(b"\xff", 7, b"\0")], "the name of a setting at byte .* is not UTF-8"),
    ([setting("a\nb", 7, b"\0")], r"the name of a setting at byte 24 is 'a\\nb': damaged"),
    ([setting("a" * 256, 7, b"\0")], "the name of a setting"),
])  # fmt: skip
def test_damaged_settings_are_refused(settings, complaint, path):
    write(path, settings, [entry("x", [4])], bytes(32))
    refused(path, complaint)


@pytest.mark.parametrize("entries, data, complaint", [
    ([entry("x", [4]), entry("x", [4], offset=32)], bytes(64), "tensor x is listed twice"),
    ([entry("x", [])], b"", "x has 0 dimensions"),
    ([entry("x", [1] * 5)], bytes(32), "x has 5 dimensions"),
    ([entry("x", [0])], b"", r"x \(0,\): rows of F32"),
    ([entry("x", [4, 0])], b"", r"x \(0, 4\)"),
    ([entry("x", [4], 31)], bytes(32), "x is of type 31, which the library gguf does not know"),
    ([entry("x", [4], 2**32 - 1)], bytes(32), "x is of type 4294967295"),
    ([entry("x", [33], 8)], bytes(64), r"x \(33,\): rows of Q8_0 hold 32 n numbers"),
    ([entry("x", [4], offset=32)], bytes(64), "x starts at 32, where those before it end at 0"),
    ([entry("x", [4]), entry("y", [4])], bytes(64), "y starts at 0, where those before it end at 32"),
    ([entry("x", [4]), entry("y", [4], offset=2**63)], bytes(64), "y starts at 9,223"),
    ([entry("x", [9])], bytes(32), r"x \(9,\) ends at byte .*, and the file at"),
    ([entry("x", [4])], bytes(64), "32 bytes stand behind its last tensor"),
    ([entry("", [4]), entry("\x00", [4], offset=32)], bytes(64), r"the name of a tensor at byte .* is '\\x00'"),
])  # fmt: skip
def test_damaged_tensors_are_refused(entries, data, complaint, path):
    write(path, entries=entries, data=data)
    refused(path, complaint)


def test_a_last_tensor_needs_no_padding(path):
    write(path, entries=[entry("x", [4])], data=bytes(16))
    assert read_gguf(path)[1]["x"].shape == (4,)


def test_reading_keeps_nothing_of_the_tensors_in_memory(path):
    write_gguf(path, settings_of() | {"llama.feed_forward_length": 2**14})
    tracemalloc.start()
    settings, arrays = read_gguf(path)
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert kept < path.stat().st_size / 50
