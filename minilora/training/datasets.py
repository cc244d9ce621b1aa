"""Files of text, and of rows with answers, as batches of token ids. Knows no model.

A text is learned as it stands; of prompts and answers only the answers are, of a conversation what
the assistant says: the loss is on them alone.

Text and Rows are two kinds of one thing: both `split`, have a `fingerprint`, and give endless
random `batches` to train on, or the batches of one `epoch` to measure a loss on.
"""

import hashlib
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..disk.checks import counted
from ..fits import indented
from .batches import (
    Row,
    answer_row,
    consecutive_windows,
    length_batches,
    random_windows,
    row_batches,
)
from .text_files import (
    INSTRUCTION,
    MESSAGES,
    TEXT,
    TOO_LONG,
    line_name,
    read_rows,
    read_text,
)

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
class Rows:
    """A tuple of Rows, each of which is learned where it says: an answer, several, or all of it.

    `has_answers`: somebody asks in each of them, and what is learned are answers.
    """

    rows: tuple
    has_answers: bool = True

    def __str__(self):
        n_tokens = sum(len(ids) for ids, _ in self.rows)
        n_learned = sum(int(has_loss.sum()) for _, has_loss in self.rows)
        rows = counted(len(self.rows), "row")
        return f"{rows} of {n_tokens:,} tokens, of which {n_learned:,} are learned"

    def split(self, fraction, rng):
        """(Rows to train on, Rows held out): a `fraction` drawn by `rng`; None for nothing.

        Raises: ValueError if a side would be empty.
        """
        if not fraction:
            return self, None
        n = len(self.rows)
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
        return replace(self, rows=tuple(self.rows[i] for i in np.flatnonzero(chosen)))

    def fingerprint(self):
        """The SHA-256 of the tokens, and of which are learned, in hexadecimal."""
        digest = hashlib.sha256()
        for ids, has_loss in self.rows:
            digest.update(len(ids).to_bytes(8, "little"))
            digest.update(ids.tobytes())
            digest.update(has_loss.tobytes())
        return digest.hexdigest()

    def batches(self, batch, rng):
        """Endless (inputs, targets), both (batch, T), as `row_batches` makes them.

        Raises: ValueError if there are fewer rows than one batch takes.
        """
        # Before the first batch is asked for, and in words for who has a file of lines.
        if len(self.rows) < batch:
            raise ValueError(
                f"{len(self.rows)} lines to train on do not make one batch of {batch}; "
                "use more lines or a smaller batch"
            )
        return row_batches(self.rows, batch, rng)

    def epoch(self, batch):
        """A list of (inputs, targets), both (at most batch, T): each row once."""
        return length_batches(self.rows, batch)


def load_data(path, tokenizer, block_size, length=None, quiet=False, *, too_long=None, log=print):
    """The Text of a .txt file, or the Rows of a .jsonl file, tokenised once.

    A text is learned in windows of `length` tokens (default: 256, or block_size if that is less).
    What is learned of a row is its answer and the end token after it, of a conversation what the
    assistant says, of a text all. No token reaches over the end of a prompt, as none does when an
    answer is generated. A text and a prompt begin with the tokenizer's `start`, but for those of a
    chat template, which writes it.
    A row longer than block_size is refused, or with `too_long` "cut" at its end or "drop" left out.
    `log` is given what should be known of the rows, line by line. A progress bar appears if it
    takes long, unless `quiet`.
    Raises: FileNotFoundError; ValueError for another kind of file, as `read_text` and `read_rows`,
    for text that the tokenizer or the chat template does not take, and for rows that are too long,
    with their lines and lengths.
    """
    path = Path(path)
    if too_long not in (None, *TOO_LONG):
        raise ValueError(f"too_long must be {' or '.join(TOO_LONG)}, or None; got {too_long!r}")
    if path.suffix == ".txt":
        if too_long is not None:
            raise ValueError(
                f"too_long {too_long!r} is for .jsonl files; {path} is learned in windows, and "
                "none of them is too long"
            )
        return _load_text(path, tokenizer, _window_length(length, block_size), quiet)
    if path.suffix != ".jsonl":
        advice = ""
        if path.suffix == ".json":
            advice = "; write the rows of a JSON array one object a line, and name it .jsonl"
        raise ValueError(
            f"{path}: data are a .txt file, UTF-8, or a .jsonl file, one row on each line{advice}"
        )
    if length is not None:
        raise ValueError(f"length {length} is for .txt files; a row of {path} is as long as it is")
    schema, rows = _load_rows(path, tokenizer, quiet, log)
    return Rows(tuple(_fitting(path, rows, block_size, too_long, log)), schema != TEXT)


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
    return Text(tokenizer.begun(np.concatenate(ids)), length)


