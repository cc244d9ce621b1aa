"""`minilora finetune`: what it is given by flags, by a file and by a checkpoint, and which of them counts."""

import contextlib
import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import given as given_drawn
from hypothesis import strategies as st
from safetensors.numpy import load_file

from minilora import Adam, load_adapter, load_model
from minilora.cli import config_file, finetuning, folders
from minilora.cli.main import main
from minilora.cli.table import parser_of
from minilora.patterns import problem_of
from minilora.training import finetune, finetune_config, run_file, workers
from minilora.training.finetune_config import FineTuneConfig
from minilora.training.run_file import arrays_of
from minilora.training.threads import parts_and_threads

USUAL = ["--base", "b", "--data", "d.txt", "--out", "o", "--alpha", "3"]


@pytest.fixture
def given(monkeypatch, tmp_path):
    """What `finetune` is called with: (FineTuneConfig, options but for the log)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(folders, "find_sources", lambda *given: None)

    def given(*arguments, usual=USUAL):
        calls = []
        monkeypatch.setattr(finetune, "finetune", lambda *given, **options: calls.append((given, options)))
        assert main(["finetune", *usual, *map(str, arguments)]) == 0
        [((config, xp), options)] = calls
        assert xp is np and options.pop("log") and options.pop("command").startswith("minilora finetune ")
        return config, options

    return given


PLAIN = FineTuneConfig(base="b", data="d.txt", out="o", alpha=3.0)
# Each flag with a value that is not its default, and the settings that this makes.
FLAGS = [
    ("--quantize nf4", {"quantize": "nf4"}),
    ("--too-long drop", {"too_long": "drop"}),
    ("--length 9", {"length": 9}),
    ("--seed 4", {"seed": 4}),
    ("--r 5", {"r": 5}),
    ("--target q_proj,v_proj", {"target": ["q_proj", "v_proj"]}),
    (r"--target-regex h\.\d\.attn\.[qv]_proj", {"target": r"h\.\d\.attn\.[qv]_proj"}),
    ("--rank-pattern q_proj=4 h.0.mlp.*=2 --rank-pattern v_proj=1",
     {"rank_pattern": {"q_proj": 4, "h.0.mlp.*": 2, "v_proj": 1}}),
    ("--alpha-pattern q_proj=0.5 a=b=2", {"alpha_pattern": {"q_proj": 0.5, "a=b": 2.0}}),
    ("--rslora", {"rslora": True}),
    ("--dora", {"dora": True}),
    ("--dropout 0.5", {"dropout": 0.5}),
    ("--lr 0.1", {"lr": 0.1}),
    ("--schedule linear", {"schedule": "linear"}),
    ("--warmup 0", {"warmup": 0}),
    ("--weight-decay 0.01", {"weight_decay": 0.01}),
    ("--clip 0.3", {"clip": 0.3}),
    ("--steps 7", {"steps": 7}),
    ("--batch 3", {"batch": 3}),
    ("--accumulate 2", {"accumulate": 2}),
    ("--eval-split 0.25 --eval-every 3 --patience 2", {"eval_split": 0.25, "eval_every": 3, "patience": 2}),
    ("--log a.jsonl", {"log_file": "a.jsonl"}),
    ("--save-every 6", {"save_every": 6}),
    ("--keep 2", {"keep": 2}),
]  # fmt: skip


@pytest.mark.parametrize("words, changes", FLAGS, ids=[words for words, _ in FLAGS])
def test_a_flag_reaches_its_setting_and_so_does_its_line_in_a_file(words, changes, given, tmp_path):
    config, options = given(*words.split())
    assert config == replace(PLAIN, **changes)
    parts, threads = parts_and_threads(None, None, "numpy")
    assert options == {"resume": False, "quiet": False, "parts": parts, "threads": threads}
    fields = {"target_regex" if name == "target" and isinstance(value, str) else name: value
              for name, value in changes.items()}  # fmt: skip
    fields = {"log" if name == "log_file" else name: value for name, value in fields.items()}
    for dashed in (True, False):
        named = {name.replace("_", "-") if dashed else name: value for name, value in fields.items()}
        (tmp_path / "c.json").write_text(json.dumps(named))
        assert given("--config", "c.json") == (config, options)


def test_every_flag_of_a_setting_is_tried_here():
    tried = {word for words, _ in FLAGS for word in words.split() if word.startswith("--")}
    elsewhere = "base data out alpha config resume no-log quiet backend from-adapter accept-base full parts threads"
    elsewhere = {f"--{name}" for name in [*elsewhere.split(), "workers"]}
    flags = {flag for flag in parser_of("finetune").flags if flag not in ("-h", "--help")}
    assert flags - tried <= elsewhere and tried <= flags


def test_quiet_parts_and_threads_reach_the_run(given):
    _, options = given("--quiet", "--parts", 3, "--threads", 2)
    assert options == {"resume": False, "quiet": True, "parts": 3, "threads": 2}


# Files.


def test_what_is_typed_counts_more_than_what_is_in_the_file(given, tmp_path):
    (tmp_path / "c.json").write_text('{"lr": 1, "r": 2, "target": ["q_proj"], "alpha": 9, "threads": 1, "parts": 2}')
    config, options = given("--config", "c.json", "--lr", "0.5", "--target-regex", ".*v_proj", "--parts", "5")
    assert config == replace(PLAIN, lr=0.5, r=2, target=".*v_proj")
    assert (options["parts"], options["threads"]) == (5, 1)
    config, _ = given("--config", "c.json", "--from-adapter", "a", usual=USUAL[:-2])
    assert config == replace(PLAIN, alpha=None, lr=1.0, from_adapter="a")
    config, _ = given("--config", "c.json", "--full", usual=USUAL[:-2])
    assert config == replace(PLAIN, alpha=None, lr=1.0, full=True)


@pytest.mark.parametrize("in_file, typed", [("threads", "workers"), ("workers", "threads")])
def test_workers_and_threads_take_each_others_place(in_file, typed, given, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "process_pool", lambda n: contextlib.nullcontext(f"{n} processes"))
    (tmp_path / "c.json").write_text(f'{{"{in_file}": 2, "parts": 4}}')
    _, options = given("--config", "c.json", f"--{typed}", "3")
    expected = {"threads": 3} if typed == "threads" else {"threads": 1, "executor": "3 processes", "n_workers": 3}
    assert options == {"resume": False, "quiet": False, "parts": 4, **expected}


def test_false_in_a_file_is_what_was_not_said(given, tmp_path):
    (tmp_path / "c.json").write_text('{"quiet": false, "dora": false, "rslora": true}')
    config, options = given("--config", "c.json")
    assert config == replace(PLAIN, rslora=True) and options["quiet"] is False


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python reads TOML since 3.11")
def test_toml_says_the_same(given, tmp_path):
    (tmp_path / "c.toml").write_text('lr = 0.5\nrslora = true\ntarget = ["q_proj"]\n[rank-pattern]\n"h.0.*" = 3\n')
    config, _ = given("--config", "c.toml")
    assert config == replace(PLAIN, lr=0.5, rslora=True, target=["q_proj"], rank_pattern={"h.0.*": 3})


TWO_WORDS = [flag for flag in parser_of("finetune").flags
             if "-" in flag[2:] and flag[2:] not in config_file.NOT_IN_FILES]  # fmt: skip


@pytest.mark.parametrize("flag", TWO_WORDS)
def test_a_setting_given_twice_is_refused_whatever_its_value(flag, tmp_path, capsys):
    name = flag[2:]
    fields = {name: None, name.replace("-", "_"): None}
    (tmp_path / "c.json").write_text(json.dumps(fields))
    assert main(["finetune", *USUAL, "--config", str(tmp_path / "c.json")]) == 2
    assert f"{' and '.join(fields)} are one setting" in capsys.readouterr().err


def test_before_python_311_a_toml_is_told_to_be_written_as_json(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tomllib", None)
    (tmp_path / "c.toml").write_text("lr = 1")
    assert main(["finetune", *USUAL, "--config", str(tmp_path / "c.toml")]) == 1
    assert "to read TOML takes Python 3.11 or newer; write the same as a .json" in capsys.readouterr().err


BAD_FILES = [
    ('{"rank": 3}', 2, "c.json: there is no setting 'rank': did you mean r?"),
    ('{"xyzzy": 3}', 2, "c.json: there is no setting 'xyzzy';"),
    ('{"lr": "fast"}', 2, "c.json: argument --lr: must be a finite positive number, got 'fast'"),
    ('{"steps": 4.0}', 2, "c.json: argument --steps: must be a whole number of at least 1, got '4.0'"),
    ('{"steps": true}', 2, "c.json: steps must be a number or a text, got True"),
    ('{"lr": [1]}', 2, "c.json: lr must be a number or a text, got [1]"),
    ('{"dora": 1}', 2, "c.json: dora must be true or false, got 1"),
    ('{"target": []}', 2, "c.json: target is empty; leave it out"),
    ('{"target": [["a"]]}', 2, "c.json: target must be a number or a text, got ['a']"),
    ('{"target": {"a": 1}}', 2, "c.json: target must be a number or a text"),
    ('{"rank_pattern": {"a": 1.5}}', 2, "c.json: argument --rank-pattern: must be a whole number of at least 1"),
    ('{"rank_pattern": {"(": 1}}', 2, "c.json: argument --rank-pattern: '(' is not a regular expression"),
    ('{"schedule": "step"}', 2, "c.json: argument --schedule: invalid choice: 'step'"),
    ('{"resume": true}', 2, "c.json: resume is said on the command line, not in a file"),
    ('{"config": "d.json"}', 2, "c.json: config is said on the command line"),
    ('{"h": true}', 2, "c.json: there is no setting 'h';"),
    ('{"resum": true}', 2, "c.json: there is no setting 'resum';"),
    ('{"save-every": 3, "save_every": 7}', 2, "c.json: save-every and save_every are one setting; leave out one"),
    ('{"lr": 1, "lr": 2}', 1, "c.json is not JSON: the key 'lr' comes twice"),
    ('{"rank-pattern": {"a": 1, "a": 1}}', 1, "c.json is not JSON: the key 'a' comes twice"),
    ("[1]", 1, "c.json: expected an object with fields, got list"),
    ("{", 1, "c.json is not JSON"),
    ('{"target": ["a"], "target-regex": "a"}', 2, "--target-regex: it takes the place of --target"),
]


@pytest.mark.parametrize("text, code, told", BAD_FILES, ids=[text for text, *_ in BAD_FILES])
def test_a_file_with_something_else_in_it_is_refused_in_one_line_that_names_it(text, code, told, tmp_path, monkeypatch,
                                                                               capsys):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("c.json").write_text(text)
    assert main(["finetune", *USUAL, "--config", "c.json"]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and told in err


def test_a_file_that_is_none_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("folder.json").mkdir()
    Path("large.json").write_bytes(b" " * (2**20 + 1))
    for name, told in (("missing.json", "missing.json: No such file"),
                       ("folder.json", "folder.json is a folder, where a file is"),
                       ("a.yaml", "a.yaml: settings are a .json or a .toml file"),
                       ("large.json", "large.json has 1,048,577 bytes, and at most 1,048,576 are read")):  # fmt: skip
        assert main(["finetune", *USUAL, "--config", name]) == 1
        err = capsys.readouterr().err
        assert told in err and err.count("\n") == 1


# Two dashes alone end the options of a command: they are refused, see below.
names = st.text("abcxyz_.*0123456789\\\\[]()|=, -é", min_size=1).filter(
    lambda text: text != "--" and problem_of([text]) is None
)
positive = st.floats(1e-300, 1e300)
from_zero = st.integers(0, 10**9)
from_one = st.integers(1, 10**9)
maybe = lambda some: st.none() | some
OF_ALL = {
    "base": st.text("abc/ .-=é", min_size=1).filter(lambda text: text != "--"),
    "data": st.just("d.txt"), "out": st.just("o"),
    "lr": positive, "schedule": st.sampled_from(["cosine", "linear", "constant"]), "warmup": maybe(st.just(0)),
    "weight_decay": st.just(0.0) | positive, "clip": positive, "steps": st.integers(1, 500_000), "batch": from_one,
    "accumulate": from_one, "seed": from_zero, "eval_split": st.floats(0.01, 0.99), "length": maybe(from_one),
    "save_every": from_one, "too_long": maybe(st.sampled_from(["cut", "drop"])), "eval_every": maybe(from_one),
}  # fmt: skip
OF_LORA = {
    "dropout": st.floats(0, 0.99), "quantize": maybe(st.sampled_from(["nf4", "q8_0"])),
}  # fmt: skip
SHAPES = {
    "alpha": positive, "r": from_one, "dora": st.booleans(), "rslora": st.booleans(),
    "target": st.just("all-linear") | names | st.lists(st.from_regex(r"[a-z_.]+", fullmatch=True), min_size=1),
    "rank_pattern": st.dictionaries(names, from_one), "alpha_pattern": st.dictionaries(names, positive),
}  # fmt: skip
configs = st.one_of(
    st.fixed_dictionaries({**OF_ALL, **OF_LORA, **SHAPES}),
    st.fixed_dictionaries({**OF_ALL, **OF_LORA, "from_adapter": st.just("a"),
                           "accept_base": st.just(()) | st.just(["other-precision"])}),
    st.fixed_dictionaries({**OF_ALL, "full": st.just(True)}),
)


def read_back(given, config, parts):
    """The FineTuneConfig that the command makes of the file that repeats a run of `config`."""
    Path("run.json").write_text(json.dumps(run_file.settings_of(config, arrays_of(np, parts, False))))
    again, options = given("--config", "run.json", "--out", config.out, usual=[])
    assert options["parts"] == parts
    return again


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given_drawn(configs, st.integers(2, 9))
def test_whatever_the_settings_are_the_file_of_a_run_gives_them_back(given, fields, parts):
    config = FineTuneConfig(**fields)
    assert read_back(given, config, parts) == config


@pytest.mark.parametrize("name", ["base", "target_regex", "target"])
def test_two_dashes_are_no_value_that_a_file_could_have(name, capsys, monkeypatch, tmp_path):
    """argparse would drop them, and leave an empty list in their place."""
    monkeypatch.chdir(tmp_path)
    Path("c.json").write_text(json.dumps({name: ["--"] if name == "target" else "--"}))
    assert main(["finetune", "--config", "c.json", "--out", "o"]) == 2
    assert f"c.json: {name} cannot be '--'" in capsys.readouterr().err


def zeros_say_nothing(patch):
    patch.setattr(run_file, "_says_something", bool)


def numbers_are_shortened(patch):
    patch.setattr(config_file, "_text", lambda parser, name, value: str(value)[:9])


def an_expression_is_a_name(patch):
    true_settings = run_file.settings_of

    def settings_of(*given):
        return {name.removesuffix("_regex"): value for name, value in true_settings(*given).items()}

    patch.setattr(run_file, "settings_of", settings_of)


@pytest.mark.parametrize("bug", [zeros_say_nothing, numbers_are_shortened, an_expression_is_a_name])
def test_what_a_file_of_a_run_loses_is_noticed(given, monkeypatch, bug):
    config = replace(PLAIN, warmup=0, lr=0.1 + 2**-40, target=".*q_proj", rank_pattern={"a=b": 3})
    assert read_back(given, config, 2) == config
    bug(monkeypatch)
    assert read_back(given, config, 2) != config


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given_drawn(st.sampled_from(sorted(set(parser_of("finetune").flags))), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner, max_size=2)
    | st.dictionaries(st.text(), inner, max_size=2), max_leaves=3))  # fmt: skip
def test_whatever_stands_in_a_file_it_is_taken_or_refused_in_one_line(monkeypatch, tmp_path, flag, value):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(finetune, "finetune", lambda *given, **options: None)
    monkeypatch.setattr(folders, "find_sources", lambda *given: None)
    Path("c.json").write_text(json.dumps({flag.lstrip("-"): value}))
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["finetune", *USUAL, "--config", "c.json"])
    assert code in (0, 1, 2) and err.getvalue().count("\n") == (code != 0) and out.getvalue() == ""


# Runs.

TUNING = ["finetune", "--base", "base", "--data", "q.jsonl", "--steps", 4, "--batch", 2, "--lr", "1e-2"]
SHAPE = ["--alpha", 3, "--r", 2, "--target", "q_proj", "v_proj"]


def tensors(folder):
    """What an adapter or a model in a folder holds, to the bit."""
    [path] = folder.glob("*.safetensors")
    return {name: (a.dtype.name, a.shape, a.tobytes()) for name, a in load_file(path).items()}


@pytest.mark.parametrize("words", [
    "--alpha 3 --r 2 --target q_proj v_proj --dropout 0.25 --seed 3 --eval-split 0.3 --parts 3",
    r"--alpha 2.7 --r 2 --target-regex h\.[01]\..*proj --rslora --rank-pattern h.0.*=3 --alpha-pattern v_proj=1 --dora",
    "--alpha 3 --r 1 --schedule linear --warmup 2 --weight-decay 0.1 --clip 0.01 --batch 1 --parts 1 --workers 1",
    "--full --schedule constant",
    "--from-adapter one --dropout 0.5",
])  # fmt: skip
def test_a_run_leaves_the_file_that_repeats_it_to_the_bit(run, tmp_path, words):
    first, again = tmp_path / "first", tmp_path / "again"
    assert run(*TUNING, "--out", first, *words.split())[0] == 0
    settings = json.loads((first / "run.json").read_text())
    assert not {"out", "log", "log_file", "threads", "resume"} & set(settings) and settings["steps"] == 4
    code, _, err = run("finetune", "--config", first / "run.json", "--out", again)
    assert (code, err) == (0, "")
    files = [{path.name: path.read_bytes() for path in out.iterdir()} for out in (first, again)]
    assert tensors(first) == tensors(again)
    assert files[0].keys() == files[1].keys() and files[0]["run.json"] == files[1]["run.json"]


def losses_in(log):
    records = [json.loads(line) for line in log.read_text().splitlines()]
    return [(record["step"], record.get("loss"), record.get("eval_loss")) for record in records]


def interrupted(run, monkeypatch, *words):
    """A run that Ctrl-C ends in its third step; returns what it says."""
    true_step = Adam.step
    n_steps = []

    def step(self, lr):
        true_step(self, lr)
        n_steps.append(lr)
        if len(n_steps) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Adam, "step", step)
        code, _, err = run(*words)
    assert code == 130
    return err


@pytest.mark.parametrize("words", [
    "--alpha 3 --r 2 --target q_proj v_proj --dropout 0.25 --seed 3 --parts 3 --eval-split 0.3 --eval-every 2",
    r"--alpha 2.7 --r 2 --target-regex h\.[01]\..*proj --rslora --rank-pattern h\.0\..*=3 --dora --save-every 1",
    "--full --save-every 1",
    "--from-adapter one --schedule constant --batch 1 --parts 1",
])  # fmt: skip
def test_a_run_goes_on_with_nothing_but_its_folder_from_any_working_folder(run, tmp_path, monkeypatch, words, folder):
    words = [*words.split(), "--log", tmp_path / "whole.jsonl"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run(*TUNING, "--out", whole, *words)[0] == 0
    words[-1] = tmp_path / "stopped.jsonl"
    err = interrupted(run, monkeypatch, *TUNING, "--out", stopped, *words)
    assert err.endswith(f"to go on, give --resume and --out {stopped}\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, out, err = run("finetune", "--resume", "--out", stopped, "--threads", 1)
    assert (code, err) == (0, "") and "resumed after step" in out
    assert tensors(stopped) == tensors(whole)
    assert losses_in(tmp_path / "stopped.jsonl") == losses_in(tmp_path / "whole.jsonl")


def test_what_is_given_beside_resume_must_agree_or_may_change(run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    interrupted(run, monkeypatch, *TUNING, "--out", out, *SHAPE)
    for words, told in (
        (["--lr", "0.5"], "settings lr: 0.01 in the checkpoint, 0.5 now"),
        (["--schedule", "linear"], "settings schedule: cosine in the checkpoint, linear now"),
        (["--target-regex", ".*q_proj"], "settings target: ['q_proj', 'v_proj'] in the checkpoint, .*q_proj now"),
        (["--data", "t.txt"], "data sha256"),
    ):
        code, _, err = run("finetune", "--resume", "--out", out, *words)
        assert code == 1 and told in err and err.count("\n") == 1
    assert run("finetune", "--resume", "--out", out, "--save-every", 1, "--r", 2, "--data", "q.jsonl")[0] == 0


def test_an_adapter_is_gone_on_from_with_its_own_shape(run, tmp_path, folder):
    out = tmp_path / "out"
    assert run(*TUNING, "--out", out, "--from-adapter", "two", "--lr", "1e-6")[0] == 0
    base = load_model(folder / "base")
    two, more = (load_adapter(path, base, say=lambda _: None) for path in (folder / "two", out))
    assert more.config == two.config and more.base_fingerprint == base.fingerprint()
    before = {name: p.data for name, p in two.named_parameters()}
    for name, p in more.named_parameters():
        assert p.shape == before[name].shape and 0 < np.abs(p.data - before[name]).max() < 1e-5
    assert {name: pair.scaling for name, pair in more.pairs.items()} == {
        name: pair.scaling for name, pair in two.pairs.items()
    }


def test_a_run_goes_on_only_from_the_adapter_that_it_began_with(run, tmp_path, monkeypatch, folder):
    out = tmp_path / "out"
    interrupted(run, monkeypatch, *TUNING, "--out", out, "--from-adapter", "one")
    code, _, err = run("finetune", "--resume", "--out", out, "--from-adapter", "two")
    assert code == 1 and "from_adapter digest" in err


def test_an_adapter_of_another_base_is_not_gone_on_from(run, tmp_path):
    code, _, err = run(*TUNING, "--base", "other", "--out", tmp_path / "out", "--from-adapter", "one")
    assert code == 1 and "this adapter does not fit this base" in err and not (tmp_path / "out").exists()


def test_a_base_in_another_precision_is_accepted_by_name_to_go_on_from_and_repeated(run, tmp_path):
    words = [*TUNING, "--out", tmp_path / "out", "--from-adapter", "one", "--quantize", "nf4", "--parts", 2]
    code, _, err = run(*words)
    assert code == 1 and "accept the change with --accept-base other-precision" in err
    assert run(*words, "--accept-base", "other-precision")[0] == 0
    assert run("finetune", "--config", tmp_path / "out" / "run.json", "--out", tmp_path / "again")[0] == 0
    assert tensors(tmp_path / "out") == tensors(tmp_path / "again")
    # From now on the packed base is its base.
    words = [*TUNING, "--out", tmp_path / "more", "--from-adapter", tmp_path / "out", "--quantize", "nf4"]
    assert run(*words)[0] == 0


def test_quiet_prints_what_was_learned_and_nothing_else(run, tmp_path):
    loud, quiet = (run(*TUNING, *SHAPE, "--eval-split", 0.3, "--out", tmp_path / name, *words)
                   for name, words in (("a", []), ("b", ["--quiet"])))  # fmt: skip
    assert quiet[0] == 0 and quiet[2] == ""
    lines = quiet[1].splitlines()
    assert lines[0].startswith("4 steps in") and lines[-1].startswith("kept in") and len(lines) < 6
    assert len(loud[1].splitlines()) > len(lines) + 3 and loud[2] == ""


def test_no_bar_is_drawn_into_a_file(run, tmp_path, monkeypatch):
    """Here stderr is no terminal. tqdm would draw a bar of a run this short at its end at least."""
    assert run(*TUNING, *SHAPE, "--eval-split", 0.3, "--out", tmp_path / "a")[2] == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert "training" in run(*TUNING, *SHAPE, "--out", tmp_path / "b")[2]


def test_the_command_and_the_settings_agree_on_what_is_of_adapters():
    """The command has them once more: it refuses before it loads what trains."""
    assert set(finetuning.OF_SHAPE) == {*finetune_config.OF_SHAPE, "target_regex"}
    assert set(finetuning.OF_ADAPTERS) == {*finetune_config.OF_ADAPTERS, "target_regex"}
