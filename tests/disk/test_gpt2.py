"""GPT-2 folders: every variety that is met is read as what it computes or refused by name; what is written is one."""

import json
import re
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from strategies import (
    ODD_NUMBERS,
    bits,
    drop,
    float_dtypes,
    integer_arrays,
    put,
    seeds,
    small_gpt,
    tensor,
    trained_adapter,
    write_tensors,
)

from minilora import GPT, GPTConfig, attach, load_gpt2, load_model, merge, save_gpt2, save_model, stack
from minilora.disk.gpt2 import GPT2
from minilora.lora import linear_names
from minilora.nn import Linear
from minilora.tensor import Tensor

FIELDS = {"model_type": "gpt2", "activation_function": "gelu_new", "n_layer": 2, "n_head": 2, "n_embd": 8,
          "vocab_size": 11, "n_positions": 16, "n_ctx": 16, "n_inner": None, "layer_norm_epsilon": 1e-5,
          "tie_word_embeddings": True}  # fmt: skip
HEAD, WTE = "lm_head.weight", "transformer.wte.weight"
C_PROJ, C_ATTN = "transformer.h.0.attn.c_proj", "transformer.h.1.attn.c_attn"


def by_hand(model):
    """{name in the file: array} of a GPT as a GPT-2 has them, written down here without the library's own table."""
    found = {}
    for name, p in model.named_parameters():
        if "_proj." not in name:
            found[("" if name.startswith("lm_head") else "transformer.") + name] = p.data
    for i, block in enumerate(model.h):
        at, attn = f"transformer.h.{i}", block.attn
        qkv = attn.q_proj, attn.k_proj, attn.v_proj
        found[f"{at}.attn.c_attn.weight"] = np.hstack([x.weight.data.T for x in qkv])
        found[f"{at}.attn.c_attn.bias"] = np.hstack([x.bias.data for x in qkv])
        for file, layer in (("attn.c_proj", attn.o_proj), ("mlp.c_fc", block.mlp.up_proj),
                            ("mlp.c_proj", block.mlp.down_proj)):  # fmt: skip
            found[f"{at}.{file}.weight"], found[f"{at}.{file}.bias"] = layer.weight.data.T, layer.bias.data
    return {name: np.ascontiguousarray(array) for name, array in found.items()}


def folder_of(folder, change=lambda config, tensors: None, model=None, bfloat16=(), metadata=None):
    """A GPT-2 folder for `small_gpt()` as another program would write it, after `change(config, tensors)`."""
    config, tensors = json.loads(json.dumps(FIELDS)), by_hand(model or small_gpt())
    change(config, tensors)
    folder.mkdir(exist_ok=True)
    write_tensors(folder / "model.safetensors", tensors, metadata, bfloat16)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def bare(config, tensors):
    for name in list(tensors):
        tensors[name.removeprefix("transformer.")] = tensors.pop(name)


def masks(config, tensors):
    at = "transformer." if WTE in tensors else ""
    for i in range(2):
        tensors[f"{at}h.{i}.attn.bias"] = np.tril(np.ones((1, 1, 16, 16), "f4"))
        tensors[f"{at}h.{i}.attn.masked_bias"] = np.array([-1e4], "f4")


def all_of(*changes):
    return lambda config, tensors: [change(config, tensors) for change in changes]


def minimal(config, tensors):
    for key in ("activation_function", "n_ctx", "n_inner", "layer_norm_epsilon", "tie_word_embeddings", "model_type"):
        del config[key]


# Reading: the same model, in every variety.

SAME_MODEL = {
    "as transformers writes it": lambda config, tensors: None,
    "without transformer.": bare,
    "with causal masks": masks,
    "old: masks, no prefix, few fields": all_of(bare, masks, minimal),
    "half the names with a prefix": lambda c, t: t.update({"wpe.weight": t.pop("transformer.wpe.weight")}),
    "a head equal to the embedding": lambda c, t: t.update({HEAD: t[WTE].copy()}),
    "a head equal to the embedding, no prefix": all_of(lambda c, t: t.update({HEAD: t[WTE].copy()}), bare),
    "only n_ctx": drop("n_positions"),
    "only n_positions": drop("n_ctx"),
    "n_inner spelt out": put(n_inner=32),
    "every old field left out": minimal,
    "dropout, which is no part of the model": put(resid_pdrop=0.5, embd_pdrop=0.1, attn_pdrop=0.1),
    "unknown fields that say nothing about the maths": put(summary_type="cls_index", torch_dtype="float32", foo=1),
    "the other name of the activation": put(activation_function="gelu_pytorch_tanh"),
    "flags spelt out": put(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, pruned_heads={},
                           reorder_and_upcast_attn=False, add_cross_attention=False, quantization_config=None),
}  # fmt: skip


