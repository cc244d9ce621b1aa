"""How large the things are that a chat template makes, and what would be made too large.

Knows the operators, filters and methods of jinja2 that let something grow. Everything is refused
before it is made. Knows no template.
"""

import re
from collections.abc import Collection, Iterator, Mapping

import jinja2
from jinja2.utils import Namespace

# The most characters and items that anything may have which a template makes, with all within it.
LARGEST = 2_000_000
# The largest whole number that a filter or a method may be given: a width, a number of copies.
LARGEST_ARGUMENT = 100_000
# Integers stay below this many bits.
MOST_BITS = 4096
# Methods whose time grows with the square of a text, or that let a table make a text grow.
REFUSED = ("striptags", "translate")
# Codecs whose time grows with a text, and not with its square, and how they treat what they lack.
CODECS = ("utf-8", "utf8", "ascii", "latin-1", "strict", "ignore", "replace")
TEXTS = (str, bytes, bytearray)
# Where a format takes a width from its values, or what is within a value, which nobody weighed.
WIDTH_OF_PERCENT = r"%[^%a-zA-Z]*\*"
WIDTH_OF_BRACES = r"\{[^{}]*\{|\{[^{}:!]*[.\[]"


def joined(texts):
    """The joined `texts`. Raises: TemplateError if they are too large together."""
    parts = []
    size = 0
    for text in texts:
        size += len(text)
        check_size(size)
        parts.append(text)
    return "".join(parts)


def weight(value):
    """The characters and items of `value`, with all within it, counted as often as they come."""
    if isinstance(value, TEXTS):
        return len(value)
    if isinstance(value, int):
        # A long one has a long text.
        return 1 + value.bit_length() // 64 * 20
    if isinstance(value, Namespace):
        value = value._Namespace__attrs
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    # The text of a range is short.
    if isinstance(value, range) or not isinstance(value, Collection):
        return 1
    total = 1
    for item in value:
        total += weight(item)
        check_size(total)
    return total


def weighed(value):
    """`value`, if it is not too large."""
    check_size(weight(value))
    return value


def weighed_items(items):
    """`items`, which come one by one, up to where they would be too large if they were kept."""
    total = 1
    for item in items:
        total += weight(item)
        check_size(total)
        yield item


def listed(value):
    """`value`; as a list, if it comes item by item."""
    return list(value) if isinstance(value, Iterator) else value


def check_size(size):
    """Raise TemplateError beyond the most characters and items that anything may have."""
    if size > LARGEST:
        raise jinja2.TemplateError(
            f"it makes something of {size:,} characters or items; the limit is {LARGEST:,}"
        )


def check_bits(bits):
    """Raise TemplateError beyond the most bits of an integer."""
    if bits > MOST_BITS:
        raise jinja2.TemplateError(f"it computes a number of about {bits:,} bits")


def check_product(left, right):
    """Raise TemplateError if `left * right` would be too large."""
    if isinstance(left, int) and isinstance(right, int):
        check_bits(left.bit_length() + right.bit_length())
    elif isinstance(right, int):
        check_size(weight(left) * right)
    elif isinstance(left, int):
        check_size(weight(right) * left)


def check_growth(function, values):
    """Refuse what a filter or a method of texts would make far larger than it is given."""
    name = getattr(function, "__name__", function)
    for value in values:
        if isinstance(value, int) and abs(value) > LARGEST_ARGUMENT:
            raise jinja2.TemplateError(f"it calls something with more than {LARGEST_ARGUMENT:,}")
    weights = [weight(value) for value in values]
    if name in REFUSED:
        raise jinja2.TemplateError(f"it calls {name}")
    if name == "format" and isinstance(function, str):
        # The filter writes as the operator % does, the method of that name does not.
        check_format(values[0], values[1:], WIDTH_OF_PERCENT)
    elif name in ("format", "format_map"):
        check_format(values[0], values[1:], WIDTH_OF_BRACES)
    elif name == "replace" and len(values) > 2:
        _check_replace(*values[:3])
    elif name == "join" and len(values) > 1 and isinstance(function, str):
        _check_join(values[0], str(values[1]))
    elif name == "join" and len(values) > 1:
        _check_join(values[1], values[0])
    elif name == "indent":
        _check_indent(values)
    elif name == "expandtabs":
        widths = [value for value in values if isinstance(value, int)]
        check_size(max(weights) * max(widths, default=1))
    elif name in ("encode", "decode"):
        for codec in values[1:]:
            if str(codec).lower() not in CODECS:
                raise jinja2.TemplateError(f"it calls {name} with {codec!r:.40}")


def check_format(text, values, width_of_its_own):
    """Refuse a format with a width of many digits, a width from elsewhere, or many widths."""
    if not isinstance(text, str):
        text = str(text)
    if re.search(rf"\d{{6}}|{width_of_its_own}", text):
        raise jinja2.TemplateError(f"it formats with {text[:40]!r}")
    widths = sum(map(int, re.findall(r"\d+", text)))
    check_size(widths + (text.count("%") + text.count("{")) * weight(values))


def _check_replace(text, old, new):
    if not isinstance(text, (bytes, bytearray)):
        # The filter takes anything for a text.
        text = str(text)
        old = str(old)
        new = str(new)
    check_size(len(text) + (text.count(old) + 1) * len(new))


def _check_join(items, separator):
    count = len(items) if hasattr(items, "__len__") else 1
    check_size(weight(items) + count * len(separator))


def _check_indent(values):
    """Refuse a wide indent, a number or a text, before many lines."""
    widths = [value if isinstance(value, int) else weight(value) for value in values[1:]]
    lines = str(values[0]).splitlines()
    check_size(weight(values[0]) + (len(lines) + 1) * max(widths, default=1))
