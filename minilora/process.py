"""What belongs to the whole process and is chosen by who runs it: the backend, BLAS's threads, what free() does."""

import contextlib
import ctypes
import importlib
import importlib.util
import os


def array_module(name):
    """The module called `name`, "numpy" or "cupy"; an ImportError that names the extra if CuPy is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        remedy = "pip install 'minilora[cuda12]' (or [cuda13]) on a machine with an NVIDIA GPU"
        raise ImportError(f"backend 'cupy' needs CuPy, which does not import here ({error}); {remedy}") from error


def cores():
    """How many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def training_threads(asked, backend):
    """How many parts of a batch a command computes at once: `asked`, or if that is None 2 where it can, else 1.

    If there is more than one, the process is made ready for it: freed memory is kept.
    """
    possible = backend == "numpy" and cores() > 1 and importlib.util.find_spec("threadpoolctl") is not None
    threads = asked or (2 if possible else 1)
    if threads > 1:
        keep_freed_memory()
    return threads


@contextlib.contextmanager
def blas_threads(n):
    """Within this block each matrix multiplication of the process uses `n` threads; after it, as many as before.

    Raises: ImportError that names the extra, if threadpoolctl is not installed.
    """
    try:
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise ImportError("setting BLAS's threads needs threadpoolctl: pip install 'minilora[fast]'") from error
    with threadpool_limits(n, user_api="blas"):
        yield


def keep_freed_memory():
    """Have malloc keep what is freed for the next array, from now on; where it is not glibc's, do nothing: False.

    A training step frees and makes the same large arrays again and again. glibc would give each of them back to the
    system, which then has to find and clear every page anew. The price: memory once needed stays with the process.
    Source: mallopt(3).
    """
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018 (other C libraries have a mallopt that takes other options)
    except (OSError, TypeError, AttributeError):
        return False
    trim_threshold, top_pad, mmap_threshold, arena_max = -1, -2, -3, -8
    options = ((mmap_threshold, 1 << 30), (trim_threshold, 2**31 - 1), (top_pad, 1 << 26), (arena_max, 1))
    return sum(libc.mallopt(*option) for option in options) == len(options)
