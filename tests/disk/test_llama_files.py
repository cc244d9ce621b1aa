"""Llama's family: each field that changes the maths is honoured or refused by name; what is written is one of four."""

import json
import re
import warnings

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from strategies import SMALL_LLAMA, bits, drop, put, same_adapter, small_llama, tensor, trained_adapter

from minilora import LoRAConfig, init_peft_adapter, load_adapter, load_model, save_adapter, save_model
from minilora.disk.llama import LLAMA
from minilora.disk.models import families_of, family_of_fields
from minilora.llama import Llama
from minilora.lora import linear_names
from minilora.tensor import Tensor

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8}
# Fields as transformers 5 writes them, by hand, beside those of SMALL_LLAMA.
FIELDS = {
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "mlp_bias": False,
              "attention_bias": False, "attention_dropout": 0.0, "pretraining_tp": 1, "rms_norm_eps": 1e-6,
              "bos_token_id": 1, "eos_token_id": [2, 3], "use_cache": True, "tie_word_embeddings": False,
              "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "dtype": "float32"},
    "mistral": {"model_type": "mistral", "hidden_act": "silu", "rms_norm_eps": 1e-6, "sliding_window": None,
                "tie_word_embeddings": False, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
    "qwen2": {"model_type": "qwen2", "hidden_act": "silu", "rms_norm_eps": 1e-6, "sliding_window": None,
              "use_sliding_window": False, "max_window_layers": 28, "layer_types": ["full_attention"] * 2,
              "tie_word_embeddings": False, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
    "qwen3": {"model_type": "qwen3", "hidden_act": "silu", "rms_norm_eps": 1e-6, "sliding_window": None,
              "use_sliding_window": False, "max_window_layers": 28, "layer_types": ["full_attention"] * 2,
              "attention_bias": False, "tie_word_embeddings": False,
              "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
}  # fmt: skip
# What the models of each kind have beside a llama's.
EXTRAS = {"llama": {}, "mistral": {}, "qwen2": {"attention_bias": True}, "qwen3": {"qk_norm": True}}
KINDS = list(FIELDS)
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def by_hand(model):
    """{name in the file: array}: all of them behind "model.", but for the head."""
    return {name if name == HEAD else f"model.{name}": p.data for name, p in model.named_parameters()}


def folder_of(folder, kind="llama", change=lambda config, tensors: None, model=None, **model_changes):
    """A folder of `kind` as transformers would write it, after `change(config, tensors)`."""
    model = model or small_llama(**EXTRAS[kind], **model_changes)
    config, tensors = {**SMALL_LLAMA, **FIELDS[kind]}, by_hand(model)
    if kind in ("mistral", "qwen2"):
        del config["head_dim"]
    change(config, tensors)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, folder / "model.safetensors")
    return folder


def both(*changes):
    """Several changes as one."""
    return lambda config, tensors: [change(config, tensors) for change in changes]


def config_of(folder):
    """The configuration of the model in a folder, of which only the layout of the tensors is made to fit."""
    return load_model(folder).config


# Reading: the same model in every variety.


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_each_kind_is_read_to_the_bit(kind, tmp_path):
    expected = small_llama(**EXTRAS[kind])
    model = load_model(folder_of(tmp_path, kind))
    assert type(model) is Llama and model.config == expected.config and bits(model) == bits(expected)
    assert model.fingerprint() == expected.fingerprint() and family_of_fields({"model_type": kind}) is LLAMA


def bare(config, tensors):
    """As a LlamaModel without its head is saved, but for the head."""
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


def old_rope(config, tensors):
    """As transformers 4 says it."""
    del config["rope_parameters"]
    config.update(rope_theta=10000.0, rope_scaling=None, torch_dtype="float32")


SAME_MODEL = {
    "without prefix": bare,
    "as transformers 4 wrote it": old_rope,
    "rope in both ways": put(rope_theta=10000.0, rope_scaling={"type": "default"}),
    "no rope at all": drop("rope_parameters"),
    "rope null": put(rope_parameters=None, rope_scaling=None, rope_theta=None),
    "rope without a type": put(rope_parameters={"rope_theta": 10000.0}),
    "the whole head turned": put(rope_parameters={"rope_type": "default", "partial_rotary_factor": 1.0}),
    "angles of old files": both(
        tensor("model.layers.0.self_attn.rotary_emb.inv_freq", np.ones(1, "f4")),
        tensor("model.layers.1.self_attn.rotary_emb.inv_freq", np.ones(1, "f4")),
        tensor("model.rotary_emb.inv_freq", np.ones(1, "f4")),
    ),
    "tie_word_embeddings absent": drop("tie_word_embeddings"),
    "every optional field absent": drop("hidden_act", "mlp_bias", "attention_bias", "pretraining_tp", "rms_norm_eps",
                                        "tie_word_embeddings", "head_dim", "rope_parameters"),
    "head_dim absent": drop("head_dim"),
    "head_dim null": put(head_dim=None),
    "swish, another name of silu": put(hidden_act="swish"),
    "flags spelt out": put(mlp_bias=None, pretraining_tp=None, attention_bias=None, quantization_config=None),
    "fields that say nothing about the maths": put(foo=1, initializer_range=9, attention_dropout=0.5, use_cache=False),
    "a window, which a llama does not have": put(sliding_window=4),
    "every layer looks at everything": put(layer_types=["full_attention"] * 2, sliding_window=4),
}  # fmt: skip


@pytest.mark.parametrize("change", SAME_MODEL.values(), ids=SAME_MODEL)
def test_every_variety_of_a_llama_is_the_same_model(change, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load_model(folder_of(tmp_path, "llama", change))
    assert model.config == small_llama().config and bits(model) == bits(small_llama())


def test_a_head_size_apart_from_the_channels_is_the_one_of_the_field(tmp_path):
    model = small_llama(head_dim=6)
    again = load_model(folder_of(tmp_path, "llama", put(head_dim=6), model))
    assert again.config.head_dim == 6 and bits(again) == bits(model)
    with pytest.raises(ValueError, match=r"q_proj.weight is \(24, 8\), not \(8, 8\)"):
        load_model(folder_of(tmp_path, "llama", drop("head_dim"), model))


@pytest.mark.parametrize("kind", KINDS)
def test_without_groups_each_head_has_keys_and_values(kind, tmp_path):
    model = small_llama(num_key_value_heads=4, **EXTRAS[kind])
    again = load_model(folder_of(tmp_path, kind, put(num_key_value_heads=None), model))
    assert again.config.num_key_value_heads == 4 and bits(again) == bits(model)
    if kind == "llama":
        assert bits(load_model(folder_of(tmp_path, kind, drop("num_key_value_heads"), model))) == bits(model)


# Reading: biases, norms, the head.


@pytest.mark.parametrize("attention_bias", [False, None, True])
def test_a_qwen2_has_biases_on_q_k_and_v_whatever_its_fields_say(attention_bias, tmp_path):
    model = load_model(folder_of(tmp_path, "qwen2", put(attention_bias=attention_bias)))
    names = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    assert names == {f"layers.{i}.self_attn.{x}_proj.bias" for i in (0, 1) for x in "qkv"}
    assert (model.config.attention_bias, model.config.output_bias) == (True, False)


@pytest.mark.parametrize("kind, extras", [("llama", {}), ("qwen3", {"qk_norm": True})])
def test_attention_bias_is_one_on_o_as_well(kind, extras, tmp_path):
    model = small_llama(attention_bias=True, output_bias=True, **extras)
    again = load_model(folder_of(tmp_path, kind, put(attention_bias=True), model))
    assert again.config == model.config and bits(again) == bits(model)
    with pytest.raises(ValueError, match="superfluous: layers.0.self_attn.k_proj.bias"):
        load_model(folder_of(tmp_path, kind, put(attention_bias=False), model))


def test_only_a_qwen3_normalises_queries_and_keys(tmp_path):
    for kind in KINDS:
        model = load_model(folder_of(tmp_path / kind, kind))
        norms = {name for name, _ in model.named_parameters() if "self_attn.q_norm" in name or "k_norm" in name}
        assert len(norms) == (4 if kind == "qwen3" else 0)
    with pytest.raises(ValueError, match="absent: layers.0.self_attn.k_norm.weight"):
        load_model(folder_of(tmp_path / "without", "qwen3", model=small_llama()))


@pytest.mark.parametrize("change", [
    drop(), tensor(HEAD, None), both(lambda c, t: t.update({HEAD: t[EMBEDDING]}), tensor(EMBEDDING, None)),
], ids=["both, and equal", "the embedding alone", "the head alone"])  # fmt: skip
def test_a_tied_model_is_read_from_either_tensor(change, tmp_path):
    tied = small_llama(tie_word_embeddings=True)
    repeat = lambda config, tensors: tensors.update({HEAD: tensors[EMBEDDING]})
    folder_of(tmp_path, "llama", both(put(tie_word_embeddings=True), repeat, change), tied)
    again = load_model(tmp_path)
    assert bits(again) == bits(tied) and again.config.tie_word_embeddings


def test_a_tied_model_without_prefix_that_holds_only_the_head_is_read_too(tmp_path):
    tied = small_llama(tie_word_embeddings=True)
    moved = lambda config, tensors: tensors.update({HEAD: tensors.pop("embed_tokens.weight")})
    folder_of(tmp_path, "llama", both(put(tie_word_embeddings=True), bare, moved), tied)
    assert bits(load_model(tmp_path)) == bits(tied)


def test_a_head_that_differs_though_the_fields_say_tied_is_kept_with_a_warning(tmp_path):
    model = small_llama()
    folder_of(tmp_path, "llama", put(tie_word_embeddings=True), model)
    with pytest.warns(UserWarning, match=f"{re.escape(str(tmp_path))}.*lm_head.weight differs") as caught:
        again = load_model(tmp_path)
    assert bits(again) == bits(model) and caught[0].filename == __file__


@pytest.mark.parametrize("change", [put(tie_word_embeddings=False), drop("tie_word_embeddings")])
def test_without_a_head_a_model_must_say_that_it_is_tied(change, tmp_path):
    tied = small_llama(tie_word_embeddings=True)
    with pytest.raises(ValueError, match='no lm_head.weight.*add "tie_word_embeddings": true'):
        load_model(folder_of(tmp_path, "llama", change, tied))


# Reading: rotary positions.


@pytest.mark.parametrize("fields, theta, scaling", [
    ({}, 10000.0, None),
    ({"rope_theta": 500000.0}, 500000.0, None),
    ({"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}, 7.0, None),
    ({"rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 2.0}}, 7.0, ("linear", 2.0)),
    ({"rope_theta": 7.0, "rope_scaling": {"rope_type": "linear", "factor": 2}}, 7.0, ("linear", 2)),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, 10000.0, ("linear", 2.0)),
    ({"rope_theta": 7, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}, 7, "llama3"),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 7.0, **LLAMA3}}, 7.0, "llama3"),
    ({"rope_theta": 7.0, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0},
      "rope_scaling": {"type": "linear", "factor": 2.0}}, 7.0, ("linear", 2.0)),
])  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_rotary_positions_are_read_as_transformers_4_and_5_say_them(kind, fields, theta, scaling, tmp_path):
    if scaling == "llama3":
        scaling = {"rope_type": "llama3", **LLAMA3}
    elif scaling:
        scaling = {"rope_type": scaling[0], "factor": scaling[1]}
    config = config_of(folder_of(tmp_path, kind, both(drop("rope_parameters"), put(**fields))))
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


@pytest.mark.parametrize("fields, shown", [
    *(({"rope_scaling": {"rope_type": kind, "factor": 2.0}}, f"rope_type='{kind}' changes what the model computes; o")
      for kind in ("dynamic", "yarn", "longrope", "su", "mrope", "x")),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic' changes"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type='yarn' changes"),
    ({"rope_scaling": {"rope_type": ["linear"]}}, r"rope_type=\['linear'\] changes"),
    ({"rope_scaling": {"type": "linear"}}, "rope_type='linear' needs factor, and {'type': 'linear'} has none"),
    ({"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling must be None or a dict .*'factor': '2'"),
    ({"rope_scaling": {"type": "linear", "factor": True}}, "rope_scaling must be .*'factor': True"),
    ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling must be .*'factor': 0"),
    ({"rope_scaling": {"type": "linear", "factor": float("inf")}}, "rope_scaling must be .*'factor': inf"),
    ({"rope_scaling": {"type": "linear", "factor": float("nan")}}, "rope_scaling must be .*'factor': nan"),
    *(({"rope_scaling": {"rope_type": "llama3", **LLAMA3, name: None}}, f"rope_type='llama3' needs {name},")
      for name in LLAMA3),
    ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}}, "rope_scaling must be"),
    ({"rope_scaling": "linear"}, "rope_scaling must be an object with fields, or null, got 'linear'"),
    ({"rope_parameters": 3}, "rope_parameters must be an object"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 changes"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 changes"),
    ({"rope_theta": 5.0, "rope_parameters": {"rope_theta": 6.0}}, r"rope_theta is given as 5.0 and as 6.0; keep one"),
    ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear", "factor": 2.0}},
     "rope_parameters={'rope_type': 'default'} and rope_scaling=.* contradict each other; keep the one"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "positions that differ by layer"),
    ({"rope_parameters": {"rope_type": "default", "x": {"rope_type": "linear"}}}, "positions that differ by layer"),
    ({"original_max_position_embeddings": 4, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
     "original_max_position_embeddings is given as 8 and as 4; keep one"),
    ({"rope_theta": 0}, "rope_theta"), ({"rope_theta": "x"}, "rope_theta"), ({"rope_theta": -1.0}, "rope_theta"),
])  # fmt: skip
def test_other_rotary_positions_are_refused_by_name(fields, shown, tmp_path):
    folder_of(tmp_path, "llama", both(drop("rope_parameters"), put(**fields)))
    with pytest.raises(ValueError, match=rf"config\.json: .*{shown}"):
        load_model(tmp_path)


