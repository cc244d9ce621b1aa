"""Files on disk: what is saved comes back to the bit, in PEFT's layout; damaged, mixed or foreign files are refused."""

import ast
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from minilora import (
    GPT,
    GPTConfig,
    LoRAConfig,
    Tensor,
    attach,
    files,
    init_adapter,
    load_adapter,
    load_model,
    merge,
    save_adapter,
    save_model,
    stack,
)
from minilora.backend import get_array_module, to_numpy
from minilora.nn import Linear, Module

ROOT = Path(__file__).resolve().parent.parent
SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 8, "vocab_size": 11, "block_size": 16}
PREFIX = "base_model.model."


def gpt(seed=0, dtype="float32", **changes):
    return GPT(GPTConfig(**{**SHAPE, **changes}), np.random.default_rng(seed), dtype)


def trained_adapter(base, seed=1, r=2, alpha=4, target_modules=("q_proj", "mlp.up_proj"), **more):
    """An adapter whose B is not zero, as if it had been trained."""
    adapter = init_adapter(base, LoRAConfig(r, alpha, target_modules, **more), np.random.default_rng(seed))
    for i, pair in enumerate(adapter.pairs.values()):
        B = np.random.default_rng([seed, i]).standard_normal(pair.lora_B.shape).astype(pair.lora_B.dtype)
        pair.lora_B.data[...] = get_array_module(pair.lora_B.data).asarray(B)
    return adapter


def bits(module):
    """{name: (dtype, shape, bytes)} of every tensor: equal only if equal to the bit, and to the sign of a zero."""
    arrays = {name: to_numpy(p.data) for name, p in module.named_parameters()}
    return {name: (a.dtype.name, a.shape, a.tobytes()) for name, a in arrays.items()}


def same_adapter(a, b):
    return bits(a) == bits(b) and a.config == b.config


# Round trips.

dtypes = st.sampled_from(["float32", "float64"])
seeds = st.integers(0, 2**32 - 1)
gpt_configs = st.builds(
    lambda n_layer, n_head, half_head, vocab_size, block_size, positions, n_inner, eps: GPTConfig(
        n_layer, n_head, 2 * half_head * n_head, vocab_size, block_size, positions, 10000.0, n_inner, eps
    ),
    st.integers(1, 2), st.integers(1, 2), st.integers(1, 2), st.integers(1, 9), st.integers(1, 9),
    st.sampled_from(["learned", "rope"]), st.none() | st.integers(1, 9), st.sampled_from([1e-5, 1e-6, 0.1]),
)  # fmt: skip
targets = st.sampled_from(
    [["q_proj"], ["h.0.attn.v_proj"], ["attn.k_proj", "up_proj"], "all-linear", r"h\.\d+\.mlp\.(up|down)_proj", "h.1.*"]
)
lora_configs = st.builds(
    LoRAConfig, st.integers(1, 4), st.integers(1, 64) | st.floats(1e-3, 1e3), targets,
    st.sampled_from([0.0, 0.05, 0.5]), st.booleans(),
)  # fmt: skip
ODD = np.array([-0.0, 5e-324, 1e-45, 1e-38, -1e38, 1 / 3, 1e300])  # signed zero, subnormals, the ends of the range


@settings(deadline=None)
@given(gpt_configs, dtypes, seeds)
def test_a_model_comes_back_to_the_bit(config, dtype, seed):
    model = GPT(config, np.random.default_rng(seed), dtype)
    odd = ODD[np.abs(ODD) < np.finfo(dtype).max].astype(dtype)
    model.wte.weight.data.reshape(-1)[: len(odd)] = odd[: model.wte.weight.size]
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, folder)
        again = load_model(folder)
    assert bits(again) == bits(model)
    assert again.config == config
    assert all(p.requires_grad and p.data.flags.writeable for p in again.parameters())


@settings(deadline=None)
@given(lora_configs, dtypes, seeds)
def test_an_adapter_comes_back_to_the_bit(config, dtype, seed):
    base = gpt(dtype=dtype)
    adapter = init_adapter(base, config, np.random.default_rng(seed))
    for i, pair in enumerate(adapter.pairs.values()):
        pair.lora_B.data[:] = np.random.default_rng([seed, i]).standard_normal(pair.lora_B.shape)
        odd = ODD[np.abs(ODD) < np.finfo(dtype).max]
        pair.lora_B.data.reshape(-1)[: len(odd)] = odd[: pair.lora_B.size]
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(adapter, folder)
        again = load_adapter(folder, base)
    assert same_adapter(again, adapter)
    assert list(again.pairs) == list(adapter.pairs)
    assert again.base_fingerprint == adapter.base_fingerprint == base.fingerprint()
    assert all(p.requires_grad and p.data.flags.writeable for p in again.parameters())
    assert again.config.scaling == config.scaling


def test_what_was_loaded_computes_the_same_numbers(tmp_path):
    base, ids = gpt(), np.array([[1, 2, 3, 4]])
    adapter = trained_adapter(base)
    save_model(base, tmp_path / "model")
    save_adapter(adapter, tmp_path / "adapter")
    again = load_model(tmp_path / "model")
    ours, theirs = attach(base, adapter), attach(again, load_adapter(tmp_path / "adapter", again))
    assert np.array_equal(ours(ids).data, theirs(ids).data)
    assert not np.array_equal(ours(ids).data, base(ids).data)


def test_a_merged_model_is_saved_like_any_other(tmp_path):
    merged = merge(attach(gpt(), trained_adapter(gpt())))
    save_model(merged, tmp_path)
    assert bits(load_model(tmp_path)) == bits(merged)


