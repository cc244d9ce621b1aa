"""Files of text, and of prompts and answers, as batches of token ids. Knows no model.

Of tokenizers it knows `encode`. A text is learned as it stands; of prompts and answers only the
answers are: the loss is on them alone.

Text and Pairs are two kinds of one thing: both `split`, have a `fingerprint`, and give endless
random `batches` to train on, or the batches of one `epoch` to measure a loss on.
"""

import hashlib
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..fits import indented
from .batches import consecutive_windows, pad_pairs, pair_batches, random_windows
from .text_files import line_name, read_pairs, read_text

# How many tokens of a text a window has, if the model's context is not shorter and nobody says.
WINDOW_LENGTH = 256
# Characters that are tokenised at once: a whole book would take a hundred times its size in memory.
PIECE_LENGTH = 1 << 16


@dataclass(frozen=True)
class Text:
    """A text as token ids (N,), which is learned in windows of `length` tokens.

    Raises: ValueError if it is shorter than one window and the token after it.
    """

    ids: np.ndarray
    length: int

    def __post_init__(self):
        if self.length < 1 or len(self.ids) < self.length + 1:
            raise ValueError(
                f"{len(self.ids)} tokens are too few: a window needs {self.length} and the one "
                "after it; use more text or a smaller length"
            )

    def __str__(self):
        return f"{len(self.ids):,} tokens, in windows of {self.length}"

    def split(self, fraction, rng):
        """(Text to train on, Text that is held out): the last `fraction`; None for nothing.

        Nothing is drawn from `rng`.
        Raises: ValueError if a side is too short.
        """
        if not fraction:
            return self, None
        n_heldout = round(fraction * len(self.ids))
        n_train = len(self.ids) - n_heldout
        try:
            train = replace(self, ids=self.ids[:n_train])
            heldout = replace(self, ids=self.ids[n_train:])
        except ValueError as error:
            raise ValueError(
                f"an eval split of {fraction} makes {n_train} tokens to train on and {n_heldout} "
                f"held out: {error}, or another eval split"
            ) from None
        return train, heldout

    def fingerprint(self):
        """The SHA-256 of the tokens, in hexadecimal."""
        return hashlib.sha256(self.ids.tobytes()).hexdigest()

    def batches(self, batch, rng):
        """Endless (inputs, targets), both (batch, length), from anywhere in the text."""
        return random_windows(self.ids, batch, self.length, rng)

    def epoch(self, batch):
        """A list of (inputs, targets), both (at most batch, length): once through the text."""
        return list(consecutive_windows(self.ids, self.length, batch))


@dataclass(frozen=True)
class Pairs:
    """A tuple of (prompt ids, answer ids), which are learned with the loss on the answers alone."""

    pairs: tuple

    def __str__(self):
        n_prompt_tokens = sum(len(prompt) for prompt, _ in self.pairs)
        n_answer_tokens = sum(len(answer) for _, answer in self.pairs)
        return (
            f"{len(self.pairs):,} prompts of {n_prompt_tokens:,} tokens, "
            f"with answers of {n_answer_tokens:,}"
        )

    def split(self, fraction, rng):
        """(Pairs to train on, Pairs held out): a `fraction` drawn by `rng`; None for nothing.

        Raises: ValueError if a side would be empty.
        """
        if not fraction:
            return self, None
        n = len(self.pairs)
        n_heldout = round(fraction * n)
        if not 0 < n_heldout < n:
            raise ValueError(
                f"an eval split of {fraction} makes {n - n_heldout} lines to train on and "
                f"{n_heldout} held out; both need one at least: use more lines or another eval "
                "split"
            )
        is_heldout = np.zeros(n, bool)
        is_heldout[rng.permutation(n)[:n_heldout]] = True
        return self._where(~is_heldout), self._where(is_heldout)

    def _where(self, chosen):
        return Pairs(tuple(self.pairs[i] for i in np.flatnonzero(chosen)))

    def fingerprint(self):
        """The SHA-256 of the tokens and of where each side ends, in hexadecimal."""
        digest = hashlib.sha256()
        for pair in self.pairs:
            for ids in pair:
                digest.update(len(ids).to_bytes(8, "little"))
                digest.update(ids.tobytes())
        return digest.hexdigest()

    def batches(self, batch, rng):
        """Endless (inputs, targets), both (batch, T), in a new order on each pass.

        Raises: ValueError if there are fewer pairs than one batch takes.
        """
        # Before the first batch is asked for, and in words for who has a file of lines.
        if len(self.pairs) < batch:
            raise ValueError(
                f"{len(self.pairs)} lines to train on do not make one batch of {batch}; "
                "use more lines or a smaller batch"
            )
        return pair_batches(self.pairs, batch, rng)

    def epoch(self, batch):
        """A list of (inputs, targets), both (at most batch, T): each pair once."""
        starts = range(0, len(self.pairs), batch)
        return [pad_pairs(self.pairs[start : start + batch]) for start in starts]