# Reading: windows.


@pytest.mark.parametrize("kind, fields", [
    ("mistral", {"sliding_window": None}), ("mistral", {"sliding_window": 16}), ("mistral", {"sliding_window": 4096}),
    ("mistral", {}), ("qwen2", {"sliding_window": 4}), ("qwen3", {"use_sliding_window": False, "sliding_window": 4}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 4}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["full_attention"] * 2}),
    ("qwen2", {"use_sliding_window": False, "sliding_window": 4, "layer_types": ["sliding_attention"] * 2}),
    ("llama", {"layer_types": ["sliding_attention"] * 2, "sliding_window": 16}),
])  # fmt: skip
def test_a_window_as_long_as_the_context_or_that_no_layer_uses_changes_nothing(kind, fields, tmp_path):
    absent = [key for key in ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
              if key in FIELDS[kind]]  # fmt: skip
    model = load_model(folder_of(tmp_path, kind, both(drop(*absent), put(**fields))))
    assert bits(model) == bits(small_llama(**EXTRAS[kind]))


@pytest.mark.parametrize("kind, fields, shown", [
    ("mistral", {"sliding_window": 15}, "sliding_window=15 is shorter than the context, max_position_embeddings=16"),
    ("mistral", {"sliding_window": 4, "layer_types": ["full_attention"] * 2}, "sliding_window=4 is shorter"),
    ("mistral", {"sliding_window": "8"}, "sliding_window='8' is shorter"),
    ("mistral", {"max_position_embeddings": 32768}, "sliding_window=4096 is shorter .* a context of 4096 has no use"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}, "sliding_window=4 is"),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, "sliding_window=4 is"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 28,
               "layer_types": ["full_attention", "sliding_attention"]}, "sliding_window=4 is"),
    ("llama", {"layer_types": ["sliding_attention"] * 2, "sliding_window": 4}, "sliding_window=4 is"),
    ("qwen2", {"layer_types": ["chunked_attention", "full_attention"]}, "layer_types: 'chunked_attention' changes"),
])  # fmt: skip
def test_a_window_shorter_than_the_context_is_refused_with_the_context_that_needs_none(kind, fields, shown, tmp_path):
    absent = [key for key in ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
              if key in FIELDS[kind]]  # fmt: skip
    folder_of(tmp_path, kind, both(drop(*absent), put(**fields)))
    with pytest.raises(ValueError, match=rf"config\.json: .*{shown}"):
        load_model(tmp_path)


