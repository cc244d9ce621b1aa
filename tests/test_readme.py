"""What the README and the pages beside the examples say is so: their code runs and prints what they say, their
transcripts were printed by this code, their tables are made from what was measured, their paths and commands exist."""

import ast
import contextlib
import io
import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import workers
from ops import Op

import minilora
from minilora.cli.main import main

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "examples" / "results"
PAGES = {path.name: path.read_text(encoding="utf-8") for path in ROOT.glob("examples/*.md")}
# The page of the examples has the name of the first page.
COURSE = PAGES["examples"] = PAGES.pop("README.md")
README = PAGES["README.md"] = (ROOT / "README.md").read_text(encoding="utf-8")
every_page = pytest.mark.parametrize("name", PAGES)


def blocks(text):
    """[(language, code)] of the page's fenced blocks."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def paragraphs(text):
    """The page's prose, without its code."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL).split("\n\n")


def joined(text):
    """The text on one line, so that a sentence is found wherever its lines are broken."""
    return " ".join(text.split())


# Its code runs, and prints what its comments say.


def program(text):
    """The page's Python, block after block as its reader would run it; without quotations from the library."""
    codes = [code for language, code in blocks(text) if language == "python"]
    return "\n".join(code for code in codes if not code.startswith(" ") and "class LoRALinear" not in code)


def promised(code):
    """What the comments after or under each `print(...)` say that it prints."""
    return re.findall(r"^print\(.*\)(?: +|\n)# (.*)$", code, re.MULTILINE)


def printed(code, name):
    """(the lines that the code prints, the names that it leaves)"""
    names = {"__name__": name}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(code, name, "exec"), names)
    return out.getvalue().splitlines(), names


@every_page
def test_its_python_runs_and_prints_what_its_comments_say(name):
    code = program(PAGES[name])
    lines, _ = printed(code, name)
    if name != "layer_norm.md":  # it prints the message of its planted bug, which test_examples.py reads
        assert lines == promised(code)


def test_the_first_example_is_short_and_says_what_it_prints():
    language, code = blocks(README)[0]
    assert language == "python" and len([line for line in code.splitlines() if line and line[0] != "#"]) <= 20
    assert len(promised(code)) == code.count("print(") >= 4


def test_a_comment_that_is_wrong_is_noticed():
    code = "print(1 + 1)  # 3\n"
    assert promised(code) == ["3"] != printed(code, "planted")[0]


