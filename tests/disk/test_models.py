"""Models as folders, whatever their family: the same bits and numbers come back, beside what belongs to them."""

import json
import os
import re
import shutil
import sys
import tracemalloc

import numpy as np
import pytest
import strict_array
from safetensors.numpy import load_file, save_file
from strategies import bits, resident_file_pages, small_gpt, small_llama, tiny_mlp, trained_adapter

from minilora import attach, load_adapter, load_model, merge, save_adapter, save_gpt2, save_model
from minilora.backend import get_array_module
from minilora.disk.folder import NAMES, UNFINISHED
from minilora.disk.gpt2 import GPT2
from minilora.disk.llama import LLAMA
from minilora.disk.models import TENSORS, families_of, family_of_adapter, family_of_fields, family_of_file
from minilora.disk.own import OWN
from minilora.disk.quantized import quantized_base
from minilora.disk.tensor_file import read_tensors
from minilora.graph import no_grad
from minilora.lora import Adapter
from minilora.nn import Embedding, Linear
from minilora.packed import StoredTensor
from minilora.quant import stored_as, widen
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
    # The list of the names comes first, and goes last.
    assert [found - {UNFINISHED, NAMES} for found in seen] == [
        set(), {"tokenizer.json"}, {"tokenizer.json", "model.safetensors"},
        {"tokenizer.json", "model.safetensors", "config.json"}]  # fmt: skip
    assert all(NAMES in found for found in seen) and not (out / NAMES).exists()
    assert (out / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize("positions, loading", [("learned", 1.2), ("rope", 0.1)])
def test_saving_takes_one_copy_of_the_numbers_and_loading_those_that_are_turned(positions, loading, tmp_path):
    """What is in memory at once, beside the model. A GPT-2's linears are turned; all else stays in the file."""
    model = small_gpt(n_embd=128, vocab_size=300, positions=positions)
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
    if sys.platform == "win32":
        # Nothing is mapped there.
        loading += 1.1
    assert peaks[0] < 1.2 and peaks[1] < loading, peaks


@pytest.mark.skipif(sys.platform != "linux", reason="asks the system as Linux answers")
def test_what_was_turned_is_not_kept_a_second_time_as_the_pages_of_its_file(tmp_path):
    model = small_gpt(n_embd=512)
    turned = sum(p.data.nbytes for name, p in model.named_parameters() if name.startswith("h."))
    save_model(model, tmp_path)
    before = resident_file_pages()
    loaded = load_model(tmp_path)
    assert resident_file_pages() - before < turned / 2
    # To compare them with their digests reads them once more.
    loaded.fingerprint()
    assert resident_file_pages() - before < turned / 2
    # The pages come back where they are asked for.
    assert bits(loaded) == bits(model)


# What is saved has digests, which are compared when somebody reads all of it.


def flip_a_bit_of(path, name):
    """Another value of the tensor `name`, in its lowest bit."""
    tensors, _ = read_tensors(path)
    at = path.read_bytes().index(tensors[name].tobytes()[:16])
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("kind, dtype", [
    ("learned", "float32"), ("rope", "float64"), ("llama", "float16"), ("llama", "bfloat16"),
])  # fmt: skip
def test_a_tensor_of_a_model_that_is_not_as_it_was_saved_is_found_by_its_fingerprint(kind, dtype, tmp_path):
    save_model(one_of(kind), tmp_path / "whole", dtype=dtype)
    names = list(read_tensors(tmp_path / "whole" / TENSORS)[0])
    load_model(tmp_path / "whole").fingerprint()
    # An odd step meets each kind of tensor in one block or another.
    for name in names[::3]:
        shutil.rmtree(tmp_path / "damaged", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "damaged")
        flip_a_bit_of(tmp_path / "damaged" / TENSORS, name)
        model = load_model(tmp_path / "damaged")
        with pytest.raises(ValueError, match=rf"{TENSORS}: the values of {re.escape(name)} are not those that were"):
            model.fingerprint()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_damaged_base_is_found_on_another_device_too(dtype, tmp_path):
    save_model(small_llama(), tmp_path, dtype=dtype)
    # In 16 bits this one is packed.
    flip_a_bit_of(tmp_path / TENSORS, "model.layers.0.mlp.down_proj.weight")
    model = load_model(tmp_path).map_tensors(lambda t: t.to_device(strict_array))
    with pytest.raises(ValueError, match="the values of model.layers.0.mlp.down_proj.weight are not those that were"):
        model.fingerprint()


def test_a_damaged_base_is_not_packed_and_takes_no_adapter(tmp_path):
    base = small_llama()
    save_model(base, tmp_path / "base")
    save_adapter(trained_adapter(base), tmp_path / "adapter")
    flip_a_bit_of(tmp_path / "base" / TENSORS, "model.layers.0.mlp.down_proj.weight")
    model = load_model(tmp_path / "base")
    for use in (
        lambda: quantized_base(model, "nf4", lambda line: None, quiet=True),
        lambda: load_adapter(tmp_path / "adapter", model, say=lambda receipt: None),
        lambda: trained_adapter(model),
    ):
        with pytest.raises(ValueError, match="mlp.down_proj.weight are not those that were saved"):
            use()


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["learned", "rope", "llama"])
def test_a_model_of_inf_or_nan_is_not_saved(kind, number, tmp_path):
    model = one_of(kind).trainable_copy()
    model.parameters()[-1].data.reshape(-1)[3] = number
    with pytest.raises(ValueError, match="holds inf or nan"):
        save_model(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# What was loaded is frozen, and stays in its file.


def one_of(kind, seed=0):
    """A GPT-2, a rotary GPT or a Llama, and the class of none of them matters."""
    if kind == "llama":
        return small_llama(seed)
    return small_gpt(seed, positions=kind)


KINDS = ["learned", "rope", "llama"]


@pytest.mark.parametrize("xp", [np, strict_array], ids=["numpy", "strict_array"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_model_is_frozen_and_a_copy_of_it_is_not(kind, xp, tmp_path):
    save_model(one_of(kind), tmp_path)
    model = load_model(tmp_path, xp)
    assert {type(p) for p in model.parameters()} == {StoredTensor}
    assert not any(p.requires_grad for p in model.parameters())
    if xp is np:
        for p in model.parameters():
            with pytest.raises(ValueError, match="read-only"):
                p.data[...] = 0
    copy = model.trainable_copy()
    assert all(p.requires_grad for p in copy.parameters())
    for p in copy.parameters():
        p.data[...] = 0
    assert bits(model) == bits(load_model(tmp_path)) == bits(one_of(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_model_can_be_trained_through_an_adapter_and_in_a_copy(kind, tmp_path):
    save_model(one_of(kind), tmp_path)
    model = load_model(tmp_path)
    ids = np.array([[1, 2, 3, 4]])
    adapter = trained_adapter(model)
    attach(model, adapter).loss(ids, ids).backward()
    assert all(p.grad is not None for p in adapter.parameters())
    copy = model.trainable_copy()
    copy.loss(ids, ids).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in copy.parameters())
    with pytest.raises(ValueError, match="is frozen"):
        model.load_state_dict(copy.state_dict())


@pytest.mark.skipif(sys.platform == "win32", reason="a mapped file cannot be replaced on Windows")
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_may_be_saved_over_the_folder_that_it_is_mapped_from(kind, tmp_path):
    """The map keeps its pages: a save renames, and never writes into a file that is there."""
    first, second = one_of(kind, 0), one_of(kind, 1)
    save_model(first, tmp_path)
    loaded = load_model(tmp_path)
    inode = (tmp_path / "model.safetensors").stat().st_ino
    adapter = trained_adapter(loaded)
    merged = merge(attach(loaded, adapter))
    expected = bits(merged)
    save_model(merged, tmp_path, like=tmp_path)
    assert bits(loaded) == bits(first) and bits(merged) == expected == bits(load_model(tmp_path))
    assert (tmp_path / "model.safetensors").stat().st_ino != inode
    save_model(second, tmp_path)
    assert bits(loaded) == bits(first) and bits(merged) == expected and bits(load_model(tmp_path)) == bits(second)
    save_model(loaded, tmp_path)
    assert bits(load_model(tmp_path)) == bits(first)


@pytest.mark.skipif(sys.platform == "win32", reason="nothing is mapped on Windows")
def test_an_adapter_may_be_saved_over_the_folder_that_it_was_loaded_from(tmp_path):
    base = small_llama()
    save_adapter(trained_adapter(base, seed=1), tmp_path)
    adapter = load_adapter(tmp_path, base, say=lambda text: None)
    before = bits(adapter)
    for p in adapter.parameters():
        p.data[...] += 1
    save_adapter(adapter, tmp_path)
    again = load_adapter(tmp_path, base, say=lambda text: None)
    assert bits(again) == bits(adapter) != before


# 16 bits stay 16 bits, and are the numbers that they were.


@pytest.mark.parametrize("dtype, kind", [("float16", "F16"), ("bfloat16", "BF16")])
@pytest.mark.parametrize("model_kind", ["rope", "llama"])
def test_weights_of_16_bits_stay_as_they_are_stored_and_compute_as_widened(model_kind, dtype, kind, tmp_path):
    save_model(one_of(model_kind), tmp_path / "half", dtype=dtype)
    packed = load_model(tmp_path / "half")
    save_model(packed, tmp_path / "wide")
    wide = load_model(tmp_path / "wide")
    assert bits(packed) == bits(wide) == bits(widen(packed)) and packed.fingerprint() == wide.fingerprint()
    layers = {f"{name}.weight" for name, m in packed.named_modules() if isinstance(m, (Linear, Embedding))}
    assert stored_as(packed) == dict.fromkeys(layers, kind) and len(layers) > 12
    for name, p in packed.named_parameters():
        assert p.nbytes == (2 if name in layers else 4) * p.size and p.dtype == np.float32
    ids = np.array([[1, 2, 3, 4, 5]])
    with no_grad():
        assert np.array_equal(packed(ids).data, wide(ids).data)
    assert stored_as(load_model(tmp_path / "wide")) == {}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_gpt2_of_16_bits_is_widened(dtype, tmp_path):
    """Its weights lie the other way round: they are copied in any case."""
    save_gpt2(small_gpt(), tmp_path, dtype=dtype)
    model = load_model(tmp_path)
    assert stored_as(model) == {} and {type(p) for p in model.parameters()} == {StoredTensor}


def test_one_tensor_of_64_bits_makes_it_a_model_of_64_bits(tmp_path):
    save_model(small_llama(), tmp_path, dtype="float16")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype("f8")
    save_file(tensors, tmp_path / "model.safetensors")
    model = load_model(tmp_path)
    assert stored_as(model) == {} and {p.dtype.name for p in model.parameters()} == {"float64"}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("wrong", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_what_is_not_finite_is_refused_however_it_is_stored(name, wrong, dtype, tmp_path):
    save_model(small_llama(), tmp_path, dtype=dtype)
    tensors, metadata = read_tensors(tmp_path / "model.safetensors")
    tensors = {key: array.copy() for key, array in tensors.items()}
    tensors[name].reshape(-1)[-1] = wrong
    save_file(tensors, tmp_path / "model.safetensors", metadata)
    shown = rf"{re.escape(str(tmp_path))}: {name.removeprefix('model.')} \({dtype}\) must hold floats, and no inf"
    with pytest.raises(ValueError, match=shown):
        load_model(tmp_path)


def test_finite_numbers_as_large_as_they_can_be_are_loaded(tmp_path):
    model = small_llama()
    for p in model.parameters():
        p.data[...] = 3.4e38
    save_model(model, tmp_path)
    assert bits(load_model(tmp_path)) == bits(model)


def test_shards_are_mapped_as_one_file_is(tmp_path):
    save_model(small_llama(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    names = sorted(tensors)
    files = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model.safetensors").unlink()
    model = load_model(tmp_path)
    assert bits(model) == bits(small_llama()) and {type(p) for p in model.parameters()} == {StoredTensor}


# What belongs to a model goes along.


def test_the_template_of_a_chat_and_every_file_of_a_tokenizer_go_along(tmp_path):
    """Without chat_template.jinja nobody can chat with a merged model."""
    base, out = tmp_path / "base", tmp_path / "out"
    save_model(small_llama(), base)
    along = ["chat_template.jinja", "chat_template.json", "tokenizer.model", "added_tokens.json", "tokenizer.json",
             "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "vocab.json", "merges.txt"]
    for name in along:
        (base / name).write_text(f"this is {name}")
    (base / "optimizer.bin").write_text("not this")
    save_model(small_llama(1), out, like=base)
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors", *along}
    assert all((out / name).read_text() == f"this is {name}" for name in along)


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
