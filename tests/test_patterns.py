"""Expressions out of files: each means what `re` takes it for, and none is matched for longer than a moment."""

import re
import time
import tracemalloc
import warnings

import pytest
import regex
from hypothesis import example, given
from hypothesis import strategies as st

from minilora import patterns
from minilora.lora_config import LoRAConfig, check_speed, find_targets
from minilora.patterns import LONGEST, LONGEST_FIELD, Matcher, check_expressions, problem_of

NAMES = [f"{start}.{i}.{part}" for start in ("h", "transformer.h", "model.layers", "base.encoder")
         for i in (0, 1, 10, 31) for part in ("attn.c_attn", "self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj",
                                                   "mlp.c_fc")]  # fmt: skip
NAMES += ["lm_head", "q_proj", "", "a{e}", "a{1}", "[:alpha:]", "x.{}", "K.q_proj", "ſ", "é", "a:", "h]", "aaab",
          "a\n", "layers.3.x.h.4.y"]  # fmt: skip

# What people write into the fields of PEFT, and what one of the two languages knows and the other does not.
WRITTEN = [
    r".*\.(q|k|v|o)_proj", r".*self_attn\.(q_proj|v_proj)$", r"^model\.layers\.\d+\.self_attn\.[qk]_proj",
    r".*(?<!gate)_proj", r"(?!.*lm_head).*proj", r"model\.layers\.(?:[0-9]|1[0-5])\..*", r"(?i).*Q_PROJ", r".*\.h\..*",
    r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$", r"h\.[0-9]{1,2}\..*", r"h\.\d{2}\..*", r"[^.]+\.\d+\..+",
    r"(?=.*attn)(?=.*proj).*", r"(?P<kind>q|k)_proj", r".*(?<=attn\.)[qk]_proj", r"(?s).*", r"(?x) .* q_proj ", r"\w+",
    r".*\d{2,}.*", r"(?:.*\.)?c_(attn|fc)", r".*\Z", r"(.)\1*b", r"a{,3}b", r"a{,}b", r"a{2,}b", r"a{3}b",
    r".*?\.q_proj", r"(?:.*\.)?h\.(?:\d{1,2})\..*", r"|".join(rf"h\.{i}\.\d{{1,3}}\..*" for i in range(40)),
    r"(\w+\.)+attn\.(\w+)+", r".{0,1000}_proj", r"(?:\w{1,20}\.){2,6}\w{1,20}",
    r"[a-z_.0-9]*", r"[\w.]+", r".*[.]q_proj", r"c_attn|c_fc", r"", r".*\bproj", r".*_proj\b", r"(?i:H)\.0\..*",
    r"h|layers",
    r"(?#all of them).*", r"(a)?(?(1)a*b|lm_head)", r"[^\d]+", r".*\.[0-9]\..*", r"x\.\{\}",
    # To `regex` these are errors of so many letters, classes of POSIX and sets of sets; to `re` characters.
    "a{e}", "a{i}", "lm_heat{e<=1}", "a{1}", "(?:lm_hea){e}", "x.{}", "a{ 1 }", "{", "a{1,2", "[{e}]*", "a[{]e}",
    r"[[:alpha:]]", "[[:alpha:]]*", "[[]:alpha:]*", r"[\[a]*", "[a||b]*", "[a--b]*", "[a&&b]*", "[]h]*", "[^]h]",
    r"[\]h]*",
    r"\N{LATIN SMALL LETTER E WITH ACUTE}", r"\{", "(?i)k.q_proj", "(?i)s", "(?i)ſ", "(?i)é", "$", "^", "a$", "a\\n?",
]  # fmt: skip
AROUND = [None, r"(.*\.)?({})$", r"(?:.*?\.)??{}\.(?P<block>\d+)\."]


