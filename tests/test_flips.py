"""A flipped bit in any file that the library writes is refused or harmless; without the digests it would be silent."""

import pytest
from flips import TARGETS, flip_all
from tiny_files import write_all

from minilora.disk import folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    files = tmp_path_factory.mktemp("flipped") / "files"
    write_all(files)
    return files


@pytest.mark.parametrize("name", TARGETS)
def test_no_flip_is_silent(name, files):
    """A few places, to the end of the file. All of them: `python tests/flips.py`, as examples/trust.md shows."""
    size = (files / TARGETS[name].file).stat().st_size
    found = flip_all(name, 1, files, [*range(5, size, size // 6), size - 1])
    assert set(found) <= {"refused", "harmless"} and "refused" in found


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_without_digests_flips_are_silent(files, monkeypatch):
    monkeypatch.setattr(folder, "check_digests", lambda path, tensors, metadata: None)
    size = (files / TARGETS["adapter_model.safetensors"].file).stat().st_size
    assert "silent" in flip_all("adapter_model.safetensors", 1, files, range(size - 60, size, 7))
