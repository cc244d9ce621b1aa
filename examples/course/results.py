"""What was measured, as the course shows it: the tables of labs, read from their files. Runs none.

`python examples/claims.py --write` writes them into the page; a test compares them with the files.
"""

import json
import re
from pathlib import Path

from .lab import shown

RESULTS = Path(__file__).parent.parent / "results"
# In the page, where the table of a result stands: <!-- result: rank --> ... <!-- end -->
PLACE = re.compile(r"(<!-- result: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def read(name):
    """What the file of a result holds. Raises: FileNotFoundError if it was never kept."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(name):
    """The rows of a result as a table of Markdown, and under it how it came about."""
    kept = read(name)
    columns = kept["columns"]
    titles = [title for title, _ in columns.values()]
    lines = [_line(titles), _line(["---"] * len(titles))]
    for row in kept["rows"]:
        lines.append(_line([_cell(row.get(key), form) for key, (_, form) in columns.items()]))
    seeds = kept["seeds"]
    of_seeds = f"Seed {seeds[0]}"
    if len(seeds) > 1:
        of_seeds = f"Means over seeds {seeds[0]} to {seeds[-1]}, and the range"
    machine = kept["machine"]
    took = f"{of_seeds}; {kept['seconds']:.0f} s on {machine['cores']} cores of {machine['cpu']}."
    return "\n".join([*lines, "", f"{kept['setting']} {took}", ""])


def _cell(value, form):
    # A bar would end the cell.
    return shown(value, form).replace("|", "\\|")


def _line(cells):
    return f"| {' | '.join(cells)} |"


def with_tables(page):
    """The text of a page with the table of each result at its place."""
    return PLACE.sub(lambda found: f"{found[1]}{table(found[2])}{found[3]}", page)


def places(page):
    """The names of the results whose tables the page shows, in its order."""
    return [found[2] for found in PLACE.finditer(page)]
