"""The program for a GPU: its phases, time and verdicts on made-up numbers, its programs on models of no size."""

import importlib.util
import json
import sys
import time
from pathlib import Path

import gpu
import numpy as np
import pytest
from compared import on_gpu, rounds
from compared.inputs import write_inputs
from compared.llm_inputs import write_inputs as write_llama

ROOT = Path(__file__).resolve().parent.parent
COMPARED = [(size, task) for size in gpu.WORKLOADS for task in ("step", "generate")]
WRITE = {"small": write_inputs, "350M": write_inputs, "smollm2": write_llama}


def task_of(size, task):
    return "generate" if task == "generate" else "all-linear" if size == "smollm2" else "lora"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """The folder of the inputs of a size of no size."""
    folders = {}

    def of(size):
        if size not in folders:
            folders[size] = tmp_path_factory.mktemp(size)
            WRITE[size](gpu.QUICK_WORKLOADS[size], folders[size], 0)
        return folders[size]

    return of


# 1. The shapes are those of the models whose names they have.


def parameters(size):
    work = gpu.WORKLOADS[size]
    linears = sum(n_in * n_out for n_in, n_out in work.linears().values())
    if size == "smollm2":
        return work.layers * (linears + 2 * work.width) + work.width + work.vocabulary * work.width
    biases = sum(n_out for _, n_out in work.linears().values())
    positions = 1024 * work.width
    return work.layers * (linears + biases + 4 * work.width) + 2 * work.width + work.vocabulary * work.width + positions


def test_the_shapes_have_as_many_numbers_as_the_models():
    assert {size: parameters(size) for size in gpu.WORKLOADS} == {
        "small": 124_439_808, "350M": 354_823_168, "smollm2": 134_515_008,
    }  # fmt: skip
    assert {(work.batch, work.T, work.r, work.new) for work in gpu.WORKLOADS.values()} == {(8, 256, 8, 64)}


# 2. Without a GPU, and how a run goes on.


@pytest.fixture
def no_gpu_needed(monkeypatch, tmp_path):
    """A pretended GPU, and results in a file of the test."""
    for name in ("CUPY_NVRTC_USE_PCH", "CUPY_CACHE_DIR", "PYTHONPATH"):
        # They are set back when the test is over.
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(gpu, "described_gpu", lambda: {"name": "pretended"})
    file = tmp_path / "out.json"

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--json", str(file), *options])
        gpu.main()
        return json.loads(file.read_text(encoding="utf-8"))

    return run


def test_without_a_gpu_it_says_so_in_one_line_and_writes_nothing(monkeypatch, tmp_path, capsys):
    def none_here(name):
        raise ImportError("no such device")

    monkeypatch.setenv("CUPY_NVRTC_USE_PCH", "")
    monkeypatch.setattr(gpu, "array_module", none_here)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--json", str(tmp_path / "out.json")])
    with pytest.raises(SystemExit) as end:
        gpu.main()
    said = capsys.readouterr()
    assert (end.value.code, said.out) == (2, "") and list(tmp_path.iterdir()) == []
    assert said.err == "gpu.py: this needs CuPy and an NVIDIA GPU: no such device\n"


def test_a_phase_that_fails_costs_no_other_one(monkeypatch, no_gpu_needed, capsys):
    def fails(running, phase, args, deadline):
        raise gpu.Failed("it fell over")

    phases = {"one": gpu.Phase(fails, 50), "two": gpu.Phase(lambda *given: {"output": ["12 passed"]}, 50)}
    monkeypatch.setattr(gpu, "PHASES", phases)
    kept = no_gpu_needed()
    assert [(each["phase"], each["why_failed"]) for each in kept["results"]] == [("one", "it fell over"), ("two", "")]
    assert kept["machine"]["gpu"] == {"name": "pretended"}
    assert kept["machine"]["versions"].keys() >= {"minilora", "numpy"}
    said = capsys.readouterr().out
    assert "one failed: it fell over" in said and "12 passed" in said


