"""The lines and tables of the demo, from models and numbers that are known: no line can flatter."""

import re

import numpy as np
import pytest
from strategies import learned

from minilora import GPT, GPTConfig, lora
from minilora.cli import demo_tables, questions
from minilora.count import ParameterReport
from minilora.disk import characters
from minilora.lora_config import LoRAConfig
from minilora.tensor import Tensor
from minilora.training.batches import answer_rows

CONFIG = GPTConfig(1, 4, 32, len(characters.ALPHABET), 128, positions="rope")
ALL = {"trained": questions.TRAINED, "unseen": questions.UNSEEN, "never": questions.NEVER_TOLD}


class Said:
    """Puts a question as itself, and answers what `said(question)` gives."""

    def __init__(self, said=None):
        self.said = said

    def pair(self, question, answer):
        return question, answer

    def answer(self, model, question):
        return self.said(question)


def cost(text):
    """{row: (weights, gradients, Adam, activations, together)}, in kB, of the table in `text`."""
    rows = re.findall(r"^ +(full fine-tuning|LoRA on [\w, ]+?) {2,}([\d, ]+)$", text, re.MULTILINE)
    return {name: tuple(int(n.replace(",", "")) for n in numbers.split()) for name, numbers in rows}


def merging(monkeypatch, merge, answers_differ):
    """What is printed of a merge: the change of logits, and what is said of the answers."""
    rng = np.random.default_rng(0)
    base = GPT(CONFIG, rng)
    adapted = lora.attach(base, learned(lora.init_adapter(base, LoRAConfig(4, 8, "all-linear"), rng)))
    asked, right = [("who?", "me"), ("why?", "so")], [True, False]

    def exact_match(model, pairs):
        assert model is merged and pairs == asked
        return [True, answers_differ]

    monkeypatch.setattr(demo_tables, "exact_match", exact_match)
    merged, probe, lines = merge(adapted), rng.integers(0, 96, (2, 8)), []
    demo_tables.merged_line(adapted, merged, Said(), asked, right, probe, lines.append)
    change, largest, answers = re.search(r"logit change (\S+) \(of (\d+)\), (.*) answers right", lines[0]).groups()
    assert float(largest) == round(np.abs(demo_tables.logits(adapted, probe)).max())
    return float(change), answers


def test_a_merge_changes_logits_by_rounding_alone_and_one_that_is_wrong_is_seen_to_be(monkeypatch):
    change, answers = merging(monkeypatch, lora.merge, answers_differ=False)
    assert 0 < change < 1e-3 and answers == "the same"
    wrong = lambda model: lora.merge(model).map_tensors(lambda t: Tensor(1.5 * t.data))
    change, answers = merging(monkeypatch, wrong, answers_differ=True)
    assert change > 0.1 and answers == "NOT the same"


def test_each_row_of_the_scores_is_scored_on_its_own_questions(monkeypatch):
    monkeypatch.setattr(demo_tables, "exact_match", lambda model, pairs: (model, pairs))
    assert demo_tables.scores("model", Said(), ALL) == {name: ("model", pairs) for name, pairs in ALL.items()}


def marks(right):
    """Scores of a model that is right about the questions in these shares."""
    return {name: [i < right[name] * len(pairs) for i in range(len(pairs))] for name, pairs in ALL.items()}


def after(right):
    """The lines of `after_table` for a model that is right about the questions in these shares."""
    lines = []
    demo_tables.after_table({name: [False] * 3 + [True] for name in ALL}, marks(right), lines.append)
    return lines


def test_the_table_has_the_shares_before_and_after_in_the_right_rows():
    lines = after({"trained": 1.0, "unseen": 0.5, "never": 0.0})
    assert lines[0].split() == ["[5/5]", "before", "after"]
    rows = [re.match(r" +(\D+?) +(\d+) % +(\d+) % +(#*)(.*)", line).groups() for line in lines[1:4]]
    assert rows == [
        ("phrasings it trained on", "25", "100", "#" * 20, ""),
        ("phrasings never seen", "25", "50", "#" * 10, ""),
        ("facts never told", "25", "0", "", "<- it was taught answers, not security"),
    ]


