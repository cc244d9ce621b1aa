"""`minilora finetune`: from its arguments to a run. Knows arguments, and no step.

What trains is imported when the arguments have been found to make sense.
"""

import contextlib

from .hardware import device, parts_and_threads_of
from .messages import log

# What finetune is given of an adapter.
ADAPTER_FLAGS = ("alpha", "r", "target", "dropout", "dora")


def _adapter_settings(args):
    """{setting: value} of those ADAPTER_FLAGS that were given. What makes no sense is refused."""
    given = {name: getattr(args, name) for name in ADAPTER_FLAGS}
    given = {name: value for name, value in given.items() if value is not None}
    if args.full and args.quantize is not None:
        given["quantize"] = args.quantize
    if args.full and given:
        args.refuse(
            f"argument --{next(iter(given))}: it is of adapters, and --full trains every weight "
            "of the model; leave out one of the two"
        )
    if not args.full and args.alpha is None:
        args.refuse("the following arguments are required: --alpha (or --full, without an adapter)")
    if given.get("target") == ["all-linear"]:
        given["target"] = "all-linear"
    return given


def _check_evaluations(args):
    """Refuse evaluations without anything to evaluate on, and patience without evaluations."""
    if args.patience is not None and args.eval_every is None:
        args.refuse("argument --patience: it counts evaluations; give --eval-every as well, say 20")
    if args.eval_every is not None and not args.eval_split:
        args.refuse(
            "argument --eval-every: nothing is held out to evaluate on; give --eval-split as "
            "well, say 0.1"
        )


def _check_workers(args):
    """Refuse workers beside what computes the parts otherwise."""
    if args.workers is None:
        return
    if args.threads is not None:
        args.refuse(
            "argument --workers: processes compute the parts in the place of --threads; "
            "leave out one of the two"
        )
    if args.backend != "numpy":
        args.refuse(
            f"argument --workers: they compute with NumPy; leave out --backend {args.backend}"
        )
    if args.full:
        args.refuse(
            "argument --workers: with --full each part would take all weights to a worker and all "
            "gradients back; give --threads"
        )


def run_finetune(args):
    """Do what `minilora finetune` was given."""
    adapter_settings = _adapter_settings(args)
    _check_evaluations(args)
    _check_workers(args)

    from ..training.finetune import finetune
    from ..training.finetune_config import FineTuneConfig
    from .folders import find_sources

    config = FineTuneConfig(
        base=args.base,
        data=args.data,
        out=args.out,
        **adapter_settings,
        full=args.full,
        lr=args.lr,
        steps=args.steps,
        batch=args.batch,
        accumulate=args.accumulate,
        seed=args.seed,
        eval_split=args.eval_split,
        length=args.length,
        save_every=args.save_every,
        quantize=args.quantize,
        too_long=args.too_long,
        eval_every=args.eval_every,
        patience=args.patience,
        log_file=args.log,
    )
    find_sources(args.base)
    xp = device(args.backend)
    if args.workers is not None:
        # Threads of this process would have nothing to do.
        args.threads = 1
    parts, threads = parts_and_threads_of(args)
    with _executor(args.workers) as workers:
        finetune(config, xp, parts=parts, threads=threads, resume=args.resume, log=log, **workers)


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
