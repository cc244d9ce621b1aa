"""Fine-tuning: from the folder of a model and a file of data to an adapter. Knows no arguments.

A run that is killed at any moment and resumed gives the adapter of a run that was not, to the bit,
on the same machine: everything random follows from the seed, and what came after the last
checkpoint is computed again.
"""

import contextlib
import hashlib
import json
import shutil
import time
from collections import namedtuple
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy as np

from ..count import parameter_report
from ..disk.bases import find_base
from ..disk.folder import check_unused
from ..disk.models import load_model
from ..disk.peft import TENSORS as ADAPTER_TENSORS
from ..disk.peft import init_peft_adapter, save_adapter
from ..disk.quantized import quantized_base
from ..disk.tokenizer import load_tokenizer
from ..lora import attach
from ..optim import Adam, warmup_cosine
from .checkpoint import REMOVED, Checkpoint, is_checkpoint
from .datasets import load_data
from .loop import Interrupted, heldout_loss, train
from .parts import check_parts
from .progress import Progress, peak_memory

# What a run gives: the Adapter, the loss of each step, and the held-out loss before and after
# (None if nothing is held out).
Result = namedtuple("Result", "adapter losses before after")

# Until the run has ended, this folder in the folder of the adapter holds its checkpoint.
CHECKPOINT = "checkpoint"
# These settings may change when a run goes on: where things lie, and how often they are saved. The
# model and the data themselves may not, so their fingerprints are compared.
MAY_CHANGE = ("base", "data", "out", "save_every")

LONGEST_WARMUP = 100

# What a run works with: `batches` from the first on, `heldout` a Text, Rows or None.
_Run = namedtuple("_Run", "config model adapter adam batches heldout checkpoint")


def finetune(config, xp=np, *, parts=1, threads=1, resume=False, log=print, quiet=False):
    """Train an adapter for the model in `config.base` on `config.data`; returns a Result.

    `config` is a FineTuneConfig. The adapter is saved in the folder `config.out`. As long as the
    run has not ended, this folder holds another, `checkpoint`, from which `resume=True` goes on.
    `log` is called with each line of the report; `quiet` shows no progress bars. `xp` is the array
    module to compute with; `parts` and `threads` are those of `train`.
    Raises: ValueError or FileNotFoundError, before anything is computed or written, for files and
    settings that do not fit; Interrupted on Ctrl-C, with the last whole step saved.
    """
    check_parts(parts, threads)
    # A part needs a row; and where there are fewer parts, each has more of BLAS.
    parts = min(parts, config.batch)
    threads = min(threads, parts)
    _check_out(Path(config.out), resume)
    run = _prepare(config, xp, parts, log, quiet)
    progress = Progress()
    if resume:
        progress = Progress(**run.checkpoint.restore())
        log(f"resumed after step {run.adam.steps} of {config.steps}")
    run.checkpoint.take_snapshot(progress.as_json())
    with _resumable(run):
        # From here on there is something to resume.
        run.checkpoint.save()
        if progress.before is None:
            progress.before = _measure(run, "held-out loss before", quiet)
        _train(run, progress, parts, threads, quiet)
        after = _measure(run, "held-out loss after", quiet)
        save_adapter(run.adapter, config.out, base_model=str(config.base))
        run.checkpoint.remove()
    _report(run, progress, after, log)
    return Result(run.adapter, progress.losses, progress.before, after)


def _check_out(out, resume):
    """Raise unless `out` holds a run to resume, or nothing that a new run would write over."""
    checkpoint = out / CHECKPOINT
    if (out / REMOVED).exists():
        # A run was killed while it removed its checkpoint.
        shutil.rmtree(out / REMOVED)
    if resume and not is_checkpoint(checkpoint):
        reason = "start without --resume"
        if (out / ADAPTER_TENSORS).exists():
            reason = "the run has ended, and its adapter is there"
        raise FileNotFoundError(f"nothing to resume in {out}: {reason}")
    if resume:
        return
    if is_checkpoint(checkpoint):
        raise ValueError(
            f"{out} holds a run that has not ended: go on with --resume, remove {checkpoint}, "
            "or choose another folder"
        )
    # A run that was killed in its first save leaves a checkpoint folder without a checkpoint.
    check_unused(out, ignore=[CHECKPOINT])