# Reading: what is refused.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("field", ["num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
                                   "vocab_size", "max_position_embeddings"])  # fmt: skip
def test_a_missing_field_is_named(kind, field, tmp_path):
    with pytest.raises(ValueError, match=f"config.json: no {field}: this does not describe a {kind}"):
        load_model(folder_of(tmp_path, kind, drop(field)))


@pytest.mark.parametrize("kind, field", [("mistral", "num_key_value_heads"), ("qwen2", "num_key_value_heads"),
                                         ("qwen3", "num_key_value_heads"), ("qwen3", "head_dim")])  # fmt: skip
def test_so_is_one_that_transformers_would_guess(kind, field, tmp_path):
    with pytest.raises(ValueError, match=f"config.json: no {field}: this does not describe a {kind}"):
        load_model(folder_of(tmp_path, kind, drop(field)))


@pytest.mark.parametrize("kind, change, shown", [
    ("llama", put(hidden_act="gelu"), "hidden_act='gelu' changes what the model computes; only 'silu'"),
    ("qwen2", put(hidden_act="relu"), "hidden_act='relu' changes"),
    ("llama", put(mlp_bias=True), "mlp_bias=True changes"),
    ("llama", put(pretraining_tp=2), "pretraining_tp=2 changes"),
    ("llama", put(attention_bias="yes"), "attention_bias must be true or false, got 'yes'"),
    ("mistral", put(attention_bias=True), "attention_bias=True changes"),
    ("llama", put(quantization_config={"quant_method": "gptq", "bits": 4}), "quantization_config: .* by 'gptq' are"),
    ("qwen3", put(quantization_config={"quant_method": "bitsandbytes"}), "by 'bitsandbytes' are not read; take the"),
    ("llama", put(quantization_config="awq"), "by 'awq' are not read"),
    ("llama", both(drop("head_dim"), put(num_attention_heads=3)), "hidden_size must be a multiple of 3 heads"),
    ("llama", both(drop("head_dim"), put(hidden_size="8")), "hidden_size must be a multiple of 4 heads.*got '8'"),
    ("llama", both(drop("head_dim"), put(num_attention_heads=0)), "num_attention_heads must be a whole number of at"),
    ("llama", put(hidden_size=None), "hidden_size"), ("llama", put(num_hidden_layers="2"), "num_hidden_layers"),
    ("llama", put(num_key_value_heads=3), "num_key_value_heads"), ("llama", put(head_dim=0), "head_dim"),
    ("llama", put(rms_norm_eps=0), "rms_norm_eps"), ("llama", put(vocab_size=-1), "vocab_size"),
    ("llama", put(max_position_embeddings=16.5), "max_position_embeddings"),
    ("llama", put(tie_word_embeddings="no"), "tie_word_embeddings must be true or false, got 'no'"),
    ("llama", put(num_hidden_layers=10**9), "it describes a model of .* numbers, but"),
])  # fmt: skip
def test_what_computes_something_else_is_refused_by_name(kind, change, shown, tmp_path):
    folder_of(tmp_path, kind, change)
    with pytest.raises(ValueError, match=rf"config\.json: .*{shown}"):
        load_model(tmp_path)


