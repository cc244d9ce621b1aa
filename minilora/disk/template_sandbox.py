"""Where a stranger's chat template runs: nothing is reached from it, and it ends. Knows no model.

A template comes with a model, from anybody. jinja2's sandbox keeps it from calling out. It does not
keep it from running for ever, or from filling the memory: here each turn of a loop, each call and
each filter is a step, and there are limits to the steps and to how large anything becomes.
"""

import json
import math
import time
from collections.abc import Iterator
from datetime import datetime

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from .template_sizes import (
    TEXTS,
    WIDTH_OF_PERCENT,
    check_bits,
    check_format,
    check_growth,
    check_product,
    check_size,
    joined,
    listed,
    weighed,
    weighed_items,
    weight,
)

# What a rendering may take. A conversation of a thousand messages takes some thousand steps, and a
# hundredth of a second. The seconds are for what the steps do not weigh.
MOST_STEPS = 300_000
MOST_SECONDS = 5
# The widest step that JSON is indented by.
WIDEST_INDENT = 16

# The names under which the steps and sizes below stand in the syntax tree: no template can
# write them, because they are no words of jinja2's.
COUNTED = "counted turns"
JOINED = "joined texts"
WEIGHED = "weighed items"
# Filters that draw random numbers, though a conversation has one text; filters for web pages, some
# of whose searches take a time that grows with the square of a text; and one for debugging, which
# indents without a limit.
LEFT_OUT = ("pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr")
# Filters that ask something of each item, and may return none of them.
SEARCHING = ("map", "reject", "rejectattr", "select", "selectattr")
# What the options of a filter are called, in their order, where the order matters below.
OPTIONS = {"join": ("d", "attribute"), "replace": ("old", "new", "count")}


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
            finalize=weighed,
        )
        self.marks = marks
        self.steps = 0
        self.deadline = math.inf
        self.concat = joined
        # It draws random numbers as well.
        del self.globals["lipsum"]
        filters = {**self.filters, "tojson": _tojson}
        self.filters = {
            name: self._limited(name, function)
            for name, function in filters.items()
            if name not in LEFT_OUT
        }
        self.filters[COUNTED] = lambda items: _Turns.of(self, items)
        self.filters[JOINED] = lambda texts: joined(map(str, weighed(texts)))
        self.filters[WEIGHED] = weighed
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)

    def run(self, template, variables):
        """The text that `template`, compiled by this environment, makes of `variables`, a dict.

        Raises: whatever the template raises; TemplateError for a limit.
        """
        self.steps = 0
        self.deadline = time.monotonic() + MOST_SECONDS
        context = template.new_context(variables)
        return joined(template.root_render_func(context))

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
        # What begins with an underscore is jinja2's: the variables of the loop around the call.
        named = [value for name, value in options.items() if not name.startswith("_")]
        values = [*arguments, *named]
        text = getattr(method, "__self__", None)
        if isinstance(text, TEXTS):
            # How many items a method is given is asked before it is called.
            arguments = [listed(value) for value in arguments]
            values = [text, *arguments, *named]
        check_growth(method, values)
        return weighed(super().call(context, function, *arguments, **options))

    def call_binop(self, context, operator, left, right):
        """The operators that can make something large."""
        if operator == "*":
            check_product(left, right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            check_bits(left.bit_length() * max(right, 1))
        elif operator == "%" and isinstance(left, TEXTS):
            check_format(left, right, WIDTH_OF_PERCENT)
        elif operator == "+":
            check_size(weight(left) + weight(right))
        return weighed(super().call_binop(context, operator, left, right))

    def _limited(self, name, function):
        """A filter whose calls are steps, and whose results stay within the limits."""

        # The environment, or the context, may come first.
        first = 0 if getattr(function, "jinja_pass_arg", None) is None else 1

        def limited(*arguments, **options):
            self.step()
            arguments = list(arguments)
            if name == "join":
                arguments[first] = listed(arguments[first])
            elif name in SEARCHING:
                arguments[first] = self._timed(arguments[first])
            order = OPTIONS.get(name, options)
            named = [options[option] for option in order if option in options]
            check_growth(name, arguments[first:] + named)
            result = function(*arguments, **options)
            if isinstance(result, Iterator):
                return weighed_items(result)
            return weighed(result)

        # How jinja2 knows what else to hand to a filter.
        for attribute in ("jinja_pass_arg", "jinja_async_variant"):
            if hasattr(function, attribute):
                setattr(limited, attribute, getattr(function, attribute))
        return limited

    def _timed(self, items):
        """`items`, with a look at the clock before each, if there are any to go through."""
        if isinstance(items, jinja2.Undefined) or not hasattr(items, "__iter__"):
            # The filter says what is wrong with it.
            return items
        return self._timed_items(items)

    def _timed_items(self, items):
        for item in items:
            self.step(0)
            yield item


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


def _raise_exception(message):
    raise jinja2.TemplateError(message)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """JSON without the escapes that jinja2 adds for web pages."""
    width = indent if isinstance(indent, int) else weight(indent)
    if width > WIDEST_INDENT:
        raise jinja2.TemplateError(f"it indents JSON by more than {WIDEST_INDENT}")
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
    # Piece by piece: lines that are deep within others begin with many blanks.
    return joined(encoder.iterencode(value))
