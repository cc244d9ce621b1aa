"""Leaves of nested lists, tuples and dicts: found by path, and put back."""

from collections import OrderedDict, namedtuple

from hypothesis import given
from hypothesis import strategies as st

from minilora.structure import leaves, with_leaves

Point = namedtuple("Point", "x y")
nested = st.recursive(
    st.integers(),
    lambda inner: st.lists(inner, max_size=3)
    | st.lists(inner, max_size=3).map(tuple)
    | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
    | st.builds(Point, inner, inner),
    max_leaves=8,
)


@given(nested)
def test_what_is_taken_apart_is_put_back_as_it_was(value):
    assert with_leaves(value, iter([leaf for _, leaf in leaves(value, "v")])) == value


@given(nested)
def test_a_path_is_the_code_that_reaches_its_leaf(value):
    for path, leaf in leaves(value, "value"):
        assert eval(path, {"value": value}) == leaf


def test_types_and_their_order_stay():
    value = OrderedDict(b=Point(1, [2]), a=(3,))
    new = with_leaves(value, iter("xyz"))
    assert type(new) is OrderedDict and list(new) == ["b", "a"] and type(new["b"]) is Point
    assert new == OrderedDict(b=Point("x", ["y"]), a=("z",)) and value["b"].x == 1
