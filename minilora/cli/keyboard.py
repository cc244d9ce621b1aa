"""What a person types or another program pipes in, by lines or all of it. Knows no command."""

import sys

from .messages import warn


def read_all():
    """The standard input to its end, without one newline there. Raises: ValueError if not UTF-8."""
    if sys.stdin.isatty():
        warn("the prompt is what you type, up to Ctrl-D at the beginning of a line")
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

    In a terminal lines are edited and called back where Python can do that, after a prompt if the
    answers are shown there too. Bytes that are not UTF-8 become surrogates.
    """
    if not sys.stdin.isatty():
        return _next_piped_line
    try:
        # Importing it is what gives `input` its editing.
        import readline  # noqa: F401
    except ImportError:
        # Python on Windows has none; its terminal edits lines itself.
        pass
    prompt = "> " if sys.stdout.isatty() else ""
    return lambda: _next_typed_line(prompt)


def _next_typed_line(prompt):
    try:
        return input(prompt)
    except EOFError:
        return None


def _next_piped_line():
    # The bytes of one line: text would be decoded ahead, and one wrong byte would spoil all lines.
    line = sys.stdin.buffer.readline()
    if not line:
        return None
    return line.decode(errors="surrogateescape").removesuffix("\n").removesuffix("\r")
