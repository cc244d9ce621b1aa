"""What to fine-tune, on what, and how: the settings of a run, checked. Opens no file."""

import math
from dataclasses import dataclass

from ..lora_config import ConfigError, LoRAConfig
from ..quant import KINDS
from .text_files import TOO_LONG

# What a base may be packed as.
QUANTIZATIONS = tuple(kind.lower() for kind in KINDS)


@dataclass(frozen=True, kw_only=True)
class FineTuneConfig:
    """What to fine-tune, on what, and how.

    base: what `find_base` takes: a folder, a .gguf file, or smollm2. data: a .txt file, or .jsonl
    with a row on each line: a prompt and an answer, an instruction and an output, messages, or a
    text. out: the folder for the adapter. alpha (which has no default), r, target, dropout: those
    of LoRAConfig. dora: learn a magnitude for each row as well. full: train every weight of a copy
    of the base instead, and write a model. lr: the peak of the learning rate, after a warm-up and
    before a cosine. steps: how many, of `accumulate` batches of `batch` rows each. seed: of
    everything random. eval_split: the share that is held out to measure the loss on. length: tokens
    in a window of a text (None: 256, or the model's context if that is shorter). save_every: steps
    between two checkpoints. quantize: what the base's linear weights are packed as once it is
    loaded, "nf4", or None: as they are stored. too_long: what becomes of rows longer than the
    context: "cut" at their ends, "drop" left out, None refused. eval_every: steps between two
    measurements of the held-out loss, of which the best decides what is kept (None: before and
    after, and the last step is kept). patience: after how many measurements without improvement the
    run ends (None: never before `steps`). log_file: a .jsonl for a line on each step.
    Raises: ConfigError (a ValueError) that names the field, what it must be, and its value.
    """

    base: str
    data: str
    out: str
    alpha: float | None = None
    r: int = 8
    target: tuple | str = "all-linear"
    lr: float = 5e-4
    steps: int = 200
    batch: int = 4
    accumulate: int = 1
    seed: int = 0
    eval_split: float = 0.0
    length: int | None = None
    dropout: float = 0.0
    dora: bool = False
    save_every: int = 50
    quantize: str | None = None
    too_long: str | None = None
    eval_every: int | None = None
    patience: int | None = None
    full: bool = False
    log_file: str | None = None

    def __post_init__(self):
        for field in ("steps", "batch", "accumulate", "save_every"):
            if not _is_whole(getattr(self, field), 1):
                self._refuse(field, "a whole number of at least 1")
        if not _is_whole(self.seed, 0):
            self._refuse("seed", "a whole number of at least 0")
        for field in ("length", "eval_every", "patience"):
            value = getattr(self, field)
            if value is not None and not _is_whole(value, 1):
                self._refuse(field, "a whole number of at least 1, or None")
        if self.quantize not in (None, *QUANTIZATIONS):
            self._refuse("quantize", f"None or one of {', '.join(QUANTIZATIONS)}")
        if self.too_long not in (None, *TOO_LONG):
            self._refuse("too_long", f"{' or '.join(map(repr, TOO_LONG))}, or None")
        if not _is_finite(self.lr) or self.lr <= 0:
            self._refuse("lr", "a finite positive number")
        if not _is_finite(self.eval_split) or not 0 <= self.eval_split < 1:
            self._refuse("eval_split", "in [0, 1)")
        if self.eval_every is not None and not self.eval_split:
            self._refuse("eval_every", "None with an eval_split of 0, which holds nothing out")
        if self.patience is not None and self.eval_every is None:
            self._refuse("patience", "None without eval_every, whose evaluations it counts")
        for field in ("dora", "full"):
            if type(getattr(self, field)) is not bool:
                self._refuse(field, "True or False")
        if self.full:
            self._check_full()
            return
        try:
            self.lora_config()
        except ConfigError as error:
            # LoRAConfig calls the target its target_modules.
            self._refuse(error.field.removesuffix("_modules"), error.need)

    def _check_full(self):
        """Full fine-tuning has no adapter that something could be said of, and no packed weight."""
        for field in ("alpha", "r", "target", "dropout", "dora", "quantize"):
            default = getattr(type(self), field)
            if getattr(self, field) != default:
                self._refuse(field, f"{default!r}, its default, with full=True: it is of adapters")

    def _refuse(self, field, need):
        raise ConfigError(self, field, need, getattr(self, field)) from None

    def lora_config(self):
        """The LoRAConfig of r, alpha, target and dropout."""
        return LoRAConfig(self.r, self.alpha, self.target, self.dropout)


def _is_whole(value, least):
    return type(value) is int and value >= least


def _is_finite(value):
    return type(value) in (int, float) and math.isfinite(value)
