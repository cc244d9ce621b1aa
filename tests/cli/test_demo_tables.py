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

CONFIG = GPTConfig(1, 4, 32, len(characters.ALPHABET), 128, positions="rope")
ALL = {"trained": questions.TRAINED, "unseen": questions.UNSEEN, "never": questions.NEVER_TOLD}


def in_words(pairs):
    return [(characters.decode(prompt), characters.decode(answer)) for prompt, answer in pairs]


def cost(text):
    """{row: (weights, gradients, Adam, activations, together)}, in kB, of the table in `text`."""
    rows = re.findall(r"^ +(full fine-tuning|LoRA on [\w, ]+?) {2,}([\d, ]+)$", text, re.MULTILINE)
    return {name: tuple(int(n.replace(",", "")) for n in numbers.split()) for name, numbers in rows}


def merging(monkeypatch, merge, answers_differ):
    """What `merge_lines` prints of a merge: the change of logits, and what it says of the answers."""
    rng = np.random.default_rng(0)
    base = GPT(CONFIG, rng)
    adapted = lora.attach(base, learned(lora.init_adapter(base, LoRAConfig(4, 8, "all-linear"), rng)))
    merged = merge(adapted)
    monkeypatch.setattr(demo_tables, "merge", lambda model: merged)
    monkeypatch.setattr(demo_tables, "exact_match", lambda model, pairs: [answers_differ and model is merged])
    probe, lines = rng.integers(0, 96, (2, 8)), []
    demo_tables.merge_lines(base, adapted, probe, demo_tables.logits(base, probe), lines.append)
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
    monkeypatch.setattr(demo_tables, "exact_match", lambda model, pairs: (model, in_words(pairs)))
    assert demo_tables.scores("model") == {name: ("model", pairs) for name, pairs in ALL.items()}


def after(monkeypatch, right, said):
    """The lines of `after_table` for a model that is `right` about the questions in these shares, and says `said`."""
    marks = {name: [i < right[name] * len(pairs) for i in range(len(pairs))] for name, pairs in ALL.items()}
    monkeypatch.setattr(demo_tables, "scores", lambda model: marks)
    monkeypatch.setattr(demo_tables, "answer", lambda model, prompt: said(prompt))
    lines = []
    demo_tables.after_table("adapted", {name: [False] * 3 + [True] for name in ALL}, lines.append)
    return lines


def test_the_table_has_the_shares_before_and_after_in_the_right_rows(monkeypatch):
    lines = after(monkeypatch, {"trained": 1.0, "unseen": 0.5, "never": 0.0}, lambda prompt: "?")
    assert lines[0].split() == ["[5/5]", "before", "after"]
    rows = [re.match(r" +(\D+?) +(\d+) % +(\d+) % +(#*)(.*)", line).groups() for line in lines[1:4]]
    assert rows == [
        ("phrasings it trained on", "25", "100", "#" * 20, ""),
        ("phrasings never seen", "25", "50", "#" * 10, ""),
        ("facts never told", "25", "0", "", "<- it was taught answers, not security"),
    ]


@pytest.mark.parametrize("trained, learnt", [(0.0, False), (0.5, False), (0.51, True)])
def test_what_it_was_never_told_is_remarked_on_only_where_it_has_learnt_what_it_was_told(monkeypatch, trained, learnt):
    text = "\n".join(after(monkeypatch, {"trained": trained, "unseen": 0.0, "never": 0.0}, lambda prompt: "?"))
    assert ("taught answers, not security" in text) is learnt
    assert ("it has not learnt them" in text) is not learnt


def test_an_answer_is_called_wrong_if_and_only_if_it_is(monkeypatch):
    truths = dict(questions.UNSEEN + questions.NEVER_TOLD)
    known = {prompt for prompt, _ in questions.UNSEEN[:120]}
    said = lambda prompt: truths[prompt].strip() if prompt in known else "42"
    shown = after(monkeypatch, {"trained": 1.0, "unseen": 0.5, "never": 0.0}, said)[4:]
    assert len(shown) == 5
    wrong = [re.fullmatch(r" +(Q: .*?) +A: 42   \(wrong: (.+)\)", line) for line in shown]
    assert [bool(match) for match in wrong] == [False, False, False, True, True]
    for match in wrong[3:]:
        assert truths[f"{match[1]}\nA: "] == f"{match[2]}\n"
    for line in shown[:3]:
        question, answer = re.fullmatch(r" +(Q: .*?) +A: (.*)", line).groups()
        assert truths[f"{question}\nA: "] == f"{answer}\n"


def test_the_costs_add_up(monkeypatch):
    monkeypatch.setattr(demo_tables, "parameter_report", lambda model: ParameterReport(1, 2, 10_000, 1_500_000))
    monkeypatch.setattr(demo_tables, "activation_bytes", lambda loss, model: 200_000)
    base, rng, lines = GPT(CONFIG, np.random.default_rng(0)), np.random.default_rng(0), []
    demo_tables.cost_table(base, base, rng, lines.append)
    assert list(cost("\n".join(lines)).values()) == [(1500, 10, 20, 200, 1730)] * 3
