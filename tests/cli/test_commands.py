"""The commands on folders: each number they print is computed here another way; what they refuse leaves no trace."""

import hashlib
import json
import math
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from strategies import bits, small_gpt, trained_adapter

from minilora import (
    GPT,
    GPTConfig,
    attach,
    generate,
    load_adapter,
    load_model,
    merge,
    save_adapter,
    save_model,
)
from minilora.cli import commands
from minilora.cli.main import main
from minilora.disk.characters import decode, encode
from minilora.disk.gpt2 import GPT2

GOLDEN = Path(__file__).parents[1] / "golden"
TEXT = "to be or not to be, that is the question: " * 3
ROWS = [("who?", " me"), ("and why, then?", " no reason"), ("x", " y")]
RECEIPT = re.compile(r"(.*: \d+ tensors, all used\n(  \d+ x .*\n)+  base: .*\n)*")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two bases of minilora's 96 characters, adapters `one` and `two` for the first, and two files of data."""
    folder = tmp_path_factory.mktemp("commands")
    size = {"n_layer": 11, "n_head": 1, "n_embd": 6, "vocab_size": 96, "block_size": 48, "positions": "rope"}
    bases = [GPT(GPTConfig(**size), np.random.default_rng(seed)) for seed in (0, 1)]
    for name, base in zip(("base", "other"), bases, strict=True):
        save_model(base, folder / name)
    one = trained_adapter(bases[0], 1, r=2, alpha=3)
    two = trained_adapter(bases[0], 2, r=3, alpha=0.5, target_modules=["v_proj", "down_proj"], use_rslora=True,
                          rank_pattern={r"h\.1\..*": 1}, alpha_pattern={"v_proj": 7})  # fmt: skip
    for name, adapter in (("one", one), ("two", two)):
        save_adapter(adapter, folder / name, base_model=str(folder / "base"))
    (folder / "t.txt").write_text(TEXT)
    (folder / "q.jsonl").write_text("".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in ROWS))
    return folder


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Runs a command in that folder, on a machine that no bar thinks slow: (exit code, stdout, stderr)."""
    tqdm = commands.tqdm

    def bar(*given, delay, leave, **more):
        assert delay >= 1 and not leave
        return tqdm(*given, **more, disable=True)

    monkeypatch.chdir(folder)
    monkeypatch.setattr(commands, "tqdm", bar)

    def run(*arguments):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stopped:
            code = stopped.code
        return code, *capsys.readouterr()

    return run


def parts(folder, *adapters):
    """The base, and the base with each of the adapters."""
    base = load_model(folder / "base")
    return base, *(attach(base, load_adapter(folder / name, base, say=lambda _: None)) for name in adapters)


# generate


def continued(model, prompt, n, **how):
    return decode(generate(model, encode(prompt)[None], n, stop=0, **how)[0]).split("\n")[0] + "\n"


@pytest.mark.parametrize("flags", [["--adapter", "one", "two"], ["--adapter", "one", "--adapter", "two"]], ids=str)
def test_generate_says_what_the_library_generates(folder, run, flags):
    """Attached, merged and stacked differ by 3e-5 in a logit at most; no token is chosen by less than 0.01."""
    base, one, two = parts(folder, "one", "two")
    texts = [continued(model, "The ", 12) for model in (base, one, two)]
    assert len(set(texts)) == 3
    ask = ["generate", "--base", "base", "--prompt", "The ", "--max-new-tokens", 12]
    assert run(*ask) == (0, texts[0], "")
    for name, text in zip(("one", "two"), texts[1:], strict=True):
        code, out, err = run(*ask, "--adapter", name)
        assert (code, out) == (0, text) and err.startswith(f"{name}: ") and RECEIPT.fullmatch(err)
    code, out, err = run(*ask, *flags)
    assert (code, out) == (0, f"--- one\n{texts[1]}--- two\n{texts[2]}")
    assert RECEIPT.fullmatch(err) and err.count("recognised") == 2
    assert run(*ask, "--adapter", "two", "one")[1] == f"--- two\n{texts[2]}--- one\n{texts[1]}"


def test_generate_draws_from_the_seed(folder, run):
    base, = parts(folder)
    ask = ["generate", "--base", "base", "--prompt", "The ", "--temperature", 1.5, "--top-k", 9, "--max-new-tokens", 20]
    said = {seed: run(*ask, "--seed", seed)[1] for seed in (3, 4)}
    for seed, text in said.items():
        assert text == continued(base, "The ", 20, temperature=1.5, top_k=9, rng=np.random.default_rng(seed))
    assert said[3] != said[4]


def test_generate_ends_a_text_where_the_model_does_and_counts_on_a_bar(run, monkeypatch):
    shown = []

    def spoken(model, ids, n, *, stop, on_token, **rest):
        for _ in range(3):
            on_token(np.zeros(2))
        return np.concatenate([ids, np.tile([5, 6, stop, 7], (len(ids), 1))], axis=1)

    class Bar:
        def __init__(self, **how):
            shown.append((how["total"], how["leave"], how["delay"] >= 1))  # what takes less than a second shows none

        __enter__ = lambda self: self
        __exit__ = lambda self, *error: None
        update = lambda self: shown.append("token")

    monkeypatch.setattr(commands, "generate", spoken)
    monkeypatch.setattr(commands, "tqdm", Bar)
    assert run("generate", "--base", "base", "--prompt", "Hi", "--max-new-tokens", 4) == (0, "Hi$%\n", "")
    assert shown == [(4, False, True), *["token"] * 3]


def test_generate_speaks_gpt2s_tokens(bpe_folder, run, tmp_path):
    base = small_gpt(vocab_size=300)
    save_model(base, tmp_path / "base")
    shutil.copy(bpe_folder / "tokenizer.json", tmp_path / "base")
    code, out, err = run("generate", "--base", tmp_path / "base", "--prompt", "😀 the dog", "--max-new-tokens", 3)
    assert code == 0 and out.startswith("😀 the dog") and err == ""
    code, out, err = run("generate", "--base", tmp_path / "base", "--prompt", "\udcff", "--max-new-tokens", 3)
    assert (code, out) == (1, "") and err == "minilora: the prompt is not UTF-8: character 1 is '\\udcff'\n"


# merge


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_merge_writes_what_merge_gives_to_the_bit_and_leaves_the_rest(folder, run, tmp_path, dtype):
    before = everything(folder)
    base, adapted = parts(folder, "one")
    code, out, err = run("merge", "--base", "base", "--adapter", "one", "--out", tmp_path / "m", "--dtype", dtype)
    expected = {name: p.data.astype(dtype).astype("float32") for name, p in merge(adapted).named_parameters()}
    written = {name: p.data for name, p in load_model(tmp_path / "m").named_parameters()}
    assert (code, err) == (0, "") and f"to be stored as {dtype}" in out
    assert f"kept in {tmp_path / 'm'}: a plain model" in out
    assert written.keys() == expected.keys() and all((written[n] == expected[n]).all() for n in expected)
    assert bits(load_model(tmp_path / "m")) != bits(base) and everything(folder) == before


@pytest.mark.parametrize("positions", ["learned", "rope"])
def test_a_merged_folder_has_the_tokenizer_of_its_base(bpe_folder, run, tmp_path, positions):
    base = small_gpt(vocab_size=300, positions=positions)
    save_model(base, tmp_path / "base")
    shutil.copy(bpe_folder / "tokenizer.json", tmp_path / "base")
    save_adapter(trained_adapter(base), tmp_path / "a")
    assert run("merge", "--base", tmp_path / "base", "--adapter", tmp_path / "a", "--out", tmp_path / "m")[0] == 0
    said = [run("generate", "--base", tmp_path / b, *more, "--prompt", "the fox", "--max-new-tokens", 5)[:2]
            for b, more in (("m", []), ("base", ["--adapter", tmp_path / "a"]))]  # fmt: skip
    assert said[0] == said[1] and said[0][0] == 0


def test_a_merged_gpt2_keeps_the_settings_of_its_base(run, tmp_path):
    where = GOLDEN / "c_attn"
    assert run("merge", "--base", where / "base", "--adapter", where / "adapter", "--out", tmp_path / "m")[0] == 0
    base = load_model(where / "base")
    adapted = attach(base, load_adapter(where / "adapter", base, say=lambda _: None))
    assert bits(load_model(tmp_path / "m")) == bits(merge(adapted)) != bits(base)
    settings = [json.loads((folder / "config.json").read_text()) for folder in (where / "base", tmp_path / "m")]
    assert settings[0]["summary_type"] == settings[1]["summary_type"]


# compare


def loss(model, ids, targets):
    """Nats per token of one row, in float64, from the logits alone."""
    logits = model(ids[None]).data[0].astype(np.float64)
    chosen = logits[np.arange(len(targets)), targets]
    return list(np.log(np.exp(logits).sum(-1)) - chosen)


@pytest.mark.parametrize("file, more", [("t.txt", []), ("t.txt", ["--length", 7]), ("q.jsonl", ["--batch", 2])])
def test_compare_measures_the_loss_without_and_with(folder, run, file, more):
    means, ids, length = [], encode(TEXT), 7 if "--length" in more else 48
    for model in parts(folder, "two"):
        each = []
        if file == "t.txt":
            for i in range(0, (len(ids) - 1) // length * length, length):
                each += loss(model, ids[i : i + length], ids[i + 1 : i + length + 1])
        else:
            for prompt, answer in ROWS:
                row = encode(prompt + answer + "\n")
                each += loss(model, row[:-1], row[1:])[len(prompt) - 1 :]
        means.append(np.mean(each))
    code, out, err = run("compare", "base", "two", "--data", file, *more)
    without, given = (re.search(rf"{name} +(\S+) +(\S+)\n", out).groups() for name in ("out the adapter", "with it"))
    change = float(re.search(r"difference +([+-]\S+)\n", out)[1])
    assert (code, err) == (0, "") and abs(means[1] - means[0]) > 0.01
    assert np.allclose([float(without[0]), float(given[0]), change], [*means, means[1] - means[0]], atol=2e-4)
    assert np.allclose([float(without[1]), float(given[1])], np.exp(means), rtol=1e-3)


# inspect


def fingerprint(model):
    return hashlib.sha256(repr(sorted(model.fingerprint().items())).encode()).hexdigest()[:16]


def table(out):
    """{module: its numbers, the last one the share}"""
    lines = out.partition("|dW|/|W|\n")[2].partition("  dW =")[0].splitlines()
    return {name: cells for name, *cells in (line.replace(" %", "").split() for line in lines)}


def check(out, tensors, weight, config):
    """Each line of the table against dense products of the tensors of the file, and `weight(module)`."""
    rows = table(out)
    assert 2 * len(rows) == len(tensors)
    for name, (n, m, r, alpha, scaling, size, share) in rows.items():
        A, B = (tensors[f"base_model.model.{name}.lora_{x}.weight"].astype(np.float64) for x in "AB")
        strength = next((a for key, a in config["alpha_pattern"].items() if re.fullmatch(rf"(.*\.)?({key})", name)),
                        config["lora_alpha"])  # fmt: skip
        factor = strength / (math.sqrt(len(A)) if config["use_rslora"] else len(A))
        dW = factor * (B @ A)
        assert (int(n), int(m), int(r), float(alpha)) == (A.shape[1], B.shape[0], len(A), strength)
        assert np.isclose(float(scaling), factor, rtol=1e-3) and np.isclose(float(size), np.linalg.norm(dW), rtol=1e-3)
        assert np.isclose(float(share) / 100, np.linalg.norm(dW) / np.linalg.norm(weight(name)), rtol=1e-2)
    return rows


@pytest.mark.parametrize("name", ["one", "two"])
def test_inspect_measures_each_module_in_the_order_of_the_blocks(folder, run, name):
    code, out, err = run("inspect", name)  # its base is where it says
    tensors = load_file(folder / name / "adapter_model.safetensors")
    weights = load_file(folder / "base/model.safetensors")
    config = json.loads((folder / name / "adapter_config.json").read_text())
    rows = check(out, tensors, lambda module: weights[f"{module}.weight"], config)
    assert (code, err) == (0, "") and [int(n.split(".")[1]) for n in rows] == sorted([*range(11)] * 2)
    numbers = sum(t.size for t in tensors.values())
    assert f"{name}: an adapter, {numbers:,} parameters in 44 tensors\n" in out and "only minilora can use it" in out
    assert f"fingerprint {fingerprint(load_model(folder / 'base'))}\n" in out and "is that base" in out
    assert max(map(len, out.splitlines())) <= max(120, len(str(folder)) + 60)


def test_inspect_tells_of_a_peft_adapter_what_the_loaders_of_others_say(run):
    where = GOLDEN / "patterns"
    code, out, err = run("inspect", where / "adapter", "--base", where / "base")
    weights = load_file(where / "base/model.safetensors")
    config = json.loads((where / "adapter/adapter_config.json").read_text())
    check(out, load_file(where / "adapter/adapter_model.safetensors"), lambda name: weights[f"{name}.weight"], config)
    assert (code, err) == (0, "") and "UNVERIFIED" in out and "base fits it" in out
    told = " ".join(out.split())
    assert "PEFT its loader's rules accept it vLLM its loader's rules accept it, from --max-lora-rank 8 on but" in told
    assert f"but {GPT2.note} base" in told
    code, out, err = run("inspect", where / "adapter")
    assert code == 0 and "needs the base" in out and {row[-1] for row in table(out).values()} == {"-"}


def test_inspect_tells_the_rules_of_what_minilora_itself_refuses(run, tmp_path):
    shutil.copytree(GOLDEN / "c_attn/adapter", tmp_path / "dora")
    file = tmp_path / "dora/adapter_config.json"
    file.write_text(file.read_text().replace('"use_dora": false', '"use_dora": true'))
    code, out, err = run("inspect", tmp_path / "dora")
    assert code == 1 and "vLLM         its loader's rules object: use_dora is True\n" in out
    assert "lora_magnitude_vector" in out and "vLLM serves no LoRA on GPT-2" in out
    assert "use_dora=True" in err and err.count("\n") == 1


def test_inspect_measures_what_it_can_against_a_base_that_is_another(run):
    code, out, err = run("inspect", "one", "--base", "other")
    assert code == 1 and len(table(out)) == 22 and {row[-1] for row in table(out).values()} == {"-"}
    assert "does not fit this base" in err and err.count("\n") == 1 and err.endswith("; ...\n") and "is that" not in out


def test_inspect_tells_parts_that_were_trained_apart(run, tmp_path):
    base = small_gpt()
    save_model(base, tmp_path / "base")
    save_adapter(trained_adapter(base, r=2, target_modules=["q_proj", "v_proj"]), tmp_path / "a")
    out = run("inspect", tmp_path / "a", "--base", tmp_path / "base")[1]
    assert "h.1.attn.v_proj was trained apart: r=2, columns 2 to 4 of its module\n" in out


def test_inspect_describes_a_model(folder, run):
    code, out, err = run("inspect", "base")
    model = load_model(folder / "base")
    count = sum(p.data.size for p in model.parameters())
    assert (code, err) == (0, "") and out.startswith(f"base: a model, {count:,} parameters, float32\n")
    assert "11 blocks of 1 heads, 6 channels, 24 in the MLP" in out and "96 tokens, a context of 48" in out
    assert f"fingerprint  {fingerprint(model)}\n" in out and "rotary" in out


def test_a_warning_is_one_line(run):
    with warnings.catch_warnings():
        code, out, err = run("inspect", GOLDEN / "untied_conflict/base")
    assert code == 0 and err.startswith("minilora: warning: ") and "lm_head.weight" in err and err.count("\n") == 1


# What is refused.


def everything(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


generating = "generate --base base --prompt hi "
tuning = "finetune --base base --data t.txt --out new --alpha 4 --length 8 "
REFUSED = [
    ("generate --base nowhere --prompt hi", 1, "nowhere does not exist"),
    ("generate --base t.txt --prompt hi", 1, "t.txt is a file"),
    ("generate --base one --prompt hi", 1, "one holds an adapter, where a model is needed"),
    ("generate --base . --prompt hi", 1, "its sub-folders have: base, one, other, two"),
    (generating + "--adapter other", 1, "other holds a model, where an adapter is needed"),
    (generating + "--adapter one nowhere", 1, "nowhere does not exist"),
    (generating + "--adapter", 2, "--adapter: expected at least one"),
    ("generate --base other --prompt hi --adapter one", 1, "trained on: h.0.attn.k_proj.weight: made for"),
    ("generate --base base --prompt é", 1, "'é' is not one of the 96 known"),
    (generating + "--max-new-tokens 47", 1, "has 2 tokens: with 47 new ones they outgrow the model's context of 48"),
    (generating + "--max-new-tokens -1", 2, "--max-new-tokens: must be a whole number of at least 0, got '-1'"),
    (generating + "--temperature -1", 2, "--temperature: must be a finite number of at least 0, got -1.0"),
    (generating + "--temperature nan", 2, "--temperature: must be a finite"),
    (generating + "--temperature 1 --top-k 0", 2, "--top-k: must be a whole number of at least 1"),
    (generating + "--temperature 1 --top-k 97 --max-new-tokens 3", 1, "top-k is 97, but there are only 96 tokens"),
    (generating + "--top-k 3", 2, "at temperature 0 nothing is drawn"),
    (tuning + "--r 0", 2, "--r must be a whole number of at least 1; got 0"),
    (tuning + "--alpha nan", 2, "--alpha must be a finite positive number; got nan"),
    (tuning + "--lr inf", 2, "--lr must be"),
    (tuning + "--eval-split 1", 2, "--eval-split must be in [0, 1); got 1.0"),
    (tuning + "--batch 0", 2, "--batch must be"),
    (tuning + "--save-every -1", 2, "--save-every must be"),
    (tuning + "--target nothing", 1, "['nothing'] match no Linear layer"),
    (tuning + "--length 49", 1, "does not fit in the model's context of 48"),
    (tuning + "--data missing.txt", 1, "missing.txt: No such file or directory"),
    (tuning + "--base one", 1, "one holds an adapter"),
    (tuning + "--out base", 1, "base is not empty: it holds config.json, model.safetensors"),
    (tuning + "--out t.txt", 1, "t.txt is a file"),
    (tuning + "--resume", 1, "nothing to resume"),
    ("finetune --base base --data t.txt --out new", 2, "required: --alpha"),
    ("merge --base base --adapter one --out base", 1, "base is not empty: it holds config.json, model.safetensors"),
    ("merge --base base --adapter one --out two", 1, "two is not empty: it holds adapter_config.json"),
    ("merge --base base --adapter one --out q.jsonl", 1, "q.jsonl is a file"),
    ("merge --base base --adapter base --out new", 1, "base holds a model, where an adapter"),
    ("merge --base base --adapter one --out new --dtype int8", 2, "--dtype: invalid choice: 'int8'"),
    ("inspect nowhere", 1, "nowhere does not exist"),
    ("inspect base --base base", 1, "a model, which has no base"),
    ("compare one base --data t.txt", 1, "one holds an adapter, where a model"),
    ("compare base one --data t.txt --batch 0", 2, "--batch: must be a whole number of at least 1"),
    ("bogus", 2, "invalid choice: 'bogus'"),
]


@pytest.mark.parametrize("line, code, told", REFUSED, ids=[line for line, *_ in REFUSED])
def test_what_is_refused_is_told_in_one_line_and_leaves_no_trace(folder, run, line, code, told):
    before = everything(folder)
    given, out, err = run(*line.split())
    assert (given, err.count("\n")) == (code, 1) and err.startswith("minilora") and told in err
    assert len(err) < 1000 and everything(folder) == before and (code == 1 or out == "")


def test_an_empty_prompt_is_refused(run):
    code, out, err = run("generate", "--base", "base", "--prompt", "")
    assert (code, out, err) == (1, "", "minilora: the prompt is empty; give at least one word to go on from\n")


def test_a_run_that_was_killed_is_named_as_one(run, tmp_path):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint/checkpoint.safetensors").write_bytes(b"")
    code, _, err = run("generate", "--base", "base", "--prompt", "x", "--adapter", tmp_path)
    assert code == 1 and "finetune --resume goes on with" in err


def test_a_folder_of_shards_is_not_merged_into(run, tmp_path):
    shutil.copytree(GOLDEN / "sharded/base", tmp_path / "m")
    before = everything(tmp_path)
    base, adapter = tmp_path / "m", GOLDEN / "c_attn/adapter"
    code, _, err = run("merge", "--base", base, "--adapter", adapter, "--out", base)
    assert code == 1 and "is not empty: it holds config.json, model-0" in err and everything(tmp_path) == before


def test_tokens_that_the_tokenizer_does_not_know_are_counted(run, bpe_folder, tmp_path):
    """A table of embeddings may be rounded up: what the model says there has no text, and that is told."""
    model = small_gpt(vocab_size=400)
    model.wte.weight.data[:300] = 0
    for name in ("tokenizer.json", "config.json"):
        shutil.copyfile(bpe_folder / name, tmp_path / name)
    save_model(model, tmp_path)
    code, out, err = run("generate", "--base", tmp_path, "--prompt", "the", "--max-new-tokens", "3")
    assert (code, out) == (0, "the\n")
    assert err == "3 of 3 new tokens are left out: the tokenizer knows 300, the model 400\n"
