"""The program `minilora`: finds the command, runs it, and makes one line of any error.

Knows the table of commands, and what other programs call them.
"""

import os
import shlex
import sys
import warnings

from .. import __version__
from ..disk.bases import SMOLLM2_COMMAND
from .advice import for_command_line
from .ctrl_c import report_interrupt
from .messages import log, one_line, visible, warn
from .parser import nearest
from .table import COMMANDS, parser_of

# {our command: what other programs call it}
COMMAND_SYNONYMS = {
    "finetune": ("train", "fine-tune", "tune", "fit", "lora", "sft"),
    "generate": ("run", "sample", "infer", "complete", "predict", "prompt"),
    "chat": ("talk", "converse", "conversation", "assistant"),
    "merge": ("fuse", "fold", "export", "merge-and-unload"),
    "combine": ("add", "sum", "mix", "blend", "average", "compress"),
    "extract": ("subtract", "extract-lora", "delta"),
    "inspect": ("show", "info", "describe", "ls", "list"),
    "history": ("versions", "adapters", "log", "runs"),
    "rollback": ("revert", "undo", "restore", "back", "reset", "checkout"),
    "count": ("size", "memory", "vram", "params", "parameters", "flops", "estimate", "cost"),
    "playground": ("play", "page", "html", "web", "browser", "widget", "quiz"),
    "plot": ("draw", "graph", "curve", "curves", "chart", "picture"),
    "compare": ("eval", "evaluate", "perplexity", "test", "loss", "diff"),
    "demo": ("example", "start", "try", "ask"),
}


def main(argv=None):
    """Run the program with the words `argv`, or with those of this process; returns the exit code.

    0: done. 1: an error, in one line on stderr. 2: arguments that make no sense, in one line.
    130: interrupted, in one line (143 of the whole program, if SIGTERM did it).
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        # Near inf NumPy warns in many places, and says the same.
        warnings.filterwarnings("once", category=RuntimeWarning, append=True)
        code = _run_to_the_end(argv)
    try:
        print(end="", flush=True)
    except OSError:
        # Nobody can read what is left: the interpreter must not flush it once more on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def _run_to_the_end(argv):
    """Run what `argv` says; whatever happens becomes at most one line, and an exit code."""
    try:
        return _run(argv)
    except SystemExit as end:
        # The help of a command has been printed, or what is wrong with its arguments.
        return end.code or 0
    except KeyboardInterrupt as interrupt:
        return report_interrupt("minilora", visible(str(interrupt)))
    except BrokenPipeError:
        # Whoever read the output has gone, as `head` does.
        return 1
    except (
        ValueError,
        TypeError,
        OSError,
        ImportError,
        RuntimeError,
        MemoryError,
        OverflowError,
    ) as error:
        warn(f"minilora: {for_command_line(one_line(error))}")
        return 1


def _run(argv):
    if not argv or argv[0] in ("-h", "--help"):
        log(short_help())
        return 0
    if argv[0] == "--version":
        log(f"minilora {__version__}")
        return 0
    name = argv[0]
    if name not in COMMANDS:
        warn(f"minilora: {_no_command(argv)}")
        return 2
    args = parser_of(name).parse_args(argv[1:])
    # For a receipt.
    args.command = shlex.join(["minilora", *argv])
    COMMANDS[name].run(args)
    return 0


def short_help():
    """What the program is, and an example of each command."""
    lines = [f"minilora {__version__}: LoRA from scratch in NumPy, with no deep-learning framework"]
    lines.append("")
    for name, command in COMMANDS.items():
        lines.append(f"  {name:<10} {command.summary}")
        lines.append(f"             minilora {name} {command.example}")
    lines += [
        "",
        "The demo takes about a minute, with --quick a few seconds, and no network.",
        "The other examples work on what the quick demo leaves, and on a text of yours.",
        f"smollm2 is a small language model: {SMOLLM2_COMMAND}",
        "minilora demo --base smollm2 teaches it the demo's facts, in some minutes.",
        "Options of a command: minilora COMMAND --help",
    ]
    return "\n".join(lines)


def _no_command(argv):
    """What to print where the first word is not a command."""
    word = argv[0]
    if word.startswith("-"):
        # Before version 0.2 the demo had no name.
        if parser_of("demo").has_flag(word):
            return f"the demo is a command now: minilora demo {shlex.join(argv)}"
        flag = word.partition("=")[0]
        return f"there is no {flag} before a command{_commands_with(flag)}; see minilora --help"
    name = nearest(word, COMMANDS, COMMAND_SYNONYMS)
    if name is None:
        return f"there is no command {word[:80]!r}; see minilora --help"
    return f"there is no command {word!r}: did you mean {name}? See minilora --help"


def _commands_with(flag):
    """Which commands have the flag, or the one it is most likely meant to be."""
    for name in COMMANDS:
        suggestion = parser_of(name).nearest_flag(flag)
        if suggestion is not None:
            return f"; {name} has {suggestion}"
    return ""


def _show_warning(message, *where):
    warn(f"minilora: warning: {one_line(message)}")
