"""What a person types or another program pipes in, by lines or all of it. Knows no command."""

import sys


def read_all():
    """The standard input to its end, without one newline there. Raises: ValueError if not UTF-8."""
    if sys.stdin.isatty():
        print("reading the prompt up to Ctrl-D", file=sys.stderr, flush=True)
    try:
        text = sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        wrong = error.object[error.start]
        raise ValueError(
            f"the standard input is not UTF-8: byte {error.start + 1} is {wrong:#04x}"
        ) from None
    return text.removesuffix("\n").removesuffix("\r")


def line_reader():
    """A function that returns the next line of the standard input, None at its end.

    In a terminal it shows a prompt, and lines are edited and called back where Python can do that.
    """
    prompt = ""
    if sys.stdin.isatty() and sys.stdout.isatty():
        prompt = "> "
        try:
            # Importing it is what gives `input` its editing.
            import readline  # noqa: F401
        except ImportError:
            # Python on Windows has none; its terminal edits lines itself.
            pass

    def read():
        try:
            return input(prompt)
        except EOFError:
            return None
        except UnicodeDecodeError as error:
            raise ValueError(f"the standard input is not UTF-8: {error.reason}") from None

    return read
