"""The command line: reads arguments, calls the demo, and turns errors into one line and an exit code."""

import argparse
import importlib
import os
import shlex
import sys

from . import demo


def main(argv=None):
    """Run `python -m minilora`; returns the exit code: 0 done, 1 an error told in one line, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m minilora",
        description="Train a small GPT from nothing, teach it facts with LoRA, merge, detach. No network.",
        epilog="example: python -m minilora --quick    then: python -m minilora --quick --ask 'is md5 safe?'",
    )
    parser.add_argument("--quick", action="store_true", help="a much smaller model, a few seconds: does it run here?")
    parser.add_argument("--seed", type=_seed, default=0, help="of every random number (default 0)")
    parser.add_argument("--backend", choices=["numpy", "cupy"], default="numpy", help="cupy runs on an NVIDIA GPU")
    parser.add_argument("--out", help="folder to keep the models in (default minilora-demo, or minilora-demo-quick)")
    parser.add_argument("--ask", metavar="QUESTION", help="answer from what the last run kept, without training")
    args = parser.parse_args(argv)
    out = args.out if args.out is not None else "minilora-demo-quick" if args.quick else "minilora-demo"
    again = parser.prog + " --quick" * args.quick + (f" --out {shlex.quote(args.out)}" if args.out is not None else "")
    try:
        xp = array_module(args.backend)
        if args.ask is not None:
            demo.ask(args.ask, out, xp)
        else:
            demo.run(demo.QUICK if args.quick else demo.FULL, out, xp, args.seed, again=again)
        sys.stdout.flush()  # so that a closed pipe shows here
    except demo.Interrupted as stop:
        print(f"\nminilora: {stop}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("\nminilora: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output has gone, as `head` does; what is left must not be flushed to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        print(f"minilora: {error}", file=sys.stderr)
        return 1
    return 0


def _seed(text):
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0, got {text!r}")
    return int(text)


def array_module(name):
    """The module called `name`, "numpy" or "cupy"; an ImportError that names the extra if CuPy is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        remedy = "pip install 'minilora[cuda12]' (or [cuda13]) on a machine with an NVIDIA GPU"
        raise ImportError(f"backend 'cupy' needs CuPy, which does not import here ({error}); {remedy}") from error


if __name__ == "__main__":
    sys.exit(main())
