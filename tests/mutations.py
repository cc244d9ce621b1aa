"""Ways to spoil a file: its bytes, its JSON, the header of its tensors, its text, or the file itself.

`spoil` draws one. Each writes the file anew and returns what it did, in a few words. A generator decides everything.
"""

import json
import os
import re
import socket
from pathlib import Path

import numpy as np

from minilora.disk.tensor_file import DIGESTS

ESCAPES = ("\x1b]0;pwned\x07\x1b[2J", "\x9b31mred", "a\u202eb", "one\ntwo\nthree\nfour\nfive\nsix\nseven\neight", "\0",
           "\r\x1b[1A", "a\u2028b\u200fc\u061c")  # fmt: skip
# A file whose length says more than it holds: this much of nothing, in bytes.
SPARSE = 300 << 20
# Values that JSON has, and some that only Python's reader takes.
VALUES = (None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, -(2**63), 10**19, 10**400, -(10**400), 0.5, -0.0, 1e-320,
          1e308, -1e308, float("nan"), float("inf"), -float("inf"), "", " ", "x", "null", "0", "1", "..", "/", "a/b",
          "x" * 3000, *ESCAPES, [], {}, [[]], [None], [0], [1, 2, 3], ["q_proj"], [1, "a", None, {}], {"": None},
          {"a": 1}, {"a": {"b": []}}, [[[[[[[[1]]]]]]]], "q_proj", "all-linear", "(.+)+x", "(", "(?i)Q_PROJ", ".*",
          "(?:(?:(?:a{999}){999}){999})", "(" * 40 + "a" + ")+" * 40,
          ".*.*.*.*.*.*.*.*.*.*x", "(" * 300 + ")" * 300, "\ud800", "float64", "float8_e4m3fn", "gpt2", "llama",
          "LlamaForCausalLM", "rope", "nf4", "gelu", list(range(2000)))  # fmt: skip
# What json.dumps cannot write: as text, in the place of a value.
TEXTS = ("[" * 100_000 + "]" * 100_000, '{"a":' * 50_000 + "1" + "}" * 50_000, "1" * 5000, "-" + "9" * 5000, "1e999",
         "01", "tru", "'x'", '"\x1b[2J"', '"\\ud800"', '{"a": 1, "a": 2}', "NaN", "-Infinity", "0x10", "",
         "[1, 2", '"open', "1" + "0" * 300 + ".5", "1e-99999")  # fmt: skip
WORDS = ("{% for i in range(10**9) %}x{% endfor %}", "{{ 'x' * 10**9 }}", "{{ messages|length ** 9999999 }}",
         "{% if %}", "{{ ''.__class__.__mro__ }}", "{{ raise_exception('\x1b[2J') }}", "{{ undefined.field }}",
         "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "{{ messages[9].content }}", "{% include 'x' %}",
         "<|im_end|>", "<s>", "\x1b[2J", "\0", "\ufeff", "\u202e", "a" * 20_000, "\n" * 3000, "é" * 999, "😀",
         "#version: 0.2\n", "Ġ t", "{", '{"prompt": 1}\n', "[]\n", "null\n")  # fmt: skip
# Fields that a file may have, and ours have not.
FIELDS = ("use_dora", "bias", "quantization_config", "auto_map", "__metadata__", "format")
# Files of any length.
DATA = ("t.txt", "q.jsonl", "chats.jsonl")
MARK = "\ue000"


def pick(rng, things):
    """One of `things`, all alike."""
    return things[int(rng.integers(len(things)))]


def spoil(rng, path, others):
    """Spoil the file at `path`, a Path; returns what was done. `others` are files that may take its place."""
    draw = rng.random()
    if path.stat().st_size >= SPARSE:
        return f"{path} as it is"
    if draw < 0.06:
        return _no_file(rng, path)
    if draw < 0.10 and others:
        return _swapped(rng, path, others)
    if path.suffix == ".json" and draw < 0.8:
        return _spoil_json(rng, path)
    if path.suffix == ".jsonl" and draw < 0.7:
        return _spoil_line(rng, path)
    if path.suffix == ".safetensors" and draw < 0.75:
        return _spoil_tensors(rng, path)
    if path.suffix == ".gguf" and draw < 0.8:
        return _spoil_gguf(rng, path)
    if path.suffix in (".txt", ".jinja", ".toml") and draw < 0.6:
        return _spoil_text(rng, path)
    return _spoil_bytes(rng, path, 0, path.stat().st_size)


