"""Files that somebody else may have put there: regular ones are opened, and no larger than may be.

In the place of a file a pipe would be waited for, and a device read without end. Knows no format,
but that of JSON.
"""

import os
import stat

from .checks import json_object

# The most bytes of a file, by what it is. Each is some times the largest that is in use.
LARGEST_CONFIG = 4 << 20
# Two numbers for each of the most steps that a run may have (MOST_STEPS in finetune_config.py), and
# two more for an evaluation after each.
LARGEST_STATE = 128 << 20
# Names of tensors, and the file of each.
LARGEST_INDEX = 64 << 20
# Tokens and merges.
LARGEST_TOKENIZER = 256 << 20
# What a template computes is limited as well.
LARGEST_TEMPLATE = 1 << 20
# A line for each of ten million steps.
LARGEST_LOG = 1 << 30
# A text takes some times its size in memory.
LARGEST_DATA = 16 << 30
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def check_regular(path, most=None):
    """Raise ValueError, at once, unless `path` is a regular file, or a link to one.

    And, before a byte of it is read, if it has more than `most` bytes.
    Raises: FileNotFoundError or another OSError if nothing is known of it.
    """
    _check_status(path, os.stat(path), most)


def _check_status(path, status, most):
    if not stat.S_ISREG(status.st_mode):
        names = [name for is_kind, name in _KINDS if is_kind(status.st_mode)]
        kind = names[0] if names else "no file"
        raise ValueError(f"{path} is {kind}, where a file is needed; put the file itself there")
    if most is not None and status.st_size > most:
        raise ValueError(
            f"{path} has {status.st_size:,} bytes, and at most {most:,} are read of such a file: "
            "is it another one?"
        )


def open_regular(path, most=None):
    """The file `path`, open to read its bytes. Raises: as `check_regular`."""
    check_regular(path)
    file = open(path, "rb", opener=_at_once)
    try:
        # Another may have taken its place meanwhile.
        _check_status(path, os.fstat(file.fileno()), most)
    except ValueError:
        file.close()
        raise
    return file


def _at_once(path, flags):
    # A pipe is opened only when somebody writes to it, unless one does not wait.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_bytes(path, most):
    """The bytes of a regular file that has at most `most` of them. Raises: as `check_regular`."""
    with open_regular(path, most) as file:
        # A file that grows, as a log may, is as long as it was.
        return file.read(os.fstat(file.fileno()).st_size)


def read_object(path, most=LARGEST_CONFIG):
    """The JSON object in the file `path`. Raises: as `check_regular` and `json_object`."""
    return json_object(path, read_bytes(path, most))
