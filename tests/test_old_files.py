"""What earlier versions wrote, frozen in `tests/golden/v0_1`: it still loads, and is still the same."""

from pathlib import Path

import numpy as np
import pytest

from minilora import attach, load_adapter, load_model, merge, no_grad, save_adapter, save_model

OLD = Path(__file__).resolve().parent / "golden" / "v0_1"
CASES = sorted(path.parent.name for path in OLD.glob("*/expected.npz"))
ADAPTERS = sorted(path.parent.relative_to(OLD).as_posix() for path in OLD.glob("*/*/adapter_config.json"))
# As in test_golden.py: in float64 nothing but rounding, in float32 a margin. The largest found is 3e-6.
TOLERANCES = {"float64": 1e-10, "float32": 2e-5}
every_case = pytest.mark.parametrize("case", CASES)
every_adapter = pytest.mark.parametrize("adapter", ADAPTERS)
both_dtypes = pytest.mark.parametrize("dtype", TOLERANCES)


def frozen(case):
    """The numbers that version 0.1.0 had in memory when it wrote the folders of a case."""
    return dict(np.load(OLD / case / "expected.npz"))


def of(adapter):
    """(case, what was frozen of this adapter), the latter without its name before it."""
    case, _, name = adapter.partition("/")
    return case, {key.removeprefix(f"{name}:"): a for key, a in frozen(case).items() if key.startswith(f"{name}:")}


def base_of(case, dtype=None):
    base = load_model(OLD / case / "base")
    return base if dtype is None else base.astype(dtype)


def loaded(folder, base):
    return load_adapter(folder, base, say=lambda text: None)


def logits(model, ids):
    with no_grad():
        return model(ids).data


def close(ours, theirs, dtype):
    difference = np.abs(ours - theirs).max()
    assert ours.dtype == dtype and ours.shape == theirs.shape and difference < TOLERANCES[dtype], difference


def is_what_was_frozen(adapter, base, expected):
    """Each tensor to the bit, in its dtype, under its name and in its order; and how strong each pair is."""
    kept = {key: a for key, a in expected.items() if key not in ("logits", "modules", "scalings")}
    parameters = {name: p.data for name, p in adapter.named_parameters()}
    assert list(parameters) == list(kept)
    for name, array in kept.items():
        assert parameters[name].dtype == array.dtype and np.array_equal(parameters[name], array), name
    layers = dict(attach(base, adapter).named_modules())
    assert list(adapter.pairs) == expected["modules"].tolist()
    assert [layers[name].pair.scaling for name in adapter.pairs] == expected["scalings"].tolist()


def test_every_folder_is_there():
    assert CASES == ["checkpoint", "float64", "gpt2", "merged", "rotary", "untied"]
    assert ADAPTERS == ["checkpoint/whole", "float64/adapter", "gpt2/adapter_apart", "gpt2/adapter_apart_rslora",
                        "gpt2/adapter_c_attn", "rotary/adapter", "rotary/adapter_rslora", "untied/adapter"]  # fmt: skip


@every_case
@both_dtypes
def test_a_base_computes_what_it_did(case, dtype):
    expected = frozen(case)
    close(logits(base_of(case, dtype), expected["ids"]), expected["base_logits"], dtype)


@every_adapter
def test_an_adapter_is_what_it_was(adapter):
    case, expected = of(adapter)
    base = base_of(case)
    is_what_was_frozen(loaded(OLD / adapter, base), base, expected)


@every_adapter
@both_dtypes
def test_attached_and_merged_it_computes_what_it_did(adapter, dtype):
    case, expected = of(adapter)
    base, ids = base_of(case, dtype), frozen(case)["ids"]
    assert np.abs(expected["logits"] - frozen(case)["base_logits"]).max() > 0.5
    if (case, dtype) == ("float64", "float32"):
        with pytest.raises(TypeError):  # it is never narrowed
            loaded(OLD / adapter, base)
        return
    model = attach(base, loaded(OLD / adapter, base))
    close(logits(model, ids), expected["logits"], dtype)
    close(logits(merge(model), ids), expected["logits"], dtype)


def test_only_what_was_saved_in_float64_is_loaded_as_that():
    assert {case: {p.dtype.name for p in base_of(case).parameters()} for case in CASES} == {
        case: {"float64" if case == "float64" else "float32"} for case in CASES
    }


@every_adapter
def test_its_base_is_recognised_and_another_one_refused(adapter):
    """The fingerprint that is in the file is the one that is computed today, from every tensor of the base."""
    case, _, name = adapter.partition("/")
    said = []
    load_adapter(OLD / adapter, base_of(case), say=said.append)
    assert len(said) == 1 and "base: recognised" in said[0]
    for changed, _ in base_of(case).named_parameters():
        other = base_of(case).trainable_copy()
        dict(other.named_parameters())[changed].data.reshape(-1)[-1] += 1
        with pytest.raises(ValueError, match="does not fit this base"):
            loaded(OLD / adapter, other)


def test_q_k_and_v_that_shared_one_factor_share_it_again():
    adapter = loaded(OLD / "gpt2/adapter_c_attn", base_of("gpt2"))
    assert len(adapter.pairs) == 6 and len(adapter.parameters()) == 2 * (1 + 3)
    for block in ("h.0.attn", "h.1.attn"):
        q, k, v = (adapter.pairs[f"{block}.{part}_proj"] for part in "qkv")
        assert q.lora_A is k.lora_A is v.lora_A


def test_q_and_v_that_were_trained_apart_come_apart_again():
    adapter = loaded(OLD / "gpt2/adapter_apart", base_of("gpt2"))
    ranks = {name: pair.lora_A.shape[0] for name, pair in adapter.pairs.items()}
    assert ranks == {"h.0.attn.q_proj": 3, "h.0.attn.v_proj": 3, "h.1.attn.q_proj": 3, "h.1.attn.v_proj": 6}
    assert len({id(p) for p in adapter.parameters()}) == 8


@every_adapter
def test_written_again_it_is_still_the_same(adapter, tmp_path):
    case, expected = of(adapter)
    base = base_of(case)
    save_adapter(loaded(OLD / adapter, base), tmp_path)
    is_what_was_frozen(loaded(tmp_path, base), base, expected)


@every_case
def test_a_base_written_again_is_still_the_same(case, tmp_path):
    base = base_of(case)
    save_model(base, tmp_path)
    again = load_model(tmp_path)
    assert again.config == base.config
    theirs = dict(base.named_parameters())
    assert [name for name, _ in again.named_parameters()] == list(theirs)
    for name, p in again.named_parameters():
        assert p.dtype == theirs[name].dtype and np.array_equal(p.data, theirs[name].data), name


NEXT = lambda a: np.nextafter(a, np.inf, dtype=a.dtype)
SPOILT = {  # what is not as it was: (the field of what is expected, how it is changed)
    "the last bit of a tensor": ("h.0.attn.k_proj.lora_A", NEXT),
    "the dtype of a tensor": ("h.0.attn.k_proj.lora_B", lambda a: a.astype("float64")),
    "the last bit of a scaling": ("scalings", NEXT),
    "the order of the modules": ("modules", lambda a: a[::-1]),
}


@pytest.mark.parametrize("field, change", SPOILT.values(), ids=SPOILT)
def test_the_comparison_can_fail(field, change):
    case, expected = of("rotary/adapter")
    base = base_of(case)
    with pytest.raises(AssertionError):
        is_what_was_frozen(loaded(OLD / "rotary/adapter", base), base, {**expected, field: change(expected[field])})
