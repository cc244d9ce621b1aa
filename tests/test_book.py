"""The rules of the house, read off the source itself: what may import what, what is documented, what may not exist."""

import ast
import configparser
import doctest
import importlib
import re
import sys
from pathlib import Path

import pytest

import minilora

ROOT = Path(__file__).resolve().parent.parent
# The reading order, and under it the floors, each with its own: a file imports only what stands before it.
BOOK = ["backend", "graph", "tensor", "functional", "gradcheck", "nn", "optim", "gpt", "lora_config", "lora"]
FLOORS = {
    "book": ["backend", "kernels", "graph", "tensor", "functional", "packed", "lean", "structure", "mistakes",
             "differences", "verdict", "subject", "compare", "directions", "gradcheck", "nn", "quant", "optim",
             "decoder", "gpt", "llama", "patterns", "lora_config", "fits", "lora", "method", "dora", "ia3", "bias_only",
             "bottleneck", "prefix", "prompt", "generate", "stack", "low_rank", "compose", "architectures", "count",
             "step_cost", "memory"],
    "disk": ["characters", "checks", "reading", "receipt", "lfs", "tensor_file", "lock", "folder", "family",
             "gpt2", "rotary_fields", "llama", "own", "bases", "gguf_file", "gguf_fields", "gguf_vocabulary", "gguf",
             "gguf_companions", "base_files", "models", "c_attn", "peft_config", "adapter_file", "versions", "peft",
             "method_file", "loaders", "rounding", "template_sizes", "template_sandbox", "chat_template",
             "tokenizer_file", "vocabulary", "conversation",
             "token_stream", "tokenizer", "quantized"],
    "training": ["corpus", "batches", "text_files", "datasets", "threads", "parts", "loop", "workers", "checkpoint",
                 "progress", "finetune_config", "learned", "run_file", "provenance", "run_log", "steps", "finetune"],
    "cli": ["ctrl_c", "messages", "parser", "keyboard", "folders", "questions", "text_stream", "generation",
            "commands", "comparison", "plot", "chat", "history", "inspect", "counting", "playground", "asking",
            "demo_tables", "demo_run", "demo", "demo_base", "hardware", "config_file", "shared_options", "options",
            "finetune_options", "finetuning", "table", "advice", "main"],
}
ORDER = [name if floor == "book" else f"{floor}.{name}" for floor, names in FLOORS.items() for name in names]
# Though one stands after the other, neither may know it.
STRANGERS = {("gpt", "lora"), ("lora", "gpt"), ("lora", "llama"), ("llama", "gpt")}
# Everyone may import NumPy, nobody the rest.
GUESTS = {"patterns": {"regex"},
          "disk.tensor_file": {"safetensors", "ml_dtypes"}, "disk.tokenizer": {"tokenizers"}, "disk.rounding": {"tqdm"},
          "disk.tokenizer_file": {"tokenizers"},
          "disk.gguf_file": {"gguf"}, "disk.gguf": {"gguf"}, "disk.gguf_vocabulary": {"tokenizers"},
          "disk.vocabulary": {"tokenizers"}, "disk.template_sandbox": {"jinja2"},
          "disk.template_sizes": {"jinja2"},
          "training.datasets": {"tqdm"}, "training.loop": {"tqdm"}, "training.threads": {"threadpoolctl"},
          "training.workers": {"mpi4py"},
          "cli.commands": {"tqdm"}, "cli.comparison": {"tqdm"}, "cli.plot": {"matplotlib"}, "cli.generation": {"tqdm"},
          "disk.quantized": {"tqdm"}}  # fmt: skip


def dotted(path):
    """The name of a source file below the package: disk/folder.py is disk.folder."""
    return ".".join(path.relative_to(ROOT / "minilora").with_suffix("").parts)


SOURCES = {dotted(path): path.read_text(encoding="utf-8") for path in sorted((ROOT / "minilora").rglob("*.py"))}
MODULES = [name for name in SOURCES if name.rpartition(".")[2] not in ("__init__", "__main__")]
NOT_OURS = re.compile(
    r"\.(?!ci$|gitignore$).*|__pycache__|build|dist|shared|out|(minilora|gpt2)-(demo.*|labs)|.*\.egg-info"
)


# The rules: each takes the source of one file and returns what is wrong with it, as lines.


