"""Chat templates: rendered as transformers does, whatever a stranger wrote into them."""

import json
import tracemalloc

import pytest

from minilora.disk import template_sandbox, template_sizes
from minilora.disk.chat_template import ChatTemplate, read_special_texts, read_template, special_texts

CONVERSATION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello <é>"},
                {"role": "assistant", "content": "Hi"}]  # fmt: skip


def rendered(text, messages=CONVERSATION, specials=None, **options):
    return ChatTemplate(text, specials, "f.jinja").render(messages, **options)


# What transformers gives a template.


@pytest.mark.parametrize("text, result", [
    ("{% for m in messages %}\n  {% if m.role == 'user' %}\n{{ m['content'] }}\n  {% endif %}\n{% endfor %}",
     "Hello <é>\n"),
    ("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}", "<s>Be brief.</s>"),
    ("{{ unk_token }}.", "."),
    ("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% break %}{% endfor %}", "user"),
    ("{{ messages[1] | tojson }}", '{"role": "user", "content": "Hello <é>"}'),
    ("{{ {'a': 1} | tojson(indent=2) }}", '{\n  "a": 1\n}'),
    ("{{ strftime_now('%d') | length }}", "2"),
    ("{% if tools is none and documents is none %}none{% endif %}", "none"),
    ("{% if not tools %}{{ messages | length }}{% endif %}", "3"),
    ("{% set ns = namespace(n=0) %}{% for m in messages[::-1] %}{% set ns.n = ns.n + loop.index %}{% endfor %}"
     "{{ ns.n }}", "6"),
    ("{% macro say(m) %}{{ m.content | trim }}{% endmacro %}{{ say(messages[2]) }}", "Hi"),
    ("{{ messages | map(attribute='role') | join(', ') }}", "system, user, assistant"),
    ("{{ messages[1].content.split(' ')[0].upper().replace('L', 'l') ~ 1 ~ ('x' * 3) ~ '%s-%02d' % ('y', 7) }}",
     "HEllO1xxxy-07"),
    ("{% for a, (b, c) in [(1, (2, 3))] %}{{ a + b * c }}{{ loop.last }}{{ loop.length }}{% endfor %}", "7True1"),
    ("{% for m in messages | rejectattr('role', 'equalto', 'system') %}{{ loop.length }}{% endfor %}", "22"),
    ("{% generation %}{{ messages[2].content }}{% endgeneration %}", "Hi"),
    ("one line\n", "one line"),
], ids=lambda part: part[:30])  # fmt: skip
def test_a_template_has_what_transformers_gives_it(text, result):
    assert rendered(text, specials={"bos_token": "<s>", "eos_token": "</s>"}) == result


@pytest.mark.parametrize("add", [False, True])
def test_the_generation_prompt_is_asked_for(add):
    assert rendered("{{ add_generation_prompt }}", add_generation_prompt=add) == str(add)


def test_what_the_assistant_wrote_is_marked():
    source = "{% for m in messages %}{{ m.role }}: {% generation %}{{ m.content }}{% endgeneration %}.{% endfor %}"
    template = ChatTemplate(source)
    text, spans = template.render_marked(CONVERSATION[1:])
    assert text == "user: Hello <é>.assistant: Hi."
    assert [text[start:stop] for start, stop in spans] == ["Hello <é>", "Hi"]
    assert ChatTemplate("{{ messages[0].content }}").render_marked(CONVERSATION) == ("Be brief.", None)
    assert ChatTemplate("{% if no %}{%- generation -%}{% endgeneration %}{% endif %}").render_marked([]) == ("", [])


# Where it comes from.


def folder_with(tmp_path, jinja=None, **settings):
    if settings:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    if jinja is not None:
        (tmp_path / "chat_template.jinja").write_bytes(jinja)
    return tmp_path


