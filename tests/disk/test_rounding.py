"""A merged model in fewer bits: what is reported is what was lost, it is told in time, and the file holds the rest."""

import json
import math
import struct
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import deserialize
from safetensors.numpy import load_file, save_file
from strategies import TinyMLP, agree, contents, hunt, learned, new_adapter, rngs, tiny_mlp

from minilora.disk import rounding
from minilora.disk.base_files import COMPANIONS, TENSORS
from minilora.disk.models import load_gpt2, load_model, save_gpt2, save_model
from minilora.disk.rounding import LIMIT, Rounding, rounding_report, save_merged
from minilora.disk.tensor_file import rounded
from minilora.gpt import GPT, GPTConfig
from minilora.lora import LoRALinear, LoRAPair, attach, init_adapter, merge
from minilora.lora_config import LoRAConfig
from minilora.nn import Linear
from minilora.quant import quantize, quantized
from minilora.stack import stack
from minilora.tensor import Tensor

UNITS = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}  # half the distance from 1 to the next
NARROW = ["float16", "bfloat16"]


def rounded_by_hand(x, dtype):
    """The float nearest to x in `dtype`, ties to even: by Python's own packing, and on the bits for bfloat16."""
    if dtype == "bfloat16":
        bits = struct.unpack("<I", struct.pack("<f", x))[0]
        low, kept = bits & 0xFFFF, bits >> 16
        kept += low > 0x8000 or (low == 0x8000 and kept & 1 == 1)
        return struct.unpack("<f", struct.pack("<I", kept << 16))[0]
    kind = {"float16": "<e", "float32": "<f", "float64": "<d"}[dtype]
    return struct.unpack(kind, struct.pack(kind, x))[0]


def by_hand(array, dtype):
    return np.array([rounded_by_hand(float(x), dtype) for x in array.ravel()]).reshape(array.shape)


def one_layer(W, B, A, scaling=1.0, dtype="float32"):
    """A model of one adapted linear, called layers.0."""
    W, B, A = (Tensor(np.array(x, dtype)) for x in (W, B, A))
    return TinyMLP([LoRALinear(Linear(W), LoRAPair(A, B, scaling))])


def gpt(positions="learned", size=0.5, n_layer=2, seed=0, **options):
    """(base, adapted model): a small GPT whose every linear has learned something of the given size."""
    config = GPTConfig(n_layer=n_layer, n_head=2, n_embd=8, vocab_size=7, block_size=8, positions=positions, **options)
    rng = np.random.default_rng(seed)
    base = GPT(config, rng)
    adapter = learned(init_adapter(base, LoRAConfig(2, 4, "all-linear"), rng), size=size)
    return base, attach(base, adapter)


def silent(line):
    pass


# What is lost, to the last bit and otherwise.

REPRESENTABLE = [[2.0, -3.0, 1.0], [0.5, 4.0, -1.0]]
CASES = {  # (W, B, A): error, share unmoved; every number is exact in every dtype
    "whole numbers": (REPRESENTABLE, [[1.0], [2.0]], [[1.0, -2.0, 3.0]], 0.0, 0.0),
    "a row of B is zero": (REPRESENTABLE, [[1.0], [0.0]], [[1.0, -2.0, 3.0]], 0.0, 0.5),
    "zero": (REPRESENTABLE, [[0.0], [0.0]], [[1.0, -2.0, 3.0]], 0.0, 1.0),
    "zero, and a base that is not representable": ([[math.pi, math.e, 0.1]], [[0.0]], [[1.0, 1.0, 1.0]], 0.0, 1.0),
    "an update of the base's size": (REPRESENTABLE, [[1.0, 0.0], [0.0, 1.0]], REPRESENTABLE, 0.0, 0.0),
    "all is gone": (REPRESENTABLE, [[1.0], [-1.0]], [[2.0**-20, -(2.0**-21), 2.0**-20]], 1.0, 1.0),
    "a weight of 1 is moved, the other three are not":
        ([[2048.0, 1.0], [2048.0, 2048.0]], [[0.25], [0.25]], [[1.0, 1.0]], math.sqrt(3 / 4), 0.75),
}  # fmt: skip


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("case", CASES)
def test_where_everything_is_exact_the_report_is_too(case, dtype):
    W, B, A, error, unmoved = CASES[case]
    (line,) = rounding_report(one_layer(W, B, A), dtype)
    assert (line.module, line.error, line.unmoved) == ("layers.0", error, unmoved)


