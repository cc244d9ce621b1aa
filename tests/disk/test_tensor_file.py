"""Arrays as safetensors: every number of 16 bits is widened without loss, and rounding is to nearest or refused."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from strategies import seeds, write_tensors

from minilora.disk.tensor_file import read_tensors, rounded

# Every number that 16 bits can be: signed zeros, subnormals and nan among them.
EVERY_HALF = np.arange(2**16, dtype=np.uint16)


def test_every_float16_is_widened_without_loss(tmp_path):
    halves = EVERY_HALF.view(np.float16)
    save_file({"x": halves}, tmp_path / "x.safetensors")
    widened = read_tensors(tmp_path / "x.safetensors")[0]["x"]
    numbers = ~np.isnan(halves)
    assert widened.dtype == np.float32
    assert np.array_equal(widened[numbers].astype(np.float16).view(np.uint16), EVERY_HALF[numbers])
    assert np.isnan(widened[~numbers]).all()


def test_every_bfloat16_is_widened_without_loss(tmp_path):
    wide = (EVERY_HALF.astype(np.uint32) << 16).view(np.float32).reshape(256, 256)
    arrays = {"x": wide, "beside": np.ones(3, "f4"), "y": wide[:2].copy()}
    write_tensors(tmp_path / "x.safetensors", arrays, None, bfloat16={"x", "y"})
    widened, _ = read_tensors(tmp_path / "x.safetensors")
    assert widened.keys() == arrays.keys()
    for name, array in arrays.items():
        assert widened[name].dtype == np.float32 and widened[name].tobytes() == array.tobytes()


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
