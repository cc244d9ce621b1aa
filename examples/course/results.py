"""What was measured, as the pages show it: tables of labs and of claims. Runs no lab.

`python examples/claims.py --write` writes them into the pages; tests compare them with the files.
"""

import json
import re

from . import claims
from .lab import shown

RESULTS = claims.RESULTS
# {lab: the answer to each of its exercises}, as they came out when somebody did them.
ANSWERS = claims.EXAMPLES / "course" / "answers.json"
FIRST_PAGE = claims.EXAMPLES.parent / "README.md"
# In the page, where the table of a result stands: <!-- result: rank --> ... <!-- end -->
PLACE = re.compile(r"(<!-- result: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
# The same for the list of all labs, and for a few claims: <!-- claims: A8 B41 -->
LIST = re.compile(r"(<!-- labs: ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)
EXERCISES = re.compile(r"(<!-- exercises: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
CLAIMS = re.compile(r"(<!-- claims: ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def read(name):
    """What the file of a result holds. Raises: FileNotFoundError if it was never kept."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(name):
    """The rows of a result as a table of Markdown, and under it how it came about."""
    kept = read(name)
    columns = kept["columns"]
    titles = [_escaped(title) for title, _ in columns.values()]
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
    return _escaped(shown(value, form))


def _escaped(text):
    # A bar would end the cell.
    return text.replace("|", "\\|")


def _line(cells):
    return f"| {' | '.join(cells)} |"


def with_tables(page):
    """The text of a page with the table of each result at its place."""
    return PLACE.sub(lambda found: f"{found[1]}{table(found[2])}{found[3]}", page)


def with_list(page):
    """The text of a page with the list of the labs it names, at its place."""
    return LIST.sub(lambda found: f"{found[1]}{_list(found[2].split())}{found[3]}", page)


def _list(names):
    lines = ["", _line(["", "lab", "asks", "seconds, three seeds"]), _line(["---"] * 4)]
    for i, name in enumerate(names, 1):
        kept = read(name)
        # The first sentence of a title may be a question.
        question = re.match(r".*?[?.:](?=\s|$)", kept["title"])[0]
        took = f"{max(1, kept['seconds']):,.0f}"
        lines.append(_line([str(i), f"[{name}](#{name})", question, took]))
    whole = read("all_labs")
    took = f"{whole['labs'][-1]['seconds']:,.0f}"
    lines.append(_line(["", "all of them", f"{whole['jobs']} at a time", took]))
    return "\n".join([*lines, "", ""])


def exercises(name):
    """The exercises that end the source of a lab, each on one line."""
    source = (claims.EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    _, _, lines = source.partition("\n# %% Exercises")
    found = []
    for line in lines.splitlines()[1:]:
        begins = re.match(r"# \d\. (.*)", line)
        if begins:
            found.append(begins[1])
        else:
            found[-1] += f" {line.removeprefix('#').strip()}"
    return found


def with_exercises(page):
    """The text of a page with the exercises of each lab, and their answers folded away."""
    answers = json.loads(ANSWERS.read_text(encoding="utf-8"))

    def both(found):
        parts = [found[1], "**Exercises**", "", *_numbered(exercises(found[2])), ""]
        parts += ["<details>", "<summary>Answers</summary>", "", *_numbered(answers[found[2]]), ""]
        return "\n".join([*parts, "</details>", "", found[3]])

    return EXERCISES.sub(both, page)


def _numbered(lines):
    return [f"{i}. {line}" for i, line in enumerate(lines, 1)]


def with_claims(page):
    """The text of a page with a row for each of the claims that it names."""
    by_id = {claim["id"]: claim for claim in claims.load()["claims"]}

    def rows(found):
        lines = ["", _line(["a tutorial says", "by this code", ""]), _line(["---"] * 3)]
        for name in found[2].split():
            outcome = claims.outcome(by_id[name])
            lines.append(_line([f"“{by_id[name]['quote']}”", outcome.text, outcome.verdict]))
        return "\n".join([found[1].rstrip(), *lines, "", found[3]])

    return CLAIMS.sub(rows, page)


def places(page):
    """The names of the results whose tables the page shows, in its order."""
    return [found[2] for found in PLACE.finditer(page)]
