"""What belongs to the whole process and is chosen by who runs it: threads, and what free() does."""

import contextlib
import ctypes
import os
import signal
import threading


def cores():
    """How many processor cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_parts(parts, threads):
    """Raise ValueError unless 1 <= threads <= parts."""
    if not 1 <= threads <= parts:
        raise ValueError(
            f"parts {parts}, threads {threads}: a batch is cut into at least one part, "
            "and no more threads can work than there are parts"
        )


def parts_and_threads(parts, threads, backend):
    """(parts, threads) of a training command, where None stands for the default.

    By default NumPy computes a batch in as many parts as there are cores, at least two, and on as
    many threads as there are parts and cores. A GPU computes it in one.
    Raises: ValueError for less than one, more threads than parts, or several threads on a GPU.
    """
    if parts is None:
        parts = max(2, cores()) if backend == "numpy" else 1
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


class _Blas:
    """How many threads BLAS has, and who relies on it. Both are of the process."""

    def __init__(self):
        self.lock = threading.Lock()
        self.n_holders = 0
        # The numbers of the libraries that were found: before the first holder, and since then.
        self.before = set()
        self.now = set()
        self.limiter = None

    def hold(self, n):
        """Set `n` threads, None for as many as there are, or join those who did the same."""
        with self.lock:
            if self.n_holders == 0:
                self._begin(n)
            else:
                self._check_this_thread()
            wanted = self.before if n is None else {n}
            # Where no BLAS is found there is nothing to disagree on.
            if self.now and wanted != self.now:
                raise ValueError(
                    f"BLAS computes with {_listed(self.now)} threads for a training or measurement "
                    f"that has not ended, and this one needs {_listed(wanted)}: sums would be "
                    "rounded otherwise. Cut both into several parts, or run one of them in a "
                    "process of its own"
                )
            self.n_holders += 1

    def _begin(self, n):
        import threadpoolctl

        controller = threadpoolctl.ThreadpoolController()
        self.before = _numbers(controller)
        self.now = self.before
        self.limiter = None
        if n is None or not self.before:
            return
        limiter = _limit(controller, n)
        found = _numbers(controller)
        if found != {n}:
            _set_back(limiter)
            raise ValueError(
                f"BLAS keeps {_listed(found)} threads where {n} are needed: another thread of "
                "Python has set them with threadpoolctl, and has not ended; set them there"
            )
        self.now = found
        self.limiter = limiter

    def _check_this_thread(self):
        import threadpoolctl

        found = _numbers(threadpoolctl.ThreadpoolController())
        if found != self.now:
            raise ValueError(
                f"BLAS has {_listed(found)} threads for this thread of Python and "
                f"{_listed(self.now)} for another that relies on it: run one training or "
                "measurement at a time in a process"
            )

    def release(self):
        """Let go; the last one sets back what was there before the first."""
        with self.lock:
            self.n_holders -= 1
            if self.n_holders == 0 and self.limiter is not None:
                _set_back(self.limiter)


def _numbers(controller):
    """How many threads the libraries of BLAS have: one number, if all is well."""
    libraries = [library for library in controller.info() if library["user_api"] == "blas"]
    return {library["num_threads"] for library in libraries}


def _limit(controller, n):
    """Set `n` threads of BLAS; returns what sets back those before."""
    import threadpoolctl

    limiter = controller.limit(limits=n, user_api="blas")
    # threadpoolctl lets the first thread alone set them, and others silently do nothing. Here
    # whoever comes last sets them back.
    threadpoolctl.OpenBLASController.clear_controlling_thread()
    return limiter


def _set_back(limiter):
    """Set what there was before `_limit`."""
    import threadpoolctl

    limiter.restore_original_limits()
    threadpoolctl.OpenBLASController.clear_controlling_thread()


def limit_this_thread(n):
    """Have this thread of Python multiply with `n` threads for good, where BLAS counts by thread.

    An OpenBLAS that is built on OpenMP does; elsewhere `blas_threads` is for the whole process.
    """
    import threadpoolctl

    _limit(threadpoolctl.ThreadpoolController(), n)


def _listed(numbers):
    return " and ".join(map(str, sorted(numbers)))


_BLAS = _Blas()


@contextlib.contextmanager
def blas_threads(n=None):
    """Within this block each matrix multiplication of the process uses `n` threads.

    None is as many as it would use anyway, and nobody changes that within the block. Blocks on
    several Python threads may overlap: the number is set by the first and set back by the last.
    Raises: ValueError if a block that has not ended needs another number.
    """
    is_held = False
    try:
        # To find the BLAS, threadpoolctl has the C library call Python functions. An exception in
        # one is printed and lost: the program would go on.
        with ctrl_c_deferred():
            _BLAS.hold(n)
            is_held = True
        yield
    finally:
        if is_held:
            with ctrl_c_deferred():
                _BLAS.release()


def blas_kernel():
    """What decides how BLAS rounds: library, version and the kernels that fit this processor."""
    import threadpoolctl

    with ctrl_c_deferred():
        found = threadpoolctl.threadpool_info()
    kernels = set()
    for library in found:
        if library["user_api"] == "blas":
            words = [library.get(key) for key in ("internal_api", "version", "architecture")]
            kernels.add(" ".join(word for word in words if word))
    return " and ".join(sorted(kernels)) or "unknown"


@contextlib.contextmanager
def ctrl_c_kept_from_children():
    """Processes that are started within this block never hear of Ctrl-C; this one does after it.

    A terminal tells all processes of a program, and a child would print a traceback.
    """
    if not hasattr(signal, "pthread_sigmask"):
        # Windows: there a child hears of it until it says otherwise itself.
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def ctrl_c_deferred():
    """Within this block Ctrl-C and SIGTERM wait for its end: for what must not be cut in half."""
    numbers = []
    if threading.current_thread() is threading.main_thread():
        # A signal of which no Python code hears raises nothing.
        numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if callable(signal.getsignal(n))]
    came = []
    handlers = {n: signal.signal(n, lambda number, frame: came.append(number)) for n in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if came:
        signal.raise_signal(came[0])


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
