"""The vocabulary of 96 characters: there and back, and what is outside it."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.disk.characters import ALPHABET, decode, encode, encode_pairs


@given(st.text(alphabet=ALPHABET, max_size=40))
def test_decoding_gives_the_text_back(text):
    ids = encode(text)
    assert decode(ids) == text
    assert all(0 <= i < 96 for i in ids)


def test_the_newline_is_token_zero_and_there_are_96_characters():
    assert decode([0]) == "\n"
    assert len(ALPHABET) == 96
    assert len(set(ALPHABET)) == 96


@pytest.mark.parametrize("character", ["é", "\t", "字"])
def test_a_character_outside_the_vocabulary_is_named(character):
    with pytest.raises(ValueError, match=re.escape(repr(character))):
        encode("ab" + character)


def test_of_a_pair_each_side_is_encoded():
    [(prompt, answer)] = encode_pairs([("Q: 1?", "one\n")])
    assert decode(prompt) == "Q: 1?"
    assert decode(answer) == "one\n"