def by_re(expression, around, name):
    """What `re` makes of it: its groups, None for no match, "error" for what is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            re.compile(expression)
            if around is None:
                match = re.fullmatch(expression, name)
            else:
                match = re.match(around.replace("{}", expression), name)
        except re.error:
            return "error"
    return None if match is None else (match[0], match.groupdict())


def by_matcher(expression, around, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = Matcher("field", around).first([expression], name)
        except ValueError:
            return "error"
    return None if found is None else (found[1][0], found[1].groupdict())


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("expression", WRITTEN)
def test_an_expression_means_what_re_takes_it_for(expression, around):
    for name in NAMES:
        assert by_matcher(expression, around, name) == by_re(expression, around, name), name


pieces = st.sampled_from([
    "a", "b", ".", "e", "{", "}", "{e}", "{1,2}", "{,2}", "[ab]", "[^a]", "[[:alpha:]]", "[", "]", "(", ")", "(?:",
    "(?=", "(?!", "(?<=", "|", "*", "+", "?", "*?", r"\d", r"\w", r"\b", "^", "$", "(?i)", r"\1", r"\{", "&&", "--",
    "||", "~~", ":", "<", "=", "1", r"\p{L}", r"\m", r"\X", "(?|", "(?R)",
])  # fmt: skip


@given(st.lists(pieces, max_size=7).map("".join), st.sampled_from(AROUND), st.text(alphabet="abe1{}[]:.", max_size=5))
@example("(?:a{e})", None, "a{e}")
@example("[[:alpha:]]", None, "l]")
def test_any_expression_means_what_re_takes_it_for(expression, around, name):
    assert by_matcher(expression, around, name) == by_re(expression, around, name)


def test_the_first_of_several_expressions_is_found():
    matcher = Matcher("field")
    assert matcher.first(["b", "a.*", ".*"], "ab")[0] == "a.*"
    assert matcher.first([], "ab") is None and matcher.first(["b"], "ab") is None


# What would never end, or never fit.

ENDLESS = ["(.+)+x", ".*.*.*.*.*.*.*.*.*.*x", "(.*)*x", "(a|aa)+$", "((a+)+)+x", "(.*.*)*x", "(?:.?){60}x{30}y",
           "(.|..|...)+x", r"(\w+\.?)+x", "(?=(.+)+x)", "(a?){50}a{50}b", "(.+?)+?x"]  # fmt: skip
# It holds the last letter of each of them, without which `regex` would not begin to search.
LONG_NAME = "base_model.model.x.y.b.transformer.h.0.attn.c_attn" + 40 * "a"


def bounded(work):
    """`work()` ends, and uses no more of the processor than a Matcher may: a time limit, not a measurement."""
    start = time.process_time()
    result = work()
    assert time.process_time() - start < 10 * patterns.SECONDS
    return result


@pytest.mark.parametrize("expression", ENDLESS)
def test_what_would_not_end_is_refused_with_its_field_and_the_remedy(expression, monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.1)
    names = [f"{LONG_NAME}{i}" for i in range(20)]
    try:
        assert bounded(lambda: find_targets([*names, "x"], expression))
    except ValueError as error:
        slow = f"target_modules {expression!r} takes too long to match: write an expression without repetitions"
        assert str(error).startswith((slow, f"target_modules [{expression!r}] match no Linear layer"))


def test_of_the_endless_some_are_refused(monkeypatch):
    """So that the test above does not pass because nothing is endless. `regex` sees through most of them."""
    monkeypatch.setattr(patterns, "SECONDS", 0.02)
    refused = 0
    for expression in ENDLESS:
        try:
            Matcher("field").first([expression], LONG_NAME)
        except ValueError:
            refused += 1
    assert refused >= 2


def test_many_names_have_the_time_of_one_together(monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.05)
    names = [f"{LONG_NAME}{i}" for i in range(10_000)]
    config = LoRAConfig(2, 4, ["x"], rank_pattern={".*.*.*.*x": 3})
    config.r_of(names[0])
    with pytest.raises(ValueError, match="^rank_pattern '.*' takes too long"):
        bounded(lambda: check_speed(config, names))


@pytest.mark.parametrize("expression, problem", [
    ("(", r"'\(' is not a regular expression: missing \)"), ("(" * 5000 + ")" * 5000, "is too much for a regular expr"),
    ("a" * (LONGEST + 1), "has more than 10,000 characters; write a shorter one"),
    ("a{99999999999999999999}", "may have more than 200,000 characters with its repetitions written out"),
    ("a{" + 5000 * "9" + "}", "may have more than 200,000 characters with its repetitions written out"),
], ids=["no expression", "nested", "long", "repeated", "repeated by a long number"])  # fmt: skip
def test_what_cannot_be_read_is_refused(expression, problem):
    assert re.search(problem, problem_of([expression]))
    with pytest.raises(ValueError, match=f"^field .*{problem}") as refusal:
        check_expressions("field", ["ok", expression])
    assert len(str(refusal.value)) < 400
    with pytest.raises(ValueError, match="^field "):
        Matcher("field").first([expression], "a")
    with pytest.raises(ValueError, match=f"rank_pattern must be .* but .*{problem}"):
        LoRAConfig(2, 4, ["x"], rank_pattern={expression: 1})
    with pytest.raises(ValueError, match=f"target_modules .*{problem}"):
        find_targets(["a"], expression)


def test_expressions_that_are_too_many_are_refused():
    many = {f"a{i:06}" + 90 * "b": 1 for i in range(LONGEST_FIELD // 97 + 1)}
    repeated = {f"(a?){{{n}}}": 1 for n in range(5000, 5006)}
    for pattern in (many, repeated):
        with pytest.raises(ValueError, match="alpha_pattern must be .* but are more than 200,000 characters together"):
            LoRAConfig(2, 4, ["x"], alpha_pattern=pattern)


def test_a_flag_that_cannot_stand_inside_is_refused_by_name():
    """Python 3.11 takes (?i) at the start of an expression alone, and PEFT puts each key into a larger one."""
    config = LoRAConfig(2, 4, ["x"], rank_pattern={"(?i)Q_PROJ": 3})
    try:
        assert config.r_of("h.0.q_proj") == 3
    except ValueError as error:
        shown = r"rank_pattern '\(\?i\)Q_PROJ' cannot be matched by, where .* holds it: global flags"
        assert re.match(shown, str(error))


# Repetitions that are written out. Most of these would take more memory than any machine has: none is compiled.

LARGE = ["(?:(?:a{1000}){1000})", "(?:(?:(?:a{1000}){1000}){1000})", "((((a{99}){99}){99,}){99,100})", "(.{99999}){9}",
         "(" * 40 + "a" + ")+" * 40, "(?:" * 30 + "a" + "){1,}" * 30, "(?:" * 30 + "a" + ")+?" * 30,
         "(?x)" + "(" * 9 + "a" + ") # [(?#\n {9}" * 9, "(" + "a?" * 999 + "){999}", "a{9999}" * 99]  # fmt: skip


@pytest.mark.parametrize("expression", LARGE)
def test_what_would_fill_the_memory_is_refused_before_it_is_compiled(expression, monkeypatch):
    monkeypatch.setattr(regex, "compile", None)
    larger = "may have more than 200,000 characters with its repetitions written out; write one with smaller counts"
    with pytest.raises(ValueError, match=larger):
        LoRAConfig(2, 4, ["x"], rank_pattern={expression: 1})
    with pytest.raises(ValueError, match=larger):
        find_targets(["a"], expression)
    with pytest.raises(ValueError, match=larger):
        Matcher("field").first([expression], "a")


atoms = st.sampled_from(["a", ".", r"\d", r"\)", r"\{", "[)+{(]", "[]({9}]", "a|b"]).map(lambda text: (text, 1))
# What stands behind a part, and how many copies of the part `regex` makes of it.
COPIES = {"": 1, "*": 1, "?": 1, "*?": 1, "{,4}": 1, "{0,9}": 1, "+": 2, "+?": 2, "{1,}": 2, "{1,2}": 2, "{3}": 3,
          "{2,5}?": 3, "{17,}": 18, "{0099}": 99}  # fmt: skip
GAPS = ["", " ", "\n\t", "#(\n", "# ){3} [\n", "(?#(+)"]


def repeated(part, behind, gap):
    text, n = part
    return f"(?:{text}){gap}{behind}", n * COPIES[behind]


def in_a_row(parts):
    return "".join(text for text, _ in parts), sum(n for _, n in parts)


parts = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.builds(repeated, inner, st.sampled_from([*COPIES]), st.sampled_from(GAPS)),
        st.lists(inner, min_size=1, max_size=3).map(in_a_row),
    ),
    max_leaves=8,
)


def is_never_longer_than_it_is_taken_for(part):
    text, n = part
    re.compile(f"(?x){text}")
    assert patterns._written_out(f"(?x){text}") >= n


test_no_expression_is_longer_than_it_is_taken_for = given(parts)(is_never_longer_than_it_is_taken_for)


@pytest.mark.parametrize("part", ["(.)*", "((((a?)?)?)?)?", "()*", "(a*|b*)"])
def test_the_largest_that_is_allowed_takes_300_bytes_for_a_character(part, monkeypatch):
    monkeypatch.setattr(patterns, "LONGEST_FIELD", 20_000)
    body = f"(?:{40 * part})"
    sizes = [n for n in range(1, 1000) if problem_of([f"{body}{{{n}}}"]) is None]
    tracemalloc.start()
    try:
        regex.compile(f"{body}{{{max(sizes)}}}", regex.VERSION0, cache_pattern=False)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 100_000 < most < 300 * 20_000


# The planted bugs: each would be found by the tests above.


def test_without_the_translation_regex_reads_otherwise(monkeypatch):
    monkeypatch.setattr(patterns, "_as_re_means", lambda part: part[0])
    patterns._compiled.cache_clear()
    try:
        differing = [e for e in WRITTEN for name in NAMES if by_matcher(e, None, name) != by_re(e, None, name)]
    finally:
        patterns._compiled.cache_clear()
    assert {"a{e}", "[[:alpha:]]"} <= set(differing)


def no_copies_for_a_plus(count, copies=patterns._copies):
    return 1 if count["least"] is None else copies(count)


def no_loop_behind_the_copies(count):
    return 2 if count["least"] is None else max(int(count["least"] or 0), 1)


def no_copies_of_groups(count, copies=patterns._copies):
    return 1 if count["group"] else copies(count)


@pytest.mark.parametrize("bug", [no_copies_for_a_plus, no_loop_behind_the_copies, no_copies_of_groups])
def test_a_wrong_number_of_copies_is_found(bug, monkeypatch):
    nested = ("a", 1)
    for behind in 15 * ["{3}", "+", "{1,2}"]:
        nested = repeated(nested, behind, " ")
    is_never_longer_than_it_is_taken_for(nested)
    monkeypatch.setattr(patterns, "_copies", bug)
    with pytest.raises(AssertionError):
        is_never_longer_than_it_is_taken_for(nested)
