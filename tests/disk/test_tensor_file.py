"""Arrays as safetensors: they stay in their file, 16 bits are widened without loss, what overflows is refused."""

import json
import os
import re
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_dtypes import bfloat16
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from strategies import resident_file_pages, seeds, write_tensors

from minilora.disk import tensor_file
from minilora.disk.tensor_file import (
    DIGESTS,
    Claim,
    all_finite,
    check_digests,
    digest_of_array,
    read_shards,
    read_tensors,
    release_pages,
    rounded,
    widened,
)
from minilora.disk.tensor_file import write_tensors as write_file

# Every number that 16 bits can be: signed zeros, subnormals and nan among them.
EVERY_HALF = np.arange(2**16, dtype=np.uint16)
posix_only = pytest.mark.skipif(sys.platform == "win32", reason="a mapped file cannot be replaced on Windows")


def drawn(seed=0, dtype="f4", shape=(3, 5)):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def is_map(array):
    """Does the memory of an array belong to a map of a file?"""
    while isinstance(array, np.ndarray):
        array = array.base
    owner = array.obj if isinstance(array, memoryview) else array
    return type(owner).__name__ == "mmap"


# What is read stays in its file.


@posix_only
def test_what_is_read_is_a_map_that_nobody_can_write(tmp_path):
    arrays = {"a": drawn(0), "b": drawn(1, "f8"), "c": drawn(2, "f2"), "d": np.arange(4)}
    arrays["e"] = drawn(3).astype(bfloat16)
    save_file(arrays, tmp_path / "x.safetensors")
    read, _ = read_tensors(tmp_path / "x.safetensors")
    assert list(map(is_map, read.values())) == [True] * 5
    for name, array in arrays.items():
        assert read[name].dtype == array.dtype and read[name].tobytes() == array.tobytes()
        with pytest.raises(ValueError, match="read-only"):
            read[name][...] = 0
        with pytest.raises(ValueError, match="WRITEABLE"):
            read[name].flags.writeable = True


def test_reading_takes_no_memory_of_the_size_of_the_file(tmp_path):
    save_file({"x": np.ones((1000, 1000), "f4"), "y": np.ones((1000, 1000), "f2")}, tmp_path / "x.safetensors")
    read_tensors(tmp_path / "x.safetensors")  # once before, so that what is imported is not counted
    tracemalloc.start()
    try:
        read = read_tensors(tmp_path / "x.safetensors")[0]
        assert all(map(all_finite, read.values()))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 5e6 if sys.platform != "win32" else True


@posix_only
def test_a_map_keeps_its_bytes_when_the_file_is_replaced_and_when_it_is_removed(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"x": drawn(0)}, path)
    read = read_tensors(path)[0]["x"]
    save_file({"x": drawn(1)}, tmp_path / "new")
    os.replace(tmp_path / "new", path)
    assert np.array_equal(read, drawn(0)) and np.array_equal(read_tensors(path)[0]["x"], drawn(1))
    path.unlink()
    assert np.array_equal(read, drawn(0))


@posix_only
@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("replaced", ["before it is checked", "after it was checked"])
def test_a_file_that_is_replaced_while_it_is_read_is_not_read_in_part(tmp_path, monkeypatch, replaced, damaged):
    """All that is read is of the file that was checked, though another one with other sizes had its name before."""
    path = tmp_path / "x.safetensors"
    save_file({"x": drawn(0), "y": drawn(1)}, path, {"of": "the first"})
    if damaged:
        path.write_bytes(path.read_bytes()[:-5])
    save_file({"longer name": np.ones(3, "f8"), "x": drawn(2, shape=(4, 4))}, tmp_path / "new", {"of": "the second"})
    real = tensor_file.safe_open

    def slow(*args, **more):
        if replaced.startswith("before") and (tmp_path / "new").exists():
            os.replace(tmp_path / "new", path)
        checked = real(*args, **more)
        if (tmp_path / "new").exists():
            os.replace(tmp_path / "new", path)
        return checked

    monkeypatch.setattr(tensor_file, "safe_open", slow)
    if damaged and replaced.startswith("after"):
        with pytest.raises(ValueError, match="x.safetensors is damaged"):
            read_tensors(path)
    else:
        tensors, metadata = read_tensors(path)
        assert metadata == {"of": "the second"} and tensors.keys() == {"x", "longer name"}
        assert np.array_equal(tensors["x"], drawn(2, shape=(4, 4))) and (tensors["longer name"] == 1).all()


