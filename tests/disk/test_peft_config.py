"""What an adapter's configuration says: its fields, and which modules it means, in the file's names and in ours."""

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import small_gpt, tiny_mlp

from minilora.disk.gpt2 import GPT2
from minilora.disk.peft_config import (
    _IN_BLOCK,
    _block,
    alpha_for,
    chosen_modules,
    config_in_our_names,
    endings,
    module_table,
    read_config,
    written_fields,
)
from minilora.lora import linear_names
from minilora.lora_config import LoRAConfig, find_targets
from minilora.patterns import Matcher

FIELDS = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["c_attn"]}
PARTS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
FILES = [f"transformer.h.{i}.{part}" for i in range(12) for part in PARTS]


def chosen(**fields):
    return chosen_modules("file.json", {**FIELDS, **fields}, FILES)


def of(blocks, *parts):
    return [name for name in FILES if int(name.split(".")[2]) in blocks and name.endswith(parts)]


# Fields.


def test_what_is_read_and_what_is_left_at_its_default():
    assert read_config("f", FIELDS) == LoRAConfig(2, 4, ["c_attn"])
    more = {"lora_dropout": 0.1, "use_rslora": True, "rank_pattern": {"c_fc": 3}, "alpha_pattern": {"c_fc": 5}}
    assert read_config("f", {**FIELDS, **more}) == LoRAConfig(2, 4, ["c_attn"], 0.1, True, {"c_fc": 3}, {"c_fc": 5})
    assert read_config("f", {**FIELDS, "rank_pattern": None, "alpha_pattern": None}) == LoRAConfig(2, 4, ["c_attn"])
    assert list(read_config("f", {**FIELDS, "rank_pattern": {"b": 1, "a": 2}}).rank_pattern) == ["b", "a"]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("missing", ["absent", "null"])
def test_a_field_without_a_safe_default_must_be_there(field, missing):
    config = {key: value for key, value in FIELDS.items() if key != field}
    if missing == "null":
        config[field] = None
    with pytest.raises(ValueError, match=f"^file.json: no {field}; these have no safe default, add what training used"):
        read_config("file.json", config)


HARMLESS = {"task_type": "CAUSAL_LM", "base_model_name_or_path": "x", "fan_in_fan_out": True, "inference_mode": False,
            "revision": "main", "megatron_core": "megatron.core", "auto_mapping": {"a": "b"}, "peft_version": "9",
            "qalora_group_size": 16, "bias": "none", "layers_pattern": "h", "some_new_field": None, "another": False,
            "a_third": {}, "a_fourth": []}  # fmt: skip


@pytest.mark.parametrize("field", HARMLESS)
def test_a_field_that_changes_nothing_is_read_over(field):
    assert read_config("f", {**FIELDS, field: HARMLESS[field]}) == LoRAConfig(2, 4, ["c_attn"])


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_how_the_factors_were_drawn_does_not_matter_once_they_are_saved(start):
    read_config("f", {**FIELDS, "init_lora_weights": start})


def test_an_adapter_that_started_with_eva_is_read_as_peft_wrote_it():
    eva = {"init_lora_weights": "eva", "eva_config": {"rho": 2.0, "tau": 0.99, "use_label_mask": True}}
    assert read_config("f", {**FIELDS, **eva}) == LoRAConfig(2, 4, ["c_attn"])


@pytest.mark.parametrize("config", [{"lora_ga_config": {"direction": "ArB2r"}}, {"lora_ga_config": None}, {}])
def test_factors_whose_start_was_taken_out_of_the_base_are_refused_with_the_way_out(config):
    """Also without the field that PEFT writes beside it: to take an unknown field out is the usual advice."""
    with pytest.raises(ValueError, match="'lora_ga' is not supported: its factors belong to a base .*plain LoRA of it"):
        read_config("f", {**FIELDS, "init_lora_weights": "lora_ga", **config})


FOREIGN = {
    "peft_type": ["LOHA", "lora", 7], "bias": ["all", "lora_only", None],
    "init_lora_weights": ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", None], "use_dora": ["yes"],
    "lora_bias": [True], "modules_to_save": [["ln_f"], ["lm_head"]], "target_parameters": [["x"]],
    "layer_replication": [[[0, 2]]], "trainable_token_indices": [[1], {"wte": [1]}], "use_qalora": [True],
    "use_bdlora": [{"a": 1}], "alora_invocation_tokens": [[1]], "ensure_weight_tying": [True],
    "loftq_config": [{"bits": 4}], "lora_ga_config": [{"direction": "ArB2r"}], "corda_config": [{"a": 1}],
    "arrow_config": [{"a": 1}], "megatron_config": [{"a": 1}], "quantum_rank": [7, 0, "", 0.0, "none"],
}  # fmt: skip


