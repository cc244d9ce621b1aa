"""The pages that are made from data: CLAIMS.md, and the map of the tutorials. Knows no measurement.

`python examples/claims.py --write` writes both; a test compares them with what would be written.
"""

import ast
import functools
import json
import re

from . import claims, quantities

CLAIMS_PAGE = claims.EXAMPLES / "CLAIMS.md"
SECTIONS = claims.EXAMPLES / "course.json"
MAP_PAGE = claims.EXAMPLES / "README.md"
BEGIN = "<!-- map: written by examples/claims.py --write, from course.json -->"
END = "<!-- end of the map -->"

INTRODUCTION = """# What five tutorials claim, and what is true

Five public tutorials teach LoRA. Each of their sentences that makes a claim was read again, beside
the number that this library gives: {n_claims} claims, {counts}. What stands in
quotation marks is theirs, shortened by dots; the rest is told in our words.

Nobody writes a verdict by hand. A claim is read in each way in which it can be meant, or part by
part. **True** says that every reading holds, **false** that none does, **imprecise** that some do,
or for some seeds only. *Not checkable* says that nothing can be run to find out: a price, a custom,
a closed model. *Not measured yet* waits for its lab.

It is easy to find fault with a page that somebody gave away. All five made the subject easier to
enter; {held} of the {checked} sentences that can be checked hold in one way of reading them at
least; and a sum that does not add up is found only by those who add it up once more. Several things
that this project itself had expected came out otherwise: then the row says what was measured.

A range, as in "53 to 72 %", is that of the seeds of a lab, three or more; its setting stands below.
A loss is in nats (the natural logarithm), on text that is held out: not trained on. The labs train
a model of {demo:,} numbers in minutes. They show what can happen, not what must happen with
billions. Numbers, bytes and operations are counted for the shapes of the real models.

`python examples/claims.py A6 B22` shows rows in full: expressions, readings, tests.
"""


def claims_page(data, outcomes):
    """CLAIMS.md: `data` is that of claims.json, `outcomes` {id: Outcome}."""
    counts = count(outcomes.values())
    shown = [f"{n} {verdict}" for verdict, n in counts.items()]
    of = lambda *verdicts: sum(outcome.verdict in verdicts for outcome in outcomes.values())
    introduction = INTRODUCTION.format(
        n_claims=len(outcomes),
        counts=", ".join(shown),
        held=of("true", "imprecise"),
        checked=of("true", "imprecise", "false"),
        demo=quantities.parameters("minilora-demo"),
    )
    lines = [introduction]
    lines += [
        "| tutorial | " + " | ".join(counts) + " |",
        "|---|" + "|".join("---" for _ in counts) + "|",
    ]
    for letter, title in data["tutorials"].items():
        of_it = [o for name, o in outcomes.items() if name[0] == letter]
        cells = [str(n) for n in count(of_it, counts).values()]
        lines.append(f"| {letter}. {title} | " + " | ".join(cells) + " |")
    lines += ["", "## To begin with", "", BEGIN_WITH]
    by_id = {claim["id"]: claim for claim in data["claims"]}
    for name in data["begin_with"]:
        outcome = outcomes[name]
        says = _says(by_id[name])
        lines.append(f"* {name}, {says}, is {outcome.verdict}: {outcome.text}.")
    for letter, title in data["tutorials"].items():
        lines += ["", f"## {letter}. {title}", ""]
        lines += ["| | it says | by this code | verdict | shown by |", "|---|---|---|---|---|"]
        for claim in data["claims"]:
            if claim["id"][0] == letter:
                lines.append(_row(claim, outcomes[claim["id"]]))
    lines += ["", "## The quick checks of B", "", QUICK_CHECKS]
    for i, check in enumerate(data["quick_checks"], 1):
        lines.append(f"{i}. **{check['asks']}** {claims.outcome(check).text}.")
    lines += ["", "## The labs behind the ranges", ""]
    lines += _settings(data)
    lines += ["", "## The tests, by name", ""]
    for test, ids in _tests(data).items():
        file, _, name = test.partition("::")
        lines.append(f"* {', '.join(ids)}: `{file}`, `{name}`")
    return "\n".join(lines) + "\n"


BEGIN_WITH = "Some rows that matter to whoever writes such a layer, and some that surprised us:\n"
QUICK_CHECKS = (
    "Its lesson ends with seven questions. Their answers, in our words and with our numbers:\n"
)


def count(outcomes, verdicts=()):
    """{verdict: how many have it}, for `verdicts`, or those that occur."""
    found = [outcome.verdict for outcome in outcomes]
    order = verdicts or [*claims.VERDICTS, claims.PENDING]
    return {each: found.count(each) for each in order if verdicts or each in found}