@pytest.mark.parametrize("padding", range(8))
def test_a_tensor_that_does_not_lie_where_its_type_may_is_copied(padding, tmp_path):
    """The header may end anywhere, and a tensor of bytes may stand before one of wider numbers."""
    arrays = {"first": drawn(0, "f2", (3,)), "x": drawn(1), "wide": drawn(2, "f8"), "half": drawn(3)}
    write_tensors(tmp_path / "x.safetensors", arrays, bfloat16={"half"})
    raw = (tmp_path / "x.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length] + b" " * padding
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
    read, _ = read_tensors(tmp_path / "x.safetensors")
    for name in ("first", "x", "wide"):
        assert read[name].flags.aligned and not read[name].flags.writeable
        assert read[name].tobytes() == arrays[name].tobytes()
    assert widened(read["half"]).tobytes() == (arrays["half"].view("u4") & 0xFFFF0000).tobytes()


@pytest.mark.parametrize("platform", ["win32", "a file system without maps"])
def test_what_cannot_be_mapped_is_read(platform, tmp_path, monkeypatch):
    save_file({"a": drawn(0), "b": drawn(1, "f2")}, tmp_path / "x.safetensors", {"format": "pt"})

    def no_maps(*args, **more):
        assert platform != "win32"
        raise OSError(19, "No such device")

    monkeypatch.setattr(tensor_file.mmap, "mmap", no_maps)
    if platform == "win32":
        monkeypatch.setattr(tensor_file.sys, "platform", platform)
    read, metadata = read_tensors(tmp_path / "x.safetensors")
    assert metadata == {"format": "pt"} and not any(map(is_map, read.values()))
    assert np.array_equal(read["a"], drawn(0)) and np.array_equal(read["b"], drawn(1, "f2"))
    assert not read["a"].flags.writeable


@pytest.mark.parametrize("shape", [(0,), (0, 3), (), (1,), (2, 0, 2)])
def test_arrays_without_numbers_or_without_axes_are_read(shape, tmp_path):
    arrays = {"a": np.ones(shape, "f4"), "z": np.full(shape, 2, "f2")}
    save_file(arrays, tmp_path / "x.safetensors")
    read, _ = read_tensors(tmp_path / "x.safetensors")
    assert {name: (a.shape, a.tolist()) for name, a in read.items()} == {
        name: (a.shape, a.tolist()) for name, a in arrays.items()}  # fmt: skip
    assert all(map(all_finite, read.values()))


@posix_only
def test_shards_are_maps_too(tmp_path):
    save_file({"a": drawn(0)}, tmp_path / "one.safetensors")
    save_file({"b": drawn(1)}, tmp_path / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "index.json").write_text(json.dumps(index))
    read = read_shards(tmp_path / "index.json")
    assert is_map(read["a"]) and is_map(read["b"]) and np.array_equal(read["b"], drawn(1))


@given(st.data())
def test_whatever_the_library_reads_is_read_as_the_library_reads_it(data):
    """The header is read here, the library only checks it: both must see the same in it, or refuse it."""
    arrays = {"a": drawn(0, "f4", (2, 3)), "b": drawn(1, "f2", (4,)), "c": np.arange(3), "d": drawn(2, "f8", ())}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        save_file(arrays, path, {"format": "pt"})
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        at = 8 + data.draw(st.integers(0, length - 1))
        new = data.draw(st.sampled_from([b"", b" ", b"0", b"1", b'"', b",", b"a", bytes([raw[at] ^ 1])]))
        spoilt = raw[:at] + new + raw[at + data.draw(st.integers(0, 1)) :]
        spoilt = (length + len(spoilt) - len(raw)).to_bytes(8, "little") + spoilt[8:]
        path.write_bytes(spoilt)
        try:
            with safe_open(path, framework="np") as file:
                expected = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, TypeError, AttributeError):
            with pytest.raises(ValueError, match="x.safetensors"):
                read_tensors(path)
            return
        read, _ = read_tensors(path)
        assert {name: (a.dtype, a.shape, a.tobytes()) for name, a in read.items()} == {
            name: (a.dtype, a.shape, a.tobytes()) for name, a in expected.items()}  # fmt: skip


