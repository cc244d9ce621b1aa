"""Worker processes that are called one at a time, and the load of others. Knows no library."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent.parent


# How a worker is asked for the memory that one unit takes on a GPU.
MEMORY = "memory"


class WorkerEnded(Exception):
    """A worker ended before it was stopped: the message is the last line it printed."""


class Worker:
    """The process of one Program (see rounds.py). It is started at once; `answer` waits."""

    def __init__(self, program, folder, threads):
        self.out_of_time = False
        self.stderr = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        arguments = [program.module, program.variant, program.task]
        arguments += [str(folder), str(threads), program.device]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "compared.worker", *arguments],
            env=_environment(threads),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            encoding="utf-8",
            # Ctrl-C is for the parent, which then stops its workers.
            start_new_session=True,
        )

    def answer(self):
        """The next line of the process, as a dict. Raises: WorkerEnded."""
        line = self.process.stdout.readline()
        if not line:
            raise WorkerEnded(self._last_words())
        return json.loads(line)

    def _last_words(self):
        self.process.wait()
        if self.out_of_time:
            return "its time was over"
        self.stderr.seek(0)
        lines = [line.strip() for line in self.stderr.read().splitlines() if line.strip()]
        return lines[-1] if lines else f"ended with status {self.process.returncode}"

    def call(self, settling, units):
        """Do `settling` units untimed, then `units` that are timed.

        Returns the answer as a dict, with `wall`, the seconds seen from here, and `foreign`, the
        CPU seconds of other processes meanwhile (None if unknown). Raises: WorkerEnded.
        """
        busy_before = busy_seconds()
        began = time.perf_counter()
        # If the process has ended, `answer` says why.
        with contextlib.suppress(BrokenPipeError):
            print(settling, units, file=self.process.stdin, flush=True)
        answer = self.answer()
        answer["wall"] = time.perf_counter() - began
        busy_after = busy_seconds()
        answer["foreign"] = None
        if busy_before is not None and busy_after is not None:
            answer["foreign"] = max(0.0, busy_after - busy_before - answer["cpu"])
        return answer

    def peak_memory(self):
        """What one more unit takes of a GPU's memory: {"allocated", "reserved"} in bytes.

        Raises: WorkerEnded.
        """
        with contextlib.suppress(BrokenPipeError):
            print(MEMORY, file=self.process.stdin, flush=True)
        return self.answer()

    def end(self):
        """End the process because its time is over, from another thread: `answer` then says so."""
        self.out_of_time = True
        self._kill()

    def stop(self):
        """End the process, whatever it is doing, and those it started: compilers have helpers."""
        self._kill()
        self.process.communicate()
        self.stderr.close()

    def _kill(self):
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError):
                # It was started as a session of its own, with one process group.
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()


def _environment(threads):
    """That of this process, with so many `threads` for products, and compared/ to import."""
    path = str(EXAMPLES)
    if os.environ.get("PYTHONPATH"):
        path += os.pathsep + os.environ["PYTHONPATH"]
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    return {**os.environ, **dict.fromkeys(names, str(threads)), "PYTHONPATH": path}


def busy_seconds(stat="/proc/stat"):
    """CPU seconds that the processes of this machine have used, or its host withheld.

    None where the system does not tell.
    """
    try:
        with open(stat, encoding="utf-8") as lines:
            fields = lines.readline().split()[1:9]
        user, nice, system, _idle, _io_wait, irq, soft_irq, steal = map(int, fields)
        return (user + nice + system + irq + soft_irq + steal) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return None


def foreign_share(answers, cores):
    """The part of the machine that others used during these calls, 0 .. 1; None if unknown."""
    if any(answer["foreign"] is None for answer in answers):
        return None
    wall = sum(answer["wall"] for answer in answers)
    return sum(answer["foreign"] for answer in answers) / (cores * wall)
