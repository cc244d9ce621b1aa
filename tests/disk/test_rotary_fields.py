"""Rotary positions in fields: what is written for transformers 4 and 5 is read back from either."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.disk.rotary_fields import read_rotary, written_rotary

sizes = st.floats(1.0, 1e6) | st.integers(1, 10**6)
linear = st.fixed_dictionaries({"rope_type": st.just("linear"), "factor": sizes})
llama3 = st.fixed_dictionaries({
    "rope_type": st.just("llama3"), "factor": sizes, "low_freq_factor": sizes, "high_freq_factor": sizes,
    "original_max_position_embeddings": st.integers(1, 10**6)})  # fmt: skip
scalings = st.none() | linear | llama3


@given(sizes, scalings)
def test_what_is_written_is_read_by_either_version(theta, scaling):
    fields = written_rotary(SimpleNamespace(rope_theta=theta, rope_scaling=scaling))
    assert fields.keys() == {"rope_theta", "rope_scaling", "rope_parameters"}
    of_4 = {name: fields[name] for name in ("rope_theta", "rope_scaling")}
    of_5 = {"rope_parameters": fields["rope_parameters"]}
    for either in (fields, of_4, of_5):
        assert read_rotary(either) == (theta, scaling)


def test_without_a_field_it_is_the_default_of_transformers():
    assert read_rotary({}) == read_rotary({"rope_parameters": {}, "rope_scaling": {}}) == (10000.0, None)


@given(linear | llama3, st.data())
def test_a_scaling_without_one_of_its_numbers_is_refused_by_its_name(scaling, data):
    name = data.draw(st.sampled_from(sorted(scaling.keys() - {"rope_type"})))
    for left in ({**scaling, name: None}, {key: value for key, value in scaling.items() if key != name}):
        with pytest.raises(ValueError, match=f"rope_type='{scaling['rope_type']}' needs {name}"):
            read_rotary({"rope_scaling": left})


@given(scalings, scalings)
def test_two_scalings_that_differ_contradict_each_other(old, new):
    fields = {"rope_scaling": old or {"type": "default"}, "rope_parameters": new or {"rope_type": "default"}}
    if old == new:
        assert read_rotary(fields) == (10000.0, old)
    else:
        with pytest.raises(ValueError, match="contradict each other"):
            read_rotary(fields)
