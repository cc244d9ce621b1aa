"""Arrays in lists, tuples and dicts: the path of each, and the same lists around other arrays.

Knows no arithmetic. A path reads as the code that reaches the array: `input 0['w'][1]`.
"""

import copy


def leaves(value, path):
    """[(path, leaf)]: all that nested lists, tuples and dicts hold, in order, `path` first.

    >>> leaves({"w": 1.0, "b": [2.0, 3.0]}, "x")
    [("x['w']", 1.0), ("x['b'][0]", 2.0), ("x['b'][1]", 3.0)]
    """
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return [(path, value)]
    found = []
    for key, item in items:
        found.extend(leaves(item, f"{path}[{key!r}]"))
    return found


def with_leaves(value, new):
    """`value` with its leaves replaced, in order, by those of the iterator `new`.

    Lists, tuples, named tuples and dicts keep their types.

    >>> with_leaves({"w": 1.0, "b": [2.0, 3.0]}, iter("xyz"))
    {'w': 'x', 'b': ['y', 'z']}
    """
    if isinstance(value, dict):
        # A copy, and not dict(...): an OrderedDict stays one.
        result = copy.copy(value)
        for key, item in value.items():
            result[key] = with_leaves(item, new)
        return result
    if isinstance(value, (list, tuple)):
        items = [with_leaves(item, new) for item in value]
        if hasattr(value, "_make"):
            return value._make(items)
        return type(value)(items)
    return next(new)
