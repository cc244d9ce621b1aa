"""The arguments of one command: errors in one line, and for an unknown flag the nearest there is.

Knows no command, but what other programs call our flags.
"""

import argparse
import difflib
import math
import re

from .messages import log, one_line, visible

# {our flag: what other programs call it}, all without dashes.
FLAG_SYNONYMS = {
    "accept-base": ("other-precision", "ignore-base", "skip-base-check", "force"),
    "accumulate": ("gradient-accumulation-steps", "grad-accum", "gradient-accumulation"),
    "adapter": ("adapters", "adapter-path", "lora", "lora-path", "peft-model"),
    "alpha": ("lora-alpha",),
    "alpha-pattern": ("alpha-patterns",),
    "ask": ("question", "query"),
    "backend": ("device", "gpu", "cuda"),
    "base": (
        "model",
        "model-path",
        "base-model",
        "model-name-or-path",
        "base-model-name-or-path",
        "checkpoint",
    ),
    "batch": ("batch-size", "train-batch-size", "per-device-train-batch-size", "micro-batch-size"),
    "clip": ("max-grad-norm", "max-norm", "grad-clip", "gradient-clipping", "clip-grad-norm"),
    "config": ("config-file", "config-path", "settings", "args-file", "run-file"),
    "cut-prompt": ("truncate", "truncation"),
    "data": ("dataset", "data-path", "dataset-path", "train-data", "train-file", "file", "text"),
    "dropout": ("lora-dropout",),
    "dora": ("use-dora",),
    "dtype": ("precision", "torch-dtype"),
    "eval-every": (
        "eval-steps",
        "eval-interval",
        "evaluation-steps",
        "val-every",
        "validate-every",
    ),
    "eval-split": ("val-split", "validation-split", "test-size", "val-size", "heldout", "holdout"),
    "from-adapter": (
        "adapter-path",
        "lora-path",
        "init-adapter",
        "init-from",
        "start-from",
        "continue-from",
        "resume-adapter-file",
        "adapter-name-or-path",
    ),
    "full": ("full-finetuning", "full-fine-tuning", "no-lora", "finetuning-type"),
    "html": ("page", "output", "website"),
    "keep": ("save-total-limit", "keep-last", "versions", "max-to-keep"),
    "length": (
        "max-length",
        "max-seq-length",
        "max-seq-len",
        "seq-len",
        "seq-length",
        "block-size",
        "cutoff-len",
    ),
    "log": ("log-file", "logging-dir", "logfile", "metrics", "history", "report-to"),
    "lr": ("learning-rate", "rate"),
    "max-new-tokens": ("max-tokens", "num-tokens", "n-predict", "max-length", "length", "tokens"),
    "measured": ("results", "measurements"),
    "num-samples": ("samples", "n", "num-return-sequences"),
    "out": ("output", "output-dir", "output-path", "out-dir", "save-path", "save-dir"),
    "patience": ("early-stopping-patience", "early-stopping", "early-stop"),
    "prompt": ("text", "input", "start"),
    "quantize": ("quantization", "load-in-4bit", "4bit", "bits", "qlora"),
    "quiet": ("q", "silent", "no-progress", "disable-tqdm", "no-progress-bar"),
    "quick": ("fast", "small", "tiny", "test"),
    "r": ("rank", "lora-r", "lora-rank"),
    "rank-pattern": ("rank-patterns", "ranks"),
    "resume": ("continue", "resume-from-checkpoint"),
    "rslora": ("use-rslora", "rs-lora"),
    "say": ("message", "once"),
    "schedule": ("lr-scheduler-type", "lr-scheduler", "lr-schedule", "scheduler", "lr-decay-style"),
    "save-every": ("save-steps", "save-interval", "checkpoint-every"),
    "seed": ("random-seed", "random-state"),
    "steps": (
        "epochs",
        "num-epochs",
        "num-train-epochs",
        "max-steps",
        "iters",
        "iterations",
        "max-iters",
        "num-steps",
    ),
    "stop": ("stop-sequence", "stop-sequences", "stop-word"),
    "system": ("system-prompt", "system-message"),
    "target": ("target-modules", "lora-target-modules", "targets", "modules", "lora-layers"),
    "target-regex": ("target-regexp", "target-pattern", "target-expression", "modules-regex"),
    "temperature": ("temp",),
    "threads": ("num-threads", "n-threads"),
    "top-k": ("topk",),
    "top-p": ("topp", "nucleus"),
    "to": ("version", "receipt", "digest"),
    "tuned": ("finetuned", "fine-tuned", "finetuned-model", "tuned-model", "target-model"),
    "verify": ("check", "checksum", "sha256", "integrity"),
    "warmup": ("warmup-steps", "num-warmup-steps", "warmup-ratio", "lr-warmup-steps"),
    "weight-decay": ("decay", "wd", "l2"),
    "weights": ("scales", "coefficients", "adapter-weights", "ratios"),
    "workers": ("num-workers", "n-workers", "num-processes", "nproc-per-node", "processes", "jobs"),
}


