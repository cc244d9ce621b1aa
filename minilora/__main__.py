"""`python -m minilora` and the command `minilora`: one program. Knows only where it begins.

It expects Ctrl-C and SIGTERM before it imports anything that takes time.
"""

import sys

from .cli.ctrl_c import TerminationAsCtrlC, report_interrupt


def main():
    """Run the program with the arguments of this process; returns its exit code."""
    with TerminationAsCtrlC() as termination:
        try:
            from .cli.main import main

            code = main()
        except KeyboardInterrupt as interrupt:
            code = report_interrupt("minilora", interrupt)
    return termination.exit_code(code)


if __name__ == "__main__":
    sys.exit(main())
