"""Folders to give to the commands, and the program run in this process or in one of its own."""

import json

import numpy as np
import pytest
from program import PAIRS, TEXT, finish, start
from strategies import trained_adapter

from minilora import GPT, GPTConfig, save_adapter, save_model
from minilora.cli import commands, comparison, generation
from minilora.cli.main import main


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Two bases of minilora's 96 characters, adapters `one` and `two` for the first, and two files of data."""
    folder = tmp_path_factory.mktemp("commands")
    config = GPTConfig(n_layer=11, n_head=1, n_embd=6, vocab_size=96, block_size=48, positions="rope")
    base, other = (GPT(config, np.random.default_rng(seed)) for seed in (0, 1))
    save_model(base, folder / "base")
    save_model(other, folder / "other")
    one = trained_adapter(base, 1, r=2, alpha=3)
    two = trained_adapter(base, 2, r=3, alpha=0.5, target_modules=["v_proj", "down_proj"], use_rslora=True,
                          rank_pattern={r"h\.1\..*": 1}, alpha_pattern={"v_proj": 7})  # fmt: skip
    for name, adapter in (("one", one), ("two", two)):
        save_adapter(adapter, folder / name, base_model=str(folder / "base"))
    (folder / "t.txt").write_text(TEXT)
    lines = [json.dumps({"prompt": prompt, "answer": answer}) for prompt, answer in PAIRS]
    (folder / "q.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Runs the program in that folder, on a machine that no bar thinks slow: (exit code, stdout, stderr)."""
    tqdm = comparison.tqdm

    def bar(*given, delay, leave, disable, **more):
        assert delay >= 1 and not leave and disable is None
        return tqdm(*given, **more, disable=True)

    monkeypatch.chdir(folder)
    for module in (commands, comparison, generation):
        monkeypatch.setattr(module, "tqdm", bar)

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def quick(tmp_path_factory):
    """The quick demo in a process of its own: (the folder it ran in, exit code, stdout, stderr)."""
    folder = tmp_path_factory.mktemp("demo")
    return folder, *finish(start(folder, "demo", "--quick", "--seed", "1"))
