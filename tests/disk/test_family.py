"""A family is one record: a made-up third one is saved, loaded and adapted without a line of any other file."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from strategies import bits, same_adapter, small_gpt, trained_adapter

from minilora import (
    LoRAConfig,
    attach,
    init_peft_adapter,
    load_adapter,
    load_gpt2,
    load_model,
    merge,
    save_adapter,
    save_merged,
    save_model,
)
from minilora import functional as F
from minilora.disk import models
from minilora.disk.family import Family, check_fields
from minilora.disk.loaders import note_on_base
from minilora.disk.tokenizer import load_tokenizer
from minilora.graph import no_grad
from minilora.nn import Embedding, Linear, Module, normal_or_zeros


@dataclass(frozen=True)
class GatedConfig:
    """The shape of a Gated, in its own words."""

    depth: int
    width: int
    vocab_size: int


class Layer(Module):
    """x + mix(gate(x) * value(x)): two linears that files join, and a square one."""

    def __init__(self, config, rng, dtype):
        self.gate = Linear(normal_or_zeros(rng, 0.5, (config.width, config.width), dtype))
        self.value = Linear(normal_or_zeros(rng, 0.5, (config.width, config.width), dtype))
        self.mix = Linear(normal_or_zeros(rng, 0.5, (config.width, config.width), dtype))

    def __call__(self, x):
        return x + self.mix(self.gate(x) * self.value(x))


class Gated(Module):
    """A model that is no GPT: ids (B, T) -> logits (B, T, V)."""

    def __init__(self, config, rng, dtype="float32"):
        self.config = config
        self.embed = Embedding(normal_or_zeros(rng, 1.0, (config.vocab_size, config.width), dtype))
        self.layers = [Layer(config, rng, dtype) for _ in range(config.depth)]
        self.out = Embedding(normal_or_zeros(rng, 1.0, (config.vocab_size, config.width), dtype))

    def __call__(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return F.linear(x, self.out.weight)


def read_config(folder, fields, tensors):
    check_fields(fields, {"activation": ("none",)})
    return GatedConfig(fields["num_layers"], fields["d_model"], fields["vocab_size"])


def write_config(model, fields, dtype):
    config = model.config
    return {"model_type": "gated", "num_layers": config.depth, "d_model": config.width,
            "vocab_size": config.vocab_size, "saved_as": dtype}  # fmt: skip


GATED = Family(
    title="a gated model",
    model_types=("gated",),
    model=Gated,
    block=r"layers\.\d+\.",
    parts={"pair": ("gate", "value"), "blend": ("mix",)},
    prefix="net.",
    head="out",
    transposed=True,
    unused=r"layers\.\d+\.steps",
    read_config=read_config,
    write_config=write_config,
    count=lambda config: config.depth * 3 * config.width**2 + 2 * config.vocab_size * config.width,
    describe=lambda config: f"{config.depth} layers of {config.width} channels",
    note="nobody else reads gated models",
)
PAIR = "net.layers.0.pair.weight"
IDS = np.array([[1, 2, 3], [4, 5, 0]])


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(models, "FAMILIES", (GATED, *models.FAMILIES))


def gated(seed=0):
    return Gated(GatedConfig(depth=2, width=4, vocab_size=6), np.random.default_rng(seed))


def logits(model):
    with no_grad():
        return model(IDS).data


def quietly(folder, base):
    return load_adapter(folder, base, say=lambda receipt: None)


def edit(folder, change):
    """The folder after `change(fields, tensors)`, as another program would have written it."""
    fields = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    change(fields, tensors)
    (folder / "config.json").write_text(json.dumps(fields))
    save_file({name: np.ascontiguousarray(t) for name, t in tensors.items()}, folder / "model.safetensors")


# Models.


def test_its_model_comes_back_to_the_bit_under_its_own_names_and_its_own_way_round(tmp_path):
    model = gated()
    save_model(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    layer = model.layers[1]
    assert sorted(stored) == sorted(["net.embed.weight", "out.weight", *(
        f"net.layers.{i}.{part}.weight" for i in (0, 1) for part in ("pair", "blend"))])  # fmt: skip
    joined = np.concatenate([layer.gate.weight.data, layer.value.weight.data])
    assert np.array_equal(stored["net.layers.1.pair.weight"], joined.T)
    assert np.array_equal(stored["net.layers.1.blend.weight"], layer.mix.weight.data.T)
    again = load_model(tmp_path)
    assert type(again) is Gated and again.config == model.config
    assert bits(again) == bits(model) and np.array_equal(logits(again), logits(model))


def test_what_files_of_it_vary_in_is_read_too(tmp_path):
    save_model(gated(), tmp_path)

    def bare(fields, tensors):
        for name in list(tensors):
            tensors[name.removeprefix("net.")] = tensors.pop(name)
        tensors["layers.0.steps"] = np.ones(3, "f4")

    edit(tmp_path, bare)
    assert bits(load_model(tmp_path)) == bits(gated())


@pytest.mark.parametrize("change, shown", [
    (lambda f, t: f.update(activation="relu"), "config.json: activation='relu' changes what the model computes"),
    (lambda f, t: f.update(num_layers=3), "absent: layers.2.blend.weight, layers.2.pair.weight"),
    (lambda f, t: f.update(d_model=10**6), "config.json: it describes a model of"),
    (lambda f, t: f.update(model_type="other"), "'other' is another kind .* only 'gated' or 'gpt2' or None or 'llama'"),
    (lambda f, t: t.update({PAIR: t[PAIR].T}), r"is \(8, 4\), not \(4, 8\)"),
    (lambda f, t: t.update({"embed.weight": t["net.embed.weight"]}), "twice, with and without net.; keep one"),
], ids=["a field", "deeper", "a giant", "of no family", "the other way round", "twice"])  # fmt: skip
def test_what_it_cannot_read_is_refused_by_the_same_rules(change, shown, tmp_path):
    save_model(gated(), tmp_path)
    edit(tmp_path, change)
    with pytest.raises(ValueError, match=shown) as refusal:
        load_model(tmp_path)
    assert str(tmp_path) in str(refusal.value)


def test_a_loader_of_one_family_refuses_another(tmp_path):
    save_model(gated(), tmp_path)
    with pytest.raises(ValueError, match="model_type='gated' is another kind of model; only 'gpt2' or None is"):
        load_gpt2(tmp_path)


# Adapters.


@pytest.mark.parametrize("target_modules", [["gate"], ["gate", "value"], ["mix"], "all-linear"])
def test_its_adapter_comes_back_to_the_bit(target_modules, tmp_path):
    base = gated()
    adapter = trained_adapter(base, target_modules=target_modules)
    save_adapter(adapter, tmp_path)
    assert same_adapter(quietly(tmp_path, base), adapter)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is True and set(config["target_modules"]) <= {"pair", "blend"}


def test_its_adapter_has_the_names_of_its_files_and_is_found_without_their_prefix(tmp_path):
    base = gated()
    adapter = init_peft_adapter(base, LoRAConfig(2, 4, ["pair"]), np.random.default_rng(0))
    for pair in adapter.pairs.values():
        pair.lora_B.data[:] = 1
    save_adapter(adapter, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    stored = load_file(path)
    assert stored.keys() == {f"base_model.model.net.layers.{i}.pair.lora_{x}.weight" for i in (0, 1) for x in "AB"}
    assert stored["base_model.model.net.layers.0.pair.lora_B.weight"].shape == (8, 2)
    save_file({name.replace("net.", ""): t for name, t in stored.items()}, path, {"format": "pt"})
    again = quietly(tmp_path, base)
    assert bits(again) == bits(adapter)
    assert again.pairs["layers.0.gate"].lora_A is again.pairs["layers.0.value"].lora_A


def test_merged_into_it_the_model_is_saved_like_any_other(tmp_path):
    base = gated()
    adapted = attach(base, trained_adapter(base, target_modules="all-linear"))
    save_merged(adapted, tmp_path, say=lambda text: None)
    assert bits(load_model(tmp_path)) == bits(merge(adapted)) != bits(base)


def test_the_receipt_and_the_note_are_in_its_words(tmp_path):
    base, receipts = gated(), []
    save_adapter(trained_adapter(base, target_modules=["gate"]), tmp_path)
    load_adapter(tmp_path, base, say=receipts.append)
    assert "  2 x pair -> gate, value: r=2, scaling 2\n" in receipts[0] and "recognised" in receipts[0]
    shapes = {name: t.shape for name, t in load_file(tmp_path / "adapter_model.safetensors").items()}
    assert note_on_base(shapes) == "nobody else reads gated models"


# Its neighbours.


@pytest.mark.parametrize("positions, name", [("learned", "transformer.h.0.attn.c_attn"), ("rope", "h.0.attn.q_proj")])
def test_models_and_adapters_of_other_families_stay_theirs(positions, name, tmp_path):
    base = small_gpt(positions=positions)
    save_model(base, tmp_path / "base")
    assert f"{name}.weight" in load_file(tmp_path / "base" / "model.safetensors")
    assert bits(load_model(tmp_path / "base")) == bits(base)
    adapter = trained_adapter(base)
    save_adapter(adapter, tmp_path / "adapter")
    assert f"base_model.model.{name}.lora_A.weight" in load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert same_adapter(quietly(tmp_path / "adapter", base), adapter)
    with pytest.raises(ValueError, match="none of the file's modules is in the base"):
        quietly(tmp_path / "adapter", gated())


def test_it_knows_no_characters(tmp_path):
    save_model(Gated(GatedConfig(1, 4, 96), np.random.default_rng(0)), tmp_path)
    with pytest.raises(FileNotFoundError, match="tokenizer.json, or vocab.json"):
        load_tokenizer(tmp_path)


def test_without_its_row_in_the_table_it_is_refused(tmp_path, monkeypatch):
    save_model(gated(), tmp_path)
    monkeypatch.setattr(models, "FAMILIES", models.FAMILIES[1:])
    with pytest.raises(ValueError, match="model_type='gated' is another kind"):
        load_model(tmp_path)
    with pytest.raises(TypeError, match="save_model: expected GPT, Llama, got Gated"):
        save_model(gated(), tmp_path / "again")
