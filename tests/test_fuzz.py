"""The fuzzer finds what it looks for: each planted bug is a finding. And a short run of it finds nothing."""

import json
import os
import shlex

import numpy as np
import pytest
from fuzz import (
    CONTROLS,
    FINDINGS,
    KINDS,
    Process,
    Tally,
    copy_needs,
    findings,
    fuzz,
    make_case,
    questions_of,
    snapshot,
)
from mutations import MARK, TEXTS, as_text, header_of, spoilt_value, with_header
from tiny_files import inside, older_version, write_all

from minilora.cli import messages
from minilora.cli.main import main

pytestmark = pytest.mark.skipif(os.name != "posix", reason="pipes, links and limits of a process are POSIX's")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What tiny_files.py writes."""
    folder = tmp_path_factory.mktemp("tiny") / "files"
    write_all(folder)
    return folder


def test_it_looks_for_each_character_that_the_program_spells_out():
    every = "".join(map(chr, range(0x110000)))
    assert CONTROLS.findall(every) == messages.CONTROLS.findall(every)


# What it starts from.


def test_the_files_are_the_same_every_time(files, tmp_path):
    """To the byte, but for the tensors' metadata and the seconds of a log."""
    write_all(tmp_path / "files")
    first, second = snapshot(files), snapshot(tmp_path / "files")
    # A version is called by its date.
    assert len(first) == len(second)
    differing = {name for name in first.keys() & second.keys() if first[name] != second[name]}
    ends = (".safetensors", ".jsonl", "checkpoint.json", "receipt.json")
    assert all(name.endswith(ends) for name in differing), differing


# The page of the playground takes seconds, and has tests of its own.
SUBJECTS = [(kind, i) for kind, subjects in KINDS.items() for i in range(len(subjects)) if kind != "results" or i == 0]


@pytest.mark.parametrize("kind, i", SUBJECTS)
def test_each_command_does_its_work_on_whole_files(kind, i, files, tmp_path, capsys):
    """Else a refusal would say nothing."""
    if kind == "results":
        pytest.importorskip("matplotlib", reason="the extra plot is not installed")
    commands = [command.replace("VERSION", older_version(files)) for command in KINDS[kind][i].commands]
    for j, command in enumerate(commands):
        (tmp_path / str(j)).mkdir()
        copy_needs(files, tmp_path / str(j), KINDS[kind][i].needs)
        with inside(tmp_path / str(j)):
            assert main(shlex.split(command)) == 0, (command, capsys.readouterr().err)


# Cases.


def case_in(folder, kind, seed, files):
    folder.mkdir()
    with inside(folder):
        return make_case(kind, seed, files, folder), snapshot(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_makes_the_same_case_every_time_and_another_seed_another(kind, files, tmp_path):
    for seed in range(3):
        first, second = (case_in(tmp_path / f"{seed}{turn}", kind, seed, files) for turn in "ab")
        assert first == second and first[0].notes
    assert len({str(case_in(tmp_path / str(seed), kind, seed, files)[0]) for seed in range(8)}) > 4


def test_texts_that_json_cannot_write_stand_where_a_value_stood():
    value = {"a": [f"{MARK}2{MARK}", 1], "b": "x", f"b{MARK}": 2}
    assert as_text(value).decode() == f'{{"a": [{TEXTS[2]}, 1], "b": "x", "b": 2}}'


def test_every_place_of_a_json_is_spoilt():
    """A field at the top, one far below, a place in a list, and all of it."""
    spoilt = set()
    for seed in range(300):
        value = {"a": 1, "b": {"c": {"d": [5, 6]}}}
        new, _ = spoilt_value(np.random.default_rng(seed), value)
        if not isinstance(new, dict):
            spoilt.add("all")
            continue
        spoilt |= {"a"} if new.get("a") != 1 else set()
        inner = new.get("b")
        spoilt |= {"b"} if not isinstance(inner, dict) or "c" not in inner else set()
        if isinstance(inner, dict) and isinstance(inner.get("c"), dict) and inner["c"].get("d") != [5, 6]:
            spoilt.add("d")
    assert spoilt == {"all", "a", "b", "d"}


def test_a_header_is_taken_apart_and_put_together(files):
    content = (files / "lora" / "adapter_model.safetensors").read_bytes()
    header, data = header_of(content)
    assert header_of(with_header(json.dumps(header).encode(), data)) == (header, data)


# What it finds.


def test_each_planted_bug_is_found(files, tmp_path):
    """A reader that raises what nobody expects, hangs, aborts, takes memory, leaves a file, prints an escape ..."""
    seeds = []
    for seed in range(60):
        case, _ = case_in(tmp_path / str(seed), "adapter", seed, files)
        if case.argv[0] == "inspect" and not any(" is " in note for note in case.notes):
            seeds.append(seed)
    assert len(seeds) > 2
    process = Process(files, tmp_path)
    try:
        for plant in FINDINGS:
            question = {"kind": "adapter", "seed": seeds[0], "plant": plant}
            # A machine that is busy takes a while until the first case has begun.
            answer = process.ask(question, limit=3 if plant == "hang" else 60)
            assert [name for name, _ in findings(answer)] == [plant], (plant, answer)
            assert findings(process.ask(question | {"plant": None}, limit=60)) == []
    finally:
        process.stop()


def test_a_tally_counts_by_kind_and_says_which_case_repeats_a_finding(files, tmp_path):
    tally = Tally()
    fuzz(questions_of(["adapter"], 12, 0, "traceback"), 1, files, tmp_path, tally.add)
    results = tally.results(0, 1)
    counted = results["kinds"]["adapter"]
    assert counted["cases"] == 12 and 0 < counted["traceback"] < 12
    assert counted["refused"] + counted["harmless"] + counted["traceback"] == 12
    [(name, cases)] = results["findings"].items()
    assert name.startswith("traceback: KeyError at") and all(case.startswith("adapter:") for case in cases)
    assert len(tally.table()) == 3 and "KeyError" in tally.lines()[0]


def test_a_short_run_finds_nothing(files, tmp_path):
    """A few of each kind. The long run is `python tests/fuzz.py`, whose figures are in examples/trust.md."""
    tally = Tally()
    kinds = [kind for kind in KINDS if kind != "results"]
    fuzz(questions_of(kinds, 25 * len(kinds), 7), 2, files, tmp_path, tally.add)
    assert tally.lines() == []
    # Neither is everything refused, nor nothing.
    assert all(counts["refused"] > 1 for counts in tally.counts.values())
    assert sum(counts["harmless"] for counts in tally.counts.values()) > 30
