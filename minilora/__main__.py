"""The command line: reads arguments, calls the demo, and turns errors into one line and an exit code."""

import argparse
import sys

from . import demo
from .backend import array_module


def main(argv=None):
    """Run `python -m minilora`; returns the exit code: 0 done, 1 an error told in one line, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m minilora",
        description="Train a small GPT from nothing, teach it facts with LoRA, merge, detach. No network.",
        epilog="example: python -m minilora --quick    then: python -m minilora --quick --ask 'is md5 safe?'",
    )
    parser.add_argument("--quick", action="store_true", help="a much smaller model, a few seconds: does it run here?")
    parser.add_argument("--seed", type=int, default=0, help="of every random number (default 0)")
    parser.add_argument("--backend", choices=["numpy", "cupy"], default="numpy", help="cupy runs on an NVIDIA GPU")
    parser.add_argument("--out", help="folder to keep the models in (default minilora-demo, or minilora-demo-quick)")
    parser.add_argument("--ask", metavar="QUESTION", help="answer from what the last run kept, without training")
    args = parser.parse_args(argv)
    out = args.out or ("minilora-demo-quick" if args.quick else "minilora-demo")
    try:
        xp = array_module(args.backend)
        if args.ask is not None:
            demo.ask(args.ask, out, xp)
        else:
            demo.run(demo.QUICK if args.quick else demo.FULL, out, xp, args.seed)
    except demo.Interrupted as stop:
        print(f"\nminilora: {stop}", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        print(f"minilora: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
