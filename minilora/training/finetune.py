"""Fine-tuning: from the folder of a model and a file of data to an adapter. Knows no arguments.

Or to a model, where all of its weights are trained. A run that is killed at any moment and resumed
gives what a run that was not gives, to the bit, on the same machine: everything random follows from
the seed, and what came after the last checkpoint is computed again.
"""

import contextlib
import json
import shlex
from collections import namedtuple
from concurrent.futures import BrokenExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np

from ..count import parameter_report
from ..disk.bases import find_base
from ..disk.lock import only_writer
from ..disk.models import load_model
from ..disk.quantized import quantized_base
from ..disk.receipt import sha256_of
from ..disk.tokenizer import load_tokenizer
from ..disk.versions import check_put_back, drop_oldest, is_adapter, version_in
from ..disk.versions import keep as keep_version
from ..optim import Adam
from .checkpoint import Checkpoint, end_removal, is_checkpoint
from .datasets import load_data
from .learned import LearnedAdapter, LearnedModel, report_full
from .loop import Interrupted
from .parts import PartWorkers
from .progress import Progress, check_progress, peak_memory
from .provenance import of_run, provenance
from .run_file import (
    CHECKPOINT,
    arrays_of,
    as_it_began,
    as_typed,
    check_out,
    goes_on_from_out,
    identity_settings,
    places_of,
    write_run_file,
)
from .run_log import RunLog, check_place, cut_back, run_digest
from .steps import Steps, keep
from .threads import check_parts
from .workers import RemoteWorkers, check_workers

# What a run gives: the Adapter, or with `full` the model; the loss of each step; the held-out loss
# before, and that of what is given (None if nothing is held out); and, with `eval_every`, the
# [steps done, held-out loss] on the way.
Result = namedtuple("Result", "adapter losses before after evaluations")

# What a run works with: `typed` its config as what is written names it, `learned` a LearnedAdapter
# or a LearnedModel, `batches` from the first on, `train_data` and `heldout` each a Text or Rows,
# the latter or None, `identity` what must be the same when it goes on.
_Run = namedtuple(
    "_Run", "config typed learned adam batches train_data heldout identity checkpoint"
)

# What computes a run: the arguments of `finetune` that have these names.
_By = namedtuple("_By", "xp parts threads executor n_workers")


def finetune(
    config,
    xp=np,
    *,
    parts=1,
    threads=1,
    executor=None,
    n_workers=1,
    resume=False,
    command="finetune(...)",
    log=print,
    quiet=False,
):
    """Train an adapter for the model in `config.base` on `config.data`; returns a Result.

    `config` is a FineTuneConfig. The adapter is saved in the folder `config.out`; with
    `config.full` it is a model. As long as the run has not ended, this folder holds another,
    `checkpoint`, from which `resume=True` goes on. With `config.eval_every` the adapter is saved
    as it was where the held-out loss was lowest after a step. With `config.keep` there may be an
    adapter, which becomes a version (see versions.py) when this one is saved. Beside it lie
    `run.json`, the file that repeats the run (`minilora finetune --config`), and `receipt.json`,
    which tells what came of it, and by what `command` it was started. `log` is called with each
    line of the report; `quiet` leaves of it what was learned, and shows no progress bars. `xp` is
    the array module to compute with; `parts` and `threads` are those of `train`. With an `executor`
    of concurrent.futures `n_workers` of its workers compute the parts, in the place of threads:
    `process_pool`, `mpi_pool`, or another.
    Raises: ValueError or FileNotFoundError, before anything is computed or written, for files and
    settings that do not fit, or workers that would compute other bits; Interrupted on Ctrl-C, and
    RuntimeError if a worker dies, OSError if a disk is full, with the last whole step saved (of a
    model, the last that was saved anyway).
    """
    check_parts(parts, threads)
    # A part needs a row.
    parts = min(parts, config.batch)
    if executor is not None:
        _check_executor(config, xp, threads)
        check_workers(n_workers, parts)
    threads = min(threads, parts)
    end_removal(config.out)
    if config.log_file is not None:
        check_place(config.log_file, config.out, resume)
    with only_writer(config.out):
        check_out(Path(config.out), resume, config.keep)
        by = _By(xp, parts, threads, executor, n_workers)
        return _run(config, by, resume, command, log, quiet)


