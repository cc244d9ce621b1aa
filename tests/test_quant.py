"""Quantising: each number becomes the nearest it can, scales too, and an adapter knows what became of its base."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ops import refuses
from strategies import TinyMLP, contents, learned, new_adapter, rngs, tiny_llama

from minilora.disk.peft import load_adapter, save_adapter
from minilora.fits import changes_of
from minilora.lora import attach
from minilora.nn import Linear
from minilora.packed import BLOCKS, NF4, NF4_BLOCK, PackedTensor, float8_table, nf4_scales
from minilora.quant import KINDS, quantize, quantized, quantized_blocks, quantized_nf4, relative_error, stored_as, widen
from minilora.tensor import Tensor

every_kind = pytest.mark.parametrize("kind", KINDS)
SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}


def base_model(**changes):
    return tiny_llama(dtype="float32", **{**SIZES, **changes})


@st.composite
def weights(draw):
    """Weights with rows of whole blocks, of very different sizes, some blocks zero or constant."""
    rng, shape = draw(rngs), (draw(st.integers(1, 4)), 32 * draw(st.integers(1, 3)))
    values = (rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 3, (shape[0], 1))).astype(np.float32)
    values[rng.random(shape[0]) < 0.2] = draw(st.sampled_from([0.0, 1.5, -0.25]))
    return values


@pytest.mark.parametrize("kind", BLOCKS)
@given(weights())
def test_blocks_are_those_of_llama_cpp(kind, values):
    gguf = pytest.importorskip("gguf")
    theirs = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(quantized_blocks("w", values, kind), theirs)


def is_nearest(values):
    """Every number of NF4 is the nearest that its scale can make, and zero stays zero."""
    arrays = quantized_nf4(values)
    tensor = PackedTensor("NF4", values.shape, *arrays)
    n = len(arrays[0])
    padded = np.zeros(n * NF4_BLOCK, np.float32)
    padded[: values.size] = values.ravel()
    got = np.zeros_like(padded)
    got[: values.size] = tensor.data.ravel()
    scales = np.repeat(nf4_scales(*arrays[1:]), NF4_BLOCK).astype(np.float64)
    reachable = scales[:, None] * np.array(NF4, np.float32)
    best = np.abs(reachable - padded[:, None]).min(-1)
    # A tie may go either way, and the border itself is rounded.
    assert np.all(np.abs(got - padded) <= best + 1e-5 * np.abs(scales))
    assert np.all(got[padded == 0] == 0)


@given(weights())
def test_nf4_takes_the_nearest(values):
    is_nearest(values)


def test_planted_another_number_than_the_nearest_is_noticed(monkeypatch):
    values = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    monkeypatch.setattr("minilora.quant.NF4", tuple(x + 0.02 for x in NF4))
    with pytest.raises(AssertionError):
        is_nearest(values)


def test_the_sixteen_numbers_split_the_normal_distribution():
    """Dettmers et al., equation 4: the means of quantiles of N(0, 1), zero among them, divided by the largest."""
    from statistics import NormalDist

    offset = 0.9677083
    quantile = NormalDist().inv_cdf
    positive = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    negative = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    expected = np.array(sorted([*positive, 0.0, *negative]))
    assert np.allclose(NF4, expected / expected.max(), atol=1e-6)


def test_the_scales_are_8_bit_floats_of_the_papers_format():
    table = float8_table() * 448
    assert len(table) == 256 and table[0b0_1111_110] == 448 and table[0b0_0000_001] == 2.0**-9
    assert table[0b0_0111_000] == 1 and table[0b1_0111_100] == -1.5
    ml_dtypes = pytest.importorskip("ml_dtypes")
    theirs = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    finite = np.isfinite(theirs)
    assert finite.sum() == 254 and np.allclose(table[finite], theirs[finite], rtol=1e-6)


@pytest.mark.parametrize("kind, bits, error", [("NF4", 4.2, 0.11), ("Q4_1", 5.0, 0.10), ("Q4_0", 4.5, 0.11),
                                               ("Q8_0", 8.5, 0.01)])
def test_normal_weights_lose_what_the_kind_costs_and_no_more(kind, bits, error):
    values = np.random.default_rng(0).standard_normal((256, 512)).astype(np.float32) * np.float32(0.02)
    tensor = quantized("w", Tensor(values), kind)
    assert 8 * tensor.nbytes / tensor.size <= bits
    assert error / 3 < relative_error(tensor.data, values) < error
    assert tensor.source.error == relative_error(tensor.data, values) and tensor.source.kind == "float32"


@pytest.mark.parametrize("kind", BLOCKS)
def test_numbers_too_large_for_a_scale_are_refused_and_tiny_ones_become_zero(kind):
    refuses(lambda: quantized("w", Tensor(np.full((1, 32), 1e8, np.float32)), kind), ValueError, ["w", "1e+08", "nf4"])
    tiny = quantized("w", Tensor(np.full((1, 32), 1e-39, np.float32)), kind)
    assert np.all(np.abs(tiny.data) <= 1e-38)


def test_nf4_takes_weights_of_any_shape_and_blocks_do_not():
    values = np.random.default_rng(0).standard_normal((5, 13)).astype(np.float32)
    tensor = quantized("w", Tensor(values), "NF4")
    assert tensor.shape == (5, 13) and relative_error(tensor.data, values) < 0.15
    refuses(lambda: quantized("w", Tensor(values), "Q4_0"), ValueError, ["w", "(5, 13)", "multiple of 32", "nf4"])


# --- models -----------------------------------------------------------------------------------------------------------


@every_kind
def test_the_linears_are_quantised_and_nothing_else_is_touched(kind):
    base = base_model()
    before = contents(base)
    names = []
    model = quantize(base, kind.lower(), on_layer=names.append)
    stored = stored_as(model)
    assert set(stored.values()) == {kind} and len(stored) == 7 * 2 == len(names)
    assert all(name.endswith("_proj.weight") for name in stored)
    assert model.embed_tokens.weight is base.embed_tokens.weight and contents(base) == before
    assert stored_as(widen(model)) == {}


def test_what_was_packed_is_quantised_again_and_says_so():
    once = quantize(base_model(), "q8_0")
    twice = quantize(once, "nf4")
    sources = {t.source.kind for t in twice.parameters() if isinstance(t, PackedTensor)}
    assert set(stored_as(twice).values()) == {"NF4"} and sources == {"Q8_0"}


@pytest.mark.parametrize("make, shown", [
    (lambda base: quantize(base, "nf3"), ["nf4, q8_0, q4_0, q4_1", "'nf3'"]),
    (lambda base: quantize(attach(base, new_adapter(base)), "nf4"), ["carries an adapter", "quantise the base"]),
    (lambda base: quantize(base.map_tensors(lambda t: Tensor(t.data * np.float32(np.inf))), "nf4"), ["inf or nan"]),
    (lambda base: quantize(base.astype("float64"), "nf4"), ["is float64", 'astype("float32")']),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_cannot_be_quantised_is_refused(make, shown):
    refuses(lambda: make(base_model()), ValueError, shown)


# --- an adapter and its base in another precision ---------------------------------------------------------------------


def saved(base, folder):
    """An adapter for `base`, on disk; and what a load prints."""
    adapter = learned(new_adapter(base))
    save_adapter(adapter, folder)
    return adapter


def load(folder, base, **options):
    lines = []
    adapter = load_adapter(folder, base, say=lines.append, **options)
    return adapter, "\n".join(lines)


def test_the_same_values_in_other_bits_are_the_same_base(tmp_path):
    base = quantize(base_model(), "q4_0")
    saved(base, tmp_path)
    adapter, receipt = load(tmp_path, widen(base))
    assert adapter.base_stored == stored_as(base)
    assert "recognised, fingerprint" in receipt and "stored as 14 Q4_0 in training and as plain numbers here" in receipt
    assert "plain numbers" not in load(tmp_path, base)[1]


@pytest.mark.parametrize("train, use", [("nf4", None), (None, "nf4"), ("q8_0", None)], ids=str)
def test_another_precision_is_refused_with_the_way_out_and_accepted_on_request(tmp_path, train, use):
    plain = base_model()
    made = lambda kind: plain if kind is None else quantize(plain, kind)
    saved(made(train), tmp_path)
    base = made(use)
    kinds = [(k or "float32").upper().replace("FLOAT", "float") for k in (train, use)]
    refuses(lambda: load(tmp_path, base), ValueError,
            ["in another precision", f"14 weights were {kinds[0]} in training and are {kinds[1]} here", "% of itself",
             "accept_base=['other-precision'] (--accept-base other-precision)"])  # fmt: skip
    adapter, receipt = load(tmp_path, base, accept_base=["other-precision"])
    assert "base: recognised, CHANGED: in another precision: 14" in receipt and f"are {kinds[1]} here" in receipt
    attach(base, adapter, check_base=False)


def test_another_base_is_not_taken_for_another_precision(tmp_path):
    saved(quantize(base_model(), "nf4"), tmp_path)
    others = [base_model(seed=1), quantize(base_model(seed=1), "nf4"), quantize(base_model(), "q4_0"),
              base_model(attention_bias=True)]
    for other in others:
        with pytest.raises(ValueError, match="does not fit this base"):
            load(tmp_path, other, accept_base=["other-precision"])


def test_a_base_that_could_never_be_stored_so_is_just_another_base(tmp_path):
    """Its rows have no whole blocks: that is said of the base, and not of quantising."""
    adapter = new_adapter(quantize(base_model(), "q8_0"))
    narrow = base_model(intermediate_size=40)
    assert changes_of(narrow, adapter.base_fingerprint, adapter.base_stored, {}) is None


def test_one_weight_that_was_edited_is_not_a_precision(tmp_path):
    base = base_model()
    adapter = new_adapter(quantize(base, "nf4"))
    edited = base.rebuild(lambda name, t: Tensor(t.data + 1) if name == "norm.weight" else None)
    assert changes_of(base, adapter.base_fingerprint, adapter.base_stored, {}).keys() == adapter.base_stored.keys()
    assert changes_of(edited, adapter.base_fingerprint, adapter.base_stored, {}) is None


def test_a_note_on_storage_that_is_no_note_is_refused_by_name(tmp_path):
    from minilora.disk.tensor_file import read_tensors, write_tensors

    base = quantize(base_model(), "nf4")
    saved(base, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors, metadata = read_tensors(path)
    for note in ("[", "[1]", json.dumps({"layers.0.mlp.up_proj.weight": 3})):
        write_tensors(path, {name: np.array(a) for name, a in tensors.items()}, {**metadata, "minilora.stored": note})
        with pytest.raises(ValueError, match=r"adapter_model\.safetensors: its minilora\.stored"):
            load(tmp_path, base)


def test_a_linear_takes_part_whatever_its_bias():
    x = Tensor(np.ones((1, 64), np.float32))
    for bias in (None, Tensor(np.ones(2, np.float32))):
        tree = TinyMLP([Linear(Tensor(np.ones((2, 64), np.float32)), bias)])
        assert np.allclose(quantize(tree, "q8_0")(x).data, tree(x).data, rtol=1e-3)
