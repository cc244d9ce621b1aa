"""The log of a run: a line of JSON for each step and for each evaluation. Knows no model.

    {"run": "3f2a9c0d1e5b", "step": 1, "loss": 5.9, "lr": 5e-05, "tokens": 512, "seconds": 0.04}
    {"run": "3f2a9c0d1e5b", "step": 1, "eval_loss": 5.8, "tokens": 512, "seconds": 0.04}

`run` is a digest of what determines the run. `step` counts the steps done, `tokens` and `seconds`
what all of them took, evaluations aside. Losses are in nats per token.
"""

import hashlib
import json
import math
import os
from pathlib import Path

from ..disk.checks import full_disk_names, json_object
from ..disk.reading import LARGEST_LOG, open_regular

# No line of a log has as many bytes.
LONGEST_LINE = 4096
STEP_FIELDS = ("run", "step", "loss", "lr", "tokens", "seconds")
EVALUATION_FIELDS = ("run", "step", "eval_loss", "tokens", "seconds")


def run_digest(identity):
    """A name for a run, of 12 characters: that of the settings, the data and the base it has."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


class RunLog:
    """Appends lines to the file `path`, which is made if it is not there.

    A line is on its way to the file in one piece as soon as it is written: whoever reads the file
    meanwhile, or after a kill, finds whole lines. `sync` returns when they are on the disk.
    """

    def __init__(self, path, run):
        self.run = run
        self.path = path
        self.file = open(path, "ab", buffering=0)

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        with self.file:
            self.sync()

    def write(self, **fields):
        """Append a line of these fields."""
        line = json.dumps({"run": self.run, **fields}).encode() + b"\n"
        with full_disk_names(self.path):
            n_written = self.file.write(line)
        if n_written != len(line):
            raise OSError(f"{self.path}: a line could not be written whole; is the disk full?")

    def sync(self):
        """Wait until all that was written is on the disk."""
        with full_disk_names(self.path):
            os.fsync(self.file.fileno())


def check_place(path, out, resume):
    """Raise ValueError or OSError unless a run that writes to the folder `out` may log to `path`.

    A log is a .jsonl: no other file that a run writes has such a name, so none takes its place. A
    run that does not go on writes to a new file, or to an empty one.
    """
    path = Path(path)
    out = Path(out)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file; choose another name for the log")
    if path.suffix.lower() != ".jsonl":
        raise ValueError(f"{path}: a log is a .jsonl; choose a name that ends so")
    if path.resolve() == out.resolve():
        raise ValueError(f"{path} will be the folder of the run; choose another name for the log")
    if not path.parent.is_dir() and path.parent.resolve() != out.resolve():
        raise FileNotFoundError(f"{path.parent} does not exist; make the folder of the log first")
    if out.resolve() in path.parent.resolve().parents:
        # The folder of the checkpoint, which is removed when the run has ended.
        raise ValueError(f"{path.parent} is a folder in that of the run; put the log into {out}")
    if not resume and path.exists() and path.stat().st_size:
        raise ValueError(
            f"{path} is not empty, and a log is never written over: choose another file, or remove "
            "this one (--resume goes on with the log of a run that was interrupted)"
        )


def cut_back(path, run, progress, say):
    """Leave in the log `path` the lines that belong to `progress`, from which its run goes on.

    What came after the last checkpoint is computed again, and its lines are cut off; `say` is told.
    Raises: ValueError that names the line, with the file as it was, if it is no log of this run, or
    has a gap.
    """
    expected = _expected(progress)
    lines = []
    half_line = b""
    if Path(path).exists():
        lines, half_line = _lines(path)
    records = [_record(f"{path}, line {i}", line) for i, line in enumerate(lines, 1)]
    for number, record in enumerate(records, 1):
        if record["run"] != run:
            raise ValueError(
                f"{path}, line {number}: of another run, {record['run']}, where {run} goes on; "
                "give the log that it began, or another file to a run from its start"
            )
    for i, (step, field, value) in enumerate(expected):
        where = f"{path}, line {i + 1}: expected the {field} of step {step}, {value}"
        remedy = (
            "as in the checkpoint; give the log that the run began, or go on without it "
            "(log_file=None, --no-log)"
        )
        if i >= len(records):
            raise ValueError(f"{where}, and there is no such line, {remedy}")
        if records[i]["step"] != step or records[i].get(field) != value:
            raise ValueError(f"{where}, got {_without_run(records[i])}, {remedy}")
    if half_line or len(records) > len(expected):
        say(
            f"{path}: what came after line {len(expected)}, step {len(progress.losses)}, is "
            "computed again"
        )
        os.truncate(path, sum(len(line) + 1 for line in lines[: len(expected)]))


def _expected(progress):
    """[(step, field, value)] of the lines that a run has written so far."""
    expected = []
    if progress.before is not None:
        expected.append((0, "eval_loss", progress.before))
    evaluations = dict(map(tuple, progress.evaluations))
    for step, loss in enumerate(progress.losses, 1):
        expected.append((step, "loss", loss))
        if step in evaluations:
            expected.append((step, "eval_loss", evaluations[step]))
    return expected


def _without_run(record):
    return {field: value for field, value in record.items() if field != "run"}


def read_log(path):
    """The lines of a log, as dicts of STEP_FIELDS or of EVALUATION_FIELDS.

    Raises: ValueError that names the line and what is wrong with it: no JSON, no line of this log,
    lines of two runs, a step that is absent or comes twice, a last line that is cut off; or says
    that the file is empty. OSError if it cannot be read.
    """
    lines, half_line = _lines(path)
    if half_line:
        raise ValueError(
            f"{path}, line {len(lines) + 1}: cut off, it has no end; remove the line, or go on "
            "with the run that wrote it (--resume)"
        )
    if not lines:
        raise ValueError(f"{path}, line 1: there is none, the file is empty; no step was logged")
    records = []
    steps_done = 0
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        record = _record(where, line)
        if records and record["run"] != records[0]["run"]:
            raise ValueError(
                f"{where}: of the run {record['run']}, and the lines before it are of "
                f"{records[0]['run']}; give each run a file of its own"
            )
        due = steps_done + 1 if "loss" in record else steps_done
        if record["step"] != due:
            raise ValueError(f"{where}: expected step {due}, got {record['step']}")
        steps_done = due
        records.append(record)
    return records


def _lines(path):
    """([whole lines of the file, without their ends], what stands behind the last of them).

    Zeros, which a power cut may leave at the end of a file, are no line, however many.
    """
    lines = []
    with open_regular(path, LARGEST_LOG) as file:
        while True:
            line = file.readline(LONGEST_LINE)
            if line.endswith(b"\n"):
                lines.append(line[:-1])
            elif len(line) == LONGEST_LINE and line.strip(b"\0"):
                raise ValueError(
                    f"{path}, line {len(lines) + 1} has {LONGEST_LINE:,} bytes or more: it is of "
                    "another program, or damaged"
                )
            else:
                return lines, line


def _record(where, line):
    """The dict that a line is. Raises: ValueError that begins with `where` for any other line."""
    try:
        text = line.decode()
    except UnicodeDecodeError:
        raise ValueError(f"{where} is not JSON: it is not UTF-8") from None
    record = json_object(where, text)
    if tuple(record) not in (STEP_FIELDS, EVALUATION_FIELDS):
        raise ValueError(
            f"{where} is of another program: it has the fields {', '.join(record)[:80]!r}; a line "
            f"that finetune --log writes has {', '.join(STEP_FIELDS)}, or eval_loss instead of "
            "loss and lr"
        )
    for field, value in record.items():
        if not _fits(field, value):
            raise ValueError(f"{where}: {field} is {str(value)[:40]!r}")
    return record


def _fits(field, value):
    if field == "run":
        return isinstance(value, str)
    if type(value) not in (int, float) or not math.isfinite(value):
        return False
    return value >= 0 and (field not in ("step", "tokens") or type(value) is int)
