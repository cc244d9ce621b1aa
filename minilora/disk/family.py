"""A family is a record: what a kind of model file calls our modules, how its tensors lie.

The code that saves and loads models and adapters asks the record and knows no family by name:
another family is a file of its own, and a row in the table of `models.py`.
Knows names and fields, opens no file.
"""

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False, kw_only=True)
class Family:
    """One kind of model file.

    title: what `inspect` says of such a model.
    model_types: what its `config.json` may have as model_type, None for nothing.
    model: the class of its models here; `model(config, None)` holds every tensor, all zero.
    marks: tensors, by our names, that tell its models from others of that class.

    Names. "h.0.attn.q_proj", a module of ours, is a block, "h.0.", and a part, "attn.q_proj".
    block: a regular expression for the block, which is the same here and in files.
    parts: {a linear of files: the linears of ours that it is, in the order of its rows}.
    prefix: what files have before every name but that of the `head`.
    transposed: the linears in `parts` are stored (in, out), as transformers' Conv1D does.
    unused: a regular expression for tensors that some files hold and no model computes with.

    Configuration.
    read_config(folder, fields, tensors): our configuration, from the fields of `config.json` and
    {name without prefix: array}, out of which it may take what only repeats another tensor, and
    which is {} for whoever wants the configuration alone.
    write_config(model, fields, dtype): the fields of `config.json`; `fields` are those of the
    folder that the model came from, {} for none, and `dtype` is the one that is written.
    count(config): how many numbers such a model holds, roughly: no giant is built by mistake.

    describe(config): the shape of a model in words, for `inspect`.
    note: what other programs make of its adapters, for `inspect`; it goes on after what they say.
    knows_characters: without files of a tokenizer, a model of 96 tokens knows 96 characters.
    """

    title: str
    model_types: tuple
    model: type
    read_config: Callable
    write_config: Callable
    count: Callable
    describe: Callable
    parts: dict
    block: str
    prefix: str = ""
    head: str = "lm_head"
    marks: tuple = ()
    transposed: bool = False
    # This one matches nothing.
    unused: str = r"(?!)"
    note: str = ""
    knows_characters: bool = False

    def holds(self, model):
        """Can a folder of this family hold `model`?"""
        if not isinstance(model, self.model):
            return False
        return self._has_marks({name for name, _ in model.named_parameters()})

    def owns(self, modules, tensors=None):
        """Does an adapter of `modules` belong to a model of this family? All names are ours.

        `tensors` are the names of its base's tensors, None if the base is not known.
        """
        return all(self.is_part(name) for name in modules) and self._has_marks(tensors)

    def owns_file(self, their_modules, tensors=None):
        """Does a file that adapts `their_modules` belong to a model of this family?

        Other layers may be adapted beside its linears, and the prefix may be missing.
        """
        names = [theirs.removeprefix(self.prefix) for theirs in their_modules]
        has_parts = any(self._split(name)[1] in self.parts for name in names)
        return has_parts and self._has_marks(tensors)

    def _has_marks(self, tensors):
        return tensors is None or all(mark in tensors for mark in self.marks)

    def is_part(self, module):
        """Is `module`, a name of ours, one of the linears in `parts`?"""
        return self._split(module)[1] in [part for ours in self.parts.values() for part in ours]

    def their_name(self, module):
        """What files call our `module`: h.0.attn.k_proj -> transformer.h.0.attn.c_attn."""
        block, part = self._split(module)
        for theirs, ours in self.parts.items():
            if part in ours:
                return f"{self.prefix}{block}{theirs}"
        if module == self.head:
            return module
        return f"{self.prefix}{module}"

    def our_modules(self, theirs):
        """Our modules that are the module `theirs` of a file, in the order of its rows."""
        name = theirs.removeprefix(self.prefix)
        block, part = self._split(name)
        if part in self.parts:
            return [f"{block}{ours}" for ours in self.parts[part]]
        return [name]

    def module_table(self, modules):
        """{module of a file: our modules in it, in the order of its rows}, for our `modules`."""
        modules = list(modules)
        table = {}
        for theirs in dict.fromkeys(self.their_name(name) for name in modules):
            table[theirs] = [name for name in self.our_modules(theirs) if name in modules]
        return table

    def _split(self, module):
        """(block, part) of a name: ("h.0.", "attn.q_proj"); ("", "") of a module in no block."""
        match = re.fullmatch(rf"({self.block})(.+)", module)
        if match is None:
            return "", ""
        return match[1], module[match.end(1) :]


def check_fields(fields, supported):
    """Raise ValueError if a field has a value under which a model computes something else.

    `supported` is {field: the values that this library computes, the first where it is absent}.
    """
    for field, values in supported.items():
        if fields.get(field, values[0]) not in values:
            raise ValueError(
                f"{field}={fields[field]!r} changes what the model computes; only "
                f"{' or '.join(map(repr, values))} is implemented"
            )


def head_is_tied(folder, fields, tensors, *, embedding, head, default):
    """Is the head the embedding? Takes a head out of `tensors` that is a copy of the embedding.

    A tied file may hold the two as one tensor under either name: it is put under the embedding's.
    `default` stands for an absent field tie_word_embeddings.
    """
    tied = fields.get("tie_word_embeddings", default)
    if not isinstance(tied, bool):
        raise ValueError(f"tie_word_embeddings must be true or false, got {tied!r}")
    if not tied or head not in tensors:
        return tied
    if embedding not in tensors:
        tensors[embedding] = tensors.pop(head)
        return tied
    if np.array_equal(tensors[head], tensors[embedding]):
        del tensors[head]
        return True
    # The warning points at the line that called load_model or load_gpt2, five calls above.
    warnings.warn(
        f"{folder}: {head} differs from {embedding} although tie_word_embeddings is true; it is "
        "kept as a head of its own, as transformers 5 does (4 overwrites one)",
        stacklevel=6,
    )
    return False