# The file itself.


def _no_file(rng, path):
    """Something else where the file was."""
    kinds = ["pipe", "folder", "link to a folder", "dangling link", "link to itself", "link to /dev/zero",
             "link to /dev/null", "socket", "nothing", "empty", "link to a copy elsewhere", "sparse"]  # fmt: skip
    if path.name in DATA:
        # Whoever gives much to learn from may expect that it takes memory.
        kinds.remove("sparse")
    kind = pick(rng, kinds)
    content = path.read_bytes()
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link to a folder":
        path.symlink_to(".")
    elif kind == "dangling link":
        path.symlink_to("nowhere")
    elif kind == "link to itself":
        path.symlink_to(path.name)
    elif kind.startswith("link to /dev"):
        path.symlink_to(kind.removeprefix("link to "))
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            # Its name has at most 108 bytes, and paths of temporary folders are longer.
            here = os.getcwd()
            os.chdir(path.parent)
            listener.bind(path.name)
            os.chdir(here)
    elif kind == "empty":
        path.touch()
    elif kind == "link to a copy elsewhere":
        elsewhere = Path("elsewhere")
        elsewhere.write_bytes(content)
        path.symlink_to(os.path.relpath(elsewhere, path.parent))
    elif kind == "sparse":
        path.write_bytes(content)
        os.truncate(path, SPARSE)
    return f"{path} is {kind}"


def _swapped(rng, path, others):
    """Another file's bytes under this name."""
    other = pick(rng, others)
    # Not a copy by the system: a link may have made the two one file.
    path.write_bytes(other.read_bytes())
    return f"{path} is {other}"


# Bytes.


def _spoil_bytes(rng, path, start, stop):
    """Change bytes from `start` on, before `stop`."""
    content = bytearray(path.read_bytes())
    place = min(start + int(rng.integers(max(1, stop - start))), max(0, len(content) - 1))
    length = int(rng.integers(1, 64))
    kind = pick(rng, ["bit", "bit", "byte", "byte", "cut", "zeros", "ones", "doubled", "inserted", "removed", "tail",
                      "number"])  # fmt: skip
    if not content:
        kind = "inserted"
    if kind == "bit":
        content[place] ^= 1 << int(rng.integers(8))
    elif kind == "byte":
        content[place] = int(rng.integers(256))
    elif kind == "cut":
        del content[place:]
    elif kind == "zeros":
        content[place : place + length] = bytes(length)
    elif kind == "ones":
        content[place : place + length] = b"\xff" * length
    elif kind == "doubled":
        content = content * 2
    elif kind == "inserted":
        content[place:place] = rng.bytes(length)
    elif kind == "removed":
        del content[place : place + length]
    elif kind == "tail":
        content += rng.bytes(length)
    elif kind == "number":
        number = pick(rng, [0, 1, 2**31 - 1, 2**32 - 1, 2**62, 2**63, 2**64 - 1])
        content[place : place + 8] = number.to_bytes(8, "little")
    path.write_bytes(content)
    return f"{path}: {kind} at byte {place}"


# Texts.


def _spoil_text(rng, path):
    """Put an odd piece into a text, or turn its lines about."""
    text = path.read_text(encoding="utf-8", errors="surrogateescape")
    lines = text.splitlines(keepends=True)
    kind = pick(rng, ["word"] * 3 + ["line out", "line twice", "lines turned", "one line", "no text", "UTF-16"])
    place = int(rng.integers(len(text) + 1))
    number = int(rng.integers(len(lines))) if lines else 0
    if kind == "word":
        word = pick(rng, WORDS)
        text = text[:place] + word + text[place:]
        kind = f"{word[:30]!a} put in"
    elif kind == "line out":
        text = "".join(lines[:number] + lines[number + 1 :])
    elif kind == "line twice":
        text = "".join(lines[:number] + lines[number : number + 1] + lines[number:])
    elif kind == "lines turned":
        text = "".join(reversed(lines))
    elif kind == "one line":
        text = text.replace("\n", " ")
    elif kind == "no text":
        text = "\n" * int(rng.integers(4))
    encoding = "utf-8" if kind != "UTF-16" else "utf-16"
    path.write_bytes(text.encode(encoding, errors="surrogatepass"))
    return f"{path}: {kind}"


