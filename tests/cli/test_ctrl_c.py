"""Ctrl-C and SIGTERM, wherever they fall: in imports, in commands, in examples. Each time one line, and 130 or 143."""

import os
import re
import signal
import time

import pytest
from program import ROOT, TEXT, finish, start, start_python
from strategies import character_gpt

from minilora import save_model
from minilora.cli.ctrl_c import report_interrupt

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
posix = pytest.mark.skipif(os.name != "posix", reason="sends SIGINT to a process")
SENDS_CTRL_C = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"


@pytest.fixture
def numpy_with_ctrl_c(tmp_path):
    """A folder with a package `numpy` in it, during whose import Ctrl-C is pressed."""
    (tmp_path / "before" / "numpy").mkdir(parents=True)
    (tmp_path / "before" / "numpy" / "__init__.py").write_text(SENDS_CTRL_C)
    return tmp_path / "before"


@posix
@pytest.mark.parametrize("command", [
    "demo --quick", "finetune --help", "generate --base b --prompt x", "merge --base b --adapter a --out o",
    "inspect .", "compare a b --data c.txt",
])  # fmt: skip
def test_ctrl_c_during_the_imports_of_a_command_is_one_line(command, tmp_path, numpy_with_ctrl_c):
    process = start(tmp_path, *command.split(), path=[numpy_with_ctrl_c])
    assert finish(process) == (130, "", "minilora: interrupted\n")


@posix
def test_sigterm_is_told_as_ctrl_c_is_and_the_exit_code_says_which_it_was(tmp_path, numpy_with_ctrl_c):
    path = numpy_with_ctrl_c / "numpy" / "__init__.py"
    path.write_text(path.read_text().replace("SIGINT", "SIGTERM"))
    process = start(tmp_path, "finetune", "--help", path=[numpy_with_ctrl_c])
    assert finish(process) == (143, "", "minilora: interrupted\n")


@posix
@pytest.mark.parametrize("module", ["argparse", "shlex", "difflib"])
def test_ctrl_c_during_the_imports_of_the_program_itself_is_one_line(module, tmp_path):
    (tmp_path / f"{module}.py").write_text(SENDS_CTRL_C)
    code = f"""
import runpy, sys
sys.modules.pop({module!r}, None)
sys.path.insert(0, {str(tmp_path)!r})
sys.argv = ["minilora", "--version"]
runpy.run_module("minilora", run_name="__main__")
"""
    assert finish(start_python(tmp_path, "-c", code)) == (130, "", "minilora: interrupted\n")


@posix
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_ctrl_c_during_the_imports_of_an_example_is_one_line(example, tmp_path, numpy_with_ctrl_c):
    process = start_python(tmp_path, str(example), "--quick", path=[numpy_with_ctrl_c])
    assert finish(process) == (130, "", f"{example.name}: interrupted\n")


SCRIPT = """
from minilora.cli.ctrl_c import one_line_on_ctrl_c

one_line_on_ctrl_c()

print("before")
{}
print("after")
"""


def ran(folder, statement):
    (folder / "script.py").write_text(SCRIPT.format(statement))
    return finish(start_python(folder, "script.py", buffered=True))


@posix
def test_ctrl_c_in_a_script_is_one_line_and_leaves_what_was_printed(tmp_path):
    assert ran(tmp_path, SENDS_CTRL_C) == (130, "before\n", "script.py: interrupted\n")


def test_an_interrupt_that_says_something_is_told_in_its_words(tmp_path):
    statement = "from minilora.training.loop import Interrupted\nraise Interrupted('step 3 of 5')"
    assert ran(tmp_path, statement) == (130, "before\n", "script.py: step 3 of 5\n")


def test_any_other_error_of_a_script_is_told_as_python_tells_it(tmp_path):
    code, out, err = ran(tmp_path, "raise ValueError('wrong')")
    assert (code, out) == (1, "before\n") and err.startswith("Traceback") and err.endswith("ValueError: wrong\n")


