"""DoRA in PEFT's layout: written and read to the bit, also in one c_attn, and refused where a file cannot hold it."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from strategies import bits, close, same_adapter, small_llama, tiny_gpt

from minilora import (
    Adapter,
    LoRAConfig,
    Tensor,
    attach,
    init_dora,
    init_peft_adapter,
    init_peft_dora,
    load_adapter,
    load_gpt2,
    merge,
    save_adapter,
    save_merged,
)
from minilora.disk import peft
from minilora.disk.rounding import rounding_report
from minilora.dora import DoRAPair
from minilora.graph import no_grad
from minilora.lora import LoRAPair

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
IDS = np.array([[1, 2, 3, 4, 5]])
EVERY = LoRAConfig(2, 3, "all-linear")


def rng():
    return np.random.default_rng(4)


def learned(adapter):
    drawn = rng()
    for pair in adapter.pairs.values():
        pair.lora_B.data[...] = 0.3 * drawn.standard_normal(pair.lora_B.shape)
        pair.magnitude.data[...] *= drawn.uniform(0.7, 1.4, pair.magnitude.shape)
    return adapter


def fused(base):
    """On a GPT-2, c_attn's three parts share one lora_A, as in PEFT."""
    return init_peft_dora(base, LoRAConfig(2, 3, ["c_attn", "mlp.c_proj"]), rng())


# {name: (base, how its adapter is made)}
CASES = {
    "rotary gpt": (lambda: tiny_gpt("rope", dtype="float32"), lambda base: init_dora(base, EVERY, rng())),
    "gpt-2, one A": (lambda: tiny_gpt(dtype="float32"), fused),
    "gpt-2, an A for each part": (lambda: tiny_gpt(dtype="float32"), lambda base: init_dora(base, EVERY, rng())),
    "llama": (small_llama, lambda base: init_dora(base, EVERY, rng())),
    "rslora and a pattern": (small_llama, lambda base: init_dora(
        base, LoRAConfig(2, 3, ["q_proj", "down_proj"], use_rslora=True, rank_pattern={"q_proj": 3}), rng())),
}  # fmt: skip


def outputs(model, ids=IDS):
    with no_grad():
        return model(ids).data


def quietly(folder, base, **options):
    return load_adapter(folder, base, say=lambda receipt: None, **options)


def saved(case, folder):
    """(base, adapter) of a case, the adapter in `folder`."""
    make_base, make = CASES[case]
    base = make_base()
    adapter = learned(make(base))
    save_adapter(adapter, folder)
    return base, adapter


@pytest.mark.parametrize("case", CASES)
def test_it_comes_back_to_the_bit_and_computes_the_same_bits(case, tmp_path):
    base, adapter = saved(case, tmp_path)
    again = quietly(tmp_path, base)
    assert same_adapter(again, adapter)
    assert {type(pair) for pair in again.pairs.values()} == {DoRAPair}
    assert np.array_equal(outputs(attach(base, again)), outputs(attach(base, adapter)))


@pytest.mark.parametrize("case", CASES)
def test_also_after_another_program_has_dropped_our_metadata(case, tmp_path):
    base, adapter = saved(case, tmp_path)
    save_file(load_file(tmp_path / TENSORS), tmp_path / TENSORS, {"format": "pt"})
    again = attach(base.astype("float64"), quietly(tmp_path, base).astype("float64"))
    assert close(outputs(again), outputs(attach(base.astype("float64"), adapter.astype("float64"))))