@pytest.mark.parametrize("field, value", [(field, value) for field, values in FOREIGN.items() for value in values])
def test_a_field_that_changes_what_is_computed_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"^file.json: {field}={re.escape(repr(value))} .*not supported"):
        read_config("file.json", {**FIELDS, field: value})


@pytest.mark.parametrize("fields, what", [
    ({"modules_to_save": ["lm_head"]}, "whole copies of these modules were trained"),
    ({"trainable_token_indices": {"wte": [1]}}, "rows of an embedding were trained"),
    ({"bias": "all"}, "biases of the base were trained"),
])  # fmt: skip
def test_what_was_trained_beside_lora_is_called_what_it_is_and_the_way_out_is_told(fields, what):
    with pytest.raises(ValueError, match=f"{what}.*, beside LoRA's .*merge_and_unload.* as a base"):
        read_config("f", {**FIELDS, **fields})


def test_what_lora_config_objects_to_names_the_file():
    for fields in ({"r": 0}, {"lora_alpha": "4"}, {"target_modules": []}, {"rank_pattern": {"(": 1}},
                   {"use_rslora": "no"}, {"lora_dropout": None}, {"alpha_pattern": [1]}):  # fmt: skip
        with pytest.raises(ValueError, match="^file.json: LoRAConfig: "):
            read_config("file.json", {**FIELDS, **fields})


# Which modules.


@pytest.mark.parametrize("fields, expected", [
    ({}, of(range(12), "c_attn")), ({"layers_to_transform": None}, of(range(12), "c_attn")),
    ({"layers_to_transform": []}, of(range(12), "c_attn")), ({"layers_to_transform": 0}, of([0], "c_attn")),
    ({"layers_to_transform": 1}, of([1], "c_attn")), ({"layers_to_transform": [1]}, of([1], "c_attn")),
    ({"layers_to_transform": [11, 0]}, of([0, 11], "c_attn")),
    ({"layers_to_transform": [1], "layers_pattern": "h"}, of([1], "c_attn")),
    ({"layers_to_transform": [1], "layers_pattern": ["layers", "h"]}, of([1], "c_attn")),
    ({"layers_to_transform": [1], "layers_pattern": []}, of([1], "c_attn")),
    ({"layers_to_transform": [1], "layers_pattern": "[h]"}, of([1], "c_attn")),
    ({"layers_pattern": "h"}, of(range(12), "c_attn")),
    ({"exclude_modules": []}, of(range(12), "c_attn")), ({"exclude_modules": None}, of(range(12), "c_attn")),
    ({"target_modules": ["c_proj"], "exclude_modules": ["mlp.c_proj"]}, of(range(12), "attn.c_proj")),
    ({"target_modules": ["c_proj"], "exclude_modules": r".*mlp.*"}, of(range(12), "attn.c_proj")),
    ({"exclude_modules": r"transformer\.h\.1"}, of(range(12), "c_attn")),
    ({"target_modules": ["c_proj"], "exclude_modules": r"mlp"}, of(range(12), "c_proj")),
    ({"target_modules": ["c_proj"], "exclude_modules": ["proj", "attn"]}, of(range(12), "c_proj")),
    ({"exclude_modules": ["transformer.h.3.attn.c_attn"]}, of({*range(12)} - {3}, "c_attn")),
    ({"target_modules": r".*h\.1\..*c_(attn|fc)"}, of([1], "c_attn", "c_fc")),
    ({"target_modules": "all-linear", "exclude_modules": ["c_fc"]}, of(range(12), "c_attn", "c_proj")),
    ({"target_modules": ["c_proj"], "exclude_modules": ["mlp.c_proj"], "layers_to_transform": 2},
    of([2], "attn.c_proj")),
])  # fmt: skip
def test_modules_are_chosen_by_targets_layers_and_exclusions(fields, expected):
    assert chosen(**fields) == expected and expected


