"""What belongs to the whole process and is chosen by who runs it: threads, and what free() does."""

import contextlib
import ctypes
import os
import signal
import threading

from .parts import check_parts


def cores():
    """How many processor cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def parts_and_threads(parts, threads, backend):
    """(parts, threads) of a training command, where None stands for the default.

    By default NumPy computes a batch in two parts, whatever the machine, for the same bits; and on
    as many threads, if there are as many cores. A GPU computes it in one.
    Raises: ValueError for less than one, more threads than parts, or several threads on a GPU.
    """
    if parts is None:
        parts = 2 if backend == "numpy" else 1
    if threads is None:
        threads = min(parts, cores()) if backend == "numpy" else 1
    if threads > parts:
        raise ValueError(
            f"{threads} threads for {parts} parts: give as many parts, which changes how numbers "
            f"are rounded, or at most {parts} threads"
        )
    check_parts(parts, threads)
    if threads > 1 and backend != "numpy":
        raise ValueError(
            f"{threads} threads with backend {backend!r}: a GPU computes one part at a time; give 1"
        )
    return parts, threads


@contextlib.contextmanager
def blas_threads(n):
    """Within this block each matrix multiplication of the process uses `n` threads."""
    import threadpoolctl

    # To find the BLAS, threadpoolctl has the C library call Python functions. An exception in one
    # is printed and lost: the program would go on.
    with ctrl_c_deferred():
        controller = threadpoolctl.ThreadpoolController()
    with controller.limit(limits=n, user_api="blas"):
        yield


@contextlib.contextmanager
def ctrl_c_deferred():
    """Within this block Ctrl-C waits for the end of the block: for what must not be cut in half."""
    on_main_thread = threading.current_thread() is threading.main_thread()
    if not on_main_thread or signal.getsignal(signal.SIGINT) is None:
        # No Python code hears of Ctrl-C here.
        yield
        return
    presses = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: presses.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if presses:
        signal.raise_signal(signal.SIGINT)


def keep_freed_memory():
    """Have malloc keep what is freed for the next array. Returns whether it does (glibc alone).

    A training step frees and makes the same large arrays again and again. glibc would give each of
    them back to the system, which then has to find and clear every page anew. The price: memory
    once needed stays with the process. Source: mallopt(3).
    """
    try:
        libc = ctypes.CDLL(None)
        # Other C libraries have a mallopt too, with other options.
        libc.gnu_get_libc_version  # noqa: B018
    except (OSError, TypeError, AttributeError):
        return False
    trim_threshold, top_pad, mmap_threshold, arena_max = -1, -2, -3, -8
    # Setting any of these ends glibc's own adapting, so the first must take hold. Older versions
    # allow no more than 32 MiB.
    took_hold = libc.mallopt(mmap_threshold, 1 << 30) or libc.mallopt(mmap_threshold, 1 << 25)
    if not took_hold:
        return False
    never = -1
    return bool(
        libc.mallopt(trim_threshold, never)
        and libc.mallopt(top_pad, 1 << 26)
        and libc.mallopt(arena_max, 1)
    )
