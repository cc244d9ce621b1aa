"""A corpus of technical English that needs no download: Python's own documentation. Knows no model.

Every CPython carries its language reference as `pydoc_data.topics`. It is imported at run time, and
nothing of it is redistributed. So the text, and every loss measured on it, differs a little between
Python versions.
"""

import hashlib
import inspect
import sys
import warnings
from collections import namedtuple

from ..disk.characters import ALPHABET

# Two texts, where they come from, and the SHA-256 of both.
Corpus = namedtuple("Corpus", "train heldout source sha256")

# With less than this nothing can be learned.
FEWEST_CHARACTERS = 100_000
SHORTEST_DOCSTRING = 80

# What is written in ALPHABET for characters outside it.
SPELLINGS = {
    "‘": "'",
    "’": "'",
    "“": '"',
    "”": '"',
    "…": "...",
    "–": "-",
    "—": "--",
    "\t": "    ",
    "ß": "ss",
    "°": " degrees",
    "→": "->",
    "×": "x",
    "≤": "<=",
    "≥": ">=",
    "\xa0": " ",
}


def load_corpus():
    """A Corpus of technical English: the language reference, or docstrings where there is none.

    Every tenth document is held out. A paragraph that occurs twice is kept once, in the held-out
    text if it is in both, so that no held-out paragraph is trained on.
    Raises: RuntimeError if this Python has neither (`python3-minimal` with -OO).
    """
    documents, source = _documents()
    names = sorted(documents)
    heldout_names = names[5::10]
    train_names = [name for name in names if name not in heldout_names]
    heldout = _paragraphs(documents[name] for name in heldout_names)
    train = _paragraphs(documents[name] for name in train_names)
    in_heldout = set(heldout)
    train_text = "\n\n".join(paragraph for paragraph in train if paragraph not in in_heldout)
    heldout_text = "\n\n".join(heldout)
    digest = hashlib.sha256(f"{train_text}\0{heldout_text}".encode()).hexdigest()
    return Corpus(train_text, heldout_text, source, digest)


def _documents():
    """({name: text}, where they come from)."""
    try:
        # Some installations lack it.
        from pydoc_data.topics import topics

        documents = topics
        source = "pydoc_data.topics"
    except ImportError:
        documents = _docstrings()
        source = "docstrings"
    if sum(len(text) for text in documents.values()) < FEWEST_CHARACTERS:
        raise RuntimeError(
            "no text to learn from: this Python has neither pydoc_data.topics nor docstrings; "
            "install the whole standard library (Debian, Ubuntu: package python3, "
            "not python3-minimal) and drop -OO"
        )
    return documents, source


def _paragraphs(documents):
    """The paragraphs of all `documents`, in ALPHABET and each once, in their order."""
    paragraphs = {}
    for document in documents:
        for paragraph in in_alphabet(document).split("\n\n"):
            paragraph = paragraph.strip("\n")
            if paragraph.strip():
                paragraphs[paragraph] = None
    return list(paragraphs)


def in_alphabet(text):
    """`text` in the characters of ALPHABET; one that has no spelling becomes a question mark."""
    text = text.translate(str.maketrans(SPELLINGS))
    return "".join(character if character in ALPHABET else "?" for character in text)


def _docstrings():
    """{name: docstring} of the standard modules imported so far, of their classes and functions.

    A docstring that several of them share comes once.
    """
    name_of = {}
    with warnings.catch_warnings():
        # Some modules warn when one merely looks at what is in them.
        warnings.simplefilter("ignore")
        for module_name, module in sorted(sys.modules.items()):
            if module is None or module_name.partition(".")[0] not in sys.stdlib_module_names:
                continue
            for name, item in _documented(module):
                docstring = getattr(item, "__doc__", None)
                if isinstance(docstring, str) and len(docstring) > SHORTEST_DOCSTRING:
                    name_of.setdefault(docstring, name)
    return {name: docstring for docstring, name in name_of.items()}


def _documented(module):
    """(dotted name, object): a module, what stands in it, and what stands in its classes."""
    yield module.__name__, module
    for name, member in list(vars(module).items()):
        yield f"{module.__name__}.{name}", member
        if inspect.isclass(member):
            for attribute_name, attribute in list(vars(member).items()):
                yield f"{module.__name__}.{name}.{attribute_name}", attribute