def test_the_files_are_as_peft_has_them(tmp_path):
    base, adapter = saved("gpt-2, one A", tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    attn = "base_model.model.transformer.h.0.attn.c_attn"
    assert {key: t.shape for key, t in tensors.items() if key.startswith(attn)} == {
        f"{attn}.lora_A.weight": (2, 8), f"{attn}.lora_B.weight": (24, 2), f"{attn}.lora_magnitude_vector": (24,)
    }  # fmt: skip
    # Three blocks of rows, in the order of the rows of c_attn.
    blocks = [adapter.pairs[f"h.0.attn.{part}_proj"].magnitude.data for part in "qkv"]
    assert np.array_equal(tensors[f"{attn}.lora_magnitude_vector"], np.concatenate(blocks))
    assert json.loads((tmp_path / CONFIG).read_text())["use_dora"] is True


def test_the_file_of_plain_lora_does_not_speak_of_it(tmp_path):
    base = tiny_gpt(dtype="float32")
    adapter = init_peft_adapter(base, LoRAConfig(2, 3, ["c_attn"]), rng())
    save_adapter(adapter, tmp_path, allow_untrained=True)
    assert "use_dora" not in json.loads((tmp_path / CONFIG).read_text())


def test_the_receipt_says_dora_and_counts_its_tensors(tmp_path):
    base, _ = saved("gpt-2, one A", tmp_path)
    receipts = []
    load_adapter(tmp_path, base, say=receipts.append)
    assert "12 tensors, all used, DoRA" in receipts[0] and "attn.c_attn -> q_proj, k_proj, v_proj" in receipts[0]


def test_merged_and_written_as_a_model_it_computes_the_same(tmp_path):
    base, adapter = saved("gpt-2, one A", tmp_path / "adapter")
    model = attach(base, adapter)
    save_merged(model, tmp_path / "merged", say=lambda line: None)
    assert np.abs(outputs(load_gpt2(tmp_path / "merged")) - outputs(model)).max() < 1e-5
    assert np.abs(outputs(model) - outputs(base)).max() > 0.05


def test_the_rounding_of_a_merge_is_measured_against_the_whole_change_of_the_weight():
    """W' - W, and not the product B A, which is only a part of it."""
    base = tiny_gpt(dtype="float32")
    adapter = learned(init_dora(base, EVERY, rng()))
    model = attach(base, adapter)
    for line in rounding_report(model, "float64"):
        W = dict(base.named_modules())[line.module].weight.data.astype(np.float64)
        layer = adapter.pairs[line.module].astype("float64")
        V = W + layer.delta()
        update = layer.magnitude.data[:, None] * V / np.linalg.norm(V, axis=1, keepdims=True) - W
        assert np.isclose(line.size, np.linalg.norm(update) / np.linalg.norm(W), rtol=1e-10)
        assert line.error < 1e-5
    assert len(rounding_report(model, "bfloat16", merge(model))) == len(adapter.pairs)


# What a file cannot hold, and what is wrong in one.


@pytest.mark.parametrize("parts", [["q_proj", "v_proj"], ["k_proj"]])
def test_a_part_of_c_attn_without_a_magnitude_is_refused_because_its_rows_have_one_too(parts, tmp_path):
    base = tiny_gpt(dtype="float32")
    adapter = learned(init_dora(base, LoRAConfig(2, 3, parts), rng()))
    before = bits(adapter)
    with pytest.raises(ValueError, match=r"c_attn has one magnitude for all its rows, but h\.0\.attn\..*adapt all"):
        save_adapter(adapter, tmp_path / "new")
    assert not (tmp_path / "new").exists() and bits(adapter) == before


def test_one_as_peft_would_make_it_can_be_saved_and_what_could_not_be_is_refused_before_it_is_trained():
    base = tiny_gpt(dtype="float32")
    with pytest.raises(ValueError, match=r"c_attn has one magnitude .*h\.0\.attn\.k_proj has no pair"):
        init_peft_dora(base, LoRAConfig(2, 3, ["q_proj", "v_proj"]), rng())
    assert len(init_peft_dora(base, LoRAConfig(2, 3, ["c_attn"]), rng()).pairs) == 6
    # Where the parts are modules of their own, each may be adapted alone.
    for other in (tiny_gpt("rope", dtype="float32"), small_llama()):
        assert len(init_peft_dora(other, LoRAConfig(2, 3, ["q_proj", "v_proj"]), rng()).pairs) == 4


def test_pairs_of_two_kinds_are_refused(tmp_path):
    base = tiny_gpt("rope", dtype="float32")
    adapter = learned(init_dora(base, EVERY, rng()))
    pairs = dict(adapter.pairs)
    name = next(iter(pairs))
    pairs[name] = init_peft_adapter(base, EVERY, rng()).pairs[name]
    with pytest.raises(ValueError, match="a file holds pairs of LoRA or of DoRA, this adapter DoRAPair, LoRAPair"):
        save_adapter(Adapter(EVERY, pairs, None), tmp_path)


def test_one_that_was_never_trained_is_refused_as_lora_is(tmp_path):
    base = tiny_gpt(dtype="float32")
    with pytest.raises(ValueError, match="never trained"):
        save_adapter(fused(base), tmp_path)
    adapter = learned(fused(base))
    adapter.pairs["h.0.attn.q_proj"].magnitude.data[0] = np.inf
    with pytest.raises(ValueError, match="q_proj.magnitude hold inf or nan"):
        save_adapter(adapter, tmp_path)


KEY = "base_model.model.transformer.h.1.attn.c_attn.lora_magnitude_vector"


@pytest.mark.parametrize("change, shown", [
    (lambda t: t.pop(KEY), "h.1.attn.c_attn has no lora_magnitude_vector; use_dora=True needs one"),
    (lambda t: t.update({KEY: t[KEY][:8].copy()}), r"lora_B \(24, 2\) and lora_magnitude_vector \(8,\)"),
    (lambda t: t.update({KEY: t[KEY][:, None].copy()}), r"lora_magnitude_vector \(24, 1\)"),
    (lambda t: t[KEY].fill(np.nan), "must hold floats, and no inf or nan"),
    (lambda t: t.update({KEY: t[KEY].astype(np.int32)}), "must hold floats"),
], ids=["absent", "short", "a matrix", "nan", "whole numbers"])  # fmt: skip
def test_a_wrong_magnitude_in_a_file_is_refused(change, shown, tmp_path):
    base, _ = saved("gpt-2, one A", tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    change(tensors)
    save_file(tensors, tmp_path / TENSORS, {"format": "pt"})
    with pytest.raises(ValueError, match=shown):
        quietly(tmp_path, base)


def test_it_is_refused_on_another_base(tmp_path):
    saved("gpt-2, one A", tmp_path)
    with pytest.raises(ValueError, match="made for"):
        quietly(tmp_path, tiny_gpt(seed=9, dtype="float32"))


def test_blocks_of_magnitudes_in_another_order_are_noticed(tmp_path, monkeypatch):
    real = peft.join_magnitudes
    monkeypatch.setattr(peft, "join_magnitudes", lambda name, parts, pairs: real(name, parts[::-1], pairs))
    with pytest.raises(AssertionError):
        test_it_comes_back_to_the_bit_and_computes_the_same_bits("gpt-2, one A", tmp_path)
    with pytest.raises(AssertionError):
        test_the_files_are_as_peft_has_them(tmp_path)


def test_a_reader_that_takes_it_for_lora_is_noticed(tmp_path, monkeypatch):
    real = peft._read_pairs
    monkeypatch.setattr(peft, "_read_pairs", lambda *arguments: {
        name: LoRAPair(pair.lora_A, pair.lora_B, pair.scaling) for name, pair in real(*arguments).items()
    })  # fmt: skip
    with pytest.raises(AssertionError):
        test_also_after_another_program_has_dropped_our_metadata("llama", tmp_path)


def test_the_tensors_stay_trainable(tmp_path):
    base, _ = saved("llama", tmp_path)
    again = quietly(tmp_path, base)
    attach(base, again).loss(IDS[:, :-1], IDS[:, 1:]).backward()
    assert all(isinstance(p, Tensor) and p.grad is not None for p in again.parameters())
