"""The shapes of well-known models: each total against the one that is published, and no memory for any."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from strategies import small_gpt, small_llama

from minilora import LoRAConfig, attach, init_adapter
from minilora.architectures import PRESETS, blank, blank_adapter
from minilora.count import adapter_parameters, n_parameters, parameter_report

# What the models' pages say, and `model.num_parameters()` in transformers. GPT-3's paper says 175 billion; by hand, its
# shape gives 12 L C² + 13 L C + (V + T + 2) C for L = 96, C = 12,288, V = 50,257, T = 2,048.
PUBLISHED = {
    "gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200,
    "gpt3-175b": 174_604_259_328, "llama-2-7b": 6_738_415_616, "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496, "llama-3.2-1b": 1_235_814_400, "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512, "mistral-7b": 7_241_732_096, "mistral-7b-v0.3": 7_248_023_552,
    "smollm2-135m": 134_515_008, "minilora-demo": 344_928,
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_a_model_of_a_known_shape_holds_as_many_numbers_as_its_page_says(name):
    assert n_parameters(blank(PRESETS[name])) == PUBLISHED[name]


def test_the_count_of_gpt_3_is_the_one_by_hand():
    L, C, V, T = 96, 12288, 50257, 2048
    assert PUBLISHED["gpt3-175b"] == 12 * L * C * C + 13 * L * C + (V + T + 2) * C


def test_a_model_without_numbers_takes_no_memory():
    tracemalloc.start()
    model = blank(PRESETS["gpt3-175b"])
    adapter = blank_adapter(model, LoRAConfig(r=8, alpha=8, target_modules="all-linear"))
    adapted = attach(model, adapter, check_base=False)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert parameter_report(adapted).total > 174e9
    assert peak < 10e6


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear", r"(h|layers)\.1\..*down_proj"], ids=str)
@pytest.mark.parametrize("make", [small_gpt, small_llama])
def test_an_adapter_without_numbers_has_the_names_and_shapes_of_a_real_one(make, targets):
    model = make()
    config = LoRAConfig(r=2, alpha=3, target_modules=targets, rank_pattern={r".*proj": 3}, use_rslora=True)
    real = init_adapter(model, config, np.random.default_rng(0))
    counted = blank_adapter(blank(model.config), config)
    shapes = lambda x: {name: (p.shape, p.dtype, p.requires_grad) for name, p in x.named_parameters()}
    assert shapes(counted) == shapes(real)
    assert shapes(blank(model.config)) == shapes(model)
    assert {n: pair.scaling for n, pair in counted.pairs.items()} == {n: pair.scaling for n, pair in real.pairs.items()}


@pytest.mark.parametrize("name, r, targets, expected", [
    ("llama-3.1-8b", 16, ["q_proj", "k_proj", "v_proj", "o_proj"], 13_631_488),
    ("llama-3.1-8b", 16, "all-linear", 41_943_040), ("llama-3.1-70b", 8, ["q_proj", "v_proj"], 16_384_000),
    ("llama-3.1-70b", 8, "all-linear", 103_546_880), ("llama-3.2-1b", 8, "all-linear", 5_636_096),
    ("gpt2", 16, ["q_proj", "v_proj"], 589_824), ("minilora-demo", 8, "all-linear", 41_472),
])  # fmt: skip
def test_the_numbers_of_an_adapter_on_a_known_model(name, r, targets, expected):
    assert adapter_parameters(blank(PRESETS[name]), r, targets) == expected


def test_what_has_no_shape_is_refused():
    with pytest.raises(TypeError, match="expected a GPTConfig or a LlamaConfig, got str"):
        blank("gpt2")
    with pytest.raises(ValueError, match="a model of 1,000,000 layers; at most 10,000 are counted"):
        blank(replace(PRESETS["gpt2"], n_layer=10**6))
    with pytest.raises(ValueError, match="no array has the shapes of GPTConfig.*vocab_size=1000000000000000000000"):
        blank(replace(PRESETS["gpt2"], vocab_size=10**21))
