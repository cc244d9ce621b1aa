"""Files of text and of rows: what is read, and what is refused with its place."""

import json
import re

import pytest

from minilora.training.text_files import (
    ANSWER,
    COMPLETION,
    INSTRUCTION,
    MESSAGES,
    TEXT,
    read_rows,
    read_text,
)


def written(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# Texts.


@pytest.mark.parametrize("content, text", [
    ("a\nb\n", "a\nb\n"),
    (b"\xef\xbb\xbfa\r\nb", "a\nb"),
    ("naïve 😀 \u2028", "naïve 😀 \u2028"),
], ids=["plain", "from Windows", "not ASCII"])  # fmt: skip
def test_a_text_is_read_as_it_stands(tmp_path, content, text):
    assert read_text(written(tmp_path / "a.txt", content)) == text


@pytest.mark.parametrize("content", [b"", b" \n\n", b"\xef\xbb\xbf"])
def test_an_empty_text_is_refused(tmp_path, content):
    with pytest.raises(ValueError, match=r"a\.txt is empty"):
        read_text(written(tmp_path / "a.txt", content))


def test_bytes_that_are_no_utf8_are_refused_with_their_position(tmp_path):
    with pytest.raises(ValueError, match=r"a\.txt: byte 4 \(0xe9\) is not UTF-8 .*save the file as UTF-8"):
        read_text(written(tmp_path / "a.txt", b"cafe\xe9 au lait"))


# Rows.


def read(path, said=None):
    """What is read of a file, and what is said of it."""
    said = [] if said is None else said
    return read_rows(path, said.append)


def jsonl(path, *rows):
    return written(path, "".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("schema, row", [
    (ANSWER, {"prompt": "Q: 3?\nA: ", "answer": " \n\u2028 é"}),
    (COMPLETION, {"prompt": "Q", "completion": "A"}),
    (INSTRUCTION, {"instruction": "Add", "input": "1 2", "output": "3"}),
    (INSTRUCTION, {"instruction": "Add", "output": "3"}),
    (INSTRUCTION, {"instruction": "Add", "input": "", "output": "3"}),
    (MESSAGES, {"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "b"}]}),
    (TEXT, {"text": "all of it"}),
], ids=["answer", "completion", "instruction", "no input", "empty input", "messages", "text"])  # fmt: skip
def test_a_row_is_read_as_people_keep_it(tmp_path, schema, row):
    said = []
    assert read(jsonl(tmp_path / "a.jsonl", row, row), said) == (schema, [row, row])
    assert said == []


def test_an_input_of_null_is_none(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"instruction": "Add", "input": None, "output": "3"})
    assert read(path) == (INSTRUCTION, [{"instruction": "Add", "input": "", "output": "3"}])


def test_the_order_of_the_keys_the_line_ends_and_blank_lines_at_the_end_do_not_matter(tmp_path):
    content = b'{"answer": "1",\t"prompt": "one"}\r\n{"prompt": "2", "answer": "3"}\n\n  \r\n'
    _, rows = read(written(tmp_path / "a.jsonl", content))
    assert rows == [{"prompt": "one", "answer": "1"}, {"prompt": "2", "answer": "3"}]
    assert [row["prompt"] for row in rows] == ["one", "2"]


def test_other_keys_are_left_out_and_named_once(tmp_path):
    said = []
    rows = [{"id": 1, "prompt": "a", "answer": "b", "text": "a b"}, {"prompt": "a", "answer": "b", "tags": []}]
    path = jsonl(tmp_path / "a.jsonl", *rows)
    _, rows = read(path, said)
    assert rows == [{"prompt": "a", "answer": "b"}] * 2
    assert said == [f"{path}: ignored, and not learned: id, text, tags"]


def test_other_keys_of_messages_are_left_out_and_named_once(tmp_path):
    said = []
    message = {"role": "assistant", "content": "b", "name": "x", "tool_calls": None}
    path = jsonl(tmp_path / "a.jsonl", {"messages": [message, message], "tools": []})
    _, rows = read(path, said)
    assert rows[0]["messages"] == [{"role": "assistant", "content": "b"}] * 2
    assert said == [f"{path}: ignored, and not learned: name of a message, tool_calls of a message, tools"]


@pytest.mark.parametrize("first, second, told", [
    ({"prompt": "a", "answer": "b"}, {"prompt": "a", "completion": "b"},
     "holds prompt, completion, and line 1 prompt, answer"),
    ({"text": "a"}, {"prompt": "a", "answer": "b", "text": "c"}, "holds prompt, answer, and line 1 text"),
    ({"instruction": "a", "output": "b"}, {"text": "c"}, "holds text, and line 1 instruction, output"),
])  # fmt: skip
def test_a_file_of_two_kinds_is_refused_with_the_line(tmp_path, first, second, told):
    with pytest.raises(ValueError, match=f"a.jsonl, line 3 {told}: a file has rows of one kind; split it"):
        read(jsonl(tmp_path / "a.jsonl", first, first, second))


@pytest.mark.parametrize("line, complaint", [
    ("{'prompt'}", "is not JSON"),
    ("", "is not JSON (a blank line)"),
    ('{"prompt": "a", "answer": "b"} x', "is not JSON"),
    ("[" * 100_000, "is not JSON"),
    ('["a", "b"]', "holds list"),
    ('"a"', "holds str"),
    ("null", "holds NoneType"),
    ('{"prompt": "a"}', "holds ['prompt']"),
    ('{"question": "a", "answer": "b"}', "holds ['answer', 'question']"),
    ('{"prompt": "a", "prompt": "b", "answer": "c"}', "the key 'prompt' comes twice"),
    ('{"prompt": 1, "answer": "b"}', "prompt must be a text, got 1"),
    ('{"prompt": "a", "answer": null}', "answer must be a text, got None"),
    ('{"prompt": "", "answer": "b"}', "prompt must not be empty"),
    ('{"prompt": "a", "answer": ""}', "answer must not be empty"),
    ('{"prompt": "a", "answer": "b", "tools": [1]}', "tools are not supported"),
], ids=lambda part: part[:40])  # fmt: skip
def test_a_line_that_is_no_row_is_refused_with_its_number(tmp_path, line, complaint):
    good = '{"prompt": "a", "answer": "b"}'
    path = written(tmp_path / "a.jsonl", f"{good}\n{line}\n{good}\n")
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 2.*{re.escape(complaint)}") as refusal:
        read(path)
    assert "tools" in line or 'one line is {"prompt": "...", "answer": "..."}, or an object with' in str(refusal.value)


@pytest.mark.parametrize("messages, complaint", [
    ([], "messages must be a list of some"),
    ("hello", "messages must be a list of some"),
    (["hello"], "message 1 is 'hello'"),
    ([{"role": "user"}], "message 1 is {'role': 'user'}"),
    ([{"role": "user", "content": [{"type": "text"}]}], "message 1: content must be a text"),
    ([{"role": "assistant", "content": None}], "message 1: content must be a text, got None"),
    ([{"role": "user", "content": "a"}], "no message is the assistant's, of whom this learns; their roles are user"),
    ([{"role": "assistant", "content": ""}], "a role, and what the assistant says, must not be empty"),
    ([{"role": "", "content": "a"}], "a role, and what"),
    ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [1]}],
     "message 2: tool_calls are not supported"),
])  # fmt: skip
def test_messages_that_are_none_are_refused_with_the_line_and_the_message(tmp_path, messages, complaint):
    good = {"messages": [{"role": "assistant", "content": "b"}]}
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 2: (message 1: )?{re.escape(complaint)}"):
        read(jsonl(tmp_path / "a.jsonl", good, {"messages": messages}))


def test_an_empty_file_of_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a\.jsonl is empty"):
        read(written(tmp_path / "a.jsonl", "\n\n"))