# {a dtype: what it is called for short}
_SHORT_DTYPES = {
    "float16": ("fp16", "f16", "half"),
    "bfloat16": ("bf16",),
    "float32": ("fp32", "f32", "float", "single"),
    "float64": ("fp64", "f64", "double"),
}


class CommandParser(argparse.ArgumentParser):
    """The arguments of a command. An error ends the program with one line and exit code 2."""

    def __init__(self, name, summary, epilog):
        # {flag: what argparse knows of it}. Before super(): that adds --help.
        self.actions_of = {}
        # In front of each error: the file that the arguments stand in.
        self.where = ""
        super().__init__(
            prog=f"minilora {name}",
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        # Before Python 3.14 -0.3 is a number, and -1e-3 is taken for a flag.
        self._negative_number_matcher = re.compile(r"-\.?\d")

    def add_argument(self, *names, **options):
        """As argparse's; the names of the flags are noted."""
        return self._note(names, super().add_argument(*names, **options))

    def group(self, title, description):
        """What adds arguments as `add_argument` does, in a place of their own in the help."""
        of_group = self.add_argument_group(title, description)

        def add(*names, **options):
            return self._note(names, of_group.add_argument(*names, **options))

        return add

    def _note(self, names, action):
        for name in names:
            if name.startswith("-"):
                self.actions_of[name] = action
        return action

    flags = property(lambda self: list(self.actions_of))

    def parse_args(self, argv):
        """The arguments as attributes. Raises: SystemExit after --help, or if one is wrong."""
        # Before argparse, which would complain that the flag is missing that was misspelt here.
        flag = self._unknown_flag(argv)
        if flag is not None:
            self.error(f"there is no {flag}{self._suggestion(flag)}")
        return super().parse_args(argv)

    def print_help(self, file=None):
        """Print the help. argparse's own does not say so where it cannot be written."""
        log(self.format_help().rstrip())

    def error(self, message):
        """End the program with one line that names this command's help. Raises: SystemExit(2)."""
        text = visible(self.where + one_line(message))
        see = " See" if text.endswith("?") else "; see"
        self.exit(2, f"{self.prog}: {text}{see} {self.prog} --help\n")

    def has_flag(self, word):
        """Is `word`, `--seed` or `--seed=3`, a flag of this command, or the beginning of one?"""
        flag = word.partition("=")[0]
        if flag in self.flags:
            return True
        completed = [ours for ours in self.flags if ours.startswith(flag)]
        meant = [ours for ours in self.flags if flag[2:] in FLAG_SYNONYMS.get(ours[2:], ())]
        # --rank is what others call --r, and not short for --rank-pattern.
        return bool(completed) and set(meant) <= set(completed)

    def _unknown_flag(self, argv):
        """The first word that is a flag and none of ours, or None."""
        for word in argv:
            if word == "--":
                return None
            # As argparse has it, a word with a space in it is a text that begins with a dash.
            looks_like_flag = re.match("--?[A-Za-z]", word) and " " not in word
            if looks_like_flag and not self.has_flag(word):
                return word.partition("=")[0]
        return None

    def nearest_flag(self, flag, besides=()):
        """The flag of this command that `flag` most likely means, or None.

        Those with the names `besides` are not meant.
        """
        names = [ours.removeprefix("--") for ours in self.flags if ours.startswith("--")]
        names = [name for name in names if name not in besides]
        name = nearest(flag, names, FLAG_SYNONYMS)
        return None if name is None else f"--{name}"

    def _suggestion(self, flag):
        meant = self.nearest_flag(flag)
        return "" if meant is None else f": did you mean {meant}?"


def nearest(word, names, synonyms):
    """Which of `names` is most likely meant by `word`, or None.

    `synonyms` is {name: (other words for it, ...)}.
    """
    word = word.lstrip("-").lower().replace("_", "-")
    if word in names:
        return word
    for name in names:
        if word in synonyms.get(name, ()):
            return name
    for name in names:
        if word and name.startswith(word):
            return name
    close = difflib.get_close_matches(word, names, n=1)
    return close[0] if close else None


class Names(argparse.Action):
    """Names apart by spaces, by commas, or after a flag given twice: all are put into one list."""

    def __call__(self, parser, namespace, values, option_string=None):
        # `a, b` without quotes is two words, of which the first ends with a comma.
        names = [name for value in values for name in re.split(r"[,\s]+", value) if name]
        if not names:
            raise argparse.ArgumentError(self, f"there is no name in {' '.join(values)!r}")
        earlier = getattr(namespace, self.dest) or []
        setattr(namespace, self.dest, [*earlier, *names])


class Assignments(argparse.Action):
    """NAME=VALUE, several or after a flag given twice: all are put into one {NAME: VALUE}."""

    def __call__(self, parser, namespace, values, option_string=None):
        earlier = getattr(namespace, self.dest) or {}
        for name, value in values:
            if name in earlier:
                raise argparse.ArgumentError(self, f"{name!r} is given twice")
            earlier = {**earlier, name: value}
        setattr(namespace, self.dest, earlier)


def assignment(read):
    """The type of an argument: NAME=VALUE as (NAME, VALUE), an expression and what `read` reads."""

    def read_both(text):
        name, equals, value = text.rpartition("=")
        if not equals or not name:
            raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
        return expression(name), read(value)

    return read_both


def expression(text):
    """The type of an argument: a regular expression."""
    from ..patterns import problem_of

    if not text:
        raise argparse.ArgumentTypeError("must be a regular expression, got ''")
    problem = problem_of([text])
    if problem is not None:
        raise argparse.ArgumentTypeError(problem)
    return text


def whole_number(least):
    """The type of an argument: a whole number of at least `least`."""

    def read(text):
        if text.isdecimal() and int(text) >= least:
            return int(text)
        raise argparse.ArgumentTypeError(
            f"must be a whole number of at least {least}, got {text!r}"
        )

    return read


def number_or_mpi(text):
    """The type of an argument: a whole number of at least 1, or the word mpi."""
    if text == "mpi":
        return text
    if text.isdecimal() and int(text) >= 1:
        return int(text)
    raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, or mpi, got {text!r}")


def dtype_name(text):
    """The type of an argument: a dtype, whose short name becomes the long one: bf16 is bfloat16.

    What is neither stays as it is, for `choices` to refuse.
    """
    word = text.lower()
    for name, short_names in _SHORT_DTYPES.items():
        if word == name or word in short_names:
            return name
    return text


def positive_number(text):
    """The type of an argument: a finite number above 0."""
    value = _real_number(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be a finite positive number, got {text!r}")
    return value


def number_from_zero(text):
    """The type of an argument: a finite number of at least 0."""
    value = _real_number(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"must be a finite number of at least 0, got {text!r}")
    return value


def share_below_one(text):
    """The type of an argument: a number in [0, 1)."""
    value = _real_number(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1), got {text!r}")
    return value


def share_above_zero(text):
    """The type of an argument: a number in (0, 1]."""
    value = _real_number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be in (0, 1], got {text!r}")
    return value


def real_number(text):
    """The type of an argument: a finite number."""
    value = _real_number(text)
    if math.isnan(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text!r}")
    return value


def _real_number(text):
    """The finite number that `text` is, nan if it is none: no comparison holds for nan."""
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan
