"""What to fine-tune, on what, and how: the settings of a run, checked. Opens no file."""

import math
from dataclasses import dataclass, field

from ..fits import ACCEPTABLE
from ..lora_config import ConfigError, LoRAConfig
from ..optim import SCHEDULES
from ..quant import KINDS
from .text_files import TOO_LONG

# What a base may be packed as.
QUANTIZATIONS = tuple(kind.lower() for kind in KINDS)
# What an adapter brings along that a run goes on from.
OF_SHAPE = ("alpha", "r", "target", "dora", "rslora", "rank_pattern", "alpha_pattern")
# What is of adapters.
OF_ADAPTERS = (*OF_SHAPE, "dropout", "quantize", "from_adapter", "keep")
# By default the learning rate warms up for a tenth of the steps, and for no more than so many.
LONGEST_WARMUP = 100
# A checkpoint has the loss and the norm of each step, and what was measured after it: up to 133
# bytes in the header of its tensors, of which safetensors writes no more than 100 million bytes.
MOST_STEPS = 500_000


@dataclass(frozen=True, kw_only=True)
class FineTuneConfig:
    """What to fine-tune, on what, and how.

    base: what `find_base` takes: a folder, a .gguf file, or smollm2. data: a .txt file, or .jsonl
    with a row on each line: a prompt and an answer, an instruction and an output, messages, or a
    text. out: the folder for the adapter. alpha (which has no default), r, target, dropout, rslora,
    rank_pattern, alpha_pattern: those of LoRAConfig. dora: learn a magnitude for each row as well.
    from_adapter: the folder of an adapter to go on from; r, alpha and all else that makes its shape
    are then its own, and keep their defaults here. accept_base: what may differ between its base
    and this one, as for `load_adapter`. full: train every weight of a copy of the base
    instead, and write a model.

    lr: the peak of the learning rate. schedule: how it falls after that, "cosine", "linear" or not
    at all, "constant". warmup: the steps of its rise (None: a tenth of the steps, at most 100).
    weight_decay: that of Adam. clip: the norm to which gradients are shortened. steps: how many, at
    most 500,000, of `accumulate` batches of `batch` rows each. seed: of everything random.
    eval_split: the share that is held out to measure the loss on. length: tokens in a window of a
    text (None: 256, or the model's context if that is shorter). save_every: steps between two
    checkpoints. quantize: what the base's linear weights are packed as once it is loaded, "nf4", or
    None: as they are stored. too_long: what becomes of rows longer than the context: "cut" at their
    ends, "drop" left out, None refused. eval_every: steps between two measurements of the held-out
    loss, of which the best decides what is kept (None: before and after, and the last step is
    kept). patience: after how many measurements without improvement the run ends (None: never
    before `steps`). log_file: a .jsonl for a line on each step. keep: how many older versions of
    the adapter in `out` are kept (None: there must be none).
    Raises: ConfigError (a ValueError) that names the field, what it must be, and its value.
    """

    base: str
    data: str
    out: str
    alpha: float | None = None
    r: int = 8
    target: tuple | str = "all-linear"
    lr: float = 5e-4
    schedule: str = "cosine"
    warmup: int | None = None
    weight_decay: float = 0.0
    clip: float = 1.0
    steps: int = 200
    batch: int = 4
    accumulate: int = 1
    seed: int = 0
    eval_split: float = 0.0
    length: int | None = None
    dropout: float = 0.0
    dora: bool = False
    rslora: bool = False
    rank_pattern: dict = field(default_factory=dict)
    alpha_pattern: dict = field(default_factory=dict)
    from_adapter: str | None = None
    accept_base: tuple = ()
    save_every: int = 50
    quantize: str | None = None
    too_long: str | None = None
    eval_every: int | None = None
    patience: int | None = None
    full: bool = False
    log_file: str | None = None
    keep: int | None = None

    def __post_init__(self):
        if not _is_whole(self.steps, 1) or self.steps > MOST_STEPS:
            self._refuse("steps", f"a whole number from 1 to {MOST_STEPS:,}")
        for name in ("batch", "accumulate", "save_every"):
            if not _is_whole(getattr(self, name), 1):
                self._refuse(name, "a whole number of at least 1")
        if not _is_whole(self.seed, 0):
            self._refuse("seed", "a whole number of at least 0")
        for name in ("length", "eval_every", "patience", "keep"):
            value = getattr(self, name)
            if value is not None and not _is_whole(value, 1):
                self._refuse(name, "a whole number of at least 1, or None")
        if self.quantize not in (None, *QUANTIZATIONS):
            self._refuse("quantize", f"None or one of {', '.join(QUANTIZATIONS)}")
        if self.too_long not in (None, *TOO_LONG):
            self._refuse("too_long", f"{' or '.join(map(repr, TOO_LONG))}, or None")
        self._check_rate()
        self._check_accepted()
        if not _is_finite(self.eval_split) or not 0 <= self.eval_split < 1:
            self._refuse("eval_split", "in [0, 1)")
        if self.eval_every is not None and not self.eval_split:
            self._refuse("eval_every", "None with an eval_split of 0, which holds nothing out")
        if self.patience is not None and self.eval_every is None:
            self._refuse("patience", "None without eval_every, whose evaluations it counts")
        for name in ("dora", "rslora", "full"):
            if type(getattr(self, name)) is not bool:
                self._refuse(name, "True or False")
        if self.full:
            self._check_defaults(OF_ADAPTERS, "full=True: it is of adapters")
        elif self.from_adapter is not None:
            self._check_defaults(OF_SHAPE, "from_adapter, which brings its own")
        self._check_lora()

    def _check_rate(self):
        """Refuse what no learning rate can be, and what no gradient can be shortened to."""
        for name in ("lr", "clip"):
            value = getattr(self, name)
            if not _is_finite(value) or value <= 0:
                self._refuse(name, "a finite positive number")
        if not isinstance(self.schedule, str) or self.schedule not in SCHEDULES:
            self._refuse("schedule", f"one of {', '.join(SCHEDULES)}")
        if self.warmup is not None and not _is_whole(self.warmup, 0):
            self._refuse("warmup", "a whole number of at least 0, or None")
        if self.warmup is not None and self.warmup > self.steps:
            self._refuse("warmup", f"at most {self.steps}, the number of steps")
        if not _is_finite(self.weight_decay) or self.weight_decay < 0:
            self._refuse("weight_decay", "a finite number of at least 0")

    def _check_accepted(self):
        """Refuse what no base may differ in, and differences where there is nothing to compare."""
        accepted = self.accept_base
        if not isinstance(accepted, (list, tuple)) or not set(accepted) <= set(ACCEPTABLE):
            self._refuse("accept_base", f"a list of {' and '.join(ACCEPTABLE)}, or empty")
        if accepted and self.from_adapter is None:
            self._refuse("accept_base", "empty without from_adapter, whose base it is about")

    def _check_defaults(self, names, why):
        """What a run has no use for keeps its default."""
        for name in names:
            # A pattern has no default in the class, but one made anew for each run.
            expected = getattr(FineTuneConfig, name, {})
            if getattr(self, name) != expected:
                self._refuse(name, f"{expected!r}, its default, with {why}")

    def _check_lora(self):
        """Refuse what LoRAConfig refuses, by our names."""
        if self.full:
            return
        # What stands in the place of an adapter's own is none of this run's.
        alpha = 1.0 if self.from_adapter is not None else self.alpha
        ours = {"target_modules": "target", "use_rslora": "rslora"}
        try:
            self._lora_config(alpha)
        except ConfigError as error:
            self._refuse(ours.get(error.field, error.field), error.need)

    def _refuse(self, field, need):
        raise ConfigError(self, field, need, getattr(self, field)) from None

    def idle(self):
        """The names of the fields that such a run has no use for; they have their defaults."""
        if self.full:
            return OF_ADAPTERS
        if self.from_adapter is not None:
            return OF_SHAPE
        return ()

    def rate(self, step):
        """The learning rate at `step` (0, 1, ...)."""
        warmup = self.warmup
        if warmup is None:
            warmup = min(LONGEST_WARMUP, self.steps // 10)
        return SCHEDULES[self.schedule](step, self.steps, self.lr, warmup)

    def lora_config(self):
        """The LoRAConfig of the adapter that such a run makes."""
        return self._lora_config(self.alpha)

    def _lora_config(self, alpha):
        return LoRAConfig(
            self.r,
            alpha,
            self.target,
            self.dropout,
            self.rslora,
            self.rank_pattern,
            self.alpha_pattern,
        )


def _is_whole(value, least):
    return type(value) is int and value >= least


def _is_finite(value):
    return type(value) in (int, float) and math.isfinite(value)
