"""One run of a benchmark: its inputs, its results, and how it ends. Knows no library."""

import contextlib
import json
import math
import sys
import tempfile
from pathlib import Path

from . import report
from .inputs import write_inputs
from .rounds import DifferentResults, measure_in_turns


class Session:
    """Measures programs on inputs that are written once a size, and saves what was measured.

    `seconds` is that of `measure_in_turns`. `path` names a JSON file, or is None. `write` is
    `write_inputs` of inputs.py, or another function like it.
    """

    def __init__(self, folder, threads, rounds, seconds, seed, path, write=write_inputs):
        self.folder = Path(folder)
        self.threads = threads
        self.rounds = rounds
        self.seconds = seconds
        self.seed = seed
        self.path = path
        self.write = write
        self.machine = report.describe_machine(threads)
        self.results = []
        self.remarks = []
        # The measurement that is going on, for messages.
        self.current = "the start"

    def measure(self, size, work, task, programs, deadline=math.inf):
        """What `measure_in_turns` returns for `programs` on a workload, which is called `size`."""
        self.current = f"{size} {task}"
        inputs = self.inputs(size, work)
        outcome = measure_in_turns(
            programs, inputs, self.threads, self.rounds, self.seconds, deadline
        )
        self.remarks += report.remarks(size, task, outcome)
        return outcome

    def inputs(self, size, work):
        """The folder of the inputs of a size, written when it is first asked for."""
        folder = self.folder / size
        if not folder.exists():
            self.write(work, folder, self.seed)
        return folder

    def add(self, size, task, summary, outcome):
        """Keep one measurement and its summary, and write all of them to the file."""
        self.results.append({"size": size, "task": task, **summary, **outcome})
        if self.path is not None:
            contents = {"machine": self.machine, "seed": self.seed, "results": self.results}
            # Renamed into place: the file is whole at every moment.
            part = Path(f"{self.path}.part")
            part.write_text(json.dumps(contents, indent=1), encoding="utf-8")
            part.replace(self.path)


@contextlib.contextmanager
def session(threads, rounds, seconds, seed, path, write=write_inputs):
    """A Session with a folder of its own; however it ends, its remarks are printed.

    Ctrl-C, and two programs that compute different things, end the whole run with a line that says
    where. What was measured until then has been printed and saved.
    """
    with tempfile.TemporaryDirectory() as folder:
        running = Session(folder, threads, rounds, seconds, seed, path, write)
        try:
            yield running
        except DifferentResults as error:
            sys.exit(f"stopped at {running.current}: {error}")
        except KeyboardInterrupt:
            message = f"interrupted at {running.current}, which is left out"
            raise KeyboardInterrupt(message) from None
        finally:
            for remark in running.remarks:
                print(remark)
