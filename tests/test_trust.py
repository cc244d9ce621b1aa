"""The figures in examples/trust.md are those that the fuzzer, the flips and the kills have left."""

import json
import re
from pathlib import Path

import flips
import fuzz
import kills
import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "examples" / "trust.md").read_text(encoding="utf-8")
KEPT = json.loads((ROOT / "examples" / "results" / "trust.json").read_text(encoding="utf-8"))
COUNTED = ("cases", "refused", "harmless", "traceback", "abort", "hang", "memory", "left behind", "escape", "talk",
           "unnamed")  # fmt: skip


def row(*cells):
    return f"| {' | '.join(cells)} |"


def of_fuzz():
    """A line for each kind of case, and one for all."""
    kinds = KEPT["fuzz"]["kinds"]
    rows = [row(kind, *(f"{counts[name]:,}" for name in COUNTED)) for kind, counts in kinds.items()]
    return [*rows, row("all", *(f"{sum(counts[name] for counts in kinds.values()):,}" for name in COUNTED))]


def of_flips():
    """A line for each file."""
    return [row(f"`{name}`", *(f"{counts[what]:,}" for what in ("step", "flips", "refused", "harmless", "silent")))
            for name, counts in KEPT["flips"].items()]  # fmt: skip


def of_kills():
    """A line for each command."""
    return [row(name, *(f"{counts[what]:,}" for what in ("step", *kills.SORTS)))
            for name, counts in KEPT["kills"].items()]  # fmt: skip


TABLES = {"| spoilt |": of_fuzz, "| file |": of_flips, "| killed |": of_kills}


def rows_of(page, begin):
    """(where the rows of a table begin in the page, where they end)."""
    start = page.index("\n", page.index("\n", page.index(begin)) + 1) + 1
    return start, page.index("\n\n", start)


@pytest.mark.parametrize("begin", TABLES)
def test_a_table_is_made_from_the_results(begin):
    start, stop = rows_of(PAGE, begin)
    assert PAGE[start:stop].splitlines() == TABLES[begin](), "python tests/test_trust.py writes it anew"


def test_all_of_it_was_tried_and_nothing_was_found():
    assert set(KEPT["fuzz"]["kinds"]) == set(fuzz.KINDS)
    harm = [name for name in KEPT["fuzz"]["findings"] if not name.startswith(("talk", "unnamed"))]
    assert harm == []
    assert set(KEPT["kills"]) == set(kills.SCENARIOS) and not any(counts["wrong"] for counts in KEPT["kills"].values())
    assert set(KEPT["flips"]) == set(flips.TARGETS) and not any(counts["silent"] for counts in KEPT["flips"].values())


def test_what_the_text_says_of_them_is_so():
    joined = " ".join(PAGE.split())
    found = KEPT["fuzz"]
    seconds, megabytes = found["most"]["seconds"], found["most"]["MB"]
    assert f"computed {seconds:.1f} s and took {megabytes:,} MB above idle at most" in joined
    assert (fuzz.LIMIT, fuzz.MEMORY >> 20) == (5, 200) and "longer than 5 s" in joined and "200 MB above idle" in joined


def test_the_commands_that_repeat_it_exist():
    for path in re.findall(r"python (tests/\w+\.py)", PAGE):
        assert (ROOT / path).exists()
    assert all(f"python tests/{name}.py" in PAGE for name in ("fuzz", "flips", "kills"))


if __name__ == "__main__":
    page = PAGE
    for begin, rows in TABLES.items():
        start, stop = rows_of(page, begin)
        page = page[:start] + "\n".join(rows()) + page[stop:]
    most = KEPT["fuzz"]["most"]
    told = f"computed {most['seconds']:.1f} s and took {most['MB']:,} MB above idle"
    page = re.sub(r"computed [\d.]+ s and took [\d,]+ MB above idle", told, page)
    (ROOT / "examples" / "trust.md").write_text(page, encoding="utf-8")