def test_the_layer_it_shows_is_the_layer():
    """Word for word, the docstrings aside."""
    (shown,) = [code for _, code in blocks(README) if "class LoRALinear" in code]
    source = (ROOT / "minilora" / "lora.py").read_text(encoding="utf-8")
    layers = [node for node in ast.parse(source).body if getattr(node, "name", "") in ("LoRAPair", "LoRALinear")]
    for part in [part for layer in layers for part in [layer, *layer.body]]:
        if isinstance(part, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(part):
            part.body = part.body[1:]
    assert [ast.unparse(node) for node in ast.parse(shown).body] == [ast.unparse(layer) for layer in layers]


def test_the_row_that_the_new_op_gets_describes_it():
    page = PAGES["contributing.md"]
    _, names = printed(program(page), "contributing.md")
    (row,) = [code for language, code in blocks(page) if code.lstrip().startswith("Op(")]
    (op,) = eval(f"[{row}]", {"Op": Op, "np": np, "F": SimpleNamespace(silu=names["silu"])})
    x = np.random.default_rng(0).normal(size=op.shapes(3, 4, 5)[0])
    assert np.allclose(op.function(minilora.Tensor(x)).data, op.formula(x), rtol=1e-14)


# The transcripts are the runs that are kept.


TRANSCRIPTS = {"demo.txt": "demo.md", "demo_smollm2.txt": "demo.md", "incident_json.txt": "demo.md",
               "swap.txt": "demo.md", "finetune.txt": "gpt2.md", "finetune_small.txt": "gpt2.md"}  # fmt: skip


@pytest.mark.parametrize("name, page", TRANSCRIPTS.items())
def test_the_runs_it_shows_are_the_runs_that_are_kept(name, page):
    assert ("", (RESULTS / name).read_text(encoding="utf-8")) in blocks(PAGES[page])


def test_the_six_lines_of_the_demo_are_lines_of_the_run_that_is_kept():
    run = (RESULTS / "demo.txt").read_text(encoding="utf-8").splitlines()
    (shown,) = [code.splitlines() for _, code in blocks(README) if code.startswith("[5/5]")]
    assert len(shown) == 6
    assert [line for line in run if line in shown] == shown


def test_what_is_said_of_the_demo_is_in_the_run_that_is_kept():
    run = (RESULTS / "demo.txt").read_text(encoding="utf-8")
    assert "41,472 new numbers" in run and "60 facts through 41,472 new numbers" in joined(README)
    first, last = re.search(r"held-out loss (\S+) -> (\S+) nats", run).groups()
    page = joined(PAGES["demo.md"])
    assert f"{first} is worse than guessing" in page
    assert f"{last} is as good as choosing among e^{float(last):.1f}" in page


def of_smollm2():
    """What the run of the demo on SmolLM2 that is kept measured."""
    run = (RESULTS / "demo_smollm2.txt").read_text(encoding="utf-8")
    rows = re.findall(r"^ {6}\S.*?(\d+) % ± ([\d.]+) +(\d+) % ± ([\d.]+)", run, re.MULTILINE)
    return SimpleNamespace(
        run=run,
        before=[int(before) for before, *_ in rows],
        after=[int(after) for *_, after, _ in rows],
        seconds=float(re.search(r"all of it +([\d.]+)", run)[1]),
        training=float(re.search(r"training A and B +([\d.]+)", run)[1]),
        megabytes=int(re.search(r"all of it.* ([\d,]+)$", run, re.MULTILINE)[1].replace(",", "")),
        numbers=re.search(r"([\d,]+) new numbers", run)[1],
    )


def test_what_is_said_of_the_demo_on_smollm2_is_in_the_run_that_is_kept():
    kept = of_smollm2()
    page = joined(PAGES["demo.md"])
    trained, unseen, never = kept.after
    assert kept.before == [0, 0, 0] and never == 0 and trained >= 95 and unseen >= 90
    assert "Largest logit change: 0.0" in kept.run and "bit-identical" in kept.run and "(wrong: 70)" in kept.run
    assert f"{trained} % of the phrasings that it was trained on, {unseen} % of those that it was not" in page
    assert f"{kept.numbers} new numbers" in page
    assert f"{kept.seconds:,.0f} s, of which training took {kept.training:,.0f}" in page
    assert f"at most {kept.megabytes:,} MB" in page


def test_what_the_readme_says_of_smollm2_is_in_the_run_that_is_kept():
    kept = of_smollm2()
    (shown,) = [code.splitlines()[2:] for _, code in blocks(README) if code.startswith("$ pip install --no-deps")]
    assert len(shown) == 9 and all(line in kept.run.splitlines() for line in shown)
    assert f"in {kept.seconds:,.0f} s, with {kept.megabytes:,} MB at most" in joined(README)


def test_the_figures_of_smollm2_in_the_readme_are_those_of_the_page():
    cells = lambda row: [cell.strip() for cell in row.strip("|").split("|")]
    measured = {(cells(row)[0].removeprefix("... "), *cells(row)[3:5]) for row in language_model()}
    table = README[README.index("| SmolLM2 over transformers + PEFT") :].split("\n\n")[0].splitlines()[2:]
    plain = lambda label: label.removeprefix("... ").removeprefix("32 tokens, ")
    shown = {(plain(label), *figures) for label, *figures in map(cells, table)}
    assert len(shown) == 4 and shown <= measured


def test_the_incidents_that_it_shows_are_those_that_are_kept():
    kept = results("incident_json")
    shown = (RESULTS / "incident_json.txt").read_text(encoding="utf-8")
    answers = {answer["sentence"]: answer for answer in kept["answers"]["unseen forms"]}
    right, wrong, _ = shown.split("\n\n")
    for block, is_right in ((right, True), (wrong, False)):
        sentence, before, after, *_ = block.splitlines()
        answer = answers[sentence]
        assert (answer["right"] == answer["after"]) is is_right
        assert before == f"  before   {' '.join(answer['before'].split())}"
        assert after == f"  after    {' '.join(answer['after'].split())}"
    exact = kept["rows"][-1]["exact"]
    assert kept["rows"][-1]["name"] == "96 in unseen forms, after"
    told = f"{np.mean(exact):.0f} % are exact to the last character, {min(exact):.0f} to {max(exact):.0f} over three"
    assert f"{told} seeds" in joined(PAGES["demo.md"])


def test_what_count_says_is_what_it_prints(capsys):
    (shown,) = [code for _, code in blocks(PAGES["llm.md"]) if code.startswith("$ minilora count")]
    command, _, printed_then = shown.partition("\n")
    assert main(shlex.split(command)[2:]) == 0
    assert capsys.readouterr() == (printed_then, "")


# The tables of time and memory, made again from what was measured.

SIZES = ["tiny", "mid", "small"]
# On each processor the files of results are named with it. The version that ran is told beside it.
PROCESSORS = {"EPYC": "_epyc", "Xeon": ""}
COMPARED = {  # what the row says: (file of results, task, library, what is told of minilora's row and the library's)
    "a LoRA step on the attention inputs, over transformers + PEFT": ("benchmark", "lora", "transformers", "time"),
    "the same, over a GPT and LoRA written by hand in PyTorch": ("benchmark", "lora", "torch", "time"),
    "... with freed memory kept, as here": ("variants", "lora", "torch-malloc", "time"),
    "... under `torch.compile`": ("variants", "lora", "torch-compile", "time"),
    "... in bfloat16 autocast": ("variants", "lora", "torch-bf16", "time"),
    "the same, over JAX under `jit`": ("variants", "lora", "jax", "time"),
    "a LoRA step on every linear, over transformers + PEFT": ("benchmark", "all-linear", "transformers", "time"),
    "a step of full fine-tuning, over transformers": ("benchmark", "full", "transformers", "time"),
    "the loss without a graph, over transformers + PEFT": ("benchmark", "forward", "transformers", "time"),
    "32 tokens, greedy, over transformers + PEFT": ("benchmark", "generate", "transformers", "time"),
    "peak memory of a LoRA step, over transformers + PEFT": ("benchmark", "lora", "transformers", "memory"),
    "peak memory of a LoRA step, over PyTorch by hand": ("benchmark", "lora", "torch", "memory"),
    "peak memory of full fine-tuning, over transformers": ("benchmark", "full", "transformers", "memory"),
    "peak memory of writing, over transformers + PEFT": ("benchmark", "generate", "transformers", "memory"),
    "a LoRA step of minilora": ("benchmark", "lora", "minilora", "step"),
    "share of it that the products alone would take": ("benchmark", "lora", "minilora", "share"),
}
# (a row, the task, the process of ours, that of theirs)
LANGUAGE_MODEL = [
    ("a LoRA step, loss on every position", "all-linear", "minilora", "transformers"),
    ("... base in 4 bits, as its file has it", "all-linear", "minilora-gguf", "transformers"),
    ("... base in NF4", "all-linear", "minilora-nf4", "transformers"),
    ("a LoRA step, loss on a quarter of the positions", "answers", "minilora", "transformers"),
    ("... base in 4 bits, as its file has it", "answers", "minilora-gguf", "transformers"),
    ("... base in NF4", "answers", "minilora-nf4", "transformers"),
    ("32 tokens, greedy, merged here and not there", "generate", "minilora", "transformers"),
    ("... merged here and there", "generate", "minilora", "transformers-merged"),
    ("load, and write one token", "first-token", "minilora", "transformers"),
    ("... base in 4 bits, as its file has it", "first-token", "minilora-gguf", "transformers"),
]
GROWS = ["T=64", "T=256", "T=1024", "B=1", "B=4", "B=16", "r=1", "r=8", "r=64"]


def results(name):
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def measured(name):
    return results(name)["results"]


def row(*cells):
    return f"| {' | '.join(cells)} |"


def table(begin):
    """The rows of the table of benchmark.md whose heading begins so."""
    page = PAGES["benchmark.md"]
    start = page.index(begin)
    return page[start : page.index("\n\n", start)].splitlines()[2:]


def compared(label, processor):
    """A cell for each size: the row of the table of libraries; empty cells where it was not measured."""
    file, task, library, what = COMPARED[label]
    file += PROCESSORS[processor]
    cells = []
    for size in SIZES:
        if not (RESULTS / f"{file}.json").exists():
            cells.append("")
            continue
        (contest,) = [each for each in measured(file) if (each["size"], each["task"]) == (size, task)]
        ours, its = ({row["library"]: row for row in contest["rows"]}[name] for name in ("minilora", library))
        cells.append({
            "time": lambda ours, its: f"{its['ratio']:.2f}",
            "memory": lambda ours, its: f"{ours['peak_bytes'] / its['peak_bytes']:.2f}",
            "step": lambda ours, its: f"{1e3 * ours['seconds']:,.0f} ms, {ours['peak_bytes'] / 1e6:,.0f} MB",
            "share": lambda ours, its: f"{100 * ours['share']:.0f} %",
        }[what](ours, its))  # fmt: skip
    return cells


def test_its_comparison_is_what_was_measured():
    """Of two processors, side by side."""
    rows = [[label, *compared(label, "EPYC"), *compared(label, "Xeon")] for label in COMPARED]
    assert table("| minilora's time or memory") == [row(*cells) for cells in rows]


def test_the_four_numbers_of_the_readme_are_what_was_measured():
    tiny, _, small = compared("a LoRA step on the attention inputs, over transformers + PEFT", "EPYC")
    tiny_memory, _, small_memory = compared("peak memory of a LoRA step, over transformers + PEFT", "EPYC")
    assert (f"a LoRA step takes {tiny} times as long on a tiny model and {small} times on GPT-2's shape, "
            f"in {tiny_memory} and {small_memory} of the memory") in joined(README)  # fmt: skip


def of_language_model(task):
    """{library: its row} of one task with SmolLM2."""
    (contest,) = [each for each in measured("smollm2") if each["task"] == task]
    return {row["library"]: row for row in contest["rows"]}


def language_model():
    """The rows of the table of SmolLM2: time and memory here and there, and the two ratios."""
    for label, task, ours, theirs in LANGUAGE_MODEL:
        here, there = (of_language_model(task)[name] for name in (ours, theirs))
        cells = [f"{1e3 * r['seconds']:,.0f} ms, {r['peak_bytes'] / 1e6:,.0f} MB" for r in (here, there)]
        ratios = here["over"][theirs], here["peak_bytes"] / there["peak_bytes"]
        yield row(label, *cells, *[f"{ratio:.2f}" for ratio in ratios])
    here, there = (of_language_model("first-token")[name] for name in ("minilora", "transformers"))
    cells = [f"{1e3 * r['process']:,.0f} ms" for r in (here, there)]
    yield row("... from the start of the process", *cells, f"{here['over_process']['transformers']:.2f}", "")
    cells = [f"{of_language_model('shared')[name]['ratio']:.2f}" for name in ("minilora", "transformers")]
    yield row("memory of two processes, over that of one", *cells, "", "")


def test_the_table_of_a_language_model_is_made_from_the_results():
    assert table("| SmolLM2-135M") == list(language_model())


def test_the_machine_that_measured_it_is_named():
    machine = results("smollm2")["machine"]
    names = {"numpy": "NumPy", "torch": "PyTorch", "transformers": "transformers", "peft": "PEFT"}
    versions = [f"{names[name]} {machine['versions'][name].partition('+')[0]}" for name in names]
    page = joined(PAGES["benchmark.md"])
    section = page[page.index("## A language model") : page.index("## How a LoRA step grows")]
    assert [each for each in [*versions, machine["cpu"]] if each not in section] == []
    assert (machine["cores"], machine["threads"]) == (2, 2) and "two cores" in section and "two threads" in section


def grows(size):
    """The row of one shape: a LoRA step in minilora, and in PyTorch by hand."""
    (contest,) = [each for each in measured("scaling") if each["size"] == size]
    steps = [each for name in ("minilora", "torch") for each in contest["rows"] if each["library"] == name]
    return row(size, *[f"{1e3 * each['seconds']:,.0f} ms, {each['peak_bytes'] / 1e6:,.0f} MB" for each in steps])


def test_how_it_grows_is_what_was_measured():
    assert table("| | minilora | PyTorch by hand |") == [grows(size) for size in GROWS]


def test_what_several_adapters_cost_is_what_was_measured():
    """Time over that of one adapter that is attached, of a training step and of a forward."""
    times = {}
    for each in measured("scaling"):
        if each["size"] == "16 rows":
            rows = {row["library"]: row for row in each["rows"]}
            times[each["task"]] = f"{1 / rows['stack of 16']['ratio']:.2f}"
    assert (f"16 rows with an adapter each take {times['lora']} times as long to train on as with one for all, and "
            f"{times['forward']} times as long to read.") in joined(PAGES["benchmark.md"])  # fmt: skip


def tricks():
    """The rows of the table of tricks: what is switched off, in which task, and for each size: time, memory."""
    cells = {}
    for each in measured("tricks"):
        for name, (seconds, ratio, peak, more) in each["measured"].items():
            on = f"{1e3 * seconds:,.0f} ms, {peak / 1e6:,.0f} MB"
            cell = on if name == "all on" else f"{ratio:.2f}, {round(more / 1e6):+,} MB"
            cells.setdefault((name, each["task"]), {}).setdefault(each["size"], cell)
    escaped = lambda name: name.replace("*", r"\*")  # or it would be emphasis
    return [row(escaped(name), task, *[by_size[size] for size in SIZES]) for (name, task), by_size in cells.items()]


def test_its_tricks_are_what_was_measured():
    assert table("| switched off | task |") == tricks()


@pytest.mark.parametrize("file", ["benchmark", "benchmark_epyc", "variants", "scaling", "tricks"])
def test_the_machine_it_names_is_the_one_that_measured(file):
    machine = results(file)["machine"]
    names = {"numpy": "NumPy", "torch": "PyTorch", "transformers": "transformers", "peft": "PEFT", "jax": "JAX"}
    used = [name for name in names if name in machine["versions"]]
    versions = [f"{names[name]} {machine['versions'][name].partition('+')[0]}" for name in used]
    page = joined(PAGES["benchmark.md"])
    processor = machine["cpu"].rpartition(" ")[2].replace("GHz", " GHz")
    shown = [*versions, f"Python {machine['python']}", processor]
    assert [each for each in shown if each not in page] == []
    assert (machine["cores"], machine["threads"]) == (2, 2) and "two cores" in page and "two threads" in page


# What many workers cost.


def costs_of_workers():
    """The three tables of workers.md, from what was measured."""
    kept = results("workers")
    steps, told = [], []
    for base, rows in kept["measured"].items():
        for who, each in rows.items():
            sent = f"{each['bytes'] / 1e3:,.0f}" if "bytes" in each else "0"
            numbers = [f"{1e3 * each[name]:,.0f}" for name in ("seconds", "cpu")]
            steps.append(row(base, who, *numbers, *[f"{each[name] / 1e6:,.0f}" for name in ("rss", "pss")], sent))
        ratios = [f"{workers.predicted(rows, n) / rows[workers.name_of(n)]['seconds']:.2f}" for n in (1, 2)]
        told.append(row(base, f"{1e3 * rows['2 processes']['task']:.1f}", *ratios))
    on_paper = []
    for name, fields in kept["on_paper"].items():
        paper = workers.Paper(**fields)
        gains = [f"{n * paper.part / paper.step(n):.1f}" for n in workers.MACHINES]
        arrays = f"{paper.array_bytes / 1e6:,.1f}"
        on_paper.append(row(name, arrays, f"{paper.part:,.0f}", *gains, f"{paper.pays_up_to():,.0f}"))
    return {"| base | who |": steps, "| base | an empty task": told, "| model |": on_paper}


def test_what_workers_cost_is_what_was_measured_and_computed():
    for begin, rows in costs_of_workers().items():
        page = PAGES["workers.md"]
        start = page.index(begin)
        assert page[start : page.index("\n\n", start)].splitlines()[2:] == rows


def test_the_machine_that_measured_workers_is_named():
    machine = results("workers")["machine"]
    page = joined(PAGES["workers.md"])
    shown = [f"Python {machine['python']}", f"NumPy {machine['numpy']}", machine["blas"].split()[-1]]
    assert [each for each in shown if each not in page] == [] and machine["cores"] == 2 and "two cores" in page


# What it says of the repository.


def test_it_fits_on_a_page():
    assert len(README.encode()) < 16_500


def test_it_has_two_commands_and_the_second_tests():
    commands = [line for _, code in blocks(README) for line in code.splitlines() if line.startswith("pip install")]
    assert commands == ["pip install -e . && minilora demo", "pip install -e '.[test]' && python -m pytest"]
    assert re.findall(r"^pip install .*pytest.*$", README, re.MULTILINE) == commands[1:]  # so .ci/run looks for it


def test_the_first_screen_holds_the_picture_the_example_the_commands_and_the_reading_order():
    first = README[: README.index("\n## ")]
    assert len(first.splitlines()) < 75
    for part in ("<picture>", "attach(base, adapter)", "minilora demo", "[5/5]", "bit-identical", "minilora/lora.py"):
        assert part in first


def test_its_reading_order_is_that_of_the_book():
    rows = re.findall(r"^\| \[`(\w+)\.py`\]\(minilora/\1\.py\) \|", README, re.MULTILINE)
    assert rows == re.findall(r"\w+", re.search(r"Reading order: ([\w, \n]+)\.", minilora.__doc__)[1])
    assert len(rows) == 10


@every_page
def test_every_file_it_names_exists(name):
    text = PAGES[name]
    for path in re.findall(r"`((?:examples|tests|minilora)/[\w./]+)`", text):
        assert path == "examples/NAME.py" or (ROOT / path).exists(), path
    here = ROOT if name == "README.md" else ROOT / "examples"
    for path in re.findall(r"\]\(([^)#:]+)\)|(?:src|srcset)=\"([^\"]+)\"", text):
        assert (here / "".join(path)).exists(), path


def test_every_page_and_every_program_among_the_examples_is_listed_and_the_first_page_leads_to_the_list():
    names = [path.name for path in (ROOT / "examples").iterdir() if path.suffix in (".md", ".py")]
    assert [name for name in names if f"`{name}`" not in COURSE and name != "README.md"] == []
    assert "](examples/README.md)" in README


TERMS = {  # {a word of the field: what a paragraph says that explains it}
    "VJP": "vector-Jacobian product", "cotangent": "gradient", "nats": "natural logarithm",
    "[Hh]eld[- ]out": "not trained on",
}  # fmt: skip


@pytest.mark.parametrize("term", TERMS)
@every_page
def test_a_term_is_explained_where_it_first_occurs(name, term):
    prose = [re.sub(r"`[^`]*`", "", joined(paragraph)) for paragraph in paragraphs(PAGES[name])]
    for first in [paragraph for paragraph in prose if re.search(rf"\b{term}\b", paragraph)][:1]:
        assert TERMS[term] in first


PUBLIC_IN_0_1 = """GPT Adam Adapter GPTConfig GradientError LoRAConfig Tensor attach check_vjp generate gradcheck
    init_adapter init_peft_adapter load_adapter load_gpt2 load_model merge no_grad parameter_report rounding_report
    save_adapter save_gpt2 save_merged save_model stack""".split()


def test_what_version_0_1_offered_is_still_there():
    assert "`import minilora` offers the same names" in joined(PAGES["changes.md"])
    assert [name for name in PUBLIC_IN_0_1 if not hasattr(minilora, name)] == []


def commands(text):
    """The command lines of the page that call minilora, also those in transcripts."""
    for language, code in blocks(text):
        for line in code.replace("\\\n", " ").splitlines() if language == "" else ():
            if match := re.match(r"(?:\$ )?minilora (\w+.*)", line):
                yield match[1]


@pytest.mark.parametrize("line", dict.fromkeys(line for text in PAGES.values() for line in commands(text)))
def test_the_commands_it_shows_are_understood(line):
    table_of_commands = pytest.importorskip("minilora.cli.table")
    name, *arguments = shlex.split(line)
    table_of_commands.parser_of(name).parse_args(arguments)
