"""What transformers and PEFT wrote and computed for Llama's family, frozen in `tests/golden/llama`: the same here."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from strategies import bits, same_adapter

from minilora import Adam, attach, load_adapter, load_model, merge, save_adapter, save_model
from minilora.graph import no_grad
from minilora.quant import stored_as, widen

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "llama"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/expected.npz"))
NARROW = {"llama_bf16": ("bfloat16", "BF16"), "llama_f16": ("float16", "F16")}
PREFIX = "base_model.model.model."
# In float32 this is a margin, not a derived bound: two layers of rounding are not worth an analysis. The largest
# difference found is 5e-6, on logits of up to 8, and every bug planted below moves a logit by more than the margin.
FLOAT32_MARGIN = 2e-5
QUIET = {"say": lambda line: None}


def frozen(case):
    """The numbers that transformers and PEFT computed, in float64."""
    return dict(np.load(GOLDEN / case / "expected.npz"))


def base_of(case, dtype="float64"):
    return widen(load_model(GOLDEN / case / "base")).astype(dtype)


def adapter_of(case, base):
    return load_adapter(GOLDEN / case / "adapter", base, **QUIET)


def logits(model, ids):
    with no_grad():
        return model(ids).data


def close(ours, theirs, tolerance):
    difference = np.abs(ours - theirs).max()
    assert ours.shape == theirs.shape and difference < tolerance, difference


def of_file(adapter, pick):
    """{key of PEFT's file: array} of what `pick` takes from each tensor of an adapter."""
    found = {}
    for module, pair in adapter.pairs.items():
        found[f"{PREFIX}{module}.lora_A.weight"] = pick(pair.lora_A)
        found[f"{PREFIX}{module}.lora_B.weight"] = pick(pair.lora_B)
    return found


def numbers(case, prefix):
    return {key.removeprefix(prefix): value for key, value in frozen(case).items() if key.startswith(prefix)}


# What is computed.


def test_no_case_is_lost():
    families = {json.loads((GOLDEN / case / "base" / "config.json").read_text())["model_type"] for case in CASES}
    assert len(CASES) == 13 and families == {"llama", "mistral", "qwen2", "qwen3"}
    assert all(np.abs(frozen(case)["adapted_logits"] - frozen(case)["base_logits"]).max() > 0.01 for case in CASES)


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-10), ("float32", FLOAT32_MARGIN)])
@pytest.mark.parametrize("case", CASES)
def test_base_attached_and_merged_compute_what_was_frozen(case, dtype, tolerance):
    expected, base = frozen(case), base_of(case, dtype)
    close(logits(base, expected["ids"]), expected["base_logits"], tolerance)
    model = attach(base, adapter_of(case, base))
    close(logits(model, expected["ids"]), expected["adapted_logits"], tolerance)
    close(logits(merge(model), expected["ids"]), expected["adapted_logits"], tolerance)


@pytest.mark.parametrize("case", ["llama_tied", "mistral", "qwen2", "qwen3"])
def test_untouched_transformers_differs_by_its_own_rounding_alone(case):
    """Its norms and angles are float32 in a float64 model too: one rounding each, which float32 itself has as well."""
    expected = frozen(case)
    assert np.abs(expected["as_is_logits"] - expected["base_logits"]).max() > 1e-8
    close(logits(base_of(case), expected["ids"]), expected["as_is_logits"], FLOAT32_MARGIN)


@pytest.mark.parametrize("case", CASES)
def test_the_loss_and_the_gradients_are_the_frozen_ones(case):
    expected, base = frozen(case), base_of(case)
    adapter = adapter_of(case, base)
    loss = attach(base, adapter).loss(expected["ids"][:, :-1], expected["ids"][:, 1:])
    loss.backward()
    close(loss.data, expected["loss"], 1e-10)
    ours, theirs = of_file(adapter, lambda t: t.grad), numbers(case, "grad:")
    assert ours.keys() == theirs.keys()
    for key in theirs:
        close(ours[key], theirs[key], 1e-10)
        assert np.abs(theirs[key]).max() > 1e-4


