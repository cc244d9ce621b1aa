"""What the README says is so: its code runs, its output was printed by this code, its counts and paths are right."""

import ast
import json
import re
from pathlib import Path

import pytest

import minilora

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]


@pytest.mark.parametrize("code", [code for code in PYTHON if "import" in code], ids=lambda code: code.splitlines()[1])
def test_its_python_runs(code):
    exec(compile(code, "README.md", "exec"), {})


def test_the_layer_it_shows_is_the_layer():
    """Word for word, the docstrings aside."""
    (shown,) = [code for code in PYTHON if "class LoRALinear" in code]
    source = (ROOT / "minilora" / "lora.py").read_text(encoding="utf-8")
    layers = [node for node in ast.parse(source).body if getattr(node, "name", "") in ("LoRAPair", "LoRALinear")]
    for part in [part for layer in layers for part in [layer, *layer.body]]:
        if isinstance(part, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(part):
            part.body = part.body[1:]
    assert [ast.unparse(node) for node in ast.parse(shown).body] == [ast.unparse(layer) for layer in layers]


@pytest.mark.parametrize("name", ["demo.txt", "finetune.txt", "finetune_small.txt", "swap.txt"])
def test_the_runs_it_shows_are_the_runs_that_are_kept(name):
    kept = (ROOT / "examples" / "results" / name).read_text(encoding="utf-8")
    assert ("", kept) in BLOCKS


# Its tables of time and memory, made again from what was measured.

SIZES = ["tiny", "mid", "small"]
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


def measured(name):
    return json.loads((ROOT / "examples" / "results" / f"{name}.json").read_text(encoding="utf-8"))["results"]


def compared(label):
    """The row of the table of libraries, with a cell for each size."""
    file, task, library, what = COMPARED[label]
    cells = []
    for size in SIZES:
        (contest,) = [each for each in measured(file) if (each["size"], each["task"]) == (size, task)]
        ours, its = ({row["library"]: row for row in contest["rows"]}[name] for name in ("minilora", library))
        cells.append({
            "time": lambda ours, its: f"{its['ratio']:.2f}",
            "memory": lambda ours, its: f"{ours['peak_bytes'] / its['peak_bytes']:.2f}",
            "step": lambda ours, its: f"{1e3 * ours['seconds']:,.0f} ms, {ours['peak_bytes'] / 1e6:,.0f} MB",
            "share": lambda ours, its: f"{100 * ours['share']:.0f} %",
        }[what](ours, its))  # fmt: skip
    return f"| {label} | {' | '.join(cells)} |"


GROWS = ["T=64", "T=256", "T=1024", "B=1", "B=4", "B=16", "r=1", "r=8", "r=64"]


def grows(size):
    """The row of one shape: a LoRA step in minilora, and in PyTorch by hand."""
    (contest,) = [each for each in measured("scaling") if each["size"] == size]
    rows = [row for name in ("minilora", "torch") for row in contest["rows"] if row["library"] == name]
    cells = [f"{1e3 * row['seconds']:,.0f} ms, {row['peak_bytes'] / 1e6:,.0f} MB" for row in rows]
    return f"| {size} | {' | '.join(cells)} |"


def adapters_in_one_batch():
    """The sentence on several adapters: time over that of one that is attached, of a training step and of a forward."""
    times = {}
    for each in measured("scaling"):
        if each["size"] == "16 rows":
            rows = {row["library"]: row for row in each["rows"]}
            times[each["task"]] = f"{1 / rows['stack of 16']['ratio']:.2f}"
    return (f"16 rows with an adapter each take {times['lora']} times as long to train on as with one for all, and "
            f"{times['forward']} times as long to read.")  # fmt: skip


@pytest.mark.parametrize("size", GROWS)
def test_how_it_grows_is_what_was_measured(size):
    assert grows(size) in README.splitlines()


def test_what_several_adapters_cost_is_what_was_measured():
    assert adapters_in_one_batch() in README.replace("\n", " ")


def tricks():
    """The rows of the table of tricks: what is switched off, in which task, and for each size: time, memory."""
    cells = {}
    for each in measured("tricks"):
        for name, (seconds, ratio, peak, more) in each["measured"].items():
            on = f"{1e3 * seconds:,.0f} ms, {peak / 1e6:,.0f} MB"
            cell = on if name == "all on" else f"{ratio:.2f}, {round(more / 1e6):+,} MB"
            cells.setdefault((name, each["task"]), {}).setdefault(each["size"], cell)
    return [f"| {name} | {task} | {' | '.join(row[size] for size in SIZES)} |" for (name, task), row in cells.items()]


@pytest.mark.parametrize("label", COMPARED)
def test_its_comparison_is_what_was_measured(label):
    assert compared(label) in README.splitlines()


def test_its_tricks_are_what_was_measured():
    begin = README.index("| switched off | task |")
    shown = README[begin : README.index("\n\n", begin)].splitlines()[2:]
    assert shown == tricks()


def test_it_has_two_commands_and_the_second_tests():
    commands = [code for language, code in BLOCKS if code.startswith("pip install")]
    assert len(commands) == 2 and all(code.count("\n") == 1 for code in commands)
    assert "minilora demo" in commands[0] and "pytest" in commands[1]


def test_its_reading_order_is_that_of_the_book():
    rows = re.findall(r"^\| `(\w+)\.py` \|", README, re.MULTILINE)
    assert rows == re.findall(r"\w+", re.search(r"Reading order: ([\w, \n]+)\.", minilora.__doc__)[1])[:len(rows)]
    assert len(rows) == 10


def test_every_file_it_names_exists():
    for path in re.findall(r"`((?:examples|tests|minilora)/[\w./]+)`", README):
        assert path == "examples/NAME.py" or (ROOT / path).exists(), path
