"""What the claims of five tutorials come to: values, readings, a verdict. Knows no page.

A claim has values, {name: expression}, and readings: the ways in which its sentence can be meant,
or the parts it has. A reading is an expression that is true or false, or a test that shows the one
or the other. The verdict follows from the readings alone. An expression is Python over the names of
`quantities.py`, the values above it, and what is defined here.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import quantities

EXAMPLES = Path(__file__).resolve().parent.parent
RESULTS = EXAMPLES / "results"
FILE = EXAMPLES / "claims.json"
# In the order in which the page counts them.
VERDICTS = ("true", "false", "imprecise", "not checkable")
PENDING = "not measured yet"
# What a unit after a number means.
UNITS = {"K": 1e3, "k": 1e3, "M": 1e6, "B": 1e9, "million": 1e6, "billion": 1e9, "trillion": 1e12,
         "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}  # fmt: skip


class NotMeasured(Exception):
    """A lab has no results yet. `lab` is its name."""

    def __init__(self, lab):
        super().__init__(f"examples/results/{lab}.json is not there")
        self.lab = lab


class Outcome(NamedTuple):
    """What a claim comes to.

    values: {name: a number, or one for each seed}. held: for each reading True, False, or None if
    it holds for some seeds only. text: the sentence with its numbers. waits: the labs that are
    missing; then there is no more than this.
    """

    verdict: str
    text: str
    values: dict
    held: list
    waits: list


def load():
    """What the file says: the tutorials, the claims, the answers to the quick checks."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def outcome(claim, results=RESULTS):
    """The Outcome of a claim, by the results of labs in the folder `results`."""
    try:
        names = _namespace(results)
        for name, expression in claim.get("values", {}).items():
            names[name] = evaluate(expression, names)
        held = [_holds(reading, names) for reading in claim.get("readings", [])]
    except NotMeasured as missing:
        return Outcome(PENDING, PENDING, {}, [], [missing.lab])
    values = {name: names[name] for name in claim.get("values", {})}
    shown = {name: Shown(value) for name, value in values.items()}
    return Outcome(verdict_of(held), claim["text"].format(**shown), values, held, [])


def verdict_of(held):
    """The verdict: what holds in every reading is true, in none false, in some imprecise."""
    if not held:
        return "not checkable"
    if all(each is True for each in held):
        return "true"
    if all(each is False for each in held):
        return "false"
    return "imprecise"


def evaluate(expression, names):
    """The value of an expression of claims.json, where `names` are all that it knows."""
    return eval(expression, {"__builtins__": {}}, names)


def _namespace(results):
    names = {name: getattr(quantities, name) for name in quantities.__all__}
    names |= {each.__name__: each for each in (quoted, equals, about, within, min, max, abs)}
    names["lab"] = lambda *path: lab(results, *path)
    names["kept"] = lambda file, pattern: kept(results, file, pattern)
    return names


def _holds(reading, names):
    """True, False, or None where some seeds say the one and some the other."""
    if isinstance(reading, dict):
        return reading["holds"]
    of_each = np.atleast_1d(evaluate(reading, names)).astype(bool)
    if of_each.all():
        return True
    return None if of_each.any() else False


# What a tutorial printed.

NUMBER = re.compile(r"(?P<digits>\d[\d,]*(?:\.\d+)?)(?:e\+?(?P<power>\d+))?\s*(?P<unit>[A-Za-z]*)")


def _read(text):
    """[(number, half of its last digit's place)] of what stands in a text, in the text's unit."""
    found = list(NUMBER.finditer(text))
    if not found:
        raise ValueError(f"claims.json: no number in {text!r}")
    # "60-70 GB": the unit of the last number is that of both.
    scale = UNITS.get(found[-1]["unit"], 1)
    numbers = []
    for match in found:
        digits = match["digits"].replace(",", "")
        size = scale * 10.0 ** int(match["power"] or 0)
        places = len(digits.partition(".")[2])
        numbers.append((float(digits) * size, 0.5 * size / 10**places))
    return numbers


def quoted(text):
    """The number that stands in a text: quoted("84 GB") is 84e9."""
    return _read(text)[0][0]


def equals(value, text):
    """Is `value`, rounded to the digits that are printed, the number in the text?"""
    number, half = _read(text)[0]
    # A tie may have been rounded either way.
    return abs(value - number) <= half * (1 + 1e-9)


def about(value, text):
    """Is `value` within a tenth of the number in the text?"""
    number, _ = _read(text)[0]
    return abs(value - number) <= 0.1 * number


def within(value, text):
    """Does `value` lie between the two numbers in the text?"""
    numbers = _read(text)
    low = numbers[0][0]
    high = numbers[1][0]
    return (low <= value) & (value <= high)


# What the labs measured.


def lab(results, name, *path):
    """A value in the results of a lab: by the name of a row and a key, or by a key of the whole.

    A list, a number for each seed, becomes an array.
    Raises: NotMeasured if there are no results; ValueError if a range has fewer than three seeds,
    or the run was a quick one; KeyError if nothing has such a name.
    """
    file = results / f"{name}.json"
    if not file.exists():
        raise NotMeasured(name)
    kept = json.loads(file.read_text(encoding="utf-8"))
    if kept.get("quick"):
        raise ValueError(f"{file.name}: a quick run shows that it runs, and measures nothing")
    # A row has its name in the first column.
    label = next(iter(kept["columns"]))
    value = {**kept, **{row[label]: row for row in kept["rows"]}}
    for key in path:
        value = value[key]
    if not isinstance(value, list):
        return value
    if len(value) != len(kept["seeds"]) or len(value) < 3:
        raise ValueError(
            f"{file.name}: {path} has {len(value)} numbers and the run {len(kept['seeds'])} "
            "seeds; a range needs three seeds, and a number for each"
        )
    return np.array(value, float)


def kept(results, file, pattern):
    """The number that a pattern finds in a transcript that is kept."""
    text = (results / file).read_text(encoding="utf-8")
    match = re.search(pattern, text)
    if not match:
        raise ValueError(f"{file}: nothing like {pattern!r}")
    return float(match[1].replace(",", ""))


class Shown:
    """A number for a sentence, or the range of one for each seed: format(x, ".0f GB") is "112 GB".

    What follows the first space is the unit; it scales the number where it is one of UNITS.
    """

    def __init__(self, value):
        self.numbers = np.atleast_1d(value)

    def __format__(self, spec):
        form, _, unit = spec.partition(" ")
        scale = UNITS.get(unit, 1)
        low = format(float(np.min(self.numbers)) / scale, form)
        high = format(float(np.max(self.numbers)) / scale, form)
        shown = low if low == high else f"{low} to {high}"
        return f"{shown} {unit}".rstrip()
