"""The command line, run as a person runs it: what it prints, keeps, refuses, and leaves when interrupted."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minilora import load_adapter, load_model
from minilora.__main__ import array_module, main

ROOT = Path(__file__).parent.parent


def start(folder, *arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "minilora", *arguments], cwd=folder, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return folder, *finish(start(folder, "--quick", "--seed", "1"))


def test_the_quick_demo_runs_through_and_learns_something(quick):
    _, code, out, _ = quick
    assert code == 0
    first, last = map(float, re.search(r"held-out loss ([\d.]+) -> ([\d.]+)", out).groups())
    assert last < 0.8 * first


def test_attaching_changes_nothing_and_detaching_gives_the_base_back(quick):
    out = quick[2]
    assert "Largest logit change: 0.0\n" in out
    before, after = re.search(r"sha256 (\w+) before and (\w+) after: bit-identical", out).groups()
    assert before == after


def test_the_table_has_its_three_rows_and_the_cost_of_three_ways_to_train(quick):
    out = quick[2]
    for row in ("phrasings it trained on", "phrasings never seen", "facts never told"):
        assert re.search(rf"{row} +\d+ % +\d+ %", out)
    cost = {name: re.search(rf"{name} +([\d,]+ +)+([\d,]+)\n", out) for name in
            ("full fine-tuning", "LoRA on q, v", "LoRA on every linear")}  # fmt: skip
    assert all(cost.values())


def test_a_wrong_answer_is_shown_as_wrong(quick):
    assert re.search(r"Q: .* A: .*\(wrong: .+\)", quick[2])


def test_what_was_kept_can_be_loaded_and_asked(quick):
    folder = quick[0]
    base = load_model(folder / "minilora-demo-quick" / "base")
    load_adapter(folder / "minilora-demo-quick" / "security", base)
    code, out, err = finish(start(folder, "--quick", "--ask", "Is MD5 safe?"))
    assert (code, err) == (0, "")
    assert out.startswith("Q: is md5 safe?\nA: ")


def test_asking_before_anything_was_kept_says_what_to_run(tmp_path, capsys):
    assert main(["--ask", "is md5 safe?", "--out", str(tmp_path)]) == 1
    assert "run the demo first" in capsys.readouterr().err


@pytest.mark.parametrize("question, told", [("naïve?", "ï"), ("x" * 200, "at most 95 fit")])
def test_a_question_that_cannot_be_asked_is_one_readable_line(quick, capsys, question, told):
    out = quick[0] / "minilora-demo-quick"
    assert main(["--ask", question, "--out", str(out)]) == 1
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1


@pytest.mark.parametrize("xp", ["numpy", pytest.param("cupy", marks=pytest.mark.cupy)], indirect=True)
def test_a_backend_is_found_by_name(xp):
    assert array_module(xp.__name__) is xp


def test_a_backend_that_is_not_there_names_the_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert main(["--quick", "--backend", "cupy", "--out", str(tmp_path)]) == 1
    assert "minilora[cuda12]" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT to a process")
@pytest.mark.parametrize("after, kept", [("[1/5]", "Kept: nothing"), ("[3/5]", "(the pre-trained model)")])
def test_ctrl_c_leaves_whole_files_and_says_what_was_kept(tmp_path, after, kept):
    process = start(tmp_path, "--quick", "--out", "out")
    for line in process.stdout:
        if line.startswith(after):
            break
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130
    assert "interrupted in step" in err and kept in err
    assert not list(tmp_path.rglob("*.tmp"))
    if kept != "Kept: nothing":
        load_model(tmp_path / "out" / "base")