@pytest.mark.parametrize("dtype, ulp", [("float32", 2.0**-23), ("float16", 2.0**-10), ("bfloat16", 2.0**-7)])
def test_at_half_a_unit_a_tie_goes_to_the_even_neighbour_and_just_above_it_does_not(dtype, ulp):
    stored = lambda x: float(rounded("w", np.array([x]), dtype)[0])
    wide = "float64" if dtype == "float32" else "float32"  # in which both the tie and its neighbours are exact
    tie, above = ulp / 2, ulp / 2 + ulp / 64
    assert [stored(np.dtype(wide).type(1 + k * ulp + tie)) for k in range(4)] == [1 + k * ulp for k in (0, 2, 2, 4)]
    assert [stored(np.dtype(wide).type(1 + k * ulp + above)) for k in range(4)] == [1 + k * ulp for k in (1, 2, 3, 4)]
    report = lambda update: rounding_report(one_layer([[1.0]], [[1.0]], [[update]], dtype=wide), dtype)[0]
    assert (report(tie).error, report(tie).unmoved) == (1.0, 1.0)
    assert (report(above).error, report(above).unmoved) == ((ulp - above) / above, 0.0)
    assert report(ulp * 0.75).error == 1 / 3


def test_where_the_base_is_not_representable_more_than_the_update_can_be_rounded_away():
    """Between 2048 and 4096 float16 has the even numbers alone."""
    (line,) = rounding_report(one_layer([[2048.75]], [[1.0]], [[-0.03125]]), "float16")  # 2048.71875 becomes 2048
    assert (line.error, line.unmoved) == (0.71875 / 0.03125, 1.0)
    (line,) = rounding_report(one_layer([[2049.25]], [[1.0]], [[-0.5]]), "float16")  # 2048, and 2050 without it
    assert (line.error, line.unmoved) == (0.75 / 0.5, 0.0)


def test_what_must_fit_is_what_is_stored():
    model = one_layer([[70000.0, 1.0]], [[1.0]], [[-10000.0, 0.0]])
    assert rounding_report(model, "float16")[0].unmoved == 0.5
    (line,) = rounding_report(one_layer([[0.0]], [[1.0]], [[3.0]]), "float16")
    assert line.error == 0 and line.size == 3  # of a weight of zero, the update's own size


@st.composite
def adapted_layers(draw, dtype="float32"):
    """One adapted square linear of normal numbers, the update between 10⁻⁶ and 10 times the base."""
    n, r, rng = draw(st.integers(1, 6)), draw(st.integers(1, 3)), draw(rngs)
    B = rng.standard_normal((n, r)) * 10.0 ** draw(st.integers(-6, 0))
    return one_layer(rng.standard_normal((n, n)), B, rng.standard_normal((r, n)), draw(st.floats(0.1, 10)), dtype)