def _run(config, by, resume, command, log, quiet):
    """`finetune`, whose arguments fit each other, with the folder of its adapter to itself."""
    has_workers = by.executor is not None
    arrays = arrays_of(by.xp, by.parts, has_workers)
    say = _nothing if quiet else log
    typed = config
    if resume:
        config = as_it_began(config)
        typed = as_typed(config)
    run = _prepare(config, typed, by.xp, arrays, by.threads, say, quiet)
    if not resume:
        run = _apart_from_out(run)
    progress = _begin(run, resume, say)
    if not has_workers:
        workers = PartWorkers(run.learned.model, by.parts, by.threads)
    else:
        make = partial(model_of, run.config)
        workers = RemoteWorkers(run.learned.model, make, by.executor, by.n_workers, by.parts)
        say(f"{by.n_workers} workers of {type(by.executor).__name__} compute {by.parts} parts")
    with workers, _resumable(run):
        # From here on there is something to resume.
        keep(run, progress, is_due=True)
        with _open_log(run) as run_log:
            steps = Steps(run, workers, progress, run_log, say, quiet)
            steps.measure_before()
            steps.take()
            after = steps.take_best()
        _save(run, _receipt(run, progress, after, command), say)
        write_run_file(run.typed, arrays)
        run.checkpoint.remove()
    _report(run, progress, after, has_workers, log)
    return Result(run.learned.module, progress.losses, progress.before, after, progress.evaluations)


def _check_executor(config, xp, threads):
    """Raise unless workers can be of use to such a run."""
    if threads > 1:
        raise ValueError(
            f"{threads} threads beside workers: the workers compute all parts; give 1 thread"
        )
    if xp is not np:
        raise ValueError(f"workers with {xp.__name__}: they compute with NumPy; leave one of them")
    if config.full:
        raise ValueError(
            "workers with full=True (--full): each part would take all weights to a worker and "
            "all gradients back; use threads, or train an adapter"
        )


def model_of(config):
    """The model that a run of this FineTuneConfig trains, with an adapter as drawn: for workers."""
    base = load_model(find_base(config.base))
    if config.quantize is not None:
        base = quantized_base(base, config.quantize, _nothing, quiet=True)
    return LearnedAdapter(base, config, np.random.default_rng(config.seed), _nothing).model


def _nothing(line):
    """What a line is told to that nobody is to read."""


def _begin(run, resume, log):
    """The Progress from which the run starts, or goes on, with all else as it was then."""
    if run.config.eval_every is not None:
        # So that there always is one; the first evaluation puts another in its place.
        run.checkpoint.mark_best()
    progress = Progress()
    if resume:
        progress = Progress(**run.checkpoint.restore())
        log(f"resumed after step {run.adam.steps} of {run.config.steps}")
        if run.config.log_file is not None:
            cut_back(run.config.log_file, run_digest(run.identity), progress, log)
    return progress


def _open_log(run):
    """A context: the RunLog of the run, or None if it has none."""
    if run.config.log_file is None:
        return contextlib.nullcontext()
    return RunLog(run.config.log_file, run_digest(run.identity))


def _apart_from_out(run):
    """The _Run, which goes on from a version if it went on from the adapter in its own folder.

    That one will be another when the run is resumed or repeated. So it is copied.
    """
    if not goes_on_from_out(run.config):
        return run
    parent = str(keep_version(run.config.out).folder)
    config = replace(run.config, from_adapter=parent)
    typed = replace(run.typed, from_adapter=parent)
    run.checkpoint.places = places_of(config, typed)
    return run._replace(config=config, typed=typed)


def _prepare(config, typed, xp, arrays, threads, log, quiet):
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
    if config.full:
        # What it will take is said before it is taken.
        report_full(base, config.eval_every is not None, log)
        learned = LearnedModel(base, path, config.out)
    else:
        learned = LearnedAdapter(base, config, adapter_rng, log)
    log(learned.summary)
    adam = Adam(
        learned.module.parameters(),
        lr=config.lr,
        weight_decay=config.weight_decay,
        threads=threads,
    )
    identity = _identity(config, data, base.config, learned, arrays)
    check = partial(
        check_progress,
        planned=config.steps,
        is_measured=heldout is not None,
        eval_every=config.eval_every,
    )
    checkpoint = Checkpoint(
        Path(config.out) / CHECKPOINT,
        identity,
        learned.module,
        adam,
        places=places_of(config, typed),
        check=check,
    )
    return _Run(config, typed, learned, adam, batches, train_data, heldout, identity, checkpoint)


def _identity(config, data, base_config, learned, arrays):
    """What must be the same when the run goes on."""
    identity = {
        "settings": identity_settings(config),
        "data": {"sha256": sha256_of(config.data), "tokens": data.fingerprint()},
        "config": asdict(base_config),
        "arrays": arrays,
        "base": learned.fingerprint,
    }
    if learned.origin is not None:
        identity["from_adapter"] = {"digest": learned.origin}
    # As it will be read back: JSON makes a list of a tuple.
    return json.loads(json.dumps(identity))


