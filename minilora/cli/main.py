"""The command line: reads arguments, calls the demo or a command, and turns errors into one line and an exit code."""

import argparse
import math
import os
import re
import shlex
import sys
import warnings

from ..backend import array_module
from ..disk.tensor_file import DTYPES
from ..training.finetune import Settings, finetune
from ..training.loop import Interrupted
from ..training.threads import keep_freed_memory, parts_and_threads
from . import commands, demo

BASE, ADAPTER = "minilora-demo-quick/base", "minilora-demo-quick/security"  # what the examples of --help work on


def main(argv=None):
    """Run `minilora`, also `python -m minilora`; returns the exit code.

    0 done, 1 an error told in one line, 130 interrupted. SystemExit(2) for arguments that make no sense, as a line too.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv.insert(0, "demo")  # the bare command
    args = _parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *where: _tell(f"minilora: warning: {_one_line(message)}")
        try:
            args.run(args)
            print(end="", flush=True)  # so that a closed pipe shows here
            return 0
        except Interrupted as stop:
            code, told = 130, f"\nminilora: {stop}"
        except KeyboardInterrupt:
            code, told = 130, "\nminilora: interrupted"
        except BrokenPipeError:  # whoever read our output has gone, as `head` does
            code, told = 1, None
        except (ValueError, TypeError, OSError, ImportError, RuntimeError, MemoryError, OverflowError) as error:
            code, told = 1, f"minilora: {_one_line(error)}"
    try:
        print(end="", flush=True)
    except OSError:  # what is left must not be flushed on the way out
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if told is not None:
        _tell(told)
    return code


class _Parser(argparse.ArgumentParser):
    """Help whose examples are as they are typed, a line each; errors in one line, without the usage."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message):
        self.exit(2, f"{self.prog}: {_one_line(message)}; see {self.prog} --help\n")