def imported(name, node):
    """(outer, inner): the packages that an import names, and the modules of ours, by their dotted names."""
    if isinstance(node, ast.Import):
        return [alias.name.partition(".")[0] for alias in node.names], []
    if not node.level:
        return [node.module.partition(".")[0]], []
    above = name.split(".")[: -node.level]
    below = [*above, *(node.module.split(".") if node.module else [])]
    if ".".join(below) in ORDER:
        return [], [".".join(below)]
    # The version stands in the package itself, which is no file of a floor.
    return [], [".".join([*below, alias.name]) for alias in node.names if alias.name != "__version__"]


def imports_out_of_order(name, source):
    """`name` may import NumPy, the standard library, its guests, and the files that come before it in ORDER.

    As rules that can be said aloud: the book knows nothing of files; disk knows nothing of training; training knows
    nothing of the command line.
    """
    if name not in ORDER:
        return [f"{name} has no place in the reading order; give it one in FLOORS"]
    wrong = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        outer, inner = imported(name, node)
        for module in outer:
            if module == "minilora":
                wrong.append(f"line {node.lineno}: a file of the package imports its neighbours with a dot")
            elif module not in sys.stdlib_module_names and module not in {"numpy", *GUESTS.get(name, ())}:
                wrong.append(f"line {node.lineno}: {name} imports {module}")
        for module in inner:
            if module not in ORDER or ORDER.index(module) >= ORDER.index(name):
                wrong.append(f"line {node.lineno}: {name} imports {module}, which does not come before it")
            if (name, module) in STRANGERS:
                wrong.append(f"line {node.lineno}: {name} imports {module}, and they are not to know each other")
    return wrong


def global_state(source):
    """At module level only constants (CAPITALS, never written to again), named tuples and context variables."""
    tree, names, wrong = ast.parse(source), set(), []
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            maker = node.value.func if isinstance(node.value, ast.Call) else None
            maker = getattr(maker, "attr", getattr(maker, "id", None))
            for target in targets:
                for name in [n.id for n in ast.walk(target) if isinstance(n, ast.Name)]:
                    names.add(name)
                    constant = name.strip("_").isupper() or name in ("__all__", "__version__")
                    if isinstance(node, ast.AugAssign) or not (constant or maker in ("ContextVar", "namedtuple")):
                        wrong.append(f"line {node.lineno}: {name} is a variable at module level")
    writers = {"append", "extend", "insert", "add", "update", "setdefault", "pop", "popitem", "clear", "remove",
               "discard", "sort"}  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            wrong.append(f"line {node.lineno}: global {', '.join(node.names)}")
        elif isinstance(node, (ast.Subscript, ast.Attribute)) and isinstance(node.ctx, (ast.Store, ast.Del)):
            if isinstance(node.value, ast.Name) and node.value.id in names:
                wrong.append(f"line {node.lineno}: {node.value.id} is written to")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in writers:
            if isinstance(node.func.value, ast.Name) and node.func.value.id in names:
                wrong.append(f"line {node.lineno}: {node.func.value.id}.{node.func.attr}() changes a constant")
    return wrong


