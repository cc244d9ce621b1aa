"""A corpus of technical English that needs no download: Python's own documentation. Knows no model.

Every CPython carries its language reference as `pydoc_data.topics`. It is read by import at run time and nothing of
it is redistributed, so the text, and every loss measured on it, differs a little between Python versions.
"""

import hashlib
import inspect
import sys
import warnings
from collections import namedtuple

from ..disk.characters import _INDEX

_FOLD = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "…": "...", "–": "-", "—": "--", "\t": "    ",
                       "ß": "ss", "°": " degrees", "→": "->", "×": "x", "≤": "<=", "≥": ">=", "\xa0": " "})

Corpus = namedtuple("Corpus", "train heldout source sha256")  # two texts, where they are from, the digest of both


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
