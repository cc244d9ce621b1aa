"""`python -m minilora` and the command `minilora`: one program. Knows only where it begins.

It expects Ctrl-C before it imports anything that takes time.
"""

import sys

from .cli.ctrl_c import report_interrupt


def main():
    """Run the program with the arguments of this process; returns its exit code."""
    try:
        from .cli.main import main

        return main()
    except KeyboardInterrupt as interrupt:
        return report_interrupt("minilora", interrupt)


if __name__ == "__main__":
    sys.exit(main())
