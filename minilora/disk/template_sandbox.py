"""Where a stranger's chat template runs: nothing is reached from it, and it ends. Knows no model.

A template comes with a model, from anybody. jinja2's sandbox keeps it from calling out. It does not
keep it from running for ever, or from filling the memory: here each turn of a loop, each call and
each filter is a step, and there are limits to the steps and to how large anything becomes.
"""

import json
import math
import re
import time
from datetime import datetime

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

# What a rendering may take. A conversation of a thousand messages takes some thousand steps, and a
# hundredth of a second. The seconds are for what the steps do not weigh.
MOST_STEPS = 300_000
MOST_SECONDS = 5
# The most characters and items that anything may have which a template makes, with all within it.
LARGEST = 2_000_000
# The largest whole number that a filter or a method may be given: a width, a number of copies.
LARGEST_ARGUMENT = 100_000
# Integers stay below this many bits.
MOST_BITS = 4096

# The names under which the steps and sizes below stand in the syntax tree: no template can
# write them, because they are no words of jinja2's.
COUNTED = "counted turns"
JOINED = "joined texts"
WEIGHED = "weighed items"
# Filters that draw random numbers, though a conversation has one text; and filters for web pages,
# some of whose searches take a time that grows with the square of a text.
LEFT_OUT = ("random", "striptags", "urlize", "wordwrap", "xmlattr")


class Environment(ImmutableSandboxedEnvironment):
    """jinja2's sandbox as transformers sets it up, with limits.

    `marks`, two texts, stand around what the template has between generation tags.

    Source: transformers' `chat_template_utils.py`: the options, `tojson`, `raise_exception`,
    `strftime_now`, loop controls and `{% generation %}`.
    """

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, marks):
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[Generation, "jinja2.ext.loopcontrols"],
            finalize=_weighed,
        )
        self.marks = marks
        self.steps = 0
        self.deadline = math.inf
        self.concat = _joined
        # It draws random numbers as well.
        del self.globals["lipsum"]
        filters = {**self.filters, "tojson": _tojson}
        self.filters = {
            name: self._limited(name, function)
            for name, function in filters.items()
            if name not in LEFT_OUT
        }
        self.filters[COUNTED] = lambda items: _Turns.of(self, items)
        self.filters[JOINED] = lambda texts: _joined(map(str, _weighed(texts)))
        self.filters[WEIGHED] = _weighed
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)

    def run(self, template, variables):
        """The text that `template`, compiled by this environment, makes of `variables`, a dict.

        Raises: whatever the template raises; TemplateError for a limit.
        """
        self.steps = 0
        self.deadline = time.monotonic() + MOST_SECONDS
        context = template.new_context(variables)
        return _joined(template.root_render_func(context))

    def step(self, n=1):
        """Count `n` steps. Raises: TemplateError beyond the limit."""
        self.steps += n
        if self.steps > MOST_STEPS:
            raise jinja2.TemplateError(f"it takes more than {MOST_STEPS:,} steps")
        if time.monotonic() > self.deadline:
            raise jinja2.TemplateError(f"it takes more than {MOST_SECONDS} seconds")

    def _parse(self, source, name, filename):
        """The syntax tree of a template, with its loops and its joined texts under the limits."""
        return _UnderLimits(self).visit(super()._parse(source, name, filename))

    def call(self, context, function, *arguments, **options):
        """Every call in a template goes through here, methods of texts among them."""
        self.step()
        # The sandbox wraps `format`.
        method = getattr(function, "__wrapped__", function)
        values = [*arguments, *options.values()]
        text = getattr(method, "__self__", None)
        if isinstance(text, str):
            values = [text, *values]
        _check_growth(method, values)
        return _weighed(super().call(context, function, *arguments, **options))

    def call_binop(self, context, operator, left, right):
        """The operators that can make something large."""
        if operator == "*":
            _check_product(left, right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() * max(right, 1))
        elif operator == "%" and isinstance(left, str):
            _check_format(left, right)
        elif operator == "+":
            _check_size(_weight(left) + _weight(right))
        return _weighed(super().call_binop(context, operator, left, right))

    def _limited(self, name, function):
        """A filter whose calls are steps, and whose results stay within the limits."""

        def limited(*arguments, **options):
            self.step()
            values = [*arguments, *options.values()]
            if getattr(function, "jinja_pass_arg", None) is not None:
                # The environment, or the context, comes first.
                values = values[1:]
            _check_growth(name, values)
            return _weighed(function(*arguments, **options))

        # How jinja2 knows what else to hand to a filter.
        for attribute in ("jinja_pass_arg", "jinja_async_variant"):
            if hasattr(function, attribute):
                setattr(limited, attribute, getattr(function, attribute))
        return limited


