"""What the demo measures of its models, and prints: answers, bytes, logits, milliseconds.

Knows the models and the questions, nothing of training and no folder.
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
from ..lora import attach, init_adapter, merge
from ..lora_config import LoRAConfig
from ..training.batches import answer_rows, pad_rows
from ..training.loop import exact_match
from . import questions

# The token that ends an answer, and how many tokens an answer may have.
NEWLINE = 0
LONGEST_ANSWER = 26


def logits(model, ids):
    """The logits of `model` as a NumPy array."""
    with no_grad():
        return to_numpy(model(ids).data)


def sample(model, prompt, n=60):
    """The likeliest continuation of `prompt`, on one line."""
    ids = generate(model, characters.encode(prompt)[None], n)
    return characters.decode(ids[0]).replace("\n", " ")


def answer(model, prompt):
    """What the model writes after `prompt`, up to the end of the line."""
    ids = characters.encode(prompt)[None]
    written = generate(model, ids, LONGEST_ANSWER, stop=NEWLINE)[0, ids.shape[1] :]
    line = characters.decode(written).split("\n")[0]
    return line if line.strip() else "(blanks)"


def scores(model):
    """{row: list of bool} of exact answers on the three question sets."""
    sets = {"trained": questions.TRAINED, "unseen": questions.UNSEEN, "never": questions.NEVER_TOLD}
    return {
        name: exact_match(model, characters.encode_pairs(pairs)) for name, pairs in sets.items()
    }


def first_answer(base, before, log):
    """Step 2: how many answers are right before anything was taught, and one that is not."""
    prompt, truth = questions.UNSEEN[1]
    log(
        f"[2/5] Asking it {len(questions.UNSEEN)} security questions: {sum(before['unseen'])} right"
    )
    log(f"      {prompt.splitlines()[0]}   A: {answer(base, prompt)}   (wrong: {truth.strip()})")


def attached_line(base, adapted, adapter, change, log):
    """Step 3: how many numbers are new, and the largest change of a logit that they make."""
    base_size = parameter_report(base).total
    new = parameter_report(adapted).trainable
    log(
        f"[3/5] Attaching LoRA r={adapter.config.r} to every linear: {new:,} new numbers "
        f"({100 * new / base_size:.1f} %). Largest logit change: {change}"
    )


def cost_table(base, adapted, rng, log):
    """Step 3: what a training step holds in memory, for three ways to train."""
    ids, targets = pad_rows(answer_rows(characters.encode_pairs(questions.TRAINED[::23])))
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


def after_table(adapted, before, log):
    """Step 5: the three rows that say what was learnt, and answers right and wrong."""
    after = scores(adapted)
    # What it was never told says something only of a model that has learnt what it was told.
    learnt = np.mean(after["trained"]) > 0.5
    rows = (
        ("trained", "phrasings it trained on"),
        ("unseen", "phrasings never seen"),
        ("never", "facts never told"),
    )
    log("[5/5]                              before   after")
    for key, name in rows:
        old = 100 * np.mean(before[key])
        new = 100 * np.mean(after[key])
        line = f"      {name:<25} {old:>7.0f} % {new:>5.0f} %  {'#' * round(new / 5)}"
        if key == "never" and learnt:
            line += "   <- it was taught answers, not security"
        log(line)
    if not learnt:
        log("      (it has not learnt them: --quick only checks that everything runs)")
    for prompt, truth in _shown_questions(after["unseen"]):
        written = answer(adapted, prompt)
        verdict = "" if written == truth.strip() else f"   (wrong: {truth.strip()})"
        log(f"      {prompt.splitlines()[0]:<50} A: {written}{verdict}")


def _shown_questions(unseen_right):
    """Pairs (prompt, answer): three it gets right, one it gets wrong, one it was never told."""
    # The three are taken from all over the list: each family of questions stands in one piece.
    right = [
        pair for pair, is_right in zip(questions.UNSEEN, unseen_right, strict=True) if is_right
    ]
    wrong = [
        pair for pair, is_right in zip(questions.UNSEEN, unseen_right, strict=True) if not is_right
    ]
    apart = max(1, len(right) // 3)
    return [*right[::apart][:3], *wrong[:1], questions.NEVER_TOLD[0]]


def merge_lines(base, adapted, probe, reference, log):
    """Step 5: what merging changes, in answers, logits and time, and what is left after detaching.

    `reference` holds the base's logits of the token ids `probe`, taken before the adapter was
    attached.
    """
    merged = merge(adapted)
    with_adapter = logits(adapted, probe)
    largest = np.abs(with_adapter).max()
    error = np.abs(logits(merged, probe) - with_adapter).max()
    unseen = characters.encode_pairs(questions.UNSEEN)
    same = exact_match(merged, unseen) == exact_match(adapted, unseen)
    log(
        f"      merged into W: largest logit change {error:.1e} (of {largest:.0f}), "
        f"{'the same' if same else 'NOT the same'} answers right"
    )
    base_ms, attached_ms, merged_ms = _forward_ms([base, adapted, merged], probe)
    log(
        f"      forward pass: base {base_ms:.1f} ms, attached {attached_ms:.1f} ms, "
        f"merged {merged_ms:.1f} ms"
    )
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