def _prepare(config, xp, parts, log, quiet):
    """Load and draw everything that a run needs: a _Run. Whatever does not fit is refused here."""
    path = find_base(config.base)
    base = load_model(path, xp)
    tokenizer = load_tokenizer(path)
    log(
        f"base {config.base}: {parameter_report(base).total:,} parameters, a context of "
        f"{base.config.block_size:,} tokens, {tokenizer.vocab_size:,} tokens in the vocabulary"
    )
    if tokenizer.start:
        start = tokenizer.decode(tokenizer.start)
        log(f"texts and prompts begin with {start!r}, which the base's tokenizer puts there")
    # One generator for each purpose: how much one of them draws changes nothing for the others.
    split_rng, adapter_rng, batch_rng = np.random.default_rng(config.seed).spawn(3)
    data = load_data(
        config.data,
        tokenizer,
        base.config.block_size,
        config.length,
        quiet,
        too_long=config.too_long,
        log=log,
    )
    train_data, heldout = data.split(config.eval_split, split_rng)
    batches = train_data.batches(config.batch, batch_rng)
    log(f"data {config.data}: {train_data}")
    log(f"held out: {heldout or 'nothing'}")
    # Packing a large base takes a while: what is wrong with the data is said before.
    if config.quantize is not None:
        base = quantized_base(base, config.quantize, log, quiet)
    adapter = init_peft_adapter(base, config.lora_config(), adapter_rng)
    model = attach(base, adapter, check_base=False)
    adam = Adam(adapter.parameters(), lr=config.lr)
    log(f"adapter r={config.r}, alpha={config.alpha:g}: {parameter_report(model)}")
    identity = _identity(config, data, base, adapter, xp, parts)
    checkpoint = Checkpoint(Path(config.out) / CHECKPOINT, identity, adapter, adam)
    return _Run(config, model, adapter, adam, batches, heldout, checkpoint)


def _identity(config, data, base, adapter, xp, parts):
    """What must be the same when the run goes on."""
    settings = {name: value for name, value in asdict(config).items() if name not in MAY_CHANGE}
    data_file = hashlib.sha256(Path(config.data).read_bytes()).hexdigest()
    identity = {
        "settings": settings,
        "data": {"sha256": data_file, "tokens": data.fingerprint()},
        "config": asdict(base.config),
        "arrays": {"module": xp.__name__, "parts": parts},
        "base": adapter.base_fingerprint,
    }
    # As it will be read back: JSON makes a list of a tuple.
    return json.loads(json.dumps(identity))


@contextlib.contextmanager
def _resumable(run):
    """Whatever ends this block early leaves a checkpoint, and an error that says how to go on."""
    checkpoint = run.checkpoint
    try:
        yield
    except ValueError as error:
        raise ValueError(
            f"{error}. To start again with other settings, remove {checkpoint.folder} or choose "
            "another folder"
        ) from None
    except KeyboardInterrupt:
        checkpoint.save()
        raise Interrupted(
            f"interrupted after step {checkpoint.steps} of {run.config.steps}, which is kept in "
            f"{checkpoint.folder}; to go on, give the same command with --resume"
        ) from None


def _train(run, progress, parts, threads, quiet):
    """The steps that are left: a snapshot is taken after each, and saved every few."""
    config = run.config
    started = time.perf_counter() - progress.seconds
    warmup = min(LONGEST_WARMUP, config.steps // 10)

    def after_step(n_done, loss):
        progress.losses.append(loss)
        progress.seconds = time.perf_counter() - started
        run.checkpoint.take_snapshot(progress.as_json())
        if n_done % config.save_every == 0 or n_done == config.steps:
            run.checkpoint.save()

    train(
        run.model,
        run.adam,
        progress.count_tokens(islice(run.batches, run.adam.steps, None)),
        config.steps,
        schedule=lambda step: warmup_cosine(step, config.steps, config.lr, warmup),
        seed=config.seed,
        parts=parts,
        threads=threads,
        start=run.adam.steps,
        on_step=after_step,
        label="training",
        quiet=quiet,
    )


def _measure(run, label, quiet):
    """The held-out loss, or None if nothing is held out."""
    if run.heldout is None:
        return None
    batches = run.heldout.epoch(run.config.batch)
    return heldout_loss(run.model, batches, label=None if quiet else label)


def _report(run, progress, after, log):
    """Log what was learned, and what it took."""
    for line in progress.report(after):
        log(line)
    out = Path(run.config.out)
    n_bytes = (out / ADAPTER_TENSORS).stat().st_size
    line = f"kept in {out}: the adapter, {n_bytes / 1e3:,.0f} kB"
    peak = peak_memory()
    if peak is not None:
        line += f"; at most {peak / 1e6:,.0f} MB of memory"
    log(line)
