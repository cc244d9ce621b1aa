"""Fine-tuning from two paths to an adapter: the same bits whatever kills it, and what does not fit is refused."""

import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import strict_array
from gguf_files import write_sentencepiece_base
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from strategies import (
    character_gpt,
    contents,
    grown,
    receipt_fields,
    seeds,
    small_gpt,
    small_llama,
    trained_adapter,
)

from minilora import GPT, Adam, attach, generate, load_adapter, load_model, save_model
from minilora.disk import peft
from minilora.disk.characters import decode, encode
from minilora.disk.folder import UNFINISHED
from minilora.disk.lock import only_writer
from minilora.disk.receipt import check_receipt, receipt_of
from minilora.disk.versions import find_version, is_adapter, kept_versions, put_back, version_in
from minilora.dora import DoRAPair
from minilora.functional import IGNORE
from minilora.nn import table_rows
from minilora.optim import clip_grad_norm, warmup_cosine
from minilora.quant import quantize, stored_as
from minilora.tensor import Tensor
from minilora.training import finetune, loop, steps
from minilora.training.checkpoint import REMOVED, Checkpoint, is_checkpoint
from minilora.training.finetune_config import FineTuneConfig
from minilora.training.learned import LearnedAdapter, training_bytes, update_sizes
from minilora.training.loop import Interrupted, train
from minilora.training.parts import PartWorkers, part_rng
from minilora.training.run_file import saved_settings
from minilora.training.run_log import RunLog

PAIRS = [(f"Q: {i}?\nA: ", "one two three four five six seven eight".split()[i]) for i in range(8)]
TEXT = "to be or not to be, that is the question: " * 8


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with a base and two data files."""
    folder = tmp_path_factory.mktemp("inputs")
    save_model(character_gpt(n_embd=8), folder / "base")
    (folder / "data.txt").write_text(TEXT)
    lines = [json.dumps({"prompt": prompt, "answer": answer}) + "\n" for prompt, answer in PAIRS]
    (folder / "data.jsonl").write_text("".join(lines))
    return folder


def config_for(inputs, out, kind="jsonl", **changes):
    """Four steps with dropout on the data of that kind, a quarter of which is held out."""
    config = FineTuneConfig(
        base=str(inputs / "base"),
        data=str(inputs / f"data.{kind}"),
        out=str(out),
        alpha=4.0,
        r=2,
        target=["q_proj", "up_proj"],
        lr=1e-2,
        steps=4,
        batch=2,
        seed=7,
        eval_split=0.25,
        length=8 if kind == "txt" else None,
        dropout=0.3,
        save_every=2,
    )
    return replace(config, **changes)


def run_and_report(config, **how):
    """(Result, the report as one text)."""
    lines = []
    result = finetune.finetune(config, log=lines.append, **how)
    return result, "\n".join(lines)


def run(config, **how):
    """The Result of a run that nobody watches."""
    return run_and_report(config, **how)[0]


def stop(config, step=3, **how):
    """Run, and press Ctrl-C in a step, with the parameters moved and no snapshot taken of it."""
    rates = []
    true_step = Adam.step

    def interrupted(self, lr):
        true_step(self, lr)
        rates.append(lr)
        if len(rates) == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Adam, "step", interrupted)
        with pytest.raises(Interrupted):
            run(config, **how)


def same(result, other):
    """Are two results equal to the bit, adapters and losses?"""
    return contents(result.adapter) == contents(other.adapter) and result[1:] == other[1:]


def bytes_in(folder):
    """{name: bytes} of the files in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def saved(out):
    """What the folder of an adapter holds: its names, its tensors to the bit, and its configuration."""
    names = {path.name for path in out.iterdir() if not path.name.startswith(".")}
    tensors = load_file(out / "adapter_model.safetensors")
    bits = {name: (a.dtype, a.shape, a.tobytes()) for name, a in tensors.items()}
    return names, bits, (out / "adapter_config.json").read_text()


@pytest.fixture(scope="module", params=["jsonl", "txt"])
def whole(request, inputs, tmp_path_factory):
    """(kind of data, Result, what was saved) of a run that nothing killed."""
    out = tmp_path_factory.mktemp(request.param) / "out"
    result = run(config_for(inputs, out, request.param))
    return request.param, result, saved(out)


# A whole run.


def test_a_run_leaves_an_adapter_that_fits_its_base_and_nothing_else(inputs, whole):
    kind, result, (names, *_) = whole
    assert names == {"adapter_model.safetensors", "adapter_config.json", "receipt.json", "run.json"}
    assert len(result.losses) == 4
    assert result.before > 0
    assert result.after > 0


def test_the_adapter_it_saves_is_the_adapter_it_gives(inputs, whole, tmp_path):
    kind, result, _ = whole
    config = config_for(inputs, tmp_path / "out", kind)
    assert same(run(config), result)
    loaded = load_adapter(tmp_path / "out", load_model(inputs / "base"), say=lambda receipt: None)
    assert contents(loaded) == contents(result.adapter)
    assert loaded.config == config.lora_config()


def test_it_learns_the_answers_and_the_model_says_them(inputs, tmp_path):
    """At this rate, seeds 0, 1, 2 and 7 under four processors' kernels all end at 0.043 of the first loss, with every
    right character ahead of any other by 3.6 at least. At four times the rate the last bit decides what is learned."""
    base = character_gpt(n_embd=48)
    save_model(base, tmp_path / "base")
    config = config_for(inputs, tmp_path / "out", base=str(tmp_path / "base"), steps=160, batch=8, r=16, alpha=32,
                        target="all-linear", lr=5e-3, dropout=0.0, eval_split=0)  # fmt: skip
    result = run(config)
    assert result.losses[-1] < 0.1 * result.losses[0]
    assert result.before is None
    assert result.after is None
    model = attach(base, result.adapter)
    for prompt, answer in PAIRS:
        ids = encode(prompt)[None]
        text = decode(generate(model, ids, len(answer) + 1)[0, ids.size :])
        assert text == answer + "\n"


def spied(monkeypatch, owner, name, note):
    """Each call of owner.name goes through, and what `note` makes of its arguments is listed."""
    notes = []
    true_function = getattr(owner, name)

    def spy(self, *arguments, **options):
        notes.append(note(*arguments))
        return true_function(self, *arguments, **options)

    monkeypatch.setattr(owner, name, spy)
    return notes


def pairs_of(ids, targets):
    """{(question, answer)} of a batch: what its rows ask, and the targets that carry a loss."""
    pairs = set()
    for input_row, target_row in zip(ids, targets, strict=True):
        question = decode(input_row).split("?")[0]
        pairs.add((question, decode(target_row[target_row != IGNORE])))
    return pairs


def test_the_loss_is_on_the_answers_and_what_is_held_out_is_never_trained_on(inputs, tmp_path, monkeypatch):
    batches = spied(monkeypatch, GPT, "loss", pairs_of)
    run(config_for(inputs, tmp_path, steps=9))
    before, *training, after = batches
    assert len(training) == 9
    assert before == after
    assert len(before) == 2
    trained_on = set().union(*training)
    assert not trained_on & before
    assert trained_on | before == {(prompt.split("?")[0], answer + "\n") for prompt, answer in PAIRS}


def test_the_end_of_a_text_is_held_out(inputs, tmp_path, monkeypatch):
    (tmp_path / "half.txt").write_text("a" * 60 + "b" * 60)
    letters = spied(monkeypatch, GPT, "loss", lambda ids, targets: set(decode(np.append(ids, targets))))
    run(config_for(inputs, tmp_path / "out", "txt", data=str(tmp_path / "half.txt"), eval_split=0.5))
    assert letters == [{"b"}] * 4 + [{"a"}] * 4 + [{"b"}] * 4


def test_the_rate_warms_up_and_falls_and_nothing_decays(inputs, tmp_path, monkeypatch):
    rates = spied(monkeypatch, Adam, "step", lambda lr: lr)
    adams = spied(monkeypatch, Checkpoint, "__init__", lambda folder, identity, adapter, adam: adam)
    run(config_for(inputs, tmp_path, steps=20))
    assert rates == [warmup_cosine(step, 20, 1e-2, 2) for step in range(20)]
    [adam] = adams
    assert adam.weight_decay == 0


def test_the_run_is_saved_at_its_start_every_few_steps_and_at_its_end(inputs, tmp_path, monkeypatch):
    saved_at = []
    true_save = Checkpoint.save

    def save(self):
        saved_at.append(self.snapshot.state["steps"])
        true_save(self)

    monkeypatch.setattr(Checkpoint, "save", save)
    run(config_for(inputs, tmp_path, steps=5, save_every=2))
    assert saved_at == [0, 2, 4, 5]


def test_the_base_is_not_changed(inputs, tmp_path):
    before = bytes_in(inputs / "base")
    run(config_for(inputs, tmp_path))
    assert bytes_in(inputs / "base") == before


def test_the_report_says_sizes_losses_and_cost(inputs, tmp_path):
    result, report = run_and_report(config_for(inputs, tmp_path))
    for part in (
        "1,656 parameters",
        "a context of 32 tokens",
        "96 tokens in the vocabulary",
        "6 rows of",
        "held out: 2 rows of",
        "112 of 1,768 parameters are trainable",
        "4 steps in",
        "tokens/s",
        "(first and last step)",
        f"held-out loss {result.before:.3f} -> {result.after:.3f}",
        f"kept in {tmp_path}: the adapter",
    ):
        assert part in report


@pytest.mark.parametrize("told", [True, False])
def test_the_report_says_how_much_memory_it_took_where_the_system_tells(inputs, tmp_path, monkeypatch, told):
    if not told:
        monkeypatch.setitem(sys.modules, "resource", None)
    _, report = run_and_report(config_for(inputs, tmp_path))
    assert ("MB of memory" in report) is told


def test_the_report_of_a_run_without_a_split_says_so(inputs, tmp_path):
    _, report = run_and_report(config_for(inputs, tmp_path, eval_split=0.0))
    assert "held out: nothing" in report
    assert "held-out loss" not in report


