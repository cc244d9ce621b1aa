"""A text as it grows: what comes out is certain, and together it is what the ids say, up to a stop."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minilora.cli.text_stream import TextStream
from minilora.disk.tokenizer import load_tokenizer

LETTERS = "ab\n"


class Letters:
    """A tokenizer of whole texts: token i is TEXTS[i]; 9 and 8 end a text, 10 is unknown."""

    TEXTS = ["a", "b", "ab", "ba", "aab", "\n", "abab", "bb"]
    ends = (9, 8)
    vocab_size = 10

    def stream(self, after):
        return self

    def push(self, token):
        return self.TEXTS[token]

    def finish(self):
        return ""


def streamed(tokenizer, ids, stops=()):
    """(the pieces that came out, the TextStream) of ids, of which none follows the end."""
    stream = TextStream(tokenizer, stops)
    pieces = []
    for id_ in ids:
        pieces.append(stream.push(id_))
        if stream.ended:
            break
    pieces.append(stream.finish())
    return pieces, stream


texts_of_letters = st.text(LETTERS, min_size=1, max_size=4)


@given(st.lists(st.integers(0, 7), max_size=12), st.lists(texts_of_letters, max_size=3))
@example([0, 5, 0], ["\n", "a\na"])
def test_a_text_ends_before_the_first_stop_in_it_wherever_tokens_begin(ids, stops):
    """With the first token that completes a stop, whatever longer stop a further token would have completed."""
    whole, places = "", []
    for i in ids:
        whole += Letters.TEXTS[i]
        places = [whole.find(stop) for stop in stops if stop in whole]
        if places:
            break
    pieces, stream = streamed(Letters(), ids, stops)
    assert "".join(pieces) == stream.text == whole[: min(places, default=len(whole))]
    assert stream.ended == bool(places)


def test_of_two_stops_in_one_token_the_first_ends_the_text():
    for stops in (["b", "a"], ["a", "b"]):
        pieces, stream = streamed(Letters(), [5, 4], stops)
        assert stream.text == "\n" and stream.ended


@given(st.lists(st.integers(0, 7), max_size=12), st.lists(texts_of_letters, max_size=3))
def test_what_comes_out_is_all_that_no_further_token_can_take_back(ids, stops):
    stream = TextStream(Letters(), stops)
    whole = ""
    for id_ in ids:
        stream.push(id_)
        whole += Letters.TEXTS[id_]
        if stream.ended:
            return
        held = whole.removeprefix(stream.text)
        assert stream.text + held == whole
        # If anything is held back, a stop begins with it; nothing shorter would do.
        beginnings = [whole[i:] for i in range(len(whole)) if any(stop.startswith(whole[i:]) for stop in stops)]
        assert held == max(beginnings, key=len, default="")


@pytest.mark.parametrize("end", Letters.ends)
def test_any_end_token_ends_a_text_and_shows_what_was_held_back(end):
    pieces, stream = streamed(Letters(), [2, 1, end, 0], ["bba"])
    assert pieces == ["a", "", "bb", ""] and stream.ended and stream.text == "abb"
    assert stream.push(0) == "" and stream.finish() == "" and stream.text == "abb"


def test_a_token_without_a_text_is_counted_and_left_out():
    pieces, stream = streamed(Letters(), [0, 10, 1, 12, 9])
    assert pieces == ["a", "", "b", "", "", ""] and (stream.unknown, stream.tokens) == (2, 4)


def test_a_character_comes_out_when_its_last_byte_has_come(bpe_folder):
    tokenizer = load_tokenizer(bpe_folder)
    text = "é 😀 中."
    ids = tokenizer.encode(text).tolist()
    pieces, stream = streamed(tokenizer, ids)
    assert "".join(pieces) == stream.text == text and len(ids) > len(text)
    assert all("\ufffd" not in piece for piece in pieces) and any("😀" in piece for piece in pieces)
    # Of a character that never ends there is a mark.
    cut = tokenizer.encode("a中").tolist()[:-1]
    pieces, stream = streamed(tokenizer, cut)
    assert stream.text == tokenizer.decode(np.array(cut)) and stream.text.startswith("a\ufffd") and pieces[0] == "a"
