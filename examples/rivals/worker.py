"""One library in one process: told on stdin how many units to do, it answers on stdout with a line of JSON.

    python -m rivals.worker MODULE VARIANT TASK FOLDER THREADS
"""

import importlib
import json
import os
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np

from minilora.training.threads import keep_freed_memory

from .workloads import PROMPT

Unit = namedtuple("Unit", "folder inputs targets prompt threads")  # what `prepare` of every library is given


def memory():
    """(bytes resident now, most bytes ever resident) of this process."""
    try:  # not getrusage: a new process inherits its parent's peak there
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        status = dict(line.split(":", 1) for line in lines)
        return tuple(1024 * int(status[key].split()[0]) for key in ("VmRSS", "VmHWM"))
    except (OSError, KeyError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return peak, peak


def main():
    """Import, prepare, then one line out for each line in, until there are no more."""
    module, variant, task, folder, threads = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints must not come between the answers

    def say(**answer):
        print(json.dumps(answer), file=answers, flush=True)

    rival = importlib.import_module(f"rivals.{module}")
    start, _ = memory()
    if variant == "malloc":
        keep_freed_memory()
        variant = ""
    folder = Path(folder)
    ids = np.load(folder / "ids.npy")
    inputs, targets = (np.ascontiguousarray(part) for part in (ids[:, :-1], ids[:, 1:]))
    run = rival.prepare(task, variant, Unit(folder, inputs, targets, ids.reshape(1, -1)[:, :PROMPT], int(threads)))
    say(start=start)
    for line in sys.stdin:
        settling, units = map(int, line.split())
        cpu = time.process_time()
        for _ in range(settling):  # after a pause threads, caches and clocks are cold: the first unit can take thrice
            run()
        start = time.perf_counter()
        results = [run() for _ in range(units)]
        seconds = time.perf_counter() - start
        say(units=units, seconds=seconds, cpu=time.process_time() - cpu, results=results, peak=memory()[1])


if __name__ == "__main__":
    main()