def _parser():
    parser = _Parser(
        prog="minilora",
        description="LoRA from scratch. Without a command, the demo: train a small GPT from nothing,\n"
        "teach it facts with LoRA, merge, detach. No network.",
        epilog="examples:\n  minilora --quick\n  minilora --quick --ask 'is md5 safe?'\n"
        "options of the demo: minilora demo --help",
    )
    several = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name, run, summary, example):
        ready = "" if run is _demo else ", on what minilora --quick has left" + ", and a text" * ("--data" in example)
        sub = several.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".",
                                 epilog=f"example{ready}:\n  minilora {name} {example}")  # fmt: skip
        sub.set_defaults(run=run, refuse=sub.error)
        return sub

    sub = command("demo", _demo, "pre-train a small GPT, teach it facts with LoRA, merge, detach", "--quick")
    add = sub.add_argument
    add("--quick", action="store_true", help="a much smaller model, a few seconds: does it run here?")
    add("--seed", type=_whole(0), default=0, help="of every random number (default %(default)s)")
    add("--out", metavar="DIR", help="folder to keep the models in (default minilora-demo, or minilora-demo-quick)")
    add("--ask", metavar="QUESTION", help="answer from what the last run kept, without training")
    _backend(sub)
    _threads(sub)

    sub = command("finetune", _finetune, "train an adapter for a model folder on a file of your own",
                  f"--base {BASE} --data notes.txt --out my-adapter --alpha 16 --eval-split 0.1")
    add = sub.add_argument
    _base(sub)
    add("--data", required=True, metavar="FILE", help='a .txt, or a .jsonl with {"prompt": "...", "answer": "..."} '
        "on each line, of which the answers are learned; an answer usually starts with a space or a newline")
    add("--out", required=True, metavar="DIR", help="the adapter's folder, in PEFT's format")
    add("--alpha", required=True, type=float, help="strength: the update is scaled by alpha / r; often 2 r")
    add("--r", type=int, default=Settings.r, help="rank of the update (default %(default)s)")
    add("--target", nargs="+", action="extend", metavar="NAME", help="modules to adapt, by PEFT's names "
        "(c_attn, mlp.c_fc) or this library's (q_proj, v_proj, ...); default all-linear")
    add("--lr", type=float, default=Settings.lr, help="peak of the learning rate (default %(default)s)")
    add("--steps", type=int, default=Settings.steps, help="default %(default)s")
    add("--batch", type=int, default=Settings.batch, help="rows in a step (default %(default)s)")
    add("--length", type=int, help="tokens in a row of text (default 256, or the model's context if shorter)")
    add("--dropout", type=float, default=Settings.dropout, help="on the adapter's input (default %(default)s)")
    add("--seed", type=_whole(0), default=Settings.seed, help="of every random number (default %(default)s)")
    add("--eval-split", type=float, default=Settings.eval_split, metavar="SHARE",
        help="share of the data held out, to measure the loss on before and after (default %(default)s)")
    add("--save-every", type=int, default=Settings.save_every, metavar="STEPS", help="default %(default)s")
    add("--resume", action="store_true", help="go on with a run that was interrupted or killed")
    _backend(sub)
    _threads(sub)

    sub = command("generate", _generate, "continue a prompt, with no, one or several adapters",
                  f"--base {BASE} --adapter {ADAPTER} --prompt 'The list '")
    add = sub.add_argument
    _base(sub)
    add("--adapter", nargs="+", action="extend", default=[], metavar="DIR",
        help="several: a text for each, under a line with its name, all made in one batch")
    add("--prompt", required=True, metavar="TEXT", help="what the text begins with")
    add("--max-new-tokens", type=_whole(0), default=40, metavar="N", help="default %(default)s")
    add("--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token")
    add("--top-k", type=_whole(1), metavar="K", help="draw from the K likeliest tokens; needs a --temperature")
    add("--seed", type=_whole(0), default=0, help="of every random number (default %(default)s)")
    _backend(sub)

    sub = command("merge", _merge, "write a model with an adapter merged into it, as a plain model",
                  f"--base {BASE} --adapter {ADAPTER} --out merged")
    add = sub.add_argument
    _base(sub)
    add("--adapter", required=True, metavar="DIR", help="the adapter's folder, in PEFT's format")
    add("--out", required=True, metavar="DIR", help="a new folder for the merged model, in the format of its base")
    add("--dtype", choices=DTYPES, default="float32", help="what weights are stored in (default %(default)s)")
    add("--allow-rounding", action="store_true", help="store it though rounding costs over a tenth of an update")

    sub = command("inspect", _inspect, "tell what is in a folder, a model or an adapter", f"{ADAPTER} --base {BASE}")
    sub.add_argument("folder", metavar="DIR", help="a model's folder, or an adapter's")
    sub.add_argument("--base", metavar="DIR", help="the adapter's base, if it is not where the adapter says")

    sub = command("compare", _compare, "measure the loss of a model on a file, without and with an adapter",
                  f"{BASE} {ADAPTER} --data notes.txt")
    add = sub.add_argument
    add("base", metavar="BASE", help="the model's folder")
    add("adapter", metavar="ADAPTER", help="the adapter's folder")
    add("--data", required=True, metavar="FILE", help=".txt or .jsonl, as for finetune")
    add("--batch", type=_whole(1), default=4, help="rows at once (default %(default)s)")
    add("--length", type=_whole(1), help="as for finetune")
    _backend(sub)
    return parser


def _base(parser):
    parser.add_argument("--base", required=True, metavar="DIR", help="a GPT-2 folder (config.json, model.safetensors, "
                        "tokenizer.json), or one that minilora saved")  # fmt: skip


def _backend(parser):
    parser.add_argument("--backend", choices=["numpy", "cupy"], default="numpy", help="cupy runs on an NVIDIA GPU")


def _threads(parser):
    parser.add_argument("--parts", type=_whole(1), metavar="N", help="parts that a batch is cut into (default 2); with "
                        "the seed they determine every bit")  # fmt: skip
    parser.add_argument("--threads", type=_whole(1), metavar="N", help="parts computed at once (default: as "
                        "many as there are parts and cores)")  # fmt: skip


