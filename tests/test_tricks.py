"""The ablations of examples/tricks.py: each switches one thing off, and changes the way and not the numbers."""

import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

import minilora.optim
from minilora import gradcheck, lean

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import tricks  # noqa: E402
from rivals import ablations, material, numpy_minilora  # noqa: E402
from rivals.ablations import ALL, NOISE, TRICKS  # noqa: E402
from rivals.worker import Unit  # noqa: E402
from rivals.workloads import PROMPT, Workload  # noqa: E402

NANO = Workload(layers=2, width=8, heads=2, T=8, batch=2, vocabulary=11, r=2, alpha=4)
EXACT = {NOISE, "freed memory kept", "no gradient for frozen weights", "Adam in blocks", "a cache that is made once"}
SWITCHES = [(name, task) for name, trick in TRICKS.items() for task in trick.tasks]


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    """What a worker gives to `prepare`, with one thread."""
    folder = tmp_path_factory.mktemp("nano")
    material.write(NANO, folder, 0)
    ids = np.load(folder / "ids.npy")
    return Unit(folder, ids[:, :-1], ids[:, 1:], ids.reshape(1, -1)[:, :PROMPT], 1)


@pytest.mark.parametrize("trick, task", SWITCHES)
def test_switching_a_trick_off_changes_the_way_and_not_the_numbers(monkeypatch, nano, trick, task):
    monkeypatch.setattr(numpy_minilora, "keep_freed_memory", lambda: True)  # not in the tests' own process
    for place, name, size in ((lean, "QUERY_BLOCK", 3), (lean, "LOGIT_ROWS", 5), (minilora.optim, "BLOCK", 16)):
        monkeypatch.setattr(place, name, size)  # so that there are blocks
    on = [run() for run in [ablations.prepare(task, "", nano)] for _ in range(3)]
    for place, name, _ in TRICKS[trick].off:
        monkeypatch.setattr(place, name, getattr(place, name))  # so that it is set back
    called = set()
    sys.setprofile(lambda frame, event, argument: called.add(frame.f_code))
    try:
        off = [run() for run in [ablations.prepare(task, trick, nano)] for _ in range(3)]
    finally:
        sys.setprofile(None)
    # 1e-5 is a margin, of float32: 1e-7 was measured. No token is chosen by less than 0.05.
    assert off == (on if task == "generate" or trick in EXACT else pytest.approx(on, rel=1e-5))
    used = {name: getattr(place, name) for place, name, _ in TRICKS[trick].off}  # of two, the last
    for name, replacement in used.items():
        if isinstance(replacement, type):
            assert any(f.__code__ in called for f in vars(replacement).values() if hasattr(f, "__code__")), name
        elif callable(replacement):
            assert replacement.__code__ in called, name


def test_without_threads_a_step_is_one_part_on_all_cores(monkeypatch, nano):
    parts, made = [], numpy_minilora.PartWorkers
    monkeypatch.setattr(numpy_minilora, "keep_freed_memory", lambda: True)
    monkeypatch.setattr(numpy_minilora, "PartWorkers", lambda model, n, m: [parts.append(n), made(model, n, m)][1])
    monkeypatch.setattr(numpy_minilora, "IN_PARTS", numpy_minilora.IN_PARTS)  # so that it is set back
    for trick in ("", "parts of a batch on threads"):
        ablations.prepare("lora", trick, nano._replace(threads=2)).held.close()
    assert parts == [2, 1]


def test_all_of_them_are_all_of_those_that_a_training_step_has():
    lora = {off for name, trick in TRICKS.items() if "lora" in trick.tasks and name != ALL for off in trick.off}
    assert set(TRICKS[ALL].off) == lora and len(lora) > 8


def test_a_ratio_is_off_over_on_round_by_round_and_memory_the_difference():
    rounds = [{"all on": 1.0, "x": 2.0}, {"all on": 2.0, "x": 6.0}, {"all on": 9.0, "x": 9.0}, {"all on": 1.0, "x": 99}]
    memory = {"all on": {"start": 1, "peak": 50}, "x": {"start": 1, "peak": 80}, "dead": {"start": 1}}
    outcome = {"rounds": rounds, "foreign": [0.0, 0.0, 0.0, 0.5], "memory": memory, "failed": {"dead": "why"}}
    assert tricks.measure(outcome, ["all on", "x", "dead"]) == {"all on": (2.0, 1.0, 50, 0), "x": (6.0, 2.0, 80, 30)}


def test_each_trick_is_measured_in_each_of_its_tasks_beside_no_more_than_asked():
    args = Namespace(trick=list(TRICKS), at_once=3)
    found = list(tricks.groups(args))
    assert sorted((name, t) for t, names in found for name in names) == sorted(SWITCHES)
    assert max(len(names) for _, names in found) == 3
    alone = list(tricks.groups(Namespace(trick=[NOISE, ALL], at_once=3)))
    assert alone == [("lora", [NOISE, ALL])]


def test_the_gradient_of_the_gelu_with_a_power_is_the_derivative():
    gradcheck(ablations.gelu_power, np.random.default_rng(0).standard_normal((3, 4)))
