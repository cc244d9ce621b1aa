"""What a command computes with: the backend of --backend, and parts and threads. Knows no command.

What it needs to know of the library is imported when a command asks.
"""

from .messages import warn


def kept_parts_and_threads(parts, threads, backend):
    """(parts, threads) of a command that trains or measures, where None stands for the default.

    With several threads the process keeps freed memory for the next step.
    """
    from ..training.threads import keep_freed_memory, parts_and_threads

    parts, threads = parts_and_threads(parts, threads, backend)
    if threads > 1:
        keep_freed_memory()
    return parts, threads


def device(name):
    """The array module of --backend. If it has to compile its kernels first, that is said."""
    from ..backend import array_module, empty_kernel_cache

    xp = array_module(name)
    folder = empty_kernel_cache(xp)
    if folder is not None:
        warn(f"{name} compiles its kernels in this first run, for minutes; kept in {folder}")
    return xp
