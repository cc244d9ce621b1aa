"""What the readers of files share: both sides are shown, the file is named, and long lists are cut."""

import pytest

from minilora.disk.checks import check_same_tensors, counted, each_key_once, errors_name, json_object, listed


def test_two_sets_of_names_agree_or_both_sides_are_shown():
    check_same_tensors("here", {"a": (1,), "b": (2,)}, {"b": (2,), "a": (1,)})
    check_same_tensors("here", ["a", "b"], {"b": 0, "a": 1}.keys())
    both_sides = r"^here: do not match. absent: c; superfluous: b; misshapen: a is \(1,\), not"
    with pytest.raises(ValueError, match=both_sides):
        check_same_tensors("here", {"a": (1,), "b": (2,)}, {"a": (3,), "c": (1,)})
    with pytest.raises(ValueError, match="superfluous: a, b, c, d, e, f and 1 more$"):
        check_same_tensors("here", "abcdefg", "")
    with pytest.raises(ValueError, match="superfluous: a, b, c, d, e, f$"):
        check_same_tensors("here", "abcdef", "")


@pytest.mark.parametrize("names, text", [
    ([], ""), (["a"], "a"), (["a", "b", "c"], "a, b, c"), (["a", "b", "c", "d"], "a, b, c and 1 more"),
    ("abcdefgh", "a, b, c and 5 more"), ({"a": 1, "b": 2}.keys(), "a, b"),
])  # fmt: skip
def test_names_beyond_the_most_are_counted(names, text):
    assert listed(names, most=3) == text


@pytest.mark.parametrize("number, text", [(0, "0 steps"), (1, "1 step"), (2, "2 steps"), (1234, "1,234 steps")])
def test_one_thing_is_told_in_the_singular(number, text):
    assert counted(number, "step") == text


def test_no_text_is_no_object_and_no_error():
    assert json_object("here", None) is None
    assert json_object("here", '{"a": 1}') == json_object("here", b'{"a": 1}') == {"a": 1}


def test_a_key_that_comes_twice_is_named_in_whatever_object_it_is():
    assert json_object("f", '{"a": {"b": 1}, "b": 2}', object_pairs_hook=each_key_once) == {"a": {"b": 1}, "b": 2}
    for text in ('{"b": 1, "a": 2, "b": 1}', '{"a": [{"b": 1, "b": 2}]}'):
        with pytest.raises(ValueError, match="^f is not JSON: the key 'b' comes twice$"):
            json_object("f", text, object_pairs_hook=each_key_once)


@pytest.mark.parametrize("error", [ValueError("wrong"), TypeError("wrong")])
def test_a_complaint_gets_the_name_of_the_file(error):
    with pytest.raises(ValueError, match="^file.json: wrong$"):
        with errors_name("file.json"):
            raise error


def test_other_errors_are_not_touched():
    with pytest.raises(KeyError):
        with errors_name("file.json"):
            raise KeyError("wrong")
