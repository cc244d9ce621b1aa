"""Files of text, and of prompts and answers, as batches of token ids. Knows no model, and of tokenizers only `encode`.

A text is learned as it stands. Of prompts and answers only the answers are: the loss is on them alone.
"""

import hashlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from . import batches

PIECE = 1 << 16  # characters tokenised at once: a whole book at once takes a hundred times its size in memory


@dataclass(frozen=True)
class Text:
    """A text as token ids (N,), which is learned in stretches of `length` tokens.

    Raises: ValueError if there is no whole stretch in it.
    """

    ids: np.ndarray
    length: int

    def __post_init__(self):
        if self.length < 1 or len(self.ids) < self.length + 1:
            raise ValueError(f"{len(self.ids)} tokens hold no stretch of {self.length} and the token after it; "
                             "use more text or a smaller length")

    def __str__(self):
        return f"{len(self.ids):,} tokens, in stretches of {self.length}"

    def split(self, fraction, rng):
        """(Text, Text of the last `fraction`), or (this, None) for none. Raises: ValueError if a side is too short."""
        if not fraction:
            return self, None
        cut = len(self.ids) - round(fraction * len(self.ids))
        try:
            return replace(self, ids=self.ids[:cut]), replace(self, ids=self.ids[cut:])
        except ValueError as error:
            raise ValueError(f"an eval split of {fraction} makes {cut} tokens to train on and {len(self.ids) - cut} "
                             f"held out: {error}, or another eval split") from None

    def fingerprint(self):
        """The SHA-256 of the tokens, in hexadecimal."""
        return hashlib.sha256(self.ids.tobytes()).hexdigest()

    def batches(self, batch, rng):
        """Endless (inputs, targets), both (batch, length), from anywhere in the text."""
        return batches.random_windows(self.ids, batch, self.length, rng)

    def once(self, batch):
        """A list of (inputs, targets), both (at most batch, length): once through the text."""
        return list(batches.consecutive_windows(self.ids, self.length, batch))


@dataclass(frozen=True)
class Pairs:
    """(prompt ids, answer ids) to be learned, with the loss on the answers alone."""

    pairs: tuple

    def __str__(self):
        count = lambda side: sum(len(pair[side]) for pair in self.pairs)
        return f"{len(self.pairs):,} prompts of {count(0):,} tokens, with answers of {count(1):,}"

    def split(self, fraction, rng):
        """(Pairs, Pairs), the second a `fraction` drawn by `rng`; (this, None) for none.

        Raises: ValueError if a side would be empty.
        """
        n = len(self.pairs)
        k = round(fraction * n)
        if not fraction:
            return self, None
        if not 0 < k < n:
            raise ValueError(f"an eval split of {fraction} makes {n - k} lines to train on and {k} held out; "
                             "both need one at least: use more lines or another eval split")
        heldout = set(rng.permutation(n)[:k].tolist())
        sides = [[pair for i, pair in enumerate(self.pairs) if (i in heldout) is held] for held in (False, True)]
        return tuple(Pairs(tuple(side)) for side in sides)

    def fingerprint(self):
        """The SHA-256 of the tokens and of where each side ends, in hexadecimal."""
        digest = hashlib.sha256()
        for side in (side for pair in self.pairs for side in pair):
            digest.update(len(side).to_bytes(8, "little") + side.tobytes())
        return digest.hexdigest()

    def batches(self, batch, rng):
        """Endless (inputs, targets), both (batch, T), in a new order on each pass. Raises: ValueError for too few."""
        if len(self.pairs) < batch:
            raise ValueError(f"{len(self.pairs)} lines to train on do not make one batch of {batch}; "
                             "use more lines or a smaller batch")
        return batches.pair_batches(self.pairs, batch, rng)

    def once(self, batch):
        """A list of (inputs, targets), both (at most batch, T): each pair once."""
        return [batches.pad_pairs(self.pairs[i : i + batch]) for i in range(0, len(self.pairs), batch)]


