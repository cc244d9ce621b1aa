"""Texts and pairs as batches of tokens: what the loss is on, what is held out, and that nothing is left out."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.disk import characters
from minilora.disk.tokenizer import Tokenizer, load_tokenizer
from minilora.functional import IGNORE
from minilora.training import datasets
from minilora.training.datasets import Pairs, Text, load_data

CHARACTERS = Tokenizer(characters.encode, characters.decode, end=0, vocab_size=96, cuttable=True)


def txt(path, content="to be or not to be, that is the question\n"):
    path.write_text(content)
    return path


def jsonl(path, pairs):
    lines = [json.dumps({"prompt": prompt, "answer": answer}) + "\n" for prompt, answer in pairs]
    path.write_text("".join(lines))
    return path


# Texts.


def test_a_text_is_tokenised_whole(tmp_path):
    content = "to be or not to be, that is the question\n"
    text = load_data(txt(tmp_path / "a.txt", content), CHARACTERS, 16)
    assert text.ids.tolist() == characters.encode(content).tolist()
    assert text.length == 16
    assert str(text) == "41 tokens, in windows of 16"


@pytest.mark.parametrize("context, length, used", [(16, None, 16), (300, None, 256), (300, 5, 5), (300, 300, 300)])
def test_the_length_of_a_window_is_the_one_asked_for_or_what_fits_up_to_256(tmp_path, context, length, used):
    assert load_data(txt(tmp_path / "a.txt", "ab" * 200), CHARACTERS, context, length).length == used


def test_a_length_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="length 17 does not fit in the model's context of 16"):
        load_data(txt(tmp_path / "a.txt"), CHARACTERS, 16, 17)


def test_a_text_too_short_is_refused_with_its_tokens(tmp_path):
    too_few = "8 tokens are too few: a window needs 8 and the one after it; use more text or a smaller length"
    with pytest.raises(ValueError, match=too_few):
        load_data(txt(tmp_path / "a.txt", "12345678"), CHARACTERS, 16, 8)


def test_an_empty_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a\.txt is empty"):
        load_data(txt(tmp_path / "a.txt", " \n\n"), CHARACTERS, 16)


def test_a_character_unknown_to_the_tokenizer_is_named_with_its_file(tmp_path):
    with pytest.raises(ValueError, match=r"a\.txt: .*'é'"):
        load_data(txt(tmp_path / "a.txt", "café " * 9), CHARACTERS, 16)


@given(st.text(alphabet="ab .'\n\t\x0b\x1c\u00a0\u2028é😀", max_size=60))
def test_a_text_in_pieces_has_the_tokens_of_the_whole(bpe_folder, content):
    bpe = load_tokenizer(bpe_folder)
    content += "The quick brown\nfox jumps.\n\nOver\nthe"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "PIECE_LENGTH", 1)
        pieces = datasets._pieces(content)
    assert "".join(pieces) == content
    assert len(pieces) > 2
    ids = np.concatenate([bpe.encode(piece) for piece in pieces])
    assert ids.tolist() == bpe.encode(content).tolist()


@pytest.mark.parametrize("cuttable, pieces", [(True, ["ab", "\ncd", "\nef", "\ngh\n"]), (False, ["ab\ncd\nef\ngh\n"])])
def test_a_tokenizer_that_may_not_be_cut_is_given_the_whole(tmp_path, monkeypatch, cuttable, pieces):
    encoded = []

    def encode(piece):
        encoded.append(piece)
        return characters.encode(piece)

    monkeypatch.setattr(datasets, "PIECE_LENGTH", 1)
    tokenizer = Tokenizer(encode, characters.decode, 0, 96, cuttable)
    load_data(txt(tmp_path / "a.txt", "ab\ncd\nef\ngh\n"), tokenizer, 4)
    assert encoded == pieces


# Pairs.


def test_prompts_and_answers_are_tokenised_apart_and_answers_end(bpe_folder, tmp_path):
    """Together, "The" and " quick" could share a token, which a model that is given the prompt alone never sees."""
    bpe = load_tokenizer(bpe_folder)
    pairs = [("The qui", "ck brown"), ("\n", " fox")]
    [(inputs, targets)] = load_data(jsonl(tmp_path / "a.jsonl", pairs), bpe, 64).epoch(9)
    for (prompt, answer), input_row, target_row in zip(pairs, inputs, targets, strict=True):
        prompt_ids = bpe.encode(prompt).tolist()
        answer_ids = [*bpe.encode(answer).tolist(), bpe.end]
        n = len(prompt_ids) + len(answer_ids) - 1
        assert input_row[:n].tolist() == (prompt_ids + answer_ids)[:-1]
        assert target_row[target_row != IGNORE].tolist() == answer_ids
        assert (target_row[: len(prompt_ids) - 1] == IGNORE).all()
    assert bpe.encode("The quick brown").tolist() != [*bpe.encode("The qui"), *bpe.encode("ck brown")]


def test_rows_longer_than_the_context_are_refused_with_their_lines_and_lengths(tmp_path):
    pairs = [("1234", "567"), ("12345", "678"), ("1", "2"), ("1" * 20, "2")]
    longest = load_data(jsonl(tmp_path / "a.jsonl", pairs[:1]), CHARACTERS, 7)
    assert longest.epoch(1)[0][0].shape == (1, 7)
    with pytest.raises(ValueError, match="2 rows are longer than the model's context of 7 tokens; shorten") as refusal:
        load_data(jsonl(tmp_path / "a.jsonl", pairs), CHARACTERS, 7)
    assert str(refusal.value).splitlines()[1:] == ["  line 2 has 8", "  line 4 has 21"]


def test_of_many_rows_too_long_the_first_are_named_and_the_others_counted(tmp_path):
    with pytest.raises(ValueError, match=r"12 rows are longer(.*\n){8}.*line 8 has 3\n  \.\.\. and 4 more$"):
        load_data(jsonl(tmp_path / "a.jsonl", [("12", "3")] * 12), CHARACTERS, 2)


def test_a_character_unknown_in_a_row_is_named_with_its_line(tmp_path):
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: .*'é'"):
        load_data(jsonl(tmp_path / "a.jsonl", [("a", "b"), ("a", "é")]), CHARACTERS, 16)


def test_half_a_character_is_refused_with_its_line(bpe_folder, tmp_path):
    path = txt(tmp_path / "a.jsonl", '{"prompt": "a", "answer": "\\ud800"}')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: the tokenizer does not take"):
        load_data(path, load_tokenizer(bpe_folder), 16)


def test_a_line_that_is_no_pair_is_refused_with_its_number(tmp_path):
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1 holds list"):
        load_data(txt(tmp_path / "a.jsonl", "[]"), CHARACTERS, 16)


def test_a_length_for_pairs_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"length 8 is for \.txt files"):
        load_data(jsonl(tmp_path / "a.jsonl", [("a", "b")]), CHARACTERS, 64, 8)


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a", "a.TXT"])
def test_another_kind_of_file_is_refused_with_the_two_that_are_taken(tmp_path, name):
    with pytest.raises(ValueError, match=r"a \.txt file, UTF-8, or a \.jsonl file of prompts and answers"):
        load_data(txt(tmp_path / name), CHARACTERS, 16)


@pytest.mark.parametrize("name", ["none.txt", "none.jsonl"])
def test_a_file_that_is_not_there_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=name):
        load_data(tmp_path / name, CHARACTERS, 16)


# Held out.


@given(st.integers(20, 60), st.sampled_from([0.2, 0.25, 0.5]))
def test_of_a_text_the_end_is_held_out(n, fraction):
    train, heldout = Text(np.arange(n), 3).split(fraction, None)
    assert np.concatenate([train.ids, heldout.ids]).tolist() == list(range(n))
    assert len(heldout.ids) == round(fraction * n)
    assert train.length == heldout.length == 3


def numbered_pairs(n):
    """Pairs of which number i is the prompt [i] and the answer [i]."""
    return Pairs(tuple((np.array([i]), np.array([i])) for i in range(n)))


def numbers_in(pairs, batch=1):
    """How often each number comes in an epoch of numbered pairs."""
    return Counter(int(row[0]) for inputs, _ in pairs.epoch(batch) for row in inputs)


@given(st.integers(4, 30), st.sampled_from([0.2, 0.5]), st.integers(0, 99))
def test_of_pairs_a_random_share_is_held_out_and_none_is_lost(n, fraction, seed):
    train, heldout = numbered_pairs(n).split(fraction, np.random.default_rng(seed))
    assert numbers_in(train, 3) + numbers_in(heldout, 2) == Counter(range(n))
    assert len(heldout.pairs) == round(fraction * n)


def test_the_seed_decides_which_pairs_are_held_out():
    def heldout_numbers(seed):
        _, heldout = numbered_pairs(30).split(0.3, np.random.default_rng(seed))
        return tuple(numbers_in(heldout))

    assert heldout_numbers(0) == heldout_numbers(0)
    assert len({heldout_numbers(seed) for seed in range(5)}) == 5


@pytest.mark.parametrize("data", [Text(np.arange(9), 3), numbered_pairs(3)], ids=["text", "pairs"])
def test_nothing_held_out_is_none(data):
    assert data.split(0, np.random.default_rng(0)) == (data, None)


@pytest.mark.parametrize("data, fraction, complaint", [
    (numbered_pairs(3), 0.1, "3 lines to train on and 0 held out"),
    (numbered_pairs(3), 0.9, "0 lines to train on and 3 held out"),
    (Text(np.arange(20), 3), 0.1, "18 tokens to train on and 2 held out: 2 tokens are too few: a window needs 3"),
    (Text(np.arange(20), 3), 0.9, "2 tokens to train on and 18 held out: 2 tokens are too few: a window needs 3"),
], ids=["no line held out", "no line to learn", "nothing to measure", "nothing to learn"])  # fmt: skip
def test_a_side_that_would_be_empty_is_refused_with_the_counts(data, fraction, complaint):
    with pytest.raises(ValueError, match=complaint):
        data.split(fraction, np.random.default_rng(0))


def test_fewer_lines_than_a_batch_are_refused_before_the_first_is_asked_for():
    with pytest.raises(ValueError, match="3 lines to train on do not make one batch of 4"):
        numbered_pairs(3).batches(4, np.random.default_rng(0))


# What they are.


def one_pair(prompt, answer):
    return Pairs(((np.array(prompt), np.array(answer)),))


def test_a_fingerprint_tells_tokens_and_the_ends_of_sides_apart():
    pairs = [one_pair([1, 2], [3]), one_pair([1], [2, 3]), one_pair([1], [23])]
    texts = [Text(np.array([1, 2]), 1), Text(np.array([2, 1]), 1)]
    assert len({data.fingerprint() for data in pairs + texts}) == 5


def test_pairs_say_how_many_they_are():
    assert str(one_pair([1, 2], [3])) == "1 prompts of 2 tokens, with answers of 1"
