"""Errors as one line, whatever they are."""

import pytest

from minilora.cli.messages import log, one_line, visible, warn, write


@pytest.mark.parametrize(
    "error, line",
    [
        (MemoryError("Unable to allocate 7 TiB"),
         "there is not enough memory; use a smaller batch (Unable to allocate 7 TiB)"),
        (OverflowError("too large"), "too large"),
        (FileNotFoundError(2, "No such file", "a.txt"), "a.txt: No such file"),
        (OSError(36, "File name too long", "n" * 5000), "n" * 200 + " ... " + "n" * 200 + ": File name too long"),
        (FileNotFoundError(2, "No such file", "a\nb"), r"a\nb: No such file"),
        (OSError(28, "No space left"), "No space left"),
        (OSError("a.txt could not be written"), "a.txt could not be written"),
        (ValueError("x"), "x"),
        (ValueError("x:\n  a\n\n  b"), "x: a; b"),
        (ValueError("x:\n  a\n  b\n  c"), "x: a; b; c"),
        (ValueError("x:\n  a\n  b\n  c\n  d"), "x: a; b; c; ..."),
        (ValueError(""), "ValueError"),
        (ValueError("\n \n"), "ValueError"),
        (ValueError("n" * 5000 + "; give --x"), "n" * 200 + " ... " + "n" * 190 + "; give --x"),
        (ValueError("n" * 400), "n" * 400),
        (ValueError("n" * 401), "n" * 200 + " ... " + "n" * 200),
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


ESCAPES = "a\x1b[31mb\x00\x07\r\x7f\x9b\u202ec\u2066"
SPELT_OUT = r"a\x1b[31mb\x00\x07\r\x7f\x9b\u202ec\u2066"


def test_no_terminal_obeys_what_is_shown():
    assert visible(ESCAPES) == SPELT_OUT
    plain = "two\nlines\tand é 中 😀 👨‍👩‍👧 \\x1b"
    assert visible(plain) == plain


def test_what_is_told_is_always_spelt_out_and_a_text_only_in_a_terminal(capsys, monkeypatch):
    log(ESCAPES), warn(ESCAPES), write(ESCAPES)
    assert capsys.readouterr() == (f"{SPELT_OUT}\n{ESCAPES}", f"{SPELT_OUT}\n")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    write(ESCAPES)
    assert capsys.readouterr() == (SPELT_OUT, "")