@contextlib.contextmanager
def _resumable(run):
    """Whatever ends this block early leaves a checkpoint, and an error that says how to go on.

    But for a ValueError before any step was saved: going on would lead to the same error, so that
    nothing is left.
    """
    checkpoint = run.checkpoint
    try:
        yield
    except (KeyboardInterrupt, BrokenExecutor) as error:
        if checkpoint.snapshot is not None:
            checkpoint.save()
        if not is_checkpoint(checkpoint.folder):
            # It fell into the first save, or into the removal, when all is saved.
            raise
        kept = (
            f"after step {checkpoint.saved_steps()} of {run.config.steps}, which is kept in "
            f"{checkpoint.folder}; to go on, give --resume and --out {shlex.quote(run.config.out)}"
        )
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted(f"interrupted {kept}") from None
        raise RuntimeError(
            f"a worker died (killed, or out of memory?) {kept}, with any number of workers "
            f"({type(error).__name__})"
        ) from None
    except Exception as error:
        if not isinstance(error, ValueError) and checkpoint.snapshot is not None:
            # A full disk, too little memory: who goes on may come further.
            with contextlib.suppress(OSError):
                checkpoint.save()
        is_kept = is_checkpoint(checkpoint.folder) and checkpoint.saved_steps() > 0
        if not is_kept:
            _leave_nothing(run)
        if isinstance(error, ValueError) and run.adam.steps == 0:
            raise ValueError(f"{error} ({_sources(run.config)})") from None
        if not isinstance(error, ValueError) or not is_kept:
            raise
        checkpoint.note_failure(str(error))
        raise ValueError(
            f"{error}. To start again with other settings, remove {checkpoint.folder} or choose "
            "another folder"
        ) from None


def _sources(config):
    """What a run is made of, in words: where an error comes from that meets its first step."""
    base = f"the base is {config.base}"
    if config.from_adapter is not None:
        base += f", gone on from is {config.from_adapter}"
    return f"{base}, the data are {config.data}"


def _leave_nothing(run):
    """Remove the checkpoint, and a log without a step in it. An empty folder goes with its lock."""
    run.checkpoint.remove()
    if run.config.log_file is not None and run.adam.steps == 0:
        Path(run.config.log_file).unlink(missing_ok=True)


def _receipt(run, progress, after, command):
    """What is written beside what was learned, but for the digest of its file of tensors."""
    learned = run.learned
    parents = [] if learned.origin is None else [learned.origin]
    return provenance(
        command,
        run.typed.base,
        learned.fingerprint,
        parents,
        learned.update_sizes(),
        of_run(run, progress, after),
    )


def _save(run, receipt, log):
    """Write what was learned. If that is nothing, the checkpoint goes: going on would not help.

    An adapter that is there is kept as a version; if there are too many now, the oldest go.
    """
    out = run.config.out
    try:
        run.learned.check_learned()
    except ValueError as error:
        run.checkpoint.remove()
        raise ValueError(
            f"nothing was learned in {run.adam.steps} steps, and nothing is kept: {error}"
        ) from None
    spare = [] if run.config.from_adapter is None else [run.config.from_adapter]
    if run.config.keep is not None and is_adapter(out) and not _is_saved(out, receipt):
        version = keep_version(out)
        log(f"the adapter from before is kept in {version.folder}")
        try:
            check_put_back(version)
        except (ValueError, OSError) as error:
            log(f"it cannot be put back: {error}")
    run.learned.save(out, receipt)
    if run.config.keep is not None:
        for folder in drop_oldest(out, run.config.keep, spare):
            log(f"removed, as more than {run.config.keep} versions were kept: {folder}")


def _is_saved(out, receipt):
    """Did this very run save its adapter in `out`, and was killed before it had ended?

    A receipt tells how long the steps took, too: no other run has the same.
    """
    saved = version_in(out).receipt
    # As it was written: JSON makes a list of a tuple.
    return saved is not None and saved["run"] == json.loads(json.dumps(receipt["run"]))


def _report(run, progress, after, has_workers, log):
    """Log what was learned, and what it took."""
    for line in progress.report(after, run.config.steps):
        log(line)
    for line in [*progress.remarks(after, run.config.clip), *run.learned.remarks()]:
        log(line)
    out = Path(run.config.out)
    n_bytes = (out / run.learned.file).stat().st_size
    line = f"kept in {out}: {run.learned.noun}, {n_bytes / 1e3:,.0f} kB"
    peak = peak_memory()
    if peak is not None:
        line += f"; at most {peak / 1e6:,.0f} MB of memory"
        if has_workers:
            line += ", its workers aside"
    log(line)