class _Turns:
    """What a loop goes through; each of its turns is a step."""

    def __init__(self, environment, items):
        self.environment = environment
        self.items = items

    @classmethod
    def of(cls, environment, items):
        """The turns over `items`, if a loop can go through them."""
        if isinstance(items, jinja2.Undefined) or not hasattr(items, "__iter__"):
            # The loop itself says what is wrong with it.
            return items
        if not hasattr(items, "__len__"):
            # A generator, whose length a loop may ask for.
            items = list(cls(environment, items))
        return cls(environment, items)

    def __len__(self):
        return len(self.items)

    def __iter__(self):
        for item in self.items:
            self.environment.step()
            yield item


class Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`: what the assistant wrote, between two marks."""

    tags = frozenset(["generation"])

    def parse(self, parser):
        """A call block, as transformers makes it: variables that are set inside stay inside."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller):
        """What the block holds, between the marks."""
        opening, closing = self.environment.marks
        return opening + caller() + closing


class _UnderLimits(NodeTransformer):
    """Lets loops count their turns, and weighs what operators and brackets make."""

    def __init__(self, environment):
        self.environment = environment

    def visit_For(self, node):
        """A loop over something, as one over the counted items of it."""
        self.generic_visit(node)
        node.iter = self._filtered(node.iter, COUNTED)
        return node

    def visit_Concat(self, node):
        """`a ~ b`, as the join of a list."""
        self.generic_visit(node)
        texts = nodes.List(node.nodes).set_lineno(node.lineno)
        return self._filtered(texts, JOINED)

    def visit_List(self, node):
        """A list, weighed: one that holds another twice, in another twice, grows without a loop."""
        self.generic_visit(node)
        return self._filtered(node, WEIGHED)

    visit_Dict = visit_List

    def visit_Tuple(self, node):
        """As a list, unless it is what values are assigned to."""
        self.generic_visit(node)
        return node if node.ctx == "store" else self._filtered(node, WEIGHED)

    def _filtered(self, node, name):
        filtered = nodes.Filter(node, name, [], [], None, None)
        return filtered.set_lineno(node.lineno).set_environment(self.environment)


def _joined(texts):
    """The joined `texts`. Raises: TemplateError if they are too large together."""
    parts = []
    size = 0
    for text in texts:
        size += len(text)
        _check_size(size)
        parts.append(text)
    return "".join(parts)


def _weight(value):
    """The characters and items of `value`, with all within it, counted as often as they come."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Namespace):
        value = value._Namespace__attrs
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if not isinstance(value, (list, tuple)):
        return 1
    weight = 1
    for item in value:
        weight += _weight(item)
        _check_size(weight)
    return weight


def _weighed(value):
    """`value`, if it is not too large."""
    _check_size(_weight(value))
    return value


def _check_size(size):
    if size > LARGEST:
        raise jinja2.TemplateError(
            f"it makes something of {size:,} characters or items; the limit is {LARGEST:,}"
        )


def _check_bits(bits):
    if bits > MOST_BITS:
        raise jinja2.TemplateError(f"it computes a number of about {bits:,} bits")


def _check_product(left, right):
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())
    elif isinstance(right, int):
        _check_size(_weight(left) * right)
    elif isinstance(left, int):
        _check_size(_weight(right) * left)


def _check_growth(function, values):
    """Refuse what a filter or a method of texts would make far larger than it is given."""
    name = getattr(function, "__name__", function)
    for value in values:
        if isinstance(value, int) and abs(value) > LARGEST_ARGUMENT:
            raise jinja2.TemplateError(f"it calls something with more than {LARGEST_ARGUMENT:,}")
    weights = [_weight(value) for value in values]
    texts = [value for value in values if isinstance(value, str)]
    if name in ("format", "format_map") and texts:
        _check_format(texts[0], values[1:])
    elif name == "replace" and len(texts) > 2:
        _check_size(len(texts[0]) + (texts[0].count(texts[1]) + 1) * len(texts[2]))
    elif name == "join" and len(values) > 1:
        items = max((len(value) for value in values if hasattr(value, "__len__")), default=0)
        _check_size(sum(weights) + items * min(weights))
    elif name in ("indent", "expandtabs", "batch", "slice"):
        widths = [value for value in values if isinstance(value, int)]
        _check_size(max(weights) * max(widths, default=1))
    elif name == "translate":
        raise jinja2.TemplateError("it calls translate")


def _check_format(text, values):
    """Refuse a format with a width of many digits, or a width from elsewhere."""
    if re.search(r"\d{6}|%[^%a-zA-Z]*\*|\{[^{}]*\{", text):
        raise jinja2.TemplateError(f"it formats with {text[:40]!r}")
    _check_size((text.count("%") + text.count("{")) * _weight(values))


def _raise_exception(message):
    raise jinja2.TemplateError(message)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """JSON without the escapes that jinja2 adds for web pages."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
