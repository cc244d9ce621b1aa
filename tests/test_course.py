"""The course holds together: each lab has its place on the page, its result, and the picture of that very result."""

import json
import re
from pathlib import Path

import pytest
from course import picture, results

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
RESULTS = EXAMPLES / "results"

PAGE = (EXAMPLES / "README.md").read_text(encoding="utf-8")
ALL_LABS = (EXAMPLES / "all_labs.py").read_text(encoding="utf-8")
LABS = re.findall(r'"(\w+)"', re.search(r"^LABS = \[(.*?)\]", ALL_LABS, re.M | re.S)[1])
ANSWERS = json.loads(results.ANSWERS.read_text(encoding="utf-8"))
# Results that are quoted or drawn: those of the labs, and of some labs on a language model.
KEPT = sorted(path.stem for path in RESULTS.glob("*.json") if "columns" in json.loads(path.read_text("utf-8")))
ON_A_LANGUAGE_MODEL = ["rank_smollm2", "quantised_smollm2", "security_qa_smollm2", "four_domains_smollm2"]


def test_the_page_shows_the_results_of_all_labs_in_their_order():
    assert [name for name in results.places(PAGE) if name in LABS] == LABS
    assert set(KEPT) == set(results.places(PAGE)) == {*LABS, *ON_A_LANGUAGE_MODEL}


def test_the_tables_of_the_page_are_those_of_the_results():
    assert results.with_tables(PAGE) == PAGE
    assert results.with_list(PAGE) == PAGE
    assert results.with_exercises(PAGE) == PAGE


def test_the_claims_of_the_first_page_are_as_they_are_computed():
    page = results.FIRST_PAGE.read_text(encoding="utf-8")
    assert results.with_claims(page) == page
    changed = page.replace("| false |", "| true |", 1)
    assert results.with_claims(changed) == page != changed


def test_every_lab_has_answers_and_no_other():
    assert set(ANSWERS) == set(LABS)


def test_a_table_that_was_changed_by_hand_is_noticed():
    number = re.search(r"\| (\d+\.\d+) ", PAGE)
    changed = PAGE[: number.start(1)] + "99.9" + PAGE[number.end(1) :]
    assert results.with_tables(changed) == PAGE != changed


@pytest.mark.parametrize("name", KEPT)
def test_a_result_was_measured_in_full_and_its_picture_is_of_it(name):
    text = (RESULTS / f"{name}.json").read_text(encoding="utf-8")
    kept = json.loads(text)
    assert not kept["quick"]
    assert kept["machine"]["cpu"] and kept["setting"]
    assert picture.drawn_from(RESULTS / f"{name}.png") == picture.digest(text)
    if name in LABS:
        assert len(kept["seeds"]) >= 3
        lists = [value for row in kept["rows"] for value in row.values() if isinstance(value, list)]
        assert all(len(values) == len(kept["seeds"]) for values in lists)


@pytest.mark.parametrize("name", LABS)
def test_a_lab_has_its_question_its_picture_and_exercises_on_the_page(name):
    sections = re.split(r"^#{2,3} ", PAGE, flags=re.MULTILINE)
    section = next(section for section in sections if f"<!-- result: {name} -->" in section)
    assert f"python examples/{name}.py" in section
    # A picture, with a text that says what it shows.
    assert re.search(rf"!\[[^\]]{{20,}}\]\(results/{name}\.png\)", section)
    assert len(results.exercises(name)) == len(ANSWERS[name]) >= 2
    assert section.count("<details>") == section.count("</details>") == 1


def test_the_time_of_all_labs_is_that_of_a_run_of_all_of_them_with_three_seeds():
    kept = results.read("all_labs")
    assert [row["lab"] for row in kept["labs"]] == [*LABS, "all of them"]
    assert {row["status"] for row in kept["labs"][:-1]} == {"ok"}
    assert (kept["seeds"], kept["quick"]) == (3, False)
    # Two at a time are faster than one after the other, and no faster than two.
    each = sum(row["seconds"] for row in kept["labs"][:-1])
    assert each / kept["jobs"] < kept["labs"][-1]["seconds"] < each


def test_the_procedure_that_the_page_tells_is_the_one_that_was_followed():
    ends = [(step["r"], step["validation"][-1][1]) for step in results.read("rank")["procedure"]]
    (r4, first), (r8, second), (r16, third) = ends
    assert (r4, r8, r16) == (4, 8, 16) and second - third < 0.01 < first - second
    told = f"{first:.3f} with r = 4, at {second:.3f} with 8 and at {third:.3f} with 16"
    assert told in " ".join(PAGE.split())


@pytest.mark.parametrize("page", sorted(EXAMPLES.glob("*.md")), ids=lambda path: path.stem)
def test_every_row_of_a_table_has_as_many_cells_as_its_head(page):
    blocks = re.findall(r"(?:^\|.*\|\n)+", page.read_text(encoding="utf-8"), re.MULTILINE)
    for block in blocks:
        # A bar with a backslash before it is a bar, and ends no cell.
        cells = [len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()]
        assert len(set(cells)) == 1, block.splitlines()[cells.index(max(cells))]


def test_a_picture_of_another_result_is_noticed(tmp_path):
    file = RESULTS / f"{LABS[0]}.png"
    assert picture.drawn_from(file) != picture.digest("another result")
    without = tmp_path / "other.png"
    without.write_bytes(file.read_bytes().replace(b"Source", b"Sauce!"))
    assert picture.drawn_from(without) is None


def test_a_range_is_never_negative_though_a_mean_of_equal_numbers_may_be_rounded():
    assert sum([0.1] * 3) / 3 > 0.1
    below, above = picture.ranges([[0.1] * 3, [-0.1] * 3, [1.0, 2.0]])
    assert min(below) >= 0 and min(above) >= 0
    assert (below[2], above[2]) == (0.5, 0.5)
