"""Sentences about logins, and the JSON that says the same of each. Knows no model.

Forms of sentences, names, and how an answer is held against what it should be.
"""

import json

import numpy as np

# What is to be said of a login, in this order.
KEYS = ["user", "ip", "time", "success"]
# (a sentence with places for three of them, the fourth).
TRAINED = [
    ("{user} logged in from {ip} at {time}.", True),
    ("At {time} {user} signed in from {ip}.", True),
    ("The login of {user} from {ip} was accepted at {time}.", True),
    ("{time}: session opened for {user}, source {ip}.", True),
    ("The gateway let {user} in at {time}, address {ip}.", True),
    ("From {ip} came {user} at {time}, and the password was right.", True),
    ("{user} failed to log in from {ip} at {time}.", False),
    ("At {time} a wrong password for {user} came from {ip}.", False),
    ("The login of {user} from {ip} was rejected at {time}.", False),
    ("{time}: access denied for {user}, source {ip}.", False),
    ("{ip} tried to get in as {user} at {time} and was refused.", False),
    ("Someone at {ip} could not sign in as {user}, time {time}.", False),
]
UNSEEN = [
    ("{user} got in at {time} from the address {ip}.", True),
    ("Accepted password for {user} from {ip}, {time}.", True),
    ("At {time} the server welcomed {user}, who came from {ip}.", True),
    ("Failed password for {user} from {ip}, {time}.", False),
    ("At {time} the server turned {user} away, who came from {ip}.", False),
    ("The password that {ip} gave for {user} at {time} was wrong.", False),
]


def new_name(rng):
    """A name that no language model has learned: syllables, and now and then a number."""
    syllables = rng.choice(list("bdfgklmnprstvz"), 3), rng.choice(list("aeiou"), 3)
    name = "".join(a + b for a, b in zip(*syllables, strict=True))
    return name if rng.random() < 0.6 else f"{name}{rng.integers(1, 100)}"


def people(rng):
    """(200 names, 40 others), in an order of their own."""
    names = sorted({new_name(rng) for _ in range(300)})
    rng.shuffle(names)
    return names[:200], names[200:240]


def incidents(forms, names, n, rng):
    """`n` of (sentence, JSON), in each of the forms by turns.

    Each is of somebody of `names`, from a random address at a random time.
    """
    made = []
    for i in range(n):
        form, success = forms[i % len(forms)]
        fields = {
            "user": str(rng.choice(names)),
            "ip": ".".join(str(number) for number in rng.integers(1, 255, 4)),
            "time": f"{rng.integers(24):02}:{rng.integers(60):02}",
        }
        made.append((form.format(**fields), json.dumps({**fields, "success": success})))
    return made


def read(text):
    """The JSON object that `text` is; {} if it is none."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def shares(texts, questions):
    """The percentages: is it JSON with these keys, is each field right, is all of it exact.

    `texts` are the answers to `questions`, a list of (sentence, JSON).
    Returns: {"JSON": %, each of KEYS: %, "exact": %}.
    """
    truths = [answer for _, answer in questions]
    fields = [read(text) for text in texts]
    right = {"JSON": [list(found) == KEYS for found in fields]}
    for key in KEYS:
        # As JSON writes them: in Python 1 equals True.
        right[key] = [
            key in found and json.dumps(found[key]) == json.dumps(json.loads(truth)[key])
            for found, truth in zip(fields, truths, strict=True)
        ]
    right["exact"] = [text == truth for text, truth in zip(texts, truths, strict=True)]
    return {column: 100 * float(np.mean(values)) for column, values in right.items()}
