"""The log of a run: whole lines in a file, read back as they were written, and what is no such file is told by line."""

import json
import os

import pytest

from minilora.training.progress import Progress
from minilora.training.run_log import RunLog, cut_back, read_log, run_digest

STEPS = [{"step": i, "loss": 4.5 - i, "lr": 0.1 / i, "tokens": 16 * i, "seconds": 0.25 * i} for i in (1, 2, 3)]
EVALUATION = {"step": 2, "eval_loss": 2.5, "tokens": 32, "seconds": 0.5}
LINES = [{"step": 0, "eval_loss": 5.0, "tokens": 0, "seconds": 0.0}, *STEPS[:2], EVALUATION, STEPS[2]]
PROGRESS = Progress(before=5.0, losses=[3.5, 2.5, 1.5], evaluations=[[2, 2.5]])


@pytest.fixture
def log(tmp_path):
    """The path of a log with these LINES, of the run `abc`."""
    with RunLog(tmp_path / "log.jsonl", "abc") as run_log:
        for line in LINES:
            run_log.write(**line)
    return tmp_path / "log.jsonl"


def test_what_was_written_is_read(log):
    assert read_log(log) == [{"run": "abc", **line} for line in LINES]


def test_a_line_is_in_the_file_as_soon_as_it_is_written_and_lines_before_it_stay(log):
    before = log.read_bytes()
    with RunLog(log, "abc") as run_log:
        run_log.write(step=4, loss=1.0, lr=0.1, tokens=64, seconds=1.0)
        assert log.read_bytes() == before + b'{"run": "abc", "step": 4, "loss": 1.0, "lr": 0.1, "tokens": 64, ' + (
            b'"seconds": 1.0}\n')  # fmt: skip


def test_a_line_is_written_by_one_call(log):
    pieces = []
    with RunLog(log, "abc") as run_log:
        file, run_log.file = run_log.file, None
        run_log.file = type("File", (), {"write": lambda self, piece: pieces.append(piece) or len(piece)})()
        run_log.write(**STEPS[0])
        run_log.file = file
    [piece] = pieces
    assert piece.endswith(b"}\n") and piece.count(b"\n") == 1


def test_a_disk_that_is_full_is_told(log):
    with RunLog(log, "abc") as run_log:
        file = run_log.file
        run_log.file = type("File", (), {"write": lambda self, piece: 3})()
        with pytest.raises(OSError, match=f"{log.name}: a line could not be written whole; is the disk full"):
            run_log.write(**STEPS[0])
        run_log.file = file


@pytest.mark.parametrize("moment", ["write", "sync"])
def test_a_disk_without_room_is_told_with_the_name_of_the_log(log, moment, monkeypatch):
    def no_room(*given):
        raise OSError(28, "No space left on device")

    with RunLog(log, "abc") as run_log, monkeypatch.context() as patch:
        if moment == "sync":
            patch.setattr(os, "fsync", no_room)
        file = run_log.file
        with pytest.raises(OSError, match=f"No space left on device: '.*{log.name}'"):
            if moment == "write":
                run_log.file = type("File", (), {"write": no_room})()
                run_log.write(**STEPS[0])
            run_log.sync()
        run_log.file = file


def test_another_setting_is_another_run_and_the_order_of_settings_is_none():
    one = {"settings": {"lr": 0.5, "steps": 3}, "base": {"wte": "01"}}
    assert run_digest(one) == run_digest({"base": {"wte": "01"}, "settings": {"steps": 3, "lr": 0.5}})
    assert len({run_digest({**one, "base": {"wte": base}}) for base in ("01", "02")}) == 2


# Going on.


def cut(log, progress=PROGRESS, run="abc"):
    """(what is told, the lines that are left)"""
    told = []
    cut_back(log, run, progress, told.append)
    return told, log.read_text().splitlines() if log.exists() else []


def test_a_log_that_is_as_far_as_its_checkpoint_stays_as_it_is(log):
    before = log.read_text().splitlines()
    assert cut(log) == ([], before)


@pytest.mark.parametrize("n_steps, n_lines", [(3, 5), (2, 4), (1, 2), (0, 1)])
@pytest.mark.parametrize("half", ["", '{"run": "abc", "st', "\0" * 5000], ids=["whole", "half a line", "zeros"])
def test_what_came_after_the_checkpoint_is_cut_off_and_told(log, n_steps, n_lines, half):
    before = log.read_text().splitlines()
    with log.open("a") as file:
        file.write(half)
    evaluations = PROGRESS.evaluations if n_steps >= 2 else []
    told, left = cut(log, Progress(5.0, PROGRESS.losses[:n_steps], evaluations=evaluations))
    assert left == before[:n_lines]
    is_cut = n_lines < 5 or bool(half)
    assert told == [f"{log}: what came after line {n_lines}, step {n_steps}, is computed again"] * is_cut


