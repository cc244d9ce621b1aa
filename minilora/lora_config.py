"""What to adapt, and how strongly: LoRAConfig, and the rules by which names are matched. Knows names, not arrays."""

import math
import re
import sys
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class LoRAConfig:
    """What to adapt, and how strongly. The meanings are PEFT's (which says lora_alpha and lora_dropout).

    r: rank of the update. alpha: its strength (no default: alpha changes what r means).
    target_modules: a list of names or dotted endings, ["q_proj", "mlp.up_proj"]; or one regular expression that
    matches whole names; or "all-linear". dropout: on the adapter's input, while training. use_rslora: scale by
    alpha / √r, which keeps the update's size as r grows. rank_pattern, alpha_pattern: {expression: r or alpha} for the
    modules whose name, or a dotted ending of it, the expression matches; the first that matches counts.
    Shapes: none. Raises: ValueError that names the field, what it must be, and its value.
    Source: Hu et al. 2021, section 4.1; Kalajdzievski 2023 (rsLoRA).

    >>> config = LoRAConfig(r=8, alpha=16, target_modules=["q_proj", "mlp.up_proj"], rank_pattern={"mlp.up_proj": 4})
    >>> config.scaling("h.0.attn.q_proj"), config.scaling("h.0.mlp.up_proj")
    (2.0, 4.0)
    """

    r: int
    alpha: float
    target_modules: tuple | str
    dropout: float = 0.0
    use_rslora: bool = False
    rank_pattern: dict = field(default_factory=dict)
    alpha_pattern: dict = field(default_factory=dict)

    def __post_init__(self):
        if isinstance(self.target_modules, (list, set)):
            object.__setattr__(self, "target_modules", tuple(self.target_modules))
        for name in ("r", "alpha", "dropout"):
            if isinstance(getattr(self, name), np.generic):  # a NumPy number could not be saved as JSON
                object.__setattr__(self, name, getattr(self, name).item())
        names = self.target_modules
        number = lambda x: isinstance(x, (int, float)) and not isinstance(x, bool)
        rank = lambda x: number(x) and isinstance(x, int) and x >= 1
        strength = lambda x: number(x) and 0 < x <= sys.float_info.max
        patterns = lambda p, ok: isinstance(p, dict) and all(is_expression(k) and ok(v) for k, v in p.items())
        for name, ok, need in (
            ("r", rank(self.r), "a whole number of at least 1"),
            ("alpha", strength(self.alpha), "a finite positive number"),
            ("dropout", number(self.dropout) and 0 <= self.dropout < 1, "in [0, 1)"),
            ("use_rslora", isinstance(self.use_rslora, bool), "True or False"),
            ("target_modules", names and (isinstance(names, str) or isinstance(names, tuple)
             and all(t and isinstance(t, str) for t in names)), "at least one name, or an expression"),
            ("rank_pattern", patterns(self.rank_pattern, rank), "{regular expression: whole number of at least 1}"),
            ("alpha_pattern", patterns(self.alpha_pattern, strength), "{regular expression: finite positive number}"),
        ):
            if not ok:
                raise ValueError(f"LoRAConfig: {name} must be {need}; got {getattr(self, name)!r}")

    def rank(self, name):
        """r of the module `name`."""
        return _first_match(self.rank_pattern, name, self.r)

    def strength(self, name):
        """alpha of the module `name`."""
        return _first_match(self.alpha_pattern, name, self.alpha)

    def scaling(self, name):
        """What the update of the module `name` is multiplied by: alpha / r, or alpha / √r with use_rslora."""
        r = self.rank(name)
        return self.strength(name) / (math.sqrt(r) if self.use_rslora else r)


def is_expression(text):
    """Is `text` a regular expression?"""
    try:
        return isinstance(text, str) and bool(re.compile(text))
    except re.error:
        return False


def _first_match(patterns, name, default):
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def _kinds(names):
    """The names, for a message, with one for all blocks: h.*.attn.q_proj."""
    return ", ".join(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))


def check_patterns(config, names):
    """Raise ValueError if a key of rank_pattern or alpha_pattern matches none of the adapted modules `names`."""
    for kind in ("rank_pattern", "alpha_pattern"):
        idle = [key for key in getattr(config, kind) if not any(_first_match({key: True}, n, False) for n in names)]
        if idle:
            raise ValueError(f"{kind} {idle} match none of the adapted modules: {_kinds(names)}")


def find_targets(names, target_modules):
    """Those of the Linear layers `names` that `target_modules` selects, in their order.

    Raises: ValueError that lists what exists, if any of the patterns matches nothing.
    Source: the matching rules of PEFT's LoraConfig.
    """
    if target_modules == "all-linear":
        matched = {"all-linear": names}
    elif isinstance(target_modules, str):
        try:
            matched = {target_modules: [name for name in names if re.fullmatch(target_modules, name)]}
        except re.error as error:
            raise ValueError(f"target_modules {target_modules!r} is not a regular expression: {error}") from None
    else:
        matched = {t: [n for n in names if n == t or n.endswith(f".{t}")] for t in target_modules}
    unmatched = [pattern for pattern, found in matched.items() if not found]
    if unmatched:
        hint = " (a string is a regex for whole names; a list holds endings)" * isinstance(target_modules, str)
        raise ValueError(f"target_modules {unmatched} match no Linear layer{hint}. There are: {_kinds(names)}")
    chosen = {name for found in matched.values() for name in found}
    return [name for name in names if name in chosen]