@pytest.mark.parametrize("jinja, settings, text", [
    (None, {}, None),
    (None, {"eos_token": "</s>"}, None),
    (None, {"chat_template": "one {{ eos_token }}", "eos_token": "</s>"}, "one </s>"),
    (b"two {{ eos_token }}\r\nx", {"chat_template": "one", "eos_token": {"content": "</s>"}}, "two </s>\nx"),
    (None, {"chat_template": [{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}]}, "yes"),
])  # fmt: skip
def test_a_template_is_found_in_either_file(tmp_path, jinja, settings, text):
    template = read_template(folder_with(tmp_path, jinja, **settings))
    assert text == (None if template is None else template.render([]))


@pytest.mark.parametrize("jinja, settings, told", [
    (b"\xff", {}, "chat_template.jinja is not UTF-8"),
    (b"{% for %}", {}, "chat_template.jinja: the chat template fails: Expected an expression"),
    (None, {"chat_template": 5}, "tokenizer_config.json: chat_template must be a text or a list of named ones, got 5"),
    (None, {"chat_template": [{"name": "rag", "template": "x"}]}, r"holds \['rag'\]; one must be named \"default\""),
    (None, {"chat_template": [{"name": "default"}]}, "must be a text"),
    (None, {"chat_template": [{"name": ["default"], "template": "x"}]}, r"holds \[\]; one must be named"),
    (None, {"chat_template": {"default": "x"}}, "must be a text or a list of named ones, got {'default'"),
    (None, {"chat_template": "{{"}, "tokenizer_config.json: the chat template fails"),
    (None, {"chat_template": "x", "eos_token": 5}, "tokenizer_config.json: eos_token must be the text of a token"),
])  # fmt: skip
def test_a_file_that_holds_no_template_is_named(tmp_path, jinja, settings, told):
    with pytest.raises(ValueError, match=told):
        read_template(folder_with(tmp_path, jinja, **settings))


def test_special_tokens_are_named_as_a_text_or_with_their_flags():
    stated = {"eos_token": "a", "bos_token": {"content": "b", "lstrip": True}, "pad_token": None, "add_bos_token": True,
              "model_max_length": 5, "image_token": "c", "video_token": 7}  # fmt: skip
    assert special_texts(stated, "f.json") == {"eos_token": "a", "bos_token": "b", "image_token": "c"}


@pytest.mark.parametrize("name", ["bos_token", "eos_token", "unk_token", "pad_token"])
@pytest.mark.parametrize("value", [5, True, ["</s>"], {"x": 1}, {"content": None}, {"content": ["</s>"]}, "\ud800"])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_special_token_that_is_no_text_is_refused(tmp_path, file, name, value):
    (tmp_path / file).write_text(json.dumps({name: value}))
    with pytest.raises(ValueError, match=f"{file}: {name} must be the text of a token, or an object with its content"):
        read_special_texts(tmp_path)


def test_special_tokens_of_the_map_are_those_that_the_settings_do_not_name(tmp_path):
    stated = {"bos_token": {"content": "<s>"}, "eos_token": "no", "pad_token": "no", "additional_special_tokens": ["x"]}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(stated))
    assert read_special_texts(tmp_path) == {"bos_token": "<s>", "eos_token": "no", "pad_token": "no"}
    folder_with(tmp_path, b"{{ bos_token }}x{{ eos_token }}{{ pad_token }}", eos_token="</s>", pad_token=None)
    assert read_special_texts(tmp_path) == {"bos_token": "<s>", "eos_token": "</s>"}
    assert read_template(tmp_path).render([]) == "<s>x</s>"


def test_a_map_that_is_damaged_is_named(tmp_path):
    (tmp_path / "special_tokens_map.json").write_text("[1]")
    with pytest.raises(ValueError, match="special_tokens_map.json: expected an object with fields, got list"):
        read_template(tmp_path)


# A stranger's template: it calls nothing, and it ends.


def grows(step, start="'ab'"):
    loop = "{% for i in range(90) %}{% set ns.x = " + step + " %}{% endfor %}"
    return "{% set ns = namespace(x=" + start + ") %}" + loop + "{{ ns.x }}"


