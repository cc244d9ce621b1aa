"""Reads a file of text, or of rows as people keep them in JSON lines. Knows nothing of tokens."""

from collections import namedtuple

from ..disk.checks import each_key_once, listed, parse_json
from ..disk.reading import LARGEST_DATA, read_bytes

# What a row of a file holds: the keys that it must have, and those that it may have besides.
Schema = namedtuple("Schema", "keys optional")
MESSAGES = Schema(("messages",), ())
ANSWER = Schema(("prompt", "answer"), ())
COMPLETION = Schema(("prompt", "completion"), ())
INSTRUCTION = Schema(("instruction", "output"), ("input",))
TEXT = Schema(("text",), ())
# A row is of the first of these whose keys it has: in data sets that have been prepared for one
# program, "text" often repeats what the other keys say.
SCHEMAS = (MESSAGES, ANSWER, COMPLETION, INSTRUCTION, TEXT)

# What may be done with rows that are longer than a model's context.
TOO_LONG = ("cut", "drop")

ONE_LINE = (
    'one line is {"prompt": "...", "answer": "..."}, or an object with the keys prompt and '
    "completion; instruction, input and output; messages; or text"
)
ONE_MESSAGE = 'one message is {"role": "user", "content": "..."}'
# Keys that change what a conversation is, in a way that no template here is told of.
TOOLS = ("tools", "functions", "tool_calls", "function_call")
ASSISTANT = "assistant"


def read_text(path):
    """The text of a UTF-8 file, whose line ends become newlines.

    Raises: ValueError if it is empty, or with the position of the first byte that is not UTF-8.
    """
    try:
        text = read_bytes(path, LARGEST_DATA).decode()
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


def read_rows(path, log=print):
    """(schema, rows) of a file of JSON lines: one of SCHEMAS, and a dict of its keys for each line.

    Each line is of the same schema. Keys beside those of the schema are left out, and `log` is
    given one line that names them. Blank lines at the end are no rows.
    Raises: ValueError that names the line, if it is not JSON, if it is of another schema or of
    none, if a key is repeated, or if a value is not what its key stands for.
    """
    lines = read_text(path).rstrip().split("\n")
    rows = []
    ignored = {}
    schema = None
    for number, line in enumerate(lines, 1):
        where = line_name(path, number)
        fields = _json(line, where)
        found = _schema(fields, where)
        if schema is None:
            schema = found
        if found != schema:
            raise ValueError(
                f"{where} holds {listed(found.keys, 9)}, and line 1 {listed(schema.keys, 9)}: a "
                "file has rows of one kind; split it into one for each"
            )
        rows.append(_row(fields, schema, where, ignored))
    if ignored:
        log(f"{path}: ignored, and not learned: {listed(ignored, most=8)}")
    return schema, rows


def line_name(path, number):
    """A line of a file, for a message."""
    return f"{path}, line {number}"


def _schema(fields, where):
    """The schema of one line."""
    if not isinstance(fields, dict):
        raise ValueError(f"{where} holds {type(fields).__name__}; {ONE_LINE}")
    for schema in SCHEMAS:
        if fields.keys() >= set(schema.keys):
            return schema
    raise ValueError(f"{where} holds {sorted(fields)}; {ONE_LINE}")


def _row(fields, schema, where, ignored):
    """The values of a line under the keys of its schema; `ignored` is given the other keys."""
    row = {}
    for key, value in fields.items():
        if key in TOOLS and value:
            raise ValueError(f"{where}: {key} are not supported; leave such rows out")
        if key not in schema.keys + schema.optional:
            ignored[key] = None
        elif key == "messages":
            row[key] = _messages(value, where, ignored)
        elif key in schema.optional:
            row[key] = _text(key, "" if value is None else value, where)
        elif value == "":
            raise ValueError(f"{where}: {key} must not be empty; {ONE_LINE}")
        else:
            row[key] = _text(key, value, where)
    return row


def _text(key, value, where):
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key} must be a text, got {value!r:.80}; {ONE_LINE}")
    return value


def _messages(messages, where, ignored):
    """[{"role": ..., "content": ...}] of a conversation, in which the assistant says something."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(
            f"{where}: messages must be a list of some, got {messages!r:.80}; {ONE_MESSAGE}"
        )
    said = [_message(m, f"{where}: message {i}", ignored) for i, m in enumerate(messages, 1)]
    if not any(message["role"] == ASSISTANT for message in said):
        roles = listed(dict.fromkeys(message["role"] for message in said), most=6)
        raise ValueError(
            f"{where}: no message is the assistant's, of whom this learns; their roles are {roles}"
        )
    return said


def _message(message, where, ignored):
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise ValueError(f"{where} is {message!r:.80}; {ONE_MESSAGE}")
    for key, value in message.items():
        if key in TOOLS and value:
            raise ValueError(f"{where}: {key} are not supported; leave such rows out")
        if key not in ("role", "content"):
            ignored[f"{key} of a message"] = None
        elif not isinstance(value, str):
            raise ValueError(f"{where}: {key} must be a text, got {value!r:.80}; {ONE_MESSAGE}")
    if not message["role"] or (message["role"] == ASSISTANT and not message["content"]):
        raise ValueError(f"{where}: a role, and what the assistant says, must not be empty")
    return {"role": message["role"], "content": message["content"]}


def _json(line, where):
    if not line.strip():
        raise ValueError(f"{where} is not JSON (a blank line); {ONE_LINE}")
    try:
        return parse_json(line, object_pairs_hook=each_key_once)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({error}); {ONE_LINE}") from None