class Towers(Module):
    """Linear layers under names that no GPT has: files know Linear layers, not GPT."""

    def __init__(self, rng):
        self.left, self.right = [Linear.init(5, 3, rng)], {"up": Linear.init(5, 4, rng), "down": Linear.init(4, 5, rng)}


def test_an_adapter_of_a_model_that_is_no_gpt_comes_back_too(tmp_path):
    base = Towers(np.random.default_rng(0))
    adapter = trained_adapter(base, target_modules=["left.0", "down"])
    save_adapter(adapter, tmp_path)
    assert same_adapter(load_adapter(tmp_path, base), adapter)


def test_saving_from_a_device_and_loading_onto_it_changes_nothing(xp, tmp_path):
    base = gpt().to_device(xp)
    adapter = trained_adapter(base)
    save_model(base, tmp_path / "model")
    save_adapter(adapter, tmp_path / "adapter")
    again = load_adapter(tmp_path / "adapter", base)
    assert same_adapter(again, adapter)
    assert {get_array_module(p.data).__name__ for p in again.parameters()} == {xp.__name__}
    on_host = load_model(tmp_path / "model")
    assert bits(on_host) == bits(base)
    assert {type(p.data) for p in on_host.parameters()} == {np.ndarray}
    assert same_adapter(load_adapter(tmp_path / "adapter", on_host), adapter)


def test_saving_over_an_older_save_leaves_nothing_of_it(tmp_path):
    base = gpt()
    save_adapter(trained_adapter(base, r=4, target_modules="all-linear"), tmp_path)
    small = trained_adapter(base, seed=5, target_modules=["q_proj"])
    save_adapter(small, tmp_path)
    assert same_adapter(load_adapter(tmp_path, base), small)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_folder_is_made_with_its_parents(tmp_path):
    save_model(gpt(), tmp_path / "a" / "b")
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == ["config.json", "model.safetensors"]


# The layout.


def test_an_adapter_has_pefts_keys_and_shapes(tmp_path):
    save_adapter(trained_adapter(gpt(), r=3, target_modules=["v_proj", "mlp.down_proj"]), tmp_path)
    found = {name: (a.shape, a.dtype.name) for name, a in load_file(tmp_path / "adapter_model.safetensors").items()}
    expected = {}
    for i in range(2):
        for module, n_in, n_out in (("attn.v_proj", 8, 8), ("mlp.down_proj", 32, 8)):
            expected[f"base_model.model.h.{i}.{module}.lora_A.weight"] = ((3, n_in), "float32")
            expected[f"base_model.model.h.{i}.{module}.lora_B.weight"] = ((n_out, 3), "float32")
    assert found == expected


def test_an_adapter_has_pefts_configuration_and_keeps_its_own_in_the_metadata(tmp_path):
    base = gpt()
    adapter = trained_adapter(base, r=3, alpha=5, target_modules=["attn.q_proj", "up_proj"], dropout=0.1)
    save_adapter(adapter, tmp_path, base_model="tiny")
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "tiny", "r": 3, "lora_alpha": 5,
        "target_modules": ["attn.q_proj", "up_proj"], "bias": "none", "fan_in_fan_out": False, "use_rslora": False,
        "rank_pattern": {}, "alpha_pattern": {}, "lora_dropout": 0.1, "modules_to_save": None,
        "init_lora_weights": True, "inference_mode": True,
    }  # fmt: skip
    with safe_open(tmp_path / "adapter_model.safetensors", framework="np") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert json.loads(metadata["minilora.base"]) == base.fingerprint()