# A namespace that holds another one twice.
NESTED = "{{% set n{0} = namespace() %}}{{% set n{0}.a = n{1} %}}{{% set n{0}.b = n{1} %}}"


def twice(step):
    """Two things that grow alike, and are compared at the end, which would take for ever."""
    steps = "".join("{% set ns." + x + " = " + step.format(f"ns.{x}") + " %}" for x in "xy")
    return "{% set ns = namespace(x=1, y=1) %}{% for i in range(60) %}" + steps + "{% endfor %}{{ ns.x == ns.y }}"


@pytest.mark.parametrize("text, told", [
    ("{{ raise_exception('only\nuser roles') }}", "only user roles"),
    ("{{ messages[9].content }}", "has no element 9"),
    ("{{ nothing.here }}", "'nothing' is undefined"),
    ("{{ 1 / 0 }}", "division by zero"),
    ("{{ messages[0].role + 1 }}", "can only concatenate str"),
    ("{% for i in 5 %}{% endfor %}", "'int' object is not iterable"),
    ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ("{{ messages.append(1) }}", "unsafe"),
    ("{{ cycler.__init__.__globals__ }}", "unsafe"),
    ("{{ open('x') }}", "'open' is undefined"),
    ("{% include 'other' %}", "no loader"),
    ("{{ lipsum() }}", "undefined"),
    ("{{ messages | random }}", "No filter"),
    ("{{ " + 5000 * "(" + " }}", "recursion"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ("{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}", "recursion"),
    ("{% for i in range(10000000) %}{% endfor %}", "100,000|100000"),
    ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "more than 300,000 steps"),
    ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}", "more than"),
    ("{% for i in range(9999) %}{% if 'a' * 999999 + 'b' in 'a' * 1999999 %}{% endif %}{% endfor %}", "more than"),
    ("{{ 'a' * 10**12 }}", "makes something of 1,000,000,000,000"),
    ("{{ 10**9 * 'a' }}", "makes something of"),
    ("{{ 2 ** 10000 ** 10 }}", "bits"),
    (grows("ns.x + ns.x"), "makes something of"),
    (grows("ns.x ~ ns.x"), "makes something of"),
    (grows("ns.x.replace('a', 'aaa')"), "makes something of"),
    (grows("ns.x | replace('a', 'aaa')"), "makes something of"),
    (grows("[ns.x, ns.x] | join('-')"), "makes something of"),
    (grows("'-'.join([ns.x, ns.x])"), "makes something of"),
    (grows("'%s%s' % (ns.x, ns.x)"), "makes something of"),
    (grows("'{}{}'.format(ns.x, ns.x)"), "makes something of"),
    (grows("ns.x * ns.x", "10"), "bits"),
    (grows("ns.x + ns.x", "[1]"), "makes something of"),
    (grows("[ns.x, ns.x]"), "makes something of"),
    (grows("(ns.x, ns.x)"), "makes something of"),
    (grows("{1: ns.x, 2: ns.x}"), "makes something of"),
    (grows("namespace(a=ns.x, b=ns.x)"), "makes something of|more than"),
    ("{% set ns = namespace() %}{% set ns.a = 'a' * 999999 %}{% set ns.b = ns.a %}{% set ns.c = ns.a %}{{ ns }}",
     "makes something of"),
    ("{% set n0 = namespace() %}" + "".join(NESTED.format(i, i - 1) for i in range(1, 60)) + "{{ n59 }}",
     "makes something of"),
    (twice("[{0}, {0}]"), "makes something of"),
    (twice("({0}, {0})"), "makes something of"),
    (twice("{{1: {0}, 2: {0}}}"), "makes something of"),
    ("{{ 'a' | center(10**10) }}", "more than 100,000"),
    ("{{ 'a'.center(10**10) }}", "more than 100,000"),
    ("{{ [1] | slice(10**10) | list }}", "more than 100,000"),
    ("{{ '%9999999999d' % 1 }}", "formats with"),
    ("{{ '%*d' % (99999, 1) }}", "formats with"),
    ("{{ '{:9999999999}'.format(1) }}", "formats with"),
    ("{{ ('a\n' * 100000) | indent(100000) }}", "makes something of"),
    ("{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", "makes something of"),
    ("{% set x %}{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}{% endset %}", "makes something of"),
    ("{{ (['a' * 99999] * 9999) | tojson }}", "makes something of"),
    (grows("ns.x + ns.x", "'ab'.encode()"), "makes something of"),
    (grows("ns.x * 9", "'ab'.encode()"), "makes something of"),
    (grows("ns.x.replace('a'.encode(), 'aaa'.encode())", "'ab'.encode()"), "makes something of"),
    ("{{ (('a' * 1000000).encode() * 300) | length }}", "makes something of"),
    ("{{ ('é' * 100000).encode('punycode') }}", "calls encode with 'punycode'"),
    ("{{ ('<!--' * 9) | e | attr('striptags') }}{{ ('a' | e).striptags() }}", "calls striptags"),
    ("{{ [1] | tojson(indent=17) }}", "indents JSON by more than 16"),
    ("{{ [1] | tojson(indent='xxxxxxxxxxxxxxxxx') }}", "indents JSON by more than 16"),
    ("{{ ('a' | e).translate({97: 'aa'}) }}", "calls translate"),
], ids=lambda part: part[:50])  # fmt: skip
def test_a_template_that_fails_loops_or_calls_out_is_one_line(text, told, monkeypatch):
    if told.endswith("more than"):
        # What takes all the time there is may as well have less.
        monkeypatch.setattr(template_sandbox, "MOST_SECONDS", 1)
    if "999999" not in text and "namespace(" in text:
        # What doubles at each turn is refused some turns sooner.
        monkeypatch.setattr(template_sizes, "LARGEST", 100_000)
    with pytest.raises(ValueError, match=f"^f.jinja: the chat template fails: .*({told})") as refusal:
        rendered(text)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 400


