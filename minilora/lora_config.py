"""What to adapt and how strongly, and which names that means. Knows names, not arrays."""

import math
import re
import sys
from dataclasses import dataclass, field

import numpy as np

from .patterns import Matcher, check_expressions, problem_of


class ConfigError(ValueError):
    """A field of a configuration has a value that makes no sense.

    `field` is its name, `need` what it must be: who calls the field by another name can say so.
    """

    def __init__(self, config, field, need, value):
        super().__init__(f"{type(config).__name__}: {field} must be {need}; got {value!r}")
        self.field = field
        self.need = need


@dataclass(frozen=True)
class LoRAConfig:
    """The recipe by which an adapter is made, and the record that is saved with it.

    The meanings are PEFT's (which says lora_alpha and lora_dropout).

    r: rank of the update. alpha: its strength (no default: alpha changes what r means).
    target_modules: a list of names or dotted endings, ["q_proj", "mlp.up_proj"]; or one regular
    expression for whole names; or "all-linear". dropout: on the adapter's input, where a generator
    is passed (in training: where `train` is given a seed). use_rslora: scale by alpha / √r, which
    keeps the update's size as r grows. rank_pattern, alpha_pattern: {expression: r or alpha} for
    the modules whose name, or a dotted ending of it, the expression matches; the first that
    matches counts.
    Raises: ConfigError (a ValueError) that names the field, what it must be, and its value.
    Source: Hu et al. 2021, section 4.1; Kalajdzievski 2023 (rsLoRA).

    >>> config = LoRAConfig(r=8, alpha=16, target_modules=["q_proj", "mlp.up_proj"],
    ...                     rank_pattern={"mlp.up_proj": 4})
    >>> config.scaling_of("h.0.attn.q_proj"), config.scaling_of("h.0.mlp.up_proj")
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
            value = getattr(self, name)
            if isinstance(value, np.generic):
                # JSON cannot hold a NumPy number.
                object.__setattr__(self, name, value.item())
        if not _is_rank(self.r):
            self._refuse("r", "a whole number of at least 1")
        if not _is_alpha(self.alpha):
            self._refuse("alpha", "a finite positive number")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            self._refuse("dropout", "in [0, 1)")
        if not isinstance(self.use_rslora, bool):
            self._refuse("use_rslora", "True or False")
        if not _are_targets(self.target_modules):
            self._refuse("target_modules", "at least one name, or an expression")
        self._check_pattern("rank_pattern", _is_rank, "whole number of at least 1")
        self._check_pattern("alpha_pattern", _is_alpha, "finite positive number")

    def _check_pattern(self, name, is_ok, values):
        pattern = getattr(self, name)
        need = f"{{regular expression: {values}}}"
        if not _is_pattern(pattern, is_ok):
            self._refuse(name, need)
        problem = problem_of(pattern)
        if problem is not None:
            self._refuse(name, f"{need}, but {problem}")

    def _refuse(self, name, need):
        raise ConfigError(self, name, need, getattr(self, name))

    def r_of(self, name):
        """r of the module `name`."""
        return _first_match(_matcher("rank_pattern"), self.rank_pattern, name, self.r)

    def alpha_of(self, name):
        """alpha of the module `name`."""
        return _first_match(_matcher("alpha_pattern"), self.alpha_pattern, name, self.alpha)

    def scaling_of(self, name):
        """The factor of the update of `name`: alpha / r, or alpha / √r with use_rslora."""
        r = self.r_of(name)
        return self.alpha_of(name) / (math.sqrt(r) if self.use_rslora else r)


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_rank(value):
    return _is_number(value) and isinstance(value, int) and value >= 1


def _is_alpha(value):
    return _is_number(value) and 0 < value <= sys.float_info.max


def _are_targets(value):
    if isinstance(value, tuple):
        return bool(value) and all(isinstance(name, str) and name for name in value)
    return isinstance(value, str) and value != ""


def _is_pattern(value, is_ok):
    if not isinstance(value, dict):
        return False
    return all(isinstance(key, str) and is_ok(item) for key, item in value.items())


def as_pattern(name):
    """An expression for the module `name`: the name itself where that is safe and so readable."""
    if re.fullmatch(r"[\w.]+", name):
        return name
    return re.escape(name)


def _matcher(field_name):
    """A Matcher for the keys of a pattern: one matches a whole name, or a dotted ending of it."""
    return Matcher(field_name, around=r"(.*\.)?({})$")


def _first_match(matcher, patterns, name, default):
    found = matcher.first(patterns, name)
    return default if found is None else patterns[found[0]]


def _kinds(names):
    """The names for a message, all blocks in one: h.*.attn.q_proj."""
    return ", ".join(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))


def check_speed(config, names):
    """Raise ValueError if rank_pattern or alpha_pattern take too long to match all the names.

    `r_of` and `alpha_of` have a limit for each name alone: whoever asks them of the many names in a
    file asks this first.
    """
    for field_name in ("rank_pattern", "alpha_pattern"):
        matcher = _matcher(field_name)
        for name in names:
            matcher.first(getattr(config, field_name), name)


def check_patterns(config, names):
    """Raise ValueError if a key of rank_pattern or alpha_pattern matches none of the names."""
    for field_name in ("rank_pattern", "alpha_pattern"):
        unmatched = []
        matcher = _matcher(field_name)
        for expression in getattr(config, field_name):
            if not any(matcher.first([expression], name) for name in names):
                unmatched.append(expression)
        if unmatched:
            raise ValueError(
                f"{field_name} {unmatched} match none of the adapted modules: {_kinds(names)}"
            )


def find_targets(names, target_modules):
    """Those of the Linear layers `names` that `target_modules` selects, in their order.

    Raises: ValueError that lists what exists, if any of the patterns matches nothing.
    Source: the matching rules of PEFT's LoraConfig.
    """
    if target_modules == "all-linear":
        matches = {"all-linear": names}
    elif isinstance(target_modules, str):
        matches = {target_modules: whole_matches("target_modules", target_modules, names)}
    else:
        matches = {ending: _with_ending(names, ending) for ending in target_modules}
    unmatched = [pattern for pattern, matched in matches.items() if not matched]
    if unmatched:
        hint = ""
        if isinstance(target_modules, str):
            hint = " (a string is a regex for whole names; a list holds endings)"
        raise ValueError(
            f"target_modules {unmatched} match no Linear layer{hint}. There are: {_kinds(names)}"
        )
    chosen = {name for matched in matches.values() for name in matched}
    return [name for name in names if name in chosen]


def whole_matches(field_name, expression, names):
    """Those of the names that the `expression` in the field called `field_name` matches whole.

    Raises: ValueError that names both if it is no expression, or takes too long.
    """
    check_expressions(field_name, [expression])
    matcher = Matcher(field_name)
    return [name for name in names if matcher.first([expression], name)]


def _with_ending(names, ending):
    return [name for name in names if name == ending or name.endswith(f".{ending}")]
