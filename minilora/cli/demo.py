"""The main command: a GPT learns English from nothing, is taught facts through LoRA, and forgets them to the bit.

Every number it prints is measured in the run that prints it.
"""

import hashlib
import os
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..backend import to_numpy
from ..count import activation_bytes, parameter_report
from ..disk import characters
from ..disk.models import load_model, save_model
from ..disk.peft import load_adapter, save_adapter
from ..generate import generate
from ..gpt import GPT, GPTConfig
from ..graph import no_grad
from ..lora import attach, init_adapter, merge
from ..lora_config import LoRAConfig
from ..optim import Adam, warmup_cosine
from ..training.batches import consecutive_windows, pad_pairs, pair_batches, random_windows
from ..training.corpus import load_corpus
from ..training.loop import Interrupted, exact_match, heldout_loss, train
from . import questions

BASE, ADAPTER = "base", "security"  # the folders that are kept
NEWLINE = 0  # ends an answer
LONGEST_ANSWER = 26


@dataclass(frozen=True)
class Size:
    """How large the model of a demo is, and how long it is trained."""

    model: GPTConfig
    base_steps: int
    lora_steps: int


def _gpt(n_layer, n_embd):
    return GPTConfig(n_layer, 4, n_embd, len(characters.ALPHABET), 128, positions="rope", rope_theta=100.0)


FULL = Size(_gpt(3, 96), base_steps=600, lora_steps=650)
QUICK = Size(_gpt(2, 32), base_steps=60, lora_steps=40)


def run(size, out, xp, seed, say=print, again="python -m minilora", parts=1, threads=1):
    """The whole demo; models are kept in the folder `out`. `xp` is the array module to compute with.

    `again` is the command that started it, for the hint at the end; `parts` and `threads` are those of `train`.
    Raises: OSError, before anything is computed, if `out` cannot be written; Interrupted on Ctrl-C.
    """
    kept, doing, began = [], "starting", time.perf_counter()
    out, rng = Path(out), np.random.default_rng(seed)
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise PermissionError(f"cannot write to {out}: choose another folder with --out")
    try:
        corpus = load_corpus()
        device = "a GPU" if xp is not np else "the CPU"
        say(f"minilora: {xp.__name__} {xp.__version__} on {device}, no deep-learning framework. "
            f"Python {platform.python_version()}, {corpus.source} sha256 {corpus.sha256[:12]}")

        doing = "step 1 of 5, pre-training the base"
        base = pretrain(size, corpus, xp, rng, say, parts, threads)
        for file in (out / ADAPTER).glob("adapter_*"):  # of an earlier run: it belongs to another base
            file.unlink()
        save_model(base, out / BASE)
        kept.append(f"{out / BASE} (the pre-trained model)")

        doing = "step 2 of 5, asking it questions"
        before = scores(base)
        asked, told = questions.UNSEEN[1]
        say(f"[2/5] Asking it {len(questions.UNSEEN)} security questions: {sum(before['unseen'])} right")
        say(f"      {asked.splitlines()[0]}   A: {answer(base, asked)}   (wrong: {told.strip()})")

        doing = "step 3 of 5, attaching LoRA"
        probe = characters.encode(corpus.heldout[: 4 * 64]).reshape(4, 64)
        reference = logits(base, probe)
        config = LoRAConfig(r=8, alpha=16, target_modules="all-linear")
        adapter = init_adapter(base, config, rng)
        adapted = attach(base, adapter)
        change = np.abs(logits(adapted, probe) - reference).max()
        base_size, lora_size = parameter_report(base).total, parameter_report(adapted).trainable
        say(f"[3/5] Attaching LoRA r={config.r} to every linear: {lora_size:,} new numbers "
            f"({100 * lora_size / base_size:.1f} %). Largest logit change: {change}")
        cost_table(base, adapted, rng, say)

        doing = "step 4 of 5, training A and B"
        started = time.perf_counter()
        batches = pair_batches(characters.encode_pairs(questions.TRAINED), 16, rng)
        teach(adapted, adapter, batches, size.lora_steps, 1e-2, label="[4/5] training A and B", parts=parts,
              threads=threads)
        say(f"[4/5] Trained A and B only, {size.lora_steps} steps in {time.perf_counter() - started:.0f} s")
        save_adapter(adapter, out / ADAPTER, base_model=str(out / BASE))
        kept.append(f"{out / ADAPTER} (the adapter)")

        doing = "step 5 of 5, comparing"
        after_table(adapted, before, say)
        merge_lines(base, adapted, probe, reference, say)
        sizes = [(out / name / file).stat().st_size for name, file in
                 ((ADAPTER, "adapter_model.safetensors"), (BASE, "model.safetensors"))]
        say(f"      kept in {out}: the adapter, {sizes[0] / 1e3:,.0f} kB, and its base, {sizes[1] / 1e3:,.0f} kB; "
            f"{time.perf_counter() - began:.0f} s in all")
        say(f"      now ask: {again} --ask 'which port does ssh use?'")
    except KeyboardInterrupt:
        what = "; ".join(kept) or "nothing of this run"
        raise Interrupted(f"interrupted in {doing}. Kept: {what}. No file is half-written.") from None