def tells_what_is_lost(model, dtype):
    """The report is that of sums over fractions, in which nothing is rounded but the stored weights themselves."""
    lines = rounding_report(model, dtype)
    adapted = {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    plain = dict(merge(model).named_modules())
    assert [line.module for line in lines] == list(adapted)
    norm = lambda numbers: math.sqrt(math.fsum(float(x) ** 2 for x in numbers))
    for line in lines:
        layer = adapted[line.module]
        exact = np.vectorize(Fraction, otypes=[object])
        tensors = (layer.linear.weight, layer.pair.lora_B, layer.pair.lora_A)
        W, B, A = (exact(t.data.astype(np.float64)) for t in tensors)
        update = Fraction(layer.pair.scaling) * B.dot(A)
        stored, base = (by_hand(t.data, dtype) for t in (plain[line.module].weight, layer.linear.weight))
        lost = exact(stored) - W - update
        size, whole = norm(update.flat), norm(W.flat)
        assert math.isclose(line.size, size / whole, rel_tol=1e-9)  # float64, where fractions cancel exactly
        assert math.isclose(line.error, norm(lost.flat) / size, rel_tol=1e-9, abs_tol=1e-13 * (1 + whole / size))
        assert line.unmoved == np.count_nonzero(stored == base) / stored.size


@pytest.mark.parametrize("dtype", ["float32", *NARROW])
def test_the_report_is_what_fractions_say(dtype):

    @given(st.sampled_from(["float32", "float64"]).flatmap(adapted_layers))
    def holds(model):
        tells_what_is_lost(model, dtype)

    holds()


@pytest.mark.parametrize("dtype", ["float32", *NARROW])
def test_where_the_base_is_representable_no_more_than_the_update_is_lost(dtype):
    """No stored weight is further from W + ΔW than W itself is, which could have been stored."""

    @given(adapted_layers("float64"))
    def holds(model):
        W = model.layers[0].linear.weight.data
        W[:] = by_hand(W, dtype)
        (line,) = rounding_report(model, dtype)
        assert line.error <= 1 + 1e-12 + 1e-15 / line.size  # the roundings of float64 itself

    holds()


def test_the_report_names_every_adapted_layer_in_the_models_order():
    _, model = gpt()
    tells_what_is_lost(model, "float16")
    base = tiny_mlp(6, 5, 4, 3)
    model = attach(base, learned(init_adapter(base, LoRAConfig(2, 4, ["layers.2", "0"]), np.random.default_rng(0))))
    assert [line.module for line in rounding_report(model, "float16")] == ["layers.0", "layers.2"]
    tells_what_is_lost(model, "float16")


@pytest.mark.parametrize("share", [1.0, 0.3, 0.1])
@pytest.mark.parametrize("dtype", UNITS)
def test_of_gaussian_weights_the_error_is_about_0_42_units_times_their_size_over_the_updates(dtype, share):
    """A margin, not a bound: 3 % about 0.42 u ‖W‖ / ‖ΔW‖ while that is well below 1, with 65,536 weights."""
    rng, n = np.random.default_rng(0), 256
    B, A, W = (rng.standard_normal(shape) for shape in ((n, 8), (8, n), (n, n)))
    B *= share * np.linalg.norm(W) / np.linalg.norm(B @ A)
    (line,) = rounding_report(one_layer(W, B, A, dtype="float64"), dtype)
    assert math.isclose(line.size, share, rel_tol=1e-12)
    whole = np.linalg.norm(W + B @ A) / np.linalg.norm(W)  # what is rounded is the sum
    assert math.isclose(line.error, 0.42 * UNITS[dtype] * whole / share, rel_tol=0.03)


def test_the_error_ends_at_one_when_all_is_gone():
    rng, n = np.random.default_rng(0), 64
    W = rng.standard_normal((n, n)).astype(np.float16)  # representable, as what was published in 16 bits is
    errors, unmoved = [], []
    for size in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
        B, A = size * rng.standard_normal((n, 2)), rng.standard_normal((2, n))
        (line,) = rounding_report(one_layer(W, B, A), "float16")
        errors.append(line.error)
        unmoved.append(line.unmoved)
    assert errors == sorted(errors) and unmoved == sorted(unmoved)
    assert errors[0] < 0.01 and 0.99 < errors[-1] < 1.01 and unmoved[-1] > 0.99


def test_a_float64_model_in_float64_loses_nothing_but_its_own_arithmetic():
    rng = np.random.default_rng(0)
    W, B, A = (rng.standard_normal(shape) for shape in ((6, 6), (6, 2), (2, 6)))
    assert rounding_report(one_layer(W, B, A, dtype="float64"), "float64")[0].error < 1e-15


def test_the_report_is_the_same_from_every_backend(xp):
    base = tiny_mlp(6, 5, 4)
    adapter = learned(init_adapter(base, LoRAConfig(2, 4, "all-linear"), np.random.default_rng(0)))
    host, there = attach(base, adapter), attach(base.to_device(xp), adapter.to_device(xp))
    ours, numpys = (np.array([line[1:] for line in rounding_report(m, "float16")]) for m in (there, host))
    assert agree(xp, ours, numpys)


# The bits of 16 bits.


@pytest.mark.parametrize("dtype", NARROW)
@settings(max_examples=200)
@given(bits=st.integers(0, 2**32 - 1))
def test_any_float32_is_rounded_to_nearest_ties_to_even(dtype, bits):
    x = np.array([bits, bits & 0xFFFF8000, bits | 0x8000, bits & 0xFFFFE000], np.uint32).view(np.float32)
    x = x[np.isfinite(x)]
    x = x[np.abs(x) < (65000 if dtype == "float16" else 3e38)]
    assert rounded("w", x, dtype).astype(np.float64).tobytes() == by_hand(x, dtype).tobytes()


@pytest.mark.parametrize("x, stored", [
    (0x3F80_8000, 0x3F80), (0x3F81_8000, 0x3F82), (0x3F80_8001, 0x3F81), (0x3F80_7FFF, 0x3F80), (0xBF81_8000, 0xBF82),
    (0x0000_8000, 0x0000), (0x0001_8000, 0x0002), (0x8000_0000, 0x8000), (0x3FFF_8000, 0x4000), (0x7F7F_7FFF, 0x7F7F),
])  # fmt: skip
def test_bfloat16_on_known_bits(x, stored):
    assert rounded("w", np.array([x], np.uint32).view(np.float32), "bfloat16").view(np.uint16) == stored


@pytest.mark.parametrize("dtype, W", [("float16", 65000.0), ("bfloat16", 3.3e38)])
def test_a_merged_weight_that_overflows_is_refused_by_name(dtype, W):
    assert rounding_report(one_layer([[W, 1.0]], [[0.0]], [[1.0, 0.0]]), dtype)[0].error == 0
    with pytest.raises(ValueError, match=f"layers.0: .* is too large for {dtype}; save it as float32"):
        rounding_report(one_layer([[W, 1.0]], [[W / 33]], [[1.0, 0.0]]), dtype)


@pytest.mark.parametrize("what", ["h.0.mlp.up_proj.weight", "wte.weight"])
def test_an_overflow_anywhere_in_the_model_leaves_no_folder(tmp_path, what):
    base, _ = gpt()
    dict(base.named_parameters())[what].data[0, 0] = 1e5
    adapter = learned(init_adapter(base, LoRAConfig(2, 4, ["up_proj"]), np.random.default_rng(0)))
    with pytest.raises(ValueError, match="e[+]05 is too large for float16"):
        save_merged(attach(base, adapter), tmp_path / "merged", dtype="float16", say=silent, allow_rounding=True)
    assert not (tmp_path / "merged").exists()


# Saving what was merged.


def all_bytes(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("positions", ["learned", "rope"])
@pytest.mark.parametrize("tied", [True, False])
def test_by_default_the_folder_holds_the_merged_model_bit_for_bit(tmp_path, positions, tied):
    base, model = gpt(positions, tie_word_embeddings=tied)
    before, lines = contents(base), []
    save_merged(model, tmp_path, say=lines.append)
    again = load_model(tmp_path)
    assert contents(again) == contents(merge(model)) and again.config == base.config
    assert contents(again) != before == contents(base)
    stored = {view["dtype"] for _, view in deserialize((tmp_path / TENSORS).read_bytes())}
    assert stored == {"F32"} and len(lines) == 1 and "to be stored as float32" in lines[0]


@pytest.mark.parametrize("positions", ["learned", "rope"])
@pytest.mark.parametrize("dtype", NARROW)
def test_in_16_bits_it_holds_the_rounded_numbers_which_come_back_widened(tmp_path, positions, dtype):
    _, model = gpt(positions)
    save_merged(model, tmp_path, dtype=dtype, say=silent)
    again = dict(load_model(tmp_path).named_parameters())
    merged = dict(merge(model).named_parameters())
    assert again.keys() == merged.keys()
    for name, p in merged.items():
        assert again[name].dtype == np.float32
        assert again[name].data.tobytes() == by_hand(p.data, dtype).astype(np.float32).tobytes(), name
    stored = {view["dtype"] for _, view in deserialize((tmp_path / TENSORS).read_bytes())}
    assert stored == {"float16": {"F16"}, "bfloat16": {"BF16"}}[dtype]


def test_float64_is_kept_on_request(tmp_path):
    base, _ = gpt()
    base = base.astype("float64")
    adapter = learned(init_adapter(base, LoRAConfig(2, 4, "all-linear"), np.random.default_rng(0)))
    save_merged(attach(base, adapter), tmp_path, dtype="float64", say=silent)
    assert contents(load_model(tmp_path)) == contents(merge(attach(base, adapter)))


def one_update_almost_vanishes():
    """A GPT published in float16 with twelve adapted linears: one update is lost in float16, the others are not."""
    base, model = gpt()
    for p in base.parameters():  # whose arrays the adapted model shares
        p.data[:] = p.data.astype(np.float16)
    dict(model.named_modules())["h.1.attn.v_proj"].pair.lora_B.data[:] *= np.float32(1e-6)
    return base, model


def is_refused_before_anything_is_written(folder):
    """One update of twelve is lost: an error names it, and the folder is as it was. Asked for, it is written."""
    base, model = one_update_almost_vanishes()
    before, merged, lines = contents(model), folder / "merged", []
    assert np.mean([line.error for line in rounding_report(model, "float16")]) < LIMIT
    try:
        rounding.save_merged(model, merged, dtype="float16", say=lines.append)
    except ValueError as error:
        assert "h.1.attn.v_proj is rounded by" in str(error) and "limit 10%" in str(error)
        assert "Save as float32, or allow the rounding" in str(error)
    else:
        raise AssertionError("a lost update was stored unasked")
    assert not merged.exists() and len(lines) == 1  # what was found is told all the same
    save_gpt2(base, merged)
    there = all_bytes(merged)
    with pytest.raises(ValueError, match="is rounded by"):
        rounding.save_merged(model, merged, dtype="float16", say=silent)
    assert all_bytes(merged) == there
    rounding.save_merged(model, merged, dtype="float16", allow_rounding=True, say=lines.append)
    assert all_bytes(merged) != there and contents(model) == before
    assert lines[0] == lines[1]
    rounding.save_merged(model, merged, say=silent)  # float32 needs no permission


def test_an_update_that_rounding_would_lose_is_refused_before_anything_is_written(tmp_path):
    is_refused_before_anything_is_written(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", *NARROW])
def test_what_is_said_are_the_numbers_of_the_report(tmp_path, dtype, capsys):
    _, model = one_update_almost_vanishes()
    report = rounding_report(model, dtype)
    save_merged(model, tmp_path, dtype=dtype, allow_rounding=True)
    said = capsys.readouterr()
    size, sizes = math.fsum(r.size for r in report) / 12, [
        m.linear.weight.size for m in dict(model.named_modules()).values() if isinstance(m, LoRALinear)]
    unmoved = math.fsum(r.unmoved * n for r, n in zip(report, sizes, strict=True)) / sum(sizes)
    assert len(set(sizes)) > 1, "a mean over modules is not a share of weights"
    worst = sorted(report, key=lambda r: r.error)[-1]
    assert worst.module == "h.1.attn.v_proj" and not said.err
    assert said.out == (
        f"merged 12 updates, on average {size:.1e} of their weights, to be stored as {dtype}:\n"
        f"  {unmoved:.1%} of the weights stay what they were; the worst rounding is {worst.error:.2g} of an update, in "
        "h.1.attn.v_proj\n"
    )


@pytest.mark.parametrize("error, refused", [(0.0999, False), (LIMIT, False), (0.1001, True)])
def test_the_limit_itself_is_allowed(tmp_path, monkeypatch, error, refused):
    lines = [Rounding("a", 0.1, error, 0.0, 4), Rounding("b", 0.1, 0.0, 0.0, 4)]
    monkeypatch.setattr(rounding, "rounding_report", lambda *arguments: lines)
    try:
        save_merged(gpt()[1], tmp_path / "merged", say=silent)
    except ValueError:
        assert refused
    assert (tmp_path / "merged").exists() != refused


def test_the_tokenizer_and_the_settings_of_the_base_go_along(tmp_path):
    base, _ = gpt()
    kept, merged = tmp_path / "base", tmp_path / "merged"
    save_gpt2(base, kept, dtype="float16")
    config = json.loads((kept / "config.json").read_text())
    theirs = {"bos_token_id": 3, "eos_token_id": 4, "task_specific_params": {"x": [1]}, "resid_pdrop": 0.25}
    (kept / "config.json").write_text(json.dumps(config | theirs | {"torch_dtype": "float16"}))
    save_file(load_file(kept / TENSORS), kept / TENSORS)  # as other programs do, without our copy of the configuration
    for name in (*COMPANIONS[:-1], "README.md", "pytorch_model.bin"):
        (kept / name).write_bytes(f"{name} of the base\r\n".encode())
    loaded = load_gpt2(kept)
    adapter = learned(init_adapter(loaded, LoRAConfig(2, 4, "all-linear"), np.random.default_rng(0)))
    model = attach(loaded, adapter)
    save_merged(model, merged, like=kept, say=silent)
    assert {path.name for path in merged.iterdir()} == {"config.json", TENSORS, *COMPANIONS[:-1]}
    assert all((merged / name).read_bytes() == (kept / name).read_bytes() for name in COMPANIONS[:-1])
    assert json.loads((merged / "config.json").read_text()) == config | theirs | {"dtype": "float32"}
    assert contents(load_gpt2(merged)) == contents(merge(model))
    with pytest.raises(FileNotFoundError):
        save_merged(model, tmp_path / "other", like=tmp_path / "nowhere", say=silent)
    assert not (tmp_path / "other").exists()


# Bad input.


def test_a_stack_has_no_merged_model_and_a_plain_model_nothing_to_merge(tmp_path):
    base, model = gpt()
    adapter = learned(init_adapter(base, LoRAConfig(2, 4, "all-linear"), np.random.default_rng(0)))
    for wrong, says in ((attach(base, stack([adapter, None])), "rows of a stacked model carry different adapters"),
                        (base, "no layer of this model carries an adapter"),
                        (merge(model), "no layer of this model carries an adapter")):
        for call in (lambda m: rounding_report(m, "float32"), lambda m: save_merged(m, tmp_path / "x", say=silent)):
            with pytest.raises(ValueError, match=says):
                call(wrong)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("dtype", ["int8", "float8", None, "FLOAT16"])
def test_a_dtype_that_is_none_is_refused_with_those_there_are(tmp_path, dtype):
    with pytest.raises(ValueError, match="dtype must be one of float16, bfloat16, float32, float64, got"):
        save_merged(gpt()[1], tmp_path / "x", dtype=dtype, say=silent)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("kind", ["nf4", "q8_0", "q4_0", "q4_1"])
@pytest.mark.parametrize("packed_base", [False, True])
def test_quantising_the_sum_again_is_measured_as_it_is_done(kind, packed_base):
    base = tiny_mlp(64, 32, 96)
    base = quantize(base, "q4_1") if packed_base else base
    model = attach(base, learned(new_adapter(base), size=0.02))
    merged = dict(merge(model).named_modules())
    again = dict(quantize(merge(model), kind).named_modules())
    for line, (name, layer) in zip(rounding_report(model, kind), base_layers(model), strict=True):
        W, update = layer.linear.weight.data.astype(np.float64), layer.pair.astype(np.float64).delta()
        lost = again[name].weight.data - (W + update)
        assert line.module == name and line.weights == W.size
        assert math.isclose(line.error, norm(lost) / norm(update), rel_tol=1e-9)
        as_stored = quantized("w", Tensor(W.astype(np.float32)), kind.upper()).data
        assert math.isclose(line.unmoved, np.mean(again[name].weight.data == as_stored), rel_tol=1e-9)
        assert not np.array_equal(merged[name].weight.data, again[name].weight.data)


def base_layers(model):
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LoRALinear)]


# The properties can fail: each notices the bug planted for it.


def measured(change):
    """Plants a report in which `change(W, update, stored)` gives some fields of each line anew."""

    def plant(monkeypatch):
        real = rounding._measured
        monkeypatch.setattr(rounding, "_measured", lambda name, W, update, stored, base: real(
            name, W, update, stored, base)._replace(**change(W, update, stored.astype(np.float64))))  # fmt: skip

    return plant


def updated(wrong):
    """Plants a report for which `wrong(pair, delta)` is the update, while what is merged is right."""

    def plant(monkeypatch):
        real = LoRAPair.delta
        monkeypatch.setattr(LoRAPair, "delta", lambda pair: (
            wrong(pair, real(pair)) if pair.lora_A.dtype == np.float64 else real(pair)))  # fmt: skip

    return plant


def stored_too_small(monkeypatch):
    real = rounding.rounded
    monkeypatch.setattr(rounding, "rounded", lambda name, x, dtype: real(name, np.float32(0.9999) * x, dtype))


def largest(x):
    return np.abs(x).max()


norm = np.linalg.norm
float16 = lambda x: x.astype(np.float16)
REPORT_BUGS = {
    "measured against W": measured(lambda W, dW, stored: {"error": norm(stored - W) / norm(dW)}),
    "measured against what is stored without rounding":
        measured(lambda W, dW, stored: {"error": norm(stored - (W + dW).astype(np.float32)) / norm(dW)}),
    "transposed update": updated(lambda pair, delta: delta.T),
    "scale omitted": updated(lambda pair, delta: delta / pair.scaling),
    "scale twice": updated(lambda pair, delta: delta * pair.scaling),
    "a share of W": measured(lambda W, dW, stored: {"error": norm(stored - W - dW) / norm(W)}),
    "not relative": measured(lambda W, dW, stored: {"error": norm(stored - W - dW)}),
    "the largest instead of the norm":
        measured(lambda W, dW, stored: {"error": largest(stored - W - dW) / largest(dW)}),
    "stored a little too small": stored_too_small,
    "unmoved in the wide dtype": measured(lambda W, dW, stored: {"unmoved": np.mean(W + dW == W)}),
    "moved for unmoved": measured(lambda W, dW, stored: {"unmoved": np.mean(stored != float16(W))}),
}  # fmt: skip


@pytest.mark.parametrize("plant", REPORT_BUGS.values(), ids=REPORT_BUGS)
def test_a_report_with_a_bug_is_noticed(plant, monkeypatch):
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        hunt(adapted_layers(), lambda model: tells_what_is_lost(model, "float16"))


@pytest.mark.parametrize("plant", [
    updated(lambda pair, delta: pair.scaling * (pair.lora_B.data @ pair.lora_A.data)),
    measured(lambda W, dW, stored: {"error": norm(stored - (W + dW)) / norm(dW) if dW.any() else 0.0,
                                    "unmoved": np.mean(stored == float16(W))}),
], ids=["the update", "the lines"])  # fmt: skip
def test_the_right_numbers_planted_the_same_way_survive(plant, monkeypatch):
    plant(monkeypatch)
    hunt(adapted_layers(), lambda model: tells_what_is_lost(model, "float16"))


def worst_is(choose):
    return lambda monkeypatch: monkeypatch.setattr(rounding, "_worst", choose)


def refusing_always(monkeypatch):
    real = save_merged
    monkeypatch.setattr(rounding, "save_merged", lambda *args, allow_rounding=False, **more: real(*args, **more))


def writing_first(monkeypatch):
    def save(model, folder, *, dtype="float32", **more):
        save_model(merge(model), folder, dtype=dtype)
        save_merged(model, folder, dtype=dtype, **more)

    monkeypatch.setattr(rounding, "save_merged", save)


def reporting_another_dtype(monkeypatch):
    real = rounding_report
    monkeypatch.setattr(rounding, "rounding_report", lambda model, dtype, merged: real(model, "float32", merged))


SAVE_BUGS = {
    "mean instead of worst": worst_is(
        lambda report: report[0]._replace(error=np.mean([line.error for line in report]))),
    "best instead of worst": worst_is(lambda report: min(report, key=lambda line: line.error)),
    "the first instead of the worst": worst_is(lambda report: report[0]),
    "refuses what is allowed": refusing_always,
    "never refuses": lambda monkeypatch: monkeypatch.setattr(rounding, "LIMIT", math.inf),
    "written first": writing_first,
    "the report of another dtype": reporting_another_dtype,
}


@pytest.mark.parametrize("plant", SAVE_BUGS.values(), ids=SAVE_BUGS)
def test_a_save_with_a_bug_is_noticed(plant, tmp_path, monkeypatch):
    plant(monkeypatch)
    with pytest.raises((AssertionError, ValueError)):
        is_refused_before_anything_is_written(tmp_path)