@pytest.mark.parametrize("text", [
    "{{ ('%(a)99999d' * 2000) % {'a': 1} }}",
    "{{ ('%99999d' * 2000) | format(1) }}",
    "{{ ('%.99999f' * 2000).encode() % 1 }}",
    "{{ ('{0:99999}' * 2000).format(1) }}",
    "{{ ('{a:99999}' * 2000).format_map({'a': 1}) }}",
    "{{ ('{0.items}' * 2000).format(cycler('a' * 99999)) }}",
    "{{ '{0[}]:{1}}'.format({'}': 1}, 99999) }}",
    "{{ ('%s' * 2000) % ((({'a': 'a' * 99999}).items(),) * 2000) }}",
    "{{ ('a\n' * 2000) | indent('x' * 100000) }}",
    "{{ ('a\n' * 2000) | indent(width='x' * 100000) }}",
    "{{ ('a\u2028' * 2000) | indent(blank=true, width='x' * 100000) }}",
    "{{ range(2000) | list | tojson(indent=100000) }}",
    "{{ range(2000) | list | tojson(indent='x' * 100000) }}",
    "{{ range(2000) | list | tojson(separators=('x' * 100000, ':')) }}",
    "{{ range(2000) | join('x' * 100000) }}",
    "{{ range(2000) | map('string') | join(d='x' * 100000) }}",
    "{{ ('x' * 100000).join(range(2000) | map('string')) }}",
    "{{ (['a'] * 2000) | replace('a', 'x' * 100000) }}",
    "{{ ('a' * 2000) | replace(new='x' * 100000, old='a') }}",
    "{{ ('a'.encode() * 2000).replace('a'.encode(), ('x' * 100000).encode()) }}",
    "{{ range(2000) | map('center', 99999) | list }}",
    "{{ range(2000) | map('center', 99999) | sort | length }}",
    "{{ [2 ** 2000] * 99999 }}",
    "{{ ('a' * 1000000).encode() * 300 }}",
    "{% set ns = namespace(x={}.keys() - []) %}{% for i in range(99) %}"
    "{% set ns.x = ns.x.union(range(9999) | map('center', 100 + i)) %}{% endfor %}",
], ids=lambda part: part[:60])  # fmt: skip
def test_what_would_be_large_is_refused_before_it_is_made(text):
    template = ChatTemplate(text)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="makes something of|formats with|indents JSON"):
            template.render([])
        assert tracemalloc.get_traced_memory()[1] < 60e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("text, result", [
    ("{% for i in [1] %}{% set x = 'a' * 1000000 %}{{ '{}{}{}'.format(1, 2, 3) }}{{ 'a'.encode() }}{% endfor %}",
     "123b'a'"),
    ("{{ 'é'.encode() | length }}{{ 'é'.encode('UTF-8').decode() }}", "2é"),
    ("{{ ['a', 'b'] | join }}{{ messages | join(', ', attribute='role') }}", "absystem, user, assistant"),
    ("{{ ['a', 'b'] | map('upper') | join('-') }}{{ '-'.join(['a'] | map('upper')) }}", "A-BA"),
    ("{{ messages | map(attribute='role') | unique | list }}", "['system', 'user', 'assistant']"),
    ("{{ nothing | map('upper') | list }}{{ nothing | join }}{{ [] | select | list }}", "[][]"),
    ("{% for pair in [1, 2, 3] | batch(2, 0) %}{{ pair }}{% endfor %}", "[1, 2][3, 0]"),
    ("{{ 'a\nb' | indent }}|{{ 'a\nb' | indent('> ', true) }}", "a\n    b|> a\n> b"),
    ("{{ {'b': [1, 'é'], 'a': none} | tojson(indent=4, sort_keys=true) }}",
     json.dumps({"b": [1, "é"], "a": None}, indent=4, sort_keys=True, ensure_ascii=False)),
    ("{{ {'a': [1, 2]} | tojson(separators=(',', ':')) }}{{ 'é' | tojson(ensure_ascii=true) }}",
     '{"a":[1,2]}"\\u00e9"'),
    ("{{ '%s is %05.1f' % ('x', 2) }}{{ '%s-%s' | format(1, 2) }}{{ '{:>4}{a:.2f}'.format('y', a=1) }}",
     "x is 002.01-2   y1.00"),
    ("{{ 'aXbX' | replace('X', '--') }}{{ 5551 | replace(5, 1, 2) }}{{ 'aa'.replace('a', 'b', 1) }}", "a--b--1151ba"),
], ids=lambda part: part[:40])  # fmt: skip
def test_what_stays_small_is_what_jinja_makes_of_it(text, result):
    assert rendered(text) == result


def test_a_search_that_returns_nothing_looks_at_the_clock(monkeypatch):
    template = ChatTemplate("{{ range(9) | select('in', []) | list }}")
    steps = []
    monkeypatch.setattr(template_sandbox.Environment, "step", lambda environment, n=1: steps.append(n))
    assert template.render([]) == "[]"
    assert steps.count(0) == 9


def test_a_long_conversation_stays_within_the_limits():
    inner = "{% for n in messages[:9] %}{{ n.role[0] | upper }}{% endfor %}{{ m.content | trim }}"
    nested = "{% for m in messages %}" + inner + "{% endfor %}"
    text = rendered(nested, [{"role": "user", "content": " x" * 300}] * 1000)
    assert len(text) == 1000 * (9 + 599)


def test_a_template_renders_as_often_as_it_is_asked():
    template = ChatTemplate("{% for i in range(99999) %}{% endfor %}{{ messages[0].content }}")
    assert [template.render(CONVERSATION) for _ in range(5)] == 5 * ["Be brief."]
