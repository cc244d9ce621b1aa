"""The wheel holds all of the package: installed outside the clone, it runs the demo."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from program import ROOT

import minilora


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The path of a wheel, built from a copy of the sources: building leaves its own folders beside them."""
    for name, oldest in (("pip", 21), ("setuptools", 71)):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "0"
        if int(version.split(".")[0]) < oldest:
            pytest.skip(f"a wheel is built with {name} {oldest} or newer, here is {version}: pip install -e '.[test]'")
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "sources"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "minilora", sources / "minilora", ignore=ignored)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    pip("wheel", ".", "--no-deps", "--no-build-isolation", "--wheel-dir", "built", cwd=sources)
    (path,) = (sources / "built").glob("*.whl")
    return path


def pip(*arguments, cwd):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--no-cache-dir", *arguments]
    ended = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The folder that the wheel was installed in, far from the clone."""
    folder = tmp_path_factory.mktemp("elsewhere")
    pip("install", "--no-deps", "--no-index", "--target", str(folder / "packages"), str(wheel), cwd=folder)
    return folder / "packages"


def run(installed, folder, *command):
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_every_file_of_the_package_is_in_the_wheel_and_nothing_else(wheel):
    files = [*(ROOT / "minilora").rglob("*.py"), *(ROOT / "minilora" / "cli" / "page").iterdir()]
    sources = {path.relative_to(ROOT).as_posix() for path in files}
    assert {"minilora/lora.py", "minilora/disk/peft.py", "minilora/training/loop.py", "minilora/cli/demo.py",
            "minilora/cli/page/page.html"} <= sources
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
    assert names == sources
    assert wheel.name == f"minilora-{minilora.__version__}-py3-none-any.whl"


def test_the_wheel_brings_what_the_commands_need_and_no_extra_of_old(wheel):
    with zipfile.ZipFile(wheel) as file:
        (metadata,) = [name for name in file.namelist() if name.endswith(".dist-info/METADATA")]
        lines = file.read(metadata).decode().splitlines()
    needed = {line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")}
    always = {line.split(">")[0].strip() for line in needed if "extra ==" not in line}
    assert always == {"numpy", "safetensors", "tokenizers", "gguf", "jinja2", "tqdm", "threadpoolctl", "ml_dtypes",
                      "regex"}  # fmt: skip
    extras = {line.removeprefix("Provides-Extra: ") for line in lines if line.startswith("Provides-Extra: ")}
    assert extras == {"test", "peers", "plot", "mpi", "cuda12", "cuda13"}


def test_the_demo_runs_from_the_wheel_outside_the_clone(installed, tmp_path):
    place = run(installed, tmp_path, sys.executable, "-c", "import minilora; print(minilora.__file__)")
    assert place.stdout.strip() == str(installed / "minilora" / "__init__.py")
    ended = run(installed, tmp_path, sys.executable, "-m", "minilora", "demo", "--quick")
    assert ended.returncode == 0, ended.stderr
    assert "bit-identical" in ended.stdout and (tmp_path / "minilora-demo-quick" / "security").is_dir()


def test_the_wheel_brings_the_command(installed, tmp_path):
    script = installed / ("Scripts" if os.name == "nt" else "bin") / ("minilora.exe" if os.name == "nt" else "minilora")
    ended = run(installed, tmp_path, str(script), "--version")
    assert (ended.returncode, ended.stdout) == (0, f"minilora {minilora.__version__}\n")
