"""The questions of the demo: how many, that no set gives another away, and that the facts are facts."""

import socket
from itertools import combinations

import pytest

from minilora.cli.asking import LONGEST_ANSWER, Lines
from minilora.cli.questions import (
    DEFENCES,
    NEVER_TOLD,
    NEVER_TOLD_PORTS,
    PORTS,
    TRAINED,
    UNSEEN,
    VERDICTS,
    question_sets,
)

# {what this project calls a service: what the registry of ports calls it}, where the two differ.
REGISTERED = {"dns": "domain", "smb": "microsoft-ds", "rdp": "ms-wbt-server", "postgres": "postgresql"}


def test_there_are_sixty_facts_in_twelve_trained_and_four_unseen_phrasings():
    assert len(PORTS | VERDICTS | DEFENCES) == 60
    assert len(TRAINED) == 60 * 12
    assert len(UNSEEN) == 60 * 4
    assert len(NEVER_TOLD) == 8 * 16


def test_the_three_question_sets_share_no_question():
    prompts = [{prompt for prompt, _ in pairs} for pairs in (TRAINED, UNSEEN, NEVER_TOLD)]
    assert [len(questions) for questions in prompts] == [720, 240, 128]
    for one, other in combinations(prompts, 2):
        assert not one & other


def test_no_answer_of_a_fact_never_told_is_the_answer_of_one_that_was():
    answers = {answer for _, answer in TRAINED + UNSEEN}
    never_told_answers = {answer for _, answer in NEVER_TOLD}
    assert len(never_told_answers) == 8
    assert not never_told_answers & answers


@pytest.mark.parametrize("name", [*PORTS, *NEVER_TOLD_PORTS])
def test_a_port_is_the_one_this_machine_knows(name):
    try:
        port = socket.getservbyname(REGISTERED.get(name, name))
    except OSError:
        pytest.skip(f"this machine does not know {name}")
    assert (PORTS | NEVER_TOLD_PORTS)[name] == str(port)


@pytest.mark.parametrize("name, port", [
    ("ssh", "22"), ("dns", "53"), ("https", "443"), ("imap", "143"), ("smb", "445"), ("rdp", "3389"),
    ("redis", "6379"), ("gopher", "70"),
])  # fmt: skip
def test_the_ports_that_machines_often_do_not_know_are_those_of_the_registry(name, port):
    assert (PORTS | NEVER_TOLD_PORTS)[name] == port


def test_questions_are_lower_case_lines_and_answers_short():
    for question, answer in TRAINED + UNSEEN + NEVER_TOLD:
        assert question == question.lower()
        assert 1 <= len(answer) <= 24
        assert not set("\n") & set(question + answer)
        prompt, answer_ids = Lines().pair(question, answer)
        assert len(answer_ids) <= LONGEST_ANSWER
        # There is room for an answer in the context of the demo's model.
        assert len(prompt) + LONGEST_ANSWER <= 128


def test_the_sets_are_called_by_their_kinds():
    assert question_sets() == {"trained": TRAINED, "unseen": UNSEEN, "never": NEVER_TOLD}
