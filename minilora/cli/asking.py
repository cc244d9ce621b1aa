"""How a question is put to a model as token ids, and its answer read. Knows no model's insides.

Lines and Chat are two kinds of one thing: both make the token ids of a question and its answer, and
let a model answer.
"""

import numpy as np

from ..disk import characters
from ..generate import generate
from ..training.threads import blas_threads
from .text_stream import TextStream

# The token that ends a line of characters, and how many tokens an answer may have.
NEWLINE = 0
LONGEST_ANSWER = 26
# What is shown of an answer of blanks.
BLANKS = "(blanks)"


class Lines:
    """Questions in two lines, for a model of minilora's 96 characters: Q: ..., and A: ... ."""

    def prompt(self, question):
        """The ids (N,) up to where the answer begins. Raises: ValueError outside ASCII."""
        return characters.encode(f"Q: {question}\nA: ")

    def pair(self, question, answer):
        """(prompt ids, answer ids): the answer ends with the token that ends answers."""
        return self.prompt(question), characters.encode(f"{answer}\n")

    def answer(self, model, question):
        """What `model` answers, on one line."""
        ids = self.prompt(question)[None]
        line = characters.decode(_written(model, ids, NEWLINE)).split("\n")[0]
        return line if line.strip() else BLANKS


class Chat:
    """Questions of a user's, in a model's chat template. `system` is the system's message, or None.

    `tokenizer` is a disk.tokenizer.Tokenizer that has a template.
    """

    def __init__(self, tokenizer, system=None):
        self.tokenizer = tokenizer
        self.system = system

    def messages(self, question, answer=None):
        """The conversation, [{"role": ..., "content": ...}, ...]; without an answer up to it."""
        messages = []
        if self.system is not None:
            messages.append({"role": "system", "content": self.system})
        messages.append({"role": "user", "content": question})
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
        return messages

    def prompt(self, question):
        """The ids (N,) up to where the answer begins. Raises: as the template and tokenizer do."""
        return self.tokenizer.encode_chat(self.messages(question), add_generation_prompt=True)

    def pair(self, question, answer):
        """(prompt ids, answer ids): the answer is what training learns of the conversation."""
        ids, is_answer = self.tokenizer.encode_answers(self.messages(question, answer))
        where = np.flatnonzero(is_answer)
        return ids[: where[0]], ids[where[0] : where[-1] + 1]

    def answer(self, model, question):
        """What `model` answers, on one line; one that does not end is cut, and ends in "..."."""
        ids = self.prompt(question)[None]
        stream = TextStream(self.tokenizer)
        for token in _written(model, ids, self.tokenizer.ends).tolist():
            stream.push(token)
        stream.finish()
        line = " ".join(stream.text.split()) or BLANKS
        return line if stream.ended else f"{line} ..."


def _written(model, ids, stop):
    """The ids (n,) that `model` writes after `ids` (1, T), with one thread of BLAS for its row."""
    with blas_threads(1):
        return generate(model, ids, LONGEST_ANSWER, stop=stop)[0, ids.shape[1] :]


def pairs(asking, questions):
    """[(prompt ids, answer ids), ...] of [(question, answer), ...], as Lines or Chat makes them."""
    return [asking.pair(question, answer) for question, answer in questions]
