"""The texts of the labs: Python's source beside Python's documentation. Knows no model."""

import importlib.util
from pathlib import Path
from typing import NamedTuple

from minilora.training.corpus import in_alphabet, load_corpus

# Modules of the standard library that every Python from 3.10 on carries as source.
TRAINED = (
    "argparse ast configparser csv dataclasses functools heapq inspect optparse shutil statistics "
    "tempfile textwrap threading typing"
).split()
HELDOUT = "bisect calendar fractions json.decoder queue random shlex string".split()


class Text(NamedTuple):
    """Two texts of one kind, one to train on and one to measure on."""

    train: str
    heldout: str


def docs():
    """The documentation on which the tiny base was trained."""
    corpus = load_corpus()
    return Text(corpus.train, corpus.heldout)


def code():
    """Python source, which the tiny base has not seen: the target of most labs."""
    return Text(_sources(TRAINED), _sources(HELDOUT))


def _sources(names):
    texts = [Path(importlib.util.find_spec(name).origin).read_text("utf-8") for name in names]
    return in_alphabet("\n".join(texts))