# 16 bits.


def test_every_float16_is_widened_without_loss(tmp_path):
    halves = EVERY_HALF.view(np.float16)
    save_file({"x": halves}, tmp_path / "x.safetensors")
    stored = read_tensors(tmp_path / "x.safetensors")[0]["x"]
    wide = widened(stored)
    numbers = ~np.isnan(halves)
    assert stored.dtype == np.float16 and wide.dtype == np.float32
    assert np.array_equal(wide[numbers].astype(np.float16).view(np.uint16), EVERY_HALF[numbers])
    assert np.isnan(wide[~numbers]).all()


def test_every_bfloat16_is_widened_without_loss(tmp_path):
    wide = (EVERY_HALF.astype(np.uint32) << 16).view(np.float32).reshape(256, 256)
    arrays = {"x": wide, "beside": np.ones(3, "f4"), "y": wide[:2].copy()}
    write_tensors(tmp_path / "x.safetensors", arrays, None, bfloat16={"x", "y"})
    stored, _ = read_tensors(tmp_path / "x.safetensors")
    assert stored.keys() == arrays.keys() and stored["x"].dtype == bfloat16
    for name, array in arrays.items():
        again = widened(stored[name])
        assert again.dtype == np.float32 and again.tobytes() == array.tobytes()


def test_what_has_no_16_bits_is_not_widened():
    for dtype in ("f4", "f8", "i8", "i2", "u2"):
        array = np.ones(3, dtype)
        assert widened(array) is array


@pytest.mark.parametrize("dtype", [np.float16, bfloat16], ids=["float16", "bfloat16"])
def test_each_number_of_16_bits_is_finite_if_it_is(dtype):
    numbers = EVERY_HALF.view(dtype)
    expected = np.isfinite(numbers.astype(np.float32))
    assert [all_finite(numbers[i : i + 1]) for i in range(2**16)] == expected.tolist()
    assert all_finite(numbers[expected]) and not all_finite(numbers)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", bfloat16])
