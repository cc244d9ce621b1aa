"""The texts of the labs: Python's documentation and source, and four domains. Knows no model."""

import importlib.util
import json
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
    """One kind of text, to train on and to measure on: texts, or lists of (prompt, answer)."""

    train: object
    heldout: object


class Ids(NamedTuple):
    """A text as token ids, (N,) each: to train on, to choose by, and to measure on."""

    train: object
    validation: object
    test: object


def docs():
    """The documentation on which the tiny base was trained."""
    corpus = load_corpus()
    return Text(corpus.train, corpus.heldout)


def code():
    """Python source, which the tiny base has not seen: the target of most labs."""
    return Text(_sources(TRAINED), _sources(HELDOUT))


def code_ids(encode):
    """The Ids of `code()` by `encode`: one half of the text that is not trained on is to choose by.

    Learning rates are chosen by it, so that what is measured was used for nothing else.
    """
    text = code()
    heldout = encode(text.heldout)
    half = len(heldout) // 2
    return Ids(encode(text.train), heldout[:half], heldout[half:])


def _sources(names):
    texts = [Path(importlib.util.find_spec(name).origin).read_text("utf-8") for name in names]
    return in_alphabet("\n".join(texts))


def domain(name):
    """(prompt, answer) pairs of the domain `name`: clinical, code, support or legal.

    What is to measure on asks for the same facts in other sentences.
    """
    file = Path(__file__).parent / "domains" / f"{name}.json"
    fields = json.loads(file.read_text(encoding="utf-8"))

    def pairs(sentences):
        facts = fields["facts"].items()
        return [(form.format(subject), answer) for subject, answer in facts for form in sentences]

    return Text(pairs(fields["trained"]), pairs(fields["unseen"]))