def global_randomness(source):
    """Random numbers come from a Generator that was made from a seed and handed in."""
    allowed, wrong = {"default_rng", "Generator", "SeedSequence"}, []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute) and node.value.attr == "random":
            if node.attr not in allowed:
                wrong.append(f"line {node.lineno}: {ast.unparse(node)} draws from a state that everyone shares")
        elif isinstance(node, ast.Import) and any(a.name in ("random", "numpy.random") for a in node.names):
            wrong.append(f"line {node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.ImportFrom) and node.module in ("random", "numpy.random"):
            wrong += [f"line {node.lineno}: {a.name}" for a in node.names if a.name not in allowed]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("default_rng"):
            if not node.args and not node.keywords:
                wrong.append(f"line {node.lineno}: default_rng() without a seed cannot be repeated")
    return wrong


def boundary_missing(source):
    """A file opens with one line that says what it is about, or what it knows and what it does not."""
    docstring = ast.get_docstring(ast.parse(source))
    if not docstring:
        return ["there is no module docstring"]
    first, _, rest = docstring.partition("\n")
    wrong = [] if first.endswith((".", ":")) and 20 <= len(first) <= 116 else [f"not a sentence on one line: {first!r}"]
    return wrong + (["the opening line is not followed by an empty one"] if rest and not rest.startswith("\n") else [])


def legend_missing(source):
    """The letters of the shapes are explained once, at the top of the file."""
    legend = re.search(r"^Shapes: .*(\n.+)*", ast.get_docstring(ast.parse(source)) or "", re.MULTILINE)
    if not legend:
        return ["no line that starts with Shapes:"]
    return [f"{letter} is not explained" for letter in "BTCHV" if not re.search(rf"\b{letter}\b \w", legend[0])]


def long_lines(source):
    """No line of code or prose is longer than 100 characters."""
    lines = enumerate(source.splitlines(), 1)
    return [f"line {i}: {len(line)} characters" for i, line in lines if len(line) > 100]


def several_bindings(source):
    """One name is bound in a line, unless the right side is one call, one name or the shape of one array."""
    wrong = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], (ast.Tuple, ast.List)):
            constants = isinstance(node.value, ast.Tuple) and all(_is_number(item) for item in node.value.elts)
            if not isinstance(node.value, (ast.Call, ast.Name, ast.Attribute, ast.Subscript)) and not constants:
                wrong.append(f"line {node.lineno}: {ast.unparse(node.targets[0])} are bound at once")
        elif isinstance(node, ast.Assign) and len(node.targets) > 1:
            wrong.append(f"line {node.lineno}: one value is bound to several names")
    return wrong


def _is_number(node):
    node = node.operand if isinstance(node, ast.UnaryOp) else node
    return isinstance(node, ast.Constant) and isinstance(node.value, (int, float))


def times_a_condition(source):
    """A text or a list is multiplied by a number that counts, never by a condition that keeps or drops it."""
    wrong = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            for literal, factor in ((node.left, node.right), (node.right, node.left)):
                is_text = isinstance(literal, ast.Constant) and isinstance(literal.value, str)
                several = is_text and len(literal.value) > 1
                condition = isinstance(factor, (ast.Compare, ast.BoolOp)) or (
                    isinstance(factor, ast.UnaryOp) and isinstance(factor.op, ast.Not)) or (
                    isinstance(factor, ast.Call) and ast.unparse(factor.func) in ("bool", "isinstance", "any", "all"))
                text = isinstance(literal, (ast.JoinedStr, ast.Constant)) and (several or condition)
                if (text and not _is_number(factor)) or (isinstance(literal, (ast.List, ast.Tuple)) and condition):
                    wrong.append(f"line {node.lineno}: {ast.unparse(node)}")
    return wrong


def undecided_errors(source):
    """Which error is raised, and what it says, is decided by an if above it, not inside its arguments."""
    raises = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Raise) and node.exc]
    return [f"line {node.lineno}: a conditional in {ast.unparse(node.exc)[:60]}" for node in raises
            if any(isinstance(part, ast.IfExp) for part in ast.walk(node.exc))]  # fmt: skip


def empty_sections(source):
    """A docstring that has nothing to say of shapes, errors or sources does not say so."""
    return re.findall(r"(?:Shapes|Raises|Source): (?:none|nothing|touches no)\b.*", source)


def public_without_docstring(source):
    """Every public function, class and method says what it does; `__call__` is described by its class."""
    wrong = []

    def visit(body):
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                if not ast.get_docstring(node) and "setter" not in ast.unparse(node).partition("\n")[0]:
                    wrong.append(f"line {node.lineno}: {node.name} has no docstring")
                if isinstance(node, ast.ClassDef):
                    visit(node.body)

    visit(ast.parse(source).body)
    return wrong


def machine_paths(text):
    """Nothing in the repository depends on, or tells of, the machine it was written on."""
    places = "home|Users|root|tmp|mnt|work|workspace|scratch"
    return re.findall(rf"(?<![\w./:$}}-])/(?:{places})/\w[\w./-]*|\b[A-Z]:\\Users\b", text)


# The book keeps them.

every_module = pytest.mark.parametrize("name", MODULES)


@every_module
def test_a_file_imports_only_what_was_read_before_it(name):
    assert imports_out_of_order(name, SOURCES[name]) == []


def test_the_front_page_lists_the_reading_order():
    named = re.search(r"Reading order: ([\w, \n]+)\.", minilora.__doc__)[1]
    assert re.findall(r"\w+", named) == BOOK


