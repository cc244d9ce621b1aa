"""The table of commands: what each is for, an example, its options, and what it calls with them.

A command imports what it calls when it is run, so that this table alone costs no time.
"""

import shlex
import sys
from collections.abc import Callable
from pathlib import PurePath
from typing import NamedTuple

from . import options
from .finetune_options import finetune_options
from .finetuning import run_finetune
from .hardware import device, kept_parts_and_threads
from .keyboard import line_reader, read_all
from .messages import log, warn, write
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
    if BASE in command.example:
        title += ", on what minilora demo --quick has left"
    if "--data" in command.example:
        title += ", and a text"
    epilog = f"{title}:\n  minilora {name} {command.example}"
    parser = CommandParser(name, command.summary, epilog)
    command.add_options(parser)
    parser.set_defaults(refuse=parser.error)
    return parser


def _run_demo(args):
    run_demo = _small_demo if args.base is None else _base_demo
    run_demo(args, device(args.backend))


def _small_demo(args, xp):
    """The demo that pre-trains its own model."""
    from . import demo

    out, rerun_command = _demo_folder(args, "minilora demo", "minilora-demo")
    if args.ask is not None:
        demo.ask(args.ask, out, xp, log)
        return
    size = demo.QUICK if args.quick else demo.FULL
    parts, threads = kept_parts_and_threads(args.parts, args.threads, args.backend)
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


def _base_demo(args, xp):
    """The demo on a base that was trained elsewhere."""
    from ..training.threads import parts_and_threads
    from . import demo_base

    name = PurePath(args.base).name.removesuffix(".gguf") or "base"
    command = f"minilora demo --base {shlex.quote(args.base)}"
    out, rerun_command = _demo_folder(args, command, f"minilora-demo-{name}")
    if args.ask is not None:
        demo_base.ask(args.ask, args.base, out, xp, log)
        return
    size = demo_base.QUICK if args.quick else demo_base.FULL
    # Freed memory is kept from when the base has been loaded.
    parts, threads = parts_and_threads(args.parts, args.threads, args.backend)
    demo_base.run(
        size,
        args.base,
        out,
        xp,
        args.seed,
        log,
        rerun_command=rerun_command,
        parts=parts,
        threads=threads,
    )


def _demo_folder(args, command, out):
    """(the folder that a demo keeps things in, the command that runs it again)."""
    if args.quick:
        command += " --quick"
        out += "-quick"
    if args.out is not None:
        command += f" --out {shlex.quote(args.out)}"
        out = args.out
    return out, command


def _sampling(args):
    """The Sampling of a command that writes. Options that nothing is drawn by are refused."""
    if args.temperature == 0:
        for flag in ("top_k", "top_p"):
            if getattr(args, flag) is not None:
                args.refuse(
                    f"argument --{flag.replace('_', '-')}: at temperature 0 nothing is drawn, "
                    "give a --temperature as well, say 0.8"
                )

    from .generation import Sampling

    return Sampling(args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed)


def _run_generate(args):
    if args.num_samples > 1 and args.temperature == 0:
        args.refuse(
            "argument --num-samples: at temperature 0 every text is the same, "
            "give a --temperature as well, say 0.8"
        )
    if "" in args.stop:
        args.refuse("argument --stop: the text is empty, which ends everything at once")
    sampling = _sampling(args)

    from .generation import Continuation, continue_prompt

    job = Continuation(
        args.base,
        read_all() if args.prompt == "-" else args.prompt,
        sampling,
        args.adapter,
        args.num_samples,
        tuple(args.stop),
        args.quantize,
        args.accept_base,
        args.cut_prompt,
    )
    xp = device(args.backend)
    headings = _headings(args.adapter, args.num_samples)
    if not headings and sys.stdout.isatty():
        continue_prompt(job, xp, warn, write)
        write("\n")
        return
    texts = continue_prompt(job, xp, warn)
    for i, text in enumerate(texts):
        if headings:
            log(headings[i])
        write(f"{text}\n")


def _headings(adapters, samples):
    """The line above each text, in their order; [] for a text that is the only one."""
    numbers = [str(i + 1) for i in range(samples)]
    if len(adapters) <= 1:
        return [f"--- {number}" for number in numbers if samples > 1]
    if samples == 1:
        return [f"--- {folder}" for folder in adapters]
    return [f"--- {folder}, {number}" for folder in adapters for number in numbers]


def _run_chat(args):
    sampling = _sampling(args)

    from .chat import chat

    chat(
        args.base,
        args.adapter,
        sampling,
        device(args.backend),
        read_line=line_reader(),
        write=write,
        warn=warn,
        system=args.system,
        message=args.say,
        quantize=args.quantize,
        accept_base=args.accept_base,
    )


