"""The corpus: large, of known characters, the same each time, and nothing of the held-out text in training."""

import hashlib
import sys

import pytest

from minilora.disk.characters import encode
from minilora.training.corpus import load_corpus


@pytest.fixture(scope="module")
def corpus():
    return load_corpus()


def test_the_corpus_is_large_and_all_of_it_can_be_encoded(corpus):
    assert len(encode(corpus.train)) > 100_000
    assert len(encode(corpus.heldout)) > 5_000


def test_no_heldout_paragraph_is_trained_on_and_none_occurs_twice(corpus):
    train = corpus.train.split("\n\n")
    heldout = corpus.heldout.split("\n\n")
    assert not set(train) & set(heldout)
    assert len(train) == len(set(train))
    assert len(heldout) == len(set(heldout))


def test_the_corpus_is_the_same_each_time(corpus):
    assert load_corpus() == corpus


def test_its_digest_is_of_both_texts(corpus):
    both = corpus.train + "\0" + corpus.heldout
    assert corpus.sha256 == hashlib.sha256(both.encode()).hexdigest()


def topics_of(monkeypatch, documents):
    """A pydoc_data.topics that holds `documents` alone, with enough text beside them."""
    filler = {f"topic {i:02d}": "\n\n".join(f"{i} {j} " + 90 * "x" for j in range(100)) for i in range(20)}
    module = type(sys)("pydoc_data.topics")
    module.topics = {**filler, **documents}
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", module)


def test_a_paragraph_of_both_sides_is_held_out_and_every_tenth_document_is(monkeypatch):
    # In the order of names, numbers 5 and 15 are held out.
    topics_of(monkeypatch, {"topic 05": "of five\n\nshared", "topic 15": "of five\n\nof fifteen", "topic 06": "shared"})
    corpus = load_corpus()
    assert corpus.heldout == "of five\n\nshared\n\nof fifteen"
    assert "shared" not in corpus.train
    assert corpus.train.startswith("0 0 xxx")


def test_characters_outside_the_alphabet_are_spelled_or_become_question_marks(monkeypatch):
    topics_of(monkeypatch, {"topic 00": "“don’t” → 5 ≤ 6 …\t字é"})
    assert load_corpus().train.startswith("\"don't\" -> 5 <= 6 ...    ??\n\n")


def test_without_topics_the_docstrings_are_read_instead(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    corpus = load_corpus()
    assert corpus.source == "docstrings"
    assert len(corpus.train) > 100_000


def test_without_any_text_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    monkeypatch.setattr("minilora.training.corpus._docstrings", dict)
    with pytest.raises(RuntimeError, match="install"):
        load_corpus()
