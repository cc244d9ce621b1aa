"""Advice for who calls a function does not reach who types a command."""

import ast
import re

import pytest
from strategies import small_gpt
from test_book import SOURCES

from minilora import LoRAConfig, init_adapter
from minilora.cli.advice import for_command_line
from minilora.cli.main import main
from minilora.training.finetune_config import FineTuneConfig

PASSED = re.compile(r"\b[a-z_]+=(?:True|False|[0-9]+)\b")
# Of PyTorch, of a file, of the engine, which no command leaves to the reader, of the checker, and of a program.
ELSEWHERE = {"weights_only=True", "use_dora=True", "requires_grad=True", "relative=True", "skip_special_tokens=False",
             "add_special_tokens=False"}  # fmt: skip


def texts(source):
    """Every text in a source but for docstrings, with a letter in the place of what is put in."""
    tree = ast.parse(source)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {id(node.body[0].value) for node in ast.walk(tree)
                  if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)}  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "X" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def test_no_message_of_the_library_tells_a_command_what_to_pass():
    found = set()
    for name, source in SOURCES.items():
        for text in texts(source) if name != "cli.advice" else ():
            assert set(PASSED.findall(for_command_line(text))) <= ELSEWHERE, name
            found |= set(PASSED.findall(text))
    assert {"allow_large_r=True", "allow_untrained=True", "check_base=False"} <= found, "or this shows nothing"


def test_a_message_that_is_planted_is_found():
    source = '"""a=True"""\nraise ValueError(f"pass allow_it=True, {x}")'
    assert list(texts(source)) == ["pass allow_it=True, X", "pass allow_it=True, "]


def test_the_rank_that_is_too_large_is_told_by_its_flag(capsys, folder, tmp_path):
    words = ["--base", folder / "base", "--data", folder / "t.txt", "--out", tmp_path / "o", "--alpha", 3, "--r", 7]
    assert main(["finetune", *map(str, words)]) == 1
    err = capsys.readouterr().err
    assert "r=7 exceeds min(in, out)" in err and err.endswith("a smaller rank (--r) expresses the same updates\n")
    with pytest.raises(ValueError, match="or pass allow_large_r=True"):
        init_adapter(small_gpt(), LoRAConfig(r=99, alpha=1, target_modules="all-linear"), None)


def test_a_setting_is_called_as_its_flag_is():
    with pytest.raises(ValueError) as refusal:
        FineTuneConfig(base="b", data="d", out="o", alpha=1, save_every=0)
    told = for_command_line(str(refusal.value))
    assert told == "--save-every must be a whole number of at least 1; got 0"