def _weights(args):
    """A weight for each adapter, None for one that is taken as it is. Other numbers are refused."""
    n = len(args.adapter)
    if args.weights is None:
        if n > 1:
            args.refuse(
                f"argument --weights: {n} adapters are added, so give a weight for each, say "
                f"--weights {' '.join(['1'] * n)}"
            )
        return None
    if len(args.weights) != n:
        args.refuse(
            f"argument --weights: {len(args.weights)} for {n} adapters; give one for each, "
            "in their order"
        )
    return args.weights


def _run_merge(args):
    weights = _weights(args)

    from . import commands

    commands.merge_folders(
        args.base,
        args.adapter,
        args.out,
        log,
        dtype=args.dtype,
        allow_rounding=args.allow_rounding,
        weights=weights,
        quantize=args.quantize,
        accept_base=args.accept_base,
    )


def _run_combine(args):
    weights = _weights(args)

    from . import commands

    commands.combine_folders(
        args.base,
        args.adapter,
        [1.0] if weights is None else weights,
        args.out,
        log,
        command=args.command,
        r=args.r,
        accept_base=args.accept_base,
    )


def _run_extract(args):
    from . import commands

    target = "all-linear" if args.target in (None, ["all-linear"]) else args.target
    commands.extract_folders(
        args.base, args.tuned, args.out, log, command=args.command, r=args.r, target=target
    )


def _run_inspect(args):
    from .inspect import inspect

    inspect(args.folder, args.base, log, verify=args.verify)


def _run_history(args):
    from .history import history

    history(args.folders, log)


def _run_rollback(args):
    from .history import rollback

    rollback(args.folder, args.to, log)


def _run_count(args):
    from .counting import CountJob, count

    target = args.target
    if target is None or target == ["all-linear"]:
        target = "all-linear"
    count(CountJob(args.base, args.r, target, args.dtype, args.batch, args.length), log)


def _run_playground(args):
    from .playground import write_playground

    write_playground(args.html, args.measured, log)


def _run_plot(args):
    from .plot import plot

    plot(args.logs, args.out, log)


def _run_compare(args):
    from .comparison import compare

    parts, threads = kept_parts_and_threads(args.parts, args.threads, args.backend)
    compare(
        args.base,
        args.adapters,
        args.data,
        device(args.backend),
        log,
        batch=args.batch,
        length=args.length,
        quantize=args.quantize,
        accept_base=args.accept_base,
        too_long=args.too_long,
        parts=parts,
        threads=threads,
    )


COMMANDS = {
    "demo": Command(
        "pre-train a small GPT, teach it facts with LoRA, merge, detach",
        "--quick",
        options.demo_options,
        _run_demo,
    ),
    "finetune": Command(
        "train an adapter for a model on a file of your own",
        f"--base {BASE} --data notes.txt --out my-adapter --alpha 16 --log run.jsonl",
        finetune_options,
        run_finetune,
    ),
    "generate": Command(
        "continue a prompt, with no, one or several adapters",
        f"--base {BASE} --adapter {ADAPTER} --prompt 'The list '",
        options.generate_options,
        _run_generate,
    ),
    "chat": Command(
        "talk to a model, and switch between adapters",
        "--base smollm2 --say 'Is MD5 safe?'",
        options.chat_options,
        _run_chat,
    ),
    "merge": Command(
        "write a model with one or several adapters merged into it",
        f"--base {BASE} --adapter {ADAPTER} --out merged",
        options.merge_options,
        _run_merge,
    ),
    "combine": Command(
        "add adapters with weights, and compress them, to one adapter",
        f"--base {BASE} --adapter {ADAPTER} my-adapter --weights 0.7 -0.3 --r 4 --out combined",
        options.combine_options,
        _run_combine,
    ),
    "extract": Command(
        "make an adapter of what full fine-tuning did to a model",
        f"--base {BASE} --tuned merged --r 8 --out extracted",
        options.extract_options,
        _run_extract,
    ),
    "inspect": Command(
        "tell what is in a folder, a model or an adapter",
        f"{ADAPTER} --base {BASE}",
        options.inspect_options,
        _run_inspect,
    ),
    "history": Command(
        "list adapters and their versions, with dates and losses",
        "my-adapter",
        options.history_options,
        _run_history,
    ),
    "rollback": Command(
        "make an older version the adapter in its folder",
        "my-adapter",
        options.rollback_options,
        _run_rollback,
    ),
    "count": Command(
        "tell what training a model takes, in full and with LoRA, without the model",
        "--base llama-3.1-8b --r 16 --target q_proj,k_proj,v_proj,o_proj --dtype bf16",
        options.count_options,
        _run_count,
    ),
    "playground": Command(
        "write a page that counts, decomposes and trains in a browser, without a network",
        "--html playground.html",
        options.playground_options,
        _run_playground,
    ),
    "plot": Command(
        "draw the losses in the logs that finetune --log wrote",
        "run.jsonl --out run.png",
        options.plot_options,
        _run_plot,
    ),
    "compare": Command(
        "measure the loss of a model on files, without and with adapters",
        f"{BASE} {ADAPTER} --data notes.txt",
        options.compare_options,
        _run_compare,
    ),
}
