"""From text to token ids and back, as the folder of a model says: GPT-2's byte-level BPE, or 96 characters."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import characters
from .folder import load_config
from .gpt2 import CONFIG, MODEL_TYPE, TENSORS

END = "<|endoftext|>"  # what GPT-2 ends a text with


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back: encode(text) -> int64 array (N,), decode(ids) -> text.

    `end` is the id that ends a text or an answer. `cuttable`: a text may be cut before each newline that something
    not blank follows, and its parts encoded one by one, with the same tokens.
    """

    encode: Callable
    decode: Callable
    end: int
    vocab_size: int
    cuttable: bool


def load_tokenizer(folder):
    """The Tokenizer of a model folder: GPT-2's byte-level BPE, or the characters that the demo's models know.

    Read from `tokenizer.json`, else from `vocab.json` and `merges.txt`, through the library `tokenizers`. A model of
    minilora's with 96 tokens and none of these files knows the characters of data.py. No token is added to a text;
    `<|endoftext|>` written out in a text is that token.
    Raises: FileNotFoundError naming what is missing, ImportError naming the extra, ValueError for files that are
    damaged, do not fit the model's vocab_size, or have no token that ends a text.
    """
    folder = Path(folder)
    config = load_config(folder, TENSORS, CONFIG)
    names = ("tokenizer.json", "vocab.json", "merges.txt")
    one, vocab, merges = ((folder / name).exists() for name in names)
    if not (one or vocab or merges) and config.get("model_type") == MODEL_TYPE and config.get("vocab_size") == 96:
        return Tokenizer(characters.encode, characters.decode, end=0, vocab_size=96, cuttable=True)
    if not one and not (vocab and merges):
        missing = names[2] if vocab else names[1] if merges else "tokenizer.json, or vocab.json and merges.txt,"
        raise FileNotFoundError(f"{folder}: {missing} is missing; without it no text can be turned into tokens. "
                                "Copy it from where the model came from")
    bpe = _read_bpe(folder, names[:1] if one else names[1:])
    size, room = max(bpe.get_vocab().values(), default=-1) + 1, config.get("vocab_size")
    if type(room) is not int or not 0 < size <= room:
        raise ValueError(f"{folder}: the tokenizer has {size} tokens, the model (config.json: vocab_size) {room}; "
                         "these files do not belong together")
    end = config.get("eos_token_id")
    end = bpe.token_to_id(END) if end is None else end
    if type(end) is not int or not 0 <= end < size:
        raise ValueError(f"{folder}: no token ends a text. config.json: eos_token_id {config.get('eos_token_id')!r} "
                         f"must be one of the {size} ids, or the tokenizer must know {END!r}")
    return Tokenizer(
        lambda text: np.array(bpe.encode(text, add_special_tokens=False).ids, np.int64),
        lambda ids: bpe.decode(np.asarray(ids).reshape(-1).tolist(), skip_special_tokens=False),
        end, size, _is_cuttable(bpe),
    )  # fmt: skip


def _is_cuttable(bpe):
    """Does it split as GPT-2's does, with nothing that reaches over a newline or starts every text in its own way?"""
    plain = all(not (token.lstrip or token.rstrip or any(map(str.isspace, token.content)))
                for token in bpe.get_added_tokens_decoder().values())
    split = bpe.pre_tokenizer
    return plain and bpe.normalizer is None and getattr(split, "use_regex", False) and not split.add_prefix_space


def _read_bpe(folder, names):
    """A `tokenizers.Tokenizer` from the files `names` of `folder`."""
    try:
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers
    except ImportError as error:
        raise ImportError(f"reading {folder / names[0]} needs the library tokenizers, which does not import here "
                          f"({error}); pip install 'minilora[hf]'") from error
    paths = [str(folder / name) for name in names]
    try:
        if len(paths) == 1:
            bpe = tokenizers.Tokenizer.from_file(*paths)
        else:
            bpe = tokenizers.Tokenizer(models.BPE.from_file(*paths))
            bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
            bpe.add_special_tokens([END] if bpe.token_to_id(END) is not None else [])
    except Exception as error:  # the library has no exceptions of its own
        raise ValueError(f"{' and '.join(paths)}: damaged, or of another kind: {error}") from None
    bpe.no_truncation()  # a tokenizer.json may ask for either, and would be obeyed without a word
    bpe.no_padding()
    return bpe
