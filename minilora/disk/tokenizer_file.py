"""A tokenizer.json of a stranger's: read here if it is ordinary, else first in another process.

The library `tokenizers` has no exceptions of its own: it raises bare ones, panics in Rust, and
some files make it end the whole process, or never come back. Such a file is read by a process that
nobody misses, before it is read here. Knows the file, no model.
"""

import base64
import json
import signal
import subprocess
import sys

from .checks import each_key_once, errors_name, library_errors, parse_json
from .gguf_vocabulary import SPLITS
from .reading import LARGEST_TOKENIZER, read_bytes

# Seconds of the processor that the other process may take, and as many more as the file has
# megabytes; and bytes of memory. Where a system knows no such limits, the seconds of the clock.
PROCESSOR_SECONDS = 3
MEMORY = 4 << 30
CLOCK_SECONDS = 60
# Ids of tokens stay below this, as the library's do.
MOST_TOKENS = 2**31
# The kinds of each part of an ordinary tokenizer: those of GPT-2, Llama, Qwen, Mistral, SmolLM.
_ORDINARY = {
    "normalizer": ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Prepend", "Replace", "Strip"),
    "pre_tokenizer": ("ByteLevel", "Digits", "Metaspace", "Split", "Whitespace", "WhitespaceSplit"),
    "decoder": ("ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace", "Strip"),
    "post_processor": ("ByteLevel", "TemplateProcessing"),
}
# The expressions at which texts are split, besides GPT-2's, which the library has.
_SPLITS = frozenset(split for split in SPLITS.values() if split is not None)
# What is tried: letters, digits, blanks, signs, other scripts, a word without an end.
_TEXTS = (
    "The quick brown fox\n\n  jumps; it doesn't cost 1,234.5 $.\t",
    "naïve café 字 русский \U0001f600\u200d\ufffd\x00",
    "a" * 1000,
    " " * 1000,
    "<s></s><|endoftext|><unk>",
)
# What the other process runs. It ends well unless it is ended.
_TRIAL = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
seconds, memory, texts = json.loads(sys.argv[2])
try:
    import resource
    limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_CPU: seconds, resource.RLIMIT_AS: memory}
    for kind, limit in limits.items():
        resource.setrlimit(kind, (limit, resource.getrlimit(kind)[1]))
except (ImportError, ValueError, OSError):
    pass
content = sys.stdin.buffer.read()
trials = []
def use(ids, bpe):
    bpe.decode(ids, skip_special_tokens=False)
def begin(content):
    from tokenizers import Tokenizer
    bpe = Tokenizer.from_buffer(content)
    bpe.no_truncation()
    bpe.no_padding()
    for text in texts:
        for adds in (False, True):
            encode = lambda text=text, adds=adds: bpe.encode(text, add_special_tokens=adds)
            trials.append(lambda encode=encode: use(encode().ids, bpe))
    for number in sorted(bpe.get_vocab().values())[:1000]:
        trials.append(lambda number=number: use([number], bpe))
trials.append(lambda: begin(content))
for number, trial in enumerate(trials):
    try:
        trial()
    except BaseException as error:
        # A text may be refused, but not by a panic.
        if number == 0 or not isinstance(error, Exception):
            text = str(error) or type(error).__name__
            sys.stdout.buffer.write(text.encode("utf-8", "replace"))
            break