@pytest.mark.parametrize("fields, shown", [
    ({"layers_to_transform": 12}, r"layers_to_transform \[12\]: of the blocks of the targets, there are \[0, 1, "),
    ({"layers_to_transform": [0, 12, 13]}, r"layers_to_transform \[12, 13\]"),
    ({"layers_to_transform": "0"}, r"\['0'\]"),
    ({"layers_to_transform": [-1]}, r"\[-1\]"), ({"layers_to_transform": {"a": 1}}, "layers_to_transform"),
    ({"layers_to_transform": [0], "layers_pattern": "blocks"}, r"layers_to_transform \[0\]"),
    ({"layers_to_transform": [0], "layers_pattern": 5}, "file.json"), ({"exclude_modules": 5}, "file.json"),
    ({"layers_to_transform": [0], "target_modules": r".*c_attn"},
    "needs target_modules to be a list, not an expression"),
    ({"layers_to_transform": [0], "target_modules": "all-linear"}, "needs target_modules to be a list"),
    ({"target_modules": ["c_attn", "c_atn"]}, r"\['c_atn'\] match no Linear"),
    ({"target_modules": "c_attn"}, "a regex for"),
])  # fmt: skip
def test_what_cannot_be_meant_is_refused_with_the_file(fields, shown):
    with pytest.raises(ValueError, match=f"file.json.*{shown}" if shown != "file.json" else shown):
        chosen(**fields)


@pytest.mark.parametrize("fields", [{"exclude_modules": "("}, {"layers_to_transform": [0], "layers_pattern": "("}])
def test_what_is_no_expression_is_refused(fields):
    with pytest.raises(ValueError, match=next(reversed(fields))):
        chosen(**fields)


# The names of the file, and ours.


@pytest.mark.parametrize("used, first", [
    (FILES[:1], "transformer.h.0.attn.c_attn"), (["h.1.mlp.c_fc"], "h.0.attn.c_attn"),
])  # fmt: skip
def test_the_names_of_a_model_with_and_without_its_head_are_known(used, first):
    assert next(iter(module_table(small_gpt(), used))) == first


@pytest.mark.parametrize("base, used", [
    (small_gpt(), ["model.layers.0.q_proj"]), (small_gpt(), []), (tiny_mlp(5, 7, 3), FILES),
], ids=["a Llama", "nothing", "on no GPT"])  # fmt: skip
def test_names_of_another_model_are_refused_with_both_sides(base, used):
    with pytest.raises(ValueError, match="none of the file's modules is in the base. The file has .*; the base has "):
        module_table(base, used)


@pytest.mark.parametrize("positions", ["learned", "rope"])
@pytest.mark.parametrize("used", [FILES[:1], ["h.0.attn.c_attn"], ["h.0.attn.q_proj"]])
def test_a_gpt_is_known_by_each_of_its_names(used, positions):
    """An adapter that does not say what it belongs to may have been saved under either kind."""
    table = module_table(small_gpt(positions=positions), used)
    assert used[0] in table and "h.0.attn.q_proj" in table[used[0]]


def test_a_configuration_is_translated_module_by_module():
    table = GPT2.module_table(linear_names(small_gpt()))
    theirs = LoRAConfig(2, 4, ["c_attn", "mlp.c_proj"], 0.1, True, {"c_attn": 3}, {r"h\.1\..*": 5, "c_attn": 7})
    ours = config_in_our_names(theirs, [name for name in table if name.endswith(("c_attn", "mlp.c_proj"))], table)
    assert (ours.r, ours.alpha, ours.dropout, ours.use_rslora) == (2, 4, 0.1, True)
    assert ours.target_modules == ("q_proj", "k_proj", "v_proj", "down_proj")
    for file, names in table.items():
        for name in names if file.endswith(("c_attn", "mlp.c_proj")) else ():
            assert (ours.r_of(name), ours.alpha_of(name)) == (theirs.r_of(file), theirs.alpha_of(file))
            assert ours.scaling_of(name) == theirs.scaling_of(file)


@given(st.sets(st.sampled_from(FILES[:16]), min_size=1))
def test_endings_select_exactly_what_is_meant(names):
    names = [name for name in FILES if name in names]
    found = endings(names, FILES[:16])
    assert set(find_targets(FILES[:16], found)) == set(names)
    assert len(found) <= len(names)


