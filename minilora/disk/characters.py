"""96 characters as a vocabulary, for models too small for words. Knows no model, opens no file."""

import numpy as np

# Index 0 is the newline, which also ends an answer; then the 95 printable ASCII characters.
ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
_INDEX = {character: i for i, character in enumerate(ALPHABET)}


def encode(text):
    """Text -> int64 array (N,) of indices into ALPHABET.

    Raises: ValueError that names the first character outside it.
    """
    try:
        return np.array([_INDEX[character] for character in text], np.int64)
    except KeyError as error:
        raise ValueError(
            f"character {error.args[0]!r} is not one of the 96 known; use plain ASCII"
        ) from None


def decode(ids):
    """Int array -> text."""
    return "".join(ALPHABET[i] for i in np.asarray(ids).reshape(-1))


def encode_pairs(pairs):
    """[(prompt, answer)] as texts -> the same as int arrays. Raises: as `encode`."""
    return [(encode(prompt), encode(answer)) for prompt, answer in pairs]
