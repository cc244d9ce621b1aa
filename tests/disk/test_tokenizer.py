"""Tokenizers of model folders: texts come back to the character; folders that do not fit their model are refused."""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.disk import characters
from minilora.disk.tokenizer import END, load_tokenizer

TEXTS = ["a\n\nb\n", " leading and trailing ", "😀 naïve 字\t\r\n", "doesn't", "\n", "   \n  x", f"The fox{END}The dog"]
FILES = ("tokenizer.json", "vocab.json", "merges.txt")


def write_config(folder, **fields):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def copied(folder, to, names=FILES, **fields):
    """`folder` with only the files `names`, and other fields in its configuration."""
    for name in names:
        (to / name).write_bytes((folder / name).read_bytes())
    return write_config(to, **{"model_type": "gpt2", "vocab_size": 300, **fields})


@pytest.fixture(params=[FILES[:1], FILES[1:], FILES], ids=["one file", "two files", "all three"])
def bpe(request, bpe_folder, tmp_path):
    return load_tokenizer(copied(bpe_folder, tmp_path, request.param))


@pytest.mark.parametrize("text", TEXTS, ids=repr)
def test_a_text_comes_back_to_the_character(bpe, text):
    ids = bpe.encode(text)
    assert ids.dtype == np.int64 and ids.ndim == 1 and (0 <= ids).all() and (ids < bpe.vocab_size).all()
    assert bpe.decode(ids) == text


def test_the_tokens_are_those_of_the_library_and_there_are_merges_among_them(bpe, bpe_folder):
    import tokenizers

    library = tokenizers.Tokenizer.from_file(str(bpe_folder / "tokenizer.json"))
    for text in TEXTS:
        assert bpe.encode(text).tolist() == library.encode(text, add_special_tokens=False).ids
    assert len(bpe.encode("The quick brown fox")) < len("The quick brown fox")


def test_the_end_of_a_text_is_one_token_and_none_is_added(bpe):
    assert bpe.vocab_size == 300 and bpe.cuttable
    assert bpe.encode(END).tolist() == [bpe.end] and bpe.decode([bpe.end]) == END
    assert bpe.end not in bpe.encode("The fox") and len(bpe.encode("x")) == 1 and len(bpe.encode("")) == 0


def test_special_tokens_that_a_tokenizer_adds_are_not_added(bpe_folder, tmp_path):
    folder = copied(bpe_folder, tmp_path, FILES[:1])
    import tokenizers
    from tokenizers.processors import TemplateProcessing

    bpe = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    plain = bpe.encode("The fox").ids
    bpe.post_processor = TemplateProcessing(single=f"{END} $A", special_tokens=[(END, bpe.token_to_id(END))])
    bpe.enable_truncation(3)
    bpe.enable_padding(length=50)
    bpe.save(str(folder / "tokenizer.json"))
    assert load_tokenizer(folder).encode("The fox").tolist() == plain
    assert len(load_tokenizer(folder).encode("The fox" * 9)) == 9 * len(plain)


@pytest.mark.parametrize("eos, end", [(None, 0), (7, 7)])
def test_the_end_is_the_one_of_the_configuration_if_that_has_one(bpe_folder, tmp_path, eos, end):
    assert load_tokenizer(copied(bpe_folder, tmp_path, FILES[:1], eos_token_id=eos)).end == end


def test_a_tokenizer_of_other_pieces_is_not_cuttable(bpe_folder, tmp_path):
    import tokenizers
    from tokenizers import normalizers

    folder = copied(bpe_folder, tmp_path, FILES[:1])
    bpe = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    bpe.normalizer = normalizers.Strip()
    bpe.save(str(folder / "tokenizer.json"))
    assert not load_tokenizer(folder).cuttable


# The characters of the demo.


@given(st.text(alphabet=characters.ALPHABET))
def test_the_characters_are_those_of_the_demo(text):
    with tempfile.TemporaryDirectory() as folder:
        known = load_tokenizer(write_config(Path(folder), model_type="minilora-gpt", vocab_size=96))
    assert known.encode(text).tolist() == characters.encode(text).tolist() and known.decode(known.encode(text)) == text
    assert (known.end, known.vocab_size, known.cuttable) == (0, 96, True)


