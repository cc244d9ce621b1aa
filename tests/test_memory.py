"""The memory of training by part: against the arrays of a step that has run, and against sums by hand."""

import numpy as np
import pytest
from strategies import small_gpt, small_llama

from minilora import Adam, GPTConfig, LlamaConfig, LoRAConfig, attach, init_adapter
from minilora.architectures import PRESETS, blank, blank_adapter, blank_quantized
from minilora.count import activation_bytes, adapter_parameters, parameter_report
from minilora.memory import human_bytes, human_flops, model_training_bytes, training_bytes
from minilora.quant import quantize

ADAPTED = LoRAConfig(r=2, alpha=4, target_modules=["q_proj", "v_proj"])


@pytest.mark.parametrize("way", ["full", "LoRA", "QLoRA"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("make", [small_gpt, small_llama])
def test_each_part_is_what_the_arrays_of_a_step_take(make, dtype, way):
    if (way, dtype) == ("QLoRA", "float64"):
        pytest.skip("a packed weight stands for float32")
    rng = np.random.default_rng(0)
    model = make(dtype=dtype)
    if way == "QLoRA":
        model = quantize(model.frozen(), "nf4")
    if way != "full":
        model = attach(model, init_adapter(model, ADAPTED, rng))
    adam = Adam(model.parameters())
    ids = rng.integers(0, 11, (3, 6))
    loss = model.loss(ids, ids)
    kept = activation_bytes(loss, model)
    loss.backward()
    adam.step()
    expected = model_training_bytes(model, 3, 6, dtype)
    assert expected.weights == parameter_report(model).total_bytes
    assert expected.gradients == sum(p.grad.nbytes for p in adam.params)
    assert expected.moments == sum(moment.nbytes for moment in (*adam.m, *adam.v))
    assert (expected.master, expected.activations) == (0, kept)
    assert expected.together == sum(expected)


@pytest.mark.parametrize("config", [
    GPTConfig(n_layer=1, n_head=2, n_embd=24, vocab_size=11, block_size=16),
    LlamaConfig(2, 64, 96, 4, 11, 16, num_key_value_heads=2),
], ids=["gpt", "llama"])  # fmt: skip
def test_a_quantised_base_without_numbers_takes_the_bytes_of_a_real_one(config):
    empty = blank(config)
    real = empty.map_tensors(lambda t: type(t)(np.ones(t.shape, "float32")))
    for kind in ("NF4",) if config.n_layer == 1 else ("NF4", "Q8_0", "Q4_0", "Q4_1"):
        packed = blank_quantized(empty, kind)
        assert parameter_report(packed).total_bytes == parameter_report(quantize(real, kind)).total_bytes
        assert packed.parameters()[0].nbytes == empty.parameters()[0].nbytes
    with pytest.raises(ValueError, match="cannot be stored as 'NF5'"):
        blank_quantized(empty, "NF5")


def test_the_parts_of_llama_3_1_8b_in_16_bits_are_the_sums_by_hand():
    n, adapter = 8_030_261_248, 13_631_488
    base = blank(PRESETS["llama-3.1-8b"])
    full = model_training_bytes(base, 4, 512, "bfloat16")
    assert full[:4] == (2 * n, 2 * n, 8 * n, 4 * n)
    config = LoRAConfig(r=16, alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    pairs = blank_adapter(base, config)
    lora = model_training_bytes(attach(base, pairs, check_base=False), 4, 512, "bfloat16")
    assert lora[:4] == (2 * (n + adapter), 2 * adapter, 8 * adapter, 4 * adapter)
    qlora = model_training_bytes(attach(blank_quantized(base), pairs, check_base=False), 4, 512, "bfloat16")
    # Two tables of 128,256 x 4,096 and 65 norms stay in 16 bits; a block of 64 takes 33 bytes, and 256 blocks 4 more.
    rest = 2 * 128_256 * 4_096 + 65 * 4_096
    packed = (n - rest) // 64 * 33 + (n - rest) // (64 * 256) * 4 + 7 * 32 * 4
    assert qlora[:4] == (packed + 2 * rest + 2 * adapter, *lora[1:4])
    assert qlora.activations == lora.activations < full.activations
    assert parameter_report(attach(base, pairs, check_base=False))[:2] == (adapter, 8_043_892_736)
    assert adapter_parameters(base, 16, config.target_modules) == adapter


@pytest.mark.parametrize("arguments, parts, together", [
    ({}, (28e9, 28e9, 56e9, 0), 112e9), ({"dtype": "bfloat16"}, (14e9, 14e9, 56e9, 28e9), 112e9),
    ({"dtype": "float16", "moments_dtype": "float16"}, (14e9, 14e9, 28e9, 28e9), 84e9),
    ({"dtype": "float64"}, (56e9, 56e9, 112e9, 0), 224e9), ({"frozen_bytes": 10**9}, (29e9, 28e9, 56e9, 0), 113e9),
    ({"activations": 10**9}, (28e9, 28e9, 56e9, 0), 113e9),
])  # fmt: skip
def test_the_parts_of_seven_billion_numbers(arguments, parts, together):
    counted = training_bytes(7 * 10**9, **arguments)
    assert counted[:4] == parts and counted.together == together


@pytest.mark.parametrize("arguments, message", [
    ({"trained": -1}, "trained must be at least 0, got -1"),
    ({"trained": 1, "frozen_bytes": -5}, "frozen_bytes must be at least 0, got -5"),
    ({"trained": 1, "activations": -3}, "activations must be at least 0, got -3"),
    ({"trained": 1, "dtype": "bf16"}, "dtype must be one of float16, bfloat16, float32, float64, got 'bf16'"),
    ({"trained": 1, "moments_dtype": "int8"}, "got 'int8'"),
])  # fmt: skip
def test_memory_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        training_bytes(**arguments)


@pytest.mark.parametrize("n, text", [
    (0, "0 B"), (1, "1 B"), (999, "999 B"), (1000, "1.00 kB"), (9_994, "9.99 kB"), (9_996, "10.0 kB"),
    (99_960, "100 kB"), (999_499, "999 kB"), (999_500, "1.00 MB"), (27_262_976, "27.3 MB"),
    (28_300_000, "28.3 MB"), (16_060_522_496, "16.1 GB"), (2_800_000_000_000, "2.80 TB"), (10**30, "1,000,000 YB"),
])  # fmt: skip
def test_bytes_have_three_digits_and_the_unit_that_they_need(n, text):
    assert human_bytes(n) == text
    assert human_flops(n) == text.replace("B", "FLOP")
