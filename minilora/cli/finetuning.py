"""`minilora finetune`: from its arguments, files and checkpoints to a run. Knows no step of it.

What trains is imported when the arguments have been found to make sense.
"""

import contextlib

from .config_file import read_settings
from .finetune_options import finetune_options, flag_of
from .hardware import device, kept_parts_and_threads
from .messages import log
from .parser import CommandParser

# What makes the shape of an adapter, and all that is of adapters.
OF_SHAPE = (
    "alpha",
    "r",
    "target",
    "target_regex",
    "dora",
    "rslora",
    "rank_pattern",
    "alpha_pattern",
)
OF_ADAPTERS = (*OF_SHAPE, "dropout", "from_adapter", "quantize", "keep")
# {setting: those that say otherwise}: where the one is given, the others of a file do not count.
INSTEAD_OF = {
    "target": ("target_regex",),
    "target_regex": ("target",),
    "threads": ("workers",),
    "workers": ("threads",),
    "from_adapter": OF_SHAPE,
    "full": OF_ADAPTERS,
}
# What is said of a run beside its settings.
BESIDE = ("backend", "parts", "threads", "workers")


def run_finetune(args):
    """Do what `minilora finetune` was given."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    refuse = given.pop("refuse")
    command = given.pop("command")
    resume = given.pop("resume", False)
    quiet = given.pop("quiet", False)
    settings = _all_settings(given, resume)
    quiet = settings.pop("quiet", quiet)
    _check_required(settings, resume, refuse)
    _check_adapter(settings, refuse)
    _check_evaluations(settings, refuse)
    _check_workers(settings, refuse)

    from ..training.finetune import finetune
    from ..training.finetune_config import FineTuneConfig
    from .folders import find_sources

    beside = {name: settings.pop(name, None) for name in BESIDE}
    backend = beside["backend"] or "numpy"
    if "target_regex" in settings:
        settings["target"] = settings.pop("target_regex")
    elif settings.get("target") == ["all-linear"]:
        settings["target"] = "all-linear"
    config = FineTuneConfig(**settings)
    adapters = [] if config.from_adapter is None else [config.from_adapter]
    find_sources(config.base, adapters)
    xp = device(backend)
    threads = beside["threads"]
    if beside["workers"] is not None:
        # Threads of this process would have nothing to do.
        threads = 1
    parts, threads = kept_parts_and_threads(beside["parts"], threads, backend)
    with _executor(beside["workers"]) as workers:
        finetune(
            config,
            xp,
            parts=parts,
            threads=threads,
            resume=resume,
            command=command,
            log=log,
            quiet=quiet,
            **workers,
        )


def _all_settings(given, resume):
    """{setting: value} of the checkpoint, of the file and of the command line, the last strongest.

    What a run that goes on has may not be changed: that is compared where its checkpoint is read.
    """
    settings = {}
    no_log = given.pop("no_log", False)
    path = given.pop("config", None)
    if path is not None:
        parser = CommandParser("finetune", "settings of a run", "")
        finetune_options(parser)
        settings = read_settings(path, parser)
    settings = _overlaid(settings, given)
    if resume and "out" in settings:
        from ..training.run_file import saved_settings

        settings = _overlaid(saved_settings(settings["out"]), settings)
    if no_log:
        settings.pop("log_file", None)
    return settings


def _overlaid(lower, upper):
    """`lower` with the settings of `upper`, and without those that these take the place of."""
    displaced = {other for name in upper for other in INSTEAD_OF.get(name, ())}
    kept = {name: value for name, value in lower.items() if name not in displaced}
    return {**kept, **upper}


def _check_required(settings, resume, refuse):
    """Refuse a run of which it is not said what to train on what, and where to put it."""
    missing = [flag_of(name) for name in ("base", "data", "out") if name not in settings]
    if resume and "out" not in settings:
        # It is all that such a run has to be told.
        missing = ["--out"]
    if missing:
        refuse(f"the following arguments are required: {', '.join(missing)}")


def _check_adapter(settings, refuse):
    """Refuse what is of adapters where there is none, and what an adapter brings along."""
    if settings.get("full"):
        for name in OF_ADAPTERS:
            if name in settings:
                refuse(
                    f"argument {flag_of(name)}: it is of adapters, and --full trains every weight "
                    "of the model; leave out one of the two"
                )
        return
    if "target" in settings and "target_regex" in settings:
        refuse("argument --target-regex: it takes the place of --target; leave out one of the two")
    if "from_adapter" in settings:
        for name in OF_SHAPE:
            if name in settings:
                refuse(
                    f"argument {flag_of(name)}: the adapter of --from-adapter has its own; leave "
                    "out one of the two"
                )
        return
    if "accept_base" in settings:
        refuse(
            "argument --accept-base: it is about the base of an adapter; give --from-adapter as "
            "well"
        )
    if "alpha" not in settings:
        refuse(
            "the following arguments are required: --alpha (or --from-adapter, which has its own, "
            "or --full, without an adapter)"
        )


def _check_evaluations(settings, refuse):
    """Refuse evaluations without anything to evaluate on, and patience without evaluations."""
    if "patience" in settings and "eval_every" not in settings:
        refuse("argument --patience: it counts evaluations; give --eval-every as well, say 20")
    if "eval_every" in settings and not settings.get("eval_split"):
        refuse(
            "argument --eval-every: nothing is held out to evaluate on; give --eval-split as "
            "well, say 0.1"
        )


def _check_workers(settings, refuse):
    """Refuse workers beside what computes the parts otherwise."""
    if "workers" not in settings:
        return
    if "threads" in settings:
        refuse(
            "argument --workers: processes compute the parts in the place of --threads; leave out "
            "one of the two"
        )
    if settings.get("backend", "numpy") != "numpy":
        refuse(
            "argument --workers: they compute with NumPy; leave out --backend "
            f"{settings['backend']}"
        )
    if settings.get("full"):
        refuse(
            "argument --workers: with --full each part would take all weights to a worker and all "
            "gradients back; give --threads"
        )


@contextlib.contextmanager
def _executor(workers):
    """What `finetune` is told of --workers, with an executor as long as the block lasts."""
    if workers is None:
        yield {}
        return

    from ..training.threads import keep_freed_memory
    from ..training.workers import mpi_pool, process_pool

    # Arrays that come and go with each part are large too.
    keep_freed_memory()
    with mpi_pool() if workers == "mpi" else process_pool(workers) as executor:
        n = executor.num_workers if workers == "mpi" else workers
        yield {"executor": executor, "n_workers": n}
