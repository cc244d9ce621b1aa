"""One training step by several workers: what processes cost beside threads, and where they pay.

You learn that a step is a sum over parts, which anybody may compute: threads, processes and
machines give the same bits. What differs is time, memory and the bytes on the way. All three are
measured here for one and two workers; for 8, 64 and 512 machines they are told by a cost model,
which is first held against what was measured.

    python examples/workers.py [--quick] [--seed 0]

Takes about five minutes on two cores, with SmolLM2 if that is installed.
"""

# Before the imports that take time: Ctrl-C ends this in one line.
from minilora.cli.ctrl_c import one_line_on_ctrl_c

one_line_on_ctrl_c()

import argparse
import contextlib
import json
import multiprocessing
import operator
import os
import pickle
import platform
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np

from minilora import GPT, Adam, GPTConfig, LoRAConfig, __version__, attach, save_model
from minilora.architectures import PRESETS, blank, blank_adapter
from minilora.count import n_parameters
from minilora.disk.bases import find_base
from minilora.packed import StoredTensor
from minilora.step_cost import step_flops
from minilora.training.finetune import model_of
from minilora.training.finetune_config import FineTuneConfig
from minilora.training.loop import train
from minilora.training.parts import PartWorkers, cut
from minilora.training.threads import blas_kernel, cores, keep_freed_memory
from minilora.training.workers import RemoteWorkers, compute, process_pool

# Each batch is cut into two parts, whoever computes them.
PARTS = 2
# (name, threads or processes, how many), in turns.
WHO = [("1 thread", 1), ("2 threads", 2), ("1 process", 1), ("2 processes", 2)]
# What is assumed of a network between machines, not measured: 1 Gbit/s and a fifth of a
# millisecond from one machine to another.
BYTES_PER_SECOND = 125e6
LATENCY = 2e-4
MACHINES = (8, 64, 512)


class Size(NamedTuple):
    """A base, and the rows and tokens of a batch."""

    base: str
    batch: int
    length: int
    steps: int


def save_bases(folder, quick, seed):
    """{name: Size} of what is measured; small bases with random weights are written to `folder`."""
    rng = np.random.default_rng(seed)
    shapes = {"tiny": GPTConfig(4, 4, 128, 512, 64)}
    if not quick:
        shapes["mid"] = GPTConfig(6, 6, 384, 4096, 128)
    sizes = {}
    for name, config in shapes.items():
        save_model(GPT(config, rng), folder / name)
        steps = 2 if quick else 10
        sizes[name] = Size(str(folder / name), 8, config.block_size, steps)
    if not quick:
        with contextlib.suppress(OSError, ValueError, ImportError):
            sizes["SmolLM2"] = Size(str(find_base("smollm2")), 4, 128, 2)
    return sizes


