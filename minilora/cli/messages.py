"""What the program prints: its answer, what is worth knowing beside it, an error as one line."""

import re
import sys

# Control characters, but for the newline and the tab, the marks that turn the direction of writing,
# and ends of lines in Unicode: what a terminal obeys instead of showing it. And halves of
# surrogates, which no output can say.
CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
# Of an error that lists many things, this many are shown, each cut to this many characters.
MOST_LINES = 3
LONGEST_LINE = 400


def log(text):
    """Print a line of the answer, at once: a log file or a pipe has it as soon as it is known."""
    print(visible(text), flush=True)


def warn(text):
    """Print what is not the answer: on stderr, so that the answer alone can be piped on."""
    print(visible(text), file=sys.stderr, flush=True)


def write(text):
    """Print a piece of a text that a model writes: a terminal shows it, a pipe gets it as it is."""
    if sys.stdout.isatty():
        text = visible(text)
    print(text, end="", flush=True)


def visible(text):
    """`text` with its control characters spelt out, as \\x1b: no terminal obeys it."""
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def in_a_line(text):
    """`text` as a part of a line: its newlines and tabs are spelt out as well."""
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")


def shortened(text, most=LONGEST_LINE):
    """`most` characters of `text`, with dots in the place of more.

    They stand in the middle: an error begins with a name, and ends with what to do.
    """
    if len(text) <= most:
        return text
    return f"{text[: most // 2]} ... {text[-(most // 2) :]}"


def one_line(error):
    """An exception, a warning or a message as one line, with a remedy where its text has none."""
    if isinstance(error, OSError) and error.strerror:
        if error.filename is None:
            return error.strerror
        return f"{shortened(in_a_line(str(error.filename)))}: {error.strerror}"
    if isinstance(error, MemoryError):
        return f"there is not enough memory; use a smaller batch ({error})"
    if isinstance(error, UnicodeEncodeError) and error.encoding != "utf-8":
        character = error.object[error.start]
        return (
            f"the output is in {error.encoding}, which cannot say {character!a}; set PYTHONUTF8=1"
        )
    lines = [shortened(line.strip()) for line in str(error).split("\n") if line.strip()]
    if not lines:
        return type(error).__name__
    first = lines[0]
    rest = lines[1 : 1 + MOST_LINES]
    if len(lines) > 1 + MOST_LINES:
        rest.append("...")
    return f"{first} {'; '.join(rest)}".rstrip()

