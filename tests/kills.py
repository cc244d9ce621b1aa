"""Kills: commands that write are killed at every operation on files, half-way through writes, and at random moments.

    python tests/kills.py [--random 100] [--seed 0] [--only merge ...] [--json FILE]

Whoever was killed is run again, as a person would: the same command, or with --resume where it says so. What lies in
the folder in the end must be what lies there after a run that nothing disturbed, to the bit, and nothing beside it. A
full disk is tried as well: one line must name the file that could not be written, and the same command must then do.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from fuzz import keep_results, kept_results
from tiny_files import KEPT, RUN, inside, older_version, write_all

from minilora.disk.folder import UNFINISHED
from minilora.disk.lock import LOCK

# Seconds after which a run that does not end counts as one that hangs.
PATIENCE = 120


class Scenario(NamedTuple):
    """A command that writes to the folder `out`.

    `needs` are names of tiny_files.py, of which `place` is what `out` holds before; `alone` says that the command
    starts processes of its own.
    """

    argv: tuple
    needs: tuple
    place: str | None = None
    alone: bool = False


def finetuning(*options, without=()):
    """The words of RUN with another folder and log, further options, and without some with their values."""
    words = [*RUN, *options]
    words[words.index("--out") + 1] = "out"
    words[words.index("--log") + 1] = "losses.jsonl"
    for flag in without:
        place = words.index(flag)
        del words[place : place + 2]
    return tuple(words)


SCENARIOS = {
    "finetune": Scenario(finetuning(), ("gpt2", "q.jsonl")),
    "finetune, two threads": Scenario(finetuning("--threads", "2", without=["--threads"]), ("gpt2", "q.jsonl")),
    "finetune, packed base": Scenario(finetuning("--quantize", "nf4"), ("gpt2", "q.jsonl")),
    "finetune --full": Scenario(
        finetuning("--full", without=["--alpha", "--r", "--dropout"]), ("gpt2", "q.jsonl")
    ),
    "merge": Scenario(("merge", "--base", "gpt2", "--adapter", "lora", "--out", "out"), ("gpt2", "lora")),
    "merge, packed again": Scenario(
        ("merge", "--base", "gpt2", "--adapter", "lora", "--out", "out", "--quantize", "nf4", "--allow-rounding"),
        ("gpt2", "lora"),
    ),
    "combine": Scenario(
        ("combine", "--base", "gpt2", "--adapter", "lora", "lora2", "--weights", "1", "-0.5", "--out", "out"),
        ("gpt2", "lora", "lora2"),
    ),
    "extract": Scenario(
        ("extract", "--base", "gpt2", "--tuned", "gpt2two", "--r", "2", "--out", "out"), ("gpt2", "gpt2two")
    ),
    "finetune --keep": Scenario(
        tuple("out" if word == "kept" else word for word in KEPT), ("gpt2", "q.jsonl", "kept"), place="kept"
    ),
    "rollback": Scenario(("rollback", "out", "--to", "VERSION"), ("kept",), place="kept"),
    "finetune, two processes": Scenario(
        finetuning("--workers", "2", without=["--threads"]), ("gpt2", "q.jsonl"), alone=True
    ),
}  # fmt: skip
# What Python tells an audit hook before it changes a file system.
OPERATIONS = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "os.link", "os.symlink",
              "shutil.rmtree", "shutil.copyfile", "shutil.copymode")  # fmt: skip
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Operations:
    """Counts what a process does to files, and kills it before the one numbered `when`.

    They are what OPERATIONS lists, each file opened to be written, and the time before and after each fsync.
    """

    def __init__(self, when=None):
        self.count, self.when = 0, when
        true_sync = os.fsync

        def fsync(file):
            self.pass_by()
            true_sync(file)
            self.pass_by()

        os.fsync = fsync
        sys.addaudithook(self.hear)

    def hear(self, event, arguments):
        """An audit hook."""
        if event == "open":
            flags = arguments[2]
            if isinstance(flags, int) and flags & WRITING:
                self.pass_by()
        elif event in OPERATIONS:
            self.pass_by()

    def pass_by(self):
        """One more; the last one, if it is that."""
        self.count += 1
        if self.count == self.when:
            os.kill(os.getpid(), signal.SIGKILL)


class Ended(NamedTuple):
    """How a process ended: its exit code, below zero for a signal, what it said on stderr, operations and seconds."""

    code: int
    err: str
    operations: int
    seconds: float


def run(scenario, folder, more=(), *, operation=None, after=None, file_size=None, full=None):
    """Run a scenario in `folder` in a process of its own, with words `more`; an Ended.

    It is killed before its operation numbered `operation`, or `after` so many seconds, or when it writes more than
    `file_size` bytes to a file. With `full` it is told then that the disk is full.
    """
    # What it says goes through pipes: it may not be able to write a file.
    (err, err_end), (counted, counted_end) = os.pipe(), os.pipe()
    start = time.perf_counter()
    child = os.fork()
    if not child:
        # Whatever happens here, nothing of the parent's is run.
        try:
            os.dup2(err_end, 2)
            _child([*scenario.argv, *more], folder, counted_end, scenario.alone, operation, file_size, full)
        finally:
            os._exit(99)
    os.close(err_end)
    os.close(counted_end)
    code = _wait(child, after)
    seconds = time.perf_counter() - start
    _wait_for_group(child)
    with os.fdopen(err, errors="backslashreplace") as said, os.fdopen(counted) as number:
        return Ended(code, said.read(), int(number.read() or 0), seconds)


def _child(argv, folder, counted, alone, operation, file_size, full):
    """What the process does that is to be killed."""
    os.setsid()
    os.chdir(folder)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if alone:
        # It starts processes, which import what it is: as a person runs it.
        os.execv(sys.executable, [sys.executable, "-m", "minilora", *argv])
    from minilora.cli.main import main

    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    counter = Operations(operation)
    if file_size is not None or full is not None:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN if full is not None else signal.SIG_DFL)
        limit = full if full is not None else file_size
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    code = main(argv)
    os.write(counted, str(counter.count).encode())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wait(child, after):
    """The exit code of a process, which is killed `after` so many seconds, or when it takes too long."""
    deadline = time.perf_counter() + (PATIENCE if after is None else after)
    while time.perf_counter() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code if after is not None else "hangs"


def _wait_for_group(leader):
    """Wait until all processes have ended that a killed one had started."""
    deadline = time.perf_counter() + 20
    while time.perf_counter() < deadline:
        try:
            os.killpg(leader, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    os.killpg(leader, signal.SIGKILL)
    raise AssertionError("a process that was killed leaves others, which go on")


# What lies in a folder.


def contents(folder):
    """{path: what is in it} of a folder, without what two runs of one command rightly differ in."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            found[name] = "a folder"
        else:
            found[name] = path.read_bytes()
            # What a kill cut in half is not JSON.
            with contextlib.suppress(ValueError):
                if path.suffix == ".jsonl":
                    found[name] = [_timeless(json.loads(line)) for line in found[name].splitlines()]
                elif path.name == "receipt.json":
                    found[name] = _timeless(json.loads(found[name]))
    return found


