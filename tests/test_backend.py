"""Which module owns an array, and how arrays move."""

import sys

import numpy as np
import pytest
from hypothesis import given
from strategies import arrays, shapes

from minilora.backend import array_module, empty_kernel_cache, get_array_module, to_device, to_numpy


def test_the_array_decides(xp):
    x = xp.zeros((2, 3), np.float32)
    assert get_array_module(x) is xp
    assert get_array_module(x, x[0], x.sum()) is xp
    assert get_array_module(x.reshape(-1)) is xp


def test_numpy_scalars_belong_to_numpy():
    assert get_array_module(np.float32(1), np.zeros(2)) is np


def test_arrays_of_two_backends_are_named_with_the_remedy(device_xp):
    with pytest.raises(TypeError, match="numpy") as error:
        get_array_module(np.zeros(2), device_xp.zeros(2, np.float32))
    assert device_xp.__name__ in str(error.value) and "to_device" in str(error.value)


@pytest.mark.parametrize("not_an_array", [3.0, 1, [1.0], (1.0,), "x", None], ids=repr)
def test_what_is_not_an_array_is_named(not_an_array):
    with pytest.raises(TypeError, match=f"got {type(not_an_array).__name__}"):
        get_array_module(not_an_array)


def test_an_array_and_a_number_are_refused_together():
    with pytest.raises(TypeError):
        get_array_module(np.zeros(2), 3.0)


@given(arrays(shapes()))
def test_numpy_arrays_stay_where_they_are(x):
    assert to_numpy(x) is x and to_device(x, np) is x


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int64", "bool"])
@pytest.mark.parametrize("shape", [(), (0,), (2, 3)], ids=str)
def test_there_and_back_keeps_values_dtype_and_shape(device_xp, dtype, shape):
    x = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    there = to_device(x, device_xp)
    assert type(there) is device_xp.ndarray and to_device(there, device_xp) is there
    back = to_numpy(there)
    assert type(back) is np.ndarray and (back.dtype, back.shape) == (x.dtype, x.shape) and np.array_equal(back, x)
    assert np.array_equal(to_device(there, np), x)


def test_a_moved_array_is_independent_of_the_host(device_xp):
    x = np.ones(3)
    there = to_device(x, device_xp)
    x[:] = 0
    assert np.array_equal(to_numpy(there), np.ones(3))


@pytest.mark.parametrize("name", ["os", "nunpy", ""])
def test_only_the_two_backends_are_array_modules(name):
    with pytest.raises(ValueError, match=f'backend must be "numpy" or "cupy", got {name!r}'):
        array_module(name)


def test_a_folder_for_kernels_is_named_as_long_as_it_is_empty(device_xp, tmp_path, monkeypatch):
    folder = tmp_path / "kernels"
    monkeypatch.setenv("CUPY_CACHE_DIR", str(folder))
    assert empty_kernel_cache(np) is None
    assert empty_kernel_cache(device_xp) == folder
    folder.mkdir()
    assert empty_kernel_cache(device_xp) == folder
    (folder / "one.cubin").touch()
    assert empty_kernel_cache(device_xp) is None
    monkeypatch.delenv("CUPY_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert empty_kernel_cache(device_xp) == tmp_path / ".cupy" / "kernel_cache"


@pytest.mark.parametrize("before, after", [(None, "1"), ("0", "0")])
def test_compiled_headers_are_asked_for_before_cupy_is_imported_unless_somebody_said_otherwise(
    before, after, tmp_path, monkeypatch
):
    (tmp_path / "cupy.py").write_text("import os\nSEEN = os.environ['CUPY_NVRTC_USE_PCH']\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setenv("CUPY_NVRTC_USE_PCH", str(before))
    if before is None:
        monkeypatch.delenv("CUPY_NVRTC_USE_PCH")
    assert array_module("cupy").SEEN == after
    # It is of this test alone.
    del sys.modules["cupy"]