def test_twenty_steps_of_adam_follow_the_frozen_ones():
    expected, base = frozen("llama_tied"), base_of("llama_tied")
    adapter = adapter_of("llama_tied", base)
    start = {key: value.copy() for key, value in of_file(adapter, lambda t: t.data).items()}
    model, adam = attach(base, adapter), Adam(adapter.parameters(), lr=1e-2, weight_decay=0.01)
    for _ in range(20):
        adam.zero_grad()
        model.loss(expected["ids"][:, :-1], expected["ids"][:, 1:]).backward()
        adam.step()
    ours, theirs = of_file(adapter, lambda t: t.data), numbers("llama_tied", "adamw:")
    assert ours.keys() == theirs.keys() and len(theirs) == 28
    for key in theirs:
        close(ours[key], theirs[key], 1e-9)
        assert np.abs(ours[key] - start[key]).max() > 0.05


@pytest.mark.parametrize("case", NARROW)
def test_a_narrow_base_stays_narrow_and_computes_to_the_bit_what_its_wide_twin_does(case):
    packed = load_model(GOLDEN / case / "base")
    kinds = stored_as(packed)
    assert kinds["layers.0.self_attn.q_proj.weight"] == kinds["embed_tokens.weight"] == NARROW[case][1]
    ids = frozen(case)["ids"]
    assert np.array_equal(logits(packed, ids), logits(widen(packed), ids))


# What is written back.


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_is_written_back_to_the_bit_under_the_same_keys(case, tmp_path):
    base = base_of(case, "float32")
    adapter = adapter_of(case, base)
    save_adapter(adapter, tmp_path)
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (tmp_path, GOLDEN / case / "adapter"))
    assert ours.keys() == theirs.keys()
    for key in theirs:
        assert ours[key].dtype == theirs[key].dtype and ours[key].tobytes() == theirs[key].tobytes(), key
    again = load_adapter(tmp_path, base, **QUIET)
    assert same_adapter(again, adapter)
    for pair in adapter.pairs:
        assert again.pairs[pair].scaling == adapter.pairs[pair].scaling


def raw_tensors(folder):
    """{name: (type, shape, bytes)} of all safetensors files of a folder, whatever their types."""
    found = {}
    for path in folder.glob("*.safetensors"):
        blob = path.read_bytes()
        start = 8 + int.from_bytes(blob[:8], "little")
        entries = json.loads(blob[8:start])
        entries.pop("__metadata__", None)
        for name, entry in entries.items():
            first, last = (start + offset for offset in entry["data_offsets"])
            found[name] = (entry["dtype"], tuple(entry["shape"]), blob[first:last])
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_base_is_written_back_to_the_bit(case, tmp_path):
    source = GOLDEN / case / "base"
    model = load_model(source)
    dtype, _ = NARROW.get(case, (None, None))
    save_model(model, tmp_path, dtype=dtype, like=source)
    assert raw_tensors(tmp_path) == raw_tensors(source)
    again = load_model(tmp_path)
    assert again.config == model.config and again.fingerprint() == model.fingerprint()
    assert bits(widen(again)) == bits(widen(model))


# The comparison can fail: what a reader with a bug makes of these files, the files themselves are made to say.


def edited(case, folder, change):
    """The base of `case` in `folder`, after `change(fields of config.json, tensors)`."""
    source = GOLDEN / case / "base"
    fields = json.loads((source / "config.json").read_text(encoding="utf-8"))
    tensors = load_file(source / "model.safetensors")
    change(fields, tensors)
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def field(**changes):
    return lambda fields, tensors: fields.update(changes)


def rope(**changes):
    return lambda fields, tensors: fields["rope_parameters"].update(changes)


def swapped(one, other):
    """Let two tensors of each layer be taken for each other."""

    def change(fields, tensors):
        for name in [name for name in tensors if one in name]:
            twin = name.replace(one, other)
            tensors[name], tensors[twin] = tensors[twin], tensors[name]

    return change


