"""Processes called in turn, their answers compared, and the load of others noticed. Knows no library and no task."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

PAUSE = 0.05  # between two calls, seconds: threads that spin for more work are asleep after it
SETTLE, LONG = 0.1, 0.5  # seconds of units before those that are timed; a unit that takes so long needs none
WARM_UP = 2  # calls of one unit that are not counted; their results are compared
GEMM = "gemm"


class Contestant(NamedTuple):
    """One process: the name in the table, a module of this folder, a variant of it, and a task.

    Its first `steps` losses must be those of the first contestant, up to `tolerance`.
    """

    label: str
    module: str
    variant: str
    task: str
    tolerance: float = 1e-4
    steps: int = WARM_UP


class Disagreement(Exception):
    """Two libraries were given the same numbers and computed different ones: there is nothing to time."""


class Died(Exception):
    """A worker ended before it was told to: the message is the last line it said."""


class Worker:
    """A contestant's process. It is started at once; `answer` waits."""

    def __init__(self, contestant, folder, threads):
        self.said = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        path = [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
        settings = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rivals.worker", *contestant[1:4], str(folder), str(threads)],
            env={**os.environ, **settings, "PYTHONPATH": os.pathsep.join(filter(None, path))},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said, encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for the parent, which then stops its workers
        )  # fmt: skip

    def answer(self):
        """The next line, as a dict. Raises: Died."""
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.said.seek(0)
            lines = [line for line in self.said.read().splitlines() if line.strip()]
            raise Died(lines[-1].strip() if lines else f"ended with status {self.process.returncode}")
        return json.loads(line)

    def call(self, settling, units):
        """Do so many units untimed, then so many that are timed.

        Returns the answer, with `wall`, the seconds seen from here, and `foreign`, CPU seconds of other processes.
        """
        before, start = busy_seconds(), time.perf_counter()
        with contextlib.suppress(BrokenPipeError):  # `answer` says why
            print(settling, units, file=self.process.stdin, flush=True)
        answer = self.answer()
        after = busy_seconds()
        foreign = None if after is None else max(0.0, after - before - answer["cpu"])
        return {**answer, "wall": time.perf_counter() - start, "foreign": foreign}

    def stop(self):
        """End the process, whatever it is doing, and those it started: compilers have helpers."""
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # its session has no other group
        self.process.kill()
        self.process.communicate()
        self.said.close()


def busy_seconds(stat="/proc/stat"):
    """CPU seconds that all processes of the machine have used, and that its host withheld; None if unknown."""
    try:
        with open(stat, encoding="utf-8") as lines:
            user, nice, system, _idle, _wait, irq, softirq, steal = map(int, lines.readline().split()[1:9])
        return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return None


def foreign_share(answers, cores):
    """The part of the machine that others used during these calls, 0 .. 1; None if it is unknown."""
    if any(answer["foreign"] is None for answer in answers):
        return None
    return sum(answer["foreign"] for answer in answers) / (cores * sum(answer["wall"] for answer in answers))


def compare(contestants, results):
    """{label: the same tokens as the first contestant?} for lists of tokens; losses are compared, and must agree.

    `results` maps labels to the results of the warm-up: after its first unit a training step has changed the weights,
    so that the second loss tells of gradients and of the optimizer too.
    Raises: Disagreement that names both.
    """
    asked = [c for c in contestants if c.label in results and c.label != GEMM]
    same, first = {}, asked[0] if asked else None
    for c in asked[1:]:
        for step, (ours, theirs) in enumerate(zip(results[first.label], results[c.label], strict=True), start=1):
            if isinstance(ours, list):
                same[c.label] = ours == theirs
            elif step <= c.steps and not math.isclose(ours, theirs, rel_tol=c.tolerance):
                raise Disagreement(f"{c.task}: loss {step} of {first.label} is {ours:.7g}, of {c.label} {theirs:.7g}: "
                                   "they compute different things, so their times cannot be compared")
    return same


def contest(contestants, folder, threads, rounds, seconds):
    """Call each contestant in turn, in an order that rotates, in calls of `seconds` or one unit for the fastest.

    Returns a dict: `rounds`, one {label: seconds per unit} each, `foreign`, one share each, `rates` (FLOP/s of
    the GEMM shapes, each round, or None), `units` per call, and by label `memory` (start, peak), `same_tokens` and
    `failed`.
    Raises: Disagreement.
    """
    workers, failed, answers, warm, memory = {}, {}, [], {}, {}

    def each(order, act):
        """{label: act(its worker)}; who dies is out."""
        done = {}
        for label in order:
            if label not in failed:
                try:
                    done[label] = act(label, workers[label])
                except Died as error:
                    failed[label] = str(error)
        return done

    def call(label, worker, settling=0, units=1):
        time.sleep(PAUSE)
        return worker.call(min(settling, 1), 1) if label == GEMM else worker.call(settling, units)

    labels = [c.label for c in contestants]
    try:
        for c in contestants:  # all at once: importing is slow, and not timed
            workers[c.label] = Worker(c, folder, threads)
        memory = {label: {"start": a["start"]} for label, a in each(labels, lambda _, w: w.answer()).items()}
        for _ in range(WARM_UP):
            for label, answer in each(labels, call).items():
                warm.setdefault(label, []).append(answer)
        alive = {label: calls for label, calls in warm.items() if label not in failed}
        same = compare(contestants, {label: [a["results"][0] for a in calls] for label, calls in alive.items()})
        fastest = min((calls[-1]["seconds"] for label, calls in alive.items() if label != GEMM), default=seconds)
        units, settling = max(1, round(seconds / fastest)), max(1, round(SETTLE / fastest)) * (fastest < LONG)
        for k in range(rounds):
            turn = k % len(labels)
            answers.append(each(labels[turn:] + labels[:turn], lambda label, w: call(label, w, settling, units)))
    finally:
        for worker in workers.values():
            worker.stop()
    for label in set(labels) - failed.keys():
        memory[label]["peak"] = answers[-1][label]["peak"]
    return {
        "units": units,
        "rounds": [{n: a["seconds"] / a["units"] for n, a in r.items() if n not in failed} for r in answers],
        "foreign": [foreign_share(r.values(), os.cpu_count()) if r else None for r in answers],
        "rates": [r[GEMM]["results"][0] if GEMM in r else None for r in answers],
        "memory": memory, "same_tokens": same, "failed": failed,
    }  # fmt: skip
