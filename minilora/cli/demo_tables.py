"""What a demo measures of its models, and prints: answers, bytes, logits, milliseconds.

Knows the models and how questions are put to them, nothing of training and no folder. Questions are
given as {kind: [(question, answer), ...]}, of the kinds "trained", "unseen" and "never".
"""

import hashlib
import statistics
import time

import numpy as np

from ..backend import to_numpy
from ..count import activation_bytes, parameter_report
from ..disk import characters
from ..generate import generate
from ..graph import no_grad
from ..lora import attach, init_adapter
from ..lora_config import LoRAConfig
from ..training.batches import pad_rows
from ..training.loop import exact_match
from .asking import pairs

# The kinds of questions, as the table calls them.
ROWS = (
    ("trained", "phrasings it trained on"),
    ("unseen", "phrasings never seen"),
    ("never", "facts never told"),
)


def logits(model, ids):
    """The logits of `model` as a NumPy array."""
    with no_grad():
        return to_numpy(model(ids).data)


def sample(model, prompt, n=60):
    """The likeliest continuation of `prompt`, on one line."""
    ids = generate(model, characters.encode(prompt)[None], n)
    return characters.decode(ids[0]).replace("\n", " ")


def scores(model, asking, sets):
    """{kind: list of bool}: which questions, put as `asking` does, `model` answers exactly."""
    return {kind: exact_match(model, pairs(asking, asked)) for kind, asked in sets.items()}


def first_answer(base, asking, question, truth, log):
    """Step 2: what the base answers before anything was taught."""
    written = asking.answer(base, question)
    verdict = _verdict(written, truth)
    log(f"      Q: {question}   A: {written}{verdict}")


def _verdict(written, truth):
    return "" if written == truth else f"   (wrong: {truth})"


def attached_line(base, adapted, adapter, change, log):
    """Step 3: how many numbers are new, and the largest change of a logit that they make."""
    base_size = parameter_report(base).total
    new = parameter_report(adapted).trainable
    log(
        f"[3/5] Attaching LoRA r={adapter.config.r} to every linear: {new:,} new numbers "
        f"({100 * new / base_size:.1f} %). Largest logit change: {change}"
    )


def cost_table(base, adapted, rows, rng, log):
    """Step 3: what a training step on these Rows holds in memory, for three ways to train."""
    ids, targets = pad_rows(rows)
    attention_only = LoRAConfig(r=8, alpha=16, target_modules=["q_proj", "v_proj"])
    models = {
        "full fine-tuning": base.trainable_copy(),
        "LoRA on q, v": attach(base, init_adapter(base, attention_only, rng)),
        "LoRA on every linear": adapted,
    }
    title = f"kB held, {len(ids)} questions"
    log(f"      {title:<26}   weights   gradients   Adam   activations   together")
    for name, model in models.items():
        report = parameter_report(model)
        weights = report.total_bytes
        gradients = report.trainable_bytes
        moments = 2 * gradients
        activations = activation_bytes(model.loss(ids, targets), model)
        together = weights + gradients + moments + activations
        log(
            f"      {name:<26} {weights / 1e3:>10,.0f}{gradients / 1e3:>12,.0f}"
            f"{moments / 1e3:>7,.0f}{activations / 1e3:>14,.0f}{together / 1e3:>11,.0f}"
        )
    log(
        "      (LoRA saves gradients and optimizer state. Activations it saves only where a layer "
        "carries no adapter.)"
    )


def bytes_table(base, adapted, log):
    """Step 3: what training holds in memory beside activations, for two ways to train.

    `base` is in the floats that it computes in, so that every number of it could be trained.
    """
    weights = parameter_report(base).total_bytes
    report = parameter_report(adapted)
    ways = {
        "full fine-tuning": (weights, weights),
        "LoRA on every linear": (report.total_bytes, report.trainable_bytes),
    }
    log(f"      {'MB held':<26}   weights   gradients   Adam   together, activations aside")
    for name, (weights, gradients) in ways.items():
        together = weights + 3 * gradients
        log(
            f"      {name:<26} {weights / 1e6:>9,.0f}{gradients / 1e6:>12,.0f}"
            f"{2 * gradients / 1e6:>7,.0f}{together / 1e6:>11,.0f}"
        )


