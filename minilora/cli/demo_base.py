"""The demo on a language model that others have trained: five steps, and no pre-training.

The same facts are taught as in the demo, as conversations in the model's own chat template. Every
number it prints is measured in the run that prints it.
"""

import json
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .. import quant
from ..count import parameter_report
from ..disk.lock import only_writer
from ..disk.models import families_of, load_model
from ..disk.peft import TENSORS, init_peft_adapter, load_adapter, save_adapter
from ..disk.tokenizer import load_tokenizer
from ..lora import attach, merge
from ..lora_config import LoRAConfig
from ..optim import Adam, warmup_cosine
from ..training.batches import answer_rows, pad_rows
from ..training.datasets import load_data
from ..training.loop import train
from ..training.provenance import provenance_of
from ..training.threads import keep_freed_memory
from .asking import LONGEST_ANSWER, Chat, pairs
from .demo_run import ADAPTER, DemoRun, checked_question, costs_table
from .demo_tables import (
    ROWS,
    after_table,
    attached_line,
    both_answers,
    bytes_table,
    detached_line,
    first_answer,
    logits,
    merged_line,
    scores,
    shown_answers,
)
from .folders import find_sources
from .questions import question_sets

# What the model is told before each question. Without a message of their own, some templates put
# a long one in front of every row.
SYSTEM = "Answer in a few words."
# The questions that are asked are drawn by this seed, whatever the run's: all runs are asked the
# same.
SAMPLE_SEED = 0
# How it is trained: `finetune` with these settings and the same data gives the same adapter.
R = 8
ALPHA = 16
LR = 2e-3
BATCH = 8


@dataclass(frozen=True)
class BaseDemoSize:
    """How long a base is trained, and how many questions of each kind it is asked."""

    steps: int
    asked: int


FULL = BaseDemoSize(steps=150, asked=100)
QUICK = BaseDemoSize(steps=3, asked=6)


def run(size, base, out, xp, seed, log=print, *, rerun_command="minilora demo", parts=1, threads=1):
    """The whole demo on `base`, which is what `find_base` takes; kept in the folder `out`.

    `size` is a BaseDemoSize, `xp` the array module to compute with, `log` is given each line,
    `parts` and `threads` are those of `train`. `rerun_command` started this run: the hint at the
    end adds a question to it.
    Raises: OSError or ValueError, before anything is computed, if `base` is no model or has no chat
    template, or if `out` cannot be written; Interrupted on Ctrl-C.
    """
    path = find_sources(base)
    tokenizer = load_tokenizer(path)
    asking = _asking(base, tokenizer, log)
    run = DemoRun(out)
    out = run.out
    _, adapter_rng, batch_rng = np.random.default_rng(seed).spawn(3)
    with only_writer(out), run.interruptible():
        run.begin("step 1 of 5, loading the base")
        model = _load(base, path, xp, threads, log)

        run.begin("step 2 of 5, asking it questions")
        sets = sampled_sets(size.asked)
        before = scores(model, asking, sets)
        log(f"[2/5] Asking it {size.asked} questions of each kind below: {_right(before)} right")
        first_answer(model, asking, *sets["unseen"][0], log)

        run.begin("step 3 of 5, attaching LoRA")
        probe, _ = pad_rows(answer_rows(pairs(asking, sets["unseen"][:4])))
        reference = logits(model, probe)
        adapter = init_peft_adapter(model, LoRAConfig(R, ALPHA, "all-linear"), adapter_rng)
        adapted = attach(model, adapter)
        change = np.abs(logits(adapted, probe) - reference).max()
        attached_line(model, adapted, adapter, change, log)
        bytes_table(model, adapted, log)

        run.begin("step 4 of 5, training A and B")
        data = write_rows(asking, out)
        run.saved.append(f"{data} (the rows to train on)")
        rows = load_data(data, tokenizer, model.config.block_size, quiet=True, log=log)
        batches = rows.batches(BATCH, batch_rng)
        losses = _teach(adapted, adapter, batches, size.steps, seed, parts, threads)
        log(
            f"[4/5] Trained A and B only, {size.steps} steps of {BATCH} rows, the loss on answers "
            f"alone: {losses[0]:.2f} -> {np.mean(losses[-10:]):.3f}"
        )
        log(f"      {data}: {rows}")
        receipt = provenance_of(adapter, model, rerun_command, base)
        save_adapter(adapter, out / ADAPTER, base_model=str(base), receipt=receipt)
        run.saved.append(f"{out / ADAPTER} (the adapter)")

        run.begin("step 5 of 5, comparing")
        after = scores(adapted, asking, sets)
        after_table(before, after, log, sampled=True)
        log(
            f"      ({size.asked} of each kind, the same for every seed; ± one standard error. All "
            f"or none right of {size.asked} leaves up to {300 / size.asked:.0f} % open)"
        )
        shown_answers(adapted, asking, sets, after["unseen"], log)
        merged = merge(adapted)
        merged_line(adapted, merged, asking, sets["unseen"], after["unseen"], probe, log)
        detached_line(model, probe, reference, log)
        run.end()
        costs_table(run.costs, log)
        n_bytes = (out / ADAPTER / TENSORS).stat().st_size
        log(f"      kept in {out}: the adapter, {n_bytes / 1e6:,.1f} MB, in PEFT's format")
        log(f"      the same by hand: {_finetune_command(base, data, size.steps, seed)}")
        log(f"      now ask: {rerun_command} --ask 'which port does ssh use?'")


