"""Permission strings, and what four tasks make of them. Knows no model.

A string such as rwxr-x--- is turned into octal (750), into the umask that leaves it (027), into
bits (111101000) or into chmod's symbols (u=rwx,g=rx,o=). It is nine bits here, first the user's.
"""

import itertools

ALL = list(itertools.product([0, 1], repeat=9))
# Trained on; the other 128 of the 512 are never seen.
N_TRAINED = 384


def triples(bits):
    """The bits of the user, of the group and of others."""
    return [bits[0:3], bits[3:6], bits[6:9]]


def letters(triple, blank):
    """rwx, with a `blank` for what is not permitted."""
    return "".join(c if bit else blank for c, bit in zip("rwx", triple, strict=True))


def octal(bits):
    """750"""
    return "".join(str(4 * r + 2 * w + x) for r, w, x in triples(bits))


def umask(bits):
    """027"""
    return octal([1 - bit for bit in bits])


def binary(bits):
    """111101000"""
    return "".join(str(bit) for bit in bits)


def symbolic(bits):
    """u=rwx,g=rx,o="""
    who = zip("ugo", triples(bits), strict=True)
    return ",".join(f"{name}={letters(triple, '')}" for name, triple in who)


TASKS = {"octal": octal, "umask": umask, "binary": binary, "symbolic": symbolic}


def prompt(bits):
    """What a model is asked: it does not say for which task."""
    return "".join(letters(triple, "-") for triple in triples(bits)) + " is "


def split(rng):
    """(strings to train on, strings never seen), in an order that `rng` draws."""
    order = rng.permutation(len(ALL))
    return [ALL[i] for i in order[:N_TRAINED]], [ALL[i] for i in order[N_TRAINED:]]


def questions(task, strings):
    """(prompt, answer) of each of the strings; a line break ends the answer."""
    return [(prompt(bits), TASKS[task](bits) + "\n") for bits in strings]
