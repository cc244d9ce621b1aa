"""From text to token ids and back, as the folder of a model says: byte-level BPE, or 96 characters.

Knows the files of tokenizers and the fields of config.json, no tensor.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import characters
from .folder import load_config
from .lfs import check_no_pointer
from .models import CONFIG, TENSORS, family_of_fields

# What GPT-2 ends a text with.
END = "<|endoftext|>"
ONE_FILE = "tokenizer.json"
VOCABULARY = "vocab.json"
MERGES = "merges.txt"


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back: encode(text) -> int64 array (N,), decode(ids) -> text.

    `end` is the id that ends a text or an answer. `cuttable`: a text may be cut before each newline
    that something not blank follows, and its parts encoded one by one, with the same tokens.
    """

    encode: Callable
    decode: Callable
    end: int
    vocab_size: int
    cuttable: bool


def load_tokenizer(folder):
    """The Tokenizer of a model folder: a byte-level BPE, or the characters of the demo's models.

    Read from `tokenizer.json`, else from `vocab.json` and `merges.txt`, through the library
    `tokenizers`. A model of minilora's with 96 tokens and none of these files knows the characters
    of `characters.py`. No token is added to a text; `<|endoftext|>` written out in a text is that
    token.
    Raises: FileNotFoundError that names the missing file, ValueError for files that are damaged, do
    not fit the model's vocab_size, or have no token that ends a text.
    """
    folder = Path(folder)
    fields = load_config(folder, TENSORS, CONFIG)
    files = [name for name in (ONE_FILE, VOCABULARY, MERGES) if (folder / name).exists()]
    if not files and _knows_characters(fields):
        return Tokenizer(
            characters.encode,
            characters.decode,
            end=0,
            vocab_size=len(characters.ALPHABET),
            cuttable=True,
        )
    if ONE_FILE in files:
        bpe = _read_bpe(folder, [ONE_FILE])
    elif VOCABULARY in files and MERGES in files:
        bpe = _read_bpe(folder, [VOCABULARY, MERGES])
    else:
        raise _missing(folder, files)
    size = max(bpe.get_vocab().values(), default=-1) + 1
    _check_vocabulary(folder, size, fields.get("vocab_size"))
    return Tokenizer(
        lambda text: np.array(bpe.encode(text, add_special_tokens=False).ids, np.int64),
        lambda ids: bpe.decode(np.asarray(ids).reshape(-1).tolist(), skip_special_tokens=False),
        end=_end_of_text(folder, bpe, size, fields.get("eos_token_id")),
        vocab_size=size,
        cuttable=_is_cuttable(bpe),
    )


def _knows_characters(fields):
    family = family_of_fields(fields)
    if family is None or not family.knows_characters:
        return False
    return fields.get("vocab_size") == len(characters.ALPHABET)


def _missing(folder, files):
    """The error for a folder that has only `files` of those a tokenizer can be read from."""
    missing = f"{ONE_FILE}, or {VOCABULARY} and {MERGES},"
    if VOCABULARY in files:
        missing = MERGES
    elif MERGES in files:
        missing = VOCABULARY
    return FileNotFoundError(
        f"{folder}: {missing} is missing; without it no text can be turned into tokens. Copy it "
        "from where the model came from"
    )


def _check_vocabulary(folder, size, room):
    """Raise ValueError unless the model's embedding has a row for each token."""
    if type(room) is not int or not 0 < size <= room:
        raise ValueError(
            f"{folder}: the tokenizer has {size} tokens, the model (config.json: vocab_size) "
            f"{room}; these files do not belong together"
        )


def _end_of_text(folder, bpe, size, eos_token_id):
    """The id that ends a text: the one of config.json, else that of END."""
    end = eos_token_id
    if end is None:
        end = bpe.token_to_id(END)
    if type(end) is not int or not 0 <= end < size:
        raise ValueError(
            f"{folder}: no token ends a text. config.json: eos_token_id {eos_token_id!r} must be "
            f"one of the {size} ids, or the tokenizer must know {END!r}"
        )
    return end


def _is_cuttable(bpe):
    """Does it split as GPT-2's does, so that no token reaches over a newline?"""
    for token in bpe.get_added_tokens_decoder().values():
        if token.lstrip or token.rstrip or any(map(str.isspace, token.content)):
            return False
    split = bpe.pre_tokenizer
    if bpe.normalizer is not None or not getattr(split, "use_regex", False):
        return False
    # Each part of a cut text would get a space before it.
    return not split.add_prefix_space


def _read_bpe(folder, names):
    """A `tokenizers.Tokenizer` from the files `names` of `folder`."""
    # Imported where it is used: whoever only trains or reads characters does not wait for it.
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    paths = [str(folder / name) for name in names]
    for path in paths:
        check_no_pointer(path)
    try:
        if names == [ONE_FILE]:
            bpe = tokenizers.Tokenizer.from_file(paths[0])
        else:
            bpe = tokenizers.Tokenizer(models.BPE.from_file(*paths))
            bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            bpe.decoder = decoders.ByteLevel()
            if bpe.token_to_id(END) is not None:
                bpe.add_special_tokens([END])
    except Exception as error:
        # The library has no exceptions of its own.
        raise ValueError(f"{' and '.join(paths)}: damaged, or of another kind: {error}") from None
    # A tokenizer.json may ask for either, and would be obeyed without a word.
    bpe.no_truncation()
    bpe.no_padding()
    return bpe