@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_a_folder_with_gpt2s_tokenizer_is_fine_tuned(inputs, bpe_folder, tmp_path, kind):
    base = GPT(replace(character_gpt(n_embd=8).config, vocab_size=300), np.random.default_rng(0))
    save_model(base, tmp_path / "base")
    shutil.copy(bpe_folder / "tokenizer.json", tmp_path / "base")
    config = config_for(inputs, tmp_path / "out", kind, base=str(tmp_path / "base"))
    result, report = run_and_report(config)
    assert len(result.losses) == 4
    assert "300 tokens in the vocabulary" in report
    load_adapter(tmp_path / "out", base, say=lambda receipt: None)


@pytest.mark.parametrize("adds", [True, False])
def test_the_report_says_what_texts_begin_with(inputs, tmp_path, adds):
    base = write_sentencepiece_base(tmp_path / "a.gguf", ggml__add_bos_token=adds)
    _, report = run_and_report(config_for(inputs, tmp_path / "out", base=str(base)))
    assert ("texts and prompts begin with '<s>', which the base's tokenizer puts there" in report) == adds


CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")  # fmt: skip
CONVERSATIONS = [[{"role": "user", "content": f"{i} <|im_end|>?"}, {"role": "assistant", "content": answer},
                  {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes " * 4 * i + answer}]
                 for i, (_, answer) in enumerate(PAIRS)]  # fmt: skip


@pytest.fixture
def chat_inputs(bpe_folder, tmp_path):
    """A base that has a chat template, and conversations of several answers, some of them too long for it."""
    base = GPT(replace(character_gpt(n_embd=8).config, vocab_size=302, block_size=100), np.random.default_rng(0))
    save_model(base, tmp_path / "base")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(bpe_folder / name, tmp_path / "base")
    decoder = {str(300 + i): {"content": f"<|im_{name}|>", "special": True} for i, name in enumerate(("start", "end"))}
    settings = {"eos_token": "<|im_end|>", "added_tokens_decoder": decoder}
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "base" / "chat_template.jinja").write_text(CHATML)
    rows = [{"messages": messages, "source": "a test"} for messages in CONVERSATIONS]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_conversations_are_learned_where_the_assistant_answers(chat_inputs, tmp_path, monkeypatch):
    tokenizer = finetune.load_tokenizer(chat_inputs / "base")

    def learned(ids, targets):
        return {tuple(tokenizer.decode(row[row != IGNORE]).split("<|im_end|>")[:-1]) for row in targets}

    batches = spied(monkeypatch, GPT, "loss", learned)
    config = config_for(chat_inputs, tmp_path / "out", too_long="drop", eval_split=0.0, steps=12, length=None)
    result, report = run_and_report(config)
    answers = [(messages[1]["content"], messages[3]["content"]) for messages in CONVERSATIONS]
    n_fitting = len(set().union(*batches))
    assert 2 < n_fitting < 8
    assert set().union(*batches) == set(answers[:n_fitting])
    assert f"{8 - n_fitting} of 8 rows are longer than 100 tokens: they are dropped" in report
    assert report.count("ignored, and not learned: source") == 1
    assert f"data {config.data}: {n_fitting} rows of" in report
    assert len(result.losses) == 12


def test_a_run_on_conversations_goes_on_to_the_bit_and_only_with_the_same_rows(chat_inputs, tmp_path):
    config = config_for(chat_inputs, tmp_path / "stopped", too_long="cut", length=None)
    whole = run(replace(config, out=str(tmp_path / "whole")))
    stop(config)
    with pytest.raises(ValueError, match="settings too_long: cut in the checkpoint, drop now"):
        run(replace(config, too_long="drop"), resume=True)
    assert same(run(config, resume=True), whole)


def test_rows_too_long_are_refused_before_anything_is_written(chat_inputs, tmp_path):
    told = r"rows are longer than the model's context of 100.*or choose --too-long cut or drop"
    with pytest.raises(ValueError, match=told):
        run(config_for(chat_inputs, tmp_path / "out", length=None))
    assert not (tmp_path / "out").exists()


# In parts, on threads.


def threads_change_no_bit(inputs, folder, parts=3, threads=3, threads_later=2, seed=7, step=3):
    """A run on any number of threads, interrupted and resumed on another, gives the bits of a run on one thread."""
    on_one_thread = run(config_for(inputs, folder / "one thread", seed=seed, batch=3), parts=parts)
    whole = run(config_for(inputs, folder / "whole", seed=seed, batch=3), parts=parts, threads=threads)
    assert same(whole, on_one_thread)
    config = config_for(inputs, folder / "stopped", seed=seed, batch=3)
    assert config.dropout > 0
    stop(config, step, parts=parts, threads=threads)
    resumed = run(config, parts=parts, threads=threads_later, resume=True)
    assert same(resumed, whole)


@settings(max_examples=6)
@given(seeds, st.integers(1, 3), st.integers(1, 4), st.data())
def test_seed_and_parts_decide_every_bit_and_threads_none(inputs, tmp_path_factory, seed, parts, step, data):
    threads = data.draw(st.integers(1, parts))
    threads_later = data.draw(st.integers(1, parts))
    threads_change_no_bit(inputs, tmp_path_factory.mktemp("run"), parts, threads, threads_later, seed, step)


@pytest.mark.parametrize("threads, threads_later", [(1, 3), (2, 1), (2, 3), (3, 2), (3, 3)])
def test_a_run_in_three_parts_goes_on_to_the_bit_on_any_number_of_threads(inputs, tmp_path, threads, threads_later):
    threads_change_no_bit(inputs, tmp_path, 3, threads, threads_later)


def one_generator_for_all_parts(patch):
    rng = np.random.default_rng(0)
    patch.setattr("minilora.training.parts.part_rng", lambda seed, step, part: rng)


def as_many_parts_as_threads(patch):
    workers = lambda model, parts, threads: PartWorkers(model, threads, threads)
    patch.setattr("minilora.training.finetune.PartWorkers", workers)


@pytest.mark.parametrize("bug", [one_generator_for_all_parts, as_many_parts_as_threads])
def test_bits_that_hang_on_threads_are_noticed(inputs, tmp_path, monkeypatch, bug):
    bug(monkeypatch)
    with pytest.raises(AssertionError):
        threads_change_no_bit(inputs, tmp_path)


@pytest.mark.parametrize("parts, threads", [(1, 1), (3, 1), (3, 3)])
def test_two_seeds_give_two_adapters(inputs, tmp_path, parts, threads):
    how = {"parts": parts, "threads": threads}
    first = run(config_for(inputs, tmp_path / "0", seed=0), **how)
    second = run(config_for(inputs, tmp_path / "1", seed=1), **how)
    assert contents(first.adapter) != contents(second.adapter)
    assert first.losses != second.losses


def test_a_run_goes_on_in_as_many_parts_as_it_began_with(inputs, tmp_path):
    config = config_for(inputs, tmp_path)
    stop(config, parts=2)
    with pytest.raises(ValueError, match=r"arrays parts \(--parts\): 2 in the checkpoint, 1 now"):
        run(config, resume=True)


def test_there_are_no_more_parts_than_rows(inputs, tmp_path, monkeypatch):
    made = spied(monkeypatch, PartWorkers, "__init__", lambda model, parts, threads: (parts, threads))
    for batch in (1, 2, 4):
        run(config_for(inputs, tmp_path / str(batch), batch=batch, eval_split=0.0), parts=3, threads=3)
    assert made == [(1, 1), (2, 2), (3, 3)]


@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_batches_accumulated_are_one_batch_of_all_their_rows(inputs, tmp_path, kind, monkeypatch):
    """To the bit on a text. Rows are sorted by length within some batches, so there they differ with their size."""
    shapes = spied(monkeypatch, GPT, "loss", lambda ids, targets: len(ids))
    changes = {"eval_split": 0.0, "steps": 3}
    config = config_for(inputs, tmp_path / "whole", kind, batch=4, **changes)
    whole = run(config, parts=4)
    config = config_for(inputs, tmp_path / "apart", kind, batch=2, accumulate=2, **changes)
    stop(config, 2, parts=2, threads=2)
    apart = run(config, parts=2, resume=True)
    assert set(shapes) == {1}
    assert len(apart.losses) == 3
    assert same(apart, whole) == (kind == "txt")


def test_a_run_goes_on_with_as_many_batches_a_step(inputs, tmp_path):
    config = config_for(inputs, tmp_path, accumulate=2)
    stop(config)
    with pytest.raises(ValueError, match="settings accumulate: 2 in the checkpoint, 1 now"):
        run(replace(config, accumulate=1), resume=True)


def test_a_run_of_one_row_a_batch_is_the_same_however_many_parts_are_asked_for(inputs, tmp_path):
    config = config_for(inputs, tmp_path / "one part", batch=1, eval_split=0.0, dropout=0.0)
    whole = run(config)
    assert run(replace(config, out=str(tmp_path / "three parts")), parts=3, threads=2).losses == whole.losses


# Killed.


class Moments:
    """Counts the moments of a run at which something could fall, and does `strike` at the one numbered `when`.

    They are: within a step, after the parameters moved, before and after each write, rename and removal.
    """

    def __init__(self, patch, when=None, strike=None):
        self.count = 0
        self.when = when
        self.strike = strike
        for owner, name in (
            (GPT, "loss"),
            (Adam, "step"),
            (Checkpoint, "take_snapshot"),
            (os, "fsync"),
            (os, "replace"),
            (os, "unlink"),
            (shutil, "rmtree"),
        ):
            patch.setattr(owner, name, self.with_moments(getattr(owner, name)))

    def with_moments(self, function):
        def call(*arguments, **options):
            self.pass_by()
            result = function(*arguments, **options)
            self.pass_by()
            return result

        return call

    def pass_by(self):
        self.count += 1
        if self.count == self.when:
            self.strike()


def count_moments(config):
    """How many moments a run has that nothing strikes."""
    with pytest.MonkeyPatch.context() as patch:
        moments = Moments(patch)
        run(config)
    return moments.count


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def exit_code_of_a_killed_run(config, resume, when):
    """Run in a process of its own that is killed, for good and without a word, at its moment `when`."""
    child = os.fork()
    if not child:
        try:
            Moments(pytest.MonkeyPatch(), when, kill)
            run(config, resume=resume)
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(os.name != "posix", reason="sends SIGKILL to a process")
def test_a_run_killed_at_any_moment_and_resumed_gives_the_same_bits(inputs, whole, tmp_path):
    """Killed twice: at every eighth moment of its first life, then at random.

    The moments before something are those of one kind, the moments after it those of the other. kills.py tries all.
    """
    kind, result, files = whole
    n_moments = count_moments(config_for(inputs, tmp_path / "count", kind))
    first = {"jsonl": 1, "txt": 4}[kind]
    rng = np.random.default_rng(0)
    codes = []
    for when in range(first, n_moments + 1, 8):
        out = tmp_path / str(when)
        config = config_for(inputs, out, kind)
        codes.append(exit_code_of_a_killed_run(config, False, when))
        resume = is_checkpoint(out / "checkpoint")
        codes.append(exit_code_of_a_killed_run(config, resume, int(rng.integers(1, 20))))
        if is_checkpoint(out / "checkpoint"):
            assert same(run(config, resume=True), result)
        elif not (out / "adapter_model.safetensors").exists():
            assert same(run(config), result)
        assert saved(out) == files
    assert n_moments > 40
    assert codes.count(-signal.SIGKILL) > n_moments / 8 + 3


def ctrl_c(*arguments, **options):
    raise KeyboardInterrupt


def interrupted_at(config, when):
    """Run with Ctrl-C at the moment `when`; returns the exception that ends the run."""
    with pytest.MonkeyPatch.context() as patch:
        Moments(patch, when, ctrl_c)
        with pytest.raises((Interrupted, KeyboardInterrupt)) as interrupt:
            run(config)
    return interrupt.value


def test_ctrl_c_at_any_moment_keeps_the_last_whole_step_and_says_how_to_go_on(inputs, whole, tmp_path):
    """At each fourth moment: before something for one kind, after something for the other."""
    kind, result, files = whole
    n_moments = count_moments(config_for(inputs, tmp_path / "count", kind, save_every=100))
    assert n_moments > 30
    steps_kept = set()
    for when in range({"jsonl": 1, "txt": 2}[kind], n_moments + 1, 4):
        out = tmp_path / str(when)
        config = config_for(inputs, out, kind, save_every=100)
        interrupt = interrupted_at(config, when)
        if not isinstance(interrupt, Interrupted):
            # Around the first snapshot nothing was begun; at the end all was done but to let go of the folder.
            assert saved(out) == files if when > 2 else not out.exists()
            continue
        n_done = json.loads((out / "checkpoint" / "checkpoint.json").read_text())["steps"]
        steps_kept.add(n_done)
        assert f"interrupted after step {n_done} of 4" in str(interrupt)
        assert str(interrupt).endswith(f"to go on, give --resume and --out {out}")
        resumed, report = run_and_report(config, resume=True)
        assert f"resumed after step {n_done} of 4" in report
        assert same(resumed, result)
        assert saved(out) == files
    assert steps_kept == {0, 1, 2, 3, 4}


def test_ctrl_c_before_there_is_anything_to_keep_is_left_to_the_caller(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "load_data", ctrl_c)
    with pytest.raises(KeyboardInterrupt) as interrupt:
        run(config_for(inputs, tmp_path / "out"))
    assert not isinstance(interrupt.value, Interrupted)
    assert not (tmp_path / "out").exists()


# The best on the way is kept.


def scripted(monkeypatch, *losses):
    """Held-out losses are these, one after the other; returns the adapters that were measured, as they were then."""
    measured = []

    def heldout_loss(model, batches, label, workers):
        measured.append({name: p.data.tobytes() for name, p in model.named_parameters() if p.requires_grad})
        return losses[len(measured) - 1]

    monkeypatch.setattr(steps, "heldout_loss", heldout_loss)
    return measured


@pytest.mark.parametrize("losses, best, told", [
    ([5, 4, 3, 6], 2, "held-out loss 5.000 -> 3.000 nats per token, after step 4, which is kept; 6.000 after step 5"),
    ([5, 4, 4, 4], 1, "held-out loss 5.000 -> 4.000 nats per token, after step 2, which is kept; 4.000 after step 5"),
    ([5, 4, 3, 2], 3, "held-out loss 5.000 -> 2.000 nats per token, after step 5, the last and the best, which"),
    ([5, 7, 5, 6], 2, "after step 4, which is kept; 6.000 after step 5, the last. No evaluation was better than the"),
])  # fmt: skip
def test_what_is_saved_is_the_best_of_the_evaluations(inputs, tmp_path, monkeypatch, losses, best, told):
    measured = scripted(monkeypatch, *map(float, losses))
    config = config_for(inputs, tmp_path / "out", steps=5, eval_every=2)
    result, report = run_and_report(config)
    assert result.evaluations == [[2, losses[1]], [4, losses[2]], [5, losses[3]]]
    assert (result.before, result.after, len(result.losses)) == (5, losses[best], 5)
    assert set(contents(result.adapter).values()) == set(measured[best].values())
    assert len({tuple(each.values()) for each in measured}) == 4
    loaded = load_adapter(tmp_path / "out", load_model(inputs / "base"), say=lambda receipt: None)
    assert contents(loaded) == contents(result.adapter)
    assert told in report
    verdicts = re.findall(r"^step (\d): held-out loss (\d\.0000), (.*)", report, re.MULTILINE)
    assert [(int(step), float(loss)) for step, loss, _ in verdicts] == list(map(tuple, result.evaluations))
    assert ["lowest" in verdict for *_, verdict in verdicts] == [losses[i] < min([9, *losses[1:i]]) for i in (1, 2, 3)]


def test_a_run_ends_after_as_many_evaluations_without_improvement_as_patience_allows(inputs, tmp_path, monkeypatch):
    scripted(monkeypatch, 5.0, 6.0, 4.0, 4.0, 5.0)
    config = config_for(inputs, tmp_path, steps=9, eval_every=1, patience=2)
    result, report = run_and_report(config)
    assert [step for step, _ in result.evaluations] == [1, 2, 3, 4]
    assert len(result.losses) == 4
    assert result.after == 4
    assert "stopped after step 4 of 9: 2 evaluations in a row were no better" in report
    told = receipt_in(tmp_path)["run"]
    assert told["steps"] == 4 and told["losses"]["best_step"] == 2


def test_the_loss_it_reports_is_that_of_what_it_saves(inputs, tmp_path):
    """At this rate the loss goes up and down."""
    config = config_for(inputs, tmp_path / "out", lr=0.5, steps=5, eval_every=1, eval_split=0.5)
    result = run(config)
    measured = [result.before, *(loss for _, loss in result.evaluations)]
    assert 0 < measured.index(min(measured)) < 5, "the best is neither the first nor the last: or this shows nothing"
    base = load_model(inputs / "base")
    model = attach(base, load_adapter(tmp_path / "out", base, say=lambda receipt: None))
    data = finetune.load_data(config.data, finetune.load_tokenizer(inputs / "base"), 32)
    _, heldout = data.split(0.5, np.random.default_rng(config.seed).spawn(3)[0])
    assert steps.heldout_loss(model, heldout.epoch(2)) == result.after == min(measured)


def test_a_held_out_loss_that_is_no_number_ends_the_run_at_the_last_step_that_was_saved(inputs, tmp_path, monkeypatch):
    measured = []

    def nan_after_step_4(model, batches, label, workers):
        measured.append(model)
        if len(measured) == 3:
            model = model.map_tensors(lambda t: Tensor(t.data * np.nan))
        return loop.heldout_loss(model, batches)

    monkeypatch.setattr(steps, "heldout_loss", nan_after_step_4)
    with pytest.raises(ValueError, match="heldout_loss: the loss is nan.* or its learning rate"):
        run(config_for(inputs, tmp_path, eval_every=2))
    assert is_checkpoint(tmp_path / "checkpoint")


def lines_of(log_file):
    """The lines of a log, without what another run takes another time for."""
    records = [json.loads(line) for line in log_file.read_text().splitlines()]
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


def restless(inputs, out, **changes):
    """A run with a log, whose best is neither first nor last, and that ends early."""
    changes = {"lr": 0.5, "steps": 9, "eval_every": 1, "patience": 2, "eval_split": 0.5, "save_every": 3, **changes}
    return config_for(inputs, out, **{"log_file": str(out.parent / f"{out.name}.jsonl"), **changes})


@pytest.fixture(scope="module")
def restless_run(inputs, tmp_path_factory):
    """(the Result, what was saved, the lines of the log) of such a run that nothing killed."""
    out = tmp_path_factory.mktemp("restless") / "out"
    result = run(restless(inputs, out))
    measured = [result.before, *(loss for _, loss in result.evaluations)]
    assert 0 < measured.index(min(measured)) == len(measured) - 3 and len(result.losses) < 9
    return result, saved(out), lines_of(out.parent / "out.jsonl")


def test_a_log_has_a_line_for_each_step_and_each_evaluation(restless_run, inputs):
    result, _, lines = restless_run
    data = [line for line in (inputs / "data.jsonl").read_text().splitlines() if line]
    assert len(data) == 8
    steps = [line for line in lines if "loss" in line]
    evaluations = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    assert [line["loss"] for line in steps] == result.losses
    assert [line["step"] for line in steps] == list(range(1, len(result.losses) + 1))
    assert [line["lr"] for line in steps] == [warmup_cosine(i, 9, 0.5, 0) for i in range(len(steps))]
    assert evaluations == [(0, result.before), *map(tuple, result.evaluations)]
    tokens = [0, *(line["tokens"] for line in steps)]
    assert all(later > earlier for earlier, later in pairwise(tokens))


def test_no_checkpoint_is_ahead_of_the_log_on_the_disk(inputs, tmp_path, monkeypatch):
    """A kill leaves what was written, but a power cut leaves what was synced."""
    order = []
    for owner, name in ((RunLog, "write"), (RunLog, "sync"), (Checkpoint, "save")):
        true_function = getattr(owner, name)
        spy = lambda self, name=name, true=true_function, **fields: (order.append(name), true(self, **fields))
        monkeypatch.setattr(owner, name, spy)
    run(restless(inputs, tmp_path / "out", patience=None, steps=4, save_every=2))
    first, *saves = "".join(name[0] if name != "save" else "S" for name in order).split("S")
    # Two lines a step, and after each save the log had been synced; at the end there is nothing to add.
    assert (first, saves) == ("", ["w" + "ww" * 2 + "s", "ww" * 2 + "s", "s"])


def test_the_seconds_of_a_log_are_those_of_the_steps_alone(inputs, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(steps.time, "perf_counter", lambda: now[0])
    true_step = Adam.step

    def step(self, lr):
        now[0] += 1
        true_step(self, lr)

    def heldout_loss(model, batches, label, workers):
        now[0] += 100
        return 3.0

    monkeypatch.setattr(Adam, "step", step)
    monkeypatch.setattr(steps, "heldout_loss", heldout_loss)
    run(restless(inputs, tmp_path / "out", patience=None, steps=3))
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [record["seconds"] for record in records] == [0, 1, 1, 2, 2, 3, 3]


def test_a_run_without_evaluations_logs_the_two_losses_that_it_measures(inputs, tmp_path):
    result = run(config_for(inputs, tmp_path / "out", log_file=str(tmp_path / "log.jsonl")))
    evaluations = [(line["step"], line["eval_loss"]) for line in lines_of(tmp_path / "log.jsonl") if "loss" not in line]
    assert evaluations == [(0, result.before), (4, result.after)]


@pytest.mark.skipif(os.name != "posix", reason="sends SIGKILL to a process")
def test_best_patience_and_log_outlive_a_kill_at_any_moment(inputs, restless_run, tmp_path):
    result, files, lines = restless_run
    n_moments = count_moments(restless(inputs, tmp_path / "count"))
    codes = []
    for when in range(2, n_moments, 11):
        out = tmp_path / str(when)
        config = restless(inputs, out)
        codes.append(exit_code_of_a_killed_run(config, False, when))
        if not is_checkpoint(out / "checkpoint") and (out / "adapter_model.safetensors").exists():
            continue
        assert same(run(config, resume=is_checkpoint(out / "checkpoint")), result)
        assert saved(out) == files
        assert lines_of(tmp_path / f"{when}.jsonl") == lines
    assert len(codes) > 5 and set(codes) == {-signal.SIGKILL}


def test_best_patience_and_log_outlive_ctrl_c_in_any_step(inputs, restless_run, tmp_path):
    result, files, lines = restless_run
    for step in range(1, len(result.losses) + 1):
        config = restless(inputs, tmp_path / str(step))
        stop(config, step)
        assert same(run(config, resume=True), result)
        assert saved(tmp_path / str(step)) == files
        assert lines_of(tmp_path / f"{step}.jsonl") == lines


def the_best_is_forgotten(patch):
    true_restore = Checkpoint.restore

    def restore(self):
        progress = true_restore(self)
        self.mark_best()
        return progress

    patch.setattr(Checkpoint, "restore", restore)


def the_evaluations_are_forgotten(patch):
    true_restore = Checkpoint.restore
    patch.setattr(Checkpoint, "restore", lambda self: {**true_restore(self), "evaluations": []})


@pytest.mark.parametrize("bug", [the_best_is_forgotten, the_evaluations_are_forgotten])
def test_what_a_checkpoint_forgets_of_the_best_is_noticed(inputs, restless_run, tmp_path, monkeypatch, bug):
    result, files, _ = restless_run
    config = restless(inputs, tmp_path / "out", log_file=None)
    stop(config, len(result.losses))
    bug(monkeypatch)
    assert not same(run(config, resume=True), result)


def test_a_run_goes_on_only_with_its_own_log(inputs, tmp_path):
    config = restless(inputs, tmp_path / "out")
    stop(config)
    mine = tmp_path / "out.jsonl"
    whole = mine.read_bytes()
    run(restless(inputs, tmp_path / "other", seed=1))
    for log_file, complaint in (
        (tmp_path / "other.jsonl", "line 1: of another run"),
        (tmp_path / "none.jsonl", "line 1: expected the eval_loss of step 0, .*, and there is no such line"),
        (inputs / "data.jsonl", "line 1 is of another program"),
    ):
        before = log_file.read_bytes() if log_file.exists() else None
        with pytest.raises(ValueError, match=complaint):
            run(replace(config, log_file=str(log_file)), resume=True)
        assert before is None or log_file.read_bytes() == before
    # Without a log it may go on, and then its log has a gap.
    stop(replace(config, log_file=None), 1, resume=True)
    lines = whole.split(b"\n")
    mine.write_bytes(b"\n".join(lines[:3]) + b"\n")
    with pytest.raises(ValueError, match="line 4: expected the loss of step 2, .*, and there is no such line"):
        run(config, resume=True)
    assert mine.read_bytes() == b"\n".join(lines[:3]) + b"\n"


@pytest.mark.parametrize("name, complaint", [
    ("taken.jsonl", "is not empty, and a log is never written over: choose another file"),
    ("nowhere/log.jsonl", "nowhere does not exist; make the folder"),
    ("folder", "folder is no file; choose another name"),
    ("out/checkpoint/log.jsonl", "checkpoint does not exist"),
    # These would be taken by what the run writes itself, once it has begun.
    ("out", "out: a log is a .jsonl"),
    ("out/checkpoint", "checkpoint: a log is a .jsonl"),
    ("out/adapter_model.safetensors", "adapter_model.safetensors: a log is a .jsonl"),
    ("out/adapter_config.json", "adapter_config.json: a log is a .jsonl"),
])  # fmt: skip
def test_a_place_for_the_log_that_will_not_do_is_refused_before_anything_is_written(inputs, tmp_path, name, complaint):
    (tmp_path / "taken.jsonl").write_text("mine")
    (tmp_path / "folder").mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=complaint):
        run(config_for(inputs, tmp_path / "out", log_file=str(tmp_path / name)))
    assert (tmp_path / "taken.jsonl").read_text() == "mine" and not (tmp_path / "out").exists()


def test_a_log_is_not_put_where_the_folder_of_the_run_will_be_nor_beside_its_checkpoint(inputs, tmp_path):
    out = tmp_path / "out.jsonl"
    with pytest.raises(ValueError, match="out.jsonl will be the folder of the run"):
        run(config_for(inputs, out, log_file=str(tmp_path / "." / "out.jsonl")))
    assert not out.exists()
    config = config_for(inputs, tmp_path / "out")
    stop(config)
    log_file = tmp_path / "out" / "checkpoint" / "log.jsonl"
    with pytest.raises(ValueError, match="checkpoint is a folder in that of the run; put the log into"):
        run(replace(config, log_file=str(log_file)), resume=True)
    assert not log_file.exists()


def test_the_log_may_lie_in_the_folder_of_the_adapter(inputs, tmp_path):
    config = config_for(inputs, tmp_path / "out", log_file=str(tmp_path / "out" / "log.jsonl"))
    stop(config)
    run(config, resume=True)
    assert len(lines_of(tmp_path / "out" / "log.jsonl")) == 6


# All of a model.


def test_dora_is_trained_saved_and_resumed_as_lora_is(inputs, tmp_path):
    config = config_for(inputs, tmp_path / "whole", dora=True, target="all-linear")
    result, report = run_and_report(config)
    assert "DoRA adapter r=2, alpha=4: " in report
    pairs = result.adapter.pairs.values()
    assert all(type(pair) is DoRAPair and pair.magnitude.data.any() for pair in pairs)
    base = load_model(inputs / "base")
    saved = load_adapter(tmp_path / "whole", base, say=lambda receipt: None)
    assert contents(saved) == contents(result.adapter)
    stopped = replace(config, out=str(tmp_path / "stopped"))
    stop(stopped)
    with pytest.raises(ValueError, match="settings dora: True in the checkpoint, False now"):
        run(replace(stopped, dora=False), resume=True)
    assert same(run(stopped, resume=True), result)


def full(inputs, out, **changes):
    changes = {"alpha": None, "r": 8, "target": "all-linear", "dropout": 0.0, "full": True, **changes}
    return config_for(inputs, out, **changes)


@pytest.fixture(scope="module")
def full_run(inputs, tmp_path_factory):
    """(the Result, what was saved) of full fine-tuning that nothing killed."""
    out = tmp_path_factory.mktemp("full") / "out"
    return run(full(inputs, out)), model_in(out)


def model_in(folder):
    """What the folder of a model holds: its names, its tensors to the bit, and its configuration."""
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    return names, contents(load_model(folder)), (folder / "config.json").read_text()


def test_full_fine_tuning_leaves_a_model_that_loads_and_is_what_a_plain_loop_gives(inputs, full_run, tmp_path):
    result, (names, weights, _) = full_run
    assert names == {"model.safetensors", "config.json", "receipt.json", "run.json"}
    model = load_model(inputs / "base").trainable_copy()
    config = full(inputs, tmp_path / "out")
    split_rng, _, batch_rng = np.random.default_rng(config.seed).spawn(3)
    data, _ = finetune.load_data(config.data, finetune.load_tokenizer(inputs / "base"), 32).split(0.25, split_rng)
    schedule = lambda step: warmup_cosine(step, 4, config.lr, 0)
    losses = train(model, Adam(model.parameters()), data.batches(2, batch_rng), 4, schedule=schedule, quiet=True)
    assert losses == result.losses
    assert contents(model) == contents(result.adapter) == weights != contents(load_model(inputs / "base"))


def test_its_memory_is_told_before_it_is_taken(inputs, tmp_path, monkeypatch):
    lines = []
    with monkeypatch.context() as patch:
        patch.setattr(GPT, "trainable_copy", ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            finetune.finetune(full(inputs, tmp_path / "out", eval_every=2), log=lines.append)
    assert not (tmp_path / "out").exists()
    held = []
    true_init = Checkpoint.__init__

    def init(self, folder, identity, module, adam, **more):
        weights = sum(p.data.nbytes for p in module.parameters())
        held.append((weights, sum(a.nbytes for a in adam.m + adam.v)))
        true_init(self, folder, identity, module, adam, **more)

    monkeypatch.setattr(Checkpoint, "__init__", init)
    _, report = run_and_report(full(inputs, tmp_path / "out", base=str(inputs / "base")))
    [(weights, moments)] = held
    assert weights == 1656 * 4 and moments == 2 * weights
    parts = training_bytes(load_model(inputs / "base"), keeps_best=True)
    assert list(parts.values()) == [weights, weights, moments, weights]
    assert lines[-1].startswith("memory of full fine-tuning: 0.0 MB (weights 0.0, gradients 0.0, Adam's two moments ")
    assert "the best weights so far" in lines[-1] and "the best weights" not in report
    assert "full fine-tuning: 1,656 of 1,656 parameters are trainable (100.00 %)" in report
    assert f"kept in {tmp_path / 'out'}: the model, " in report


def test_a_base_in_halves_is_widened_and_told(tmp_path, inputs, bpe_folder):
    save_model(small_llama(vocab_size=300, max_position_embeddings=64), tmp_path / "halves", dtype="bfloat16")
    shutil.copy(bpe_folder / "tokenizer.json", tmp_path / "halves")
    config = full(inputs, tmp_path / "out", base=str(tmp_path / "halves"), steps=1)
    result, report = run_and_report(config)
    base = load_model(tmp_path / "halves")
    size = sum(p.size for p in base.parameters())
    assert training_bytes(base, keeps_best=False)["weights"] == 4 * size > sum(p.nbytes for p in base.parameters())
    assert "the base is stored as BF16: widened to be trained, 0." in report
    assert {p.dtype.name for p in result.adapter.parameters()} == {"float32"}
    model = load_model(tmp_path / "out")
    assert contents(model) == contents(result.adapter) and stored_as(model) == {}
    assert (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize("changes", [{}, {"eval_every": 1, "lr": 0.5}], ids=str)
@pytest.mark.skipif(os.name != "posix", reason="sends SIGKILL to a process")
def test_full_fine_tuning_outlives_a_kill_at_any_moment(inputs, tmp_path, changes):
    result = run(full(inputs, tmp_path / "whole", **changes))
    kept = model_in(tmp_path / "whole")
    n_moments = count_moments(full(inputs, tmp_path / "count", **changes))
    for when in range(3, n_moments, 11):
        out = tmp_path / str(when)
        config = full(inputs, out, **changes)
        assert exit_code_of_a_killed_run(config, False, when) == -signal.SIGKILL
        if (out / "model.safetensors").exists():
            load_model(out)
        if is_checkpoint(out / "checkpoint"):
            assert same(run(config, resume=True), result)
        elif not (out / "model.safetensors").exists():
            assert same(run(config), result)
        if not is_checkpoint(out / "checkpoint"):
            assert model_in(out) == kept


def test_ctrl_c_goes_back_to_the_last_step_of_a_model_that_was_saved(inputs, full_run, tmp_path):
    result, files = full_run
    for step, kept in ((1, 0), (2, 0), (3, 2), (4, 2)):
        config = full(inputs, tmp_path / str(step))
        stop(config, step)
        state = json.loads((tmp_path / str(step) / "checkpoint" / "checkpoint.json").read_text())
        assert state["steps"] == kept
        resumed, report = run_and_report(config, resume=True)
        assert f"resumed after step {kept} of 4" in report
        assert same(resumed, result)
        assert model_in(tmp_path / str(step)) == files


def test_on_another_device_it_stops_and_goes_on_as_here(inputs, tmp_path):
    """There the arrays of a checkpoint are fetched, and the best is put back. A real GPU adds up in no fixed order."""
    changes = {"eval_every": 1, "lr": 0.5, "steps": 3, "log_file": str(tmp_path / "log.jsonl")}
    whole = run(full(inputs, tmp_path / "whole", **{**changes, "log_file": None}), xp=strict_array)
    assert whole.after == min(loss for _, loss in whole.evaluations)
    config = full(inputs, tmp_path / "stopped", **changes)
    stop(config, 3, xp=strict_array)
    resumed = run(config, xp=strict_array, resume=True)
    assert resumed[1:] == whole[1:]
    assert contents(load_model(tmp_path / "stopped")) == contents(load_model(tmp_path / "whole"))


def test_an_adapter_does_not_go_on_as_a_model(inputs, tmp_path):
    stop(config_for(inputs, tmp_path))
    with pytest.raises(ValueError, match="settings full: False in the checkpoint, True now"):
        run(full(inputs, tmp_path), resume=True)


@pytest.mark.parametrize("base", [lambda: small_gpt(vocab_size=300, block_size=64),
                                  lambda: small_llama(vocab_size=300, max_position_embeddings=64)],
                         ids=["gpt2", "llama"])  # fmt: skip
def test_transformers_reads_the_model(inputs, bpe_folder, tmp_path, base):
    torch = pytest.importorskip("torch", reason="the extra peers is not installed")
    transformers = pytest.importorskip("transformers")
    model = base()
    save_model(model, tmp_path / "base")
    shutil.copy(bpe_folder / "tokenizer.json", tmp_path / "base")
    result = run(full(inputs, tmp_path / "out", base=str(tmp_path / "base")))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = np.arange(12).reshape(2, 6)
    with torch.no_grad():
        logits = theirs(torch.from_numpy(ids)).logits.numpy()
    # Two float32 programs; the change itself is a hundred times as large.
    assert np.abs(logits - result.adapter(ids).data).max() < 1e-4 < 0.01 < np.abs(logits - model(ids).data).max()


def test_peft_reads_the_adapter_beside_the_file_of_its_run(inputs, bpe_folder, tmp_path):
    torch = pytest.importorskip("torch", reason="the extra peers is not installed")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    model = small_llama(vocab_size=300, max_position_embeddings=64)
    save_model(model, tmp_path / "base")
    shutil.copy(bpe_folder / "tokenizer.json", tmp_path / "base")
    config = config_for(inputs, tmp_path / "out", base=str(tmp_path / "base"), target="all-linear", rslora=True)
    result = run(replace(config, rank_pattern={"q_proj": 3}, alpha_pattern={"v_proj": 0.5}))
    assert {"run.json", "receipt.json"} < {path.name for path in (tmp_path / "out").iterdir()}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "out").eval()
    ids = np.arange(12).reshape(2, 6)
    with torch.no_grad():
        logits = theirs(torch.from_numpy(ids)).logits.numpy()
    ours = attach(model, result.adapter)(ids).data
    # Two float32 programs; what the adapter does is a hundred times as large.
    assert np.abs(logits - ours).max() < 1e-4 < 0.01 < np.abs(ours - model(ids).data).max()


# Planted bugs in going on.


def dropout_begins_anew(patch):
    patch.setattr("minilora.training.parts.part_rng", lambda seed, step, part: part_rng(seed, max(0, step - 2), part))


def one_batch_is_left_out(patch):
    patch.setattr(steps, "islice", lambda batches, start, end: islice(batches, start + 1, end))


def one_batch_comes_twice(patch):
    patch.setattr(steps, "islice", lambda batches, start, end: islice(batches, start - 1, end))


def the_batches_begin_anew(patch):
    patch.setattr(steps, "islice", lambda batches, start, end: batches)


def adam_forgets_its_moments(patch):
    def load_steps_alone(self, state):
        self.steps = state["steps"]

    patch.setattr(Adam, "load_state_dict", load_steps_alone)


@pytest.mark.parametrize("bug", [
    dropout_begins_anew, one_batch_is_left_out, one_batch_comes_twice, the_batches_begin_anew, adam_forgets_its_moments,
])  # fmt: skip
def test_each_planted_bug_in_resuming_changes_the_bits(inputs, whole, tmp_path, monkeypatch, bug):
    kind, result, _ = whole
    config = config_for(inputs, tmp_path, kind)
    stop(config)
    bug(monkeypatch)
    assert not same(run(config, resume=True), result)


def test_a_snapshot_that_is_no_copy_would_keep_half_a_step(inputs, whole, tmp_path, monkeypatch):
    kind, result, _ = whole
    config = config_for(inputs, tmp_path, kind)
    with monkeypatch.context() as patch:
        patch.setattr("minilora.training.checkpoint._copies", lambda arrays: arrays)
        stop(config)
    assert not same(run(config, resume=True), result)


# What may change before a run goes on, and what may not.


@pytest.mark.parametrize("step", [0, 1, 3])
def test_an_error_leaves_the_last_checkpoint_if_a_step_is_in_it_and_else_nothing(inputs, whole, tmp_path, monkeypatch,
                                                                                 step):  # fmt: skip
    kind, result, _ = whole
    config = config_for(inputs, tmp_path / "out", kind)
    true_rate = FineTuneConfig.rate

    def not_a_number_from_a_step_on(self, n_done):
        return true_rate(self, n_done) if n_done < step else np.nan

    with monkeypatch.context() as patch:
        patch.setattr(FineTuneConfig, "rate", not_a_number_from_a_step_on)
        with pytest.raises(ValueError, match="learning rate must be finite") as error:
            run(config)
        assert ("To start again with other settings, remove" in str(error.value)) == (step == 3)
        assert (tmp_path / "out").exists() == (step == 3)
        if step == 3:
            with pytest.raises(ValueError, match=r"holds a run that failed, and would fail again \(.*must be finite"):
                run(config)
    assert same(run(config, resume=step == 3), result)


def test_where_things_lie_and_how_often_they_are_saved_may_change(inputs, whole, tmp_path):
    kind, result, _ = whole
    stop(config_for(inputs, tmp_path / "out", kind))
    shutil.copytree(inputs, tmp_path / "inputs elsewhere")
    (tmp_path / "out").rename(tmp_path / "out elsewhere")
    moved = config_for(tmp_path / "inputs elsewhere", tmp_path / "out elsewhere", kind, save_every=1)
    assert same(run(moved, resume=True), result)


def other_settings(config, folder):
    return replace(config, lr=0.5, steps=9)


def other_targets(config, folder):
    return replace(config, target=["q_proj"])


def another_base(config, folder):
    base = character_gpt(n_embd=8)
    base.wte.weight.data[3, 4] += 2**-10
    save_model(base, folder / "base")
    return replace(config, base=str(folder / "base"))


def another_file(config, folder):
    """The same tokens: a file that differs in no more than the order of its keys is another file all the same."""
    lines = [json.dumps({"answer": answer, "prompt": prompt}) + "\n" for prompt, answer in PAIRS]
    (folder / "data.jsonl").write_text("".join(lines))
    return replace(config, data=str(folder / "data.jsonl"))


@pytest.mark.parametrize("change, differences", [
    (other_settings, [r"settings lr: 0\.01 in the checkpoint, 0\.5 now", "settings steps: 4 in the checkpoint, 9 now"]),
    (other_targets, [r"settings target: \['q_proj', 'up_proj'\] in the checkpoint, \['q_proj'\] now"]),
    (another_base, [r"base wte.weight: \w{16} in the checkpoint, \w{16} now"]),
    (another_file, [r"data sha256: \w{64} in the checkpoint, \w{64} now"]),
])  # fmt: skip
def test_another_run_is_not_gone_on_with(inputs, tmp_path, change, differences):
    config = config_for(inputs, tmp_path / "out")
    stop(config)
    before = bytes_in(tmp_path / "out" / "checkpoint")
    complaint = "checkpoint belongs to another run; go on with what that began with"
    with pytest.raises(ValueError, match=complaint) as refusal:
        run(change(config, tmp_path), resume=True)
    _, *lines = str(refusal.value).splitlines()
    assert len(lines) == len(differences)
    for line, difference in zip(lines, differences, strict=True):
        assert re.fullmatch(f"  {difference}", line)
    assert bytes_in(tmp_path / "out" / "checkpoint") == before


def test_the_same_file_in_other_tokens_is_another_run(inputs, tmp_path, monkeypatch):
    config = config_for(inputs, tmp_path / "out", eval_split=0.0)
    stop(config)
    load_tokenizer = finetune.load_tokenizer
    monkeypatch.setattr(finetune, "load_tokenizer", lambda folder: replace(load_tokenizer(folder), ends=(1,)))
    with pytest.raises(ValueError, match="data tokens: .* in the checkpoint"):
        run(config, resume=True)


def test_a_checkpoint_of_another_version_is_refused_in_one_line_that_names_it(tmp_path):
    old = tmp_path / "old"
    shutil.copytree(Path(__file__).parents[1] / "golden" / "v0_1" / "checkpoint", old)
    config = FineTuneConfig(base=str(old / "base"), data=str(old / "notes.txt"), out=str(old / "out"), alpha=4, r=2,
                            lr=1e-2, steps=8, batch=4, seed=3, eval_split=0.2, length=16, dropout=0.1)  # fmt: skip
    before = {path: path.read_bytes() for path in (old / "out").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"written by minilora 0\.1, and this is 0\.7: go on with that") as refusal:
        run(config, resume=True)
    assert "\n" not in str(refusal.value)
    assert {path: path.read_bytes() for path in (old / "out").rglob("*") if path.is_file()} == before


def test_a_run_on_a_packed_base_is_another_run_and_its_adapter_remembers(inputs, tmp_path):
    config = config_for(inputs, tmp_path / "out", quantize="nf4")
    result, report = run_and_report(config)
    linears = [name for name, _ in load_model(inputs / "base").named_parameters() if name.endswith("_proj.weight")]
    assert f"the weights of {len(linears)} linears, float32 before, are packed as nf4: 0.01 MB become 0.00 MB" in report
    assert result.adapter.base_stored == dict.fromkeys(linears, "NF4")
    base = load_model(inputs / "base")
    loaded = load_adapter(tmp_path / "out", quantize(base, "nf4"), say=lambda receipt: None)
    assert contents(loaded) == contents(result.adapter)
    with pytest.raises(ValueError, match="in another precision"):
        load_adapter(tmp_path / "out", base)
    stop(replace(config, out=str(tmp_path / "again")))
    with pytest.raises(ValueError, match="settings quantize: nf4 in the checkpoint, None now"):
        run(replace(config, out=str(tmp_path / "again"), quantize=None), resume=True)
    assert same(run(replace(config, out=str(tmp_path / "again")), resume=True), result)


# Refused.


@pytest.mark.parametrize("parts, threads", [(1, 0), (2, 3)])
def test_threads_that_cannot_be_are_refused_before_anything_is_written(inputs, tmp_path, parts, threads):
    with pytest.raises(ValueError, match=f"parts {parts}, threads {threads}"):
        run(config_for(inputs, tmp_path / "out"), parts=parts, threads=threads)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes, complaint", [
    ({"eval_split": 0.01}, "8 lines to train on and 0 held out"),
    ({"batch": 7}, "6 lines to train on do not make one batch of 7"),
    ({"length": 8}, "length 8 is for"),
    ({"target": ["c_fc"]}, "match no Linear layer"),
    ({"data": "data.csv"}, "are a .txt file"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_is_written(inputs, tmp_path, changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        run(config_for(inputs, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_a_run_is_not_started_over_one_that_has_not_ended(inputs, tmp_path):
    config = config_for(inputs, tmp_path / "out")
    stop(config)
    before = bytes_in(tmp_path / "out" / "checkpoint")
    with pytest.raises(ValueError, match="has not ended: go on with --resume, remove .*checkpoint, or choose"):
        run(config)
    assert bytes_in(tmp_path / "out" / "checkpoint") == before


def test_a_run_is_not_started_over_an_adapter(inputs, tmp_path):
    config = config_for(inputs, tmp_path / "out")
    run(config)
    before = bytes_in(tmp_path / "out")
    with pytest.raises(ValueError, match=r"holds an adapter, which is never written over: .*\(--keep 3\)"):
        run(config)
    assert bytes_in(tmp_path / "out") == before
    # What is in the way of the next one is told before that is trained.
    (tmp_path / "out" / "versions").write_text("mine")
    with pytest.raises(ValueError, match="versions is a file, where versions are kept"):
        run(config_for(inputs, tmp_path / "out", keep=1))
    assert bytes_in(tmp_path / "out") == {**before, "versions": b"mine"}


def test_nothing_to_resume_is_told(inputs, tmp_path):
    config = config_for(inputs, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="in .*: no run was begun there; start without --resume"):
        run(config, resume=True)
    run(config)
    with pytest.raises(FileNotFoundError, match="in .*: the run has ended, and what it learned is there"):
        run(config, resume=True)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.bin"])
def test_what_another_program_left_is_not_written_over(name, inputs, tmp_path):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"is not empty: it holds {name}"):
        run(config_for(inputs, tmp_path))
    assert bytes_in(tmp_path) == {name: b"mine"}


def test_what_a_kill_leaves_is_in_nobodys_way(inputs, tmp_path):
    # In the first save of a checkpoint, and while a checkpoint is removed.
    (tmp_path / "checkpoint" / UNFINISHED).mkdir(parents=True)
    (tmp_path / "checkpoint" / UNFINISHED / "checkpoint.json").write_text("{")
    (tmp_path / REMOVED).mkdir()
    run(config_for(inputs, tmp_path))
    names = {"adapter_config.json", "adapter_model.safetensors", "receipt.json", "run.json"}
    assert {path.name for path in tmp_path.iterdir()} == names


@pytest.mark.parametrize("command", ["--resume", "anew"])
def test_what_is_left_of_a_checkpoint_goes_with_the_next_command_whatever_it_says(command, inputs, tmp_path):
    config = config_for(inputs, tmp_path / "out")
    run(config)
    files = bytes_in(tmp_path / "out")
    (tmp_path / "out" / REMOVED).mkdir()
    (tmp_path / "out" / REMOVED / "checkpoint.safetensors").write_bytes(b"half")
    complaint = {"--resume": "nothing to resume .* the run has ended", "anew": "holds an adapter"}[command]
    with pytest.raises((FileNotFoundError, ValueError), match=complaint):
        saved_settings(config.out) if command == "--resume" else run(config)
    assert bytes_in(tmp_path / "out") == files


def test_it_is_not_taken_from_a_run_that_is_removing_it(inputs, tmp_path):
    (tmp_path / REMOVED).mkdir()
    with only_writer(tmp_path), pytest.raises(ValueError, match="another run writes there"):
        run(config_for(inputs, tmp_path))
    assert (tmp_path / REMOVED).exists()


# A run that cannot train.


@pytest.mark.parametrize("eval_split", [0.0, 0.25])
@pytest.mark.filterwarnings("ignore:invalid")
def test_an_error_of_the_first_step_says_where_its_numbers_come_from(eval_split, inputs, tmp_path, monkeypatch):
    config = config_for(inputs, tmp_path / "out", eval_split=eval_split)
    base = character_gpt(n_embd=8)
    base.ln_f.bias.data[0] = np.nan
    monkeypatch.setattr(finetune, "load_model", lambda path, xp: base)
    with pytest.raises(ValueError, match="loss is nan") as refusal:
        run(config)
    assert str(refusal.value).endswith(f"(the base is {config.base}, the data are {config.data})")
    assert "learning rate" not in str(refusal.value) or eval_split
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes, complaint", [
    ({"lr": 1e30}, "lower the learning rate"),
    ({"alpha": 1e300}, "lower the learning rate|not finite|inf"),
    ({"dropout": 1 - 2**-53}, "nothing was learned in 6 steps, and nothing is kept: .* every lora_B is zero"),
    ({"alpha": 1e-300, "save_every": 100}, "every lora_B is zero"),
    ({"alpha": 1e-300, "save_every": 1}, "every lora_B is zero"),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("kind", ["jsonl", "txt"])
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid")
def test_a_run_that_cannot_train_says_so_each_time_and_leaves_nothing(inputs, tmp_path, kind, changes, complaint):
    changes = {"eval_split": 0.0, "steps": 6, **changes}
    config = config_for(inputs, tmp_path / "out", kind, **changes)
    for _ in range(2):
        with np.errstate(all="ignore"), pytest.raises(ValueError, match=complaint) as error:
            run(config)
        assert "--resume" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.skipif(os.name != "posix", reason="makes a link")
def test_a_tokenizer_that_cannot_go_along_with_a_model_is_told_before_that_is_trained(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "train", None)
    shutil.copytree(inputs / "base", tmp_path / "base")
    (tmp_path / "elsewhere.json").write_text("{}")
    (tmp_path / "base" / "generation_config.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(ValueError, match="generation_config.json is a link to .*elsewhere.json"):
        run(full(inputs, tmp_path / "out", base=str(tmp_path / "base")))
    assert not (tmp_path / "out").exists()


def test_what_no_file_could_hold_is_not_trained(inputs, bpe_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "train", None)
    save_model(small_gpt(vocab_size=300, block_size=32), tmp_path / "base")
    shutil.copy(bpe_folder / "tokenizer.json", tmp_path / "base")
    parts = {"base": str(tmp_path / "base"), "target": ["q_proj", "v_proj"], "alpha_pattern": {"q_proj": 3.0}}
    with pytest.raises(ValueError, match="c_attn can have one scaling, but its parts"):
        run(config_for(inputs, tmp_path / "out", "txt", **parts))
    assert not (tmp_path / "out").exists()


def test_what_was_learned_is_not_lost_if_it_cannot_be_saved(inputs, tmp_path, monkeypatch):
    def in_the_way(*given, **how):
        raise ValueError("something is in the way")

    config = config_for(inputs, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(LearnedAdapter, "save", in_the_way)
        with pytest.raises(ValueError, match="something is in the way"):
            run(config)
    with pytest.raises(ValueError, match="holds a run that failed.*something is in the way"):
        run(config)
    assert same(run(config, resume=True), run(config_for(inputs, tmp_path / "another")))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), MemoryError()], ids=repr)
def test_steps_that_are_in_memory_alone_outlive_an_error_that_the_settings_do_not_cause(inputs, whole, tmp_path, error):
    kind, result, files = whole
    config = config_for(inputs, tmp_path / "out", kind, save_every=100)
    taken = []

    def step(self, lr, real=Adam.step):
        if len(taken) == 3:
            raise error
        taken.append(real(self, lr))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Adam, "step", step)
        with pytest.raises(type(error)):
            run(config)
    resumed, report = run_and_report(config, resume=True)
    assert "resumed after step 3 of 4" in report and same(resumed, result) and saved(tmp_path / "out") == files


@pytest.mark.skipif(os.name != "posix", reason="makes a link")
def test_a_checkpoint_elsewhere_is_refused_before_anything_is_trained(inputs, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoint").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="checkpoint is a link, and a checkpoint is made and removed in"):
        run(config_for(inputs, tmp_path / "out"))
    assert not any((tmp_path / "elsewhere").iterdir())


def test_a_checkpoint_that_nobody_can_go_on_with_is_not_to_be_resumed(inputs, tmp_path):
    config = config_for(inputs, tmp_path / "out")
    stop(config)
    state = tmp_path / "out" / "checkpoint" / "checkpoint.json"
    state.write_text(state.read_text().replace('"version": "', '"version": "0.1 or '))
    with pytest.raises(ValueError, match="written by minilora 0.1 or .*: remove .*checkpoint, or") as refusal:
        run(config)
    assert "--resume" not in str(refusal.value)


@pytest.mark.parametrize("lost", ["removed", "emptied"])
def test_a_run_whose_log_is_lost_goes_on_without(lost, inputs, tmp_path):
    config = config_for(inputs, tmp_path / "out", log_file=str(tmp_path / "log.jsonl"))
    stop(config)
    if lost == "removed":
        (tmp_path / "log.jsonl").unlink()
    else:
        (tmp_path / "log.jsonl").write_bytes(b"")
    with pytest.raises(ValueError, match="there is no such line, .* go on without it .log_file=None, --no-log"):
        run(config, resume=True)
    assert same(run(replace(config, log_file=None), resume=True), run(config_for(inputs, tmp_path / "another")))


def test_a_log_without_a_step_goes_with_the_run_that_did_none(inputs, tmp_path, monkeypatch):
    def fails(*given, **how):
        raise MemoryError

    (tmp_path / "out").mkdir()
    config = config_for(inputs, tmp_path / "out", log_file=str(tmp_path / "log.jsonl"))
    with monkeypatch.context() as patch:
        patch.setattr(Adam, "step", fails)
        with pytest.raises(MemoryError):
            run(config)
    assert list(tmp_path.iterdir()) == [tmp_path / "out"] and not any((tmp_path / "out").iterdir())
    run(config)


# What is told at the end.


def test_an_adapter_that_does_nothing_is_told(inputs, tmp_path):
    _, report = run_and_report(config_for(inputs, tmp_path / "a", alpha=1e-30))
    assert re.search(r"the adapter does nothing: its updates are at most \d\.\de-\d+ of a weight", report)
    _, report = run_and_report(config_for(inputs, tmp_path / "b", alpha=1e-4))
    assert "does nothing" not in report


def test_clipping_that_holds_back_every_step_is_told(inputs, tmp_path):
    for clip, told in ((1e-6, True), (1e6, False)):
        config = config_for(inputs, tmp_path / str(clip), clip=clip)
        _, report = run_and_report(config)
        assert ("clipping shortened the gradients in 4 of 4 steps, to a norm of 1e-06" in report) is told


def test_what_was_clipped_is_counted_across_a_stop(inputs, tmp_path):
    config = config_for(inputs, tmp_path, clip=1e-6)
    stop(config, 3)
    _, report = run_and_report(config, resume=True)
    assert "in 4 of 4 steps" in report


def test_weight_decay_reaches_adam(inputs, tmp_path, monkeypatch):
    adams = spied(monkeypatch, Checkpoint, "__init__", lambda folder, identity, adapter, adam: adam)
    run(config_for(inputs, tmp_path, weight_decay=0.25))
    assert adams[0].weight_decay == 0.25


def test_the_norm_to_clip_to_reaches_each_step(inputs, tmp_path, monkeypatch):
    norms = []
    monkeypatch.setattr(loop, "clip_grad_norm", lambda params, norm: norms.append(norm) or clip_grad_norm(params, norm))
    run(config_for(inputs, tmp_path, clip=0.125))
    assert norms == [0.125] * 4


# From an adapter on.


@pytest.mark.parametrize("changes", [{}, {"dora": True, "target": "all-linear"}], ids=str)
@pytest.mark.parametrize("parts", [1, 2])
def test_an_adapter_is_gone_on_from_as_if_adam_had_been_made_anew(inputs, tmp_path, changes, parts):
    """In a plain loop of the same batches."""
    run(config_for(inputs, tmp_path / "first", **changes))
    new = {"alpha": None, "r": 8, "target": "all-linear", "from_adapter": str(tmp_path / "first"), "seed": 8}
    config = config_for(inputs, tmp_path / "more", **new)
    result = run(config, parts=parts)
    base = load_model(inputs / "base")
    adapter = load_adapter(tmp_path / "first", base, say=lambda receipt: None)
    assert adapter.config.dropout == config.dropout
    split_rng, _, batch_rng = np.random.default_rng(8).spawn(3)
    data, _ = finetune.load_data(config.data, finetune.load_tokenizer(inputs / "base"), 32).split(0.25, split_rng)
    adam = Adam(adapter.parameters())
    how = {"schedule": config.rate, "seed": 8, "parts": parts, "quiet": True}
    assert train(attach(base, adapter), adam, data.batches(2, batch_rng), 4, **how) == result.losses
    assert contents(adapter) == contents(result.adapter)
    stopped = replace(config, out=str(tmp_path / "stopped"))
    stop(stopped, parts=parts)
    assert same(run(stopped, parts=parts, resume=True), result)


def test_the_dropout_of_a_run_is_its_own_whatever_the_adapter_had(inputs, tmp_path):
    run(config_for(inputs, tmp_path / "first", dropout=0.5))
    new = {"alpha": None, "r": 8, "target": "all-linear", "from_adapter": str(tmp_path / "first"), "dropout": 0.0}
    result = run(config_for(inputs, tmp_path / "more", **new))
    assert result.adapter.config.dropout == 0.0


def the_digest_is_always_the_same(patch):
    patch.setattr("minilora.training.learned.sha256_of", lambda path: "0" * 64)


@pytest.mark.parametrize("bug", [None, the_digest_is_always_the_same])
def test_a_run_goes_on_from_no_other_adapter_than_at_its_start(inputs, tmp_path, monkeypatch, bug):
    for seed in (0, 1):
        run(config_for(inputs, tmp_path / str(seed), seed=seed))
    new = {"alpha": None, "r": 8, "target": "all-linear", "from_adapter": str(tmp_path / "0")}
    if bug is not None:
        bug(monkeypatch)
    config = config_for(inputs, tmp_path / "more", **new)
    stop(config)
    other = replace(config, from_adapter=str(tmp_path / "1"))
    if bug is not None:
        run(other, resume=True)
        return
    with pytest.raises(ValueError, match="from_adapter digest: .* in the checkpoint"):
        run(other, resume=True)


# Receipts and versions.


def receipt_in(out):
    return receipt_of(out, "adapter_model.safetensors")


def without_time(receipt):
    receipt["run"].pop("seconds")
    return {field: value for field, value in receipt.items() if field not in ("date", "tensors")}


@pytest.mark.parametrize("changes", [
    {}, {"eval_every": 2}, {"eval_split": 0}, {"dora": True, "target": "all-linear"},
], ids=str)  # fmt: skip
def test_a_receipt_tells_what_came_of_a_run(inputs, tmp_path, changes):
    log_file = tmp_path / "log.jsonl"
    config = config_for(inputs, tmp_path / "out", log_file=str(log_file), **changes)
    result = run(config, parts=2, command="minilora finetune ...")
    receipt = receipt_in(tmp_path / "out")
    told = receipt["run"]
    assert receipt["command"] == "minilora finetune ..." and receipt["parents"] == [] and receipt["date"] > "2026"
    assert told["parts"] == 2 and told["steps"] == 4
    assert told["tokens"] == lines_of(log_file)[-1]["tokens"]
    losses = told["losses"]
    assert (losses["first"], losses["last"]) == (result.losses[0], result.losses[-1])
    assert (losses["held_out_before"], losses["held_out_after"]) == (result.before, result.after)
    assert (losses["best_step"] is None) == ("eval_every" not in changes)
    assert told["data"]["sha256"] == hashlib.sha256(Path(config.data).read_bytes()).hexdigest()
    base = load_model(inputs / "base")
    assert receipt["base"] == {"name": config.base, "fingerprint": peft.digest_of(base.fingerprint())}
    assert told["settings"] == json.loads((tmp_path / "out" / "run.json").read_text())
    layers = dict(base.named_modules())
    assert receipt["updates"].keys() == result.adapter.pairs.keys()
    for name, size in receipt["updates"].items():
        norm = np.linalg.norm(result.adapter.pairs[name].delta().astype(np.float64))
        assert math.isclose(size["norm"], norm, rel_tol=1e-5)
        assert math.isclose(size["share"], norm / np.linalg.norm(layers[name].weight.data), rel_tol=1e-5)
    load_adapter(tmp_path / "out", base, receipt=tmp_path / "out" / "receipt.json", say=lambda account: None)


def test_two_runs_of_a_seed_have_receipts_that_differ_in_their_times_alone(inputs, tmp_path):
    for name in "ab":
        run(config_for(inputs, tmp_path / name))
    a, b = (receipt_in(tmp_path / name) for name in "ab")
    assert without_time(a) == without_time(b) and a["date"] != b["date"]


def test_a_receipt_names_the_adapter_that_was_gone_on_from(inputs, tmp_path):
    run(config_for(inputs, tmp_path / "first"))
    new = {"alpha": None, "r": 8, "target": "all-linear", "from_adapter": str(tmp_path / "first")}
    run(config_for(inputs, tmp_path / "more", **new))
    assert receipt_in(tmp_path / "more")["parents"] == [receipt_in(tmp_path / "first")["tensors"]["sha256"]]


def test_what_no_float_can_say_of_an_update_is_null_and_ends_no_run():
    base = small_gpt(dtype="float64")
    adapter = trained_adapter(base, target_modules=["q_proj"])
    layers = dict(base.named_modules())
    for name, weight, size in (("h.0.attn.q_proj", 0.0, 1.0), ("h.1.attn.q_proj", 1e-300, 1e300)):
        layers[name].weight.data[...] = weight
        adapter.pairs[name].lora_A.data[...] = size
        adapter.pairs[name].lora_B.data[...] = size
    with np.errstate(over="ignore", invalid="ignore"):
        sizes = update_sizes(base, adapter)
    assert sizes["h.0.attn.q_proj"]["norm"] > 0 and sizes["h.0.attn.q_proj"]["share"] is None
    assert sizes["h.1.attn.q_proj"] == {"norm": None, "share": None}
    check_receipt("r", {"receipt": 1, **receipt_fields(updates=sizes), "tensors": {"file": "f", "sha256": "0" * 64}})


def test_a_model_has_a_receipt_too(inputs, tmp_path):
    run(full(inputs, tmp_path / "out"))
    assert receipt_of(tmp_path / "out", "model.safetensors")["updates"] == {}


def seeds_kept(out):
    return [version.receipt["run"]["settings"]["seed"] for version in kept_versions(out)]


def test_an_adapter_from_before_is_kept_as_a_version_and_the_oldest_go(inputs, tmp_path):
    out = tmp_path / "out"
    for seed in range(4):
        result, report = run_and_report(config_for(inputs, out, seed=seed, keep=2))
        assert receipt_in(out)["run"]["settings"]["seed"] == seed and seeds_kept(out) == list(range(seed))[-2:]
        assert ("the adapter from before is kept in" in report) == (seed > 0)
        assert ("removed, as more than 2 versions were kept" in report) == (seed > 2)
    assert same(run(config_for(inputs, tmp_path / "alone", seed=3)), result)
    loaded = load_adapter(out, load_model(inputs / "base"), say=lambda account: None)
    assert contents(loaded) == contents(result.adapter)


def test_the_adapter_that_was_in_use_is_kept_though_its_date_is_the_oldest(inputs, tmp_path):
    """It was put back in the place of a newer one, and is what the next run goes on from."""
    out = tmp_path / "out"
    for seed in (0, 1):
        run(config_for(inputs, out, seed=seed, keep=1))
    put_back(out, find_version(out))
    assert receipt_in(out)["run"]["settings"]["seed"] == 0
    on = {"alpha": None, "r": 8, "target": "all-linear", "from_adapter": str(out)}
    run(config_for(inputs, out, seed=2, keep=1, **on))
    assert seeds_kept(out) == [0]
    put_back(out, find_version(out))
    assert receipt_in(out)["run"]["settings"]["seed"] == 0
    run_again = json.loads((kept_versions(out)[-1].folder / "run.json").read_text())
    assert is_adapter(run_again["from_adapter"])


def test_a_version_that_is_gone_on_from_stays(inputs, tmp_path):
    out = tmp_path / "out"
    for seed in range(3):
        run(config_for(inputs, out, seed=seed, keep=2))
    first, second = [version.folder for version in kept_versions(out)]
    on = {"alpha": None, "r": 8, "target": "all-linear", "from_adapter": str(first)}
    run(config_for(inputs, out, seed=3, keep=2, **on))
    assert seeds_kept(out) == [0, 2] and not second.exists()


def test_equal_runs_one_after_the_other_keep_one_copy(inputs, tmp_path):
    for _ in range(4):
        run(config_for(inputs, tmp_path / "out", keep=1))
    assert len(seeds_kept(tmp_path / "out")) == 1


def test_what_another_program_wrote_is_kept_and_what_that_means_is_told(inputs, tmp_path):
    out = tmp_path / "out"
    run(config_for(inputs, out, seed=1))
    tensors = load_file(out / "adapter_model.safetensors")
    save_file(tensors, out / "adapter_model.safetensors", {"format": "pt"})
    _, report = run_and_report(config_for(inputs, out, seed=2, keep=1))
    assert re.search("kept in .*\nit cannot be put back: .* was written by another program", report)


@pytest.mark.parametrize("wrong", [{"base": "nowhere"}, {"data": "nowhere.jsonl"}, {"batch": 99}], ids=str)
def test_a_run_that_is_refused_keeps_no_version(wrong, inputs, tmp_path):
    out = tmp_path / "out"
    run(config_for(inputs, out))
    before = saved(out)
    on = {"alpha": None, "r": 8, "target": "all-linear", "from_adapter": str(out), "keep": 1}
    with pytest.raises((ValueError, FileNotFoundError)):
        run(config_for(inputs, out, **on, **wrong))
    assert saved(out) == before and not (out / "versions").exists()


def test_the_adapter_from_before_is_used_until_its_run_has_ended_and_a_resumed_one_keeps_it(inputs, tmp_path):
    out = tmp_path / "out"
    run(config_for(inputs, out, seed=1))
    config = config_for(inputs, out, seed=2, keep=1)
    stop(config)
    assert receipt_in(out)["run"]["settings"]["seed"] == 1 and seeds_kept(out) == []
    with pytest.raises(ValueError, match="settings keep: 1 in the checkpoint, None now"):
        run(replace(config, keep=None), resume=True)
    assert same(run(config, resume=True), run(config_for(inputs, tmp_path / "alone", seed=2)))
    assert receipt_in(out)["run"]["settings"]["seed"] == 2 and seeds_kept(out) == [1]


def test_a_kill_after_the_save_loses_no_version(inputs, tmp_path, monkeypatch):
    out = tmp_path / "out"
    for seed in (0, 1):
        run(config_for(inputs, out, seed=seed, keep=2))
    config = config_for(inputs, out, seed=2, keep=2)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "remove", lambda self: pressed())
        with pytest.raises(Interrupted):
            run(config)
    assert receipt_in(out)["run"]["settings"]["seed"] == 2
    run(config, resume=True)
    assert receipt_in(out)["run"]["settings"]["seed"] == 2
    assert seeds_kept(out) == [0, 1], "no copy of the adapter in use"
    run(config)
    assert seeds_kept(out) == [0, 1, 2], "another run with the same settings is another run"


@pytest.mark.parametrize("quiet", [False, True])
def test_a_quiet_run_draws_no_progress_and_logs_what_was_learned(quiet, inputs, tmp_path, monkeypatch):
    shown = []
    true_bar = loop.tqdm

    def bar(*arguments, disable, **options):
        shown.append(disable)
        return true_bar(*arguments, disable=True, **options)

    monkeypatch.setattr(loop, "tqdm", bar)
    _, report = run_and_report(config_for(inputs, tmp_path / "out"), quiet=quiet)
    # The held-out loss before, the steps, the held-out loss after. None: drawn on a terminal.
    assert shown == [True if quiet else None] * 3
    assert report.startswith("4 steps in ") == quiet


def test_who_goes_on_on_a_grown_vocabulary_has_an_adapter_of_that(inputs, tmp_path):
    run(config_for(inputs, tmp_path / "first"))
    base = grown(load_model(inputs / "base"))
    config = config_for(inputs, tmp_path / "out", alpha=None, r=8, target="all-linear",
                        from_adapter=str(tmp_path / "first"), accept_base=["grown-vocabulary"])  # fmt: skip
    rng = np.random.default_rng(0)
    adapter = LearnedAdapter(base, config, rng, lambda line: None).module
    assert adapter.base_rows == table_rows(base) != table_rows(load_model(inputs / "base"))
    assert adapter.base_fingerprint == base.fingerprint()


def pressed():
    raise KeyboardInterrupt


def test_a_run_goes_on_from_the_adapter_in_its_own_folder(inputs, tmp_path):
    """Stopped and resumed too, and its run.json repeats it: what it went on from is the version that was kept."""
    new = {"alpha": None, "r": 8, "target": "all-linear", "keep": 2}
    run(config_for(inputs, tmp_path / "first"))
    elsewhere = run(config_for(inputs, tmp_path / "more", **new, from_adapter=str(tmp_path / "first")))
    run(config_for(inputs, tmp_path / "out"))
    config = config_for(inputs, tmp_path / "out", **new, from_adapter=str(tmp_path / "out"))
    stop(config)
    assert same(run(config, resume=True), elsewhere)
    [version] = kept_versions(tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "run.json").read_text())
    assert Path(settings["from_adapter"]) == version.folder
    assert receipt_in(tmp_path / "out")["parents"] == [version.digest]


def test_so_it_does_when_it_was_killed_after_it_had_saved_what_it_learned(inputs, tmp_path, monkeypatch):
    """Then the adapter in the folder is no longer what it went on from."""
    new = {"alpha": None, "r": 8, "target": "all-linear", "keep": 2}
    run(config_for(inputs, tmp_path / "out"))
    parent = version_in(tmp_path / "out").digest
    config = config_for(inputs, tmp_path / "out", **new, from_adapter=str(tmp_path / "out"))
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "remove", lambda self: pressed())
        with pytest.raises(Interrupted):
            run(config)
    files = saved(tmp_path / "out")
    run(config, resume=True)
    assert saved(tmp_path / "out")[1:] == files[1:] and receipt_in(tmp_path / "out")["parents"] == [parent]
    assert [version.digest for version in kept_versions(tmp_path / "out")] == [parent]
