"""Models as folders, whatever their family: the same bits and numbers come back, beside what belongs to them."""

import os
import shutil
import tracemalloc

import numpy as np
import pytest
from safetensors.numpy import load_file
from strategies import bits, small_gpt, tiny_mlp, trained_adapter

from minilora import attach, load_model, merge, save_gpt2, save_model
from minilora.backend import get_array_module
from minilora.disk.folder import UNFINISHED
from minilora.disk.gpt2 import GPT2
from minilora.disk.llama import LLAMA
from minilora.disk.models import families_of, family_of_adapter, family_of_fields, family_of_file
from minilora.disk.own import OWN
from minilora.graph import no_grad
from minilora.lora import Adapter
from minilora.tensor import Tensor


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("positions", ["learned", "rope"])
def test_a_model_can_be_saved_in_another_type(dtype, positions, tmp_path):
    model = small_gpt(positions=positions)
    save_model(model, tmp_path, dtype=dtype)
    assert {a.dtype.name for a in load_file(tmp_path / "model.safetensors").values()} == {dtype}
    rounded = model.map_tensors(lambda t: Tensor(t.data.astype(dtype).astype(np.result_type(dtype, "f4"))))
    assert bits(load_model(tmp_path)) == bits(rounded)


def test_what_is_no_gpt_is_not_saved_as_a_model(tmp_path):
    for thing in (trained_adapter(small_gpt()), small_gpt().h[0], small_gpt().wte):
        with pytest.raises((TypeError, ValueError), match="GPT"):
            save_model(thing, tmp_path / "model")


def test_a_merged_model_is_saved_like_any_other(tmp_path):
    for positions in ("learned", "rope"):
        base = small_gpt(positions=positions)
        merged = merge(attach(base, trained_adapter(base)))
        save_model(merged, tmp_path / positions)
        assert bits(load_model(tmp_path / positions)) == bits(merged)


@pytest.mark.parametrize("positions", ["learned", "rope"])
def test_saving_from_a_device_changes_nothing(positions, xp, tmp_path):
    model = small_gpt(positions=positions).to_device(xp)
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert bits(again) == bits(model)
    assert {get_array_module(p.data) for p in again.parameters()} == {np}


def test_what_was_loaded_computes_the_same_numbers(tmp_path):
    ids = np.array([[1, 2, 3, 4]])
    for positions in ("learned", "rope"):
        model = small_gpt(positions=positions)
        save_model(model, tmp_path / positions)
        with no_grad():
            assert np.array_equal(load_model(tmp_path / positions)(ids).data, model(ids).data)


def test_where_the_tensors_are_the_tokenizer_is_too(tmp_path, monkeypatch):
    """At each moment of a save, and no file ever stands half under its own name."""
    base, out, seen = tmp_path / "base", tmp_path / "out", []
    real = shutil.copyfile
    save_gpt2(small_gpt(), base)
    (base / "tokenizer.json").write_text("{}")

    def half(source, to):
        real(source, to)
        seen.append({path.name for path in out.iterdir()})
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "copyfile", half)
        save_gpt2(small_gpt(), out, like=base)
    assert seen.pop() == {UNFINISHED} and not list(out.iterdir())
    rename = os.replace
    monkeypatch.setattr(os, "replace", lambda *a: (rename(*a), seen.append({path.name for path in out.iterdir()})))
    save_gpt2(small_gpt(), out, like=base)
    assert [found - {UNFINISHED} for found in seen] == [
        {"tokenizer.json"}, {"tokenizer.json", "model.safetensors"},
        {"tokenizer.json", "model.safetensors", "config.json"}]  # fmt: skip
    assert (out / "tokenizer.json").read_text() == "{}"


def test_saving_takes_one_copy_of_the_numbers_and_loading_two(tmp_path):
    """What is in memory at once, beside the model: with a model of zeros, made for its names, it would be one more."""
    model = small_gpt(n_embd=128, vocab_size=300)
    size = sum(p.data.nbytes for p in model.parameters())
    peaks = []
    tracemalloc.start()
    try:
        for work in (lambda: save_model(model, tmp_path), lambda: load_model(tmp_path)):
            work()  # once before, so that what is imported and kept is not counted
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            work()
            peaks.append((tracemalloc.get_traced_memory()[1] - before) / size)
    finally:
        tracemalloc.stop()
    assert peaks[0] < 1.2 and peaks[1] < 2.4, peaks


# Whose is it?


def test_whose_adapter_it_is_is_told_by_its_names_and_its_base():
    learned, rope, mlp = small_gpt(), small_gpt(positions="rope"), tiny_mlp(5, 7, 3)
    assert family_of_adapter(trained_adapter(learned)) is GPT2
    assert family_of_adapter(trained_adapter(rope)) is OWN
    assert family_of_adapter(trained_adapter(mlp, target_modules="all-linear")) is OWN
    known = trained_adapter(learned)
    assert family_of_adapter(Adapter(known.config, known.pairs, None)) is GPT2


@pytest.mark.parametrize("modules, tensors, family", [
    (["transformer.h.0.attn.c_attn"], None, GPT2), (["h.0.mlp.c_fc"], ["wpe.weight", "wte.weight"], GPT2),
    (["transformer.h.0.attn.c_attn", "lm_head"], None, GPT2), (["h.0.attn.q_proj"], ["wte.weight"], OWN),
    (["h.0.attn.q_proj"], None, OWN), (["model.layers.0.self_attn.q_proj"], None, LLAMA), ([], None, None),
    (["layers.7.mlp.gate_proj"], ["norm.weight"], LLAMA), (["model.layers.0.other"], None, None),
    (["transformer.h.0.attn.c_attn"], ["wte.weight"], None),
])  # fmt: skip
def test_whose_file_it_is_is_told_by_its_modules_and_its_base(modules, tensors, family):
    assert family_of_file(modules, tensors) is family


@pytest.mark.parametrize("model_type, family", [("gpt2", GPT2), (None, GPT2), ("minilora-gpt", OWN),
                                                ("llama", LLAMA), ("qwen2", LLAMA), ("opt", None)])  # fmt: skip
def test_whose_folder_it_is_is_told_by_its_model_type(model_type, family):
    assert family_of_fields({"model_type": model_type}) is family
    assert family_of_fields({}) is GPT2, "old files have no model_type"


def test_the_last_family_leaves_every_name_as_it_is():
    assert families_of(tiny_mlp(5, 7, 3)) == [OWN]
    assert OWN.module_table(["layers.0", "x.c_attn"]) == {"layers.0": ["layers.0"], "x.c_attn": ["x.c_attn"]}


def test_a_gpt_may_have_an_adapter_in_the_names_of_either_family():
    assert families_of(small_gpt()) == [GPT2, OWN] and families_of(small_gpt(positions="rope")) == [OWN, GPT2]
