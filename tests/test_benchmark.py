"""The benchmark's arithmetic on made-up numbers, and its processes on a model of no size. No clock decides anything."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import benchmark
import pytest
from compared import processes, report, rounds, session, workloads
from compared.inputs import write_inputs
from compared.rounds import GEMM, DifferentResults, Program
from compared.workloads import Workload

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

NANO = Workload(layers=2, width=8, heads=2, T=8, batch=2, vocabulary=11, r=2, alpha=4)
OURS = Program("minilora", "numpy_minilora", "", "lora")
FLOOR = Program(GEMM, "numpy_minilora", "", GEMM)


# 1. What a task needs, against the same products written out.


def seen_pairs(rows, first, last):
    """Pairs of a query and a key it may see, one by one: queries first .. last of each row."""
    return rows * sum(1 for t in range(first, last + 1) for s in range(last + 1) if s <= t)


def written_out(task):
    """2 M N K summed over the products of NANO, each in its own line."""
    C, r, V, D = 8, 2, 11, 4
    N = 47 if task == "generate" else 16  # 16 + 32 tokens, of which the last is not read; else 2 x 8
    H, pairs = 2, seen_pairs(1, 0, 46) if task == "generate" else seen_pairs(2, 0, 7)
    once = lambda M, K, n: 2 * M * K * n
    q_k_v, projection, up, down = once(N, C, 3 * C), once(N, C, C), once(N, C, 4 * C), once(N, 4 * C, C)
    block = q_k_v + projection + up + down + 2 * H * once(pairs, D, 1)  # forward: QKᵀ and PV
    head = once(32 if task == "generate" else N, C, V)
    c_attn_A, c_attn_B = once(N, C, r), once(N, r, 3 * C)
    if task in ("forward", "generate"):
        return 2 * (block + c_attn_A + c_attn_B) + head
    if task == "full":  # each forward product has two backward, also each of attention's
        return 3 * (2 * block + head)
    attention_back = 4 * H * once(pairs, D, 1)
    through = projection + up + down + attention_back  # dx of what is frozen; no dW
    lora = [c_attn_A + 2 * c_attn_A + c_attn_B + 2 * c_attn_B + q_k_v,  # the second block: dA and dx, dB and d(thin)
            c_attn_A + 1 * c_attn_A + c_attn_B + 2 * c_attn_B]  # the first: no dx, the embedding is frozen
    if task == "all-linear":
        others = [(C, C), (C, 4 * C), (4 * C, C)]
        rest = sum(3 * once(N, n_in, r) + 3 * once(N, r, n_out) for n_in, n_out in others)
        return 2 * (block + through + rest) + sum(lora) + 2 * head
    return 2 * (block + through) + sum(lora) + 2 * head


@pytest.mark.parametrize("task", ["lora", "all-linear", "full", "forward", "generate"])
def test_the_count_of_operations_is_that_of_the_products_written_out(task):
    assert workloads.flops(NANO, task) == written_out(task)


def test_a_unit_of_generation_is_its_new_tokens_and_any_other_its_batch():
    assert workloads.tokens(NANO, "generate") == 32
    assert workloads.tokens(NANO, "full") == workloads.tokens(NANO, "forward") == 16


# 2. Rounds, ratios, and the load of others.


def an_outcome(**changes):
    rounds = [{"minilora": 2.0, "torch": 1.0}, {"minilora": 3.0, "torch": 2.0}, {"minilora": 8.0, "torch": 1.0}]
    memory = {"minilora": {"start": 10, "peak": 20}, "torch": {"start": 30, "peak": 60}, GEMM: {"start": 1, "peak": 2}}
    return {"units": 1, "rounds": rounds, "foreign": [0.0, 0.01, 0.02], "rates": [[1e3, 4e3], [3e3, 2e3], [2e3, 3e3]],
            "memory": memory, "same_tokens": {}, "failed": {}, **changes}  # fmt: skip


def test_the_ratio_is_the_median_of_the_rounds_ratios():
    ours, torch = report.medians(an_outcome(), NANO, "lora", "minilora")["rows"]
    assert (ours["seconds"], ours["ratio"]) == (3.0, 1.0)
    assert (torch["seconds"], torch["ratio"]) == (1.0, 2.0)  # of 2, 1.5 and 8; not 3, the ratio of the medians
    assert torch["tokens_per_s"] == 16 and (torch["start_bytes"], torch["peak_bytes"]) == (30, 60)


def test_the_share_is_of_the_best_shape_by_its_median():
    found = report.medians(an_outcome(), NANO, "lora", "minilora")
    assert found["gemm_flops_per_s"] == 3e3
    assert found["rows"][0]["share"] == pytest.approx(workloads.flops(NANO, "lora") / 3e3 / 3.0)


def test_a_round_whose_floor_was_not_measured_is_left_out_of_it():
    found = report.medians(an_outcome(rates=[[1e3, 4e3], None, [1e3, 2e3]]), NANO, "lora", "minilora")
    assert found["gemm_flops_per_s"] == 3e3
    assert report.medians(an_outcome(rates=[None] * 3), NANO, "lora", "minilora")["gemm_flops_per_s"] is None


def test_bf16_has_no_share_of_a_float32_floor():
    rounds, memory = [{"torch-bf16": 1.0}], {"torch-bf16": {"start": 1, "peak": 1}}
    outcome = an_outcome(rounds=rounds, memory=memory, foreign=[0.0], rates=[[1e3]])
    (row,) = report.medians(outcome, NANO, "lora", "minilora")["rows"]
    assert row["share"] is None and row["ratio"] is None


@pytest.mark.parametrize("foreign, counted", [
    ([0.0, 0.3, 0.04], [0, 2]), ([0.3, 0.2, 0.0], [0, 1, 2]), ([0.3, 0.0], [1]), ([None, None], [0, 1]), ([], []),
])  # fmt: skip
def test_rounds_with_foreign_load_count_only_if_they_are_most(foreign, counted):
    assert report.quiet_rounds(foreign) == counted


def test_a_loud_round_changes_no_median():
    loud = an_outcome(foreign=[0.0, 0.01, 0.4])
    assert report.medians(loud, NANO, "lora", "minilora")["rows"][1]["ratio"] == 1.75
    assert list(report.remarks("nano", "lora", loud)) == [
        "nano lora: 1 of 3 rounds had foreign load, at most 40%; left out"
    ]


def test_too_many_loud_rounds_are_counted_and_said_to_be():
    loud = an_outcome(foreign=[0.2, 0.01, 0.4])
    (remark,) = report.remarks("nano", "lora", loud)
    assert remark.endswith("2 of 3 rounds had foreign load, at most 40%; counted all the same, they are too many")


def test_foreign_load_is_a_part_of_the_whole_machine():
    answers = [{"foreign": 0.5, "wall": 1.0}, {"foreign": 0.0, "wall": 4.0}]
    assert processes.foreign_share(answers, cores=2) == 0.05
    assert processes.foreign_share([{"foreign": None, "wall": 1.0}], cores=2) is None


def test_busy_is_neither_idle_nor_waiting_for_a_disk(tmp_path):
    (tmp_path / "stat").write_text("cpu  1 2 4 1000 2000 8 16 32 64 128\ncpu0 9 9 9 9 9 9 9 9 9 9\n", encoding="utf-8")
    assert processes.busy_seconds(tmp_path / "stat") == 63 / os.sysconf("SC_CLK_TCK")
    assert processes.busy_seconds(tmp_path / "absent") is None


@pytest.mark.parametrize("unit, settling, units", [(0.001, 100, 400), (0.3, 1, 1), (0.1, 1, 4), (0.6, 0, 1)])
def test_a_call_lasts_as_long_as_was_asked_for_the_fastest_and_starts_untimed(unit, settling, units):
    answers = {"slow": {"seconds": 5.0}, "fast": {"seconds": unit}, GEMM: {"seconds": 1e-9}}
    assert rounds.units_per_call(answers, seconds=0.4) == (settling, units)


# 3. The same numbers, or no times.


def test_other_losses_stop_it_and_both_are_named():
    theirs = OURS._replace(label="torch")
    rounds.compare([OURS, theirs], {"minilora": [2.0, 1.0], "torch": [2.0001, 1.0]})
    with pytest.raises(DifferentResults, match="lora: loss 2 of minilora is 1, of torch 1.001"):
        rounds.compare([OURS, theirs], {"minilora": [2.0, 1.0], "torch": [2.0, 1.001]})
    rounds.compare([OURS, theirs._replace(tolerance=2e-2)], {"minilora": [2.0, 1.0], "torch": [2.0, 1.001]})
    rounds.compare([OURS, theirs._replace(steps=1)], {"minilora": [2.0, 1.0], "torch": [2.0, 1.5]})
    with pytest.raises(DifferentResults, match="nan"):
        rounds.compare([OURS, theirs], {"minilora": [2.0, 1.0], "torch": [float("nan"), 1.0]})


def test_other_tokens_are_told():
    same = rounds.compare([OURS, OURS._replace(label="torch")], {"minilora": [[1, 2]], "torch": [[1, 3]]})
    assert same == {"torch": False}
    (said,) = report.remarks("nano", "generate", an_outcome(same_tokens=same))
    assert said.startswith("nano generate: torch wrote other tokens")


# 4. The table.


def test_a_row_stands_under_its_heading():
    rows = report.medians(an_outcome(), NANO, "lora", "minilora")["rows"]
    lines = list(report.table_lines("nano", "lora", rows))
    assert {len(line) for line in lines} == {len(report.HEADER)}
    assert lines[1].split() == ["nano", "lora", "torch", "1,000.00", "2.00", "16", "0", "0", lines[1].split()[-2], "%"]


def test_above_the_table_stand_the_machine_its_threads_and_the_versions():
    machine = report.describe_machine(3)
    text = report.machine_lines(machine)
    assert "3 threads for each process" in text
    assert machine["versions"]["numpy"] in text
    assert machine["cpu"] in text
    assert "cannot be seen" in report.machine_lines({**machine, "foreign_load_is_seen": False})


# 5. Processes.


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    """A folder with everything that a worker loads."""
    folder = tmp_path_factory.mktemp("nano")
    write_inputs(NANO, folder, 0)
    return folder


def test_a_worker_that_dies_says_why_and_the_others_go_on(nano):
    lost = OURS._replace(label="lost", module="nonesuch")
    outcome = rounds.measure_in_turns([OURS, lost, FLOOR], nano, 1, rounds=2, seconds=0.01)
    assert outcome["failed"] == {"lost": "ModuleNotFoundError: No module named 'compared.nonesuch'"}
    assert [set(r) for r in outcome["rounds"]] == [{"minilora", GEMM}] * 2
    (row,) = report.medians(outcome, NANO, "lora", "minilora")["rows"]
    assert row["seconds"] > 0 and row["ratio"] == 1 and 0 < row["share"] and row["peak_bytes"] >= row["start_bytes"] > 0
    assert "nano lora: lost ended: ModuleNotFoundError" in "\n".join(report.remarks("nano", "lora", outcome))


def test_a_library_that_does_not_train_is_noticed_at_the_second_loss(nano):
    idle = Program("idle", "numpy_minilora", "", "forward")  # the first loss is the same
    with pytest.raises(DifferentResults, match="loss 2 of minilora is .*, of idle"):
        rounds.measure_in_turns([OURS, idle], nano, 1, rounds=1, seconds=0.01)


def test_adapters_in_one_batch_start_with_the_loss_of_one(nano):
    rows = [Program(str(n), "numpy_minilora", str(n), "lora", steps=1) for n in (0, 1, 2)]
    assert rounds.measure_in_turns(rows, nano, 1, rounds=1, seconds=0.01)["failed"] == {}


# 6. The command line, and how a run ends.


def command_line(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])


def test_where_the_other_libraries_are_absent_it_says_which_and_measures_minilora(monkeypatch, capsys):
    installed = {"numpy": "2", "torch": "2"}
    monkeypatch.setattr(report, "installed_version", installed.get)
    command_line(monkeypatch, "--quick")
    assert benchmark.arguments().against == ["minilora", "torch"]
    said = capsys.readouterr().out
    assert said.startswith("not installed: jax, peft, transformers; pip install")
    command_line(monkeypatch, "--against", "torch", "jax")
    with pytest.raises(SystemExit):
        benchmark.arguments()
    assert "benchmark.py: error: not installed: jax; pip install" in capsys.readouterr().err


def test_every_library_is_compared_in_every_task_but_those_that_are_not_made():
    found = list(benchmark.comparisons(["tiny"], ["lora", "generate", "scaling"], ["torch-compile", "torch"]))
    labels = [(c.size, c.task, [p.label for p in c.programs]) for c in found]
    assert labels[:2] == [
        ("tiny", "lora", ["minilora", "torch", "torch-compile"]),
        ("tiny", "generate", ["minilora", "torch"]),
    ]
    assert {tuple(names) for size, _, names in labels[2:] if size != "16 rows"} == {("minilora", "torch")}
    stacks = ["attached", "stack of 1", "stack of 4", "stack of 16"]
    assert labels[-2:] == [("16 rows", "forward", stacks), ("16 rows", "lora", stacks)]


@pytest.fixture
def quick_run(tmp_path, monkeypatch):
    """A run of two tasks on a model of no size, whose results go to out.json. `plant(error)` has the second fail."""
    monkeypatch.setattr(benchmark, "WORKLOADS", {"tiny": NANO})
    arguments = "--quick --against --task lora full --rounds 1 --threads 1 --json out.json"
    command_line(monkeypatch, *arguments.split())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))

    def plant(error, measure=session.measure_in_turns):
        def measure_or_fail(programs, *rest):
            if programs[0].task == "full":
                raise error
            return measure(programs, *rest)

        monkeypatch.setattr(session, "measure_in_turns", measure_or_fail)

    return plant


def measured(folder):
    return json.loads((folder / "out.json").read_text(encoding="utf-8"))


def test_what_was_measured_before_an_interruption_is_kept(tmp_path, quick_run, capsys):
    quick_run(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt, match="^interrupted at tiny full, which is left out$"):
        benchmark.main()
    kept = measured(tmp_path)
    assert [(r["size"], r["task"]) for r in kept["results"]] == [("tiny", "lora")]
    assert kept["machine"]["threads"] == 1
    assert kept["results"][0]["rows"][0]["library"] == "minilora"
    assert "tiny        lora        minilora" in capsys.readouterr().out


def test_what_the_table_does_not_show_is_printed_at_the_end(monkeypatch, capsys):
    monkeypatch.setattr(session, "measure_in_turns", lambda *args: an_outcome(failed={"torch": "why"}))
    with session.session(threads=1, rounds=3, seconds=0.1, seed=0, path=None) as running:
        running.measure("nano", NANO, "lora", [])
        print("the table")
    assert capsys.readouterr().out == "the table\nnano lora: torch ended: why\n"


def test_different_results_stop_the_run_and_what_was_measured_is_kept(tmp_path, quick_run):
    quick_run(DifferentResults("two losses"), lambda *given: an_outcome())
    with pytest.raises(SystemExit, match="stopped at tiny full: two losses"):
        benchmark.main()
    assert [r["task"] for r in measured(tmp_path)["results"]] == ["lora"]


# 7. The libraries themselves.


def absent(name):
    return [package for package in benchmark.LIBRARIES[name].packages if not importlib.util.find_spec(package)]


@pytest.mark.parametrize("task", ["all-linear", "generate"])
def test_the_libraries_compute_the_same(nano, task):
    missing = absent("torch") + absent("transformers")
    if missing:
        pytest.skip(f"{missing[0]} is not here: pip install -e '.[peers]'")
    made = [name for name in benchmark.LIBRARIES if (name, task) not in benchmark.NOT_MADE]
    chosen = [name for name in made if name != "torch-compile" and not absent(name)]
    programs = [benchmark.program(name, task) for name in chosen]
    outcome = rounds.measure_in_turns(programs, nano, 1, rounds=1, seconds=0.01)
    assert outcome["failed"] == {}
    assert set(outcome["rounds"][0]) == set(chosen)
    assert {"minilora", "torch", "transformers"} <= set(chosen)
    same_tokens = {True} if task == "generate" else set()
    assert set(outcome["same_tokens"].values()) == same_tokens
