"""Commands that are killed and run again leave what one leaves that nothing disturbed; and a bug there is seen."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from kills import Log, at_operations
from tiny_files import write_all

from minilora.disk import folder as folders

pytestmark = pytest.mark.skipif(os.name != "posix", reason="forks and sends SIGKILL")
TESTS = Path(__file__).resolve().parent


def test_a_few_kills_of_a_few_commands_leave_nothing_wrong(tmp_path):
    """In a process of its own, which has no threads. The long run's figures are in examples/trust.md."""
    words = ["--only", "combine", "rollback", "--random", "1", "--writes", "1", "--step", "17"]
    path = os.pathsep.join([str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    ended = subprocess.run([sys.executable, TESTS / "kills.py", *words], capture_output=True, text=True, timeout=200,
                           env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": path})  # fmt: skip
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stdout
    assert ended.stdout.count("combine") == 2


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    files = tmp_path_factory.mktemp("killed") / "files"
    write_all(files)
    return files


def test_a_save_that_does_not_note_what_it_names_is_seen(files, tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "_note_names", lambda folder, staging, names: None)
    log = Log()
    at_operations("combine", files, tmp_path, log, step=4)
    assert 0 < log.counts["combine"]["wrong"] < log.counts["combine"]["operations"]
    assert any("missing: out/" in line for line in log.wrong)