def test_a_checkpoint_from_before_the_first_measurement_leaves_nothing(log):
    assert cut(log, Progress())[1] == []


def test_a_log_that_is_not_there_is_begun_where_nothing_was_logged_yet(tmp_path):
    assert cut(tmp_path / "none.jsonl", Progress()) == ([], [])


@pytest.mark.parametrize("progress, run, complaint", [
    (PROGRESS, "xyz", r"line 1: of another run, abc, where xyz goes on"),
    (Progress(), "xyz", r"line 1: of another run, abc, where xyz goes on"),
    (Progress(5.0, [3.5, 2.25]), "abc", r"line 3: expected the loss of step 2, 2.25, got {'step': 2, 'loss': 2.5,"),
    (Progress(5.0, [3.5, 2.5, 1.5, 1]), "abc", r"line 4: expected the loss of step 3, 1.5, got {'step': 2, 'eval_loss"),
    (Progress(5.0, [3.5, 2.5, 1.5, 1], evaluations=[[2, 2.5]]), "abc", r"line 6: expected the loss of step 4, 1, and"),
    (Progress(None, [3.5]), "abc", r"line 1: expected the loss of step 1, 3.5, got {'step': 0, 'eval_loss': 5.0"),
], ids=range(6))  # fmt: skip
def test_a_log_that_is_not_of_this_run_or_has_a_gap_is_refused_and_stays(log, progress, run, complaint):
    before = log.read_bytes()
    with pytest.raises(ValueError, match=complaint) as refusal:
        cut(log, progress, run)
    assert log.read_bytes() == before and "\n" not in str(refusal.value)


# What is no log.


def changed(line, **fields):
    return json.dumps({"run": "abc", **line, **fields}).encode()


step = [changed(line) for line in STEPS]
BAD = {
    "empty": (b"", "line 1: there is none, the file is empty"),
    "cut off": (step[0] + b"\n" + step[1][:30], "line 2: cut off, it has no end; remove the line, or go on"),
    "without a newline": (step[0], "line 1: cut off"),
    "no JSON": (step[0] + b"\nstep 2: 3.5\n", "line 2 is not JSON: Expecting value"),
    "an empty line": (step[0] + b"\n\n", "line 2 is not JSON"),
    "bytes": (step[0] + b"\n\xff\xfe\n", "line 2 is not JSON: it is not UTF-8"),
    "too deep": (b"[" * 3000 + b"\n", "line 1 is not JSON"),
    "a line without an end": (step[0] + b"\n" + b"x" * 5000, "line 2 has 4,096 bytes or more: it is of another prog"),
    "zeros behind": (step[0] + b"\n" + b"\0" * 5000, "line 2: cut off"),
    "a list": (b"[1, 2]\n", "line 1: expected an object with fields, got list"),
    "another program's": (b'{"loss": 2.0, "epoch": 1}\n', "line 1 is of another program: it has the fields 'loss, ep"),
    "another's with steps": (b'{"step": 1, "loss": 2.0}\n', "line 1 is of another program"),
    "nan": (changed(STEPS[0], loss=float("nan")) + b"\n", "line 1: loss is 'nan'"),
    "a text": (changed(STEPS[0], loss="low") + b"\n", "line 1: loss is 'low'"),
    "half a step": (changed(STEPS[0], step=1.5) + b"\n", "line 1: step is '1.5'"),
    "a negative time": (changed(STEPS[0], seconds=-1.0) + b"\n", "line 1: seconds is '-1.0'"),
    "true": (changed(STEPS[0], tokens=True) + b"\n", "line 1: tokens is 'True'"),
    "a number for a run": (changed(STEPS[0], run=7) + b"\n", "line 1: run is '7'"),
    "a gap": (step[0] + b"\n" + step[2] + b"\n", "line 2: expected step 2, got 3"),
    "twice": (step[0] + b"\n" + step[0] + b"\n", "line 2: expected step 2, got 1"),
    "a measurement elsewhere": (step[0] + b"\n" + changed(EVALUATION) + b"\n", "line 2: expected step 1, got 2"),
    "two runs": (step[0] + b"\n" + changed(STEPS[1], run="xyz") + b"\n", "line 2: of the run xyz, and the lines"),
}


@pytest.mark.parametrize("content, complaint", BAD.values(), ids=BAD)
def test_what_is_no_log_is_told_in_one_line_with_its_number(tmp_path, content, complaint):
    (tmp_path / "log.jsonl").write_bytes(content)
    with pytest.raises(ValueError) as refusal:
        read_log(tmp_path / "log.jsonl")
    assert str(refusal.value).startswith(f"{tmp_path / 'log.jsonl'}, {complaint}")
    assert "\n" not in str(refusal.value)
