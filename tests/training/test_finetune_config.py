"""The settings of a fine-tuning: what is refused, and by which name."""

import re

import pytest

from minilora import LoRAConfig
from minilora.optim import warmup_cosine
from minilora.training.finetune_config import ConfigError, FineTuneConfig

PATHS = {"base": "b", "data": "d", "out": "o"}


@pytest.mark.parametrize("field, value, need", [
    ("steps", 0, "a whole number from 1 to 500,000"),
    ("steps", 2.0, "a whole number from 1 to 500,000"),
    ("steps", 500_001, "a whole number from 1 to 500,000"),
    ("steps", True, "a whole number from 1 to 500,000"),
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
    ("rslora", 0, "True or False"),
    ("accept_base", ["anything"], "a list of other-precision and grown-vocabulary, or empty"),
    ("accept_base", "other-precision", "a list of other-precision and grown-vocabulary, or empty"),
    ("accept_base", ["other-precision"], "empty without from_adapter, whose base it is about"),
    ("schedule", "step", "one of cosine, linear, constant"),
    ("schedule", [], "one of cosine, linear, constant"),
    ("warmup", -1, "a whole number of at least 0, or None"),
    ("warmup", 201, "at most 200, the number of steps"),
    ("weight_decay", -0.1, "a finite number of at least 0"),
    ("weight_decay", float("nan"), "a finite number of at least 0"),
    ("clip", 0, "a finite positive number"),
    ("clip", float("inf"), "a finite positive number"),
    ("rank_pattern", {"q_proj": 0}, "{regular expression: whole number of at least 1}"),
    ("alpha_pattern", {"q_proj": -1}, "{regular expression: finite positive number}"),
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
    ("quantize", "nf4", None), ("rslora", True, False), ("rank_pattern", {"q_proj": 2}, {}),
    ("from_adapter", "a", None),
])  # fmt: skip
def test_what_is_of_adapters_is_refused_where_there_is_none(field, value, default):
    assert FineTuneConfig(**PATHS, full=True).full
    with pytest.raises(ConfigError, match=f"{field} must be {default!r}, its default, with full=True") as refusal:
        FineTuneConfig(**{**PATHS, "full": True, field: value})
    assert refusal.value.field == field


@pytest.mark.parametrize("field, value, default", [
    ("alpha", 16, None), ("r", 4, 8), ("target", ["q_proj"], "all-linear"), ("dora", True, False),
    ("rslora", True, False),
    ("rank_pattern", {"q_proj": 2}, {}), ("alpha_pattern", {"q_proj": 2}, {}),
])  # fmt: skip
def test_what_an_adapter_brings_along_is_refused_beside_it(field, value, default):
    assert FineTuneConfig(**PATHS, from_adapter="a", dropout=0.5, quantize="nf4").idle()
    need = re.escape(f"{field} must be {default!r}, its default, with from_adapter, which brings its own")
    with pytest.raises(ConfigError, match=need):
        FineTuneConfig(**{**PATHS, "from_adapter": "a", field: value})


def test_its_lora_config_has_the_fields_that_are_of_lora():
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 0.5}}
    config = FineTuneConfig(**PATHS, alpha=6, r=3, target=["q_proj"], dropout=0.5, rslora=True, **patterns)
    expected = LoRAConfig(r=3, alpha=6, target_modules=["q_proj"], dropout=0.5, use_rslora=True, **patterns)
    assert config.lora_config() == expected


@pytest.mark.parametrize("settings, rates", [
    ({"schedule": "constant", "warmup": 2}, [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
    ({"schedule": "linear", "warmup": 0}, [1 - 0.09 * i for i in range(10)]),
    ({"schedule": "cosine"}, [warmup_cosine(i, 10, 1.0, 1) for i in range(10)]),
    ({"steps": 2000}, [(i + 1) / 100 for i in range(10)]),
], ids=str)  # fmt: skip
def test_the_rate_follows_its_schedule_and_its_warmup(settings, rates):
    config = FineTuneConfig(**{**PATHS, "alpha": 1, "lr": 1.0, "steps": 10, **settings})
    assert [config.rate(i) for i in range(10)] == pytest.approx(rates, rel=1e-12)


def test_a_refusal_of_lora_config_has_the_parts_too():
    with pytest.raises(ConfigError, match="^LoRAConfig: target_modules must be at least one name") as refusal:
        LoRAConfig(r=3, alpha=6, target_modules=[])
    assert refusal.value.field == "target_modules"
    assert refusal.value.need == "at least one name, or an expression"
