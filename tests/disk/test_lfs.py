"""Git LFS's pointers: whatever file one stands for, the message says what it is and what to run."""

import shutil

import pytest
from strategies import small_gpt, trained_adapter

from minilora import load_adapter, load_model, save_adapter, save_gpt2
from minilora.disk.lfs import check_no_pointer
from minilora.disk.tokenizer import load_tokenizer

POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4665cb3ee1b1ab8f3be5d1da0bd5eb0b4aff02a0ed2bd5a1cd8c9a3a8b2c0a55\n"
    "size 548105171\n"
)
SHOWN = "is a pointer of Git LFS.*git lfs pull.*or download the file"


def test_a_pointer_is_told_from_what_only_looks_like_one(tmp_path):
    (tmp_path / "x").write_text(POINTER)
    with pytest.raises(ValueError, match=rf"x {SHOWN}"):
        check_no_pointer(tmp_path / "x")
    for other in (b"", b"version", POINTER.encode()[1:], b"\0" * 200):
        (tmp_path / "x").write_bytes(other)
        check_no_pointer(tmp_path / "x")
    with pytest.raises(FileNotFoundError):
        check_no_pointer(tmp_path / "nowhere")


def test_a_model_whose_weights_were_not_fetched_is_refused_with_what_to_run(tmp_path):
    save_gpt2(small_gpt(), tmp_path)
    (tmp_path / "model.safetensors").write_text(POINTER)
    with pytest.raises(ValueError, match=rf"model.safetensors {SHOWN}"):
        load_model(tmp_path)


@pytest.mark.parametrize("file", ["model.safetensors.index.json", "model-00001-of-00001.safetensors"])
def test_so_are_shards_and_their_index(file, tmp_path):
    save_gpt2(small_gpt(), tmp_path)
    shard = tmp_path / "model-00001-of-00001.safetensors"
    (tmp_path / "model.safetensors").rename(shard)
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"transformer.wte.weight": "model-00001-of-00001.safetensors"}}'
    )
    (tmp_path / file).write_text(POINTER)
    with pytest.raises(ValueError, match=rf"{file} {SHOWN}"):
        load_model(tmp_path)


def test_so_are_adapters(tmp_path):
    base = small_gpt()
    save_adapter(trained_adapter(base), tmp_path)
    (tmp_path / "adapter_model.safetensors").write_text(POINTER)
    with pytest.raises(ValueError, match=rf"adapter_model.safetensors {SHOWN}"):
        load_adapter(tmp_path, base)


@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.json", "merges.txt"])
def test_so_are_the_files_of_a_tokenizer(file, bpe_folder, tmp_path):
    shutil.copytree(bpe_folder, tmp_path, dirs_exist_ok=True)
    if file != "tokenizer.json":
        (tmp_path / "tokenizer.json").unlink()
    (tmp_path / file).write_text(POINTER)
    with pytest.raises(ValueError, match=rf"{file} {SHOWN}"):
        load_tokenizer(tmp_path)
