"""Reads a file of text, or of prompts and answers. Knows nothing of tokens."""

import json
from pathlib import Path

ONE_LINE = 'one line is {"prompt": "...", "answer": "..."}'


def read_text(path):
    """The text of a UTF-8 file, whose line ends become newlines.

    Raises: ValueError if it is empty, or with the position of the first byte that is not UTF-8.
    """
    try:
        text = Path(path).read_bytes().decode()
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(
            f"{path}: byte {error.start} ({byte:#04x}) is not UTF-8 ({error.reason}); "
            "save the file as UTF-8"
        ) from None
    # Windows begins a text with a mark, and ends a line with two characters.
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    if not text.strip():
        raise ValueError(f"{path} is empty; there is nothing to learn from it")
    return text


def read_pairs(path):
    """[(prompt, answer)], one for each line of a file: {"prompt": "...", "answer": "..."}.

    Raises: ValueError that names the line, if it is not JSON, if a key is missing, unknown or
    repeated, or if a side is empty or no text.
    """
    lines = read_text(path).removesuffix("\n").split("\n")
    return [_pair(line, line_name(path, number)) for number, line in enumerate(lines, 1)]


def line_name(path, number):
    """A line of a file, for a message."""
    return f"{path}, line {number}"


def _pair(line, where):
    """(prompt, answer) of one line."""
    fields = _json(line, where)
    if not isinstance(fields, dict):
        raise ValueError(f"{where} holds {type(fields).__name__}; {ONE_LINE}")
    if fields.keys() != {"prompt", "answer"}:
        raise ValueError(f"{where} holds {sorted(fields)}; {ONE_LINE}")
    for key, value in fields.items():
        if not isinstance(value, str) or not value:
            raise ValueError(
                f"{where}: {key} must be a text that is not empty, got {value!r:.80}; {ONE_LINE}"
            )
    return fields["prompt"], fields["answer"]


def _json(line, where):
    if not line.strip():
        raise ValueError(f"{where} is not JSON (a blank line); {ONE_LINE}")
    try:
        return json.loads(line, object_pairs_hook=_each_key_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({error}); {ONE_LINE}") from None


def _each_key_once(items):
    fields = dict(items)
    if len(fields) < len(items):
        raise ValueError(f"a key comes twice: {[key for key, _ in items]}")
    return fields
