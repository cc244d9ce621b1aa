"""The benchmark of a language model: its arithmetic written out, and its processes on a Llama of no size."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import benchmark_llm
import numpy as np
import pytest
from compared import fresh, llm_workloads, report, rounds
from compared.llm_inputs import gguf_of, write_inputs
from compared.llm_workloads import LlmWorkload
from compared.rounds import Program

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

NANO = LlmWorkload(layers=2, width=8, inner=12, heads=2, kv_heads=1, head_dim=6, vocabulary=64, T=32, batch=2, r=2)
OURS = Program("minilora", "numpy_llama", "", "first-token")


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    """A folder with everything that a worker loads."""
    folder = tmp_path_factory.mktemp("nano")
    write_inputs(NANO, folder, 0)
    return folder


# 1. What a task needs, against the same products written out.


def written_out(task):
    """2 M N K summed over the products of NANO, each in its own line."""
    C, q, kv, inner, r, V = 8, 12, 6, 12, 2, 64
    N = 63 if task == "generate" else 64  # 32 + 32 tokens, of which the last is not read; else 2 x 32
    pairs = 63 * 64 // 2 if task == "generate" else 2 * 32 * 33 // 2
    n_logits = {"all-linear": 64, "answers": 2 * 8, "generate": 32}[task]
    once = lambda M, K, n: 2 * M * K * n
    inputs = once(N, C, q) + 2 * once(N, C, kv)
    others = once(N, q, C) + 2 * once(N, C, inner) + once(N, inner, C)
    attention, head = 2 * 2 * once(pairs, 6, 1), once(n_logits, C, V)
    if task == "generate":
        return 2 * (inputs + others + attention) + head
    shapes_of_inputs, shapes_of_others = [(C, q), (C, kv), (C, kv)], [(q, C), (C, inner), (C, inner), (inner, C)]
    B = lambda shapes: sum(3 * once(N, r, n_out) for _, n_out in shapes)  # forward, dB, and the gradient under it
    A = lambda shapes, times: sum(times * once(N, n_in, r) for n_in, _ in shapes)
    every_block = 2 * others + 3 * attention + B(shapes_of_others) + A(shapes_of_others, 3)
    first = inputs + B(shapes_of_inputs) + A(shapes_of_inputs, 2)  # no dx: the embedding is frozen
    second = 2 * inputs + B(shapes_of_inputs) + A(shapes_of_inputs, 3)
    return 2 * every_block + first + second + 2 * head


@pytest.mark.parametrize("task", ["all-linear", "answers", "generate"])
def test_the_count_of_operations_is_that_of_the_products_written_out(task):
    assert NANO.flops(task) == written_out(task)


def test_smollm2_has_the_numbers_that_its_name_says():
    work = llm_workloads.SMOLLM2
    linears = work.layers * sum(n_in * n_out for n_in, n_out in work.linears().values())
    norms = (2 * work.layers + 1) * work.width
    assert linears + norms + work.vocabulary * work.width == 134_515_008
    assert work.layers * sum(work.r * (n_in + n_out) for n_in, n_out in work.linears().values()) == 2_442_240


def test_the_loss_is_on_the_last_quarter_of_each_row():
    targets = np.arange(16).reshape(2, 8)
    assert llm_workloads.masked(targets).tolist() == [[-100] * 6 + [6, 7], [-100] * 6 + [14, 15]]
    assert targets[0, 0] == 0


# 2. Ratios.


def test_a_ratio_is_made_within_a_round():
    ratios = report.paired([{"a": 2.0, "b": 1.0}, {"a": 3.0, "b": 2.0}, {"a": 8.0, "b": 1.0}, {"a": 1.0}])
    assert ratios["a"] == {"a": 1.0, "b": 2.0} and ratios["b"]["a"] == 0.5
    assert report.paired([{"a": 1.0}, {"b": 1.0}]) == {"a": {"a": 1.0}, "b": {"b": 1.0}}


# 3. Processes that start and write one token.


def test_a_new_process_loads_and_writes_one_token(nano):
    found = fresh.first_tokens([OURS, OURS._replace(label="again")], nano, 1, rounds=2, cores=2)
    assert found["failed"] == {} and len(found["rounds"]) == len(found["foreign"]) == 2
    assert found["tokens"]["minilora"] == found["tokens"]["again"] and len(found["tokens"]["again"]) == 33
    for times in found["rounds"]:
        assert times.keys() == {"minilora", "again"}
        assert all(0 < row["seconds"] < row["process"] and row["peak_bytes"] > 1e6 for row in times.values())


def test_a_process_that_dies_says_why_and_the_others_go_on(nano):
    lost = OURS._replace(label="lost", module="nonesuch")
    found = fresh.first_tokens([lost, OURS], nano, 1, rounds=1, cores=2)
    assert found["failed"] == {"lost": "ModuleNotFoundError: No module named 'compared.nonesuch'"}
    assert found["rounds"][0].keys() == {"minilora"}


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="the system does not tell what is shared")
def test_two_processes_take_more_than_one(nano):
    found = fresh.memory_of_two(OURS._replace(task="shared"), nano, 1)
    assert 1e6 < found["one"] < found["both"]


def test_where_the_system_does_not_tell_there_is_no_number(nano, tmp_path, monkeypatch):
    assert fresh.proportional_bytes(1, str(tmp_path / "{}")) is None
    (tmp_path / "1").write_text("00400000-7fff ---p 0 [rollup]\nRss: 99 kB\nPss: 12 kB\n", encoding="utf-8")
    assert fresh.proportional_bytes(1, str(tmp_path / "{}")) == 12 * 1024
    monkeypatch.setattr(fresh, "proportional_bytes", lambda pid: None)
    assert fresh.memory_of_two(OURS._replace(task="shared"), nano, 1) is None


# 4. The libraries themselves.


def test_bases_in_fewer_bits_learn_too(nano):
    nf4 = Program("minilora-nf4", "numpy_llama", "nf4", "answers", steps=0)
    outcome = rounds.measure_in_turns([OURS._replace(task="answers"), nf4], nano, 1, rounds=1, seconds=0.01)
    assert outcome["failed"] == {} and set(outcome["rounds"][0]) == {"minilora", "minilora-nf4"}


@pytest.mark.parametrize("task", ["all-linear", "answers", "generate"])
def test_the_libraries_compute_the_same(nano, task):
    missing = [name for name in benchmark_llm.PEERS if not importlib.util.find_spec(name)]
    if missing:
        pytest.skip(f"{missing[0]} is not here: pip install -e '.[peers]'")
    chosen = benchmark_llm.programs(task, alone=False, has_file=False)
    outcome = rounds.measure_in_turns(chosen, nano, 1, rounds=1, seconds=0.01)
    assert outcome["failed"] == {} and {"minilora", "transformers"} <= set(outcome["rounds"][0])
    same_tokens = {True} if task == "generate" else set()
    assert set(outcome["same_tokens"].values()) == same_tokens


def test_random_weights_come_from_no_file(nano):
    assert gguf_of(nano) is None


# 5. The command line.


def test_every_library_is_compared_in_every_task():
    labels = lambda *arguments: [program.label for program in benchmark_llm.programs(*arguments)]
    everything = ["minilora", "minilora-gguf", "minilora-nf4", "transformers"]
    assert labels("all-linear", False, True) == labels("answers", False, True) == everything
    assert labels("generate", False, True) == ["minilora", "minilora-unmerged", "transformers", "transformers-merged"]
    assert labels("first-token", False, True) == labels("shared", False, True) == [*everything[:2], "transformers"]
    assert labels("first-token", True, False) == ["minilora"]


def test_what_was_measured_is_printed_and_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark_llm, "QUICK", NANO)
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    path = tmp_path / "out.json"
    tasks = ["answers", "first-token", "shared"]
    monkeypatch.setattr(sys, "argv", ["benchmark_llm.py", "--quick", "--alone", "--threads", "1", "--json", str(path),
                                      "--task", *tasks])  # fmt: skip
    benchmark_llm.main()
    kept = json.loads(path.read_text(encoding="utf-8"))
    assert [each["task"] for each in kept["results"]] == tasks
    assert all(each["shape"] == NANO._asdict() for each in kept["results"])
    steps, first, shared = (each["rows"] for each in kept["results"])
    assert [row["library"] for row in steps] == ["minilora", "minilora-nf4"]
    assert steps[0]["over"]["minilora"] == first[0]["over"]["minilora"] == 1
    assert first[0]["seconds"] < first[0]["process"] and first[0]["over_process"] == {"minilora": 1}
    printed = capsys.readouterr().out
    assert "base: random weights" in printed and printed.count("minilora") >= 4
    if os.path.exists("/proc/self/smaps_rollup"):
        assert shared[0]["ratio"] == shared[0]["both"] / shared[0]["one"] > 1
