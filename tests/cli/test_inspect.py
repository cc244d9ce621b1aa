"""What `inspect` prints: each number of its table is computed here another way, from the files."""

import hashlib
import json
import math
import re
import shutil
import warnings

import numpy as np
import pytest
from program import GOLDEN
from safetensors.numpy import load_file, save_file
from strategies import small_gpt, small_llama, trained_adapter

from minilora import load_model, save_adapter, save_model
from minilora.cli import folders
from minilora.cli import inspect as inspect_module
from minilora.disk.gpt2 import GPT2
from minilora.disk.llama import LLAMA
from minilora.quant import quantize


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


def test_inspect_tells_in_what_precision_an_adapter_was_trained(folder, run, tmp_path):
    base = load_model(folder / "base")
    save_adapter(trained_adapter(quantize(base, "nf4"), r=2), tmp_path / "a")
    code, out, err = run("inspect", tmp_path / "a", "--base", "base")
    told = " ".join(out.split())
    assert (code, err) == (0, "") and "on weights stored as NF4 base is that base CHANGED: in another precision" in told
    assert "weights were NF4 in training and are float32 here" in told
    assert "-" not in {row[-1] for row in table(out).values()}
    assert "stored as" not in run("inspect", "one")[1]


def test_inspect_knows_a_gguf_file_is_a_model_and_smollm2_by_its_name(run, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(inspect_module, "load_model", lambda base: asked.append(str(base)) or 1 / 0)
    (tmp_path / "x.GGUF").write_bytes(b"")
    monkeypatch.setattr(folders, "find_base", lambda text: tmp_path / "x.GGUF")
    for name in (tmp_path / "x.GGUF", "smollm2"):
        with pytest.raises(ZeroDivisionError):
            run("inspect", name)
    assert asked == [str(tmp_path / "x.GGUF")] * 2


def test_inspect_tells_of_a_peft_adapter_what_the_loaders_of_others_say(run):
    where = GOLDEN / "patterns"
    code, out, err = run("inspect", where / "adapter", "--base", where / "base")
    weights = load_file(where / "base/model.safetensors")
    config = json.loads((where / "adapter/adapter_config.json").read_text())
    check(out, load_file(where / "adapter/adapter_model.safetensors"), lambda name: weights[f"{name}.weight"], config)
    assert (code, err) == (0, "") and "UNVERIFIED" in out and "base fits it" in out
    told = " ".join(out.split())
    assert "PEFT its loader's rules accept it vLLM its loader's rules accept it, from --max-lora-rank 8 on but" in told
    assert f"on {GPT2.note} base" in told
    code, out, err = run("inspect", where / "adapter")
    assert code == 0 and "needs the base" in out and {row[-1] for row in table(out).values()} == {"-"}


@pytest.mark.parametrize("name", ["base", "one"])
def test_inspect_says_that_values_are_those_that_were_saved_or_that_nobody_can_tell(name, folder, run, tmp_path):
    code, out, _ = run("inspect", name, "--verify")
    assert code == 0 and f"  values       {inspect_module.VERIFIED}\n" in out
    shutil.copytree(folder / name, tmp_path / "theirs")
    (path,) = (tmp_path / "theirs").glob("*.safetensors")
    save_file(load_file(path), path)
    code, out, err = run("inspect", tmp_path / "theirs")
    assert code == 0 and f"  values       {inspect_module.UNVERIFIED}\n" in out
    code, out, err = run("inspect", tmp_path / "theirs", "--verify")
    assert code == 1 and "nothing to verify its values with" in err


@pytest.mark.parametrize("name", ["base", "one"])
def test_inspect_names_the_tensor_that_is_not_as_it_was_saved(name, folder, run, tmp_path):
    shutil.copytree(folder / name, tmp_path / "damaged")
    (path,) = (tmp_path / "damaged").glob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    code, _, err = run("inspect", tmp_path / "damaged")
    assert code == 1 and err.count("\n") == 1 and f"{path}: the values of " in err
    assert " are not those that were saved; the file is damaged" in err


def test_inspect_tells_the_rules_of_what_minilora_itself_refuses(run, tmp_path):
    shutil.copytree(GOLDEN / "c_attn/adapter", tmp_path / "dora")
    file = tmp_path / "dora/adapter_config.json"
    file.write_text(file.read_text().replace('"use_dora": false', '"use_dora": true'))
    code, out, err = run("inspect", tmp_path / "dora")
    assert code == 1 and "vLLM         its loader's rules object: use_dora is True\n" in out
    assert "lora_magnitude_vector" in out and "vLLM serves no LoRA on GPT-2" in out
    assert "use_dora=True needs one" in err and err.count("\n") == 1


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


@pytest.mark.parametrize("dtype, stored", [
    ("float32", None), ("bfloat16", "of 20 tensors 15 as BF16, 5 as float32: 0.0 MB"),
    ("float16", "of 20 tensors 15 as F16, 5 as float32"),
])  # fmt: skip
def test_inspect_describes_a_llama_and_how_it_is_stored(dtype, stored, run, tmp_path):
    save_model(small_llama(tie_word_embeddings=True, qk_norm=False), tmp_path / "model", dtype=dtype)
    code, out, err = run("inspect", tmp_path / "model")
    told = " ".join(out.split())
    assert (code, err) == (0, "") and "kind Llama's family: llama sizes 2 blocks of 4 heads of 2 over 2 of keys" in told
    assert (f"stored {stored}" in told) if stored else ("stored" not in told)
    assert f"fingerprint {fingerprint(load_model(tmp_path / 'model'))}" in told
    save_model(small_llama(qk_norm=True), tmp_path / "qwen")
    assert "kind Llama's family: qwen3 " in " ".join(run("inspect", tmp_path / "qwen")[1].split())


def test_inspect_says_that_vllm_serves_an_adapter_of_a_llama(run, tmp_path):
    base = small_llama()
    save_model(base, tmp_path / "base")
    save_adapter(trained_adapter(base, target_modules="all-linear"), tmp_path / "a", base_model=str(tmp_path / "base"))
    code, out, err = run("inspect", tmp_path / "a")
    told = " ".join(out.split())
    assert (code, err) == (0, "") and "is that base" in told and len(table(out)) == 14
    assert f"vLLM its loader's rules accept it, from --max-lora-rank 8 on {LLAMA.note} base" in told


def test_a_warning_is_one_line(run):
    with warnings.catch_warnings():
        code, out, err = run("inspect", GOLDEN / "untied_conflict/base")
    assert code == 0 and err.startswith("minilora: warning: ") and "lm_head.weight" in err and err.count("\n") == 1
