"""One library in one process: reads from stdin how many units to do, and answers in JSON.

    python -m compared.worker MODULE VARIANT TASK FOLDER THREADS DEVICE
"""

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minilora.training.threads import keep_freed_memory

from .processes import MEMORY
from .workloads import PROMPT


class Job(NamedTuple):
    """What `prepare` of every library is given.

    folder: as `write_inputs` leaves it. inputs and targets: (B, T) integers. prompt: (1, PROMPT).
    new: how many tokens are written. device: "cpu" or "cuda".
    """

    folder: Path
    inputs: np.ndarray
    targets: np.ndarray
    prompt: np.ndarray
    new: int
    threads: int
    device: str


def read_job(folder, threads, device="cpu"):
    """The Job that `write_inputs` has written into `folder`."""
    ids = np.load(folder / "ids.npy")
    inputs = np.ascontiguousarray(ids[:, :-1])
    targets = np.ascontiguousarray(ids[:, 1:])
    prompt = ids.reshape(1, -1)[:, :PROMPT]
    new = int(np.load(folder / "new.npy"))
    return Job(folder, inputs, targets, prompt, new, threads, device)


def memory():
    """(bytes resident now, most bytes ever resident) of this process."""
    # Not getrusage where there is a choice: there a new process inherits its parent's peak.
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        status = dict(line.split(":", 1) for line in lines)
        return tuple(1024 * int(status[key].split()[0]) for key in ("VmRSS", "VmHWM"))
    except (OSError, KeyError):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak, peak


def main():
    """Import, prepare, then write one line for each line that is read, until there are no more."""
    module, variant, task, folder, threads, device = sys.argv[1:]
    # Whatever a library prints must not come between the answers: it goes to stderr.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def reply(**answer):
        print(json.dumps(answer), file=answers, flush=True)

    library = importlib.import_module(f"compared.{module}")
    start, _ = memory()
    if variant == "malloc":
        keep_freed_memory()
        variant = ""
    run = library.prepare(task, variant, read_job(Path(folder), int(threads), device))
    reply(start=start)

    for line in sys.stdin:
        if line.strip() == MEMORY:
            reply(**library.peak_memory(run))
            continue
        settling, units = map(int, line.split())
        cpu = time.process_time()
        # After a pause threads, caches and clocks are cold: the first unit can take thrice as long.
        for _ in range(settling):
            run()
        began = time.perf_counter()
        results = [run() for _ in range(units)]
        seconds = time.perf_counter() - began
        cpu = time.process_time() - cpu
        reply(units=units, seconds=seconds, cpu=cpu, results=results, peak=memory()[1])


if __name__ == "__main__":
    main()
