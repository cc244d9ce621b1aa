"""The demo: a GPT learns English from nothing, learns facts through LoRA, and is set back.

Every number it prints is measured in the run that prints it.
"""

import platform
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..count import parameter_report
from ..disk import characters
from ..disk.lock import only_writer
from ..disk.models import load_model, save_model
from ..disk.peft import CONFIG, TENSORS, load_adapter, save_adapter
from ..disk.receipt import RECEIPT
from ..gpt import GPT, GPTConfig
from ..lora import attach, init_adapter, merge
from ..lora_config import LoRAConfig
from ..optim import Adam, warmup_cosine
from ..training.batches import answer_rows, consecutive_windows, random_windows, row_batches
from ..training.corpus import load_corpus
from ..training.loop import heldout_loss, train
from ..training.provenance import provenance_of
from .asking import LONGEST_ANSWER, Lines, pairs
from .demo_run import ADAPTER, DemoRun, checked_question
from .demo_tables import (
    after_table,
    attached_line,
    both_answers,
    cost_table,
    detached_line,
    first_answer,
    forward_line,
    logits,
    merged_line,
    sample,
    scores,
    shown_answers,
)
from .questions import question_sets

# The folder of the pre-trained model, inside the folder of the demo.
BASE = "base"


@dataclass(frozen=True)
class DemoSize:
    """How large the model of a demo is, and how long it is trained."""

    model: GPTConfig
    base_steps: int
    lora_steps: int


def _gpt(n_layer, n_embd):
    vocab_size = len(characters.ALPHABET)
    return GPTConfig(
        n_layer, 4, n_embd, vocab_size, block_size=128, positions="rope", rope_theta=100.0
    )


FULL = DemoSize(_gpt(3, 96), base_steps=600, lora_steps=650)
QUICK = DemoSize(_gpt(2, 32), base_steps=60, lora_steps=40)


def run(size, out, xp, seed, log=print, *, rerun_command="minilora demo", parts=1, threads=1):
    """The whole demo; models are kept in the folder `out`.

    `size` is a DemoSize, `xp` the array module to compute with, `log` is given each line, `parts`
    and `threads` are those of `train`. `rerun_command` started this run: the hint at the end adds a
    question to it.
    Raises: OSError, before anything is computed, if `out` cannot be written; Interrupted on Ctrl-C.
    """
    run = DemoRun(out)
    out = run.out
    rng = np.random.default_rng(seed)
    with only_writer(out), run.interruptible():
        corpus = load_corpus()
        log(_headline(xp, corpus))

        run.begin("step 1 of 5, pre-training the base")
        base = pretrain(size, corpus, xp, rng, log, parts, threads)
        _save_base(base, out)
        run.saved.append(f"{out / BASE} (the pre-trained model)")

        run.begin("step 2 of 5, asking it questions")
        asking = Lines()
        sets = question_sets()
        unseen = sets["unseen"]
        before = scores(base, asking, sets)
        log(f"[2/5] Asking it {len(unseen)} security questions: {sum(before['unseen'])} right")
        first_answer(base, asking, *unseen[1], log)

        run.begin("step 3 of 5, attaching LoRA")
        probe = characters.encode(corpus.heldout[: 4 * 64]).reshape(4, 64)
        reference = logits(base, probe)
        adapter = init_adapter(base, LoRAConfig(r=8, alpha=16, target_modules="all-linear"), rng)
        adapted = attach(base, adapter)
        change = np.abs(logits(adapted, probe) - reference).max()
        attached_line(base, adapted, adapter, change, log)
        rows = answer_rows(pairs(asking, sets["trained"]))
        cost_table(base, adapted, rows[::23], rng, log)

        run.begin("step 4 of 5, training A and B")
        started = time.perf_counter()
        teach(
            adapted,
            adapter,
            row_batches(rows, 16, rng),
            size.lora_steps,
            1e-2,
            label="[4/5] training A and B",
            parts=parts,
            threads=threads,
        )
        seconds = time.perf_counter() - started
        log(f"[4/5] Trained A and B only, {size.lora_steps} steps in {seconds:.0f} s")
        receipt = provenance_of(adapter, base, rerun_command, out / BASE)
        save_adapter(adapter, out / ADAPTER, base_model=str(out / BASE), receipt=receipt)
        run.saved.append(f"{out / ADAPTER} (the adapter)")

        run.begin("step 5 of 5, comparing")
        after = scores(adapted, asking, sets)
        after_table(before, after, log)
        shown_answers(adapted, asking, sets, after["unseen"], log)
        merged = merge(adapted)
        merged_line(adapted, merged, asking, unseen, after["unseen"], probe, log)
        forward_line(base, adapted, merged, probe, log)
        detached_line(base, probe, reference, log)
        log(f"      kept in {out}: {_kept_sizes(out)}; {run.seconds():.0f} s in all")
        log(f"      now ask: {rerun_command} --ask 'which port does ssh use?'")