def test_endings_are_as_short_as_they_can_be():
    assert endings(of([0, 1], "c_attn"), FILES[:8]) == ["c_attn"]
    assert endings(of([0, 1], "mlp.c_proj"), FILES[:8]) == ["mlp.c_proj"]
    assert endings(of([0, 1], "c_proj"), FILES[:8]) == ["c_proj"]
    assert endings(of([1], "c_attn"), FILES[:8]) == ["transformer.h.1.attn.c_attn"]
    assert endings(FILES[:1], []) == FILES[:1], "of an unknown base, only full names are safe"


def test_a_model_of_other_names_has_endings_too():
    assert endings(["layers.1"], linear_names(tiny_mlp(5, 7, 3))) == ["1"]


@pytest.mark.parametrize("pattern, block", [("h", 1), ("(h)", 1), ("h|layers", -1), ("(h|layers)", 1), ("blocks", -1)])
def test_a_pattern_of_layers_may_have_groups_of_its_own(pattern, block):
    """As PEFT reads them: `h|layers` is one of two whole patterns, of which the first has no number."""
    matcher = Matcher("layers_pattern", around=_IN_BLOCK)
    assert _block(matcher, "transformer.h.1.attn.c_attn", [pattern]) == block


# Fields that are written.


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("r, alpha", [(3, 7), (49, 1), (3, 1), (8, 16), (7, 0.3), (6, 7.77), (5, 1e-3), (1, 1 / 3)])
def test_an_alpha_is_found_again_from_its_scaling(r, alpha, use_rslora):
    scaling = LoRAConfig(r, alpha, "all-linear", use_rslora=use_rslora).scaling_of("any")
    found = alpha_for(scaling, r, use_rslora)
    assert found == alpha and type(found) is type(alpha)


@given(st.integers(1, 300), st.floats(1e-6, 1e6), st.booleans())
def test_every_scaling_that_some_alpha_gives_is_given_to_the_bit(r, alpha, use_rslora):
    divisor = math.sqrt(r) if use_rslora else r
    found = alpha_for(alpha / divisor, r, use_rslora)
    assert found / divisor == alpha / divisor
    assert len(repr(found)) <= len(repr(alpha))


@given(st.integers(1, 300), st.floats(1e-6, 1e6), st.booleans())
def test_of_a_scaling_that_no_alpha_gives_the_nearest_is_taken(r, scaling, use_rslora):
    divisor = math.sqrt(r) if use_rslora else r
    found = alpha_for(scaling, r, use_rslora)
    assert math.isclose(found / divisor, scaling, rel_tol=2**-52)
    around = [math.nextafter(float(found), 0), math.nextafter(float(found), math.inf)]
    assert all(abs(found / divisor - scaling) <= abs(a / divisor - scaling) for a in around)


def test_there_are_scalings_that_no_alpha_gives():
    assert alpha_for(1.5, 3, False) / 3 == 1.5
    missed = [s for s in np.random.default_rng(0).uniform(1, 2, 100) if alpha_for(s, 3, False) / 3 != s]
    assert len(missed) > 10


def fields(strengths, config=None, **more):
    made_by = config or LoRAConfig(2, 4, "all-linear")
    given = {"fan_in_fan_out": False, "base_model": "tiny", "all_modules": FILES, **more}
    return written_fields(made_by, strengths, **given)


def test_what_most_modules_have_is_the_default_and_the_others_are_named():
    strengths = {FILES[0]: (6, 2.0), FILES[1]: (2, 2.0), FILES[2]: (2, 2.0), FILES[3]: (2, 5.5)}
    written = fields(strengths)
    assert (written["r"], written["lora_alpha"]) == (2, 4)
    assert written["rank_pattern"] == {FILES[0]: 6} and written["alpha_pattern"] == {FILES[0]: 12, FILES[3]: 11}
    assert written["target_modules"] == FILES[:4]
    read = read_config("f", written)
    assert {module: (read.r_of(module), read.scaling_of(module)) for module in strengths} == strengths


def test_the_fields_say_nothing_of_how_the_pairs_were_made():
    """r and alpha are those of the pairs, whatever the configuration was."""
    written = fields({FILES[0]: (3, 7 / 3)}, LoRAConfig(16, 99, "all-linear", dropout=0.25))
    assert (written["r"], written["lora_alpha"], written["lora_dropout"]) == (3, 7, 0.25)
