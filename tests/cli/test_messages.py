"""Errors as one line, whatever they are."""

import pytest

from minilora.cli.messages import log, one_line, warn


@pytest.mark.parametrize(
    "error, line",
    [
        (MemoryError("Unable to allocate 7 TiB"),
         "there is not enough memory; use a smaller batch (Unable to allocate 7 TiB)"),
        (OverflowError("too large"), "too large"),
        (FileNotFoundError(2, "No such file", "a.txt"), "a.txt: No such file"),
        (OSError(28, "No space left"), "No space left"),
        (OSError("a.txt could not be written"), "a.txt could not be written"),
        (ValueError("x"), "x"),
        (ValueError("x:\n  a\n\n  b"), "x: a; b"),
        (ValueError("x:\n  a\n  b\n  c"), "x: a; b; c"),
        (ValueError("x:\n  a\n  b\n  c\n  d"), "x: a; b; c; ..."),
        (ValueError(""), "ValueError"),
        (ValueError("\n \n"), "ValueError"),
        (ValueError("n" * 5000), "n" * 300 + " ..."),
        (UnicodeEncodeError("cp1252", "a中", 1, 2, "no"),
         r"the output is in cp1252, which cannot say '\u4e2d'; set PYTHONUTF8=1"),
        ("a message", "a message"),
    ],
    ids=lambda x: type(x).__name__,
)  # fmt: skip
def test_an_error_is_one_line(error, line):
    assert one_line(error) == line


def test_the_answer_goes_to_stdout_and_the_rest_to_stderr(capsys):
    log("the answer")
    warn("beside it")
    assert capsys.readouterr() == ("the answer\n", "beside it\n")
