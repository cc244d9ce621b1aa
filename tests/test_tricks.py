"""The ablations of examples/tricks.py: each switches one thing off, and changes the way and not the numbers."""

import sys
from pathlib import Path

import numpy as np
import pytest
import tricks
from compared import ablations, numpy_minilora
from compared.ablations import ABLATIONS, ALL, NOISE
from compared.inputs import write_inputs
from compared.worker import read_job
from compared.workloads import Workload

import minilora.optim
from minilora import gradcheck, lean

ROOT = Path(__file__).resolve().parent.parent

NANO = Workload(layers=2, width=8, heads=2, T=8, batch=2, vocabulary=11, r=2, alpha=4)
# Those that change no bit.
EXACT = {NOISE, "freed memory kept", "no gradient for frozen weights", "Adam in blocks", "a cache that is made once"}
SWITCHES = [(name, task) for name, ablation in ABLATIONS.items() for task in ablation.tasks]


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    """What a worker gives to `prepare`, with one thread."""
    folder = tmp_path_factory.mktemp("nano")
    write_inputs(NANO, folder, 0)
    return read_job(folder, threads=1)


@pytest.fixture(autouse=True)
def memory_as_it_is(monkeypatch):
    """The tests' own process keeps its malloc."""
    monkeypatch.setattr(numpy_minilora, "keep_freed_memory", lambda: True)


def three_units(task, variant, job):
    run = ablations.prepare(task, variant, job)
    return [run() for _ in range(3)]


def code_that_runs(run):
    """(what run() returns, the code objects of all functions that it calls)."""
    called = set()
    sys.setprofile(lambda frame, event, argument: called.add(frame.f_code))
    try:
        return run(), called
    finally:
        sys.setprofile(None)


def code_of(replacement):
    """The code objects of a function, or of the methods of a class; none of a number."""
    functions = vars(replacement).values() if isinstance(replacement, type) else [replacement]
    return {f.__code__ for f in functions if hasattr(f, "__code__")}


@pytest.mark.parametrize("ablation, task", SWITCHES)
def test_an_ablation_changes_the_way_and_not_the_numbers(monkeypatch, nano, ablation, task):
    for module, name, size in ((lean, "QUERY_BLOCK", 3), (lean, "LOGIT_ROWS", 5), (minilora.optim, "BLOCK", 16)):
        monkeypatch.setattr(module, name, size)  # so that there are blocks
    on = three_units(task, "", nano)
    changes = ABLATIONS[ablation].changes
    for module, name, _ in changes:
        monkeypatch.setattr(module, name, getattr(module, name))  # so that it is set back
    off, called = code_that_runs(lambda: three_units(task, ablation, nano))
    # 1e-5 is a margin, of float32: 1e-7 was measured. No token is chosen by less than 0.05.
    assert off == (on if task == "generate" or ablation in EXACT else pytest.approx(on, rel=1e-5))
    in_force = {name: value for _, name, value in changes}  # of two values, the last
    for name, value in in_force.items():
        assert not callable(value) or code_of(value) & called, name


def test_without_threads_a_step_is_one_part_on_all_cores(monkeypatch, nano):
    made = []

    class NotedWorkers(numpy_minilora.PartWorkers):
        def __init__(self, model, parts, threads):
            made.append((parts, threads))
            super().__init__(model, parts, threads)

    monkeypatch.setattr(numpy_minilora, "PartWorkers", NotedWorkers)
    monkeypatch.setattr(numpy_minilora, "parts_and_threads", numpy_minilora.parts_and_threads)  # so that it is set back
    for ablation in ("", "parts of a batch on threads"):
        ablations.prepare("lora", ablation, nano._replace(threads=2)).resources.close()
    assert made == [(2, 2), (1, 1)]


def test_all_of_them_are_all_of_those_that_a_training_step_has():
    of_a_step = [ablation for name, ablation in ABLATIONS.items() if "lora" in ablation.tasks and name != ALL]
    changes = {change for ablation in of_a_step for change in ablation.changes}
    assert set(ABLATIONS[ALL].changes) == changes
    assert len(changes) > 8


def test_a_ratio_is_off_over_on_round_by_round_and_memory_the_difference():
    rounds = [{"all on": 1.0, "x": 2.0}, {"all on": 2.0, "x": 6.0}, {"all on": 9.0, "x": 9.0}, {"all on": 1.0, "x": 99}]
    memory = {"all on": {"start": 1, "peak": 50}, "x": {"start": 1, "peak": 80}, "dead": {"start": 1}}
    outcome = {"rounds": rounds, "foreign": [0.0, 0.0, 0.0, 0.5], "memory": memory, "failed": {"dead": "why"}}
    assert tricks.cost_of_each(outcome, ["all on", "x", "dead"]) == {
        "all on": (2.0, 1.0, 50, 0),
        "x": (6.0, 2.0, 80, 30),
    }


def test_each_ablation_is_measured_in_each_of_its_tasks_beside_no_more_than_asked():
    groups = list(tricks.groups(list(ABLATIONS), at_once=3))
    assert sorted((name, task) for task, names in groups for name in names) == sorted(SWITCHES)
    assert max(len(names) for _, names in groups) == 3
    assert list(tricks.groups([NOISE, ALL], at_once=3)) == [("lora", [NOISE, ALL])]
    assert [task for task, _ in tricks.groups([NOISE], at_once=3)] == ["lora", "full", "generate"]


def test_an_ablation_whose_process_ended_has_a_line_that_says_so():
    costs = {"all on": (0.002, 1.0, 50e6, 0), "x": (0.006, 2.0, 80e6, 30e6)}
    cells = [tricks.reference_cells(costs), tricks.ablation_cells(costs, "x"), tricks.ablation_cells(costs, "dead")]
    assert cells == [("2.0 ms", "50"), ("2.00", "+30"), ("ended", "")]
    heading = tricks.table_line("switched off", "task", [("tiny: time", "MB")])
    assert {len(tricks.table_line("x", "lora", [cell])) for cell in cells} == {len(heading)}


def test_the_gradient_of_the_gelu_with_a_power_is_the_derivative():
    gradcheck(ablations.gelu_power, np.random.default_rng(0).standard_normal((3, 4)))