def _row(claim, outcome):
    verdict = outcome.verdict
    if verdict in ("true", "false", "imprecise"):
        verdict = f"**{verdict}**"
    links = []
    for shown in shown_by(claim):
        link = _link(shown)
        if link not in links:
            links.append(link)
    cells = [claim["id"], _says(claim), outcome.text, verdict, ", ".join(links)]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _says(claim):
    """The sentence of a claim: in quotation marks, unless it is told in other words."""
    return claim["quote"] if claim.get("in_our_words") else f"“{claim['quote']}”"


def shown_by(claim):
    """What shows a claim: labs by name, tests as file::name, commands."""
    text = json.dumps(claim)
    labs = re.findall(r"lab\('(\w+)'", text)
    tests = [each["test"] for each in claim.get("readings", []) if isinstance(each, dict)]
    shown = list(dict.fromkeys([*tests, *labs, *claim.get("shown", [])]))
    if not shown and claim.get("values"):
        shown = ["tests/test_claims.py::test_the_verdict_of_what_is_counted_follows_from_the_count"]
    return shown


def _link(shown):
    if "::" in shown:
        file = shown.partition("::")[0]
        return f"[{file.rpartition('/')[2].removesuffix('.py')}](../{file})"
    if shown.startswith("minilora "):
        return f"`{shown}`"
    return _program(shown)


def _tests(data):
    """{test: the claims that it shows}, in the order of the files."""
    found = {}
    for claim in data["claims"]:
        for shown in shown_by(claim):
            if "::" in shown:
                found.setdefault(shown, []).append(claim["id"])
    return dict(sorted(found.items(), key=lambda item: item[0].partition("::")[0]))


def _settings(data):
    """A line for each lab that a claim quotes: its setting, seeds and machine."""
    lines = []
    for name in labs_of(data):
        file = claims.RESULTS / f"{name}.json"
        if not file.exists():
            lines.append(f"* `{name}.py`: not measured yet.")
            continue
        kept = json.loads(file.read_text(encoding="utf-8"))
        cpu = kept["machine"]["cpu"]
        lines.append(f"* `{name}.py`: {kept['setting']} {len(kept['seeds'])} seeds, on {cpu}.")
    return lines


def labs_of(data):
    """The labs whose results are quoted, each once."""
    return list(dict.fromkeys(re.findall(r"lab\('(\w+)'", json.dumps(data))))


def sections_map(sections):
    """The map of the tutorials: {tutorial, section, answer} of course.json as tables."""
    lines = []
    for letter, title in claims.load()["tutorials"].items():
        claims_of_it = f"[claim by claim](CLAIMS.md#{_anchor(letter, title)})"
        lines += [f"### {letter}. {title}", "", f"What it says, {claims_of_it}.", ""]
        lines += ["| its section | run | seconds |", "|---|---|---|"]
        for section in sections:
            if section["tutorial"] == letter:
                answers = section["answer"]
                run = ", ".join(_answer(answer) for answer in answers)
                took = ", ".join(filter(None, (seconds(answer) for answer in answers)))
                lines.append(f"| {section['section']} | {run} | {took} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _anchor(letter, title):
    """The anchor of a tutorial's heading, as a page of Markdown has it."""
    words = re.sub(r"[^\w\- ]", "", f"{letter}. {title}".lower())
    return words.replace(" ", "-")


def _answer(answer):
    if answer.endswith(".md"):
        return f"[`{answer}`]({answer})"
    # What no lab answers, in words.
    if answer.startswith("("):
        return answer
    if answer.startswith(("minilora ", "python ")):
        return f"`{answer}`"
    return _program(answer)


def _program(name):
    """A link to what the page says of a lab, or to the program, or its name if there is neither."""
    file = f"{name}.py"
    if name in _sections():
        return f"[`{file}`]({MAP_PAGE.name}#{name})"
    return f"[`{file}`]({file})" if (claims.EXAMPLES / file).exists() else f"`{file}`"


@functools.cache
def _sections():
    """The names of the labs that the page has a section for. To write the page changes none."""
    return set(re.findall(r'<a id="(\w+)"></a>', MAP_PAGE.read_text(encoding="utf-8")))


def seconds(answer):
    """How long a lab takes, as measured for its results, or else in the words of its docstring."""
    results = claims.RESULTS / f"{answer}.json"
    if results.exists():
        measured = json.loads(results.read_text(encoding="utf-8")).get("seconds")
        if isinstance(measured, (int, float)):
            return f"{measured:.0f}" if measured >= 1 else "1"
    program = claims.EXAMPLES / f"{answer}.py"
    if not program.exists():
        return ""
    words = ast.get_docstring(ast.parse(program.read_text(encoding="utf-8")))
    took = re.search(r"Takes\s+(.*?)[.,;]\s", words + " ", re.DOTALL)
    return " ".join(took[1].split()) if took else ""


def with_map(page, table):
    """The text of a page with the table between its two marks.

    Raises: ValueError unless each mark stands there once.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"the page needs the lines {BEGIN!r} and {END!r}, once each")
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n\n{table}\n{END}{after}"
