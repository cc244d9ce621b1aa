"""One run of a demo: where it keeps things, the step it is in, and what each step took.

Knows a folder, a clock and the system's count of memory, and no model.
"""

import contextlib
import os
import time
from collections import namedtuple
from pathlib import Path

from ..disk.peft import TENSORS
from ..training.loop import Interrupted
from ..training.progress import peak_memory

# The folder of the adapter, inside the folder of a demo.
ADAPTER = "security"

# What a step took: seconds by the clock and of all cores together, and the most bytes that the
# process has held by its end (None where the system does not tell).
Cost = namedtuple("Cost", "name seconds cpu_seconds peak_bytes")


class DemoRun:
    """A run that keeps things in the folder `out`, and is in one `step` at a time.

    `saved` lists what it has kept so far, in words; `costs` has a Cost for each step that is over.
    Raises: OSError if nothing can be written to `out`, which is made.
    """

    def __init__(self, out):
        self.out = Path(out)
        self.step = "starting"
        self.saved = []
        self.costs = []
        self.out.mkdir(parents=True, exist_ok=True)
        if not os.access(self.out, os.W_OK):
            raise PermissionError(f"cannot write to {out}: choose another folder with --out")
        self._began = time.perf_counter()
        self._step_began = None

    def begin(self, step):
        """The step before is over, and `step`, in words, begins."""
        self.end()
        self.step = step
        self._step_began = (time.perf_counter(), time.process_time())

    def end(self):
        """The step is over: its Cost is added, if one had begun."""
        if self._step_began is None:
            return
        began, cpu_began = self._step_began
        seconds = time.perf_counter() - began
        cpu_seconds = time.process_time() - cpu_began
        self.costs.append(Cost(self.step, seconds, cpu_seconds, peak_memory()))
        self._step_began = None

    def seconds(self):
        """How long the run has taken so far."""
        return time.perf_counter() - self._began

    @contextlib.contextmanager
    def interruptible(self):
        """Ctrl-C within this block says in which step it fell, and what was kept by then."""
        try:
            yield
        except KeyboardInterrupt:
            saved = "; ".join(self.saved) or "nothing of this run"
            raise Interrupted(
                f"interrupted in {self.step}. Kept: {saved}. No file is half-written."
            ) from None


def checked_question(question, out):
    """`question` as it is asked: in lower case, on one line.

    Raises: ValueError if it is empty; FileNotFoundError if no demo has kept an adapter in `out`.
    """
    question = " ".join(question.lower().split())
    if not question:
        raise ValueError("the question is empty; ask, say, 'which port does ssh use?'")
    if not (Path(out) / ADAPTER / TENSORS).exists():
        raise FileNotFoundError(f"nothing to ask in {out}: run the demo first, to its end")
    return question


def costs_table(costs, log):
    """Print what each step took, and what all did."""
    width = max(len(cost.name) for cost in costs)
    log(f"      {'':<{width}}   seconds   CPU seconds   MB at most by then")
    total = Cost(
        "all of it",
        sum(cost.seconds for cost in costs),
        sum(cost.cpu_seconds for cost in costs),
        costs[-1].peak_bytes,
    )
    for cost in [*costs, total]:
        line = f"      {cost.name:<{width}} {cost.seconds:>9.1f} {cost.cpu_seconds:>13.1f}"
        if cost.peak_bytes is not None:
            line += f" {cost.peak_bytes / 1e6:>20,.0f}"
        log(line)