def _finetune_command(base, data, steps, seed):
    """The command that trains the same adapter, to the bit."""
    settings = f"--alpha {ALPHA} --r {R} --lr {LR} --batch {BATCH} --steps {steps}"
    if seed:
        settings += f" --seed {seed}"
    paths = f"--base {shlex.quote(str(base))} --data {shlex.quote(str(data))} --out my-adapter"
    return f"minilora finetune {paths} {settings}"


def _asking(base, tokenizer, log):
    """The Chat by which `base` is asked. Raises: ValueError if it has no chat template."""
    if tokenizer.template is None:
        raise ValueError(
            f"{base} has no chat template, in which this demo asks its questions; take a model "
            "made for chat, or minilora demo without --base"
        )
    asking = Chat(tokenizer, SYSTEM)
    try:
        asking.pair("a question", "an answer")
    except ValueError as error:
        asking = Chat(tokenizer)
        asking.pair("a question", "an answer")
        log(f"the chat template takes no system's message, so there is none: {error}")
    return asking


def _load(base, path, xp, threads, log):
    """Step 1: the model, in the floats that it computes in."""
    stored = load_model(path, xp)
    kinds = quant.stored_as(stored)
    model = quant.widen(stored)
    if threads > 1:
        # Not before: what loading frees would be kept too.
        keep_freed_memory()
    report = parameter_report(model)
    family = families_of(model)[0]
    log(f"[1/5] {base}: {family.title}, {report.total:,} parameters")
    log(f"      {family.describe(model.config)}")
    stored_as = f"{report.total_bytes / 1e6:,.0f} MB in {model.parameters()[0].dtype}"
    if kinds:
        stored_bytes = parameter_report(stored).total_bytes
        names = " and ".join(sorted(set(kinds.values())))
        # Each part of a batch would widen every weight twice in a step: with rows as short as these
        # that costs two fifths of the time, and being wide costs memory once.
        stored_as += f", widened once from {stored_bytes / 1e6:,.0f} MB of {names}"
    log(f"      {stored_as}; a context of {model.config.block_size:,} tokens")
    return model


def sampled_sets(n):
    """{kind: [(question, answer), ...]}: of each kind `n`, always the same ones."""
    rng = np.random.default_rng(SAMPLE_SEED)
    sets = {}
    for kind, asked in question_sets().items():
        # In the order in which they stand, each family of questions in one piece.
        chosen = np.sort(rng.permutation(len(asked))[:n])
        sets[kind] = [asked[i] for i in chosen]
    return sets


def _right(before):
    """How many answers of each kind are right, in the order of the table."""
    counts = [str(sum(before[kind])) for kind, _ in ROWS]
    return f"{', '.join(counts[:-1])} and {counts[-1]}"


def write_rows(asking, out):
    """Write all questions as conversations, a .jsonl for each kind; the path of the trained ones.

    They are for `finetune` and `compare` too.
    """
    for kind, asked in question_sets().items():
        lines = [json.dumps({"messages": asking.messages(*pair)}) for pair in asked]
        unfinished = out / f".{kind}.jsonl"
        unfinished.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        os.replace(unfinished, out / f"{kind}.jsonl")
    return out / "trained.jsonl"


def _teach(model, adapter, batches, steps, seed, parts, threads):
    """Step 4: train the tensors of `adapter`, as `finetune` does; the loss of each step."""
    return train(
        model,
        Adam(adapter.parameters(), lr=LR),
        batches,
        steps,
        schedule=lambda step: warmup_cosine(step, steps, LR, warmup=steps // 10),
        seed=seed,
        label="[4/5] training A and B",
        parts=parts,
        threads=threads,
    )


def ask(question, base, out, xp, log=print):
    """Answer from what an earlier run on `base` kept in `out`.

    Raises: FileNotFoundError if there was none; ValueError for a question that is too long, or if
    the adapter is another base's.
    """
    out = Path(out)
    question = checked_question(question, out)
    path = find_sources(base, [out / ADAPTER])
    asking = _asking(base, load_tokenizer(path), log=lambda line: None)
    model = quant.widen(load_model(path, xp))
    adapter = load_adapter(out / ADAPTER, model, say=lambda receipt: None)
    n = len(asking.prompt(question))
    room = model.config.block_size - LONGEST_ANSWER
    if n > room:
        raise ValueError(f"the question makes a prompt of {n} tokens, at most {room} fit")
    both_answers(model, attach(model, adapter), asking, question, log)