def _headline(xp, corpus):
    device = "the CPU" if xp is np else "a GPU"
    return (
        f"minilora: {xp.__name__} {xp.__version__} on {device}, no deep-learning framework. "
        f"Python {platform.python_version()}, {corpus.source} sha256 {corpus.sha256[:12]}"
    )


def _save_base(base, out):
    # An adapter of an earlier run belongs to another base: it must not be found beside this one.
    for name in (TENSORS, CONFIG, RECEIPT):
        (out / ADAPTER / name).unlink(missing_ok=True)
    save_model(base, out / BASE)


def pretrain(size, corpus, xp, rng, log, parts=1, threads=1):
    """Step 1: a GPT from random weights to technical English."""
    base = GPT(size.model, rng).to_device(xp)
    text = characters.encode(corpus.train)
    heldout = characters.encode(corpus.heldout)
    windows = lambda: consecutive_windows(heldout, size.model.block_size, 32)
    measure = lambda: heldout_loss(base, windows(), parts=parts, threads=threads)
    first = measure()
    log(
        f"[1/5] Pre-training a {parameter_report(base).total:,}-parameter GPT on {len(text):,} "
        "characters of Python's own documentation"
    )
    started = time.perf_counter()
    steps = size.base_steps
    train(
        base,
        Adam(base.parameters(), betas=(0.9, 0.95), weight_decay=0.1),
        random_windows(text, 8, 128, rng),
        steps,
        schedule=lambda step: warmup_cosine(step, steps, peak=4e-3, warmup=20),
        label="[1/5] pre-training",
        parts=parts,
        threads=threads,
    )
    last = measure()
    seconds = time.perf_counter() - started
    log(
        f"      {steps} steps in {seconds:.0f} s, held-out loss {first:.2f} -> {last:.2f} nats per "
        f"character. It writes:\n      {sample(base, 'The ')!r}"
    )
    return base


def teach(model, adapter, batches, steps, lr, label="", parts=1, threads=1):
    """Step 4: train the tensors of `adapter`, through the `model` it is attached to."""
    adam = Adam(adapter.parameters(), betas=(0.9, 0.95))
    schedule = lambda step: warmup_cosine(step, steps, peak=lr, warmup=20)
    return train(
        model,
        adam,
        batches,
        steps,
        schedule=schedule,
        label=label,
        parts=parts,
        threads=threads,
    )


def _kept_sizes(out):
    adapter = (out / ADAPTER / "adapter_model.safetensors").stat().st_size
    base = (out / BASE / "model.safetensors").stat().st_size
    return f"the adapter, {adapter / 1e3:,.0f} kB, and its base, {base / 1e3:,.0f} kB"


def ask(question, out, xp, log=print):
    """Answer from what an earlier run kept in `out`.

    Raises: FileNotFoundError if there was none; ValueError for a question too long or with
    characters outside ASCII.
    """
    out = Path(out)
    question = checked_question(question, out)
    base = load_model(out / BASE, xp)
    adapter = load_adapter(out / ADAPTER, base, say=lambda receipt: None)
    asking = Lines()
    excess = len(asking.prompt(question)) + LONGEST_ANSWER - base.config.block_size
    if excess > 0:
        raise ValueError(
            f"the question has {len(question)} characters, at most {len(question) - excess} fit"
        )
    both_answers(base, attach(base, adapter), asking, question, log)