@pytest.mark.parametrize("size", [1, 7, 2**18, 2**18 + 1, 2**19 + 5])
def test_one_number_that_is_not_finite_is_found_anywhere(dtype, size):
    array = np.full(size, 3, dtype)
    assert all_finite(array)
    for place in {0, size // 2, size - 1, min(size - 1, 2**18), min(size - 1, 2**18 - 1)}:
        for wrong in (np.nan, np.inf, -np.inf):
            spoilt = array.copy()
            spoilt[place] = wrong
            assert not all_finite(spoilt)


@pytest.mark.parametrize("dtype, largest", [("f4", 3.4e38), ("f8", 1.7e308)])
def test_numbers_whose_squares_overflow_are_finite(dtype, largest):
    array = np.array([[largest, -largest], [1, 0]], dtype)
    assert all_finite(array)
    assert not all_finite(np.array([largest, np.inf], dtype)) and not all_finite(np.array([largest, np.nan], dtype))


# What is refused.


@pytest.mark.parametrize("code, size", [("F8_E4M3", 1), ("F8_E5M2", 1), ("F4", 1), ("U128", 16)])
def test_a_type_that_numpy_does_not_have_is_refused_with_the_file(code, size, tmp_path):
    header = json.dumps({"x": {"dtype": code, "shape": [4], "data_offsets": [0, 4 * size]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4 * size))
    with pytest.raises(ValueError, match=r"x\.safetensors"):
        read_tensors(tmp_path / "x.safetensors")


@given(seeds, st.sampled_from(["float16", "float32", "float64"]))
def test_rounding_is_to_nearest_and_keeps_what_fits(seed, dtype):
    x = np.random.default_rng(seed).standard_normal(50) * 100
    new = rounded("x", x, dtype)
    assert new.dtype == dtype and np.array_equal(new, x.astype(dtype))
    below = np.nextafter(new, new.dtype.type(-np.inf))
    above = np.nextafter(new, new.dtype.type(np.inf))
    error = np.abs(new - x)
    assert (error <= np.abs(below - x)).all() and (error <= np.abs(above - x)).all()


def test_what_overflows_is_refused_by_name_and_what_does_not_is_kept():
    assert rounded("x", np.array([65504.0, -65504.0]), "float16").tolist() == [65504.0, -65504.0]
    for value in (65520.0, -1e6):
        with pytest.raises(ValueError, match="h.0.weight: .* is too large for float16; save it as float32"):
            rounded("h.0.weight", np.array([1.0, value]), "float16")
    with pytest.raises(ValueError, match="x: 1e.300 is too large for float32"):
        rounded("x", np.array([1e300]), "float32")


@pytest.mark.parametrize("dtype", ["int8", "f4", "", None, np.float32])
def test_only_four_types_are_written(dtype):
    with pytest.raises(ValueError, match="dtype must be one of float16, bfloat16, float32, float64, got"):
        rounded("x", np.ones(2), dtype)


def test_bfloat16_is_rounded_to_nearest():
    x = np.array([1, 1 + 2**-9, 1 + 2**-8, 1 + 3 * 2**-8, -0.0, 1 / 3], "f4")  # ties go to the even one
    assert rounded("x", x, "bfloat16").astype("f4").tolist() == [1, 1, 1, 1 + 2**-6, -0.0, 0.333984375]
    with pytest.raises(ValueError, match="too large for bfloat16"):
        rounded("x", np.array([3.4e38], "f4"), "bfloat16")


@pytest.mark.skipif(sys.platform != "linux", reason="asks the system as Linux answers")
def test_pages_that_are_given_back_are_read_again_from_the_file(tmp_path):
    values = np.arange(4_000_000, dtype=np.float32)
    save_file({"a": values}, tmp_path / "a.safetensors")
    (array,) = read_tensors(tmp_path / "a.safetensors")[0].values()
    assert array.sum() == values.sum()
    before = resident_file_pages()
    release_pages([array[5:], values, array])
    assert before - resident_file_pages() > values.nbytes / 2
    assert np.array_equal(array, values)


# What is written: the same bytes each time, and digests of them.


def saved(path, seed=0, **metadata):
    arrays = {"b": drawn(seed), "a": drawn(seed + 1, "f8", (2,)), "empty": np.zeros((0, 3), "f4")}
    write_file(path, arrays, {"format": "pt", "z": "1", "k": "\x07 \u00e9\n", **metadata})
    return arrays


def test_the_same_tensors_give_the_same_bytes_in_any_process(tmp_path):
    """The library writes metadata in the order of a hash that is seeded anew for each process and each map."""
    saved(tmp_path / "here")
    program = (
        "import sys; sys.path[:0] = sys.argv[2:]; from pathlib import Path; import test_tensor_file as t; "
        "t.saved(Path(sys.argv[1]))"
    )
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    subprocess.run([sys.executable, "-c", program, tmp_path / "there", *folders], check=True)
    assert (tmp_path / "here").read_bytes() == (tmp_path / "there").read_bytes()
    for i in range(8):
        saved(tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == (tmp_path / "here").read_bytes(), i


def test_the_library_reads_what_was_put_in_order(tmp_path):
    arrays = saved(tmp_path / "a")
    with safe_open(tmp_path / "a", framework="np") as file:
        assert file.metadata()["k"] == "\x07 \u00e9\n"
        assert {name: file.get_tensor(name).tobytes() for name in file.keys()} == {
            name: array.tobytes() for name, array in arrays.items()
        }


def of_another_shape(array):
    return array.reshape(array.shape[::-1])


def with_one_bit_changed(array):
    changed = array.copy()
    changed.reshape(-1).view("u1")[0] ^= 1
    return changed


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", bfloat16, "i8", "?"])
@pytest.mark.parametrize("change", [of_another_shape, with_one_bit_changed, lambda a: a.view(f"u{a.itemsize}")])
def test_a_digest_is_of_the_type_the_shape_and_each_bit(dtype, change):
    array = drawn(1).astype(dtype)
    assert digest_of_array(array) == digest_of_array(array.copy())
    assert digest_of_array(array) != digest_of_array(change(array))


@pytest.mark.parametrize("flipped", range(5))
def test_a_value_that_is_not_the_saved_one_is_told_by_the_name_of_its_tensor(flipped, tmp_path):
    arrays = saved(tmp_path / "a")
    content = bytearray((tmp_path / "a").read_bytes())
    at = len(content) - 1 - flipped * 15
    content[at] ^= 4
    (tmp_path / "a").write_bytes(content)
    tensors, metadata = read_tensors(tmp_path / "a")
    (damaged,) = [name for name in arrays if tensors[name].tobytes() != arrays[name].tobytes()]
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path / 'a'))}: the values of {damaged} are not those"):
        check_digests(tmp_path / "a", tensors, metadata)