# Fields that say when something was, how long it took, and whether it was resumed.
TIMES = ("seconds", "date", "command")


def _timeless(value):
    if not isinstance(value, dict):
        return value
    return {name: _timeless(inner) for name, inner in value.items() if name not in TIMES}


def fresh(files, folder, scenario):
    """A new folder with what a scenario needs of the files of tiny_files.py."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in scenario.needs:
        copy = shutil.copytree if (files / name).is_dir() else shutil.copyfile
        copy(files / name, folder / ("out" if name == scenario.place else name))
    return folder


def go_on(scenario, folder, expected, rng=None):
    """Run a killed command again until it is done; what is wrong in the end, as a text, None if nothing is.

    With `rng` it is killed again on its way now and then.
    """
    more = ()
    # Who makes versions would make another of what is done: what is left of ours then goes with the next run.
    if scenario.place and all_but_ours(contents(folder)) == expected:
        return None
    for _ in range(12):
        after = None
        if rng is not None and rng.random() < 0.3:
            after = float(rng.uniform(0, 0.5 if not scenario.alone else 4))
        ended = run(scenario, folder, more, after=after)
        if ended.code == 0:
            break
        if ended.code == -signal.SIGKILL:
            continue
        if ended.code == 1 and not more and "--resume" in ended.err:
            more = ("--resume",)
        elif ended.code == 1 and more and ("nothing to resume" in ended.err):
            # It had ended, but for its last word; or it had not begun.
            more = ()
        elif ended.code == 1 and ("is not empty" in ended.err or "is the one in use" in ended.err):
            # It had ended, but for its last word. What lies there will show it.
            break
        else:
            return f"exit code {ended.code}: {ended.err.strip()[-300:]}"
    # A lock that its run could not remove locks nothing, and the next writer takes it.
    found = {name: value for name, value in contents(folder).items() if name != f"out/{LOCK}"}
    return difference(found, expected)


def all_but_ours(found):
    """What lies in a folder, but for what a kill leaves under names that only this library has."""
    return {name: value for name, value in found.items() if ".minilora-" not in name}


def difference(found, expected):
    """How two folders differ, as a text; None if they do not."""
    if found == expected:
        return None
    missing, new = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    other = sorted(name for name in found.keys() & expected.keys() if found[name] != expected[name])
    lists = {"missing": missing, "left behind": new, "other bytes": other}
    return "; ".join(f"{what}: {', '.join(names)}" for what, names in lists.items() if names)


def scenario_of(name, files):
    """The Scenario `name` on these files."""
    scenario = SCENARIOS[name]
    version = older_version(files)
    return scenario._replace(argv=tuple(word.replace("VERSION", version) for word in scenario.argv))


class Undisturbed(NamedTuple):
    """What a run leaves that nothing disturbs, its operations on files, its seconds, the largest file it writes."""

    expected: dict
    operations: int
    seconds: float
    largest: int


def undisturbed(name, files, scratch):
    """Run the scenario `name` twice, in peace: an Undisturbed. Raises: AssertionError unless both leave the same."""
    scenario = scenario_of(name, files)
    left = []
    for turn in range(2):
        folder = fresh(files, scratch / f"peace{turn}", scenario)
        before = {path: path.stat().st_size for path in folder.rglob("*")}
        ended = run(scenario, folder)
        assert ended.code == 0, f"{name}: exit code {ended.code}: {ended.err}"
        left.append(contents(folder))
    assert left[0] == left[1], f"{name}, twice: {difference(left[1], left[0])}"
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file() and path not in before]
    return Undisturbed(left[0], ended.operations, ended.seconds, max(sizes))


class Log:
    """Counts kills of each sort, and keeps what went wrong."""

    def __init__(self):
        self.counts = {}
        self.wrong = []

    def add(self, name, sort, ended, wrong):
        """Note a kill that fell (or did not: the run had ended), and what was wrong afterwards."""
        counts = self.counts.setdefault(name, Counter())
        counts[sort] += ended.code != 0
        if wrong:
            counts["wrong"] += 1
            self.wrong.append(f"{name}, {sort}: {wrong}")


def at_operations(name, files, scratch, log, step=1):
    """Kill the scenario before each of its operations, or each `step`-th, and go on."""
    scenario, peace = scenario_of(name, files), undisturbed(name, files, scratch)
    for when in range(1, peace.operations + 1, step):
        folder = fresh(files, scratch / "killed", scenario)
        ended = run(scenario, folder, operation=when)
        wrong = go_on(scenario, folder, peace.expected)
        log.add(name, "operations", ended, wrong and f"before operation {when}: {wrong}")


def sizes(largest, rng, n):
    """At how many bytes of a file to stop, `n` times: as often between 10 and 100 as between 100 and 1,000."""
    return sorted(int(np.exp(rng.uniform(0, np.log(largest)))) for _ in range(n))


def in_writes(name, files, scratch, log, rng, n):
    """Kill the scenario half-way through a file, `n` times, and go on."""
    scenario, peace = scenario_of(name, files), undisturbed(name, files, scratch)
    for size in sizes(peace.largest, rng, n):
        folder = fresh(files, scratch / "killed", scenario)
        ended = run(scenario, folder, file_size=size)
        wrong = go_on(scenario, folder, peace.expected)
        log.add(name, "half-written", ended, wrong and f"after {size} bytes of a file: {wrong}")


def on_full_disk(name, files, scratch, log, rng, n):
    """Let the scenario run out of disk in a file, `n` times, and run it again; first at the very first byte."""
    scenario, peace = scenario_of(name, files), undisturbed(name, files, scratch)
    for size in [0, *sizes(peace.largest, rng, n - 1)]:
        folder = fresh(files, scratch / "killed", scenario)
        ended = run(scenario, folder, full=size)
        lines = ended.err.strip().splitlines()
        wrong = None
        if ended.code != 0:
            named = re.search(r"\bout/|losses\.jsonl", ended.err) and UNFINISHED not in ended.err
            if ended.code != 1 or len(lines) != 1 or not named:
                wrong = f"exit code {ended.code}: {ended.err.strip()[-300:]}"
            wrong = wrong or go_on(scenario, folder, peace.expected)
        log.add(name, "full disk", ended, wrong and f"after {size} bytes of a file: {wrong}")


def at_random(name, files, scratch, log, rng, n):
    """Kill the scenario `n` times at random moments, some of them again while it goes on.

    A moment at which the command has ended does not count.
    """
    scenario, peace = scenario_of(name, files), undisturbed(name, files, scratch)
    while log.counts.setdefault(name, Counter())["random"] < n:
        folder = fresh(files, scratch / "killed", scenario)
        ended = run(scenario, folder, after=float(rng.uniform(0, peace.seconds)))
        wrong = go_on(scenario, folder, peace.expected, rng)
        log.add(name, "random", ended, wrong)


def _in_a_child(function, *arguments):
    """Call a function in a process of its own: this one starts no thread, so that it can be forked at any time."""
    child = os.fork()
    if not child:
        try:
            function(*arguments)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0, f"{function.__name__} failed"


SORTS = ("operations", "half-written", "random", "full disk", "wrong")


def table(counts):
    """The counts as lines."""
    rows = [["", *SORTS]]
    rows += [[name, *(str(counted[sort]) for sort in SORTS)] for name, counted in counts.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def main():
    """Run the command at the top of this file; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--random", type=int, default=100, help="kills at random moments, over all scenarios")
    parser.add_argument("--step", type=int, default=1, help="kill before each so many-th operation")
    parser.add_argument("--writes", type=int, default=12, help="kills half-way through a file, for each scenario")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=list(SCENARIOS), default=list(SCENARIOS))
    parser.add_argument("--json", metavar="FILE", help="keep the table in a file of results")
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    log = Log()
    with tempfile.TemporaryDirectory(prefix="kills-") as scratch:
        scratch = Path(scratch)
        files = scratch / "files"
        _in_a_child(write_all, files)
        with inside(scratch):
            for name in args.only:
                share = args.random // len(args.only) + (name in args.only[: args.random % len(args.only)])
                if not SCENARIOS[name].alone:
                    at_operations(name, files, scratch, log, args.step)
                    in_writes(name, files, scratch, log, rng, args.writes)
                    on_full_disk(name, files, scratch, log, rng, args.writes)
                at_random(name, files, scratch, log, rng, share)
                of_it = [line for line in log.wrong if line.startswith(f"{name}, ")]
                print("\n".join([*table({name: log.counts[name]})[1:], *of_it]), flush=True)
    print("\n".join(table(log.counts)))
    if args.json:
        # Beside those of other commands, which were killed in a run of their own.
        kept = kept_results(args.json).get("kills", {})
        for name, counted in log.counts.items():
            kept[name] = {"step": args.step, **{sort: counted[sort] for sort in SORTS}}
        keep_results(args.json, kills={name: kept[name] for name in SCENARIOS if name in kept})
    return 1 if log.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
