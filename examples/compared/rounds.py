"""Programs measured in turn, round after round, and their results compared. Knows no library."""

import math
import os
import threading
import time
from typing import NamedTuple

from .processes import Worker, WorkerEnded, foreign_share

# The label of the program that times matrix products alone: the floor under all others.
GEMM = "gemm"
# Seconds between two calls: threads that spin while they wait for work are asleep after them.
PAUSE = 0.05
# Seconds of untimed units at the start of each call. Where one unit takes LONG, none are needed.
SETTLE = 0.1
LONG = 0.5
# The calls of one unit that come before the rounds; they are not timed, and compared.
WARM_UP = 2


class Program(NamedTuple):
    """What runs in one process: a module of this folder, a variant of it, and a task.

    `label` is its name in the table. Its first `steps` losses must be those of the first program,
    up to the relative `tolerance`. `device` is "cpu" or "cuda".
    """

    label: str
    module: str
    variant: str
    task: str
    tolerance: float = 1e-4
    steps: int = WARM_UP
    device: str = "cpu"


class DifferentResults(Exception):
    """Two programs computed different losses from the same numbers: there is nothing to time."""


class Workers:
    """A worker for each of several programs. Who has ended is left out; `failed` says why."""

    def __init__(self):
        self.running = {}
        self.failed = {}

    def start(self, programs, folder, threads):
        """Start them all at once: imports are slow, and not timed."""
        for program in programs:
            self.running[program.label] = Worker(program, folder, threads)

    def ask(self, labels, question):
        """{label: question(label, its worker)}, one after the other, without those that ended."""
        answers = {}
        for label in labels:
            if label in self.failed:
                continue
            try:
                answers[label] = question(label, self.running[label])
            except WorkerEnded as error:
                self.failed[label] = str(error)
        return answers

    def call(self, labels, settling, units):
        """{label: answer} of one call each."""

        def one_call(label, worker):
            time.sleep(PAUSE)
            if label == GEMM:
                # One unit of it repeats each product as often as it takes.
                return worker.call(min(settling, 1), 1)
            return worker.call(settling, units)

        return self.ask(labels, one_call)

    def end(self):
        """End all of them because their time is over, from another thread."""
        for worker in self.running.values():
            worker.end()

    def stop(self):
        """End all of them."""
        for worker in self.running.values():
            worker.stop()


def measure_in_turns(programs, folder, threads, rounds, seconds, deadline=math.inf):
    """Call each program in turn, in an order that rotates from round to round.

    A call takes the fastest of them `seconds`, or one unit if that takes longer. There are fewer
    rounds if another one would end after `deadline`, of `time.monotonic`, when all are ended
    whatever they are doing. Returns a dict:
    `rounds`, one {label: seconds per unit} each; `foreign`, one share each; `rates`, the FLOP/s of
    the GEMM shapes, each round, or None; `units` per call; and by label `memory` (start, peak, and
    on a GPU `device`: allocated, reserved), `losses` (of the first units), `same_tokens` and
    `failed`.
    Raises: DifferentResults.
    """
    labels = [program.label for program in programs]
    on_device = [program.label for program in programs if program.device != "cpu"]
    workers = Workers()
    timer = threading.Timer(min(deadline - time.monotonic(), threading.TIMEOUT_MAX), workers.end)
    timer.daemon = True
    try:
        workers.start(programs, folder, threads)
        timer.start()
        memory = workers.ask(labels, lambda label, worker: worker.answer())
        warm_up = [workers.call(labels, settling=0, units=1) for _ in range(WARM_UP)]
        first_results = _first_results(warm_up, workers.failed)
        same_tokens = compare(programs, first_results)
        settling, units = units_per_call(warm_up[-1], seconds)
        memory_on_device = workers.ask(on_device, lambda label, worker: worker.peak_memory())
        answers = []
        for k in range(rounds):
            began = time.monotonic()
            first = k % len(labels)
            answers.append(workers.call(labels[first:] + labels[:first], settling, units))
            now = time.monotonic()
            if now + (now - began) > deadline:
                break
    finally:
        timer.cancel()
        workers.stop()
    for label in memory.keys() - workers.failed.keys():
        memory[label]["peak"] = answers[-1][label]["peak"]
        if label in memory_on_device:
            memory[label]["device"] = memory_on_device[label]
    times = []
    for answer_of in answers:
        lived = answer_of.keys() - workers.failed.keys()
        times.append({n: a["seconds"] / a["units"] for n, a in answer_of.items() if n in lived})
    return {
        "units": units,
        "rounds": times,
        "foreign": [foreign_share(a.values(), os.cpu_count()) if a else None for a in answers],
        "rates": [a[GEMM]["results"][0] if GEMM in a else None for a in answers],
        "memory": memory,
        "losses": _losses(first_results),
        "same_tokens": same_tokens,
        "failed": workers.failed,
    }


def _first_results(warm_up, failed):
    """{label: the result of each call}, without those that ended meanwhile."""
    labels = warm_up[-1].keys() - failed.keys()
    return {label: [call[label]["results"][0] for call in warm_up] for label in labels}


def _losses(results):
    """{label: its results}, of programs that compute losses."""
    return {label: found for label, found in results.items() if isinstance(found[0], float)}


def units_per_call(answers, seconds):
    """(untimed units, timed units) of a call, by what the fastest program took for one unit."""
    times = [answer["seconds"] for label, answer in answers.items() if label != GEMM]
    fastest = min(times, default=seconds)
    settling = 0 if fastest >= LONG else max(1, round(SETTLE / fastest))
    return settling, max(1, round(seconds / fastest))


def compare(programs, results):
    """Losses must agree with those of the first program; tokens may differ, which is returned.

    `results` maps labels to the results of the warm-up, losses or lists of tokens. After its first
    unit a training step has changed the weights, so that the second loss depends on gradients and
    on the optimizer too. Returns {label: the same tokens?}, of programs that write tokens.
    Raises: DifferentResults, with both losses.
    """
    programs = [p for p in programs if p.label in results and p.label != GEMM]
    same_tokens = {}
    for other in programs[1:]:
        first = programs[0]
        pairs = zip(results[first.label], results[other.label], strict=True)
        for step, (expected, actual) in enumerate(pairs, start=1):
            if isinstance(expected, list):
                same_tokens[other.label] = expected == actual
            elif step <= other.steps and not math.isclose(
                expected, actual, rel_tol=other.tolerance
            ):
                raise DifferentResults(
                    f"{other.task}: loss {step} of {first.label} is {expected:.7g}, "
                    f"of {other.label} {actual:.7g}: they compute different things, "
                    "so their times cannot be compared"
                )
    return same_tokens
