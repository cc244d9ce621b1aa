"""Data files: what is read and refused, what the loss is on, what is held out, and that nothing is left out."""

import json
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.disk import characters
from minilora.disk.tokenizer import Tokenizer, load_tokenizer
from minilora.functional import IGNORE
from minilora.training import datasets as text
from minilora.training.datasets import Pairs, Text, load_data, read_pairs, read_text

CHARACTERS = Tokenizer(characters.encode, characters.decode, end=0, vocab_size=96, cuttable=True)
ROWS = [("Q: one?\nA: ", "1"), ("Q: two?\nA: ", "two"), ("Q: 3?\nA: ", "three of them")]


def jsonl(path, rows=ROWS):
    path.write_text("".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in rows))
    return path


def txt(path, content="to be or not to be, that is the question\n"):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# Texts.


@pytest.mark.parametrize("content, read", [
    ("a\nb\n", "a\nb\n"),
    (b"\xef\xbb\xbfa\r\nb", "a\nb"),  # as Windows writes it
    ("naïve 😀 \u2028", "naïve 😀 \u2028"),
], ids=["plain", "from Windows", "not ASCII"])  # fmt: skip
def test_a_text_is_read_as_it_stands(tmp_path, content, read):
    assert read_text(txt(tmp_path / "a.txt", content)) == read


@pytest.mark.parametrize("content", [b"", b" \n\n", b"\xef\xbb\xbf"])
def test_an_empty_text_is_refused(tmp_path, content):
    with pytest.raises(ValueError, match=r"a\.txt is empty"):
        load_data(txt(tmp_path / "a.txt", content), CHARACTERS, 16)


def test_bytes_that_are_no_utf8_are_refused_with_their_position(tmp_path):
    with pytest.raises(ValueError, match=r"a\.txt: byte 4 \(0xe9\) is not UTF-8 .*save the file as UTF-8"):
        read_text(txt(tmp_path / "a.txt", b"cafe\xe9 au lait"))


def test_a_text_is_tokenised_whole(tmp_path):
    content = "to be or not to be, that is the question\n"
    found = load_data(txt(tmp_path / "a.txt", content), CHARACTERS, 16)
    assert found.ids.tolist() == characters.encode(content).tolist() and found.length == 16
    assert str(found) == "41 tokens, in stretches of 16"


@pytest.mark.parametrize("context, length, used", [(16, None, 16), (300, None, 256), (300, 5, 5), (300, 300, 300)])
def test_the_length_of_the_stretches_is_the_one_asked_for_or_what_fits_up_to_256(tmp_path, context, length, used):
    assert load_data(txt(tmp_path / "a.txt", "ab" * 200), CHARACTERS, context, length).length == used


def test_a_length_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="length 17 does not fit in the model's context of 16"):
        load_data(txt(tmp_path / "a.txt"), CHARACTERS, 16, 17)


def test_a_text_too_short_is_refused_with_its_tokens(tmp_path):
    with pytest.raises(ValueError, match="8 tokens hold no stretch of 8 .*; use more text or a smaller length"):
        load_data(txt(tmp_path / "a.txt", "12345678"), CHARACTERS, 16, 8)


def test_a_character_unknown_to_the_tokenizer_is_named_with_its_file(tmp_path):
    with pytest.raises(ValueError, match=r"a\.txt: .*'é'"):
        load_data(txt(tmp_path / "a.txt", "caf\u00e9 " * 9), CHARACTERS, 16)


@given(st.text(alphabet="ab .'\n\t\x0b\x1c\u00a0\u2028é😀", max_size=60))
def test_a_text_in_pieces_has_the_tokens_of_the_whole(bpe_folder, content):
    bpe = load_tokenizer(bpe_folder)
    content += "The quick brown\nfox jumps.\n\nOver\nthe"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "PIECE", 1)
        pieces = text._pieces(content)
    assert "".join(pieces) == content and len(pieces) > 2
    ids = np.concatenate([bpe.encode(piece) for piece in pieces])
    assert ids.tolist() == bpe.encode(content).tolist()