def process_numbers(pid):
    """(CPU seconds so far, bytes resident, its share of bytes); None but on Linux."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return None
    ticks = int(fields[11]) + int(fields[12])
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in rollup.splitlines()[1:]}
    return ticks / os.sysconf("SC_CLK_TCK"), 1024 * kilobytes["Rss"], 1024 * kilobytes["Pss"]


def all_numbers():
    """The sums of `process_numbers` over this process and its workers, or None."""
    pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    found = [process_numbers(pid) for pid in pids]
    return None if None in found else np.array(found).sum(axis=0)


class Contest:
    """Some rounds of steps by one of WHO: {what: [a number for each round]}, and the losses."""

    def __init__(self, size, seed):
        self.size = size
        self.seed = seed
        self.config = FineTuneConfig(base=size.base, data="none", out="none", alpha=16.0)
        self.numbers = {}

    def run(self, name, n, n_rounds):
        """Measure; returns the losses of the last round."""
        # As the program does, and its workers do.
        keep_freed_memory()
        with contextlib.ExitStack() as stack:
            model = model_of(self.config)
            if "thread" in name:
                workers = PartWorkers(model, PARTS, n)
            else:
                pool = stack.enter_context(process_pool(n))
                workers = RemoteWorkers(model, partial(model_of, self.config), pool, n, PARTS)
            stack.enter_context(workers)
            adam = Adam([p for p in model.parameters() if p.requires_grad])
            # What is made in a first step is there in the next ones.
            self._steps(model, adam, workers, 1)
            for _ in range(n_rounds):
                before = all_numbers()
                began = time.perf_counter()
                losses = self._steps(model, adam, workers, self.size.steps)
                seconds = (time.perf_counter() - began) / self.size.steps
                after = all_numbers()
                self._note("seconds", seconds)
                if before is not None:
                    self._note("cpu", (after[0] - before[0]) / self.size.steps)
                    self._note("rss", after[1])
                    self._note("pss", after[2])
            if "process" in name:
                self._note_tasks(workers)
        return losses

    def _steps(self, model, adam, workers, n):
        return train(model, adam, self._batches(model), n, quiet=True, workers=workers, seed=0)

    def _batches(self, model):
        rng = np.random.default_rng(self.seed)
        while True:
            shape = (self.size.batch, self.size.length + 1)
            rows = rng.integers(0, model.config.vocab_size, shape)
            yield rows[:, :-1], rows[:, 1:]

    def _note_tasks(self, workers):
        """The bytes of a step on the way, and the seconds of a task that computes nothing."""
        arrays = [leaf.data for leaf in workers.leaves]
        ids = np.zeros((self.size.batch, self.size.length), int)
        part = cut([(ids, ids)], PARTS, seed=0)[0]
        sent = len(pickle.dumps((workers.recipe, arrays, part)))
        returned = len(pickle.dumps((0.0, arrays)))
        self._note("bytes", PARTS * (sent + returned))
        self._note("arrays", sum(array.nbytes for array in arrays))
        for _ in range(20):
            began = time.perf_counter()
            task = (workers.recipe, arrays, operator.is_, part)
            workers.executor.submit(compute, *task).result()
            self._note("task", time.perf_counter() - began)

    def _note(self, what, value):
        self.numbers.setdefault(what, []).append(float(value))


def measured_alone(size, seed, name, n, n_rounds):
    """({what: median over the rounds}, losses) of one of WHO, in this process."""
    contest = Contest(size, seed)
    losses = contest.run(name, n, n_rounds)
    return {what: median(values) for what, values in contest.numbers.items()}, losses


def measured(size, seed, n_rounds):
    """{name: {what: median}} for each of WHO, each in a process that begins anew."""
    found = {}
    all_losses = []
    for name, n in WHO:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as alone:
            task = (measured_alone, size, seed, name, n, n_rounds)
            found[name], losses = alone.submit(*task).result()
        all_losses.append(losses)
    if all_losses.count(losses) != len(WHO):
        raise SystemExit(f"workers.py: who computes a part has changed the losses of {size.base}")
    return found


# The cost model. A step of P parts on W workers takes P / W times the seconds of a part, and for
# each part the seconds of a task that computes nothing: this process packs and unpacks one after
# the other. Over a network the arrays cross the one line of this machine twice for each part.


def predicted(found, n):
    """Seconds of a step by `n` processes, from a step on one thread and an empty task."""
    return found["1 thread"]["seconds"] / n + PARTS * found[name_of(n)]["task"]


def name_of(n):
    """What `n` processes are called in WHO."""
    return next(name for name, m in WHO if "process" in name and m == n)


def line_through(points):
    """(seconds of a task of no bytes, seconds for each byte) through two (bytes, seconds)."""
    (n_low, low), (n_high, high) = points
    slope = max(0.0, (high - low) / max(1, n_high - n_low))
    return low - slope * n_low, slope


class Paper(NamedTuple):
    """A model on many machines: bytes of trained arrays, seconds of a part and of a task."""

    array_bytes: int
    part: float
    task: float

    def for_each(self):
        """Seconds of the one machine that adds, for each part: a task, and its line twice."""
        return self.task + 2 * self.array_bytes / BYTES_PER_SECOND

    def step(self, machines):
        """Seconds of a step of as many parts as machines."""
        return self.part + 2 * LATENCY + machines * self.for_each()

    def pays_up_to(self):
        """With so many machines they compute in half of a step, and wait in the other."""
        return self.part / self.for_each()


def papers(found, sizes, batch, length):
    """{name: Paper} of SmolLM2's shape and of an 8B model's, in parts of (batch, length)."""
    first = next(iter(found))
    last = next(reversed(found))
    tasks = [found[name]["1 process"] for name in (first, last)]
    points = [(task["arrays"], task["task"]) for task in tasks]
    of_none, of_byte = line_through(points)
    size = sizes[last]
    model = model_of(FineTuneConfig(base=size.base, data="none", out="none", alpha=16.0))
    flops = step_flops(model, size.batch, size.length)
    rate = flops / found[last]["1 thread"]["seconds"]
    made = {}
    for name in ("smollm2-135m", "llama-3.1-8b"):
        base = blank(PRESETS[name]).map_tensors(lambda t: StoredTensor(t.data))
        adapter = blank_adapter(base, LoRAConfig(8, 16, "all-linear"))
        n_bytes = 4 * n_parameters(adapter)
        part = step_flops(attach(base, adapter, check_base=False), batch, length) / rate
        made[name] = Paper(n_bytes, part, of_none + of_byte * n_bytes)
    return rate, made


# What is printed.


def megabytes(n):
    return "-" if n is None else f"{n / 1e6:,.0f}"


def print_measured(found):
    """A line for each size and each of WHO."""
    print(f"{'base':<9} {'who':<12} {'ms a step':>10} {'CPU ms':>8} {'RSS MB':>8} {'PSS MB':>8}")
    for size, rows in found.items():
        for name, row in rows.items():
            cpu = f"{1e3 * row['cpu']:,.0f}" if "cpu" in row else "-"
            memory = f"{megabytes(row.get('rss')):>8} {megabytes(row.get('pss')):>8}"
            print(f"{size:<9} {name:<12} {1e3 * row['seconds']:>10,.0f} {cpu:>8} {memory}")


def print_model(found):
    """What the cost model says of one and two processes, beside what was measured."""
    print(
        f"\n{'base':<9} {'kB a step':>10} {'ms a task':>10} {'1: told/was':>12} {'2: told/was':>12}"
    )
    for size, rows in found.items():
        told = [predicted(rows, n) / rows[name_of(n)]["seconds"] for n in (1, 2)]
        row = rows["2 processes"]
        ratios = f"{told[0]:>12.2f} {told[1]:>12.2f}"
        print(f"{size:<9} {row['bytes'] / 1e3:>10,.0f} {1e3 * row['task']:>10.2f} {ratios}")


def print_papers(made):
    """On 8, 64 and 512 machines: how many times as fast as one, and up to where it pays."""
    machines = " ".join(f"{f'x on {n}':>9}" for n in MACHINES)
    print(f"\n{'on paper':<14} {'MB of arrays':>12} {'s a part':>9} {machines} {'pays up to':>10}")
    for name, paper in made.items():
        gains = [n * paper.part / paper.step(n) for n in MACHINES]
        cells = " ".join(f"{gain:>9.1f}" for gain in gains)
        line = f"{name:<14} {paper.array_bytes / 1e6:>12,.1f} {paper.part:>9,.1f} {cells}"
        print(f"{line} {paper.pays_up_to():>10,.0f}")


def main():
    """Measure, print, and keep what was measured if told where."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the smallest base, few steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write the results there as well")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sizes = save_bases(Path(folder), args.quick, args.seed)
        n_rounds = 2 if args.quick else 3
        found = {name: measured(size, args.seed, n_rounds) for name, size in sizes.items()}
        rate, made = papers(found, sizes, batch=4, length=512)
    print_measured(found)
    print_model(found)
    print_papers(made)
    if args.json is not None:
        results = {
            "machine": {
                "cores": cores(),
                "python": platform.python_version(),
                "numpy": np.__version__,
                "minilora": __version__,
                "blas": blas_kernel(),
            },
            "sizes": {name: size._replace(base=name)._asdict() for name, size in sizes.items()},
            "measured": found,
            "flops_per_second": rate,
            "on_paper": {name: paper._asdict() for name, paper in made.items()},
        }
        Path(args.json).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
