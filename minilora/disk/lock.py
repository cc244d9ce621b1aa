"""One writer at a time in a folder, by a lock of the system. Knows no file but the lock's own.

The system lets go of a lock when its process ends, however that ends. So a run that was killed
leaves a file behind that locks nothing. Some network file systems have no locks: there nobody is
held off.
"""

import contextlib
import os
import shlex
import socket
import sys
import time
from pathlib import Path

from .checks import full_disk_names
from .reading import check_regular

# The file whose lock it is. It says who writes in the folder.
LOCK = ".minilora-lock"
# On Windows what is locked cannot be read: one byte far behind the text.
_FAR = 1 << 30
# A link is not followed, and a pipe not waited for.
_FLAGS = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


@contextlib.contextmanager
def only_writer(folder):
    """Within this block no other run of this library writes in `folder`, which is made if need be.

    Raises: ValueError that names the other run, or what somebody put in the place of the lock's
    file; NotADirectoryError if `folder` is a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; choose a folder to write to")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    descriptor = _take(path)
    try:
        with full_disk_names(path):
            os.truncate(descriptor, 0)
            os.write(descriptor, _this_run().encode())
        yield
    finally:
        # While it is locked still: another run would remove the file of a third.
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)
        # Whoever wrote nothing leaves nothing: what holds something is not removed.
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()


def _take(path):
    """A descriptor of the file at `path`, locked. Raises ValueError if another run has the lock."""
    while True:
        _check_place(path)
        descriptor = os.open(path, _FLAGS, 0o666)
        if not _lock(descriptor):
            holder = os.read(descriptor, 1000).decode(errors="replace")
            os.close(descriptor)
            # A command may have newlines in it, and be long.
            told = " ".join(holder.split()) or "it has just begun"
            raise ValueError(
                f"{path.parent}: another run writes there: {told}; wait until it has ended, or "
                "choose another folder"
            )
        # The run before removed its file, perhaps between these two calls: then this lock has no
        # name, and a third run would not see it.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)


def _check_place(path):
    """Raise ValueError if something else is there: who writes through a link destroys a file."""
    if path.is_symlink():
        raise ValueError(f"{path} is a link, where the lock of this folder is made; remove it")
    with contextlib.suppress(FileNotFoundError):
        check_regular(path)


def _lock(descriptor):
    """Lock an open file; False if another has it. A file system without locks says yes."""
    if os.name == "nt":
        import msvcrt

        os.lseek(descriptor, _FAR, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        finally:
            os.lseek(descriptor, 0, os.SEEK_SET)
        return True

    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _this_run():
    """Process, machine, time and command, for whoever finds the folder taken."""
    began = time.strftime("%Y-%m-%d %H:%M:%S")
    return f"process {os.getpid()} on {socket.gethostname()}, since {began}, {shlex.join(sys.argv)}"