def test_changed_metadata_are_told_and_a_file_without_digests_passes(tmp_path):
    arrays = saved(tmp_path / "a")
    tensors, metadata = read_tensors(tmp_path / "a")
    check_digests(tmp_path / "a", tensors, metadata)
    for other in ({**metadata, "z": "2"}, {**metadata, "more": ""}, {k: v for k, v in metadata.items() if k != "z"}):
        with pytest.raises(ValueError, match="a: its metadata are not those that were saved"):
            check_digests(tmp_path / "a", tensors, other)
    save_file(arrays, tmp_path / "theirs")
    check_digests(tmp_path / "theirs", *read_tensors(tmp_path / "theirs"))


@pytest.mark.parametrize("note", ["{", "[]", "{}", '{"tensors": 3}', '{"tensors": {"a": null}, "metadata": 1}'])
def test_a_note_on_digests_that_is_none_is_refused(note, tmp_path):
    tensors, metadata = read_tensors_of(tmp_path)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "a"))):
        check_digests(tmp_path / "a", tensors, {**metadata, DIGESTS: note})


def read_tensors_of(folder):
    saved(folder / "a")
    return read_tensors(folder / "a")


@pytest.mark.parametrize("change", [lambda t: t.pop("b"), lambda t: t.update(c=t["b"])])
def test_tensors_and_digests_have_the_same_names(change, tmp_path):
    tensors, metadata = read_tensors_of(tmp_path)
    change(tensors)
    with pytest.raises(ValueError, match="do not match"):
        check_digests(tmp_path / "a", tensors, metadata)


def test_a_claim_reads_its_tensor_once(monkeypatch):
    array = drawn()
    claim = Claim("file", "t", array, digest_of_array(array))
    claim.check()
    monkeypatch.setattr(tensor_file, "digest_of_array", lambda array: "other")
    claim.check()
    with pytest.raises(ValueError, match="file: the values of t are not those"):
        Claim("file", "t", array, digest_of_array(array)).check()
