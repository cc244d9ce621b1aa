"""The tasks of the benchmark in minilora, as its commands compute them."""

import contextlib
import time

import numpy as np

from minilora import Adam, attach, generate, load_adapter, load_model, merge, stack
from minilora.training.loop import heldout_loss
from minilora.training.parts import PartWorkers
from minilora.training.threads import blas_threads, keep_freed_memory, parts_and_threads

from .on_gpu import array_module_for, peak_memory, wait_for
from .rounds import GEMM
from .workloads import LR, adapter_of, trains

__all__ = ["forward", "matrix_products", "peak_memory", "prepare", "training", "written"]

# M, K, N of the products that are timed alone.
GEMM_SHAPES = ((512, 768, 3072), (2048, 384, 1152), (2048, 2048, 2048))


def prepare(task, variant, job):
    """A function that does one unit of `task`, or one round of matrix products.

    `variant` is "", or how many adapters the rows of a batch share out, 0 for one that is attached
    as usual. All of those compute a batch in one part, because a stack has a row for each of its
    rows. "tf32" rounds the factors of a GPU's products to TF32; "merged" merges before it writes,
    not each time.
    """
    if task == GEMM:
        return matrix_products()
    keep_freed_memory()
    xp = array_module_for(job.device, variant)
    base = load_model(job.folder / "base", xp)
    if task == "full":
        base = base.trainable_copy()
        model = base
        trained = model.parameters()
    elif not variant.isdigit() or variant == "0":
        adapter = _load_adapter(job, task, base)
        model = attach(base, adapter)
        trained = adapter.parameters()
    else:
        # Equal numbers, but no array is shared.
        adapters = [_load_adapter(job, task, base) for _ in range(int(variant))]
        of_rows = [adapters[i % len(adapters)] for i in range(len(job.inputs))]
        model = attach(base, stack(of_rows))
        trained = [p for adapter in adapters for p in adapter.parameters()]

    if task == "generate":
        if variant == "merged":
            merged = merge(model)
            return lambda: written(merged, job)
        return lambda: written(merge(model), job)
    # As many as the commands take, but no part without a row.
    rows = len(job.inputs)
    parts, threads = parts_and_threads(None, min(job.threads, rows), xp.__name__)
    parts = min(parts, rows)
    if variant.isdigit():
        parts = 1
        threads = 1
    if not trains(task):
        return forward(model, job, parts, threads)
    return training(model, Adam(trained, lr=LR, threads=threads), job, parts, threads)


def _load_adapter(job, task, base):
    return load_adapter(job.folder / adapter_of(task), base, say=lambda receipt: None)


def written(model, job):
    """The ids that `model` writes after the prompt, with one thread of BLAS, as the commands do."""
    with blas_threads(1):
        return generate(model, job.prompt, job.new)[0].tolist()


def forward(model, job, parts, threads):
    """A function that gives the loss without a graph, in `parts` which `threads` compute."""
    resources = contextlib.ExitStack()
    workers = resources.enter_context(PartWorkers(model, parts, threads))

    def measure():
        return heldout_loss(model, [(job.inputs, job.targets)], workers=workers)

    # As below.
    measure.resources = resources
    return measure


def training(model, adam, job, parts, threads):
    """A function that does one step, in `parts` which `threads` compute."""
    resources = contextlib.ExitStack()
    workers = resources.enter_context(PartWorkers(model, parts, threads))

    def step():
        loss = workers.backward([(job.inputs, job.targets)])
        adam.step()
        adam.zero_grad()
        wait_for(job.device)
        return loss

    # The stack lives as long as the step, or BLAS's threads would be set back right here.
    step.resources = resources
    return step


def matrix_products():
    """A function that times float32 products on all threads: FLOP/s for each of GEMM_SHAPES."""
    rng = np.random.default_rng(0)
    pairs = []
    for M, K, N in GEMM_SHAPES:
        pairs.append((rng.random((M, K), np.float32), rng.random((K, N), np.float32)))

    def run():
        rates = []
        for A, B in pairs:
            flops = 2 * A.size * B.shape[1]
            # Some tens of milliseconds for each shape.
            repeats = max(1, round(4e9 / flops))
            began = time.perf_counter()
            for _ in range(repeats):
                A @ B
            rates.append(repeats * flops / (time.perf_counter() - began))
        return rates

    return run