def load_data(path, tokenizer, block_size, length=None, quiet=False):
    """The Text of a .txt file, or the Pairs of a .jsonl file, tokenised once.

    A text is learned in windows of `length` tokens (default: 256, or block_size if that is less).
    Prompts and answers are tokenised apart, as they are when an answer is generated, and an answer
    is followed by the end token. A progress bar appears if it takes long, unless `quiet`.
    Raises: FileNotFoundError; ValueError for another kind of file, as `read_text` and `read_pairs`,
    for text that the tokenizer does not take, and for rows longer than block_size, with their lines
    and lengths.
    """
    path = Path(path)
    if path.suffix == ".txt":
        return _load_text(path, tokenizer, _window_length(length, block_size), quiet)
    if path.suffix != ".jsonl":
        raise ValueError(
            f"{path}: data are a .txt file, UTF-8, or a .jsonl file of prompts and answers"
        )
    if length is not None:
        raise ValueError(
            f"length {length} is for .txt files; a row of {path} is as long as its prompt and "
            "answer"
        )
    return _load_pairs(path, tokenizer, block_size, quiet)


def _window_length(length, block_size):
    if length is None:
        return min(WINDOW_LENGTH, block_size)
    if length > block_size:
        raise ValueError(
            f"length {length} does not fit in the model's context of {block_size}; "
            "use a smaller one"
        )
    return length


def _load_text(path, tokenizer, length, quiet):
    text = read_text(path)
    pieces = _pieces(text) if tokenizer.cuttable else [text]
    ids = [_encode(tokenizer, piece, path) for piece in _with_bar(pieces, quiet)]
    return Text(np.concatenate(ids), length)


def _load_pairs(path, tokenizer, block_size, quiet):
    pairs = []
    too_long = []
    for number, (prompt, answer) in enumerate(_with_bar(read_pairs(path), quiet), 1):
        where = line_name(path, number)
        prompt_ids = _encode(tokenizer, prompt, where)
        answer_ids = np.append(_encode(tokenizer, answer, where), tokenizer.end)
        pairs.append((prompt_ids, answer_ids))
        # The last token is a target, not an input.
        n = len(prompt_ids) + len(answer_ids) - 1
        if n > block_size:
            too_long.append(f"line {number} has {n}")
    if too_long:
        raise ValueError(
            f"{path}: {len(too_long)} rows are longer than the model's context of {block_size} "
            f"tokens; shorten or split them:{indented(too_long)}"
        )
    return Pairs(tuple(pairs))


def _with_bar(items, quiet):
    return tqdm(items, desc="tokenising", delay=1, leave=False, disable=quiet)


def _pieces(text):
    """`text` in pieces of at least PIECE_LENGTH, cut before a newline that is followed by no blank.

    No token reaches over such a cut: a `cuttable` tokenizer promises it.
    """
    pieces = []
    start = 0
    for match in re.finditer(r"\n(?=\S)", text):
        if match.start() - start >= PIECE_LENGTH:
            pieces.append(text[start : match.start()])
            start = match.start()
    pieces.append(text[start:])
    return pieces


def _encode(tokenizer, text, where):
    try:
        return tokenizer.encode(text)
    except (ValueError, TypeError) as error:
        # A character that it does not know; half of a surrogate pair is a TypeError.
        raise ValueError(f"{where}: the tokenizer does not take this text: {error}") from None
