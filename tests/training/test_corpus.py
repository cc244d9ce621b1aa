"""The corpus, its vocabulary, the questions and the batches made of them."""

import re
import socket
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.cli import questions
from minilora.disk import characters
from minilora.functional import IGNORE
from minilora.training.batches import consecutive_windows, pad_pairs, pair_batches, random_windows
from minilora.training.corpus import load_corpus

texts = st.text(alphabet=characters.ALPHABET, max_size=40)


@given(texts)
def test_decoding_gives_the_text_back(text):
    ids = characters.encode(text)
    assert characters.decode(ids) == text
    assert all(0 <= i < 96 for i in ids)


def test_the_newline_is_token_zero_and_there_are_96_characters():
    assert characters.decode([0]) == "\n"
    assert len(characters.ALPHABET) == len(set(characters.ALPHABET)) == 96


@pytest.mark.parametrize("character", ["é", "\t", "字"])
def test_a_character_outside_the_vocabulary_is_named(character):
    with pytest.raises(ValueError, match=re.escape(repr(character))):
        characters.encode("ab" + character)


@pytest.fixture(scope="module")
def corpus():
    return load_corpus()


def test_the_corpus_is_large_and_all_of_it_can_be_encoded(corpus):
    assert len(characters.encode(corpus.train)) > 100_000
    assert len(characters.encode(corpus.heldout)) > 5_000


def test_no_heldout_paragraph_is_trained_on_and_none_occurs_twice(corpus):
    train, heldout = corpus.train.split("\n\n"), corpus.heldout.split("\n\n")
    assert not set(train) & set(heldout)
    assert len(train) == len(set(train))


def test_the_corpus_is_the_same_each_time(corpus):
    assert load_corpus() == corpus


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


@given(st.integers(2, 20), st.integers(1, 5), st.integers(0, 2**32))
def test_a_window_and_its_targets_are_the_text_one_step_apart(length, batch, seed):
    text = np.arange(30)
    inputs, targets = next(random_windows(text, batch, length, np.random.default_rng(seed)))
    assert inputs.shape == targets.shape == (batch, length)
    assert (targets == inputs + 1).all()


def test_windows_reach_both_ends_of_the_text():
    stream = random_windows(np.arange(6), 64, 4, np.random.default_rng(0))
    inputs, targets = next(stream)
    assert inputs.min() == 0 and targets.max() == 5


def test_a_text_shorter_than_a_window_is_refused():
    with pytest.raises(ValueError, match=r"4 tokens .* 4 \+ 1"):
        next(random_windows(np.arange(4), 1, 4, np.random.default_rng(0)))


@pytest.mark.parametrize("batch", [0, -1])
def test_a_batch_of_no_windows_is_refused(batch):
    with pytest.raises(ValueError, match=f"at least 1, got {batch}"):
        next(random_windows(np.arange(9), batch, 4, np.random.default_rng(0)))


pairs = st.lists(st.tuples(texts.filter(bool), texts.filter(bool)), min_size=1, max_size=4)


@given(pairs)
def test_packing_puts_the_loss_on_the_answers_alone(pairs):
    inputs, targets = pad_pairs(characters.encode_pairs(pairs))
    for (prompt, answer), row_in, row_out in zip(pairs, inputs, targets, strict=True):
        n = len(prompt) + len(answer) - 1
        assert characters.decode(row_in[:n]) == (prompt + answer)[:-1]
        assert characters.decode(row_out[len(prompt) - 1 : n]) == answer
        assert (row_out[: len(prompt) - 1] == IGNORE).all() and (row_out[n:] == IGNORE).all()


@pytest.mark.parametrize("pairs", [[], [("a", "b"), ("a", "")], [("", "b")]], ids=["no pair", "answer", "prompt"])
def test_packing_nothing_is_refused(pairs):
    with pytest.raises(ValueError, match="no .* pairs, or an empty side"):
        pad_pairs(characters.encode_pairs(pairs))


def test_every_pair_comes_once_in_a_pass():
    pairs = [(f"Q{i} ", "a") for i in range(8)]
    stream = pair_batches(characters.encode_pairs(pairs), 4, np.random.default_rng(0))
    rows = np.concatenate([next(stream)[0], next(stream)[0]])
    assert sorted(characters.decode(row) for row in rows) == [prompt for prompt, _ in pairs]