def _load_rows(path, tokenizer, quiet, log):
    """(what kind of rows they are, the Rows of a file, however long they are)."""
    schema, lines = read_rows(path, log)
    row_of = _maker(schema, path, tokenizer, log)
    rows = []
    for number, fields in enumerate(_with_bar(lines, quiet), 1):
        where = line_name(path, number)
        try:
            row = row_of(fields)
        except (ValueError, TypeError) as error:
            # A character that the tokenizer does not know; half of a surrogate pair is a TypeError.
            # Or what the chat template refuses.
            raise ValueError(f"{where}: {error}") from None
        if not row.has_loss[1:].any():
            raise ValueError(f"{where}: nothing of it is learned: it holds no token of an answer")
        rows.append(_to_the_last_learned(row))
    if not any(row.ids[-1] in tokenizer.ends for row in rows):
        log(
            f"{path}: no answer ends with a token that ends a text, because the chat template "
            "writes none: what is generated will not end by itself"
        )
    return schema, rows


def _maker(schema, path, tokenizer, log):
    """The function that makes a Row of a line's fields."""
    if schema == MESSAGES:
        if tokenizer.template is None:
            raise ValueError(
                f"{path} holds messages, and the base has no chat template to put them into one "
                'text: give rows of {"prompt": "...", "answer": "..."}, or add the '
                "chat_template.jinja of a model made for chat to the base"
            )
        return lambda fields: _conversation_row(tokenizer, fields["messages"])
    if schema == INSTRUCTION and tokenizer.template is not None:
        log(f"{path}: instructions are put to the base as a user's, in its chat template")
        return lambda fields: _conversation_row(tokenizer, _as_messages(**fields))
    if schema == INSTRUCTION:
        log(f"{path}: instructions are put in Alpaca's words; the base has no chat template")
        return lambda fields: _answer_row(
            tokenizer, _in_alpacas_words(**fields), fields["output"], prompt_is_typed=True
        )
    if schema == TEXT:
        return lambda fields: _text_row(tokenizer, fields["text"])
    prompt, answer = schema.keys
    return lambda fields: _answer_row(tokenizer, fields[prompt], fields[answer])


def _answer_row(tokenizer, prompt, answer, prompt_is_typed=False):
    prompt_ids, answer_ids = tokenizer.encode_pair(prompt, answer, prompt_is_typed)
    return answer_row(prompt_ids, np.append(answer_ids, tokenizer.end))


def _text_row(tokenizer, text):
    ids = np.append(tokenizer.begun(tokenizer.encode(text)), tokenizer.end)
    return Row(ids, np.arange(len(ids)) > 0)


def _conversation_row(tokenizer, messages):
    ids, is_answer = tokenizer.encode_answers(messages)
    # Nothing comes before the first token from which it could be told.
    return Row(ids, is_answer & (np.arange(len(ids)) > 0))


def _as_messages(instruction, output, input=""):
    asked = f"{instruction}\n\n{input}" if input else instruction
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": output}]


def _in_alpacas_words(instruction, output, input=""):
    """The prompt for an instruction. Source: Taori et al. 2023 (Stanford Alpaca)."""
    if input:
        return (
            "Below is an instruction that describes a task, paired with an input that provides "
            "further context. Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
        )
    return (
        "Below is an instruction that describes a task. Write a response that appropriately "
        f"completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
    )


def _to_the_last_learned(row):
    """The Row without what comes after its last learned token: nothing that is learned sees it."""
    n = np.flatnonzero(row.has_loss)[-1] + 1
    return Row(row.ids[:n], row.has_loss[:n])


def _fitting(path, rows, block_size, too_long, log):
    """Those of the Rows that fit in the context, after cutting and leaving out what was asked for.

    The last token is a target, not an input.
    """
    long = [number for number, row in enumerate(rows, 1) if len(row.ids) - 1 > block_size]
    if not long:
        return rows
    if too_long is None:
        lines = [f"line {number} has {len(rows[number - 1].ids) - 1}" for number in long]
        raise ValueError(
            f"{path}: {len(long)} rows are longer than the model's context of {block_size} tokens; "
            f"shorten or split them, or choose --too-long cut or drop:{indented(lines)}"
        )
    fitting = []
    for row in rows:
        if len(row.ids) - 1 > block_size and too_long == "cut":
            row = Row(row.ids[: block_size + 1], row.has_loss[: block_size + 1])
        if len(row.ids) - 1 <= block_size and row.has_loss.any():
            fitting.append(_to_the_last_learned(row))
    n_dropped = len(rows) - len(fitting)
    said = f"{path}: {len(long)} of {len(rows)} rows are longer than {block_size} tokens"
    if too_long == "cut":
        log(f"{said}: {len(long) - n_dropped} are cut, {n_dropped} dropped with no answer left")
    else:
        log(f"{said}: they are dropped")
    if not fitting:
        raise ValueError(f"{said}, and none is left; shorten or split them")
    return fitting


def _with_bar(items, quiet):
    return tqdm(items, desc="tokenising", delay=1, leave=False, disable=quiet or None)


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
        # A character that it does not know; half of a surrogate pair may be a TypeError.
        raise ValueError(f"{where}: {error}") from None