@pytest.mark.parametrize("change, shown", [
    (tensor("model.layers.0.mlp.gate_proj.weight", None), "absent: layers.0.mlp.gate_proj.weight"),
    (tensor("score.weight", np.ones((2, 8), "f4")), "superfluous: score.weight"),
    (tensor("model.layers.0.mlp.gate_proj.bias", np.ones(12, "f4")), "superfluous: layers.0.mlp.gate_proj.bias"),
    (tensor("model.layers.1.self_attn.k_proj.weight", lambda w: w.T), r"k_proj.weight is \(8, 4\), not \(4, 8\)"),
    (tensor("model.norm.weight", lambda w: w * np.nan), r"norm.weight \(float32\) must hold floats, and no inf or nan"),
    (tensor("model.norm.weight", lambda w: w.astype("i4")), r"norm.weight \(int32\) must hold floats"),
    (tensor("norm.weight", np.ones(8, "f4")), "norm.weight is there twice, with and without model.; keep one"),
    (tensor("model.layers.0.self_attn.q_proj.inv_freq", np.ones(8, "f4")), "superfluous: .*q_proj.inv_freq"),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_tensors_that_do_not_fit_are_named(change, shown, tmp_path):
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}.*{shown}"):
        load_model(folder_of(tmp_path, "llama", change))


# Writing.


@pytest.mark.parametrize("dtype, code", [("float32", "F32"), ("float16", "F16"), ("bfloat16", "BF16")])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_has_transformers_names_and_comes_back(kind, dtype, code, tmp_path):
    model = small_llama(**EXTRAS[kind])
    save_model(model, tmp_path, dtype=dtype)
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        assert set(file.keys()) == set(by_hand(model)) and file.metadata()["format"] == "pt"
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {code}
    fields = json.loads((tmp_path / "config.json").read_text())
    again = load_model(tmp_path)
    assert fields["dtype"] == dtype and again.config == model.config
    if dtype == "float32":
        assert bits(again) == bits(model)
    save_model(again, tmp_path / "again", dtype=dtype)
    assert bits(load_model(tmp_path / "again")) == bits(again)
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("changes, kind, architecture", [
    ({}, "llama", "LlamaForCausalLM"), ({"attention_bias": True, "output_bias": True}, "llama", "LlamaForCausalLM"),
    ({"attention_bias": True}, "qwen2", "Qwen2ForCausalLM"), ({"qk_norm": True}, "qwen3", "Qwen3ForCausalLM"),
    ({"qk_norm": True, "attention_bias": True, "output_bias": True}, "qwen3", "Qwen3ForCausalLM"),
])  # fmt: skip
def test_a_model_made_here_is_written_as_the_kind_that_computes_it(changes, kind, architecture, tmp_path):
    model = small_llama(**changes)
    save_model(model, tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["model_type"] == kind and fields["architectures"] == [architecture]
    assert fields["bos_token_id"] is None and fields["eos_token_id"] is None
    assert load_model(tmp_path).config == model.config


@pytest.mark.parametrize("changes", [{"output_bias": True}, {"qk_norm": True, "attention_bias": True}])
def test_what_no_kind_of_transformers_computes_is_not_written(changes, tmp_path):
    with pytest.raises(ValueError, match="no kind of model that transformers has computes with attention_bias="):
        save_model(small_llama(**changes), tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 2.0}, {"rope_type": "llama3", **LLAMA3}])