def test_the_order_is_another_in_each_pass_and_for_each_generator():
    pairs, orders = [(f"Q{i} ", "a") for i in range(10, 42)], set()
    for seed in (0, 0, 1):
        stream = pair_batches(characters.encode_pairs(pairs), 32, np.random.default_rng(seed))
        orders |= {characters.decode(next(stream)[0]) for _ in range(3)}
    assert len(orders) == 6 and not any(order == "".join(prompt for prompt, _ in pairs) for order in orders)


def test_fewer_pairs_than_a_batch_are_refused():
    with pytest.raises(ValueError, match="1 pairs .* batch of 2"):
        next(pair_batches([([1], [2])], 2, np.random.default_rng(0)))


def test_packing_takes_the_tokens_of_any_vocabulary():
    inputs, targets = pad_pairs([(np.array([50_000, 7]), np.array([9, 50_256])), ([1], [2])])
    assert inputs.tolist() == [[50_000, 7, 9], [1, 0, 0]]
    assert targets.tolist() == [[IGNORE, 9, 50_256], [2, IGNORE, IGNORE]]


@given(st.integers(1, 30), st.integers(1, 7), st.integers(1, 3))
def test_stretches_go_once_through_the_text_and_leave_out_less_than_one(n, length, batch):
    if n < length + 1:
        with pytest.raises(ValueError, match=rf"text of {n} tokens .* {length} \+ 1"):
            next(consecutive_windows(np.arange(n), length, batch))
        return
    batches = list(consecutive_windows(np.arange(n), length, batch))
    targets = np.concatenate([t for _, t in batches]).reshape(-1)
    assert all(i.shape == t.shape and 1 <= len(i) <= batch and (t == i + 1).all() for i, t in batches)
    assert targets.tolist() == list(range(1, len(targets) + 1)) and n - 1 - len(targets) < length


def test_there_are_sixty_facts_in_twelve_trained_and_four_unseen_phrasings():
    facts = questions.PORTS | questions.VERDICTS | questions.DEFENCES
    assert len(facts) == 60
    assert len(questions.TRAINED) == 60 * 12
    assert len(questions.UNSEEN) == 60 * 4
    assert len(questions.NEVER_TOLD) == 8 * 16


def test_the_three_question_sets_share_no_question():
    prompts = [{prompt for prompt, _ in pairs} for pairs in (questions.TRAINED, questions.UNSEEN, questions.NEVER_TOLD)]
    assert [len(p) for p in prompts] == [720, 240, 128]
    assert not prompts[0] & prompts[1] and not prompts[0] & prompts[2] and not prompts[1] & prompts[2]


def test_no_answer_of_a_fact_never_told_is_the_answer_of_one_that_was():
    told = {answer for _, answer in questions.TRAINED + questions.UNSEEN}
    never = {answer for _, answer in questions.NEVER_TOLD}
    assert len(never) == 8 and not never & told


REGISTERED = {"dns": "domain", "smb": "microsoft-ds", "rdp": "ms-wbt-server", "postgres": "postgresql"}


@pytest.mark.parametrize("name", [*questions.PORTS, *questions.NEVER_TOLD_PORTS])
def test_a_port_is_the_one_this_machine_knows(name):
    try:
        port = socket.getservbyname(REGISTERED.get(name, name))
    except OSError:
        pytest.skip(f"this machine does not know {name}")
    assert (questions.PORTS | questions.NEVER_TOLD_PORTS)[name] == str(port)


def test_the_ports_that_machines_often_do_not_know_are_those_of_the_registry():
    ports = questions.PORTS | questions.NEVER_TOLD_PORTS
    assert [ports[name] for name in ("ssh", "dns", "https", "imap", "smb", "rdp", "redis", "gopher")] == [
        "22", "53", "443", "143", "445", "3389", "6379", "70"]  # fmt: skip


def test_questions_are_lower_case_and_answers_short_and_ended_by_a_newline():
    for prompt, answer in questions.TRAINED + questions.UNSEEN + questions.NEVER_TOLD:
        assert prompt[3:-3] == prompt[3:-3].lower() and prompt.startswith("Q: ") and prompt.endswith("\nA: ")
        assert answer.endswith("\n") and 2 <= len(answer) <= 25
        assert len(prompt) + 26 <= 128  # room for an answer in the demo's context
