"""Files of text and of pairs: what is read, and what is refused with its place."""

import json
import re

import pytest

from minilora.training.text_files import read_pairs, read_text


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


# Pairs.


def test_each_line_is_a_prompt_and_an_answer(tmp_path):
    pairs = [("Q: one?\nA: ", "1"), ("Q: 3?\nA: ", "three of them"), (" leading", " \n\u2028 é")]
    lines = [json.dumps({"prompt": prompt, "answer": answer}) + "\n" for prompt, answer in pairs]
    assert read_pairs(written(tmp_path / "a.jsonl", "".join(lines))) == pairs


def test_the_order_of_the_keys_and_the_line_ends_do_not_matter(tmp_path):
    content = b'{"answer": "1",\t"prompt": "one"}\r\n{"prompt": "2", "answer": "3"}'
    assert read_pairs(written(tmp_path / "a.jsonl", content)) == [("one", "1"), ("2", "3")]


@pytest.mark.parametrize("line, complaint", [
    ("{'prompt'}", "is not JSON"),
    ("", "is not JSON (a blank line)"),
    ('{"prompt": "a", "answer": "b"} x', "is not JSON"),
    ("[" * 100_000, "is not JSON"),
    ('["a", "b"]', "holds list"),
    ('"a"', "holds str"),
    ("null", "holds NoneType"),
    ('{"prompt": "a"}', "holds ['prompt']"),
    ('{"prompt": "a", "answer": "b", "id": "c"}', "holds ['answer', 'id', 'prompt']"),
    ('{"prompt": "a", "prompt": "b", "answer": "c"}', "a key comes twice: ['prompt', 'prompt', 'answer']"),
    ('{"prompt": 1, "answer": "b"}', "prompt must be a text that is not empty, got 1"),
    ('{"prompt": "a", "answer": null}', "answer must be a text that is not empty, got None"),
    ('{"prompt": "", "answer": "b"}', "prompt must be a text that is not empty, got ''"),
    ('{"prompt": "a", "answer": ""}', "answer must be a text that is not empty, got ''"),
], ids=lambda part: part[:40])  # fmt: skip
def test_a_line_that_is_no_pair_is_refused_with_its_number(tmp_path, line, complaint):
    good = '{"prompt": "a", "answer": "b"}'
    path = written(tmp_path / "a.jsonl", f"{good}\n{line}\n{good}\n")
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 2.*{re.escape(complaint)}") as refusal:
        read_pairs(path)
    assert 'one line is {"prompt": "...", "answer": "..."}' in str(refusal.value)


def test_an_empty_file_of_pairs_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a\.jsonl is empty"):
        read_pairs(written(tmp_path / "a.jsonl", "\n\n"))