def test_a_configuration_of_numpy_numbers_is_saved_as_numbers(tmp_path):
    base = gpt()
    adapter = trained_adapter(base, r=np.int64(2), alpha=np.float32(4), dropout=np.float64(0.1))
    save_adapter(adapter, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (2, 4, 0.1)
    assert same_adapter(load_adapter(tmp_path, base), adapter)


def test_a_regular_expression_is_saved_as_one(tmp_path):
    save_adapter(trained_adapter(gpt(), target_modules=r"h\.0\..*_proj"), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == r"h\.0\..*_proj"


def test_a_model_has_its_dotted_names_and_no_separate_head(tmp_path):
    model = gpt(positions="rope")
    save_model(model, tmp_path)
    arrays = load_file(tmp_path / "model.safetensors")
    assert arrays.keys() == dict(model.named_parameters()).keys()
    assert "wte.weight" in arrays and not any("head" in name for name in arrays)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {"model_type": "minilora-gpt", **asdict(model.config)}


# Adapters from elsewhere: as PEFT writes them, without this library's metadata.

FULL_PEFT = {
    "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "auto_mapping": None, "bias": "none",
    "base_model_name_or_path": "x", "corda_config": None, "ensure_weight_tying": False, "eva_config": None,
    "exclude_modules": None, "fan_in_fan_out": True, "inference_mode": True, "init_lora_weights": True,
    "layer_replication": None, "layers_pattern": None, "layers_to_transform": None, "loftq_config": {},
    "lora_alpha": 4, "lora_bias": False, "lora_dropout": 0.0, "megatron_config": None,
    "megatron_core": "megatron.core", "modules_to_save": None, "peft_type": "LORA", "peft_version": "0.21.2",
    "qalora_group_size": 16, "r": 2, "rank_pattern": {}, "revision": None,
    "target_modules": ["q_proj", "mlp.up_proj"], "target_parameters": None, "task_type": "CAUSAL_LM",
    "trainable_token_indices": None, "use_bdlora": None, "use_dora": False, "use_qalora": False, "use_rslora": False,
}  # fmt: skip


def foreign(folder, change=lambda config, tensors: None):
    """A folder as PEFT writes it for `gpt()`, after `change(config, tensors)`. Returns the base."""
    base, config = gpt(), json.loads(json.dumps(FULL_PEFT))
    tensors = {f"{PREFIX}{name}.weight": p.data for name, p in trained_adapter(base).named_parameters()}
    change(config, tensors)
    Path(folder).mkdir(exist_ok=True)
    save_file(tensors, Path(folder) / "adapter_model.safetensors", {"format": "pt"})
    (Path(folder) / "adapter_config.json").write_text(json.dumps(config))
    return base


def test_a_file_that_peft_wrote_is_read(tmp_path):
    adapter = load_adapter(tmp_path, foreign(tmp_path))
    assert same_adapter(adapter, trained_adapter(gpt()))
    assert adapter.base_fingerprint is None, "it does not say which base it belongs to"


@pytest.mark.parametrize("harmless", [False, "gaussian", "orthogonal", "eva"])
def test_how_the_factors_were_drawn_does_not_matter_once_they_are_trained(harmless, tmp_path):
    load_adapter(tmp_path, foreign(tmp_path, lambda config, tensors: config.update(init_lora_weights=harmless)))


def test_a_half_precision_file_is_widened_without_loss(tmp_path):
    halves = lambda config, tensors: tensors.update({k: v.astype(np.float16) for k, v in tensors.items()})
    adapter = load_adapter(tmp_path, foreign(tmp_path, halves))
    for (_, p), (_, q) in zip(adapter.named_parameters(), trained_adapter(gpt()).named_parameters(), strict=True):
        assert p.dtype == np.float32 and np.array_equal(p.data, q.data.astype(np.float16))


def test_a_file_wider_than_the_base_is_refused_and_not_rounded(tmp_path):
    wide = lambda config, tensors: tensors.update({k: v.astype(np.float64) for k, v in tensors.items()})
    with pytest.raises((TypeError, ValueError), match=r"(?s)float32.*float64|float64.*float32"):
        load_adapter(tmp_path, foreign(tmp_path, wide))


def drop(*keys):
    return lambda config, tensors: [config.pop(key) for key in keys]


def put(**fields):
    return lambda config, tensors: config.update(fields)


def key(module, factor, layer=0):
    return f"{PREFIX}h.{layer}.{module}.{factor}.weight"


def rename(pattern, by):
    def change(config, tensors):
        for name in list(tensors):
            tensors[re.sub(pattern, by, name)] = tensors.pop(name)

    return change


def tensor(name, value):
    """Set the tensor `name` to an array, or to what a function makes of it; None takes it out."""

    def change(config, tensors):
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value(tensors[name]) if callable(value) else value

    return change


def both(*changes):
    return lambda config, tensors: [change(config, tensors) for change in changes]


Q_A, Q_B = key("attn.q_proj", "lora_A"), key("attn.q_proj", "lora_B")
WRONG_FIELDS = {  # what is wrong with the configuration: (the change, what the message must show)
    "no peft_type": (drop("peft_type"), "no peft_type"),
    "no r": (drop("r"), "no r;"),
    "no lora_alpha": (drop("lora_alpha"), "no lora_alpha.*add what training used"),
    "no target_modules": (drop("target_modules"), "no target_modules"),
    "nothing at all": (lambda config, tensors: config.clear(), "no peft_type, r, lora_alpha, target_modules"),
    "lora_alpha null": (put(lora_alpha=None), "no lora_alpha"),
    "lora_alpha NaN": (put(lora_alpha=float("nan")), "alpha.*finite.*nan"),
    "lora_alpha infinite": (put(lora_alpha=float("inf")), "alpha.*finite.*inf"),
    "lora_alpha zero": (put(lora_alpha=0), "alpha.*positive.*0"),
    "lora_alpha a string": (put(lora_alpha="4"), "alpha.*number.*'4'"),
    "r zero": (put(r=0), "r must be.*0"),
    "r a float": (put(r=2.0), "r must be.*2.0"),
    "r a string": (put(r="2"), "r must be.*'2'"),
    "r not that of the tensors": (put(r=3), r"\(2, 8\).*r=3"),
    "dropout null": (put(lora_dropout=None), "dropout.*None"),
    "dropout a string": (put(lora_dropout="0.1"), "dropout.*'0.1'"),
    "dropout above one": (put(lora_dropout=1.5), "dropout.*1.5"),
    "use_rslora a string": (put(use_rslora="false"), "use_rslora.*'false'"),
    "target_modules a number": (put(target_modules=7), "target_modules.*7"),
    "target_modules empty": (put(target_modules=[]), "target_modules.*at least one"),
    "target_modules of numbers": (put(target_modules=[1, 2]), "target_modules"),
    "target_modules no expression": (put(target_modules="("), r"target_modules.*\("),
    "target_modules half misspelt": (put(target_modules=["q_proj", "up_prj"]), "up_prj.*There are.*h.0.attn.q_proj"),
    "a target without tensors": (put(target_modules=["q_proj", "mlp.up_proj", "v_proj"]), "absent: h.0.attn.v_proj"),
    "tensors without a target": (put(target_modules=["q_proj"]), "superfluous: h.0.mlp.up_proj"),
    "another method": (put(peft_type="LOHA"), "peft_type='LOHA'.*'LORA'"),
    "use_dora": (put(use_dora=True), "use_dora=True"),
    "bias all": (put(bias="all"), "bias='all'.*'none'"),
    "bias lora_only": (put(bias="lora_only"), "bias='lora_only'.*'none'"),
    "lora_bias": (put(lora_bias=True), "lora_bias=True"),
    "modules_to_save": (put(modules_to_save=["ln_f"]), r"modules_to_save=\['ln_f'\]"),
    "pissa": (put(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
    "pissa with steps": (put(init_lora_weights="pissa_niter_4"), "init_lora_weights='pissa_niter_4'"),
    "olora": (put(init_lora_weights="olora"), "init_lora_weights='olora'"),
    "rank_pattern": (put(rank_pattern={"q_proj": 4}), "rank_pattern"),
    "alpha_pattern": (put(alpha_pattern={"q_proj": 4}), "alpha_pattern"),
    "layers_to_transform": (put(layers_to_transform=[0]), "layers_to_transform"),
    "layers_to_transform zero": (put(layers_to_transform=0), "layers_to_transform|superfluous"),
    "exclude_modules": (put(exclude_modules=["up_proj"]), "exclude_modules"),
    "target_parameters": (put(target_parameters=["x"]), "target_parameters"),
    "layer_replication": (put(layer_replication=[[0, 2]]), "layer_replication"),
    "an unknown field": (put(quantum_rank=7), "quantum_rank=7"),
    "an unknown field that is zero": (put(quantum_rank=0), "quantum_rank=0"),
    "mlx-lm's schema": (lambda c, t: (c.clear(), c.update(fine_tune_type="lora", num_layers=2)), "no peft_type"),
}
WRONG_TENSORS = {  # what is wrong with the tensors
    "half a pair": (tensor(Q_B, None), "h.0.attn.q_proj has only lora_A"),
    "the other half": (tensor(Q_A, None), "h.0.attn.q_proj has only lora_B"),
    "a pair absent": (both(tensor(Q_A, None), tensor(Q_B, None)), "absent: h.0.attn.q_proj"),
    "no tensors": (lambda config, tensors: tensors.clear(), "absent: h.0.attn.q_proj"),
    "a deeper model": (rename(r"h\.1\.", "h.7."), r"absent: h.1.*superfluous: h.7"),
    "a module that is not there": (rename("up_proj", "gate_proj"), "superfluous: h.0.mlp.gate_proj"),
    "double prefix": (rename("^", PREFIX), "base_model.model.h.0.attn.q_proj"),
    "no prefix": (rename(re.escape(PREFIX), ""), "h.0.attn.q_proj.lora_A.weight is not base_model.model"),
    "another wrapper": (rename(r"model\.h", "model.transformer.h"), "superfluous: transformer.h.0"),
    "the adapter's name in keys": (rename("lora_([AB])", r"lora_\1.default"), "lora_A.default.weight is not"),
    "no .weight": (rename(r"\.weight$", ""), "lora_A is not base_model.model"),
    "an embedding's factors": (rename("lora_([AB]).weight", r"lora_embedding_\1"), "lora_embedding_A is not"),
    "a DoRA magnitude": (tensor(f"{PREFIX}h.0.attn.q_proj.lora_magnitude_vector", np.ones(8, "f4")), "magnitude"),
    "a bias": (tensor(f"{PREFIX}h.0.attn.q_proj.lora_B.bias", np.ones(8, "f4")), "lora_B.bias is not"),
    "a whole saved module": (tensor(f"{PREFIX}ln_f.weight", np.ones(8, "f4")), "ln_f.weight is not"),
    "A of another rank": (tensor(Q_A, np.ones((3, 8), "f4")), r"q_proj.*\(3, 8\)"),
    "A for another width": (tensor(Q_A, np.ones((2, 9), "f4")), r"q_proj.*\(8, 8\).*\(2, 9\)"),
    "B for another width": (tensor(Q_B, np.ones((9, 2), "f4")), r"q_proj.*\(8, 8\).*\(9, 2\)"),
    "A transposed": (tensor(Q_A, lambda a: np.ascontiguousarray(a.T)), r"q_proj.*\(8, 2\)"),
    "A and B swapped": (both(tensor(Q_A, np.ones((8, 2), "f4")), tensor(Q_B, np.ones((2, 8), "f4"))), r"q_proj"),
    "A a vector": (tensor(Q_A, np.ones(8, "f4")), r"q_proj.*\(8,\)"),
    "whole numbers": (tensor(Q_A, np.ones((2, 8), "i4")), "q_proj.*int32"),
    "nan in B": (tensor(Q_B, lambda b: b * np.float32("nan")), "q_proj.*(nan|finite)"),
    "inf in A": (tensor(Q_A, lambda a: a + np.float32("inf")), "q_proj.*(inf|finite)"),
}


@pytest.mark.parametrize("case", [*WRONG_FIELDS, *WRONG_TENSORS])
def test_an_adapter_that_would_compute_something_else_is_refused(case, tmp_path):
    change, shown = {**WRONG_FIELDS, **WRONG_TENSORS}[case]
    base = foreign(tmp_path / "adapter", change)
    before = bits(base)
    with pytest.raises(ValueError, match=f"(?s){shown}") as refusal:
        load_adapter(tmp_path / "adapter", base)
    assert str(tmp_path / "adapter") in str(refusal.value), "the message names the file"
    assert bits(base) == before


# Which base?


def changed(model, name, by=2**-10):
    model = model.trainable_copy()
    dict(model.named_parameters())[name].data.reshape(-1)[0] += by
    return model


@pytest.mark.parametrize("base, shown", [
    (changed(gpt(), "h.1.mlp.down_proj.weight"), "h.1.mlp.down_proj.weight: made for [0-9a-f]{16}.*[0-9a-f]{16}"),
    (changed(gpt(), "ln_f.bias", 1e-30), "ln_f.bias: made for"),
    (gpt(seed=9), "made for"),
    (gpt(n_embd=16), r"q_proj.*\(16, 16\).*\(2, 8\)"),
    (gpt(n_inner=40), r"up_proj.*\(40, 8\).*\(32, 2\)"),
    (gpt(n_layer=3), "absent: h.2.attn.q_proj"),
    (gpt(n_layer=1), "superfluous: h.1.attn.q_proj"),
    (gpt(vocab_size=12), "made for"),
    (gpt(positions="rope"), "made for"),
    (Towers(np.random.default_rng(0)), "match no Linear layer.*There are: left.0, right.up"),
    (attach(gpt(), trained_adapter(gpt())), "already carries LoRA"),
], ids=["one weight", "a tiny change", "another seed", "wider", "wider inside", "deeper", "shallower", "more tokens",
        "other positions", "other names", "adapted already"])  # fmt: skip
def test_another_base_is_refused_with_what_differs(base, shown, tmp_path):
    save_adapter(trained_adapter(gpt()), tmp_path)
    with pytest.raises(ValueError, match=f"(?s){shown}") as refusal:
        load_adapter(tmp_path, base)
    assert str(tmp_path) in str(refusal.value)


def test_a_float64_copy_of_the_base_is_the_same_base(tmp_path):
    base = gpt()
    wide = base.astype("float64")
    assert wide.fingerprint() == base.fingerprint()
    save_adapter(trained_adapter(base), tmp_path)
    adapter = load_adapter(tmp_path, wide)
    assert {p.dtype.name for p in adapter.parameters()} == {"float64"}
    for p, q in zip(adapter.parameters(), trained_adapter(base).parameters(), strict=True):
        assert np.array_equal(p.data, q.data.astype("float64"))


def test_a_fingerprint_sees_the_shape_too():
    row, column = (Linear(Tensor(np.ones(shape, "f4"))) for shape in ((1, 4), (4, 1)))
    assert row.fingerprint() != column.fingerprint()


# Damage.


def test_a_missing_file_is_named(tmp_path):
    base = gpt()
    with pytest.raises(FileNotFoundError, match=r"nowhere.*model\.safetensors.*config\.json"):
        load_model(tmp_path / "nowhere")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        save_adapter(trained_adapter(base), tmp_path)
        (tmp_path / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"{re.escape(name)} does not exist"):
            load_adapter(tmp_path, base)


def test_every_truncation_is_noticed(tmp_path):
    base = gpt()
    save_adapter(trained_adapter(base), tmp_path)
    for name, shown in (("adapter_model.safetensors", "damaged"), ("adapter_config.json", "not JSON")):
        whole = (tmp_path / name).read_bytes()
        lengths = {*range(20), *range(20, len(whole), 1 + len(whole) // 150), *range(len(whole) - 20, len(whole))}
        for length in sorted(lengths):
            (tmp_path / name).write_bytes(whole[:length])
            if whole[:length].strip() != whole.strip():  # the last newline of the JSON may go
                with pytest.raises(ValueError, match=f"{re.escape(name)}.*{shown}"):
                    load_adapter(tmp_path, base)
        (tmp_path / name).write_bytes(whole)
    load_adapter(tmp_path, base)


def test_garbage_is_noticed(tmp_path):
    base, rng = gpt(), np.random.default_rng(0)
    save_adapter(trained_adapter(base), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    whole = path.read_bytes()
    for garbage in (b"", b"\0" * 64, rng.bytes(500), b"\xff" * 8 + whole[8:], whole + b"\0", b"PK\x03\x04" + whole):
        path.write_bytes(garbage)
        with pytest.raises(ValueError, match=r"adapter_model\.safetensors is damaged"):
            load_adapter(tmp_path, base)


@pytest.mark.parametrize("content, shown", [
    (b"[1, 2]", "expected an object.*list"), (b'"text"', "expected an object.*str"), (b"null", "expected an object"),
    (b"", "not JSON"), (b"{", "not JSON"), (b"{'r': 2}", "not JSON"), (b"\xff\xfe{}", "not JSON"),
    (b"[" * 100_000, "not JSON"),
], ids=["a list", "text", "null", "empty", "cut", "not quoted", "not utf-8", "too deep"])  # fmt: skip
def test_a_configuration_that_is_no_object_is_refused(content, shown, tmp_path):
    base = gpt()
    save_adapter(trained_adapter(base), tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"adapter_config\.json.*{shown}"):
        load_adapter(tmp_path / "adapter", base)
    save_model(base, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"config\.json.*{shown}"):
        load_model(tmp_path / "model")


@pytest.mark.parametrize("bit", [1, 4, 128])
def test_a_flipped_bit_in_what_describes_an_adapter_never_changes_it(bit, tmp_path):
    """Any byte of the JSON and of the tensors' header: refused, or (a space, say) the very same adapter."""
    base = gpt(n_layer=1)
    adapter = trained_adapter(base, target_modules=["q_proj", "k_proj"])
    save_adapter(adapter, tmp_path)
    refused = 0
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        whole = (tmp_path / name).read_bytes()
        end = len(whole) if name.endswith("json") else 8 + int.from_bytes(whole[:8], "little")
        for i in range(0, end, 2 if name.endswith("json") else 7):
            (tmp_path / name).write_bytes(whole[:i] + bytes([whole[i] ^ bit]) + whole[i + 1 :])
            try:
                assert same_adapter(load_adapter(tmp_path, base), adapter), f"{name}, byte {i}"
            except ValueError:
                refused += 1
        (tmp_path / name).write_bytes(whole)
    assert refused > 150


def rewrite(folder, change_config=lambda config: None, change_tensors=lambda tensors: None):
    """Change a saved model in both places that hold its configuration, as if it had been saved so."""
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    change_config(config)
    change_tensors(tensors)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", {"minilora.config": json.dumps(config)})


@pytest.mark.parametrize("change, shown", [
    (lambda c: c.pop("n_layer"), "n_layer"),
    (lambda c: c.pop("model_type"), "model_type"),
    (lambda c: c.update(model_type="gpt2"), "model_type"),
    (lambda c: c.update(scale_attn="yes"), "config.json.*unexpected.*scale_attn"),
    (lambda c: c.update(n_head=3), "n_embd 8.*n_head 3"),
    (lambda c: c.update(n_layer="2"), "n_layer.*'2'"),
    (lambda c: c.update(n_layer=3), "absent: h.2"),
    (lambda c: c.update(n_layer=1), "superfluous: h.1"),
    (lambda c: c.update(n_embd=16), r"misshapen.*\(8,\).*\(16,\)"),
    (lambda c: c.update(vocab_size=12), r"wte.weight is \(11, 8\), not \(12, 8\)"),
    (lambda c: c.update(positions="rope"), "superfluous: wpe.weight"),
    (lambda c: c.update(positions="alibi"), "positions.*alibi"),
    (lambda c: c.update(rope_theta="big"), "rope_theta.*big"),
    (lambda c: c.update(layer_norm_epsilon=float("nan")), "layer_norm_epsilon"),
], ids=lambda value: None if callable(value) else value)  # fmt: skip
def test_a_model_whose_configuration_is_wrong_is_refused(change, shown, tmp_path):
    save_model(gpt(), tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match=f"(?s){shown}") as refusal:
        load_model(tmp_path)
    assert str(tmp_path) in str(refusal.value), "the message names the file"


@pytest.mark.parametrize("change, shown", [
    (lambda t: t.pop("ln_f.weight"), "absent: ln_f.weight"),
    (lambda t: t.update({"lm_head.weight": t["wte.weight"].copy()}), "superfluous: lm_head.weight"),
    (lambda t: t.update({"ln_f.weight": np.ones((8, 1), "f4")}), r"ln_f.weight is \(8, 1\), not \(8,\)"),
    (lambda t: t.update({"h.0.mlp.up_proj.weight": np.ones((8, 32), "f4")}), r"\(8, 32\), not \(32, 8\)"),
    (lambda t: t.update({"ln_f.weight": np.ones(8, "i4")}), "ln_f.weight.*int32"),
    (lambda t: t.update({"ln_f.weight": np.ones(8, "f8")}), "ln_f.weight.*float64"),
], ids=lambda value: None if callable(value) else value)  # fmt: skip
def test_a_model_whose_tensors_are_wrong_is_refused(change, shown, tmp_path):
    save_model(gpt(), tmp_path)
    rewrite(tmp_path, change_tensors=change)
    with pytest.raises(ValueError, match=f"(?s){shown}") as refusal:
        load_model(tmp_path)
    assert str(tmp_path) in str(refusal.value), "the message names the file"


def test_an_edited_alpha_is_two_different_saves(tmp_path):
    base = gpt()
    save_adapter(trained_adapter(base, alpha=4), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 4', '"lora_alpha": 8'))
    with pytest.raises(ValueError, match="two different saves.*lora_alpha: 4 and 8.*save the folder again"):
        load_adapter(tmp_path, base)


@pytest.mark.parametrize("metadata, shown", [
    ({"minilora.base": "{"}, "minilora.base"),
    ({"minilora.base": "[1]"}, "minilora.base"),
    ({"minilora.config": "{"}, "minilora.config"),
    ({"minilora.config": "[1]"}, "minilora.config"),
], ids=["base cut", "base a list", "configuration cut", "configuration a list"])  # fmt: skip
def test_damaged_metadata_are_refused(metadata, shown, tmp_path):
    base = foreign(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file(load_file(path), path, metadata)
    with pytest.raises(ValueError, match=rf"adapter_model\.safetensors.*{shown}"):
        load_adapter(tmp_path, base)


def test_numbers_that_numpy_has_no_type_for_are_refused(tmp_path):
    """bfloat16, as many adapters are stored: NumPy cannot hold it, and the refusal has to say so."""
    base = foreign(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    entries, at = {}, 0
    for name, a in load_file(path).items():
        entries[name] = {"dtype": "BF16", "shape": list(a.shape), "data_offsets": [at, at := at + 2 * a.size]}
    header = json.dumps(entries).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(at))
    with pytest.raises(ValueError, match=r"(?i)adapter_model\.safetensors.*(bf16|bfloat16)"):
        load_adapter(tmp_path, base)


def test_files_of_two_saves_are_not_mixed(tmp_path):
    base = gpt()
    save_adapter(trained_adapter(base, r=2), tmp_path / "a")
    save_adapter(trained_adapter(base, r=3), tmp_path / "b")
    os.replace(tmp_path / "b" / "adapter_model.safetensors", tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="two different saves.*r: 3 and 2"):
        load_adapter(tmp_path / "a", base)


class Trap:
    """Unpickling this makes the file `sprung`."""

    def __init__(self, sprung):
        self.sprung = str(sprung)

    def __reduce__(self):
        return (open, (self.sprung, "w"))


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_model.bin"])
def test_a_pickle_is_refused_unopened(name, tmp_path):
    base, sprung = gpt(), tmp_path / "sprung"
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(FULL_PEFT))
    (folder / "config.json").write_text("{}")
    (folder / name).write_bytes(pickle.dumps(Trap(sprung)))
    for load in (lambda: load_adapter(folder, base), lambda: load_model(folder)):
        with pytest.raises(ValueError, match=f"{re.escape(name)} is a pickle.*save it again as .*safetensors"):
            load()
    (folder / name).rename(folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="damaged"):
        load_adapter(folder, base)
    assert not sprung.exists()


def unpickling(source):
    """Every way of this file to run what a data file says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module or ""]
        elif isinstance(node, ast.keyword):
            found += [node.arg or ""]
        elif isinstance(node, ast.Call):
            found += [ast.unparse(node.func)]
    dangerous = {"pickle", "cPickle", "_pickle", "dill", "joblib", "marshal", "shelve", "allow_pickle", "torch",
                 "np.load", "numpy.load", "eval", "exec"}  # fmt: skip
    return dangerous & {*found, *(name.partition(".")[0] for name in found)}


@pytest.mark.parametrize("path", sorted((ROOT / "minilora").glob("*.py")), ids=lambda path: path.stem)
def test_no_file_of_the_library_can_unpickle(path):
    assert unpickling(path.read_text(encoding="utf-8")) == set()


@pytest.mark.parametrize("planted", ["import pickle", "from pickle import load", "np.load(f, allow_pickle=True)",
                                     "def f(x):\n    return eval(x)"])  # fmt: skip
def test_a_planted_unpickling_is_found(planted):
    assert unpickling(planted)


# What is not saved.


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_adapter_that_is_not_finite_is_not_saved_and_the_old_one_stays(value, tmp_path):
    base = gpt()
    good = trained_adapter(base)
    save_adapter(good, tmp_path)
    broken = trained_adapter(base)
    broken.pairs["h.1.mlp.up_proj"].lora_B.data[3, 1] = value
    with pytest.raises(ValueError, match="h.1.mlp.up_proj.lora_B.*learning rate"):
        save_adapter(broken, tmp_path)
    assert same_adapter(load_adapter(tmp_path, base), good)
    with pytest.raises(ValueError, match="learning rate"):
        save_adapter(broken, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_model_that_carries_an_adapter_is_not_saved_as_plain_nor_is_an_adapter(tmp_path):
    base = gpt()
    adapter = trained_adapter(base)
    for model in (attach(base, adapter), attach(base, stack([adapter, None])), adapter):
        with pytest.raises(ValueError, match=r"lora_A.*merge\(model\)"):
            save_model(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


# Interrupted.


def test_a_rename_that_fails_leaves_the_old_save(tmp_path, monkeypatch):
    base = gpt()
    old, new = trained_adapter(base, seed=1), trained_adapter(base, seed=2)
    save_adapter(old, tmp_path)

    def refuse(source, target):
        raise OSError("the disk said no")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="the disk said no"):
        save_adapter(new, tmp_path)
    assert same_adapter(load_adapter(tmp_path, base), old)
    assert len(list(tmp_path.iterdir())) == 2, "nothing temporary is left"


def stop_at_the_json(source, target, real=os.replace):
    if str(target).endswith(".json"):
        raise KeyboardInterrupt
    real(source, target)


@pytest.mark.parametrize("r", [2, 3], ids=["one configuration", "two configurations"])
def test_a_stop_between_the_two_renames_is_the_new_save(r, tmp_path, monkeypatch):
    base = gpt()
    old, new = trained_adapter(base, seed=1), trained_adapter(base, seed=2, r=r)
    save_adapter(old, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop_at_the_json)
        with pytest.raises(KeyboardInterrupt):
            save_adapter(new, tmp_path)
    assert same_adapter(load_adapter(tmp_path, base), new)
    assert same_adapter(load_adapter(tmp_path, base), new), "loading changes nothing"
    save_adapter(old, tmp_path)
    assert same_adapter(load_adapter(tmp_path, base), old), "saving again repairs it"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_first_save_that_stops_between_its_two_renames_is_read_too(tmp_path, monkeypatch):
    model = gpt(n_layer=1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop_at_the_json)
        with pytest.raises(KeyboardInterrupt):
            save_model(model, tmp_path)
    assert not (tmp_path / "config.json").exists()
    assert bits(load_model(tmp_path)) == bits(model)


class Moments:
    """A copy of `folder` for every moment at which a kill could fall while a save is under way."""

    def __init__(self, folder, copies, monkeypatch):
        self.folder, self.copies, self.found = folder, copies, []
        self.after(monkeypatch, os, "replace")
        self.after(monkeypatch, os, "fsync")
        moments = self

        class Slowly:
            """A file whose content arrives in two parts."""

            def __init__(self, path, mode):
                self.file = open(path, mode)
                moments.copy()

            def __enter__(self):
                return self

            def __exit__(self, *raised):
                self.file.close()
                moments.copy()

            def __getattr__(self, name):
                return getattr(self.file, name)

            def write(self, content):
                for part in (content[: len(content) // 2], content[len(content) // 2 :]):
                    self.file.write(part)
                    self.file.flush()
                    moments.copy()

        monkeypatch.setattr(files, "open", Slowly, raising=False)

    def after(self, monkeypatch, owner, name):
        real = getattr(owner, name)

        def followed(*arguments):
            real(*arguments)
            self.copy()

        monkeypatch.setattr(owner, name, followed)

    def copy(self):
        self.found.append(self.copies / f"{len(self.found)}")
        shutil.copytree(self.folder, self.found[-1])


@pytest.mark.parametrize("r", [2, 3], ids=["one configuration", "two configurations"])
def test_a_kill_at_any_moment_leaves_the_old_save_or_the_new_one(r, tmp_path, monkeypatch):
    """And so does a kill of the save after that, at any moment too, over whatever the first one left behind."""
    base = gpt(n_layer=1)
    saves = [trained_adapter(base, seed, r) for seed, r in enumerate((2, r, 2, r))]

    def moments(folder, adapter):
        copies = tmp_path / f"moments-{len(list(tmp_path.iterdir()))}"
        with monkeypatch.context() as patch:
            seen = Moments(folder, copies, patch)
            save_adapter(adapter, folder)
        assert len(seen.found) >= 10
        return seen.found

    def which(folder):
        found = load_adapter(folder, base)
        (index,) = [i for i, save in enumerate(saves) if same_adapter(found, save)]
        return index

    folder = tmp_path / "adapter"
    save_adapter(saves[0], folder)
    first = moments(folder, saves[1])
    outcomes = [which(left) for left in first]
    assert outcomes == sorted(outcomes) and set(outcomes) == {0, 1} and which(folder) == 1
    for left, outcome in zip(first, outcomes, strict=True):
        later = [which(again) for again in moments(left, saves[2])]
        assert later == sorted(later) and set(later) == {outcome, 2} and which(left) == 2
        assert len(list(left.iterdir())) == 2, "nothing of the killed save is left"


def garbage(folder, adapter):
    return b"{", b"\0" * 9


def another_save(folder, adapter):
    save_adapter(adapter, folder / "other")
    return [(folder / "other" / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")]


@pytest.mark.parametrize("left_behind", [garbage, another_save])
def test_what_a_kill_of_long_ago_left_behind_is_in_nobodys_way(left_behind, tmp_path):
    base = gpt()
    adapter, stale = trained_adapter(base), trained_adapter(base, r=4, alpha=7)
    folder = tmp_path / "adapter"
    save_adapter(adapter, folder)
    config, tensors = left_behind(tmp_path, stale)
    (folder / ".adapter_config.json.tmp").write_bytes(config)
    (folder / ".adapter_model.safetensors.tmp").write_bytes(tensors)
    assert same_adapter(load_adapter(folder, base), adapter)
    path = folder / "adapter_config.json"
    whole = path.read_text()
    path.write_text(whole.replace('"lora_alpha": 4', '"lora_alpha": 8'))
    with pytest.raises(ValueError, match="two different saves.*lora_alpha: 4 and 8"):
        load_adapter(folder, base)
    save_adapter(adapter, folder)
    assert same_adapter(load_adapter(folder, base), adapter) and path.read_text() == whole
    assert len(list(folder.iterdir())) == 2


def test_each_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace
    note = lambda file, what: events.append((os.stat(file).st_ino, what, os.stat(file).st_size))
    monkeypatch.setattr(os, "fsync", lambda number: (fsync(number), note(number, "on disk")))
    monkeypatch.setattr(os, "replace", lambda a, b: (note(a, Path(b).name), replace(a, b)))
    save_model(gpt(), tmp_path)
    assert [what for _, what, _ in events] == ["on disk", "on disk", "model.safetensors", "config.json"]
    assert [(file, size) for file, _, size in events[:2]] == [(file, size) for file, _, size in events[2:]]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "Ctrl-C"])
def test_a_write_that_stops_half_way_leaves_the_old_save(error, tmp_path, monkeypatch):
    model, other = gpt(1), gpt(2)
    save_model(model, tmp_path)

    class Half:
        def __init__(self, path, mode):
            self.file = open(path, mode)

        def __enter__(self):
            return self

        def __exit__(self, *raised):
            self.file.close()

        def write(self, content):
            self.file.write(content[: len(content) // 2])
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(files, "open", Half, raising=False)
        with pytest.raises(type(error)):
            save_model(other, tmp_path)
    assert bits(load_model(tmp_path)) == bits(model)
    assert len(list(tmp_path.iterdir())) == 2, "nothing temporary is left"


SAVE_FOREVER = """
import sys
import numpy as np
from minilora import GPT, GPTConfig, LoRAConfig, init_adapter, save_adapter
base = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=8, vocab_size=11, block_size=16), np.random.default_rng(0))
adapters = [init_adapter(base, LoRAConfig(r, 4, "all-linear"), np.random.default_rng(r)) for r in (2, int(sys.argv[2]))]
adapters[1].pairs["h.0.attn.q_proj"].lora_B.data[:] = 1
print("ready", flush=True)
while True:
    for adapter in adapters:
        save_adapter(adapter, sys.argv[1])
"""


@pytest.mark.skipif(os.name != "posix", reason="sends SIGKILL to a process")
@pytest.mark.parametrize("r", [2, 5], ids=["one configuration", "two configurations"])
def test_a_process_killed_while_saving_leaves_one_whole_save(r, tmp_path):
    base, rng = gpt(), np.random.default_rng(r)
    saves = [init_adapter(base, LoRAConfig(k, 4, "all-linear"), np.random.default_rng(k)) for k in (2, r)]
    saves[1].pairs["h.0.attn.q_proj"].lora_B.data[:] = 1
    for _ in range(4):
        child = subprocess.Popen([sys.executable, "-c", SAVE_FOREVER, str(tmp_path), str(r)], cwd=ROOT,
                                 stdout=subprocess.PIPE)  # fmt: skip
        try:
            child.stdout.readline()
            while not (tmp_path / "adapter_config.json").exists():
                time.sleep(0.001)
            time.sleep(rng.uniform(0.05, 0.2))
            child.send_signal(signal.SIGKILL)
            child.wait()
            found = load_adapter(tmp_path, base)
            assert any(same_adapter(found, save) for save in saves)
        finally:
            child.kill()
            child.wait()
            child.stdout.close()
    save_adapter(saves[0], tmp_path)  # whatever the killed left behind is in nobody's way
    assert same_adapter(load_adapter(tmp_path, base), saves[0])
    assert len(list(tmp_path.iterdir())) == 2
