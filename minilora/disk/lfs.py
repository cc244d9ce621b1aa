"""Git LFS's pointers: 130 bytes of text that stand where the real file was not fetched."""

from .reading import open_regular

# What every pointer begins with, up to the number of the version.
_FIRST_WORDS = b"version https://git-lfs.github.com/spec/"


def check_no_pointer(path):
    """Raise ValueError with what to run if the file at `path` is a pointer of Git LFS.

    `git clone` without Git LFS leaves one under the name of each large file, and so does a
    download of the wrong address. Raises: as `open_regular`.
    Source: the specification of Git LFS, version 1.
    """
    with open_regular(path) as file:
        start = file.read(len(_FIRST_WORDS))
    if start == _FIRST_WORDS:
        raise ValueError(
            f"{path} is a pointer of Git LFS, a few lines of text in place of the file; run "
            "`git lfs install` and `git lfs pull` in its repository, or download the file itself"
        )
