"""What is adapted, and how strongly: the fields of LoRAConfig, patterns, and the rules by which names match."""

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.lora_config import LoRAConfig, check_patterns, find_targets

NAMES = [f"transformer.h.{i}.{part}" for i in (0, 1, 10) for part in (
    "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]  # fmt: skip


def named(*endings):
    return [name for name in NAMES if name.endswith(endings)]


@pytest.mark.parametrize("target_modules, expected", [
    (["c_attn"], named("c_attn")), (["c_proj"], named("c_proj")), (["mlp.c_proj"], named("mlp.c_proj")),
    (["c_proj", "mlp.c_proj"], named("c_proj")), (["c_fc", "c_attn"], named("c_attn", "c_fc")),
    (["transformer.h.1.attn.c_attn"], ["transformer.h.1.attn.c_attn"]), (("h.0.mlp.c_fc",), [NAMES[2]]),
    ("all-linear", NAMES), (r".*\.c_attn", named("c_attn")), (r"transformer\.h\.\d\.attn\.c_(attn|proj)",
     [name for name in NAMES[:8] if ".attn." in name]), ("transformer.h.1.mlp.c_fc", ["transformer.h.1.mlp.c_fc"]),
    (r"transformer.h.1..*", NAMES[4:8] + NAMES[8:]),
])  # fmt: skip
def test_targets_are_found_in_the_order_of_the_model(target_modules, expected):
    assert find_targets(NAMES, target_modules) == expected


@pytest.mark.parametrize("target_modules, unmatched", [
    (["proj"], "proj"), (["c_attn", "c_fcc"], "c_fcc"), (["attn"], "attn"), (["_attn"], "_attn"),
    (["C_attn"], "C_attn"),
    (["c_attn", "all-linear"], "all-linear"), ([r".*c_attn"], r".*c_attn"), (["h.2.attn.c_attn"], "h.2.attn.c_attn"),
    ("c_attn", "c_attn"), (r"h\.0\..*", r"h\.0\..*"), ("transformer.h.1", "transformer.h.1"),
    ("all-linears", "all-linears"),
])  # fmt: skip
def test_a_pattern_that_matches_nothing_is_refused_with_what_there_is(target_modules, unmatched):
    with pytest.raises(ValueError, match="match no Linear layer.*There are: transformer.h.[*].attn.c_attn") as refusal:
        find_targets(NAMES, target_modules)
    assert f"[{unmatched!r}]" in str(refusal.value), "only what does not match is named"
    assert ("a string is a regex for whole names" in str(refusal.value)) == isinstance(target_modules, str)


def test_what_is_no_expression_is_refused():
    with pytest.raises(ValueError, match=r"'\(' is not a regular expression"):
        find_targets(NAMES, "(")


# Patterns.


def peft_value(patterns, name, default):
    """PEFT's rule, written down apart: the first key, in the order of the file, that matches the name's end."""
    for key, value in patterns.items():
        if re.match(r"(.*\.)?(" + key + r")$", name):
            return value
    return default


keys = st.sampled_from(["c_attn", "attn.c_proj", "c_proj", "c.fc", r"h\.\d\..*", "h.1.mlp.c_fc", "h.1", r"h\.1\.*",
".*",
                        "c_(fc|attn)", "attn", "c_proj|c_fc", r"transformer\.h\.0\.attn\.c_attn", "proj"])  # fmt: skip


@given(st.dictionaries(keys, st.integers(1, 9), max_size=5), st.dictionaries(keys, st.integers(1, 99), max_size=5),
       st.booleans(), st.sampled_from(NAMES))  # fmt: skip
def test_rank_and_alpha_are_each_the_first_match_in_the_order_of_the_file(ranks, alphas, rslora, name):
    config = LoRAConfig(2, 8, ["c_attn"], use_rslora=rslora, rank_pattern=ranks, alpha_pattern=alphas)
    r, alpha = peft_value(ranks, name, 2), peft_value(alphas, name, 8)
    assert (config.r_of(name), config.alpha_of(name)) == (r, alpha)
    assert config.scaling_of(name) == (alpha / math.sqrt(r) if rslora else alpha / r)


def test_the_order_of_a_pattern_matters_and_the_two_have_orders_of_their_own():
    first = {"c_attn": 1, ".*": 3}
    config = LoRAConfig(2, 8, "all-linear", rank_pattern=first, alpha_pattern=dict(reversed(first.items())))
    assert (config.r_of("h.0.attn.c_attn"), config.alpha_of("h.0.attn.c_attn")) == (1, 3)
    assert (config.r_of("h.0.mlp.c_fc"), config.alpha_of("h.0.mlp.c_fc")) == (3, 3)


@pytest.mark.parametrize("key, name, matches", [
    ("c_attn", "h.0.attn.c_attn", True), ("_attn", "h.0.attn.c_attn", False), ("c_att", "h.0.attn.c_attn", False),
    ("attn.c_attn", "h.0.attn.c_attn", True), ("h.0", "h.0.attn.c_attn", False), ("c.attn", "h.0.attn.c_attn", True),
    ("h.1.attn", "h.11.attn", False), ("c_fc|c_attn", "h.0.attn.c_attn", True), ("fc|x", "h.0.mlp.c_fc", False),
    ("h.0.attn.c_attn", "h.0.attn.c_attn", True), ("c_attn", "c_attn", True),
])  # fmt: skip
def test_a_key_is_an_expression_for_a_dotted_ending(key, name, matches):
    assert (LoRAConfig(2, 8, ["x"], rank_pattern={key: 5}).r_of(name) == 5) is matches


# Fields.


@pytest.mark.parametrize("fields, shown", [
    ({"r": 0}, "r must be a whole number of at least 1; got 0"), ({"r": -1}, "r must be"),
    ({"r": 2.0}, "r must be.*2.0"),
    ({"r": True}, "r must be.*True"), ({"r": "2"}, "r must be.*'2'"), ({"r": None}, "r must be.*None"),
    ({"alpha": 0}, "alpha must be a finite positive number; got 0"), ({"alpha": -1.5}, "alpha"),
    ({"alpha": True}, "alpha"),
    ({"alpha": math.nan}, "alpha.*nan"), ({"alpha": math.inf}, "alpha.*inf"), ({"alpha": "4"}, "alpha.*'4'"),
    ({"dropout": 1}, r"dropout must be in \[0, 1\); got 1"), ({"dropout": -0.1}, "dropout"),
    ({"dropout": None}, "dropout"),
    ({"dropout": math.nan}, "dropout"), ({"dropout": False}, "dropout"),
    ({"use_rslora": 1}, "use_rslora must be True or"),
    ({"target_modules": []}, "target_modules must be at least one name"), ({"target_modules": ""}, "target_modules"),
    ({"target_modules": [""]}, "target_modules"), ({"target_modules": [1]}, "target_modules"),
    ({"target_modules": None}, "target_modules"), ({"target_modules": 7}, "target_modules"),
    ({"rank_pattern": {"(": 2}}, "rank_pattern must be {regular expression: whole"),
    ({"rank_pattern": []}, "rank_pattern"),
    ({"rank_pattern": {"x": 0}}, "rank_pattern"), ({"rank_pattern": {"x": 1.5}}, "rank_pattern"),
    ({"rank_pattern": {1: 2}}, "rank_pattern"), ({"rank_pattern": {"x": True}}, "rank_pattern"),
    ({"alpha_pattern": {"x": 0}}, "alpha_pattern must be {regular expression: finite"),
    ({"alpha_pattern": 3}, "alpha_pat"),
    ({"alpha_pattern": {"x": math.nan}}, "alpha_pattern"), ({"alpha_pattern": {"[": 1}}, "alpha_pattern"),
])  # fmt: skip
def test_a_field_out_of_range_is_refused_by_name(fields, shown):
    with pytest.raises(ValueError, match=f"LoRAConfig: {shown}"):
        LoRAConfig(**{"r": 2, "alpha": 4, "target_modules": ["x"], **fields})


def test_numbers_of_numpy_become_numbers_and_lists_become_tuples():
    config = LoRAConfig(np.int64(2), np.float32(4), ["x"], np.float64(0.5))
    assert [type(x) for x in (config.r, config.alpha, config.dropout)] == [int, float, float]
    assert config == LoRAConfig(2, 4, ("x",), 0.5)
    assert set(LoRAConfig(2, 4, {"x", "y"}).target_modules) == {"x", "y"}


def test_an_alpha_beyond_every_float_is_refused():
    for fields in ({"alpha": 10**400}, {"alpha_pattern": {"x": 10**400}}):
        with pytest.raises(ValueError, match="alpha"):
            LoRAConfig(**{"r": 2, "alpha": 4, "target_modules": ["x"], **fields}).scaling_of("x")


@pytest.mark.parametrize("fields, shown", [
    ({"rank_pattern": {"c_attn": 1, "c_atn": 2}}, r"^rank_pattern \['c_atn'\] match none of the adapted modules: tran"),
    ({"alpha_pattern": {"mlp.c_proj": 2}}, r"^alpha_pattern \['mlp.c_proj'\] match none of the adapted modules"),
])  # fmt: skip
def test_a_pattern_that_no_adapted_module_matches_is_refused(fields, shown):
    check_patterns(LoRAConfig(2, 4, ["c_attn"], rank_pattern={"c_attn": 1}), named("c_attn"))
    check_patterns(LoRAConfig(2, 4, ["c_attn"], rank_pattern={".*": 1, "c_attn": 3}), named("c_attn"))
    with pytest.raises(ValueError, match=shown):
        check_patterns(LoRAConfig(2, 4, ["c_attn"], **fields), named("c_attn"))