def zero(part):
    """Let a tensor of each layer be left out."""

    def change(fields, tensors):
        for name in [name for name in tensors if part in name]:
            tensors[name] = np.zeros_like(tensors[name])

    return change


def heads(of, order):
    """Let the rows of q and the columns of o be taken to lie in another order of heads."""

    def change(fields, tensors):
        for name in [name for name in tensors if of in name]:
            array = tensors[name] if of == "q_proj" else tensors[name].T
            split = array.reshape(len(order), -1, array.shape[-1])
            moved = split[list(order)].reshape(array.shape)
            tensors[name] = np.ascontiguousarray(moved if of == "q_proj" else moved.T)

    return change


def other_groups(fields, tensors):
    """Let query head h read key/value head h mod 2, where it reads h div 2."""
    heads("q_proj", (0, 2, 1, 3))(fields, tensors)
    heads("o_proj", (0, 2, 1, 3))(fields, tensors)


def neighbours_turned(fields, tensors):
    """Let the rotary angles turn neighbouring channels, where they turn the two halves of a head."""
    for name in [name for name in tensors if "q_proj" in name or "k_proj" in name]:
        rows = tensors[name].reshape(-1, 2, 2, 16)
        tensors[name] = np.ascontiguousarray(rows.swapaxes(1, 2).reshape(tensors[name].shape))


def head_forced_to_be_tied(fields, tensors):
    fields.update(tie_word_embeddings=True)
    del tensors["lm_head.weight"]


BUGS = {
    "rope_theta ignored": ("llama_tied", rope(rope_theta=10000.0)),
    "linear scaling ignored": ("llama_linear", rope(rope_type="default")),
    "linear scaling of transformers 4 ignored": ("llama_old_style", field(rope_scaling=None)),
    "rope_theta of transformers 4 ignored": ("llama_old_style", field(rope_theta=10000.0)),
    "llama3's scaling ignored": ("llama_llama3", rope(rope_type="default")),
    "llama3 taken for linear": ("llama_llama3", rope(rope_type="linear")),
    "llama3's low_freq_factor ignored": ("llama_llama3", rope(low_freq_factor=2.0)),
    "llama3's high_freq_factor ignored": ("llama_llama3", rope(high_freq_factor=8.0)),
    "llama3's original context ignored": ("llama_llama3", rope(original_max_position_embeddings=127)),
    "rms_norm_eps ignored": ("llama_untied", field(rms_norm_eps=1e-6)),
    "a tied head forced": ("llama_untied", head_forced_to_be_tied),
    "k and v swapped": ("llama_untied", swapped("k_proj", "v_proj")),
    "gate and up swapped": ("mistral", swapped("gate_proj", "up_proj")),
    "the two norms swapped": ("llama_tied", swapped("input_layernorm", "post_attention_layernorm")),
    "q's and k's norms swapped": ("qwen3", swapped("q_norm", "k_norm")),
    "biases of q, k and v left out": ("qwen2", zero("bias")),
    "the bias of o left out": ("llama_bias", zero("o_proj.bias")),
    "query heads grouped the other way": ("llama_tied", other_groups),
    "rotary angles on neighbours": ("llama_tied", neighbours_turned),
}  # fmt: skip


@pytest.mark.parametrize("name", BUGS)
def test_a_reader_with_a_bug_is_noticed(name, tmp_path):
    case, change = BUGS[name]
    expected = frozen(case)
    close(logits(base_of(case, "float32"), expected["ids"]), expected["base_logits"], FLOAT32_MARGIN)
    wrong = load_model(edited(case, tmp_path, change))
    with pytest.raises(AssertionError):
        close(logits(wrong, expected["ids"]), expected["base_logits"], FLOAT32_MARGIN)


def test_an_edit_that_changes_nothing_changes_nothing(tmp_path):
    again = load_model(edited("llama_tied", tmp_path, lambda fields, tensors: None))
    expected = frozen("llama_tied")
    close(logits(again, expected["ids"]), expected["base_logits"], FLOAT32_MARGIN)