def pretrain(size, corpus, xp, rng, say, parts=1, threads=1):
    """Step 1: a GPT from random weights to technical English."""
    base = GPT(size.model, rng).to_device(xp)
    text, heldout = characters.encode(corpus.train), characters.encode(corpus.heldout)
    first = heldout_loss(base, consecutive_windows(heldout, size.model.block_size, 32))
    say(f"[1/5] Pre-training a {parameter_report(base).total:,}-parameter GPT on {len(text):,} characters of Python's "
        f"own documentation")
    started, steps = time.perf_counter(), size.base_steps
    adam = Adam(base.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    train(base, adam, random_windows(text, 8, 128, rng), steps,
          schedule=lambda step: warmup_cosine(step, steps, peak=4e-3, warmup=20), label="[1/5] pre-training",
          parts=parts, threads=threads)
    loss = heldout_loss(base, consecutive_windows(heldout, size.model.block_size, 32))
    say(f"      {steps} steps in {time.perf_counter() - started:.0f} s, held-out loss {first:.2f} -> {loss:.2f} "
        f"nats per character. It writes:\n      {sample(base, 'The ')!r}")
    return base


def teach(model, adapter, batches, steps, lr, label="", parts=1, threads=1):
    """Train the tensors of `adapter`, through the `model` it is attached to."""
    adam = Adam(adapter.parameters(), betas=(0.9, 0.95))
    schedule = lambda step: warmup_cosine(step, steps, peak=lr, warmup=20)
    return train(model, adam, batches, steps, schedule=schedule, label=label, parts=parts, threads=threads)


def logits(model, ids):
    """The logits of `model` as a NumPy array."""
    with no_grad():
        return to_numpy(model(ids).data)


def sample(model, prompt, n=60):
    """The likeliest continuation of `prompt`, on one line."""
    return characters.decode(generate(model, characters.encode(prompt)[None], n)[0]).replace("\n", " ")


def answer(model, prompt):
    """What the model says after `prompt`, up to the end of the line."""
    ids = characters.encode(prompt)[None]
    said = characters.decode(generate(model, ids, LONGEST_ANSWER, stop=NEWLINE)[0, ids.shape[1] :]).split("\n")[0]
    return said if said.strip() else "(blanks)"


def scores(model):
    """{row: list of bool} of exact answers on the three question sets."""
    sets = {"trained": questions.TRAINED, "unseen": questions.UNSEEN, "never": questions.NEVER_TOLD}
    return {name: exact_match(model, characters.encode_pairs(pairs)) for name, pairs in sets.items()}


def cost_table(base, adapted, rng, say):
    """What one training step holds in memory: full fine-tuning against LoRA on q, v and on every linear."""
    ids, targets = pad_pairs(characters.encode_pairs(questions.TRAINED[::23]))
    attention_only = LoRAConfig(r=8, alpha=16, target_modules=["q_proj", "v_proj"])
    models = {
        "full fine-tuning": base.trainable_copy(),
        "LoRA on q, v": attach(base, init_adapter(base, attention_only, rng)),
        "LoRA on every linear": adapted,
    }
    say(f"      {f'kB held, {len(ids)} questions':<26}   weights   gradients   Adam   activations   together")
    for name, model in models.items():
        weights, trained = parameter_report(model).total_bytes, parameter_report(model).trainable_bytes
        activations = activation_bytes(model.loss(ids, targets), model)
        columns = (weights, trained, 2 * trained, activations, weights + 3 * trained + activations)
        shown = (f"{n / 1e3:>{width},.0f}" for n, width in zip(columns, (10, 12, 7, 14, 11), strict=True))
        say(f"      {name:<26} {''.join(shown)}")
    say("      (LoRA saves gradients and optimizer state. Activations it saves only where a layer carries no adapter.)")


def after_table(adapted, before, say):
    """Step 5: the three rows that say what was learnt, and answers right and wrong."""
    after = scores(adapted)
    say("[5/5]                              before   after")
    rows = (("trained", "phrasings it trained on", ""), ("unseen", "phrasings never seen", ""),
            ("never", "facts never told", "   <- it was taught answers, not security"))
    for key, name, remark in rows:
        old, new = (100 * np.mean(s[key]) for s in (before, after))
        say(f"      {name:<25} {old:>7.0f} % {new:>5.0f} %  {'#' * round(new / 5)}{remark}")
    right = [pair for pair, ok in zip(questions.UNSEEN, after["unseen"], strict=True) if ok]
    wrong = [pair for pair, ok in zip(questions.UNSEEN, after["unseen"], strict=True) if not ok]
    for prompt, truth in [*right[:: max(1, len(right) // 3)][:3], *wrong[:1], questions.NEVER_TOLD[0]]:
        said = answer(adapted, prompt)
        verdict = "" if said == truth.strip() else f"   (wrong: {truth.strip()})"
        say(f"      {prompt.splitlines()[0]:<50} A: {said}{verdict}")


def merge_lines(base, adapted, probe, reference, say):
    """Merging: same answers, bounded error, the base's speed; detaching: the base's logits, bit for bit."""
    merged = merge(adapted)
    with_adapter = logits(adapted, probe)
    error = np.abs(logits(merged, probe) - with_adapter).max()
    unseen = characters.encode_pairs(questions.UNSEEN)
    same = exact_match(merged, unseen) == exact_match(adapted, unseen)
    times = {name: [] for name in ("base", "attached", "merged")}
    for _ in range(15):
        for name, model in zip(times, (base, adapted, merged), strict=True):
            started = time.perf_counter()
            logits(model, probe)
            times[name].append(time.perf_counter() - started)
    ms = {name: 1e3 * statistics.median(t) for name, t in times.items()}
    say(f"      merged into W: largest logit change {error:.1e} (of {np.abs(with_adapter).max():.0f}), "
        f"{'the same' if same else 'NOT the same'} answers right")
    say(f"      forward pass: base {ms['base']:.1f} ms, attached {ms['attached']:.1f} ms, merged {ms['merged']:.1f} ms")
    now = logits(base, probe)
    say(f"      detached: the base's logits, sha256 {_sha(reference)} before and {_sha(now)} after: "
        f"{'bit-identical' if _sha(reference) == _sha(now) else 'NOT IDENTICAL'}")


def _sha(array):
    return hashlib.sha256(array.tobytes()).hexdigest()[:12]


def ask(question, out, xp, say=print):
    """Answer from what an earlier run kept in `out`.

    Raises: FileNotFoundError if there was none; ValueError for a question too long or with characters outside ASCII.
    """
    out, question = Path(out), " ".join(question.lower().split())
    if not question:
        raise ValueError("the question is empty; ask, say, 'which port does ssh use?'")
    if not (out / ADAPTER / "adapter_model.safetensors").exists():
        raise FileNotFoundError(f"nothing to ask in {out}: run the demo first, to its end")
    base = load_model(out / BASE, xp)
    adapter = load_adapter(out / ADAPTER, base, say=lambda receipt: None)
    prompt, room = f"Q: {question}\nA: ", base.config.block_size - LONGEST_ANSWER
    if len(prompt) > room:
        most = room - len(prompt) + len(question)
        raise ValueError(f"the question has {len(question)} characters, at most {most} fit")
    answered = answer(attach(base, adapter), prompt)
    say(prompt.splitlines()[0])
    say(f"A: {answered}")
    say(f"   (the base alone: {answer(base, prompt)})")