def read_text(path):
    """The text of a UTF-8 file, whose line ends become newlines.

    Raises: ValueError if it is empty, or with the position of the first byte that is not UTF-8.
    """
    try:
        text = Path(path).read_bytes().decode().removeprefix("\ufeff").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} ({error.object[error.start]:#04x}) is not UTF-8 "
                         f"({error.reason}); save the file as UTF-8") from None
    if not text.strip():
        raise ValueError(f"{path} is empty; there is nothing to learn from it")
    return text


def read_pairs(path):
    """[(prompt, answer), ...], one for each line of a JSON Lines file: {"prompt": "...", "answer": "..."}.

    Raises: ValueError naming the line: not JSON, a key missing, unknown or twice there, a side empty or no text.
    """
    pairs = []
    for number, line in enumerate(read_text(path).removesuffix("\n").split("\n"), 1):
        where, need = f"{path}, line {number}", 'one line is {"prompt": "...", "answer": "..."}'
        try:
            row = json.loads(line, object_pairs_hook=_each_key_once)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON ({'a blank line' if not line.strip() else error}); {need}") from None
        if not isinstance(row, dict) or row.keys() != {"prompt", "answer"}:
            got = sorted(row) if isinstance(row, dict) else type(row).__name__
            raise ValueError(f"{where} holds {got}; {need}")
        for key, value in row.items():
            if not isinstance(value, str) or not value:
                raise ValueError(f"{where}: {key} must be a text that is not empty, got {value!r:.80}; {need}")
        pairs.append((row["prompt"], row["answer"]))
    return pairs


def _each_key_once(items):
    if len(dict(items)) < len(items):
        raise ValueError(f"a key is there twice: {[key for key, _ in items]}")
    return dict(items)


def load_data(path, tokenizer, block_size, length=None, quiet=False):
    """The Text of a .txt file, or the Pairs of a .jsonl file, tokenised once, with a progress bar if it takes long.

    A text is learned in stretches of `length` tokens (default: 256, or block_size if that is less). Prompts and
    answers are tokenised apart, as they are when an answer is generated, and an answer is followed by the end token.
    Raises: FileNotFoundError; ValueError for another kind of file, as `read_text` and `read_pairs`, for text that the
    tokenizer does not take, and for rows longer than block_size, with their lines and lengths.
    """
    path, bar = Path(path), {"desc": "tokenising", "delay": 1, "leave": False, "disable": quiet}
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"{path}: data are a .txt file, UTF-8, or a .jsonl file of prompts and answers")
    if path.suffix == ".txt":
        length = min(block_size, 256) if length is None else length
        if length > block_size:
            raise ValueError(f"length {length} does not fit in the model's context of {block_size}; use a smaller one")
        text = read_text(path)
        pieces = _pieces(text) if tokenizer.cuttable else [text]
        ids = [_encoded(tokenizer, piece, path) for piece in tqdm(pieces, **bar)]
        return Text(np.concatenate(ids), length)
    if length is not None:
        raise ValueError(f"length {length} is for .txt files; a row of {path} is as long as its prompt and answer")
    rows = [
        (_encoded(tokenizer, prompt, f"{path}, line {i}"),
         np.append(_encoded(tokenizer, answer, f"{path}, line {i}"), tokenizer.end))
        for i, (prompt, answer) in enumerate(tqdm(read_pairs(path), **bar), 1)
    ]  # fmt: skip
    long = [f"line {i} ({n})" for i, n in enumerate((len(p) + len(a) - 1 for p, a in rows), 1) if n > block_size]
    if long:
        raise ValueError(f"{path}: {len(long)} rows are longer than the model's context of {block_size} tokens: "
                         f"{', '.join(long[:8])}{' ...' * (len(long) > 8)}; shorten or split them")
    return Pairs(tuple(rows))


def _pieces(text):
    """`text` in pieces of about PIECE characters, cut where GPT-2's tokenizer cuts whatever stands around."""
    cuts = [0]
    for match in re.finditer(r"\n(?=\S)", text):
        if match.start() - cuts[-1] >= PIECE:
            cuts.append(match.start())
    return [text[i:j] for i, j in zip(cuts, [*cuts[1:], len(text)], strict=True)]


def _encoded(tokenizer, text, where):
    try:
        return tokenizer.encode(text)
    except (ValueError, TypeError) as error:  # a character unknown to it; half a surrogate pair is a TypeError
        raise ValueError(f"{where}: the tokenizer does not take this text: {error}") from None