def test_rotary_positions_are_written_for_transformers_4_and_for_5(scaling, tmp_path):
    save_model(small_llama(rope_theta=500000.0, rope_scaling=scaling), tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert (fields["rope_theta"], fields["rope_scaling"]) == (500000.0, scaling)
    assert fields["rope_parameters"] == {**(scaling or {"rope_type": "default"}), "rope_theta": 500000.0}
    for either in ("rope_parameters", "rope_scaling"):
        left = {key: value for key, value in fields.items() if key != either}
        save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(left))
        assert load_model(tmp_path).config.rope_scaling == scaling


OTHER_SETTINGS = {"eos_token_id": [2, 3], "pad_token_id": 4, "initializer_range": 0.02, "foo": {"x": [1]}}


@pytest.mark.parametrize("kind", KINDS)
def test_the_other_settings_of_the_folder_it_came_from_go_along(kind, tmp_path):
    theirs = {**OTHER_SETTINGS, "torch_dtype": "bfloat16"}
    source = folder_of(tmp_path / "source", kind, put(**theirs))
    model = load_model(source)
    save_model(model, tmp_path / "out", dtype="float16", like=source)
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("source", "out"))
    assert after["model_type"] == kind and "torch_dtype" not in after and after["dtype"] == "float16"
    kept = before.keys() - {"torch_dtype", "dtype", "pretraining_tp"}
    assert {key: after[key] for key in kept} == {key: before[key] for key in kept}
    assert load_model(tmp_path / "out").config == model.config


