"""minilora, which trains a batch in as many parts as there are threads. Knows the benchmark's tasks and folder."""

import contextlib
import time

import numpy as np

from minilora import Adam, attach, generate, load_adapter, load_gpt2, merge, no_grad, stack
from minilora.training.parts import PartWorkers
from minilora.training.threads import blas_threads, keep_freed_memory

from .workloads import LR, NEW, adapter_of, trains

IN_PARTS = True  # a batch is cut into as many parts as there are threads
SHAPES = ((512, 768, 3072), (2048, 384, 1152), (2048, 2048, 2048))  # M, K, N


def prepare(task, variant, unit):
    """A function that does one unit of `task`.

    `variant` is "", or how many adapters the rows of a batch share out, 0 for one that is attached as usual: all of
    these in one part, because a stack has as many rows as its batch.
    """
    if task == "gemm":
        return gemm()
    keep_freed_memory()
    base = load_gpt2(unit.folder / "base")
    load = lambda: load_adapter(unit.folder / adapter_of(task), base, say=lambda line: None)
    if task == "full":
        model = base = base.trainable_copy()
        trained = model.parameters()
    elif variant not in ("", "0"):
        adapters = [load() for _ in range(int(variant))]  # the same numbers, but nothing shared
        model = attach(base, stack([adapters[i % len(adapters)] for i in range(len(unit.inputs))]))
        trained = [p for adapter in adapters for p in adapter.parameters()]
    else:
        adapter = load()
        model, trained = attach(base, adapter), adapter.parameters()
    if task == "generate":
        return lambda: generate(merge(model), unit.prompt, NEW)[0].tolist()
    if not trains(task):
        return lambda: forward(model, unit)
    parts = 1 if variant or not IN_PARTS else min(unit.threads, len(unit.inputs))
    return training(model, Adam(trained, lr=LR), unit, parts)


def forward(model, unit):
    """The loss, without a graph."""
    with no_grad():
        return model.loss(unit.inputs, unit.targets).item()


def training(model, adam, unit, parts):
    """A function that does one step on the whole batch, in so many parts."""
    open_until_exit = contextlib.ExitStack()
    if parts > 1:
        open_until_exit.enter_context(blas_threads(max(1, unit.threads // parts)))
    workers = open_until_exit.enter_context(PartWorkers(model, parts, parts))

    def step():
        loss = workers.backward(unit.inputs, unit.targets)
        adam.step()
        adam.zero_grad()
        return loss

    step.held = open_until_exit  # or BLAS's threads would be set back as soon as this returns
    return step


def gemm():
    """Not a task of anyone's: float32 products on all threads, as NumPy's BLAS does them; FLOP/s for each of SHAPES."""
    rng = np.random.default_rng(0)
    pairs = [(rng.random((M, K), np.float32), rng.random((K, N), np.float32)) for M, K, N in SHAPES]

    def run():
        rates = []
        for A, B in pairs:
            repeats = max(1, round(4e9 / (2 * A.size * B.shape[1])))  # some tens of milliseconds for each shape
            start = time.perf_counter()
            for _ in range(repeats):
                A @ B
            rates.append(repeats * 2 * A.size * B.shape[1] / (time.perf_counter() - start))
        return rates

    return run
