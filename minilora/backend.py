"""Which array module owns an array, and how arrays move. Knows two backends, as kernels.py does."""

import importlib
import os
import sys
from pathlib import Path

import numpy as np


def get_array_module(*arrays):
    """The module that owns every one of `arrays`: `numpy`, or `cupy` for arrays on a GPU.

    There is no global device: the array decides. A function that starts with
    `xp = get_array_module(x)` and says `xp.exp(x)` runs on both.

    Shapes: any number of arrays of any shape and dtype.
    Raises: TypeError if they live on different backends, or something is not an array at all.
    Source: the convention of Chainer and CuPy (`cupy.get_array_module`).

    >>> get_array_module(np.zeros(3)).__name__
    'numpy'
    """
    # The usual case comes first: a step asks hundreds of times.
    for a in arrays:
        if type(a) is not np.ndarray:
            break
    else:
        return np
    owners = {sys.modules[type(a).__module__.partition(".")[0]] for a in arrays}
    if len(owners) > 1:
        names = " and ".join(sorted(xp.__name__ for xp in owners))
        raise TypeError(
            f"arrays of {names} in one operation; move them to one backend with to_device(x, xp)"
        )
    xp = owners.pop()
    if not hasattr(xp, "ndarray"):
        types = ", ".join(sorted({type(a).__name__ for a in arrays}))
        raise TypeError(f"expected NumPy or CuPy arrays, got {types}; write np.asarray(x) first")
    return xp


def to_numpy(x):
    """`x` as a NumPy array on the host. From a GPU this is a copy, and a wait for it to finish."""
    xp = get_array_module(x)
    return np.asarray(x) if xp is np else xp.asnumpy(x)


def to_device(x, xp):
    """`x` as an array of the module `xp`: itself if it already is one, a copy if it has to move.

    NumPy draws every random number of this project, and then it is moved. One seed therefore means
    the same weights and the same batches on a CPU and on a GPU.
    """
    return to_numpy(x) if xp is np else xp.asarray(x)


def on_host(ids):
    """`ids` as a NumPy array, from a list or from either backend."""
    return to_numpy(ids) if hasattr(ids, "dtype") else np.asarray(ids)


def check_rng(rng):
    """`rng`, if it is a `numpy.random.Generator`; else a TypeError that says how to make one."""
    if not isinstance(rng, np.random.Generator):
        raise TypeError(
            f"rng must be a numpy.random.Generator, got {rng!r}; write np.random.default_rng(seed)"
        )
    return rng


def array_module(name):
    """The module called `name`, "numpy" or "cupy".

    CuPy compiles each kernel at its first use; with headers that are compiled beforehand it takes a
    tenth of the time. That is set here, before CuPy is imported, unless CUPY_NVRTC_USE_PCH says
    otherwise.
    Raises: ValueError for another name; ImportError with the command that installs CuPy, if that is
    missing.
    """
    if name not in ("numpy", "cupy"):
        raise ValueError(f'backend must be "numpy" or "cupy", got {name!r}')
    if name == "cupy":
        os.environ.setdefault("CUPY_NVRTC_USE_PCH", "1")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"backend 'cupy' needs CuPy, which does not import here ({error}); in a clone, on a "
            "machine with an NVIDIA GPU: pip install -e '.[cuda12]' (or '.[cuda13]')"
        ) from error


def empty_kernel_cache(xp):
    """The folder in which CuPy will keep the kernels that this run compiles, if it holds none yet.

    None if there are some, or `xp` compiles nothing. Such a first run takes minutes longer.
    """
    if xp is np:
        return None
    folder = Path(os.environ.get("CUPY_CACHE_DIR", Path.home() / ".cupy" / "kernel_cache"))
    return None if folder.is_dir() and any(folder.iterdir()) else folder
