"""Fine-tuning a model folder on a file of text or of questions: from two paths to an adapter, killed or not.

A run that is killed at any moment and resumed gives the adapter of a run that was not, to the bit, on the same machine
and with as many threads (they decide in which order sums are made): all that is random follows from the seed, and what
came after the last checkpoint is computed again.
"""

import hashlib
import json
import math
import shutil
import sys
import time
from collections import namedtuple
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from ..count import parameter_report
from ..disk.folder import check_unused
from ..disk.models import load_model
from ..disk.peft import init_peft_adapter, save_adapter
from ..disk.tokenizer import load_tokenizer
from ..lora import attach
from ..lora_config import LoRAConfig
from ..optim import Adam, warmup_cosine
from .checkpoint import ENDED, Checkpoint, is_checkpoint
from .datasets import load_data
from .loop import Interrupted, heldout_loss, train
from .parts import check_parts

# What a run gives: the Adapter, the loss of each step, and the held-out loss before and after (None without a split).
Result = namedtuple("Result", "adapter losses before after")
CHECKPOINT = "checkpoint"  # its folder, in the folder of the adapter, while a run has not ended
FREE = ("base", "data", "out", "save_every")  # settings that may differ when a run goes on: others say what is in them


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to fine-tune, on what, and how.

    base: the folder of a model with its tokenizer. data: a .txt file, or .jsonl with a prompt and an answer on each
    line. out: the folder for the adapter. alpha, r, target, dropout: of LoRAConfig. lr: the peak of the learning rate,
    after a warm-up and before a cosine. steps, of `batch` rows each. eval_split: the share that is held out to measure
    the loss on. length: of the stretches of a text, in tokens (None: 256, or the model's context if that is shorter).
    save_every: steps between two checkpoints.
    Raises: ValueError that names the field, what it must be, and its value.
    """

    base: str
    data: str
    out: str
    alpha: float
    r: int = 8
    target: tuple | str = "all-linear"
    lr: float = 5e-4
    steps: int = 200
    batch: int = 4
    seed: int = 0
    eval_split: float = 0.0
    length: int | None = None
    dropout: float = 0.0
    save_every: int = 50

    def __post_init__(self):
        whole = lambda x, least: type(x) is int and x >= least
        number = lambda x: type(x) in (int, float) and math.isfinite(x)
        for field, ok, need in (
            *((name, whole(getattr(self, name), 1), "a whole number of at least 1") for name in
              ("steps", "batch", "save_every")),
            ("seed", whole(self.seed, 0), "a whole number of at least 0"),
            ("length", self.length is None or whole(self.length, 1), "a whole number of at least 1, or None"),
            ("lr", number(self.lr) and self.lr > 0, "a finite positive number"),
            ("eval_split", number(self.eval_split) and 0 <= self.eval_split < 1, "in [0, 1)"),
        ):
            if not ok:
                raise ValueError(f"Settings: {field} must be {need}; got {getattr(self, field)!r}")
        self.lora()  # which checks the fields that are its own

    def lora(self):
        """The LoRAConfig of r, alpha, target and dropout."""
        return LoRAConfig(self.r, self.alpha, self.target, self.dropout)


def finetune(settings, xp=np, *, parts=1, threads=1, resume=False, say=print, quiet=False):
    """Train an adapter for the model in `settings.base` on `settings.data`, and save it in `settings.out`; a Result.

    While it runs, `out` holds a folder `checkpoint`, from which `resume=True` goes on. `say` is given the report line
    by line; `quiet` shows no progress bars. `xp` is the array module to compute with; `parts` and `threads`: as for
    `train`.
    Raises: ValueError or FileNotFoundError, before anything is computed or written, for files and settings that do not
    fit; Interrupted on Ctrl-C, with the checkpoint saved at the last whole step.
    """
    check_parts(parts, threads)
    out = Path(settings.out)
    _check_out(out, resume)
    base, tokenizer = load_model(settings.base, xp), load_tokenizer(settings.base)
    say(f"base {settings.base}: {parameter_report(base).total:,} parameters, a context of {base.config.block_size:,} "
        f"tokens, {tokenizer.vocab_size:,} tokens in the vocabulary")
    rows = load_data(settings.data, tokenizer, base.config.block_size, settings.length, quiet)
    # One generator for each purpose: what one of them draws moves no other.
    splitting, drawing, ordering = np.random.default_rng(settings.seed).spawn(3)
    learned, heldout = rows.split(settings.eval_split, splitting)
    batches = learned.batches(settings.batch, ordering)
    say(f"data {settings.data}: {learned}")
    say(f"held out: {heldout or 'nothing'}")
    adapter = init_peft_adapter(base, settings.lora(), drawing)
    model = attach(base, adapter, check_base=False)
    say(f"adapter r={settings.r}, alpha={settings.alpha:g}: {parameter_report(model)}")

    adam = Adam(adapter.parameters(), lr=settings.lr)
    identity = _identity(settings, rows, base, adapter, xp, parts)
    checkpoint = Checkpoint(out / CHECKPOINT, identity, adapter, adam)
    progress = {"before": None, "losses": [], "tokens": 0, "seconds": 0.0}
    if resume:
        progress = checkpoint.restore()
        say(f"resumed after step {adam.steps} of {settings.steps}")
    checkpoint.note(_copy(progress))
    try:
        checkpoint.save()  # from here on there is something to resume
        if heldout and progress["before"] is None:
            progress["before"] = _measure(model, heldout, settings, quiet, "held-out loss before")
        _train(model, adam, batches, settings, checkpoint, progress, parts, threads, quiet)
        after = _measure(model, heldout, settings, quiet, "held-out loss after") if heldout else None
        save_adapter(adapter, out, base_model=str(settings.base))
        checkpoint.remove()
    except ValueError as error:
        raise ValueError(f"{error}. To start again with other settings, remove {checkpoint.folder} or choose another "
                         "folder") from None
    except KeyboardInterrupt:
        checkpoint.save()
        raise Interrupted(f"interrupted after step {checkpoint.steps} of {settings.steps}, which is kept in "
                          f"{checkpoint.folder}; to go on, give the same command with --resume") from None
    _report(settings, progress, after, out, say)
    return Result(adapter, progress["losses"], progress["before"], after)


def _check_out(out, resume):
    """Raise unless `out` holds a checkpoint to resume, or, to start with, neither that nor an adapter."""
    checkpoint, adapter = out / CHECKPOINT, out / "adapter_model.safetensors"
    if (out / ENDED).exists():  # of a run that was killed while it took its checkpoint away
        shutil.rmtree(out / ENDED)
    if resume and not is_checkpoint(checkpoint):
        why = "the run has ended, and its adapter is there" if adapter.exists() else "start without --resume"
        raise FileNotFoundError(f"nothing to resume in {out}: {why}")
    if not resume and is_checkpoint(checkpoint):
        raise ValueError(f"{out} holds a run that has not ended: go on with --resume, remove {checkpoint}, "
                         "or choose another folder")
    if not resume:
        check_unused(out, ignore=[CHECKPOINT])  # which holds nothing to go on from


def _identity(settings, rows, base, adapter, xp, parts):
    """What must be the same when the run goes on, in the values that JSON gives back."""
    fields = {name: value for name, value in asdict(settings).items() if name not in FREE}
    file = hashlib.sha256(Path(settings.data).read_bytes()).hexdigest()
    return json.loads(json.dumps({
        "settings": fields,
        "data": {"sha256": file, "tokens": rows.fingerprint()},
        "config": asdict(base.config),
        "arrays": {"module": xp.__name__, "parts": parts},
        "base": adapter.base_fingerprint,
    }))  # fmt: skip


def _train(model, adam, batches, settings, checkpoint, progress, parts, threads, quiet):
    """The steps that are left, each of them noted, some of them saved."""
    started = time.perf_counter() - progress["seconds"]
    warmup = min(100, settings.steps // 10)

    def counted(batches):
        for ids, targets in batches:
            progress["tokens"] += ids.size
            yield ids, targets

    def after(done, loss):
        progress["losses"].append(loss)
        progress["seconds"] = time.perf_counter() - started
        checkpoint.note(_copy(progress))
        if done % settings.save_every == 0 or done == settings.steps:
            checkpoint.save()

    train(
        model,
        adam,
        counted(islice(batches, adam.steps, None)),
        settings.steps,
        schedule=lambda step: warmup_cosine(step, settings.steps, settings.lr, warmup),
        seed=settings.seed,
        parts=parts,
        threads=threads,
        start=adam.steps,
        on_step=after,
        label="training",
        quiet=quiet,
    )


def _copy(progress):
    return {**progress, "losses": progress["losses"].copy()}


def _measure(model, heldout, settings, quiet, label):
    return heldout_loss(model, heldout.once(settings.batch), None if quiet else label)


def _report(settings, progress, after, out, say):
    """What was learned, and what it took."""
    losses, tokens, seconds = progress["losses"], progress["tokens"], progress["seconds"]
    n = min(10, len(losses))
    say(f"{settings.steps} steps in {seconds:,.0f} s, {tokens / max(seconds, 1e-9):,.0f} tokens/s; training loss "
        f"{np.mean(losses[:n]):.3f} -> {np.mean(losses[-n:]):.3f} nats per token (means of {n} steps)")
    if after is not None:
        say(f"held-out loss {progress['before']:.3f} -> {after:.3f} nats per token")
    size, peak = (out / "adapter_model.safetensors").stat().st_size, _peak_memory()
    memory = f"; at most {peak / 1e6:,.0f} MB of memory" if peak else ""
    say(f"kept in {out}: the adapter, {size / 1e3:,.0f} kB{memory}")


def _peak_memory():
    """The most bytes this process has held so far, or None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
