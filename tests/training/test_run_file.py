"""The settings of a run in its file and in its checkpoint: what is written comes back, and nothing else is read."""

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
from strategies import character_gpt

from minilora import Adam, save_model
from minilora.disk.folder import load_folder, save_folder
from minilora.disk.receipt import RECEIPT
from minilora.training.checkpoint import STATE, TENSORS
from minilora.training.finetune import finetune
from minilora.training.finetune_config import FineTuneConfig
from minilora.training.loop import Interrupted
from minilora.training.run_file import arrays_of, saved_settings, settings_of, write_run_file

PATHS = {"base": "b", "data": "d.txt", "out": "o", "log_file": "l.jsonl"}


def test_what_repeats_a_run_has_no_place_for_what_each_run_has_to_itself():
    config = FineTuneConfig(**PATHS, alpha=2, target=["q_proj"], warmup=0, seed=0, rank_pattern={"q_proj": 3})
    settings = settings_of(config, arrays_of(np, 2, has_workers=False))
    assert json.loads(json.dumps(settings)) == settings | {"target": ["q_proj"]}
    assert settings["warmup"] == settings["seed"] == 0 and settings["rank_pattern"] == {"q_proj": 3}
    assert (settings["backend"], settings["parts"]) == ("numpy", 2)
    absent = {"out", "log_file", "full", "dora", "rslora", "alpha_pattern", "length", "workers", "from_adapter"}
    assert not absent & settings.keys()


@pytest.mark.parametrize("parts, has_workers, workers", [(1, False, None), (1, True, 1), (2, True, None)])
def test_a_part_that_is_alone_is_computed_as_it_was(parts, has_workers, workers):
    config = FineTuneConfig(**PATHS, alpha=2)
    assert settings_of(config, arrays_of(np, parts, has_workers)).get("workers") == workers


@pytest.mark.parametrize("changes, absent", [
    ({"full": True, "alpha": None}, {"alpha", "r", "target", "dropout"}),
    ({"from_adapter": "a", "alpha": None}, {"alpha", "r", "target"}),
    ({"target": ".*q_proj"}, {"target"}),
], ids=str)  # fmt: skip
def test_what_has_no_use_in_a_run_is_left_out_and_an_expression_has_a_name_of_its_own(changes, absent):
    config = replace(FineTuneConfig(**PATHS, alpha=2), **changes)
    settings = settings_of(config, arrays_of(np, 2, has_workers=False))
    assert not absent & settings.keys()
    assert settings.get("target_regex") == changes.get("target")


@pytest.fixture
def unfinished(tmp_path, monkeypatch):
    """The folder of a run that Ctrl-C ended in its second step, and its FineTuneConfig; paths are relative."""
    monkeypatch.chdir(tmp_path)
    save_model(character_gpt(n_embd=8), "base")
    (tmp_path / "d.txt").write_text("to be or not to be " * 20)
    config = FineTuneConfig(base="base", data="d.txt", out="out", alpha=2, steps=3, length=8, target=["q_proj"])

    def step(self, lr):
        self.steps += 1
        if self.steps == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Adam, "step", step)
        with pytest.raises(Interrupted):
            finetune(config, log=lambda line: None)
    return tmp_path / "out", config


def test_a_disk_without_room_is_told_with_the_name_of_the_file(unfinished, monkeypatch):
    def no_room(*given):
        raise OSError(28, "No space left on device")

    _, config = unfinished
    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(OSError, match="No space left on device: 'out/run.json'"):
        write_run_file(config, arrays_of(np, 1, False))


def test_a_checkpoint_gives_back_the_settings_that_repeat_its_run(unfinished, tmp_path, monkeypatch):
    out, config = unfinished
    settings = saved_settings(out)
    assert settings == settings_of(config, arrays_of(np, 1, False)) | {"target": ["q_proj"]}
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    paths = {name: str(tmp_path / settings[name]) for name in ("base", "data")}
    assert saved_settings(out) == {**settings, **paths}
    # The two paths lead nowhere any more: they are told as they were.
    shutil.move(out, tmp_path / "elsewhere")
    for name in paths:
        os.rename(tmp_path / settings[name], tmp_path / "elsewhere" / settings[name])
    assert saved_settings("out") == settings