def test_a_tokenizer_that_may_not_be_cut_is_given_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "PIECE", 1)
    path, given_ = txt(tmp_path / "a.txt", "ab\ncd\nef\ngh\n"), []
    for cuttable in (True, False):
        seen = lambda part: given_.append(part) or characters.encode(part)
        load_data(path, Tokenizer(seen, characters.decode, 0, 96, cuttable), 4)
    assert given_ == ["ab", "\ncd", "\nef", "\ngh\n", "ab\ncd\nef\ngh\n"]


# Questions.


def test_each_line_is_a_prompt_and_an_answer(tmp_path):
    rows = [*ROWS, (" leading", " \n\u2028 é")]
    assert read_pairs(jsonl(tmp_path / "a.jsonl", rows)) == rows
    assert read_pairs(txt(tmp_path / "b.jsonl", b'{"answer": "1",\t"prompt": "one"}\r\n{"prompt": "2", "answer": "3"}')
                      ) == [("one", "1"), ("2", "3")]  # fmt: skip


@pytest.mark.parametrize("line, told", [
    ("{'prompt'}", "is not JSON"),
    ("", "is not JSON (a blank line)"),
    ('{"prompt": "a", "answer": "b"} x', "is not JSON"),
    ("[" * 100_000, "is not JSON"),
    ('["a", "b"]', "holds list"),
    ('"a"', "holds str"),
    ('{"prompt": "a"}', "holds ['prompt']"),
    ('{"prompt": "a", "answer": "b", "id": "c"}', "holds ['answer', 'id', 'prompt']"),
    ('{"prompt": "a", "prompt": "b", "answer": "c"}', "a key is there twice: ['prompt', 'prompt', 'answer']"),
    ('{"prompt": 1, "answer": "b"}', "prompt must be a text that is not empty, got 1"),
    ('{"prompt": "a", "answer": null}', "answer must be a text that is not empty, got None"),
    ('{"prompt": "", "answer": "b"}', "prompt must be a text that is not empty, got ''"),
    ('{"prompt": "a", "answer": ""}', "answer must be a text that is not empty, got ''"),
], ids=lambda part: part[:40])  # fmt: skip
def test_a_line_that_is_no_pair_is_refused_with_its_number(tmp_path, line, told):
    good = '{"prompt": "a", "answer": "b"}\n'
    path = txt(tmp_path / "a.jsonl", f"{good}{line}\n{good}")
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 2.*{re.escape(told)}") as caught:
        load_data(path, CHARACTERS, 16)
    assert 'one line is {"prompt": "...", "answer": "..."}' in str(caught.value)


def test_an_empty_file_of_pairs_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a\.jsonl is empty"):
        load_data(txt(tmp_path / "a.jsonl", "\n\n"), CHARACTERS, 16)


def test_prompts_and_answers_are_tokenised_apart_and_answers_end(bpe_folder, tmp_path):
    """Together, "The" and " quick" could share a token, which a model that is given the prompt alone never sees."""
    bpe = load_tokenizer(bpe_folder)
    rows = [("The qui", "ck brown"), ("\n", " fox")]
    (found,) = load_data(jsonl(tmp_path / "a.jsonl", rows), bpe, 64).once(9)
    for (prompt, answer), inputs, targets in zip(rows, *found, strict=True):
        p, a = bpe.encode(prompt).tolist(), [*bpe.encode(answer).tolist(), bpe.end]
        assert inputs[: len(p + a) - 1].tolist() == (p + a)[:-1]
        assert targets[targets != IGNORE].tolist() == a and (targets[: len(p) - 1] == IGNORE).all()
    assert bpe.encode("The quick brown").tolist() != [*bpe.encode("The qui"), *bpe.encode("ck brown")]


def test_rows_longer_than_the_context_are_refused_with_their_lines_and_lengths(tmp_path):
    rows = [("1234", "567"), ("12345", "678"), ("1", "2"), ("1" * 20, "2")]
    assert load_data(jsonl(tmp_path / "a.jsonl", rows[:1]), CHARACTERS, 7).once(1)[0][0].shape == (1, 7)
    with pytest.raises(ValueError, match=r"2 rows are longer .* context of 7 tokens: line 2 \(8\), line 4 \(21\); sh"):
        load_data(jsonl(tmp_path / "a.jsonl", rows), CHARACTERS, 7)


