"""A corpus from Python's own documentation, 96 characters as a vocabulary, and batches of any tokens. Knows no model.

Every CPython carries its language reference as `pydoc_data.topics`. It is read by import at run time and nothing of
it is redistributed, so the text, and every loss measured on it, differs a little between Python versions.
"""

import hashlib
import inspect
import sys
import warnings
from collections import namedtuple

import numpy as np

from .functional import IGNORE

# Index 0 is the newline, which also ends an answer; then the 95 printable ASCII characters.
ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
_INDEX = {character: i for i, character in enumerate(ALPHABET)}
_FOLD = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "…": "...", "–": "-", "—": "--", "\t": "    ",
                       "ß": "ss", "°": " degrees", "→": "->", "×": "x", "≤": "<=", "≥": ">=", "\xa0": " "})

Corpus = namedtuple("Corpus", "train heldout source sha256")  # two texts, where they are from, the digest of both


def encode(text):
    """Text -> int array of indices into ALPHABET. Raises: ValueError naming the first character outside it."""
    try:
        return np.array([_INDEX[c] for c in text], np.int64)
    except KeyError as error:
        raise ValueError(f"character {error.args[0]!r} is not one of the 96 known; use plain ASCII") from None


def decode(ids):
    """Int array -> text."""
    return "".join(ALPHABET[i] for i in np.asarray(ids).reshape(-1))


def encode_pairs(pairs):
    """[(prompt, answer)] as texts -> the same as int arrays, which is what `pack` takes. Raises: as `encode`."""
    return [(encode(prompt), encode(answer)) for prompt, answer in pairs]


def load_corpus():
    """A Corpus of technical English that needs no download: the language reference, else docstrings.

    Documents are split into training and held-out text whole, and a paragraph that occurs twice is kept once,
    so that no held-out paragraph has been trained on.
    Raises: RuntimeError if this Python carries neither (`python3-minimal` with -OO).
    """
    try:
        from pydoc_data.topics import topics  # absent from some installations
        documents, source = topics, "pydoc_data.topics"
    except ImportError:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some standard modules warn when they are merely looked at
            documents, source = _docstrings(), "docstrings"
    if sum(map(len, documents.values())) < 100_000:
        raise RuntimeError(
            "no text to learn from: this Python has neither pydoc_data.topics nor docstrings; "
            "install the whole standard library (Debian, Ubuntu: package python3, not python3-minimal) and drop -OO"
        )
    names = sorted(documents)
    heldout = set(names[5::10])
    seen, texts = set(), {}
    for part, chosen in (("heldout", sorted(heldout)), ("train", [n for n in names if n not in heldout])):
        paragraphs = [p.strip("\n") for name in chosen for p in _fold(documents[name]).split("\n\n")]
        texts[part] = "\n\n".join(p for p in paragraphs if p.strip() and not (p in seen or seen.add(p)))
    digest = hashlib.sha256((texts["train"] + "\0" + texts["heldout"]).encode()).hexdigest()
    return Corpus(texts["train"], texts["heldout"], source, digest)


def _fold(text):
    """`text` in the characters of ALPHABET; what has no near relative there becomes a question mark."""
    return "".join(c if c in _INDEX else "?" for c in text.translate(_FOLD))


def _docstrings():
    """{name: docstring}, each once, of every standard module imported so far, with its classes and functions."""
    found = {}
    standard = [m for name, m in sorted(sys.modules.items()) if m and name.partition(".")[0] in sys.stdlib_module_names]
    for module in standard:
        for name, member in [("", module), *vars(module).items()]:
            for inner, item in [("", member), *(vars(member).items() if inspect.isclass(member) else ())]:
                doc = getattr(item, "__doc__", None)
                if isinstance(doc, str) and len(doc) > 80:
                    found.setdefault(doc, f"{module.__name__}.{name}.{inner}")
    return {name: doc for doc, name in found.items()}


def windows(ids, batch, length, rng):
    """Endless (inputs, targets), both (batch, length): random stretches of `ids` and the same moved on by one.

    Raises: ValueError if the text is shorter than one stretch.
    """
    if len(ids) < length + 1 or batch < 1:
        raise ValueError(f"windows: {len(ids)} tokens hold no stretch of {length} + 1, or batch {batch} < 1")
    while True:
        starts = rng.integers(0, len(ids) - length, batch)
        stretch = ids[starts[:, None] + np.arange(length + 1)]
        yield stretch[:, :-1], stretch[:, 1:]


def stretches(ids, length, batch):
    """(inputs, targets), both (at most batch, length), once through `ids` in stretches that share no target.

    What is left at the end and fills no stretch is not used.
    Raises: ValueError if the text is shorter than one stretch.
    """
    n = (len(ids) - 1) // length
    if n < 1:
        raise ValueError(f"stretches: a text of {len(ids)} tokens is shorter than one stretch of {length} + 1")
    inputs, targets = ids[: n * length].reshape(n, length), ids[1 : n * length + 1].reshape(n, length)
    for start in range(0, n, batch):
        yield inputs[start : start + batch], targets[start : start + batch]


def pack(pairs):
    """(inputs, targets), both (len(pairs), T), from (prompt ids, answer ids): the loss is on the answers alone.

    Rows are filled up on the right with token 0, which carries no loss there and, being later, is seen by no answer.
    Raises: ValueError for an empty list, an empty prompt or an empty answer.
    """
    if not pairs or not all(len(prompt) and len(answer) for prompt, answer in pairs):
        raise ValueError(f"pack: no (prompt, answer) pairs, or an empty side among them: {pairs!r:.200}")
    longest = max(len(prompt) + len(answer) for prompt, answer in pairs) - 1
    inputs, targets = np.zeros((len(pairs), longest), np.int64), np.full((len(pairs), longest), IGNORE)
    for row, (prompt, answer) in enumerate(pairs):
        ids = np.concatenate([prompt, answer])
        inputs[row, : len(ids) - 1] = ids[:-1]
        targets[row, len(prompt) - 1 : len(ids) - 1] = ids[len(prompt) :]
    return inputs, targets


def question_batches(pairs, batch, rng):
    """Endless `pack`ed batches of (prompt ids, answer ids), in a new random order on each pass.

    Raises: ValueError if there are fewer pairs than one batch takes.
    """
    if len(pairs) < batch:
        raise ValueError(f"question_batches: {len(pairs)} pairs do not make one batch of {batch}")
    while True:
        order = rng.permutation(len(pairs))
        for start in range(0, len(pairs) - batch + 1, batch):
            yield pack([pairs[i] for i in order[start : start + batch]])