"""


def read_tokenizer_file(path):
    """The `tokenizers.Tokenizer` in the tokenizer.json at `path`.

    Raises: ValueError that names the file if it is damaged, or if the library would end the process
    at it, or never come back. OSError if it cannot be read, or no other process can be started.
    """
    # Imported where it is used: whoever only trains or reads characters does not wait for it.
    from tokenizers import Tokenizer

    content = read_bytes(path, LARGEST_TOKENIZER)
    damaged = f"{path}: damaged, or of another kind"
    with errors_name(damaged):
        # The library might take another one of two equal keys than Python.
        fields = parse_json(content, object_pairs_hook=each_key_once)
        is_strange = not is_ordinary(fields)
        if is_strange:
            _check_charsmaps(fields)
    if is_strange:
        problem = _problem_of(path, content)
        if problem:
            raise ValueError(f"{damaged}: {problem}")
    with library_errors(damaged):
        return Tokenizer.from_buffer(content)


def is_ordinary(fields):
    """Is this the JSON of a tokenizer of a kind that is well known, without anything rare in it?"""
    if not isinstance(fields, dict) or not _is_ordinary_model(fields.get("model")):
        return False
    if not all(_is_ordinary_part(fields.get(part), part) for part in _ORDINARY):
        return False
    added = fields.get("added_tokens", [])
    is_list = isinstance(added, list) and all(isinstance(token, dict) for token in added)
    if not is_list or not all(isinstance(token.get("content"), str) for token in added):
        return False
    return _are_ids(token.get("id") for token in added)


def _is_ordinary_model(model):
    """Is it a BPE of plain tokens and pairs?"""
    if not isinstance(model, dict) or model.get("type") != "BPE":
        return False
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return False
    vocabulary = model.get("vocab")
    if not isinstance(vocabulary, dict) or not _are_ids(vocabulary.values()):
        return False
    merges = model.get("merges")
    return isinstance(merges, list) and all(map(_is_merge, merges))


def _are_ids(numbers):
    return all(type(number) is int and 0 <= number < MOST_TOKENS for number in numbers)


def _is_merge(merge):
    if type(merge) is str:
        return True
    return type(merge) is list and [type(piece) for piece in merge] == [str, str]


def _is_ordinary_part(part, name):
    if part is None:
        return True
    if not isinstance(part, dict):
        return False
    for several in ("normalizers", "pretokenizers", "decoders", "processors"):
        if part.get("type") == "Sequence" and several in part:
            inner = part[several]
            return isinstance(inner, list) and all(_is_ordinary_part(one, name) for one in inner)
    if part.get("type") not in _ORDINARY[name]:
        return False
    if part["type"] == "TemplateProcessing":
        return _is_ordinary_template(part)
    pattern = part.get("pattern", {})
    if not isinstance(pattern, dict) or pattern.get("Regex") not in (None, *_SPLITS):
        return False
    return all(_is_small(value) for key, value in part.items() if key != "pattern")


def _is_ordinary_template(part):
    """Are the tokens that a template puts around a text among those that it explains?"""
    known = part.get("special_tokens")
    for side in ("single", "pair"):
        pieces = part.get(side, [])
        if not isinstance(known, dict) or not isinstance(pieces, list):
            return False
        for piece in pieces:
            token = piece.get("SpecialToken") if isinstance(piece, dict) else None
            if isinstance(token, dict) and token.get("id") not in list(known):
                return False
    return True


def _is_small(value):
    """Is it a flag, a short text or a number that makes nothing large?"""
    if isinstance(value, str):
        return len(value) <= 100
    return isinstance(value, (bool, type(None))) or (type(value) is int and 0 <= value < 1000)


def _check_charsmaps(value):
    """Raise ValueError for a table of characters, anywhere in a file, shorter than it says.

    The library takes its first number for the size of an array, which may fit into the memory of
    the other process.
    """
    if isinstance(value, dict):
        if isinstance(value.get("precompiled_charsmap"), str):
            _check_charsmap(base64.b64decode(value["precompiled_charsmap"]))
        value = value.values()
    elif not isinstance(value, list):
        return
    for inner in value:
        _check_charsmaps(inner)


def _check_charsmap(table):
    size = int.from_bytes(table[:4], "little")
    if len(table) < 4 + size or size % 4 or size == 0:
        raise ValueError(
            f"its precompiled_charsmap says that it begins with a table of {size} bytes, and "
            f"has {len(table)} in all"
        )


def _problem_of(path, content):
    """What goes wrong, in words, where another process reads a file and uses it; "" for nothing.

    Raises: OSError if there is no other process.
    """
    seconds = PROCESSOR_SECONDS + (len(content) >> 20)
    limits = json.dumps([seconds, MEMORY, _TEXTS])
    command = [sys.executable, "-I", "-c", _TRIAL, json.dumps(sys.path), limits]
    hangs = f"the library that reads it does not come back within {seconds} s"
    try:
        ended = subprocess.run(
            command, input=content, capture_output=True, timeout=CLOCK_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return hangs
    except OSError as error:
        reason = f"{error.strerror}: {sys.executable} was to try {path} in a process of its own"
        raise OSError(error.errno, reason) from None
    if ended.returncode == -getattr(signal, "SIGXCPU", 0):
        return hangs
    if ended.returncode:
        return f"the library that reads it ends the whole process (exit code {ended.returncode})"
    return ended.stdout.decode("utf-8", "replace")
