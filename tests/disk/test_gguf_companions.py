"""A model out of a GGUF file, saved as a folder of transformers: the same model, ids, template and ends."""

import json
from collections import Counter

import numpy as np
import pytest
import tokenizers
from gguf_files import TEMPLATE, byte_level_settings, sentencepiece_settings, settings_of, write_gguf
from safetensors.numpy import load_file
from strategies import bits, learned, new_adapter, trained_adapter

from minilora import attach, load_model, merge, save_merged, save_model
from minilora.disk.gguf import gguf_tokenizer
from minilora.disk.gguf_companions import gguf_companions
from minilora.disk.models import load_model_config
from minilora.disk.tokenizer import load_tokenizer
from minilora.graph import no_grad
from minilora.llama import Llama
from minilora.packed import PackedTensor, StoredTensor
from minilora.quant import stored_as, widen

TEXTS = ["hello world", " a  b\n\n c\t", "12 345 ٣٤", "<|im_start|>user\nhi<|im_end|>\n", "é 中 😀", ""]
IDS = np.array([[5, 9, 40, 3, 7]])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tiny.gguf"


# The model.


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_a_gguf_file_is_a_model_that_keeps_its_weights_as_they_are_stored(kind, architecture, path):
    values = write_gguf(path, settings_of(architecture), kind=kind)
    model = load_model(path)
    assert type(model) is Llama and not any(p.requires_grad for p in model.parameters())
    assert {type(p) for p in model.parameters()} <= {StoredTensor, PackedTensor}
    for name, p in model.named_parameters():
        assert np.array_equal(p.data, values[f"model.{name}"])
    linears = 2 * 7 + 1
    assert Counter(stored_as(model).values()) == ({} if kind == "F32" else {kind: linears})
    with no_grad():
        assert np.array_equal(model(IDS).data, widen(model)(IDS).data)


def test_its_configuration_is_read_without_its_tensors(path):
    write_gguf(path, kind="Q4_1")
    assert load_model_config(path) == load_model(path).config
    untied = path.with_name("untied.gguf")
    write_gguf(untied, tied=False)
    assert load_model_config(untied) == load_model(untied).config


def test_what_is_wrong_names_the_file(path):
    path.write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="tiny.gguf"):
        load_model(path)
    with pytest.raises(FileNotFoundError, match="nowhere.gguf"):
        load_model(path.with_name("nowhere.gguf"))


def test_a_folder_may_have_the_name_of_a_file(tmp_path, path):
    write_gguf(path)
    folder = tmp_path / "folder.gguf"
    save_model(load_model(path), folder)
    assert bits(load_model(folder)) == bits(load_model(path))


# The folder.


@pytest.mark.parametrize("kind, dtype", [("Q4_1", "float32"), ("BF16", "bfloat16"), ("F32", "float32")])
def test_a_model_of_a_gguf_file_is_saved_as_a_folder_of_transformers(kind, dtype, path, tmp_path):
    values = write_gguf(path, kind=kind, settings={**settings_of(), "tokenizer.ggml.eot_token_id": 0})
    model = load_model(path)
    save_model(model, tmp_path / "out", dtype=dtype, like=path)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
        "chat_template.jinja"}  # fmt: skip
    again = load_model(tmp_path / "out")
    assert again.config == model.config
    for name, p in again.named_parameters():
        if dtype == "float32" or p.ndim == 2:
            assert np.array_equal(p.data, values[f"model.{name}"])
    if dtype == "float32":
        stored = load_file(tmp_path / "out" / "model.safetensors")
        assert stored.keys() == values.keys() and all(np.array_equal(stored[name], values[name]) for name in values)
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert fields["architectures"] == ["LlamaForCausalLM"] and fields["eos_token_id"] == [2, 0]
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {
        "bos_token_id": 1, "eos_token_id": [2, 0]}  # fmt: skip


def test_a_merge_into_a_gguf_file_is_a_folder_with_all_that_belongs_to_it(path, tmp_path):
    write_gguf(path, kind="Q8_0")
    base = load_model(path)
    adapted = attach(base, trained_adapter(base, target_modules="all-linear"))
    said = []
    save_merged(adapted, tmp_path / "out", like=path, say=said.append)
    assert bits(load_model(tmp_path / "out")) == bits(widen(merge(adapted)))
    assert any("merged 14 updates" in text for text in said)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TEMPLATE
    before = path.read_bytes()
    slight = attach(base, learned(new_adapter(base), size=1e-5))
    with pytest.raises(ValueError, match="is rounded by"):
        save_merged(slight, tmp_path / "rounded", dtype="bfloat16", like=path, say=said.append)
    assert not (tmp_path / "rounded").exists() and path.read_bytes() == before


# What is beside the weights.


@pytest.mark.parametrize("vocabulary", [byte_level_settings(), byte_level_settings("llama-bpe"),
                                        sentencepiece_settings(["▁h", "▁he", "ll", "o"])])  # fmt: skip
