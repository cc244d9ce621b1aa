"""One writer at a time: who comes second is told who is first; a killed run holds nobody off."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading

import pytest

from minilora.cli.messages import one_line
from minilora.disk import lock
from minilora.disk.lock import LOCK, only_writer

HOLDS = """
import sys
from minilora.disk.lock import only_writer
with only_writer(sys.argv[1]):
    print("ready", flush=True)
    sys.stdin.read()
"""


def holder(folder):
    """A process that writes in `folder` until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


def test_who_comes_second_is_told_who_is_first_and_may_go_on_after_it(tmp_path):
    first = holder(tmp_path / "out")
    told = rf"out: another run writes there: process {first.pid} on {re.escape(socket.gethostname())}, since .*-c "
    with pytest.raises(ValueError, match=told), only_writer(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / LOCK).exists(), "the second takes nothing away from the first"
    first.communicate("", timeout=60)
    with only_writer(tmp_path / "out"):
        assert (tmp_path / "out" / LOCK).exists()
    assert not (tmp_path / "out").exists()


def test_whatever_the_first_says_of_itself_the_second_is_told_what_to_do(tmp_path):
    with only_writer(tmp_path):
        for text in ("", "process 7, 'a\n\nb\nc\nd\ne\nf'", "process 7, " + "w" * 5000):
            (tmp_path / LOCK).write_text(text)
            with pytest.raises(ValueError) as refusal, only_writer(tmp_path):
                pass
            line = one_line(refusal.value)
            assert line.endswith("; wait until it has ended, or choose another folder"), line
            assert (text[:10] or "it has just begun") in line


@pytest.mark.skipif(os.name != "posix", reason="sends SIGKILL to a process")
def test_a_run_that_was_killed_holds_nobody_off(tmp_path):
    first = holder(tmp_path)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert (tmp_path / LOCK).exists()
    (tmp_path / LOCK).write_text("a longer text than any, of that run" * 100)
    with only_writer(tmp_path):
        assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} ")
        assert "of that run" not in (tmp_path / LOCK).read_text()
    assert not (tmp_path / LOCK).exists()


def test_two_threads_of_one_process_are_two_writers(tmp_path):
    refused = []

    def second():
        try:
            with only_writer(tmp_path):
                pass
        except ValueError as error:
            refused.append(str(error))

    with only_writer(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert len(refused) == 1


def test_what_was_written_stays_and_an_empty_folder_goes(tmp_path):
    with only_writer(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").write_text("kept")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["file"]
    with pytest.raises(KeyError), only_writer(tmp_path / "c"):
        raise KeyError
    assert not (tmp_path / "c").exists()


def test_folders_above_that_were_made_go_too_and_no_others(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(KeyError), only_writer(tmp_path / "a" / "b" / "c"):
        raise KeyError
    assert list(tmp_path.iterdir()) == [tmp_path / "a"] and not any((tmp_path / "a").iterdir())
    with pytest.raises(KeyError), only_writer(tmp_path / "a" / "b" / "c"):
        (tmp_path / "a" / "b" / "mine").mkdir()
        raise KeyError
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["mine"]


def test_a_file_is_no_folder_to_write_in(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="file is a file"), only_writer(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.name != "posix", reason="Windows locks otherwise")
def test_a_lock_whose_file_the_run_before_has_just_removed_is_taken_anew(tmp_path, monkeypatch):
    """Between opening the file and locking it, its owner may end: a lock without a name would hold nobody off."""
    path = tmp_path / LOCK
    removed = []

    def removed_meanwhile(descriptor, real=lock._lock):
        if not removed:
            removed.append(path.unlink())
        return real(descriptor)

    monkeypatch.setattr(lock, "_lock", removed_meanwhile)
    with only_writer(tmp_path):
        assert removed and path.exists()


@pytest.mark.skipif(os.name != "posix", reason="Windows locks otherwise")
def test_a_file_system_without_locks_holds_nobody_off(tmp_path, monkeypatch):
    import fcntl

    def unsupported(descriptor, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with only_writer(tmp_path), only_writer(tmp_path):
        pass


@pytest.mark.skipif(os.name != "posix", reason="makes links and pipes")
def test_what_is_no_file_in_the_place_of_the_lock_is_refused_and_left_as_it_is(tmp_path):
    precious = tmp_path / "precious.txt"
    precious.write_text("years of work")
    places = {
        "is a link": lambda path: path.symlink_to(precious),
        "is a pipe": os.mkfifo,
        "is a folder": os.mkdir,
    }
    for number, (told, make) in enumerate(places.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        make(folder / LOCK)
        before = os.lstat(folder / LOCK)
        with pytest.raises(ValueError, match=f"{LOCK} {told}"), only_writer(folder):
            pass
        assert os.path.samestat(before, os.lstat(folder / LOCK))
    assert precious.read_text() == "years of work"
