"""Fine-tuning from two paths to an adapter: the same bits whatever kills it, and what does not fit is refused."""

import json
import os
import re
import shutil
import signal
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file
from strategies import contents

from minilora import (
    GPT,
    Adam,
    GPTConfig,
    attach,
    generate,
    load_adapter,
    load_model,
    save_model,
)
from minilora.disk import folder as files
from minilora.disk.characters import decode, encode
from minilora.disk.folder import UNFINISHED
from minilora.functional import IGNORE
from minilora.optim import warmup_cosine
from minilora.training import checkpoint, finetune
from minilora.training import parts as parts_module
from minilora.training.checkpoint import Checkpoint, is_checkpoint
from minilora.training.finetune import Settings
from minilora.training.loop import Interrupted

posix = pytest.mark.skipif(os.name != "posix", reason="sends SIGKILL to a process")
ROWS = [(f"Q: {i}?\nA: ", "one two three four five six seven eight".split()[i]) for i in range(8)]
TEXT = "to be or not to be, that is the question: " * 8


def gpt(seed=0, vocab_size=96, n_embd=8):
    return GPT(GPTConfig(1, 2, n_embd, vocab_size, 32, positions="rope"), np.random.default_rng(seed))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with a base and two data files."""
    folder = tmp_path_factory.mktemp("inputs")
    save_model(gpt(), folder / "base")
    (folder / "data.txt").write_text(TEXT)
    (folder / "data.jsonl").write_text("".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in ROWS))
    return folder


def settings(inputs, out, kind="jsonl", **changes):
    few = {"alpha": 4.0, "r": 2, "target": ["q_proj", "up_proj"], "lr": 1e-2, "steps": 4, "batch": 2, "seed": 7,
           "eval_split": 0.25, "dropout": 0.3, "save_every": 2}  # fmt: skip
    if kind == "txt":
        few["length"] = 8
    return Settings(**{"base": str(inputs / "base"), "data": str(inputs / f"data.{kind}"), "out": str(out), **few,
                       **changes})  # fmt: skip


def run(given, resume=False, parts=1, threads=1):
    """(the Result, the report as one text)."""
    lines = []
    result = finetune.finetune(given, resume=resume, say=lines.append, quiet=True, parts=parts,
                               threads=threads)
    return result, "\n".join(lines)


def saved(out):
    """What the folder of an adapter holds: its names, its tensors to the bit, and its configuration."""
    tensors = load_file(out / "adapter_model.safetensors")
    return ({file.name for file in out.iterdir() if not file.name.startswith(".")},
            {name: (a.dtype, a.shape, a.tobytes()) for name, a in tensors.items()},
            (out / "adapter_config.json").read_text())  # fmt: skip


def same(result, other):
    return contents(result.adapter) == contents(other.adapter) and result[1:] == other[1:]


@pytest.fixture(scope="module", params=["jsonl", "txt"])
def whole(request, inputs, tmp_path_factory):
    """(kind of data, Result, what was saved) of a run that nothing killed."""
    out = tmp_path_factory.mktemp(request.param) / "out"
    return request.param, run(settings(inputs, out, request.param))[0], saved(out)


# A whole run.


def test_a_run_leaves_an_adapter_that_fits_its_base_and_nothing_else(inputs, whole, tmp_path):
    kind, result, (names, *_) = whole
    assert names == {"adapter_model.safetensors", "adapter_config.json"}
    assert len(result.losses) == 4 and result.before > 0 and result.after > 0
    again, _ = run(settings(inputs, tmp_path / "out", kind))
    assert same(again, result)
    loaded = load_adapter(tmp_path / "out", load_model(inputs / "base"))
    assert contents(loaded) == contents(result.adapter) and loaded.config == settings(inputs, "out").lora()
    other, _ = run(settings(inputs, tmp_path / "other", kind, seed=8))
    assert contents(other.adapter) != contents(result.adapter)


def test_it_learns_the_answers_and_the_model_says_them(inputs, tmp_path):
    """At this rate, seeds 0, 1, 2 and 7 under four processors' kernels all end at 0.043 of the first loss, with every
    right character ahead of any other by 3.6 at least. At four times the rate the last bit decides what is learned."""
    base = gpt(n_embd=48)
    save_model(base, tmp_path / "base")
    result, _ = run(settings(inputs, tmp_path / "out", base=str(tmp_path / "base"), steps=160, batch=8, r=16, alpha=32,
                             target="all-linear", lr=5e-3, dropout=0.0, eval_split=0))  # fmt: skip
    assert result.losses[-1] < 0.1 * result.losses[0] and result.before is result.after is None
    model = attach(base, result.adapter)
    for prompt, answer in ROWS:
        ids = encode(prompt)[None]
        assert decode(generate(model, ids, len(answer) + 1)[0, ids.size :]) == answer + "\n"


def spied(monkeypatch, owner, name, note):
    """Each call of owner.name goes through, and what `note` makes of its arguments is listed."""
    calls, real = [], getattr(owner, name)

    def spy(self, *arguments, **options):
        calls.append(note(*arguments))
        return real(self, *arguments, **options)

    monkeypatch.setattr(owner, name, spy)
    return calls


def test_the_loss_is_on_the_answers_and_what_is_held_out_is_never_trained_on(inputs, tmp_path, monkeypatch):
    batches = spied(monkeypatch, GPT, "loss", lambda ids, targets: (ids, targets))
    run(settings(inputs, tmp_path, steps=9, eval_split=0.25))
    rows = [[(decode(i).split("?")[0], decode(t[t != IGNORE])) for i, t in zip(*batch, strict=True)]
            for batch in batches]  # fmt: skip
    known = {(prompt.split("?")[0], answer + "\n") for prompt, answer in ROWS}
    before, trained, after = rows[0], {row for batch in rows[1:-1] for row in batch}, rows[-1]
    assert before == after and len(before) == 2 and len(batches) == 11
    assert trained | set(before) == known and not trained & set(before)


def test_the_end_of_a_text_is_held_out(inputs, tmp_path, monkeypatch):
    (tmp_path / "half.txt").write_text("a" * 60 + "b" * 60)
    batches = spied(monkeypatch, GPT, "loss", lambda ids, targets: decode(np.append(ids, targets)))
    run(settings(inputs, tmp_path / "out", "txt", data=str(tmp_path / "half.txt"), eval_split=0.5))
    assert ["".join(sorted(set(batch))) for batch in batches] == ["b"] * 4 + ["a"] * 4 + ["b"] * 4


def test_the_rate_warms_up_and_falls_and_nothing_decays(inputs, tmp_path, monkeypatch):
    rates = spied(monkeypatch, Adam, "step", lambda lr: lr)
    made = spied(monkeypatch, Checkpoint, "__init__", lambda *arguments: arguments[3])
    run(settings(inputs, tmp_path, steps=20))
    assert rates == [warmup_cosine(step, 20, 1e-2, 2) for step in range(20)] and made[0].weight_decay == 0


def test_the_base_is_not_changed(inputs, tmp_path):
    before = {file.name: file.read_bytes() for file in (inputs / "base").iterdir()}
    run(settings(inputs, tmp_path))
    assert {file.name: file.read_bytes() for file in (inputs / "base").iterdir()} == before


@pytest.mark.parametrize("memory", [True, False])
def test_the_report_says_sizes_losses_and_cost(inputs, tmp_path, monkeypatch, memory):
    if not memory:
        monkeypatch.setitem(sys.modules, "resource", None)
    result, report = run(settings(inputs, tmp_path))
    for told in ("1,656 parameters", "a context of 32 tokens", "96 tokens in the vocabulary", "6 prompts of",
                 "2 prompts of", "112 of 1,768 parameters are trainable", "4 steps in", "tokens/s", "means of 4 steps",
                 f"held-out loss {result.before:.3f} -> {result.after:.3f}", f"kept in {tmp_path}: the adapter"):
        assert told in report, (told, report)
    assert ("MB of memory" in report) is memory
    _, report = run(settings(inputs, tmp_path / "none", eval_split=0.0))
    assert "held out: nothing" in report and "held-out loss" not in report


def test_a_folder_with_gpt2s_tokenizer_is_fine_tuned(inputs, bpe_folder, tmp_path):
    base = gpt(vocab_size=300)
    save_model(base, tmp_path / "base")
    shutil.copy(bpe_folder / "tokenizer.json", tmp_path / "base")
    for kind in ("jsonl", "txt"):
        given = settings(inputs, tmp_path / kind, kind, base=str(tmp_path / "base"))
        result, report = run(given)
        assert len(result.losses) == 4 and "300 tokens in the vocabulary" in report
        load_adapter(tmp_path / kind, base)


# Killed.


class Moments:
    """Counts the moments of a run at which something could fall, and does `strike` at the one numbered `when`.

    They are: within a step, after the parameters moved, before and after each write, rename and removal.
    """

    def __init__(self, patch, when=None, strike=None):
        self.count, self.when, self.strike = 0, when, strike
        for owner, name in ((GPT, "loss"), (Adam, "step"), (Checkpoint, "note"), (os, "fsync"), (os, "replace"),
                            (os, "unlink"), (shutil, "rmtree")):  # fmt: skip
            patch.setattr(owner, name, self.struck(getattr(owner, name)))

    def struck(self, real):
        def call(*arguments, **options):
            self.pass_by()
            result = real(*arguments, **options)
            self.pass_by()
            return result

        return call

    def pass_by(self):
        self.count += 1
        if self.count == self.when:
            self.strike()


def live(given, resume, when):
    """Run in a process of its own that is killed, for good and without a word, at its moment `when`; its exit code."""
    child = os.fork()
    if not child:
        try:
            Moments(pytest.MonkeyPatch(), when, lambda: os.kill(os.getpid(), signal.SIGKILL))
            run(given, resume)
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@posix
def test_a_run_killed_at_any_moment_and_resumed_gives_the_same_bits(inputs, whole, tmp_path, monkeypatch):
    """Killed twice: at every other moment of its first life (odd for one kind, even for the other), then at random."""
    kind, result, files_ = whole
    with monkeypatch.context() as patch:
        moments = Moments(patch)
        run(settings(inputs, tmp_path / "count", kind))
    rng, codes = np.random.default_rng(0), []
    for when in range(1 + (kind == "txt"), moments.count + 1, 2):
        out = tmp_path / str(when)
        given = settings(inputs, out, kind)
        codes.append(live(given, False, when))
        codes.append(live(given, is_checkpoint(out / "checkpoint"), int(rng.integers(1, 20))))
        if is_checkpoint(out / "checkpoint"):
            assert same(run(given, resume=True)[0], result)
        elif not out.exists() or not (out / "adapter_model.safetensors").exists():
            assert same(run(given)[0], result)
        assert saved(out) == files_
    assert moments.count > 40 and 2 * codes.count(-signal.SIGKILL) > moments.count + 20


def ctrl_c():
    raise KeyboardInterrupt


def test_ctrl_c_at_any_moment_keeps_the_last_whole_step_and_says_how_to_go_on(inputs, whole, tmp_path, monkeypatch):
    kind, result, files_ = whole
    with monkeypatch.context() as patch:
        count, kept = Moments(patch).count, set()
        run(settings(inputs, tmp_path / "count", kind))
    for when in range(1, 400):
        given = settings(inputs, tmp_path / str(when), kind, save_every=100)
        with monkeypatch.context() as patch:
            moments = Moments(patch, when, ctrl_c)
            try:
                run(given)
                break
            except Interrupted as stop:
                told = str(stop)
            except KeyboardInterrupt:
                assert when <= 2 and not (tmp_path / str(when)).exists()  # nothing was begun
                continue
        done = json.loads((tmp_path / str(when) / "checkpoint" / "checkpoint.json").read_text())["steps"]
        assert f"interrupted after step {done} of 4" in told and told.endswith("the same command with --resume")
        kept.add(done)
        again, report = run(given, resume=True)
        assert f"resumed after step {done} of 4" in report
        assert same(again, result) and saved(tmp_path / str(when)) == files_
    assert kept == {0, 1, 2, 3, 4} and count == 0 and when > moments.count > 30


def test_ctrl_c_before_there_is_anything_to_keep_is_left_to_the_caller(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "load_data", lambda *arguments: ctrl_c())
    with pytest.raises(KeyboardInterrupt):
        run(settings(inputs, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def stopped(given, monkeypatch, step=3, parts=1, threads=1):
    """A run that stops in step number `step`, with the parameters moved and nothing noted of it."""
    with monkeypatch.context() as patch:
        real, taken = Adam.step, []

        def stop(self, lr):
            real(self, lr)
            taken.append(lr)
            if len(taken) == step:
                raise KeyboardInterrupt

        patch.setattr(Adam, "step", stop)
        with pytest.raises(Interrupted):
            run(given, parts=parts, threads=threads)


def dropout_from_the_first_step_on(patch):
    real = parts_module.part_rng
    patch.setattr(parts_module, "part_rng", lambda seed, step, part: real(seed, max(0, step - 2), part))


PLANTED = {
    "dropout begins anew": dropout_from_the_first_step_on,
    "one batch is left out": lambda patch: patch.setattr(finetune, "islice", lambda it, n, m: islice(it, n + 1, m)),
    "one batch comes twice": lambda patch: patch.setattr(finetune, "islice", lambda it, n, m: islice(it, n - 1, m)),
    "the batches begin anew": lambda patch: patch.setattr(finetune, "islice", lambda it, n, m: it),
    "Adam forgets its moments": lambda patch: patch.setattr(Adam, "load_state_dict", lambda self, state: setattr(
        self, "steps", state["steps"])),
}  # fmt: skip


@pytest.mark.parametrize("bug", PLANTED.values(), ids=PLANTED)
def test_each_planted_bug_in_resuming_changes_the_bits(inputs, whole, tmp_path, monkeypatch, bug):
    kind, result, _ = whole
    given = settings(inputs, tmp_path, kind)
    stopped(given, monkeypatch)
    bug(monkeypatch)
    assert not same(run(given, resume=True)[0], result)


def test_a_note_that_is_no_copy_would_keep_half_a_step(inputs, whole, tmp_path, monkeypatch):
    kind, result, _ = whole
    given = settings(inputs, tmp_path, kind)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "to_numpy", lambda array: SimpleNamespace(copy=lambda: array))
        stopped(given, monkeypatch)
    assert not same(run(given, resume=True)[0], result)


@pytest.mark.parametrize("step", [0, 3])
def test_an_error_leaves_the_last_checkpoint(inputs, whole, tmp_path, monkeypatch, step):
    kind, result, _ = whole
    given = settings(inputs, tmp_path, kind)
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "warmup_cosine", lambda n, *more: warmup_cosine(n, *more) if n < step else np.nan)
        with pytest.raises(ValueError, match="learning rate must be finite"):
            run(given)
    assert same(run(given, resume=True)[0], result)


def test_where_things_lie_and_how_often_they_are_saved_may_change(inputs, whole, tmp_path, monkeypatch):
    kind, result, _ = whole
    stopped(settings(inputs, tmp_path / "out", kind), monkeypatch)
    shutil.copytree(inputs, tmp_path / "moved")
    (tmp_path / "out").rename(tmp_path / "there")
    moved = settings(tmp_path / "moved", tmp_path / "there", kind, save_every=1)
    assert same(run(moved, resume=True)[0], result)


# Refused.


@pytest.mark.parametrize("field, value, need", [
    ("steps", 0, "a whole number of at least 1"), ("steps", 2.0, "a whole number"), ("batch", 0, "a whole number"),
    ("save_every", 0, "a whole number of at least 1"), ("seed", -1, "a whole number of at least 0"),
    ("length", 0, "a whole number of at least 1, or None"), ("lr", 0.0, "a finite positive number"),
    ("lr", float("inf"), "a finite"), ("eval_split", 1.0, r"in \[0, 1\)"), ("eval_split", -0.1, r"in \[0, 1\)"),
    ("r", 0, "whole number"), ("alpha", -1, "positive"), ("dropout", 1.0, r"in \[0, 1\)"), ("target", [], "one name"),
])  # fmt: skip
def test_a_setting_out_of_range_is_named_with_its_value(inputs, field, value, need):
    with pytest.raises(ValueError, match=f"{'target_modules' if field == 'target' else field} must be .*{need}.*; got"):
        settings(inputs, "out", **{field: value})


def test_threads_that_cannot_be_are_refused_before_anything_is_written(inputs, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="parts 1, threads 0"):
        run(settings(inputs, tmp_path / "out"), threads=0)
    with pytest.raises(ValueError, match="parts 2, threads 3"):
        run(settings(inputs, tmp_path / "out"), parts=2, threads=3)
    assert not (tmp_path / "out").exists()


def test_there_may_be_more_parts_than_rows(inputs, tmp_path):
    one = settings(inputs, tmp_path / "1", batch=1, eval_split=0.0, dropout=0.0)
    whole = run(one)[0].losses
    assert run(replace(one, out=str(tmp_path / "3")), parts=3, threads=2)[0].losses == whole


def test_there_is_no_default_alpha():
    with pytest.raises(TypeError, match="alpha"):
        Settings(base="b", data="d", out="o")


@pytest.mark.parametrize("changes, told", [
    ({"eval_split": 0.01}, "8 lines to train on and 0 held out"),
    ({"batch": 7}, "6 lines to train on do not make one batch of 7"),
    ({"length": 8}, "length 8 is for"),
    ({"target": ["c_fc"]}, "match no Linear layer"),
    ({"data": "data.csv"}, "are a .txt file"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_is_written(inputs, tmp_path, changes, told):
    with pytest.raises(ValueError, match=told):
        run(settings(inputs, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_a_run_is_not_started_over_another(inputs, tmp_path, monkeypatch):
    given = settings(inputs, tmp_path / "out")
    stopped(given, monkeypatch)
    kept = {file.name: file.read_bytes() for file in (tmp_path / "out" / "checkpoint").iterdir()}
    with pytest.raises(ValueError, match="has not ended: go on with --resume, remove .*checkpoint, or choose"):
        run(given)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out" / "checkpoint").iterdir()} == kept
    run(given, resume=True)
    before = saved(tmp_path / "out")
    with pytest.raises(ValueError, match="is not empty: it holds adapter_config.json, adapter_model.safetensors;"):
        run(given)
    assert saved(tmp_path / "out") == before


def test_nothing_to_resume_is_said(inputs, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing to resume in .*: start without --resume"):
        run(settings(inputs, tmp_path / "out"), resume=True)
    run(settings(inputs, tmp_path / "out"))
    with pytest.raises(FileNotFoundError, match="nothing to resume in .*: the run has ended, and its adapter is there"):
        run(settings(inputs, tmp_path / "out"), resume=True)


def another_base(given, folder):
    base = gpt()
    base.wte.weight.data[3, 4] += 2**-10
    save_model(base, folder / "base")
    return replace(given, base=str(folder / "base"))


def another_file(given, folder):
    """The same tokens: a file that differs in no more than the spaces of its JSON is another file all the same."""
    (folder / "data.jsonl").write_text("".join(json.dumps({"answer": a, "prompt": p}) + "\n" for p, a in ROWS))
    return replace(given, data=str(folder / "data.jsonl"))




@pytest.mark.parametrize("change, told", [
    (lambda given, _: replace(given, lr=0.5, steps=9), [
        r"settings lr: 0\.01 in the checkpoint, 0\.5 now", "settings steps: 4 in the checkpoint, 9 now"]),
    (lambda given, _: replace(given, target=["q_proj"]), [
        r"settings target: \['q_proj', 'up_proj'\] in the checkpoint, \['q_proj'\] now"]),
    (another_base, [r"base wte.weight: \w{16} in the checkpoint, \w{16} now"]),
    (another_file, [r"data sha256: \w{64} in the checkpoint, \w{64} now"]),
], ids=["settings", "target", "base", "data"])  # fmt: skip
def test_another_run_is_not_gone_on_with(inputs, tmp_path, monkeypatch, change, told):
    given = settings(inputs, tmp_path / "out")
    stopped(given, monkeypatch)
    kept = {file.name: file.read_bytes() for file in (tmp_path / "out" / "checkpoint").iterdir()}
    with pytest.raises(ValueError, match="checkpoint is of another run; go on with what that began with") as caught:
        run(change(given, tmp_path), resume=True)
    for line in told:
        assert re.search(line, str(caught.value)), str(caught.value)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out" / "checkpoint").iterdir()} == kept


def test_a_run_in_parts_goes_on_to_the_bit_in_as_many_on_any_number_of_threads(inputs, tmp_path, monkeypatch):
    given = settings(inputs, tmp_path / "out")
    assert given.dropout > 0
    whole = run(settings(inputs, tmp_path / "whole"), parts=2, threads=2)[0]
    assert same(run(settings(inputs, tmp_path / "on one thread"), parts=2)[0], whole)
    stopped(given, monkeypatch, parts=2, threads=2)
    with pytest.raises(ValueError, match="arrays parts: 2 in the checkpoint, 1 now"):
        run(given, resume=True)
    assert same(run(given, resume=True, parts=2, threads=1)[0], whole)


def test_a_checkpoint_of_another_version_is_refused_in_one_line_that_names_it(inputs, tmp_path):
    golden = Path(__file__).parents[1] / "golden" / "v0_1" / "checkpoint"
    shutil.copytree(golden, tmp_path / "old")
    out = tmp_path / "old" / "out"
    paths = {"base": str(tmp_path / "old" / "base"), "data": str(tmp_path / "old" / "notes.txt"), "out": str(out)}
    given = Settings(**paths, alpha=4, r=2, lr=1e-2, steps=8, batch=4, seed=3, eval_split=0.2, length=16, dropout=0.1)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"written by minilora 0\.1, and this is 0\.2: go on with that") as refusal:
        run(given, resume=True)
    assert "\n" not in str(refusal.value)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_checkpoint_of_a_later_version_is_refused_too(inputs, tmp_path, monkeypatch):
    given = settings(inputs, tmp_path)
    stopped(given, monkeypatch)
    rewritten(tmp_path / "checkpoint", lambda state: state.update(version="3.1"))
    with pytest.raises(ValueError, match=r"written by minilora 3\.1, and this is 0\.2"):
        run(given, resume=True)


def test_the_same_file_in_other_tokens_is_another_run(inputs, tmp_path, monkeypatch):
    given = settings(inputs, tmp_path / "out", eval_split=0.0)
    stopped(given, monkeypatch)
    real = finetune.load_tokenizer
    monkeypatch.setattr(finetune, "load_tokenizer", lambda folder: replace(real(folder), end=1))
    with pytest.raises(ValueError, match="data tokens: .* in the checkpoint"):
        run(given, resume=True)


def rewritten(folder, change_state=lambda state: None, change_tensors=lambda tensors: None):
    state, tensors, _ = files.load_folder(folder, checkpoint.TENSORS, checkpoint.STATE)
    change_state(state)
    change_tensors(tensors)
    shutil.rmtree(folder)
    files.save_folder(folder, checkpoint.TENSORS, tensors,
                      checkpoint.STATE, state, {})  # fmt: skip


@pytest.mark.parametrize("change, told", [
    ({"change_state": lambda state: state.pop("progress")}, "has the fields .*; it is no checkpoint"),
    ({"change_tensors": lambda tensors: tensors.pop("adam.m.0")}, "m.0 is absent"),
    ({"change_tensors": lambda tensors: tensors.pop("adapter.h.0.mlp.up_proj.lora_A")}, "is damaged"),
], ids=["state", "moments", "adapter"])  # fmt: skip
def test_a_damaged_checkpoint_is_refused(inputs, tmp_path, monkeypatch, change, told):
    given = settings(inputs, tmp_path)
    stopped(given, monkeypatch)
    rewritten(tmp_path / "checkpoint", **change)
    with pytest.raises(ValueError, match=told):
        run(given, resume=True)


@pytest.mark.parametrize("held", ["adapter_config.json", "adapter_model.bin"])
def test_what_another_program_left_is_not_written_over(held, inputs, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / held).write_text("mine")
    with pytest.raises(ValueError, match=f"out is not empty: it holds {held}"):
        run(settings(inputs, out))
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [(held, "mine")]


def test_what_a_kill_in_the_first_save_leaves_is_in_nobodys_way(inputs, tmp_path):
    (tmp_path / "out" / "checkpoint" / UNFINISHED).mkdir(parents=True)
    (tmp_path / "out" / "checkpoint" / UNFINISHED / "checkpoint.json").write_text("{")
    (tmp_path / "out" / ".checkpoint.done").mkdir()
    run(settings(inputs, tmp_path / "out"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