def test_the_tokenizer_of_the_folder_gives_the_ids_of_the_file(vocabulary, path, tmp_path):
    write_gguf(path, settings_of(vocabulary=vocabulary))
    companions = gguf_companions(path)
    (tmp_path / "tokenizer.json").write_bytes(companions["tokenizer.json"])
    ours, ends, _ = gguf_tokenizer(path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in TEXTS:
        for special in (True, False):
            found = theirs.encode(text, add_special_tokens=special).ids
            assert found == ours.encode(text, add_special_tokens=special).ids
    config = json.loads(companions["tokenizer_config.json"])
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and config["model_max_length"] == 64
    assert theirs.token_to_id(config["eos_token"]) == ends[0] and theirs.token_to_id(config["bos_token"]) == 1
    assert config["clean_up_tokenization_spaces"] is False


def test_this_library_reads_the_same_tokenizer_out_of_either(path, tmp_path):
    write_gguf(path, {**settings_of(), "tokenizer.ggml.eot_token_id": 0})
    save_model(load_model(path), tmp_path / "out", like=path)
    file, folder = load_tokenizer(path), load_tokenizer(tmp_path / "out")
    assert file.ends == folder.ends == (2, 0) and file.vocab_size == folder.vocab_size
    for text in TEXTS:
        assert np.array_equal(file.encode(text), folder.encode(text))
        assert np.array_equal(file.encode_text(text), folder.encode_text(text))
    messages = [{"role": "user", "content": "hello <|im_end|>"}]
    ids = [t.encode_chat(messages, add_generation_prompt=True) for t in (file, folder)]
    assert np.array_equal(*ids) and len(ids[0]) > 10


@pytest.mark.parametrize("starts", [False, True, None])
@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("first", [1, None])
@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_a_template_writes_the_first_token_whatever_is_put_around_texts(starts, ends, first, kind, path, tmp_path):
    vocabulary = byte_level_settings() if kind == "bytes" else sentencepiece_settings(["▁h", "▁he", "ll", "o"])
    vocabulary |= {"tokenizer.ggml.add_bos_token": starts, "tokenizer.ggml.add_eos_token": ends,
                   "tokenizer.ggml.bos_token_id": first,
                   "tokenizer.chat_template": "{{ bos_token }}" + TEMPLATE + "{{ eos_token }}"}  # fmt: skip
    if starts and first is None:
        vocabulary["tokenizer.ggml.add_bos_token"] = False
    write_gguf(path, settings_of(vocabulary=vocabulary))
    save_model(load_model(path), tmp_path / "out", like=path)
    messages = [{"role": "user", "content": "hello"}]
    ids, theirs = (load_tokenizer(base).encode_chat(messages).tolist() for base in (path, tmp_path / "out"))
    assert ids == theirs and ids[-1] == 2
    # The byte-level template opens a turn with the same token.
    assert ids.count(1) == (first is not None) + (kind == "bytes")


def test_a_first_token_of_a_common_type_is_a_control_token_of_either(path, tmp_path):
    vocabulary = byte_level_settings()
    vocabulary["tokenizer.ggml.token_type"] = [3, 1, *vocabulary["tokenizer.ggml.token_type"][2:]]
    vocabulary["tokenizer.chat_template"] = "{{ bos_token }}{{ messages[0].content }}"
    write_gguf(path, settings_of(vocabulary=vocabulary))
    save_model(load_model(path), tmp_path / "out", like=path)
    messages = [{"role": "user", "content": "<|im_start|>"}]
    ids, theirs = (load_tokenizer(base).encode_chat(messages).tolist() for base in (path, tmp_path / "out"))
    assert ids == theirs and ids.count(1) == 1 and ids[0] == 1 and len(ids) > 5


def test_a_file_may_have_its_suffix_in_capitals(path, tmp_path):
    write_gguf(path)
    loud = path.rename(tmp_path / "MODEL.GGUF")
    assert load_tokenizer(loud).ends == (2,)
    assert load_model(loud).config.block_size == 64


def test_without_a_template_or_a_first_token_none_is_written(path):
    vocabulary = byte_level_settings()
    write_gguf(path, settings_of(vocabulary={
        **vocabulary, "tokenizer.chat_template": None, "tokenizer.ggml.bos_token_id": None}))  # fmt: skip
    companions = gguf_companions(path)
    assert companions.keys() == {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert json.loads(companions["tokenizer_config.json"])["bos_token"] is None
    assert json.loads(companions["generation_config.json"]) == {"bos_token_id": None, "eos_token_id": 2}


def test_a_template_is_written_as_it_is_also_in_other_letters(path, tmp_path):
    template = "{{ 'é中' }}\r\n{% for m in messages %}{{ m.content }}{% endfor %}\n"
    write_gguf(path, settings_of(vocabulary={**byte_level_settings(), "tokenizer.chat_template": template}))
    save_model(load_model(path), tmp_path / "out", like=path)
    assert (tmp_path / "out" / "chat_template.jinja").read_bytes() == template.encode()


def test_a_file_whose_tokenizer_is_not_read_is_told_before_anything_is_written(path, tmp_path):
    write_gguf(path, settings_of(vocabulary={**byte_level_settings(), "tokenizer.ggml.model": "bert"}))
    model = load_model(path)
    with pytest.raises(ValueError, match="tiny.gguf.*'bert'"):
        save_model(model, tmp_path / "out", like=path)
    assert not (tmp_path / "out").exists()