def _parts_and_threads(args):
    """The two settings of a command that trains; with several threads, freed memory is kept for the next step."""
    parts, threads = parts_and_threads(args.parts, args.threads, args.backend)
    if threads > 1:
        keep_freed_memory()
    return parts, threads


def _demo(args):
    out = args.out if args.out is not None else "minilora-demo-quick" if args.quick else "minilora-demo"
    again = "python -m minilora" + " --quick" * args.quick
    again += f" --out {shlex.quote(args.out)}" if args.out is not None else ""
    xp = array_module(args.backend)
    if args.ask is not None:
        demo.ask(args.ask, out, xp)
    else:
        parts, threads = _parts_and_threads(args)
        demo.run(demo.QUICK if args.quick else demo.FULL, out, xp, args.seed, again=again, parts=parts,
                 threads=threads)


def _finetune(args):
    names = args.target if args.target not in (None, ["all-linear"]) else "all-linear"
    try:
        settings = Settings(
            base=args.base, data=args.data, out=args.out, alpha=args.alpha, r=args.r, target=names, lr=args.lr,
            steps=args.steps, batch=args.batch, seed=args.seed, eval_split=args.eval_split, length=args.length,
            dropout=args.dropout, save_every=args.save_every,
        )  # fmt: skip
    except ValueError as error:  # "Settings: eval_split must be ..."
        flag = lambda match: "argument --" + match[1].replace("target_modules", "target").replace("_", "-")
        args.refuse(re.sub(r"^\w+: (\w+)", flag, str(error)))
    commands.check_source(args.base, "model")
    parts, threads = _parts_and_threads(args)
    finetune(settings, array_module(args.backend), parts=parts, threads=threads, resume=args.resume, say=_say)


def _generate(args):
    if not 0 <= args.temperature < math.inf:
        args.refuse(f"argument --temperature: must be a finite number of at least 0, got {args.temperature}")
    if args.top_k is not None and not args.temperature:
        args.refuse("argument --top-k: at temperature 0 nothing is drawn, give a --temperature as well, say 0.8")
    commands.continue_prompt(
        args.base, args.adapter, args.prompt, array_module(args.backend), args.seed, _say, _tell,
        max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_k=args.top_k,
    )  # fmt: skip


def _merge(args):
    commands.merge_folders(args.base, args.adapter, args.out, _say, dtype=args.dtype,
                           allow_rounding=args.allow_rounding)  # fmt: skip


def _inspect(args):
    commands.inspect(args.folder, args.base, _say)


def _compare(args):
    commands.compare(args.base, args.adapter, args.data, array_module(args.backend), _say, batch=args.batch,
                     length=args.length)  # fmt: skip


def _say(text):
    """At once, so that a log or a pipe has each line when it is said."""
    print(text, flush=True)


def _tell(text):
    """What is not the answer goes beside it, so that the answer alone can be piped on."""
    print(text, file=sys.stderr)


def _one_line(error):
    """What an error says, in one line that can be read: of a list the first three, of each no more than 300 letters."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    if isinstance(error, MemoryError):
        return f"there is not enough memory; use a smaller batch ({error})"
    if isinstance(error, UnicodeEncodeError) and error.encoding != "utf-8":
        return f"the output is in {error.encoding}, which cannot say {error.object[error.start]!a}; set PYTHONUTF8=1"
    lines = [line if len(line) <= 300 else f"{line[:300]} ..." for line in str(error).split("\n")]
    first, *rest = [line.strip() for line in lines if line.strip()] or [type(error).__name__]
    return " ".join([first, "; ".join(rest[:3]) + "; ..." * (len(rest) > 3)]).rstrip()


def _whole(least):
    def whole(text):
        if text.isdecimal() and int(text) >= least:
            return int(text)
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
    return whole


if __name__ == "__main__":
    sys.exit(main())