def test_a_folder_of_another_family_lends_its_tokens_and_no_more(tmp_path):
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2", "n_ctx": 4, "eos_token_id": 5}')
    save_model(small_llama(), tmp_path / "out", like=tmp_path / "gpt2")
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert fields["eos_token_id"] == 5 and "n_ctx" not in fields


def test_what_says_of_each_layer_what_it_is_is_not_kept_for_another_number_of_layers(tmp_path):
    source = folder_of(tmp_path / "source", "qwen2")
    save_model(small_llama(num_hidden_layers=3, attention_bias=True), tmp_path / "out", like=source)
    assert "layer_types" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_a_llama_with_other_tensors_is_not_saved(tmp_path):
    model = small_llama()
    model.layers[0].self_attn.q_proj.bias = Tensor(np.ones(8, "f4"))
    with pytest.raises(ValueError, match="saving a Llama, its tensors: .*superfluous: layers.0.self_attn.q_proj.bias"):
        save_model(model, tmp_path / "model")


# Adapters: the names are PEFT's, and nothing else had to be written for them.


@pytest.mark.parametrize("kind", KINDS)
def test_its_adapter_has_pefts_names_and_comes_back_to_the_bit(kind, tmp_path):
    base = load_model(folder_of(tmp_path / "base", kind))
    adapter = trained_adapter(base, target_modules="all-linear")
    save_adapter(adapter, tmp_path / "adapter")
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    linears = [f"{part}_proj" for part in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate",
                                           "mlp.up", "mlp.down")]  # fmt: skip
    expected = {f"base_model.model.model.layers.{i}.{x}.lora_{factor}.weight"
                for i in (0, 1) for x in linears for factor in "AB"}  # fmt: skip
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert names == expected and fields["fan_in_fan_out"] is False
    assert set(fields["target_modules"]) == {name.rpartition(".")[2] for name in linears}
    receipts = []
    assert same_adapter(load_adapter(tmp_path / "adapter", base, say=receipts.append), adapter)
    assert len(receipts[0].splitlines()) == 9 and "2 x mlp.down_proj: r=2, scaling 2" in receipts[0]


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["mlp.gate_proj"], "all-linear",
                                     r"model\.layers\.1\.self_attn\.[qk]_proj", ["lora_nothing"]])  # fmt: skip