def test_every_file_of_the_book_is_there():
    assert set(BOOK) <= set(MODULES)


@every_module
def test_a_file_has_no_global_state(name):
    assert global_state(SOURCES[name]) == []


@pytest.mark.parametrize("folder", ["minilora", "examples", "tests"])
def test_no_random_number_comes_from_a_shared_state(folder):
    sources = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / folder).rglob("*.py"))}
    sources.pop(Path(__file__).name, None)  # its planted violations are strings, but let it say default_rng()
    assert {name: wrong for name, source in sources.items() if (wrong := global_randomness(source))} == {}


@pytest.mark.parametrize("name", SOURCES)
def test_a_file_opens_with_its_boundary(name):
    assert boundary_missing(SOURCES[name]) == []


@pytest.mark.parametrize("name", ["functional", "gpt"])
def test_the_letters_of_the_shapes_are_explained(name):
    assert legend_missing(SOURCES[name]) == []


@every_module
def test_a_file_has_room_to_breathe(name):
    rules = [long_lines, several_bindings, times_a_condition, undecided_errors, empty_sections]
    assert {rule.__name__: wrong for rule in rules if (wrong := rule(SOURCES[name]))} == {}


@every_module
def test_every_public_definition_has_a_docstring(name):
    assert public_without_docstring(SOURCES[name]) == []


def test_no_file_mentions_a_path_of_some_machine():
    found = {}
    # A virtual environment in the clone, whatever its name.
    environments = {config.parent for config in ROOT.rglob("pyvenv.cfg")}
    for path in ROOT.rglob("*"):
        inside = path.relative_to(ROOT).parts
        if any(NOT_OURS.fullmatch(part) for part in inside) or not path.is_file():
            continue
        if not environments.isdisjoint(path.parents):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # an array or a picture
        if paths := machine_paths(text):
            found["/".join(inside)] = paths
    assert found == {}


# The examples in docstrings run.


def docstring_examples(name):
    module = importlib.import_module(f"minilora.{name}")
    return [test for test in doctest.DocTestFinder(exclude_empty=True).find(module) if test.examples]


@pytest.mark.parametrize("name", BOOK)
def test_docstring_examples_print_what_they_say(name):
    for test in docstring_examples(name):
        assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False).run(test).failed == 0


def test_every_docstring_with_a_prompt_is_found_as_an_example():
    found = {test.name.rpartition(".")[2] for name in MODULES for test in docstring_examples(name)}
    prompting = {name for name in minilora.__all__ if ">>>" in (getattr(minilora, name).__doc__ or "")}
    assert {"Tensor", "no_grad", "gradcheck", "check_vjp", "GPT", "LoRAConfig", "Adam"} <= prompting
    assert prompting <= found


def test_the_test_command_collects_docstrings():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg", encoding="utf-8")
    assert "--doctest-modules" in settings["tool:pytest"]["addopts"]
    assert {"tests", "minilora"} <= set(settings["tool:pytest"]["testpaths"].split())


@pytest.mark.parametrize("fine", [
    "a, b = f(x)", "B, T, C = x.shape", "a = 1\nb = 2", "q, k, v = qkv", "low, high = 1, -2", "line = '-' * width",
    "row = [None] * n", "x = 'ab' * 3", "raise ValueError(why)",
])  # fmt: skip
def test_plain_code_is_left_alone(fine):
    rules = (long_lines, several_bindings, times_a_condition, undecided_errors, empty_sections)
    assert [found for rule in rules for found in rule(fine)] == []


# The rules can fail: each finds the violation planted for it.

