"""The program in a process of its own, as a person runs it, and what the folders of these tests hold."""

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
TEXT = "to be or not to be, that is the question: " * 3
PAIRS = [("who?", " me"), ("and why, then?", " no reason"), ("x", " y")]


def everything(folder):
    """{path: its bytes, None for a folder} of all that is in a folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def start(folder, *arguments, **how):
    """`python -m minilora`, which Ctrl-C reaches even if these tests run in the background: `start_python`."""
    return start_python(folder, "-m", "minilora", *arguments, **how)


def start_python(
    folder,
    *arguments,
    buffered=False,
    stdin=None,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    path=(),
    start_new_session=False,
    **environment,
):
    """A Python with these arguments. Modules are looked for in the folders `path` first."""
    environment["PYTHONPATH"] = os.pathsep.join(map(str, [*path, ROOT]))
    environment["PYTHONUNBUFFERED"] = "" if buffered else "1"
    heed_ctrl_c = None
    if os.name == "posix":
        heed_ctrl_c = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | environment,
        preexec_fn=heed_ctrl_c,
        start_new_session=start_new_session,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        text=True,
    )


def finish(process):
    """(exit code, stdout, stderr) of a process, when it has ended."""
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err