def test_a_new_adapter_finds_its_targets_by_pefts_names(targets):
    base = small_llama()
    if targets == ["lora_nothing"]:
        with pytest.raises(ValueError, match="lora_nothing"):
            init_peft_adapter(base, LoRAConfig(2, 4, targets), np.random.default_rng(0))
        return
    adapter = init_peft_adapter(base, LoRAConfig(2, 4, targets), np.random.default_rng(0))
    found = {re.sub(r"layers\.\d+\.", "", name) for name in adapter.pairs}
    expected = {"all-linear": set(LLAMA.parts), r"model\.layers\.1\.self_attn\.[qk]_proj": {
        "self_attn.q_proj", "self_attn.k_proj"}}  # fmt: skip
    if isinstance(targets, str):
        assert found == expected[targets]
    else:
        assert {name.rpartition(".")[2] for name in found} == {name.rpartition(".")[2] for name in targets}


@pytest.mark.parametrize("prefix", ["base_model.model.model.", "base_model.model."])
def test_an_adapter_of_another_program_is_read_with_or_without_the_prefix(prefix, tmp_path):
    base = small_llama()
    rng = np.random.default_rng(3)
    tensors = {}
    for name in ("layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"):
        rows, columns = dict(base.named_modules())[name].weight.shape
        tensors[f"{prefix}{name}.lora_A.weight"] = rng.standard_normal((2, columns)).astype("f4")
        tensors[f"{prefix}{name}.lora_B.weight"] = rng.standard_normal((rows, 2)).astype("f4")
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4,
              "target_modules": ["layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"]}  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    adapter = load_adapter(tmp_path, base, say=lambda text: None)
    assert list(adapter.pairs) == ["layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"]
    pair = adapter.pairs["layers.1.mlp.down_proj"]
    assert np.array_equal(pair.lora_B.data, tensors[f"{prefix}layers.1.mlp.down_proj.lora_B.weight"])