def test_a_phase_is_told_what_time_is_left_and_left_out_if_it_is_too_little(monkeypatch, no_gpu_needed):
    left = []

    def note(running, phase, args, deadline):
        left.append(deadline - time.monotonic())
        return {"output": ["done"]}

    monkeypatch.setattr(gpu, "PHASES", {"short": gpu.Phase(note, 20), "long": gpu.Phase(note, 500)})
    no_gpu_needed("--budget", "100")
    assert left[0] <= 20 and 20 < left[1] <= 100
    kept = no_gpu_needed("--budget", "10")
    assert all(each["why_failed"].endswith("seconds were left") for each in kept["results"]) and len(left) == 2


def test_the_phases_take_less_than_eight_minutes_whatever_happens():
    # What has begun ends at the deadline; the rest is a start of Python.
    assert gpu.BUDGET <= 8 * 60 - 10
    assert list(gpu.PHASES)[:3] == ["tests", "small", "350M"]


def test_a_command_that_takes_too_long_is_ended():
    with pytest.raises(gpu.Failed, match="its time was over"):
        gpu.run_command([sys.executable, "-c", "import time; time.sleep(60)"], time.monotonic() + 0.1)
    status, lines = gpu.run_command([sys.executable, "-c", "print('a'); print(); exit(3)"], time.monotonic() + 50)
    assert (status, lines) == (3, ["a"])


MISSING = "E   ModuleNotFoundError: No module named 'gguf'"


@pytest.mark.parametrize("status, lines, says", [
    (0, ["== 3 passed in 1s =="], None),
    (1, [MISSING, "== 3 passed, 1 error in 1s =="], None),
    (1, ["== 1 failed, 3 passed in 1s =="], "status 1: 1 failed, 3 passed in 1s"),
    (1, [MISSING, "== 1 failed, 3 passed, 1 error in 1s =="], "1 failed"),
    (1, ["== 3 passed, 1 error in 1s =="], "1 error"),
    (2, [MISSING, "!! Interrupted !!", "== no tests ran in 1s =="], "no tests ran"),
    (4, [], "printed nothing"),
])  # fmt: skip
def test_the_tests_pass_if_no_test_fails_even_where_a_file_cannot_be_imported(status, lines, says):
    if says is None:
        summary = gpu.verdict_of_tests(status, lines)["output"][-1]
        assert "3 passed" in summary and ("not installed: gguf" in summary) == (MISSING in lines)
    else:
        with pytest.raises(gpu.Failed, match=says):
            gpu.verdict_of_tests(status, lines)


# 3. Ratios and verdicts, of made-up numbers.


def an_outcome():
    each = {"minilora": 2.0, "minilora-tf32": 1.0, "transformers": 4.0, "transformers-tf32": 1.0}
    memory = {label: {"start": 1, "peak": 1, "device": {"allocated": 10 + i, "reserved": 20}}
              for i, label in enumerate([*each, "lost"])}  # fmt: skip
    return {"rounds": [each, {**each, "minilora": 3.0}, {**each, "minilora": 9.0}], "memory": memory,
            "foreign": [None] * 3, "failed": {"lost": "why"}, "losses": {}, "same_tokens": {}}  # fmt: skip


def test_ours_is_put_over_theirs_in_the_same_precision_round_by_round(capsys):
    phase, outcome = gpu.PHASES["small"], an_outcome()
    rows = gpu.rows_of(outcome, outcome["rounds"], 2048)
    assert [row["library"] for row in rows] == list(outcome["rounds"][0])
    assert (rows[0]["seconds"], rows[0]["tokens_per_s"], rows[0]["allocated"]) == (3.0, 2048 / 3, 10)
    over = gpu.ratios_of(phase, outcome["rounds"], rows)
    assert over == [
        ["time, over transformers", 0.75, 1.0], ["memory, over transformers", 10 / 12, 0.8],
        ["time, over transformers-tf32", 1.0, None], ["memory, over transformers-tf32", 11 / 13, None],
    ]  # fmt: skip
    alone = [row for row in rows if row["library"].startswith("minilora")]
    assert gpu.ratios_of(phase, outcome["rounds"], alone) == []
    gpu.print_tables([{"size": "small", "task": "lora", "why_failed": "", "rows": rows, "over": over}])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.endswith("0.75  1.00: holds") for line in lines)
    assert any(line.endswith("0.83  0.80: does not hold") for line in lines)


def test_what_a_phase_lost_is_told(monkeypatch):
    assert gpu.last_words({"failed": {"lost": "why"}}) == "without lost: why"
    assert gpu.last_words({"failed": {}}) == "measured"