def files_of(out):
    """What a run leaves in `out`, but for what the clock says and how it was started."""
    receipt = json.loads((out / RECEIPT).read_text())
    return (out / "adapter_model.safetensors").read_bytes(), (out / "run.json").read_text(), receipt["base"], [
        receipt["run"][name] for name in ("data", "settings")]  # fmt: skip


def resumed(out, **changes):
    """The config of a run that is gone on with from the working folder, as the command makes it."""
    settings = {name: value for name, value in saved_settings(out).items() if name not in ("backend", "parts")}
    return FineTuneConfig(**{**settings, "out": str(out), **changes})


def interrupt_after_a_step(monkeypatch, config, resume=False):
    steps = []

    def step(adam, lr, take=Adam.step):
        if steps:
            raise KeyboardInterrupt
        steps.append(take(adam, lr))

    with monkeypatch.context() as patch:
        patch.setattr(Adam, "step", step)
        with pytest.raises(Interrupted):
            finetune(config, resume=resume, log=lambda line: None)


def resumes_elsewhere_to_the_same_files(unfinished, tmp_path, monkeypatch):
    out, config = unfinished
    finetune(replace(config, out="whole"), log=lambda line: None)
    shutil.rmtree(out)
    interrupt_after_a_step(monkeypatch, config)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "one")
    interrupt_after_a_step(monkeypatch, resumed(out), resume=True)
    monkeypatch.chdir(tmp_path / "two")
    finetune(resumed(out, data="../d.txt"), resume=True, log=lambda line: None)
    assert files_of(out) == files_of(tmp_path / "whole")
    assert json.loads((out / "run.json").read_text())["base"] == "base"


def test_a_run_that_goes_on_in_other_folders_makes_the_files_of_one_that_stayed(unfinished, tmp_path, monkeypatch):
    resumes_elsewhere_to_the_same_files(unfinished, tmp_path, monkeypatch)


def test_paths_from_another_folder_are_found_in_the_files(unfinished, tmp_path, monkeypatch):
    monkeypatch.setattr("minilora.training.finetune.as_typed", lambda config: config)
    with pytest.raises(AssertionError):
        resumes_elsewhere_to_the_same_files(unfinished, tmp_path, monkeypatch)


def test_a_base_that_was_moved_is_called_as_it_is_given_anew(unfinished, tmp_path):
    out, _ = unfinished
    os.rename(tmp_path / "base", tmp_path / "moved")
    finetune(resumed(out, base="moved"), resume=True, log=lambda line: None)
    assert json.loads((out / "run.json").read_text())["base"] == "moved"
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "moved"


WRONG = [None, 1, 1.5, True, "x", [], {}, [1], {"a": 1}, -1]


@pytest.mark.parametrize("group, field", [
    ("identity", None), ("places", None), ("identity", "settings"), ("identity", "arrays"),
    *[("places", name) for name in ("base", "data", "from_adapter", "log_file", "save_every", "folder", "typed")],
])  # fmt: skip
def test_whatever_stands_in_a_field_it_is_settings_or_an_error_that_names_the_file(unfinished, group, field):
    out, _ = unfinished
    folder = out / "checkpoint"
    state, tensors, _ = load_folder(folder, TENSORS, STATE)
    tensors = {name: array.copy() for name, array in tensors.items()}
    refused = 0
    for value in WRONG:
        changed = json.loads(json.dumps(state))
        if field is None:
            changed[group] = value
        else:
            changed[group][field] = value
        shutil.rmtree(folder)
        save_folder(folder, TENSORS, tensors, STATE, changed)
        try:
            saved_settings(out)
        except ValueError as error:
            assert str(error).startswith(f"{folder / STATE}: ")
            assert any(name in str(error) for name in (field or group, "FineTuneConfig"))
            refused += 1
    assert refused >= 5