in_lora = lambda source: imports_out_of_order("lora", source)
in_gpt2 = lambda source: imports_out_of_order("disk.gpt2", source)
in_parts = lambda source: imports_out_of_order("training.parts", source)
PLANTED = [
    (in_lora, "from .stack import stack", "does not come before it"),
    (in_lora, "from .disk.folder import save_folder", "imports disk.folder, which does not come before it"),
    (in_lora, "from .disk import folder", "imports disk.folder, which does not come before it"),
    (in_gpt2, "from ..training import parts", "imports training.parts, which does not come before it"),
    (in_gpt2, "from .peft import PREFIX", "imports disk.peft, which does not come before it"),
    (in_parts, "from ..cli.demo import run", "imports cli.demo, which does not come before it"),
    (in_lora, "from .gpt import GPT", "not to know each other"),
    (lambda s: imports_out_of_order("gpt", s), "def f():\n    from . import lora", "not to know each other"),
    (in_lora, "import torch", "imports torch"),
    (in_lora, "import cupy as cp", "imports cupy"),
    (in_lora, "from tqdm import tqdm", "imports tqdm"),
    (in_lora, "from scipy.linalg import svd", "imports scipy"),
    (in_lora, "import minilora.tensor", "with a dot"),
    (in_lora, "from .lora import LoRAConfig", "does not come before it"),
    (lambda s: imports_out_of_order("newcomer", s), "", "no place in the reading order"),
    (global_state, "cache = {}", "cache is a variable"),
    (global_state, "device: str = 'cpu'", "device is a variable"),
    (global_state, "LAYERS = []\ndef f(x):\n    LAYERS.append(x)", "LAYERS.append() changes"),
    (global_state, "TABLE = {}\ndef f(x):\n    TABLE[x] = 1", "TABLE is written to"),
    (global_state, "COUNT = 0\ndef f():\n    global COUNT\n    COUNT += 1", "global COUNT"),
    (global_randomness, "import numpy as np\nnp.random.seed(0)", "np.random.seed"),
    (global_randomness, "import numpy\nx = numpy.random.rand(3)", "numpy.random.rand"),
    (global_randomness, "from numpy.random import randn", "randn"),
    (global_randomness, "import random", "import random"),
    (global_randomness, "rng = np.random.default_rng()", "without a seed"),
    (boundary_missing, "import os", "no module docstring"),
    (boundary_missing, '"""Utilities"""', "not a sentence"),
    (boundary_missing, '"""What this file does, told in a sentence\nthat goes over two lines."""', "not a sentence"),
    (boundary_missing, '"""One sentence that says it all.\nAnd straight on."""', "not followed by an empty one"),
    (legend_missing, '"""Operations on arrays."""', "no line"),
    (legend_missing, '"""Operations.\n\nShapes: B batch, T time, C channels, H heads."""', "V is not explained"),
    (long_lines, "x = 1  # " + 100 * "a", "109 characters"),
    (several_bindings, "a, b = 1, f(x)", "(a, b) are bound at once"),
    (several_bindings, "(B, T), n = x.shape if x.ndim == 2 else (0, 0), 3", "are bound at once"),
    (several_bindings, "a = b = 0", "several names"),
    (times_a_condition, "s = 'and more' * (n > 8)", "and more"),
    (times_a_condition, "s = f' and {n} more' * (n > 8)", "more"),
    (times_a_condition, "s = ' --quick' * args.quick", "quick"),
    (times_a_condition, "s = ['bias'] * bool(x)", "bias"),
    (undecided_errors, "raise ValueError('a' if x else 'b')", "a conditional in"),
    (undecided_errors, "raise ValueError(f'{x if x else 1}')", "a conditional in"),
    (empty_sections, '"""A report.\n\nShapes: none."""', "Shapes: none"),
    (public_without_docstring, "def f(x):\n    return x", "f has no docstring"),
    (public_without_docstring, "class A:\n    'a'\n    def f(self):\n        return 1", "f has no docstring"),
    (machine_paths, "data = open('/ho" + "me/ada/weights.bin')", "ada/weights.bin"),
    (machine_paths, "cd /wo" + "rk/project", "project"),
    (machine_paths, "C" + r":\Users\ada", "Users"),
]


@pytest.mark.parametrize("rule, planted, complaint", PLANTED, ids=[complaint for _, _, complaint in PLANTED])
def test_a_rule_finds_the_violation_planted_for_it(rule, planted, complaint):
    assert complaint in "\n".join(rule(planted))


@pytest.mark.parametrize("allowed", ["https://example.org/home/page", "a/tmp/b", "and/or", "pip install ./work"])
def test_addresses_and_relative_paths_are_no_machine_paths(allowed):
    assert machine_paths(allowed) == []


def test_a_wrong_docstring_example_is_noticed():
    example = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "planted", None, 0)
    runner = doctest.DocTestRunner(verbose=False)
    assert runner.run(example, out=lambda text: None).failed == 1
