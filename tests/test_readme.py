"""What the README says is so: its code runs, its output was printed by this code, its counts and paths are right."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]


@pytest.mark.parametrize("code", [code for code in PYTHON if "import" in code], ids=lambda code: code.splitlines()[1])
def test_its_python_runs(code):
    exec(compile(code, "README.md", "exec"), {})


def test_the_layer_it_shows_is_the_layer():
    (shown,) = [code for code in PYTHON if "class LoRALinear" in code]
    source = (ROOT / "minilora" / "lora.py").read_text(encoding="utf-8")
    (layer,) = [node for node in ast.parse(source).body if getattr(node, "name", "") == "LoRALinear"]
    for part in [layer, *layer.body]:
        if isinstance(part, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(part):
            part.body = part.body[1:]
    assert ast.unparse(ast.parse(shown)) == ast.unparse(layer)


@pytest.mark.parametrize("name", ["demo.txt", "finetune.txt", "finetune_small.txt", "swap.txt"])
def test_the_runs_it_shows_are_the_runs_that_are_kept(name):
    kept = (ROOT / "examples" / "results" / name).read_text(encoding="utf-8")
    assert ("", kept) in BLOCKS


def test_it_has_two_commands_and_the_second_tests():
    commands = [code for language, code in BLOCKS if code.startswith("pip install")]
    assert len(commands) == 2 and all(code.count("\n") == 1 for code in commands)
    assert "python -m minilora" in commands[0] and "pytest" in commands[1]


def test_its_line_counts_are_right():
    rows = re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.MULTILINE)
    assert [name for name, _ in rows] == [f"{name}.py" for name in
        "backend graph tensor functional gradcheck nn optim gpt targets lora".split()]  # fmt: skip
    for name, lines in rows:
        assert int(lines) == len((ROOT / "minilora" / name).read_text(encoding="utf-8").splitlines()), name


def test_every_file_it_names_exists():
    for path in re.findall(r"`((?:examples|tests|minilora)/[\w./]+)`", README):
        assert path == "examples/NAME.py" or (ROOT / path).exists(), path
