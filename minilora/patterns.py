"""Regular expressions that a file may hold: matched as `re` does, but in bounded time. Knows texts.

An expression of a stranger's, (.+)+x, can keep `re` busy for longer than anyone waits. The library
`regex` has the same language, and a limit of time. It has none of memory, which counts inside
counts fill, ((a{1000}){1000}){1000}: they are refused before it reads them.
"""

import functools
import re
import time

# Nobody names modules by an expression as long. The time to read one grows with its length.
LONGEST = 10_000
# All expressions of a field together: a thousand modules, each by its full name. What is repeated n
# times is written out n times, since `regex` does that: up to 250 bytes for a character.
LONGEST_FIELD = 200_000
# Seconds of the processor for all matches of one Matcher. A name takes some microseconds.
SECONDS = 0.5
# What a pattern can hold that `regex` understands and `re` takes for plain characters, and what
# must stay whole: an escape, and a set, in which a bracket is a character.
_PARTS = re.compile(
    r"(?P<escape>\\N\{[^}]*\}|\\.)"
    r"|(?P<set>\[\^?\]?(?:\\.|[^\]\\])*\])"
    r"|(?P<brace>\{(?!\d*,?\d*\})|\{\})",
    re.DOTALL,
)
_BRACKETS = re.compile(r"(?P<escape>\\.)|\[", re.DOTALL)
# A count of repetitions. What it repeats may have counts inside only if it is a group, whose end
# stands in front of it; with (?x) blanks or a comment that ends a line may stand between.
_COUNT = re.compile(r"(?P<group>[)\s])?(?:\+|\{(?P<least>[0-9]*)(?P<comma>,?)[0-9]*\})")
# A count of more digits is not looked at.
_MOST_DIGITS = 9


def problem_of(expressions):
    """What is wrong with one of the texts `expressions`, in words that begin with it; None if none.

    It is no regular expression, or too long, nested too deep or repeated too often to be read.
    """
    written_out = 0
    for text in expressions:
        if len(text) > LONGEST:
            return f"{_shown(text)} has more than {LONGEST:,} characters; write a shorter one"
        size = _written_out(text)
        if size > LONGEST_FIELD:
            return (
                f"{_shown(text)} may have more than {LONGEST_FIELD:,} characters with its "
                "repetitions written out; write one with smaller counts, and none inside another"
            )
        written_out += size
        if written_out > LONGEST_FIELD:
            return (
                f"are more than {LONGEST_FIELD:,} characters together, with their repetitions "
                "written out; give fewer or shorter ones"
            )
        try:
            re.compile(text)
        except re.error as error:
            return f"{_shown(text)} is not a regular expression: {error}"
        except (RecursionError, OverflowError, MemoryError) as error:
            return f"{_shown(text)} is too much for a regular expression: {error}; simplify it"
    return None


def _written_out(text):
    """No more characters than this has an expression that is written without counts.

    Each group may stand in all the others, so their counts multiply. All else is taken to be
    repeated as often as what is repeated most.
    """
    groups = 1
    others = 1
    for count in _COUNT.finditer(text):
        copies = _copies(count)
        if count["group"]:
            groups *= copies
        else:
            others = max(copies, others)
    return len(text) * groups * others


def _copies(count):
    """How many copies of a part `regex` makes: x{3} is xxx, x{3,} is xxxx*, x+ is xx*."""
    if count["least"] is None:
        return 2
    if len(count["least"]) > _MOST_DIGITS:
        return LONGEST_FIELD + 1
    least = int(count["least"] or 0)
    return max(least + len(count["comma"]), 1)


def check_expressions(field, expressions):
    """Raise ValueError that names the `field` if one of its texts is no expression to match by."""
    problem = problem_of(expressions)
    if problem is not None:
        raise ValueError(f"{field} {problem}")


class Matcher:
    """Matches names by the expressions in the field called `field`.

    Without `around` an expression must match the whole of a name. `around` is a pattern in which
    {} stands for the expression: it must match the name from its beginning on.
    All that one Matcher matches takes no more than SECONDS of the processor's time together.
    """

    def __init__(self, field, around=None):
        self.field = field
        self._around = around
        self._left = SECONDS

    def first(self, expressions, name):
        """(expression, its match) of the first that matches `name`; None if none does.

        Raises: ValueError with the field, the expression and the remedy if it takes too long, or
        cannot stand where it would.
        """
        for text in expressions:
            start = time.process_time()
            match = self._matched(text, name)
            self._left -= time.process_time() - start
            if match:
                return text, match
        return None

    def _matched(self, text, name):
        compiled = _compiled(self.field, text, self._around or "{}")
        match = compiled.match if self._around else compiled.fullmatch
        try:
            if self._left <= 0:
                raise TimeoutError
            return match(name, timeout=self._left)
        except (TimeoutError, MemoryError):
            raise ValueError(
                f"{self.field} {_shown(text)} takes too long to match: write an expression without "
                "repetitions of repetitions, or a list of names"
            ) from None


@functools.lru_cache(maxsize=4096)
def _compiled(field, text, around):
    """The pattern of `regex` that means what `re` takes the expression for."""
    # Imported where something is matched: who gives lists of names needs NumPy alone.
    import regex

    check_expressions(field, [text])
    whole = around.replace("{}", text)
    try:
        # (?i) is an expression, but may not stand inside one.
        re.compile(whole)
        return regex.compile(_PARTS.sub(_as_re_means, whole), regex.VERSION0)
    except (re.error, regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise ValueError(
            f"{field} {_shown(text)} cannot be matched by, where {around.replace('{}', '...')} "
            f"holds it: {error}"
        ) from None


def _as_re_means(part):
    text = part[0]
    if part["brace"]:
        # regex would look for what is nearly the same: x{e<=1}.
        return rf"\{text}"
    if part["set"]:
        # regex knows [[:alpha:]].
        return "[" + _BRACKETS.sub(lambda found: found["escape"] or r"\[", text[1:])
    return text


def _shown(text):
    return repr(text) if len(text) <= 100 else f"{text[:100]!r}..."