def test_no_target_is_set_for_what_none_was_aimed_at():
    outcome = an_outcome()
    rows = gpu.rows_of(outcome, outcome["rounds"], 1)
    targets = lambda phase: [target for _, _, target in gpu.ratios_of(gpu.PHASES[phase], outcome["rounds"], rows)]
    assert targets("350M") == [0.9, 0.8, None, None] and targets("smollm2") == [None, 0.8, None, None]
    assert set(targets("small-writes")) == {None}


# 4. The programs.


def on_the_host(size, task, alone=False):
    chosen = gpu.programs(size, task_of(size, task), alone)
    return [program._replace(device="cpu") for program in chosen]


@pytest.mark.parametrize("size, task", [pair for pair in COMPARED if pair[0] != "350M"])
def test_the_libraries_compute_the_same(size, task, inputs):
    """On the host: what differs on a GPU is the device alone."""
    missing = [name for name in gpu.PEERS if not importlib.util.find_spec(name)]
    if missing:
        pytest.skip(f"{missing[0]} is not here: pip install -e '.[peers]'")
    outcome = rounds.measure_in_turns(on_the_host(size, task), inputs(size), 1, rounds=1, seconds=0.01)
    assert outcome["failed"] == {} and set(outcome["same_tokens"].values()) <= {True}
    pairs = gpu.PAIRS["generate" if task == "generate" else "step"]
    assert set(outcome["rounds"][0]) == {label for pair in pairs for label in pair}
    assert len(outcome["losses"]) == (0 if task == "generate" else 4)


def test_minilora_is_measured_alone_where_the_others_are_not_installed():
    for size, task in COMPARED:
        assert {program.label for program in on_the_host(size, task, alone=True)} <= {"minilora", "minilora-tf32"}


def test_when_time_is_over_whatever_runs_is_ended_and_says_so(inputs):
    chosen = on_the_host("small", "step", alone=True)
    outcome = rounds.measure_in_turns(chosen, inputs("small"), 1, 1, 0.01, deadline=time.monotonic())
    assert set(outcome["failed"].values()) == {"its time was over"} and outcome["rounds"] == [{}]


def test_there_is_no_round_that_would_end_after_the_deadline(inputs, monkeypatch):
    class NoTimer:
        def __init__(self, *given):
            self.start = self.cancel = lambda: None

    monkeypatch.setattr(rounds.threading, "Timer", NoTimer)
    chosen = on_the_host("small", "step", alone=True)[:1]
    outcome = rounds.measure_in_turns(chosen, inputs("small"), 1, 50, 0.01, deadline=time.monotonic())
    assert outcome["failed"] == {} and len(outcome["rounds"]) == 1


@pytest.mark.cupy
@pytest.mark.parametrize("size, task", [("small", "step"), ("smollm2", "generate")])
def test_on_a_gpu_the_memory_of_a_unit_is_told(size, task, inputs):
    pytest.importorskip("cupy")
    chosen = gpu.programs(size, task_of(size, task), alone=True)
    outcome = rounds.measure_in_turns(chosen, inputs(size), 1, rounds=1, seconds=0.01)
    assert outcome["failed"] == {}
    for memory in outcome["memory"].values():
        assert 0 < memory["device"]["allocated"] <= memory["device"]["reserved"]


@pytest.mark.cupy
def test_the_memory_of_a_unit_is_the_most_that_is_in_use_at_a_time():
    cupy = pytest.importorskip("cupy")
    pool = cupy.get_default_memory_pool()
    kept = cupy.zeros(1 << 20, np.uint8)

    def unit():
        for _ in range(3):
            two = cupy.zeros(2 << 20, np.uint8)
            one = cupy.zeros(1 << 20, np.uint8)
            del two, one

    assert on_gpu.peak_memory(unit)["allocated"] == pool.used_bytes() + 3 * (1 << 20) and kept.size


# 5. The pages.


def test_the_page_says_that_no_gpu_has_been_measured_as_long_as_no_results_are_kept():
    page = " ".join((ROOT / "examples" / "gpu.md").read_text(encoding="utf-8").split())
    assert ("No GPU has been measured yet" in page) == (not gpu.RESULTS.exists())
