"""The package itself: what `import minilora` needs, and that a public name is what it says, whoever came first."""

import importlib.metadata
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import minilora

ROOT = Path(__file__).resolve().parent.parent
# All that the package needs besides NumPy.
OTHERS = ["safetensors", "tokenizers", "tqdm", "threadpoolctl", "ml_dtypes", "gguf", "jinja2", "regex"]
CHECK = """
import minilora
import numpy as np

minilora.check_vjp(np.sin, lambda dy, x: dy * np.cos(x), np.arange(6.0))
try:
    minilora.check_vjp(np.sin, lambda dy, x: -dy * np.cos(x), np.arange(6.0))
except minilora.GradientError:
    print("the checker checks")
"""


def python(code, *, executable=sys.executable, **environment):
    """What a process of its own prints; it must end well."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    ended = subprocess.run([executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_importing_the_package_loads_not_even_numpy():
    assert python("import minilora, sys; print('numpy' in sys.modules, minilora.__version__)").split() == [
        "False", minilora.__version__]  # fmt: skip


def test_the_checker_needs_numpy_alone():
    absent = f"import sys\nsys.modules.update(dict.fromkeys({OTHERS}))\n"
    assert python(absent + CHECK) == "the checker checks\n"


def test_the_book_trains_an_adapter_with_numpy_alone():
    code = f"""
import sys
sys.modules.update(dict.fromkeys({OTHERS}))
import numpy as np
from minilora import GPT, Adam, GPTConfig, LoRAConfig, attach, generate, init_adapter, merge, parameter_report, stack

rng = np.random.default_rng(0)
base = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=11, block_size=8), rng)
adapter = init_adapter(base, LoRAConfig(r=2, alpha=4, target_modules=["q_proj"]), rng)
model = attach(base, adapter)
ids = rng.integers(0, 11, (2, 6))
model.loss(ids[:, :-1], ids[:, 1:]).backward()
Adam(adapter.parameters(), lr=1e-2).step()
both = attach(base, stack([adapter, None]))
print(generate(merge(model), ids, 2).shape, parameter_report(model).trainable, both(ids).shape)
try:
    import minilora
    minilora.save_model(base, "x")
except ImportError as error:
    print(error.name)
"""
    assert python(code) == "(2, 8) 32 (2, 6, 11)\nsafetensors\n"


@pytest.fixture(scope="module")
def only_numpy(tmp_path_factory):
    """The Python of an environment that holds NumPy and nothing else, made without a network."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, symlinks=os.name != "nt", with_pip=False)
    scripts = folder / ("Scripts" if os.name == "nt" else "bin")
    (packages,) = [path for path in folder.rglob("site-packages") if path.is_dir()]
    installed = Path(sysconfig.get_path("platlib"))
    try:
        for path in installed.glob("numpy*"):
            (packages / path.name).symlink_to(path, target_is_directory=path.is_dir())
    except OSError as error:
        pytest.skip(f"no symbolic links can be made here: {error}")
    executable = scripts / ("python.exe" if os.name == "nt" else "python")
    if not (packages / "numpy").exists():
        pytest.skip(f"NumPy is not installed in {installed}, so that it cannot be shared with another environment")
    return str(executable)


def test_in_an_environment_with_numpy_and_nothing_else_the_checker_works(only_numpy):
    found = python(f"from importlib.util import find_spec\nprint([n for n in {OTHERS} if find_spec(n)])",
                   executable=only_numpy)  # fmt: skip
    assert found == "[]\n"
    assert python(CHECK, executable=only_numpy) == "the checker checks\n"
    code = "import sys\nfrom minilora.__main__ import main\nsys.argv[1:] = []\nmain()"
    assert python(code, executable=only_numpy).startswith(f"minilora {minilora.__version__}")


CLASHING = [name for name in minilora.__all__ if (ROOT / "minilora" / f"{name}.py").exists()]
FIRST = {
    "nothing": "",
    "the file": "import minilora.{name}",
    "what is in the file": "from minilora.{name} import *",
    "a file that imports it": "import minilora.cli.demo",
    "the function": "from minilora import {name}",
    "the function, then the file": "from minilora import {name}\nimport minilora.{name}",
    "the file, through importlib": "import importlib\nimportlib.import_module('minilora.{name}')",
    "all public names": "from minilora import *",
}


def test_some_public_functions_have_the_names_of_files():
    assert CLASHING == ["generate", "gradcheck", "stack"]


# Every way for one of them; for the others what would show that they had been left out.
WAYS = [(CLASHING[0], first) for first in FIRST]
WAYS += [(name, first) for name in CLASHING[1:] for first in ("nothing", "the file")]


@pytest.mark.parametrize("name, first", WAYS)
def test_a_function_is_stronger_than_a_file_whatever_was_imported_first(name, first):
    code = f"""
{FIRST[first].format(name=name)}
import sys
import minilora
from minilora import {name}
print(callable({name}), minilora.{name} is {name}, {name} is sys.modules["minilora.{name}"].{name})
"""
    assert python(code) == "True True True\n"


def test_every_public_name_is_found_and_listed():
    assert minilora.__all__ == sorted(set(minilora.__all__))
    assert set(minilora.__all__) <= set(dir(minilora))
    for name in minilora.__all__:
        value = getattr(minilora, name)
        assert value.__name__ == name and value.__module__.startswith("minilora.")


def test_files_and_floors_are_found_as_attributes():
    code = "import minilora\nprint(minilora.nn.Linear.__name__, minilora.disk.__name__)"
    assert python(code) == "Linear minilora.disk\n"


@pytest.mark.parametrize("name", ["load_modle", "_private", "__wrapped__"])
def test_a_name_that_is_none_is_an_attribute_error(name):
    with pytest.raises(AttributeError, match=f"module 'minilora' has no attribute '{name}'"):
        getattr(minilora, name)


def test_the_installed_version_is_that_of_the_package():
    assert importlib.metadata.version("minilora") == minilora.__version__
