"""What a base is on disk: a folder and a GGUF file of one model say the same, each in its own place."""

import numpy as np
import pytest
from gguf_files import write_gguf
from strategies import small_gpt

from minilora import load_model, save_model
from minilora.disk.base_files import COMPANIONS, companions_of, fields_file, is_gguf, load_fields, load_stored
from minilora.packed import PackedTensor


@pytest.fixture
def path(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", kind="Q8_0")
    return tmp_path / "tiny.gguf"


def test_a_gguf_file_is_told_by_its_name_and_a_folder_is_none(path, tmp_path):
    (tmp_path / "a folder.gguf").mkdir()
    assert is_gguf(path) and is_gguf(str(path)) and is_gguf("nowhere/X.GGUF")
    assert not is_gguf(tmp_path / "a folder.gguf") and not is_gguf(tmp_path) and not is_gguf("model.safetensors")


def test_a_gguf_file_says_what_its_folder_says(path, tmp_path):
    save_model(load_model(path), tmp_path / "folder", like=path)
    fields, tensors, _ = load_stored(path)
    assert fields == load_fields(path) and fields_file(path) == path
    of_folder, in_folder, _ = load_stored(tmp_path / "folder")
    assert of_folder == load_fields(tmp_path / "folder")
    assert fields_file(tmp_path / "folder") == tmp_path / "folder" / "config.json"
    assert {name: of_folder[name] for name in fields} == fields and tensors.keys() == in_folder.keys()
    for name, tensor in tensors.items():
        packed = isinstance(tensor, PackedTensor)
        assert packed == name.endswith(("proj.weight", "embed_tokens.weight"))
        assert np.array_equal(tensor.data if packed else tensor, in_folder[name])


def test_what_goes_along_is_what_is_there_and_nothing_goes_along_into_the_same_place(tmp_path):
    base = tmp_path / "base"
    save_model(small_gpt(), base)
    assert companions_of(base, tmp_path / "out") == companions_of(None, tmp_path / "out") == {}
    for name in COMPANIONS[::2]:
        (base / name).write_text(name)
    assert companions_of(base, tmp_path / "out") == {name: base / name for name in COMPANIONS[::2]}
    assert companions_of(base, base) == companions_of(base, base / ".." / "base") == {}


def test_further_templates_and_licences_go_along_and_nothing_else_does(tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    save_model(small_gpt(), base)
    (base / "additional_chat_templates").mkdir()
    (base / "LICENSES").mkdir()
    along = ["additional_chat_templates/tools.jinja", "additional_chat_templates/rag.jinja", "LICENSE.txt", "NOTICE"]
    for name in (*along, "additional_chat_templates/notes.txt", "README.md", "LICENSES/one"):
        (base / name).write_text(f"this is {name}")
    for _ in range(2):
        save_model(small_gpt(1), out, like=base)
        files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
        assert files == {"config.json", "model.safetensors", *along}
        assert all((out / name).read_text() == f"this is {name}" for name in along)


def test_of_a_gguf_file_they_are_made(path, tmp_path):
    made = companions_of(path, tmp_path / "out")
    assert made.keys() <= set(COMPANIONS) and all(isinstance(content, bytes) for content in made.values())