def test_an_adapter_of_one_llama_is_refused_on_another(tmp_path):
    save_adapter(trained_adapter(small_llama(), target_modules=["q_proj"]), tmp_path)
    with pytest.raises(ValueError, match="does not fit this base"):
        load_adapter(tmp_path, small_llama(1), say=lambda text: None)


def test_an_adapter_on_16_bits_comes_back_and_fits_the_widened_twin(tmp_path):
    """The numbers are the same, so the fingerprint is."""
    folder_of(tmp_path / "base", "llama")
    save_model(load_model(tmp_path / "base"), tmp_path / "half", dtype="bfloat16")
    packed = load_model(tmp_path / "half")
    twin = packed.map_tensors(lambda t: Tensor(t.data))
    save_model(packed, tmp_path / "wide", dtype="float32")
    adapter = trained_adapter(packed, target_modules="all-linear")
    save_adapter(adapter, tmp_path / "adapter")
    assert twin.fingerprint() == packed.fingerprint() == load_model(tmp_path / "wide").fingerprint()
    for base in (packed, load_model(tmp_path / "wide")):
        assert same_adapter(load_adapter(tmp_path / "adapter", base, say=lambda text: None), adapter)


# The record.


def test_the_family_of_a_llama_comes_first_among_its_names():
    assert families_of(small_llama())[0] is LLAMA
    assert LLAMA.module_table(linear_names(small_llama()))["model.layers.1.mlp.up_proj"] == ["layers.1.mlp.up_proj"]
    assert LLAMA.their_name("lm_head") == "lm_head" and LLAMA.their_name("embed_tokens") == "model.embed_tokens"


@pytest.mark.parametrize("changes, shown", [
    ({}, "2 blocks of 4 heads of 2 over 2 of keys and values, 8 channels, 12 in the MLP"),
    ({"attention_bias": True}, "12 in the MLP, biases on q, k, v"),
    ({"attention_bias": True, "output_bias": True}, "biases on q, k, v and o"),
    ({"qk_norm": True}, "norms on q and k"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, r"rotary positions scaled \(linear\)"),
])  # fmt: skip
def test_it_describes_a_model_in_a_line(changes, shown):
    text = LLAMA.describe(small_llama(**changes).config)
    assert re.search(f"{shown}$", text) and "\n" not in text


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"head_dim": 6}, {"num_key_value_heads": 4}])
def test_it_counts_the_numbers_but_for_norms(changes):
    model = small_llama(**changes)
    assert LLAMA.count(model.config) == sum(p.size for p in model.parameters() if p.ndim == 2)


def test_vllm_is_said_to_serve_its_adapters():
    assert LLAMA.note.startswith("vLLM serves adapters") and "not run" in LLAMA.note