@pytest.mark.parametrize("change", SAME_MODEL.values(), ids=SAME_MODEL)
@pytest.mark.parametrize("load", [load_gpt2, load_model])
def test_every_variety_of_a_folder_is_the_same_model(change, load, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load(folder_of(tmp_path, change))
    assert bits(model) == bits(small_gpt()) and model.config == small_gpt().config
    assert model.fingerprint() == small_gpt().fingerprint()
    assert all(p.data.flags.c_contiguous for p in model.parameters())


def test_a_head_of_its_own_is_kept_if_the_configuration_says_so(tmp_path):
    model = small_gpt(tie_word_embeddings=False)
    for change in (put(tie_word_embeddings=False), all_of(put(tie_word_embeddings=False), bare)):
        again = load_gpt2(folder_of(tmp_path, change, model))
        assert bits(again) == bits(model) and not again.config.tie_word_embeddings


def test_a_head_of_its_own_is_kept_with_a_warning_if_it_says_otherwise(tmp_path):
    model = small_gpt(tie_word_embeddings=False)
    for fields in (put(), drop("tie_word_embeddings")):
        with pytest.warns(UserWarning, match=f"{re.escape(str(tmp_path))}.*lm_head.weight differs.*transformers 5"):
            again = load_gpt2(folder_of(tmp_path, fields, model))
        assert bits(again) == bits(model) and not again.config.tie_word_embeddings


def test_equal_heads_that_are_said_to_be_apart_stay_apart(tmp_path):
    equal = all_of(put(tie_word_embeddings=False), lambda c, t: t.update({HEAD: t[WTE].copy()}))
    model = load_gpt2(folder_of(tmp_path, equal))
    assert not model.config.tie_word_embeddings and model.lm_head.weight is not model.wte.weight
    assert np.array_equal(model.lm_head.weight.data, model.wte.weight.data)


@pytest.mark.parametrize("fields", [put(), drop("tie_word_embeddings")])
def test_a_tied_file_that_holds_only_the_head_is_read_as_both(fields, tmp_path):
    """transformers may keep the one tensor of the two under either name."""
    only_head = lambda config, tensors: tensors.update({HEAD: tensors.pop(WTE)})
    model = load_gpt2(folder_of(tmp_path, all_of(fields, only_head)))
    assert bits(model) == bits(small_gpt()) and model.config.tie_word_embeddings
    with pytest.raises(ValueError, match="absent: wte.weight"):
        load_gpt2(folder_of(tmp_path, all_of(put(tie_word_embeddings=False), only_head)))


@pytest.mark.parametrize("some", [False, True], ids=["all", "some"])
def test_bfloat16_is_widened_to_the_same_numbers(some, tmp_path):
    model = small_gpt().map_tensors(lambda t: Tensor((t.data.view("u4") & 0xFFFF0000).view("f4"), True))
    names = [name for i, name in enumerate(by_hand(model)) if not some or i % 2]
    again = load_gpt2(folder_of(tmp_path, model=model, bfloat16=names))
    assert bits(again) == bits(model) and again.fingerprint() == model.fingerprint()


def test_float16_is_widened_and_float64_is_kept(tmp_path):
    halves = small_gpt().map_tensors(lambda t: Tensor(t.data.astype("f2").astype("f4"), True))
    narrow = lambda config, tensors: tensors.update({k: v.astype("f2") for k, v in tensors.items()})
    assert bits(load_gpt2(folder_of(tmp_path, narrow, halves))) == bits(halves)
    wide = small_gpt(dtype="float64")
    assert bits(load_gpt2(folder_of(tmp_path, model=wide))) == bits(wide)
    one_wide = tensor("transformer.ln_f.bias", lambda b: b.astype("f8"))
    assert {p.dtype.name for p in load_gpt2(folder_of(tmp_path, one_wide)).parameters()} == {"float64"}


def sharded(folder, change=lambda weight_map, parts: None):
    names = list(by_hand(small_gpt()))
    tensors, parts = by_hand(small_gpt()), {f"model-{i}.safetensors": names[i::3] for i in range(3)}
    weight_map = {name: file for file, part in parts.items() for name in part}
    folder.mkdir(exist_ok=True)
    change(weight_map, parts)
    for file, part in parts.items():
        save_file({name: tensors.get(name, np.ones(1, "f4")) for name in part}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(FIELDS))
    return folder


def test_shards_are_the_same_model(tmp_path):
    assert bits(load_gpt2(sharded(tmp_path))) == bits(small_gpt())


@pytest.mark.parametrize("change, error, shown", [
    (lambda w, p: p.pop("model-1.safetensors"), FileNotFoundError, "model-1.safetensors does not exist"),
    (lambda w, p: w.update({WTE: "../model-0.safetensors"}), ValueError, "is not the name of a safetensors file"),
    (lambda w, p: w.update(dict.fromkeys(w, "pytorch_model.bin")), ValueError, "is not the name of a safetensors file"),
    (lambda w, p: p["model-0.safetensors"].remove(WTE), ValueError, f"absent: {WTE}"),
    (lambda w, p: p["model-1.safetensors"].append(WTE), ValueError, f"superfluous: {WTE}"),
    (lambda w, p: (w.pop(WTE), p["model-0.safetensors"].remove(WTE)), ValueError, "absent: wte.weight"),
], ids=["one missing", "outside the folder", "a pickle", "not where it should be", "a tensor twice", "incomplete"]
)  # fmt: skip
def test_incomplete_or_foreign_shards_are_refused(change, error, shown, tmp_path):
    with pytest.raises(error, match=shown):
        load_gpt2(sharded(tmp_path, change))


# Reading: what computes something else, or nothing at all.

WRONG = {  # what is wrong: (the change, what the message must show)
    "another model": (put(model_type="opt"), "model_type='opt' is another kind of model; only 'gpt2' or None"),
    "relu": (put(activation_function="relu"), "activation_function='relu' changes.*'gelu_new'"),
    "the exact gelu": (put(activation_function="gelu"), "activation_function='gelu' changes"),
    "scores not scaled": (put(scale_attn_weights=False), "scale_attn_weights=False changes.*only True"),
    "scores scaled by layer": (put(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx=True"),
    "reordered": (put(reorder_and_upcast_attn=True), "reorder_and_upcast_attn=True"),
    "cross attention": (put(add_cross_attention=True), "add_cross_attention=True"),
    "pruned heads": (put(pruned_heads={"0": [1]}), "pruned_heads={'0'"),
    "quantised": (put(quantization_config={"bits": 4}), "quantization_config={'bits'"),
    "no n_layer": (drop("n_layer"), "no n_layer: this does not describe a GPT-2"),
    "no n_head and no n_embd": (drop("n_head", "n_embd"), "no n_head, n_embd"),
    "no vocab_size": (drop("vocab_size"), "no vocab_size"),
    "no length": (drop("n_positions", "n_ctx"), "no n_positions"),
    "nothing at all": (lambda c, t: c.clear(), "no n_layer, n_head, n_embd, vocab_size"),
    "heads that do not divide": (put(n_head=3), "config.json.*multiple of n_head 3, got 8"),
    "a number in quotes": (put(n_layer="2"), "config.json.*n_layer.*'2'"),
    "a float": (put(n_embd=8.0), "config.json.*n_embd.*8.0"),
    "true": (put(n_layer=True), "config.json.*n_layer.*True"),
    "zero": (put(n_head=0), "n_head must be a whole number of at least 1, got 0"),
    "n_positions null": (put(n_positions=None), "block_size must be.*None"),
    "tie null": (put(tie_word_embeddings=None), "tie_word_embeddings must be true or false, got None"),
    "epsilon nan": (put(layer_norm_epsilon=float("nan")), "layer_norm_epsilon must be finite"),
    "deeper than its tensors": (put(n_layer=3), "absent: h.2"),
    "shallower than its tensors": (put(n_layer=1), "superfluous: h.1"),
    "wider": (put(n_embd=16), r"misshapen.*is \(.*8.*\), not \(.*16.*\)"),
    "more tokens": (put(vocab_size=12), r"wte.weight is \(11, 8\), not \(12, 8\)"),
    "more positions": (put(n_positions=17), r"wpe.weight is \(16, 8\), not \(17, 8\)"),
    "n_positions goes before n_ctx": (put(n_positions=15, n_ctx=16), r"wpe.weight is \(16, 8\), not \(15, 8\)"),
    "another n_inner": (put(n_inner=20), r"mlp.c_fc.weight is \(8, 32\), not \(8, 20\)"),
    "a missing head": (put(tie_word_embeddings=False), "absent: lm_head.weight"),
    "a head of another shape": (tensor(HEAD, np.ones((8, 11), "f4")), r"lm_head.weight is \(8, 11\), not \(11, 8\)"),
    "a head with a bias": (tensor("lm_head.bias", np.ones(11, "f4")), "superfluous: lm_head.bias"),
    "a head that classifies": (tensor("score.weight", np.ones((2, 8), "f4")), "superfluous: score.weight"),
    "a tensor absent": (tensor("transformer.ln_f.weight", None), "absent: ln_f.weight"),
    "c_attn.bias absent": (tensor(f"{C_ATTN}.bias", None), "absent: h.1.attn.c_attn.bias"),
    "c_attn.bias absent, with masks": (all_of(masks, tensor(f"{C_ATTN}.bias", None)), "absent: h.1.attn.c_attn.bias"),
    "cross attention's tensors": (tensor("transformer.h.0.crossattention.c_attn.weight", np.ones((8, 16), "f4")),
                                  "superfluous: h.0.crossattention"),
    "a buffer that is no mask": (tensor("transformer.h.0.attn.rotary.bias", np.ones(4, "f4")), "h.0.attn.rotary.bias"),
    "what only begins like a mask": (tensor("transformer.h.0.attn.bias_k", np.ones(8, "f4")), "h.0.attn.bias_k"),
    "what only ends like a mask": (tensor("transformer.x.h.0.attn.bias", np.ones(8, "f4")), "superfluous: x.h.0.attn"),
    "a mask of no block": (tensor("transformer.attn.bias", np.ones(4, "f4")), "superfluous: attn.bias"),
    "c_fc the other way round": (tensor("transformer.h.0.mlp.c_fc.weight", np.ones((32, 8), "f4")),
                                 r"h.0.mlp.c_fc.weight is \(32, 8\), not \(8, 32\)"),
    "c_attn the other way round": (tensor(f"{C_ATTN}.weight", np.ones((24, 8), "f4")), r"is \(24, 8\), not \(8, 24\)"),
    "q, k and v apart": (tensor("transformer.h.0.attn.q_proj.weight", np.ones((8, 8), "f4")), "h.0.attn.q_proj.weight"),
    "both names of one tensor": (lambda c, t: t.update({"wte.weight": t[WTE]}), "wte.weight is there twice, with and"),
    "a double prefix": (lambda c, t: t.update({f"transformer.{WTE}": t.pop(WTE)}),
                        "superfluous: transformer.wte|absent: wte"),
    "whole numbers": (tensor(f"{C_PROJ}.weight", np.ones((8, 8), "i4")), r"h.0.attn.c_proj.weight \(int32\) must hold"),
    "nan": (tensor(f"{C_PROJ}.bias", lambda b: b * np.float32("nan")), "h.0.attn.c_proj.bias.*no inf or nan"),
    "inf in the embedding": (tensor(WTE, lambda w: w + np.float32("inf")), "wte.weight.*no inf or nan"),
    "no tensors": (lambda c, t: t.clear(), "absent: "),
}  # fmt: skip


@pytest.mark.parametrize("change, shown", WRONG.values(), ids=WRONG)
def test_a_folder_that_is_another_model_is_refused_by_name(change, shown, tmp_path):
    folder = folder_of(tmp_path / "gpt2", change)
    for load in (load_gpt2, load_model):
        with pytest.raises(ValueError, match=f"(?s){shown}") as refusal, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load(folder)
        assert str(folder) in str(refusal.value), "the message names the file"


@pytest.mark.parametrize("fields, shown", [
    (put(n_layer=10**6), "a model of 7.7e.08"), (put(n_embd=10**7), "a model of"),
    (put(vocab_size=10**15), "a model of"),
], ids=["blocks", "channels", "tokens"])  # fmt: skip
def test_a_configuration_of_giants_is_refused_and_not_built(fields, shown, tmp_path, monkeypatch):
    folder_of(tmp_path, fields)
    made = []
    monkeypatch.setattr(np, "zeros", lambda shape, *rest, real=np.zeros: (made.append(shape), real(shape, *rest))[1])

    def ones(shape, *rest, real=np.ones):
        assert len(made) < 100, "a block is built for every one that config.json speaks of"
        return real(shape, *rest)

    monkeypatch.setattr(np, "ones", ones)
    with pytest.raises(ValueError, match=shown):
        load_gpt2(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_a_pickle_is_refused(name, tmp_path):
    folder_of(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} is a pickle.*as model.safetensors"):
        load_gpt2(tmp_path)


ODD_VALUES = st.sampled_from([None, True, False, 0, 1, 2, 3, -1, 7, 1.5, float("nan"), float("inf"), "", "gpt2", "2",
                              [], [1], {}, {"a": 1}, [[]]])  # fmt: skip


@given(st.sampled_from([*FIELDS, "pruned_heads", "scale_attn_weights", "n_layers", "dtype", "rope_theta"]), ODD_VALUES)
def test_one_field_spoilt_is_refused_or_changes_nothing(field, value):
    with tempfile.TemporaryDirectory() as folder:
        folder_of(Path(folder), put(**{field: value}))
        try:
            model = load_gpt2(folder)
        except ValueError as error:
            assert str(folder) in str(error)
            return
    assert bits(model) == bits(small_gpt())
    assert field not in ("n_layer", "n_embd", "vocab_size", "n_positions") or FIELDS[field] == value


@given(st.data())
def test_one_tensor_spoilt_is_refused(data):
    name = data.draw(st.sampled_from(sorted(by_hand(small_gpt()))))
    spoil = data.draw(st.sampled_from([
        lambda t: t[..., None], lambda t: t[1:], lambda t: np.concatenate([t, t]), lambda t: t.astype("i4"),
        lambda t: t * np.float32("nan"), lambda t: t[:0], lambda t: t.reshape(1, *t.shape), None,
    ]))  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        folder_of(Path(folder), tensor(name, spoil))
        with pytest.raises(ValueError, match=re.escape(name.removeprefix("transformer."))):
            load_gpt2(folder)


# The square trap: attn.c_proj has as many rows as columns, so that no shape tells which way round it is.


@given(integer_arrays((8, 8), bound=9, dtype=np.float32), integer_arrays((3, 8), dtype=np.float32))
def test_what_is_square_is_turned_on_the_way_in_and_out_and_merged_the_right_way_round(stored, x):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model = load_gpt2(folder_of(folder, tensor(f"{C_PROJ}.weight", stored))).trainable_copy()
        layer = model.h[0].attn.o_proj
        bias = layer.bias.data.round()
        layer.bias.data[:] = bias
        assert np.array_equal(layer(Tensor(x)).data, x @ stored + bias), "Conv1D: y = x W + b"
        save_gpt2(model, folder)
        assert np.array_equal(load_file(folder / "model.safetensors")[f"{C_PROJ}.weight"], stored)
        adapter = trained_adapter(model, r=2, target_modules=["o_proj"])
        for p in adapter.parameters():
            p.data[:] = p.data.round()
        merged = merge(attach(model, adapter))
        save_gpt2(merged, folder)
        pair = adapter.pairs["h.0.attn.o_proj"]
        expected = stored + 2 * (pair.lora_B.data @ pair.lora_A.data).T
        assert np.array_equal(load_file(folder / "model.safetensors")[f"{C_PROJ}.weight"], expected)


def test_the_square_weight_of_the_tests_is_not_symmetric():
    W = small_gpt().h[0].attn.o_proj.weight.data
    assert not np.array_equal(W, W.T)


# Writing.


@given(st.integers(1, 2), st.sampled_from([(1, 2), (2, 4), (2, 8)]), st.integers(1, 9), st.integers(1, 9),
st.booleans(),
       st.none() | st.integers(1, 9), st.sampled_from([1e-5, 1e-6, 0.1]), float_dtypes, seeds)  # fmt: skip
def test_a_model_comes_back_to_the_bit(n_layer, heads, vocab_size, block_size, tied, n_inner, eps, dtype, seed):
    config = GPTConfig(n_layer, *heads, vocab_size, block_size, n_inner=n_inner, layer_norm_epsilon=eps,
                       tie_word_embeddings=tied)  # fmt: skip
    model = GPT(config, np.random.default_rng(seed), dtype)
    odd = ODD_NUMBERS[np.abs(ODD_NUMBERS) < 1e39].astype(dtype)  # fingerprints are of float32
    for weight in (model.wte.weight, model.h[0].attn.k_proj.weight):
        weight.data.reshape(-1)[: len(odd)] = odd[: weight.size]
    with tempfile.TemporaryDirectory() as folder:
        save_gpt2(model, folder)
        again, files = load_model(folder), load_file(Path(folder) / "model.safetensors")
    assert bits(again) == bits(model) and again.config == config and again.fingerprint() == model.fingerprint()
    expected = by_hand(model)
    assert files.keys() == expected.keys()
    assert all(files[name].tobytes() == expected[name].tobytes() for name in files)


def test_a_saved_gpt2_says_what_other_readers_ask_for(tmp_path):
    save_gpt2(small_gpt(n_inner=12), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new", "n_layer": 2,
        "n_head": 2, "n_embd": 8, "vocab_size": 11, "n_positions": 16, "n_ctx": 16, "n_inner": 12,
        "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, "dtype": "float32", "bos_token_id": None,
        "eos_token_id": None,
    }  # fmt: skip
    with safe_open(tmp_path / "model.safetensors", framework="np") as file:
        assert file.metadata()["format"] == "pt"
    save_gpt2(small_gpt(), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["n_inner"] is None


def test_like_keeps_the_tokenizer_and_the_other_settings(tmp_path):
    source = folder_of(tmp_path / "source", put(
        eos_token_id=10, bos_token_id=9, resid_pdrop=0.3, task_specific_params={"a": 1}, torch_dtype="float16",
        n_ctx=99, vocab_size=7, scale_attn_weights=False, activation_function="relu", tie_word_embeddings=False))
    kept = ["tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
            "added_tokens.json", "generation_config.json"]  # fmt: skip
    for name in [*kept, "pytorch_model.bin", "README.md"]:
        (source / name).write_text(name)
    save_gpt2(small_gpt(), tmp_path / "new", like=source)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == sorted([*kept, "config.json", "model.safetensors"])
    assert all((tmp_path / "new" / name).read_text() == name for name in kept)
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert (config["eos_token_id"], config["bos_token_id"], config["resid_pdrop"]) == (10, 9, 0.3)
    assert config["task_specific_params"] == {"a": 1}
    assert (config["n_ctx"], config["vocab_size"], config["dtype"]) == (16, 11, "float32")
    assert config["activation_function"] == "gelu_new" and config["tie_word_embeddings"] is True
    assert not {"torch_dtype", "scale_attn_weights"} & config.keys()
    assert bits(load_gpt2(tmp_path / "new")) == bits(small_gpt())
    save_gpt2(small_gpt(1), tmp_path / "new", like=tmp_path / "new")
    assert (tmp_path / "new" / "vocab.json").read_text() == "vocab.json", "over itself, all is kept"
    assert bits(load_gpt2(tmp_path / "new")) == bits(small_gpt(1))


def test_save_model_hands_everything_on_to_save_gpt2(tmp_path):
    source = folder_of(tmp_path / "source", put(eos_token_id=10))
    save_model(small_gpt(), tmp_path / "new", dtype="float16", like=source)
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert (config["model_type"], config["eos_token_id"], config["dtype"]) == ("gpt2", 10, "float16")


def test_bfloat16_is_written_rounded_to_nearest(tmp_path):
    model = small_gpt()
    save_gpt2(model, tmp_path, dtype="bfloat16")
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    for p, q in zip(load_gpt2(tmp_path).parameters(), model.parameters(), strict=True):
        assert not (p.data.view("u4") & 0xFFFF).any()
        assert (np.abs(p.data - q.data) <= np.abs(q.data) * 2**-8).all()


@pytest.mark.parametrize("save", [save_gpt2, save_model])
def test_what_cannot_be_saved_is_refused_and_nothing_is_written(save, tmp_path):
    base = small_gpt()
    large = small_gpt()
    large.h[1].mlp.up_proj.weight.data[2, 3] = 1e6
    no_bias = base.rebuild(lambda name, m: Linear(m.weight) if name == "h.0.mlp.up_proj" else None)
    adapter = trained_adapter(base)
    for model, options, shown in (
        (large, {"dtype": "float16"}, "transformer.h.1.mlp.c_fc.weight: 1e.06 is too large for float16"),
        (base, {"dtype": "int8"}, "dtype must be one of"),
        (attach(base, adapter), {}, r"h.0.attn.q_proj carries an adapter: save merge\(model\)"),
        (attach(base, stack([adapter, None])), {}, r"carries an adapter: save merge\(model\)"),
        (no_bias, {}, "absent: h.0.mlp.up_proj.bias"),
    ):
        with pytest.raises(ValueError, match=shown):
            save(model, tmp_path / "model", **options)
    assert not (tmp_path / "model").exists()


def test_a_rotary_model_is_not_saved_as_gpt2(tmp_path):
    for model in (small_gpt(positions="rope"), trained_adapter(small_gpt())):
        with pytest.raises(ValueError, match="not a GPT with learned positions.*save_model"):
            save_gpt2(model, tmp_path / "model")
    rope = small_gpt(positions="rope")
    with pytest.raises(ValueError, match=r"h.0.attn.q_proj carries an adapter"):
        save_model(attach(rope, trained_adapter(rope)), tmp_path / "model")
    assert not (tmp_path / "model").exists()


# Names.


@pytest.mark.parametrize("ours, theirs", [
    ("h.0.attn.q_proj", "transformer.h.0.attn.c_attn"), ("h.11.attn.k_proj", "transformer.h.11.attn.c_attn"),
    ("h.0.attn.v_proj", "transformer.h.0.attn.c_attn"), ("h.0.attn.o_proj", "transformer.h.0.attn.c_proj"),
    ("h.0.mlp.up_proj", "transformer.h.0.mlp.c_fc"), ("h.0.mlp.down_proj", "transformer.h.0.mlp.c_proj"),
    ("h.0.ln_1", "transformer.h.0.ln_1"), ("ln_f", "transformer.ln_f"), ("lm_head", "lm_head"),
    ("attn.q_proj", "transformer.attn.q_proj"), ("x.h.0.attn.q_proj", "transformer.x.h.0.attn.q_proj"),
    ("h.x.attn.q_proj", "transformer.h.x.attn.q_proj"), ("h.0.attn.q_proj.more", "transformer.h.0.attn.q_proj.more"),
])  # fmt: skip
def test_each_module_has_its_name_in_gpt2(ours, theirs):
    assert GPT2.their_name(ours) == theirs
    assert ours in GPT2.our_modules(theirs)


def test_a_gpt2_has_learned_positions_and_nothing_else_does():
    assert GPT2.holds(small_gpt())
    assert not GPT2.holds(small_gpt(positions="rope")) and not GPT2.holds(small_gpt().wte)


def test_three_of_our_modules_are_one_of_a_gpt2():
    table = GPT2.module_table(linear_names(small_gpt()))
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert list(table) == [f"transformer.h.{i}.{part}" for i in (0, 1) for part in parts]
    assert table["transformer.h.1.attn.c_attn"] == ["h.1.attn.q_proj", "h.1.attn.k_proj", "h.1.attn.v_proj"]
    assert table["transformer.h.0.mlp.c_proj"] == ["h.0.mlp.down_proj"]


def test_modules_that_share_a_layer_are_in_the_order_of_its_rows():
    table = GPT2.module_table(["h.0.attn.v_proj", "h.0.attn.o_proj", "h.0.attn.q_proj"])
    assert table == {"transformer.h.0.attn.c_attn": ["h.0.attn.q_proj", "h.0.attn.v_proj"],
                     "transformer.h.0.attn.c_proj": ["h.0.attn.o_proj"]}  # fmt: skip


def test_the_note_says_that_vllm_serves_no_lora_on_gpt2():
    assert "no LoRA on GPT-2" in GPT2.note and "merge" in GPT2.note