def test_a_character_unknown_in_a_row_is_named_with_its_line(tmp_path):
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: .*'é'"):
        load_data(jsonl(tmp_path / "a.jsonl", [("a", "b"), ("a", "é")]), CHARACTERS, 16)


def test_half_a_character_is_refused_with_its_line(bpe_folder, tmp_path):
    path = txt(tmp_path / "a.jsonl", '{"prompt": "a", "answer": "\\ud800"}')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: the tokenizer does not take"):
        load_data(path, load_tokenizer(bpe_folder), 16)


def test_a_length_for_pairs_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"length 8 is for \.txt files"):
        load_data(jsonl(tmp_path / "a.jsonl"), CHARACTERS, 64, 8)


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a", "a.TXT"])
def test_another_kind_of_file_is_refused_with_the_two_that_are_taken(tmp_path, name):
    with pytest.raises(ValueError, match=r"a \.txt file, UTF-8, or a \.jsonl file of prompts and answers"):
        load_data(txt(tmp_path / name), CHARACTERS, 16)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.txt"):
        load_data(tmp_path / "none.txt", CHARACTERS, 16)


# Held out.


@given(st.integers(20, 60), st.sampled_from([0.2, 0.25, 0.5]))
def test_of_a_text_the_last_stretch_is_held_out(n, fraction):
    learned, heldout = Text(np.arange(n), 3).split(fraction, None)
    assert np.concatenate([learned.ids, heldout.ids]).tolist() == list(range(n))
    assert len(heldout.ids) == round(fraction * n) and learned.length == heldout.length == 3


def numbered(n):
    return Pairs(tuple((np.array([i]), np.array([i])) for i in range(n)))


def seen_in(rows, batch=1):
    return Counter(int(row[0]) for inputs, _ in rows.once(batch) for row in inputs)


@given(st.integers(4, 30), st.sampled_from([0.2, 0.5]), st.integers(0, 99))
def test_of_pairs_a_random_share_is_held_out_and_none_is_lost(n, fraction, seed):
    learned, heldout = numbered(n).split(fraction, np.random.default_rng(seed))
    assert seen_in(learned, 3) + seen_in(heldout, 2) == Counter(range(n))
    assert len(heldout.pairs) == round(fraction * n)


def test_the_seed_decides_which_pairs_are_held_out():
    held = lambda seed: tuple(seen_in(numbered(30).split(0.3, np.random.default_rng(seed))[1]))
    assert held(0) == held(0) and len({held(seed) for seed in range(5)}) == 5


def test_nothing_held_out_is_none():
    for rows in (Text(np.arange(9), 3), numbered(3)):
        assert rows.split(0, np.random.default_rng(0)) == (rows, None)


@pytest.mark.parametrize("rows, fraction, told", [
    (numbered(3), 0.1, "3 lines to train on and 0 held out"),
    (numbered(3), 0.9, "0 lines to train on and 3 held out"),
    (Text(np.arange(20), 3), 0.1, "18 tokens to train on and 2 held out: 2 tokens hold no stretch of 3"),
    (Text(np.arange(20), 3), 0.9, "2 tokens to train on and 18 held out: 2 tokens hold no stretch of 3"),
], ids=["no line held out", "no line to learn", "nothing to measure", "nothing to learn"])  # fmt: skip
def test_a_side_that_would_be_empty_is_refused_with_the_counts(rows, fraction, told):
    with pytest.raises(ValueError, match=told):
        rows.split(fraction, np.random.default_rng(0))


def test_fewer_lines_than_a_batch_are_refused_before_the_first_is_asked_for():
    with pytest.raises(ValueError, match="3 lines to train on do not make one batch of 4"):
        numbered(3).batches(4, np.random.default_rng(0))


def test_a_fingerprint_tells_tokens_and_the_ends_of_sides_apart():
    pairs = [Pairs(((np.array(p), np.array(a)),)) for p, a in (([1, 2], [3]), ([1], [2, 3]), ([1], [23]))]
    texts = [Text(np.array(ids), 1) for ids in ([1, 2], [2, 1])]
    assert len({rows.fingerprint() for rows in pairs + texts}) == 5
    assert str(pairs[0]) == "1 prompts of 2 tokens, with answers of 1"
