"""What belongs to the whole process and is chosen by who runs it: the backend, BLAS's threads, what free() does."""

import contextlib
import ctypes
import importlib
import importlib.util
import os


def cores():
    """How many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def training_threads(asked, backend):
    """How many parts of a batch a command computes at once: `asked`, or if that is None 2 where it can, else 1.

    If there is more than one, the process is made ready for it: freed memory is kept.
    Raises: as `check_threads`; ValueError for several parts on another backend than NumPy.
    """
    if asked is None:
        possible = backend == "numpy" and cores() > 1 and importlib.util.find_spec("threadpoolctl") is not None
        asked = 2 if possible else 1
    check_threads(asked)
    if asked > 1:
        if backend != "numpy":
            raise ValueError(f"{asked} threads with backend {backend!r}: a GPU computes a batch in one part; give 1")
        keep_freed_memory()
    return asked


def check_threads(n):
    """Raise unless a batch can be computed in n parts at once: ValueError if n < 1, ImportError as `blas_threads`."""
    if n < 1:
        raise ValueError(f"threads must be at least 1, got {n}")
    if n > 1:
        _threadpoolctl()


@contextlib.contextmanager
def blas_threads(n):
    """Within this block each matrix multiplication of the process uses `n` threads; after it, as many as before.

    Raises: ImportError that names the extra, if threadpoolctl is not installed.
    """
    with _threadpoolctl().threadpool_limits(n, user_api="blas"):
        yield


def _threadpoolctl():
    try:
        return importlib.import_module("threadpoolctl")
    except ImportError as error:
        raise ImportError("setting BLAS's threads needs threadpoolctl: pip install 'minilora[fast]'") from error


def keep_freed_memory():
    """Have malloc keep what is freed for the next array, from now on; was it done? Where it is not glibc's, nothing is.

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
    # Any of these ends glibc's own adapting, so that the first must take hold: older ones allow no more than 32 MiB.
    if not (libc.mallopt(mmap_threshold, 1 << 30) or libc.mallopt(mmap_threshold, 1 << 25)):
        return False
    return all(map(libc.mallopt, (trim_threshold, top_pad, arena_max), (-1, 1 << 26, 1)))
