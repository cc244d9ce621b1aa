"""Advice for who calls a function does not reach who types a command."""

import ast
import re
from dataclasses import fields

import pytest
from strategies import small_gpt
from test_book import SOURCES

from minilora import LoRAConfig, init_adapter
from minilora.cli.advice import for_command_line
from minilora.cli.finetune_options import flag_of
from minilora.cli.main import main
from minilora.cli.table import parser_of
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


MODULES_OF = "h.*.attn.q_proj, h.*.attn.k_proj, h.*.attn.v_proj, h.*.attn.o_proj, h.*.mlp.up_proj, h.*.mlp.down_proj"
SHAPES = [
    ("--target nothing v_proj", f"--target ['nothing'] match no Linear layer. There are: {MODULES_OF}"),
    ("--target-regex nope", "--target-regex ['nope'] match no Linear layer (it is for whole names; --target takes "
     f"endings). There are: {MODULES_OF}"),
    ("--target-regex=", "argument --target-regex: must be a regular expression, got ''"),
    ("--rank-pattern foo=3", f"--rank-pattern ['foo'] match none of the adapted modules: {MODULES_OF}"),
    ("--alpha-pattern foo=3", f"--alpha-pattern ['foo'] match none of the adapted modules: {MODULES_OF}"),
    ("--rank-pattern q_proj=7", "r=7 exceeds min(in, out) of h.0.attn.q_proj, weight (6, 6); a smaller rank "
     "(--rank-pattern) expresses the same updates"),
]  # fmt: skip


@pytest.mark.parametrize("words, told", SHAPES, ids=[words for words, _ in SHAPES])
def test_an_error_about_the_shape_of_an_adapter_is_about_flags_and_said_once(words, told, capsys, folder, tmp_path):
    usual = ["--base", folder / "base", "--data", folder / "t.txt", "--out", tmp_path / "o", "--alpha", 3, "--r", 2]
    assert main(["finetune", *map(str, usual), *words.split()]) in (1, 2)
    err = capsys.readouterr().err
    assert err.removeprefix("minilora: ").removeprefix("minilora finetune: ").startswith(told) and len(err) < 320
    assert "_modules" not in err and "_pattern" not in err and err.count("There are: ") <= 1


def test_what_a_file_says_of_modules_is_no_flag():
    for text in ("a.json: target_modules ['x'] match no Linear layer. There are: a", "a.json: rank_pattern 'x' takes"):
        assert for_command_line(text) == text


def test_every_setting_has_the_flag_that_it_is_called_by():
    flags = parser_of("finetune").flags
    assert [field.name for field in fields(FineTuneConfig) if flag_of(field.name) not in flags] == []


def test_a_setting_is_called_as_its_flag_is():
    with pytest.raises(ValueError) as refusal:
        FineTuneConfig(base="b", data="d", out="o", alpha=1, save_every=0)
    told = for_command_line(str(refusal.value))
    assert told == "--save-every must be a whole number of at least 1; got 0"
    assert for_command_line("FineTuneConfig: log_file must be x").startswith("--log must be")
