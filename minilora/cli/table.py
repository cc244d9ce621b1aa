"""The table of commands: what each is for, an example, its options, and what it calls with them.

A command imports what it calls when it is run, so that this table alone costs no time.
"""

import shlex
from collections.abc import Callable
from typing import NamedTuple

from . import options
from .messages import log, warn
from .parser import CommandParser

# What the examples work on: `minilora demo --quick` leaves it.
BASE = "minilora-demo-quick/base"
ADAPTER = "minilora-demo-quick/security"


class Command(NamedTuple):
    """What a command does, in a few words, and an example of its arguments.

    `add_options(parser)` tells a CommandParser what it takes, and `run(args)` does it.
    """

    summary: str
    example: str
    add_options: Callable
    run: Callable


def parser_of(name):
    """The CommandParser of the command `name`.

    Beside the arguments it reads, it returns `refuse(message)`: that ends the program as a wrong
    argument does.
    """
    command = COMMANDS[name]
    title = "example"
    if name != "demo":
        title += ", on what minilora demo --quick has left"
    if "--data" in command.example:
        title += ", and a text"
    epilog = f"{title}:\n  minilora {name} {command.example}"
    parser = CommandParser(name, command.summary, epilog)
    command.add_options(parser)
    parser.set_defaults(refuse=parser.error)
    return parser


def _parts_and_threads(args):
    """The two settings of a command that trains.

    With several threads the process keeps freed memory for the next step.
    """
    from ..training.threads import keep_freed_memory, parts_and_threads

    parts, threads = parts_and_threads(args.parts, args.threads, args.backend)
    if threads > 1:
        keep_freed_memory()
    return parts, threads


def _run_demo(args):
    from ..backend import array_module
    from . import demo

    rerun_command = "minilora demo"
    out = "minilora-demo"
    size = demo.FULL
    if args.quick:
        rerun_command += " --quick"
        out = "minilora-demo-quick"
        size = demo.QUICK
    if args.out is not None:
        rerun_command += f" --out {shlex.quote(args.out)}"
        out = args.out
    xp = array_module(args.backend)
    if args.ask is not None:
        demo.ask(args.ask, out, xp, log)
        return
    parts, threads = _parts_and_threads(args)
    demo.run(
        size,
        out,
        xp,
        args.seed,
        log,
        rerun_command=rerun_command,
        parts=parts,
        threads=threads,
    )


def _run_finetune(args):
    from ..backend import array_module
    from ..training.finetune import finetune
    from ..training.finetune_config import FineTuneConfig
    from .folders import check_source

    target = args.target
    if target is None or target == ["all-linear"]:
        target = "all-linear"
    config = FineTuneConfig(
        base=args.base,
        data=args.data,
        out=args.out,
        alpha=args.alpha,
        r=args.r,
        target=target,
        lr=args.lr,
        steps=args.steps,
        batch=args.batch,
        seed=args.seed,
        eval_split=args.eval_split,
        length=args.length,
        dropout=args.dropout,
        save_every=args.save_every,
    )
    check_source(args.base, "model")
    xp = array_module(args.backend)
    parts, threads = _parts_and_threads(args)
    finetune(config, xp, parts=parts, threads=threads, resume=args.resume, log=log)


def _run_generate(args):
    if args.top_k is not None and args.temperature == 0:
        args.refuse(
            "argument --top-k: at temperature 0 nothing is drawn, "
            "give a --temperature as well, say 0.8"
        )

    from ..backend import array_module
    from . import commands

    sampling = commands.Sampling(args.max_new_tokens, args.temperature, args.top_k, args.seed)
    xp = array_module(args.backend)
    texts = commands.continue_prompt(args.base, args.adapter, args.prompt, sampling, xp, warn)
    if len(args.adapter) <= 1:
        log(texts[0])
        return
    for folder, text in zip(args.adapter, texts, strict=True):
        log(f"--- {folder}")
        log(text)


def _run_merge(args):
    from . import commands

    commands.merge_folders(
        args.base,
        args.adapter,
        args.out,
        log,
        dtype=args.dtype,
        allow_rounding=args.allow_rounding,
    )


def _run_inspect(args):
    from .inspect import inspect

    inspect(args.folder, args.base, log)


def _run_compare(args):
    from ..backend import array_module
    from . import commands

    commands.compare(
        args.base,
        args.adapter,
        args.data,
        array_module(args.backend),
        log,
        batch=args.batch,
        length=args.length,
    )


COMMANDS = {
    "demo": Command(
        "pre-train a small GPT, teach it facts with LoRA, merge, detach",
        "--quick",
        options.demo_options,
        _run_demo,
    ),
    "finetune": Command(
        "train an adapter for a model folder on a file of your own",
        f"--base {BASE} --data notes.txt --out my-adapter --alpha 16",
        options.finetune_options,
        _run_finetune,
    ),
    "generate": Command(
        "continue a prompt, with no, one or several adapters",
        f"--base {BASE} --adapter {ADAPTER} --prompt 'The list '",
        options.generate_options,
        _run_generate,
    ),
    "merge": Command(
        "write a model with an adapter merged into it, as a plain model",
        f"--base {BASE} --adapter {ADAPTER} --out merged",
        options.merge_options,
        _run_merge,
    ),
    "inspect": Command(
        "tell what is in a folder, a model or an adapter",
        f"{ADAPTER} --base {BASE}",
        options.inspect_options,
        _run_inspect,
    ),
    "compare": Command(
        "measure the loss of a model on a file, without and with an adapter",
        f"{BASE} {ADAPTER} --data notes.txt",
        options.compare_options,
        _run_compare,
    ),
}
