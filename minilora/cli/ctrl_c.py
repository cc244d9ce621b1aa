"""Ctrl-C as one line and exit code 130, SIGTERM as one line and 143. Knows no command.

It is imported before anything else, so it imports nothing that takes time.
"""

import os
import signal
import sys

# What a shell reports of a program that SIGINT has ended, 128 + 2, and of one that SIGTERM has.
EXIT_CODE = 130
TERMINATED = 143


class TerminationAsCtrlC:
    """Within this block SIGTERM raises what Ctrl-C does: a run keeps its checkpoint, and says so.

    Source: systemd, Slurm, Kubernetes and `kill` send SIGTERM, and wait before they kill.
    """

    def __init__(self):
        self.came = False

    def __enter__(self):
        self.before = signal.signal(signal.SIGTERM, self._terminate)
        return self

    def __exit__(self, *raised):
        signal.signal(signal.SIGTERM, self.before)

    def _terminate(self, number, frame):
        self.came = True
        raise KeyboardInterrupt

    def exit_code(self, code):
        """That of a program that ended with `code`: 143 if it was SIGTERM that interrupted it."""
        return TERMINATED if self.came and code == EXIT_CODE else code


def report_interrupt(program, interrupt):
    """Print what an interrupt says, or "interrupted", on one line; returns the exit code."""
    # A terminal has just shown ^C, and the line must not be glued to that.
    start = "\n" if sys.stderr.isatty() else ""
    message = str(interrupt) or "interrupted"
    print(f"{start}{program}: {message}", file=sys.stderr)
    return EXIT_CODE


def one_line_on_ctrl_c():
    """From now on Ctrl-C ends this script with one line, where Python would print a traceback.

    A script calls it before its imports: those of NumPy take longer than some scripts.
    """
    program = os.path.basename(sys.argv[0])
    print_traceback = sys.excepthook

    def report(kind, error, traceback):
        if not issubclass(kind, KeyboardInterrupt):
            print_traceback(kind, error, traceback)
            return
        sys.exit(report_interrupt(program, error))

    sys.excepthook = report
