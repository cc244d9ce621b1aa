"""What five tutorials claim of LoRA, computed again: how many claims hold, and each one in full.

You learn which of their numbers you can rely on, what an unstated assumption does to the others,
and how a verdict is made: a claim is read in every way in which it can be meant, each reading is
computed, and nobody writes the verdict by hand. CLAIMS.md, beside this file, is the whole table.

    python examples/claims.py [A6 B22 ...] [--quick] [--seed 0] [--write]

Takes about two seconds.
"""

# Before the imports that take time: Ctrl-C ends this in one line.
from minilora.cli.ctrl_c import one_line_on_ctrl_c

one_line_on_ctrl_c()

import argparse
import json

from course import claims, pages, results

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("ids", nargs="*", metavar="ID", help="claims to show in full, such as A6")
parser.add_argument(
    "--quick", action="store_true", help="nothing is left out: it takes two seconds"
)
parser.add_argument("--seed", type=int, default=0, help="no number here depends on it")
parser.add_argument(
    "--write", action="store_true", help="write the pages that show claims and results"
)
args = parser.parse_args()

data = claims.load()
by_id = {claim["id"]: claim for claim in data["claims"]}
for name in args.ids:
    if name not in by_id:
        parser.error(f"there is no claim {name}: A1 to E17, as in CLAIMS.md")

# %% Every claim is computed from claims.json: no number of its own stands there.
outcomes = {name: claims.outcome(claim) for name, claim in by_id.items()}

# %% Those that were asked for, in full.
for name in args.ids:
    claim = by_id[name]
    outcome = outcomes[name]
    print(f'{name}  "{claim["quote"]}"\n    {outcome.verdict}: {outcome.text}')
    for value, expression in claim.get("values", {}).items():
        number = outcome.values.get(value, claims.PENDING)
        print(f"    {value} = {number}   computed as {expression}")
    for reading, holds in zip(claim.get("readings", []), outcome.held, strict=False):
        what = reading["test"] if isinstance(reading, dict) else reading
        print(f"    {holds}: {what}")

# %% All of them, counted.
if not args.ids:
    counts = pages.count(outcomes.values())
    print("{:<64}".format("claims") + "".join(f"{verdict:>18}" for verdict in counts))
    for letter, title in data["tutorials"].items():
        of_it = [outcome for name, outcome in outcomes.items() if name[0] == letter]
        cells = "".join(f"{n:>18}" for n in pages.count(of_it, counts).values())
        print(f"{letter}. {title:<61}{cells}")
    print("{:<64}".format("all") + "".join(f"{n:>18}" for n in counts.values()))

# %% The pages, from the same data.
if args.write:
    pages.CLAIMS_PAGE.write_text(pages.claims_page(data, outcomes), encoding="utf-8")
    sections = json.loads(pages.SECTIONS.read_text(encoding="utf-8"))
    page = pages.MAP_PAGE.read_text(encoding="utf-8")
    page = results.with_tables(pages.with_map(page, pages.sections_map(sections)))
    page = results.with_exercises(results.with_list(page))
    pages.MAP_PAGE.write_text(page, encoding="utf-8")
    first_page = results.FIRST_PAGE.read_text(encoding="utf-8")
    results.FIRST_PAGE.write_text(results.with_claims(first_page), encoding="utf-8")
    print("\nwritten: CLAIMS.md, the course's map and tables, and the claims on the first page")