def _spoil_line(rng, path):
    """Spoil the JSON of one line."""
    lines = path.read_bytes().splitlines(keepends=True)
    number = int(rng.integers(len(lines))) if lines else 0
    try:
        value = json.loads(lines[number])
    except (ValueError, IndexError, RecursionError):
        return _spoil_bytes(rng, path, 0, path.stat().st_size)
    value, what = spoilt_value(rng, value)
    lines[number] = as_text(value) + b"\n"
    path.write_bytes(b"".join(lines))
    return f"{path}, line {number + 1}: {what}"


# JSON.


def _spoil_json(rng, path):
    """Spoil one place of a JSON file."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return _spoil_bytes(rng, path, 0, path.stat().st_size)
    value, what = spoilt_value(rng, value)
    content = as_text(value)
    if rng.random() < 0.02:
        content = content.decode().encode("utf-16")
        what += ", in UTF-16"
    path.write_bytes(content)
    return f"{path}: {what}"


def spoilt_value(rng, value):
    """(the JSON `value` with one place spoilt, what was done)."""
    places = [(None, None, "all of it")]
    inner, where = value, ""
    while isinstance(inner, (dict, list)) and inner:
        key = pick(rng, list(inner)) if isinstance(inner, dict) else int(rng.integers(len(inner)))
        where = f"{where}.{key}"
        places.append((inner, key, where))
        inner = inner[key]
        # What stands deep is found as often as what stands high.
        if rng.random() < 0.3:
            break
    container, key, where = places[-1] if rng.random() < 0.97 else places[0]
    where = where[-80:]
    if container is None:
        new, what = odd_value(rng, value)
        return new, f"{where} {what}"
    return value, f"{where} {_spoil_place(rng, container, key, places)}"


def _spoil_place(rng, container, key, places):
    """Change what stands under `key`; returns what was done."""
    kind = pick(rng, ["value"] * 8 + ["gone", "gone", "renamed", "twice", "new", "wrapped", "above"])
    old = container[key]
    if kind == "value":
        container[key], what = odd_value(rng, old)
        return what
    if kind == "gone":
        del container[key]
    elif kind == "wrapped":
        container[key] = pick(rng, [[old], {"a": old}, [old, old], str(old)[:4000]])
    elif kind == "above":
        # A whole branch in the place of a leaf.
        above = pick(rng, [place[0] for place in places if place[0] is not None])
        container[key] = json.loads(json.dumps(above))
    elif isinstance(container, list):
        container.insert(key, odd_value(rng, old)[0])
        return "inserted"
    elif kind == "renamed":
        container[pick(rng, [*ESCAPES, "", key.upper(), f" {key}", "x" * 2000])] = container.pop(key)
    elif kind == "twice":
        # A mark that as_text takes out again.
        container[f"{key}{MARK}"] = odd_value(rng, old)[0]
    elif kind == "new":
        container[pick(rng, [*ESCAPES, *FIELDS])] = odd_value(rng, old)[0]
    return kind


def odd_value(rng, old):
    """(a value in the place of `old`, what it is)."""
    draw = rng.random()
    if draw < 0.25 and isinstance(old, (int, float)) and not isinstance(old, bool):
        options = [old + 1, old - 1, -old, old * 2, float(old), str(old), old * 10**6, old / 3, old * 10**20]
        new = pick(rng, options)
    elif draw < 0.25 and isinstance(old, str):
        escape = pick(rng, ESCAPES)
        new = pick(rng, [old + escape, escape + old, old.upper(), old[:-1], old * 2, old[::-1], f"../{old}", [old]])
    elif draw < 0.25 and isinstance(old, list):
        new = pick(rng, [old * 2, old[:-1], old[::-1], [], old * 500 if len(old) < 9 else old[:1]])
    elif draw < 0.35:
        number = int(rng.integers(len(TEXTS)))
        return f"{MARK}{number}{MARK}", f"= {TEXTS[number][:20]!a}"
    else:
        new = pick(rng, VALUES)
    return new, f"= {new!a:.40}"


def as_text(value):
    """The JSON of a spoilt value, with TEXTS where their marks stand."""
    text = json.dumps(value)
    text = re.sub(r'"\\ue000(\d+)\\ue000"', lambda found: TEXTS[int(found[1])], text)
    return text.replace("\\ue000", "").encode("utf-8", errors="surrogatepass")


# Tensors.


def header_of(content):
    """(the JSON before the data, the data) of a safetensors file's bytes."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(text, data):
    """The bytes of a safetensors file with the header `text`."""
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def without_metadata(path):
    """Leave the tensors of a file as other programs write them: nothing of ours travels with them."""
    header, data = header_of(path.read_bytes())
    header["__metadata__"] = {"format": "pt"}
    path.write_bytes(with_header(json.dumps(header).encode(), data))


