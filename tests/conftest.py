"""How the tests run: hypothesis's settings, and the array modules that every backend test is given."""

import gc
import importlib
import os

import numpy
import pytest
import strict_array
from hypothesis import settings

settings.register_profile("local", deadline=None, max_examples=25, print_blob=True)
settings.register_profile("ci", deadline=None, max_examples=15, print_blob=True, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def cupy_or_skip():
    """The module `cupy`, or a skip that says what this machine lacks."""
    try:
        cupy = importlib.import_module("cupy")
        devices = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # no CuPy, no driver, no GPU: each has its own exception
        pytest.skip(f"needs CuPy and an NVIDIA GPU: {error}")
    if not devices:
        pytest.skip("needs an NVIDIA GPU: CuPy is here and sees none")
    return cupy


@pytest.fixture(params=["numpy", "strict_array", pytest.param("cupy", marks=pytest.mark.cupy)])
def xp(request):
    """Each array module in turn: NumPy, the strict stand-in for CuPy, and CuPy itself where there is a GPU."""
    return {"numpy": lambda: numpy, "strict_array": lambda: strict_array, "cupy": cupy_or_skip}[request.param]()


@pytest.fixture(params=["strict_array", pytest.param("cupy", marks=pytest.mark.cupy)])
def device_xp(request):
    """Each array module whose arrays are not NumPy's."""
    return strict_array if request.param == "strict_array" else cupy_or_skip()


@pytest.fixture
def no_garbage_collector():
    """Within the test, memory is freed by the last reference going away and by nothing else."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()
