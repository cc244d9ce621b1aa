"""The settings of a fine-tuning: what is refused, and by which name."""

import pytest

from minilora import LoRAConfig
from minilora.training.finetune_config import ConfigError, FineTuneConfig

PATHS = {"base": "b", "data": "d", "out": "o"}


@pytest.mark.parametrize("field, value, need", [
    ("steps", 0, "a whole number of at least 1"),
    ("steps", 2.0, "a whole number of at least 1"),
    ("steps", True, "a whole number of at least 1"),
    ("batch", 0, "a whole number of at least 1"),
    ("save_every", 0, "a whole number of at least 1"),
    ("seed", -1, "a whole number of at least 0"),
    ("length", 0, "a whole number of at least 1, or None"),
    ("lr", 0.0, "a finite positive number"),
    ("lr", float("inf"), "a finite positive number"),
    ("eval_split", 1.0, "in [0, 1)"),
    ("eval_split", -0.1, "in [0, 1)"),
    ("eval_split", "0.1", "in [0, 1)"),
    ("r", 0, "a whole number of at least 1"),
    ("alpha", -1, "a finite positive number"),
    ("dropout", 1.0, "in [0, 1)"),
    ("quantize", "int8", "None or one of nf4, q8_0, q4_0, q4_1"),
    ("quantize", "NF4", "None or one of nf4, q8_0, q4_0, q4_1"),
    ("too_long", "shorten", "'cut' or 'drop', or None"),
    ("target", [], "at least one name, or an expression"),
    ("eval_every", 0, "a whole number of at least 1, or None"),
    ("eval_every", 2, "None with an eval_split of 0, which holds nothing out"),
    ("patience", 0, "a whole number of at least 1, or None"),
    ("patience", 2, "None without eval_every, whose evaluations it counts"),
    ("full", 1, "True or False"),
    ("dora", "yes", "True or False"),
])  # fmt: skip
def test_a_setting_out_of_range_is_named_with_its_value_and_what_it_must_be(field, value, need):
    with pytest.raises(ConfigError) as refusal:
        FineTuneConfig(**{**PATHS, "alpha": 16, field: value})
    assert str(refusal.value) == f"FineTuneConfig: {field} must be {need}; got {value!r}"
    assert refusal.value.field == field
    assert refusal.value.need == need


def test_there_is_no_default_alpha():
    with pytest.raises(ConfigError, match="alpha must be a finite positive number; got None"):
        FineTuneConfig(**PATHS)


@pytest.mark.parametrize("field, value, default", [
    ("alpha", 16, None), ("r", 4, 8), ("target", ["q_proj"], "all-linear"), ("dropout", 0.5, 0.0),
    ("quantize", "nf4", None),
])  # fmt: skip
def test_what_is_of_adapters_is_refused_where_there_is_none(field, value, default):
    assert FineTuneConfig(**PATHS, full=True).full
    with pytest.raises(ConfigError, match=f"{field} must be {default!r}, its default, with full=True") as refusal:
        FineTuneConfig(**{**PATHS, "full": True, field: value})
    assert refusal.value.field == field


def test_its_lora_config_has_the_four_fields_that_are_of_lora():
    config = FineTuneConfig(**PATHS, alpha=6, r=3, target=["q_proj"], dropout=0.5)
    assert config.lora_config() == LoRAConfig(r=3, alpha=6, target_modules=["q_proj"], dropout=0.5)


def test_a_refusal_of_lora_config_has_the_parts_too():
    with pytest.raises(ConfigError, match="^LoRAConfig: target_modules must be at least one name") as refusal:
        LoRAConfig(r=3, alpha=6, target_modules=[])
    assert refusal.value.field == "target_modules"
    assert refusal.value.need == "at least one name, or an expression"