def _spoil_tensors(rng, path):
    """Spoil the header, what JSON the metadata hold, or numbers."""
    try:
        header, data = header_of(path.read_bytes())
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        # It has been spoilt before.
        return _spoil_bytes(rng, path, 0, path.stat().st_size)
    kind = pick(rng, ["header", "header", "metadata", "metadata", "numbers", "names", "bytes"])
    metadata = header.get("__metadata__")
    if isinstance(metadata, dict) and rng.random() < 0.8:
        # With its digests any change is told at once, and what reads it is never reached.
        metadata.pop(DIGESTS, None)
    if kind == "metadata" and isinstance(metadata, dict) and metadata:
        what = _spoil_metadata(rng, metadata)
    elif kind == "numbers" and len(data) >= 8:
        data, what = _odd_numbers(rng, data)
    elif kind == "names" and len(header) > 1:
        old = pick(rng, [name for name in header if name != "__metadata__"] or list(header))
        new = pick(rng, [f"{old}{pick(rng, ESCAPES)}", old.replace("lora_A", "lora_X"), f"{old}.default", old[:-1],
                         old.replace(".0.", ".9999999999."), "modules_to_save", ""])  # fmt: skip
        header[new] = header.pop(old)
        what = f"{old} is called {new[:60]!a}"
    elif kind == "bytes":
        return _spoil_bytes(rng, path, 0, path.stat().st_size - len(data))
    else:
        header, what = spoilt_value(rng, header)
    path.write_bytes(with_header(as_text(header), data))
    return f"{path}: header {what}"


def _spoil_metadata(rng, metadata):
    """One of the texts in the metadata: most hold JSON of their own."""
    key = pick(rng, sorted(metadata))
    if not isinstance(metadata[key], str):
        return f"{key} is no text"
    try:
        value = json.loads(metadata[key])
    except (ValueError, RecursionError):
        metadata[key] = pick(rng, ["", "x", "{}", *ESCAPES[:3], "1" * 5000])
        return f"{key} = {metadata[key][:30]!a}"
    value, what = spoilt_value(rng, value)
    metadata[key] = as_text(value).decode("utf-8", errors="replace")
    return f"{key}: {what}"


def _odd_numbers(rng, data):
    """(data with one or all numbers odd, what was done)."""
    numbers = np.frombuffer(data[: len(data) // 4 * 4], "<f4").copy()
    value = pick(rng, [np.nan, np.inf, -np.inf, 1e30, -1e30, 3e38, 1e-45, 0.0])
    if rng.random() < 0.3:
        numbers[:] = value
        return numbers.tobytes() + data[numbers.nbytes :], f"all numbers {value}"
    numbers[int(rng.integers(numbers.size))] = value
    return numbers.tobytes() + data[numbers.nbytes :], f"a number {value}"


def _spoil_gguf(rng, path):
    """Bytes where the file says something: at the beginning of a field or of what it says of a tensor."""
    content = path.read_bytes()
    marks = [found.start() for found in re.finditer(rb"(?:general|llama|tokenizer)\.[\w.]+|blk\.\d\.[\w.]+", content)]
    if not marks or rng.random() < 0.2:
        return _spoil_bytes(rng, path, 0, min(len(content), 6000))
    start = max(0, pick(rng, marks) - 8)
    end = re.compile(rb"[\w.]*").match(content, start + 8).end()
    # The length of the name, the name, its type, and the length or the first bytes of its value.
    place = pick(rng, [start, start + 8, end, end, end, end + 4, end + 4, end + 8])
    return _spoil_bytes(rng, path, place, place + pick(rng, [1, 4, 8, 24]))