@pytest.mark.parametrize("trained, learnt", [(0.0, False), (0.5, False), (0.51, True)])
def test_what_it_was_never_told_is_remarked_on_only_where_it_has_learnt_what_it_was_told(trained, learnt):
    text = "\n".join(after({"trained": trained, "unseen": 0.0, "never": 0.0}))
    assert ("taught answers, not security" in text) is learnt
    assert ("it has not learnt them" in text) is not learnt


def test_a_sample_is_shown_with_its_standard_error_under_the_same_headings():
    lines = []
    before = {name: [False, False, False, True] * 12 for name in ALL}
    demo_tables.after_table(before, marks({"trained": 1, "unseen": 0.5, "never": 0}), lines.append, sampled=True)
    # A quarter of 48 before: sqrt(1/4 * 3/4 / 48). Half of 240 after: sqrt(1/4 / 240).
    assert re.fullmatch(r" +phrasings never seen +25 % ± 6\.2 +50 % ± 3\.2  #{10}", lines[2])
    assert " 100 % ± 0.0  ###" in lines[1] and lines[3].endswith("0 % ± 0.0     <- it was taught answers, not security")
    for words in (["before", "25 %"], ["after", "50 %"]):
        assert len({lines[0].index(words[0]) + len(words[0]), lines[2].index(words[1]) + len(words[1])}) == 1


def test_the_standard_error_of_a_share_is_that_of_a_binomial():
    draws = np.random.default_rng(0).random((4000, 50)) < 0.3
    mean = np.mean([demo_tables.standard_error(draw) for draw in draws])
    assert np.isclose(mean, draws.mean(axis=1).std(), rtol=0.05)


def test_an_answer_is_called_wrong_if_and_only_if_it_is():
    truths, lines = dict(questions.UNSEEN + questions.NEVER_TOLD), []
    known = {question for question, _ in questions.UNSEEN[:120]}
    asking = Said(lambda question: truths[question] if question in known else "42")
    demo_tables.shown_answers("model", asking, ALL, marks({"trained": 1, "unseen": 0.5, "never": 0})["unseen"],
                              lines.append)  # fmt: skip
    assert len(lines) == 5
    wrong = [re.fullmatch(r" +Q: (.*?) +A: 42   \(wrong: (.+)\)", line) for line in lines]
    assert [bool(match) for match in wrong] == [False, False, False, True, True]
    for match in wrong[3:]:
        assert truths[match[1]] == match[2]
    for line in lines[:3]:
        question, answer = re.fullmatch(r" +Q: (.*?) +A: (.*)", line).groups()
        assert truths[question] == answer


@pytest.mark.parametrize("said, verdict", [("22", ""), ("21", "   (wrong: 22)")])
def test_the_first_answer_is_called_wrong_only_where_it_is(said, verdict):
    lines = []
    demo_tables.first_answer("base", Said(lambda question: said), "ssh port?", "22", lines.append)
    assert lines == [f"      Q: ssh port?   A: {said}{verdict}"]


def test_the_costs_add_up(monkeypatch):
    monkeypatch.setattr(demo_tables, "parameter_report", lambda model: ParameterReport(1, 2, 10_000, 1_500_000))
    monkeypatch.setattr(demo_tables, "activation_bytes", lambda loss, model: 200_000)
    base, rng, lines = GPT(CONFIG, np.random.default_rng(0)), np.random.default_rng(0), []
    rows = answer_rows(characters.encode_pairs([("Q: a?\nA: ", "b\n")]))
    demo_tables.cost_table(base, base, rows, rng, lines.append)
    assert list(cost("\n".join(lines)).values()) == [(1500, 10, 20, 200, 1730)] * 3


def test_the_bytes_of_two_ways_to_train_are_those_of_their_models(monkeypatch):
    reports = {"base": ParameterReport(0, 5, 0, 500_000_000), "adapted": ParameterReport(1, 6, 10_000_000, 510_000_000)}
    monkeypatch.setattr(demo_tables, "parameter_report", reports.get)
    lines = []
    demo_tables.bytes_table("base", "adapted", lines.append)
    rows = [re.findall(r"[\d,]+$|[\d,]+(?= )", line) for line in lines[1:]]
    assert rows == [["500", "500", "1,000", "2,000"], ["510", "10", "20", "540"]]