def after_table(before, after, log, *, sampled=False):
    """Step 5: the three rows that say what was learnt; the scores before and after as `scores`.

    Of a model that was asked some of many questions, `sampled`, the standard errors are shown too.
    """
    # What it was never told says something only of a model that has learnt what it was told.
    learnt = np.mean(after["trained"]) > 0.5
    log(f"[5/5]{'before':>36}{'after':>{14 if sampled else 8}}")
    for kind, name in ROWS:
        line = f"      {name:<25} {_share(before[kind], 7, sampled)}"
        line += f" {_share(after[kind], 5, sampled)}  {'#' * round(20 * np.mean(after[kind]))}"
        if kind == "never" and learnt:
            line += "   <- it was taught answers, not security"
        log(line.rstrip())
    if not learnt:
        log("      (it has not learnt them: --quick only checks that everything runs)")


def _share(is_right, width, sampled):
    """The percentage of what is right, with its standard error if that is of a sample."""
    text = f"{100 * np.mean(is_right):>{width}.0f} %"
    return f"{text} ± {100 * standard_error(is_right):.1f}" if sampled else text


def standard_error(is_right):
    """That of the share p of n questions that are right: sqrt(p (1 - p) / n)."""
    p = np.mean(is_right)
    return float(np.sqrt(p * (1 - p) / len(is_right)))


def shown_answers(model, asking, sets, unseen_right, log):
    """Step 5: answers right and wrong, and one that the model was never told."""
    for question, truth in _shown_questions(sets, unseen_right):
        written = asking.answer(model, question)
        log(f"      Q: {question:<47} A: {written}{_verdict(written, truth)}")


def _shown_questions(sets, unseen_right):
    """(question, answer): three it gets right, one it gets wrong, one it was never told."""
    # The three are taken from all over the list: each family of questions stands in one piece.
    asked = list(zip(sets["unseen"], unseen_right, strict=True))
    right = [pair for pair, is_right in asked if is_right]
    wrong = [pair for pair, is_right in asked if not is_right]
    apart = max(1, len(right) // 3)
    return [*right[::apart][:3], *wrong[:1], sets["never"][0]]


def both_answers(base, adapted, asking, question, log):
    """What the adapted model answers, and the base alone."""
    log(f"Q: {question}")
    log(f"A: {asking.answer(adapted, question)}")
    log(f"   (the base alone: {asking.answer(base, question)})")


def merged_line(adapted, merged, asking, asked, right, probe, log):
    """Step 5: what merging changes, in logits and in answers.

    `right` says which of the questions `asked` the adapted model answers exactly.
    """
    with_adapter = logits(adapted, probe)
    largest = np.abs(with_adapter).max()
    error = np.abs(logits(merged, probe) - with_adapter).max()
    same = exact_match(merged, pairs(asking, asked)) == right
    log(
        f"      merged into W: largest logit change {error:.1e} (of {largest:.0f}), "
        f"{'the same' if same else 'NOT the same'} answers right"
    )


def forward_line(base, adapted, merged, probe, log):
    """Step 5: the milliseconds of a forward pass."""
    base_ms, attached_ms, merged_ms = _forward_ms([base, adapted, merged], probe)
    log(
        f"      forward pass: base {base_ms:.1f} ms, attached {attached_ms:.1f} ms, "
        f"merged {merged_ms:.1f} ms"
    )


def detached_line(base, probe, reference, log):
    """Step 5: what is left of it all in the base: nothing.

    `reference` holds the base's logits of the token ids `probe`, taken before the adapter was
    attached.
    """
    before = _sha(reference)
    after = _sha(logits(base, probe))
    log(
        f"      detached: the base's logits, sha256 {before} before and {after} after: "
        f"{'bit-identical' if before == after else 'NOT IDENTICAL'}"
    )


def _forward_ms(models, probe, rounds=15):
    """The median time of each model's forward pass.

    The models take turns: whatever else the machine does slows all of them.
    """
    times = [[] for _ in models]
    for _ in range(rounds):
        for model, its_times in zip(models, times, strict=True):
            started = time.perf_counter()
            logits(model, probe)
            its_times.append(time.perf_counter() - started)
    return [1e3 * statistics.median(its_times) for its_times in times]


def _sha(array):
    return hashlib.sha256(array.tobytes()).hexdigest()[:12]