def test_a_model_of_minilora_with_a_tokenizer_beside_it_uses_that(bpe_folder, tmp_path):
    folder = copied(bpe_folder, tmp_path, FILES[:1], model_type="minilora-gpt", vocab_size=300)
    assert load_tokenizer(folder).vocab_size == 300


# Refused.


@pytest.mark.parametrize("fields, names, missing", [
    ({"model_type": "gpt2", "vocab_size": 96}, (), "tokenizer.json, or vocab.json and merges.txt, is missing"),
    ({"model_type": "minilora-gpt", "vocab_size": 95}, (), "tokenizer.json, or vocab.json"),
    ({"model_type": "gpt2", "vocab_size": 300}, ("vocab.json",), r": merges.txt is missing"),
    ({"model_type": "gpt2", "vocab_size": 300}, ("merges.txt",), r": vocab.json is missing"),
], ids=["nothing", "95 characters", "no merges", "no vocabulary"])  # fmt: skip
def test_what_is_missing_is_named(tmp_path, fields, names, missing):
    for name in names:
        (tmp_path / name).write_text("{}")
    with pytest.raises(FileNotFoundError, match=missing):
        load_tokenizer(write_config(tmp_path, **fields))


def test_a_folder_without_a_configuration_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content, shown", [("{", "is not JSON"), ("[1]", "an object with fields, got list")])
def test_a_configuration_that_is_none_is_refused(tmp_path, content, shown):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=shown):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("room", [299, None, "300", True])
def test_a_tokenizer_that_the_model_has_no_room_for_is_refused(bpe_folder, tmp_path, room):
    with pytest.raises(ValueError, match=rf"has 300 tokens, the model \(config.json: vocab_size\) {room}"):
        load_tokenizer(copied(bpe_folder, tmp_path, FILES[:1], vocab_size=room))


def test_a_model_whose_table_was_rounded_up_is_taken(bpe_folder, tmp_path):
    assert load_tokenizer(copied(bpe_folder, tmp_path, FILES[:1], vocab_size=304)).vocab_size == 300


@pytest.mark.parametrize("eos", [300, -1, [0, 1], "0", True])
def test_an_end_that_is_no_token_is_refused(bpe_folder, tmp_path, eos):
    with pytest.raises(ValueError, match="no token ends a text.*one of the 300 ids"):
        load_tokenizer(copied(bpe_folder, tmp_path, FILES[:1], eos_token_id=eos))


def test_a_tokenizer_without_an_end_is_refused(bpe_folder, tmp_path):
    folder = copied(bpe_folder, tmp_path, FILES[1:])
    vocabulary = json.loads((folder / "vocab.json").read_text())
    vocabulary["<|end|>"] = vocabulary.pop(END)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    with pytest.raises(ValueError, match="no token ends a text"):
        load_tokenizer(folder)


@pytest.mark.parametrize("name, shown", [("tokenizer.json", "tokenizer.json: damaged"),
                                         ("vocab.json", "vocab.json and .*merges.txt: damaged")])  # fmt: skip
def test_damaged_files_are_named(bpe_folder, tmp_path, name, shown):
    folder = copied(bpe_folder, tmp_path, FILES[:1] if name == "tokenizer.json" else FILES[1:])
    (folder / name).write_text((folder / name).read_text()[:-20])
    with pytest.raises(ValueError, match=shown):
        load_tokenizer(folder)


def test_the_characters_need_no_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert load_tokenizer(write_config(tmp_path, model_type="minilora-gpt", vocab_size=96)).end == 0


@pytest.mark.parametrize("change", ["a space before every text", "a token that is blank", "a token that eats blanks"])
def test_a_tokenizer_that_reaches_over_a_cut_is_not_cut(change, bpe_folder, tmp_path):
    """What is encoded in pieces must give the same tokens: each of these would not."""
    import tokenizers

    bpe = tokenizers.Tokenizer.from_file(str(bpe_folder / "tokenizer.json"))
    if change == "a space before every text":
        bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    else:
        blank = change == "a token that is blank"
        bpe.add_tokens([tokenizers.AddedToken("x\ny" if blank else "dog", rstrip=not blank)])
    write_config(tmp_path, model_type="gpt2", vocab_size=301)
    bpe.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert not tokenizer.cuttable
    text, cut = "the x\ny dog\nx", 5 if change == "a token that is blank" else 11
    assert tokenizer.encode(text).tolist() != [*tokenizer.encode(text[:cut]), *tokenizer.encode(text[cut:])]
