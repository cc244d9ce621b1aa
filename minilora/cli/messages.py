"""What the program prints: its answer, what is worth knowing beside it, an error as one line."""

import sys

# Of an error that lists many things, this many are shown, each cut to this many characters.
MOST_LINES = 3
LONGEST_LINE = 300


def log(text):
    """Print a line of the answer, at once: a log file or a pipe has it as soon as it is known."""
    print(text, flush=True)


def warn(text):
    """Print what is not the answer: on stderr, so that the answer alone can be piped on."""
    print(text, file=sys.stderr)


def one_line(error):
    """An exception, a warning or a message as one line, with a remedy where its text has none."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    if isinstance(error, MemoryError):
        return f"there is not enough memory; use a smaller batch ({error})"
    if isinstance(error, UnicodeEncodeError) and error.encoding != "utf-8":
        character = error.object[error.start]
        return (
            f"the output is in {error.encoding}, which cannot say {character!a}; set PYTHONUTF8=1"
        )
    lines = [_shortened(line.strip()) for line in str(error).split("\n") if line.strip()]
    if not lines:
        return type(error).__name__
    first = lines[0]
    rest = lines[1 : 1 + MOST_LINES]
    if len(lines) > 1 + MOST_LINES:
        rest.append("...")
    return f"{first} {'; '.join(rest)}".rstrip()


def _shortened(line):
    return line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]} ..."