def test_on_a_terminal_the_line_begins_below_what_ctrl_c_has_printed(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert report_interrupt("minilora", KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "\nminilora: interrupted\n"


def has_ended(group):
    """Is no process of the group left, within a minute?"""
    for _ in range(600):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def until_steps_are_done(process, log):
    size = log.stat().st_size if log.exists() else 0
    while process.poll() is None and not (log.exists() and log.stat().st_size > size + 1500):
        time.sleep(0.05)


@posix
def test_sigterm_leaves_what_ctrl_c_leaves_also_where_ctrl_c_is_ignored_and_the_run_goes_on(tmp_path):
    """A shell has what it starts in the background ignore Ctrl-C."""
    save_model(character_gpt(n_embd=8), tmp_path / "base")
    (tmp_path / "t.txt").write_text(TEXT)
    command = ["finetune", "--base", "base", "--data", "t.txt", "--out", "out", "--alpha", "4", "--length", "8",
               "--steps", "100000", "--log", "log.jsonl", "--quiet"]  # fmt: skip
    in_background = ["-c", "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); "
                     "os.execv(sys.executable, [sys.executable, '-m', 'minilora', *sys.argv[1:]])"]  # fmt: skip
    for words in (["-m", "minilora", *command], [*in_background, "finetune", "--resume", "--out", "out", "--quiet"]):
        process = start_python(tmp_path, *words)
        until_steps_are_done(process, tmp_path / "log.jsonl")
        process.send_signal(signal.SIGTERM)
        code, out, err = finish(process)
        assert (code, out) == (143, "") and err.count("\n") == 1
        told = r"minilora: interrupted after step \d+ of 100000, which is kept in out/checkpoint; to go on, give "
        assert re.fullmatch(told + "--resume and --out out\n", err)
        assert {path.name for path in (tmp_path / "out").iterdir()} == {"checkpoint"}


@posix
def test_a_run_on_workers_ends_with_ctrl_c_and_with_a_kill_and_leaves_no_process(tmp_path):
    """A terminal sends Ctrl-C to the workers as well. Whoever is killed has no time to tell them anything."""
    save_model(character_gpt(n_embd=8), tmp_path / "base")
    (tmp_path / "t.txt").write_text(TEXT)
    log = tmp_path / "log.jsonl"
    command = ["finetune", "--base", "base", "--data", "t.txt", "--out", "out", "--alpha", "4", "--length", "8",
               "--steps", "100000", "--save-every", "5", "--log", str(log), "--parts", "2", "--workers", "2"]

    def interrupted(send, *arguments):
        process = start(tmp_path, *command, *arguments, start_new_session=True)
        until_steps_are_done(process, log)
        send(process.pid)
        code, _, err = finish(process)
        assert has_ended(process.pid)
        return code, err

    code, err = interrupted(lambda pid: os.killpg(pid, signal.SIGINT))
    *_, last = err.rstrip().splitlines()
    assert code == 130 and "Traceback" not in err
    assert re.search(r"minilora: interrupted after step \d+ of 100000, which is kept in .*--resume and --out", last)
    code, err = interrupted(lambda pid: os.kill(pid, signal.SIGKILL), "--resume")
    assert code == -signal.SIGKILL and "Traceback" not in err


@posix
def test_ctrl_c_in_the_middle_of_an_example_is_one_line(tmp_path):
    """In the place of its first LoRA layer: all that it imports has been imported by then."""
    code = f"""
import os, runpy, signal, sys
import minilora.lora
minilora.lora.LoRALinear.__call__ = lambda self, x: os.kill(os.getpid(), signal.SIGINT)
sys.argv = ["merge.py", "--quick"]
runpy.run_path({str(ROOT / "examples" / "merge.py")!r}, run_name="__main__")
"""
    ended = finish(start_python(tmp_path, "-c", code, path=[ROOT / "examples"]))
    assert ended == (130, "", "merge.py: interrupted\n")
