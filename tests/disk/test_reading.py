"""What is read at all: regular files, or links to them, that are no larger than their kind may be."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.disk import reading
from minilora.disk.reading import check_regular, open_regular, read_bytes, read_object


@given(content=st.binary(max_size=40), most=st.integers(0, 60))
def test_a_file_is_read_whole_or_not_at_all(tmp_path_factory, content, most):
    path = tmp_path_factory.mktemp("read") / "file"
    path.write_bytes(content)
    if len(content) <= most:
        assert read_bytes(path, most) == content
    else:
        shown = f"file has {len(content)} bytes, and at most {most} are read of such a file"
        with pytest.raises(ValueError, match=shown):
            read_bytes(path, most)


def test_a_size_is_looked_at_before_a_byte_is_read(tmp_path, monkeypatch):
    path = tmp_path / "sparse"
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    monkeypatch.setattr(os, "read", None)
    for read in (read_object, lambda path: read_bytes(path, 1 << 30), lambda path: check_regular(path, 10)):
        with pytest.raises(ValueError, match="sparse has 1,099,511,627,776 bytes, and at most"):
            read(path)


def test_a_link_to_a_file_is_read_and_one_to_nothing_is_missing(tmp_path):
    (tmp_path / "file").write_bytes(b"{}")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "lost").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    assert read_object(tmp_path / "link") == {}
    with pytest.raises(FileNotFoundError):
        read_object(tmp_path / "lost")
    with pytest.raises(OSError):
        read_object(tmp_path / "loop")


@pytest.mark.skipif(os.name != "posix", reason="makes a pipe")
def test_a_pipe_that_takes_the_place_of_a_file_meanwhile_is_not_waited_for(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    # It was a file when it was looked at first.
    monkeypatch.setattr(reading, "check_regular", lambda path: None)
    with pytest.raises(ValueError, match="pipe is a pipe, where a file is needed"):
        open_regular(tmp_path / "pipe")
