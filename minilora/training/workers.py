"""Parts computed in other processes, by any Executor of concurrent.futures. Knows no scheduler.

A worker makes the model once and keeps it. A task takes it the trained arrays and one part, and
brings back a loss and gradients: those of an adapter, while the base stays where it is. Processes
that map one file of a base share its memory.
"""

import hashlib
import multiprocessing
import os
import platform
import signal
import sys
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from .. import __version__
from ..graph import no_grad
from ..nn import digest_of
from .parts import Replica, Workers, part_gradients
from .threads import blas_kernel, blas_threads, ctrl_c_kept_from_children, keep_freed_memory


@dataclass(frozen=True)
class Recipe:
    """How a worker makes the model, and what it must find when it has.

    make: a function of no arguments, which the executor carries there. identity: pairs of what is
    compared and its value. number: that of a run, by which a worker knows its recipe again.
    """

    make: Callable = field(compare=False)
    identity: tuple
    number: str


class RemoteWorkers(Workers):
    """`n` workers of `executor`, which compute the `parts` of each batch of `model`.

    `make` is a function of no arguments that gives the same model anywhere: its frozen weights are
    compared, its trained arrays are replaced by those of `model` in each task. It must be possible
    to pickle it, as a function at the top of a module that workers can import, or a
    `functools.partial` of one. Each part computes with one thread of BLAS.

    On entering, as many tasks as there are workers make them load the model and compare; every
    worker that comes later does so before its first part.
    Raises: ValueError unless 1 <= n <= parts; on entering, if a worker cannot make the model, or
    has another version of minilora or NumPy, another kernel of BLAS or other frozen weights;
    RuntimeError if a worker dies while it does that.
    """

    def __init__(self, model, make, executor, n, parts):
        check_workers(n, parts)
        super().__init__(model, parts, n)
        self.executor = executor
        self.recipe = Recipe(make, identity_of(model), uuid.uuid4().hex)

    def __enter__(self):
        try:
            # Here an executor of processes starts them.
            with ctrl_c_kept_from_children():
                checks = [self.executor.submit(check, self.recipe) for _ in range(self.n)]
            for found in checks:
                found.result()
        except BrokenExecutor as error:
            raise RuntimeError(
                f"a worker died before the first step, while it loaded the model: {error}"
            ) from error
        return self

    def __exit__(self, *raised):
        pass

    def submit_step(self, part):
        """A Future of what a worker makes of the part."""
        return self.executor.submit(compute_step, self.recipe, self._arrays(), part)

    def submit(self, function, part):
        """A Future of `function(model, part)`."""
        return self.executor.submit(compute, self.recipe, self._arrays(), function, part)

    def _arrays(self):
        return [leaf.data for leaf in self.leaves]


def check_workers(n, parts):
    """Raise ValueError unless 1 <= n <= parts."""
    if not 1 <= n <= parts:
        raise ValueError(
            f"{n} workers for {parts} parts: give as many parts, which changes how numbers are "
            f"rounded, or at most {parts} workers"
        )


def identity_of(model):
    """What decides the bits of a part, beside its numbers: pairs of names and values."""
    base = hashlib.sha256(repr(getattr(model, "config", None)).encode())
    for name, p in model.named_parameters():
        # Those of trained arrays come with each task.
        values = "trained" if p.requires_grad else digest_of(p)
        base.update(f"{name} {p.shape} {p.dtype} {values}\n".encode())
    return (
        ("minilora", __version__),
        ("NumPy", np.__version__),
        ("BLAS", blas_kernel()),
        ("the fingerprint of the base", base.hexdigest()[:16]),
    )


# What workers do. Executors find these by their names.


def compute_step(recipe, arrays, part):
    """`part_gradients` of the part, for the model of the recipe with these trained arrays."""
    with blas_threads(1):
        return part_gradients(_replica(recipe, arrays), part)


def compute(recipe, arrays, function, part):
    """`function(model, part)`, without a graph, for the model with these trained arrays."""
    with blas_threads(1), no_grad():
        return function(_replica(recipe, arrays).model, part)


def check(recipe):
    """Make the model of the recipe, unless it is there, and compare it with what it must be."""
    _model_of(recipe)


def _replica(recipe, arrays):
    # A new one for each task, so that tasks may meet in one process.
    replica = Replica(_model_of(recipe))
    replica.put(arrays)
    return replica


@lru_cache(maxsize=1)
def _model_of(recipe):
    """The model of the last recipe, which a worker keeps: to load it takes longer than a part."""
    where = f"a worker on {platform.node()} (process {os.getpid()})"
    try:
        model = recipe.make()
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"{where} cannot make the model: {error}") from error
    found = dict(identity_of(model))
    for what, expected in recipe.identity:
        if found[what] != expected:
            raise ValueError(
                f"{where} would compute other bits: {what} is {found[what]} there and {expected} "
                "here; give it the same, or do without it"
            )
    return model


# Executors.


def process_pool(n):
    """An executor of `n` new processes of this machine, which end with this one.

    Ctrl-C is for this process alone: it lets them finish their parts.
    """
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(n, mp_context=context, initializer=_begin_worker)


def mpi_pool():
    """The executor of mpi4py over the processes that mpiexec has started beside this one.

    Raises: ImportError with the command that installs mpi4py; ValueError with the command that
    starts a program with such workers, if this one was started otherwise.
    """
    try:
        from mpi4py import MPI
        from mpi4py.futures import MPIPoolExecutor
    except ImportError as error:
        raise ImportError(
            f"workers over MPI need mpi4py and an MPI ({error}): pip install -e '.[mpi]'"
        ) from error
    is_started = any(word.endswith("mpi4py.futures") for word in sys.orig_argv)
    if not is_started or MPI.COMM_WORLD.Get_size() < 2:
        raise ValueError(
            "there are no workers of MPI beside this process: for two of them, start it with "
            "mpiexec -n 3 python -m mpi4py.futures -m minilora ..."
        )
    return MPIPoolExecutor(initializer=_begin_worker)


def _begin_worker():
    """Set up a process that does nothing but compute parts."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keep_freed_memory()
    if multiprocessing.parent_process() is not None:
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    """If the parent is killed, it cannot tell its workers to end."""
    multiprocessing.parent_process().join()
    os._exit(1)
