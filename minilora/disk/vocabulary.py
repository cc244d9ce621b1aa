"""Text to token ids, with control tokens only where they are meant. Knows no file and no message.

A control token is one that no text of a person holds: what ends a text, or opens somebody's turn.
`encode` takes its name in a text for the token. `encode_text` takes it for text. In the text of a
conversation both occur: the template's are tokens, those that somebody typed are text. Before it is
rendered, what was typed is shadowed: each of its characters that could be taken for a control token
is replaced by one of its own in planes of Unicode that are not in use. Lengths stay as they are,
and so do the positions in the text.
"""

import functools
import json
import re

import numpy as np

from .chat_template import CLOSE_MARK, OPEN_MARK
from .checks import library_errors

# Planes 4 to 6 of Unicode, which no text uses, shadow planes 0 to 2.
SHADOW = 0x40000
SHADOWED = re.compile("[\U00040000-\U0006ffff]")
# The names that control tokens have in the copy of a tokenizer: characters of plane 13.
TWIN = 0xD0000
# What the parts of a tokenizer put before a text, or take off it there, is left away by these.
NOTHING_IN_FRONT = {
    "Metaspace": {"prepend_scheme": "never", "add_prefix_space": False},
    "ByteLevel": {"add_prefix_space": False},
    "Strip": {"strip_left": False},
}
# Planes without a character.
UNASSIGNED = re.compile("[\U00040000-\U000dffff]")


class Vocabulary:
    """A `tokenizers.Tokenizer`, made to do what this library asks of it.

    `controls` names tokens that are control tokens besides those that `bpe` says are special.
    `where` names its file in messages. No token is added to a text: `start` are the ids that its
    own post-processor would have put before one.
    """

    def __init__(self, bpe, controls, where):
        from tokenizers import processors

        # A tokenizer.json may ask for any of these, and would be obeyed without a word. The last
        # would also leave blanks out of the positions of tokens.
        if getattr(bpe.model, "dropout", None) is not None:
            # Merges left out at random, another time other ones.
            bpe.model.dropout = None
        bpe.no_truncation()
        bpe.no_padding()
        with library_errors(f"the tokenizer of {where} cannot say what it puts before a text"):
            self.start = _text_start(bpe)
        bpe.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
        added = bpe.get_added_tokens_decoder()
        self.bpe = bpe
        self.where = where
        self._added = list(added)
        self.size = max(bpe.get_vocab().values(), default=-1) + 1
        # {text: id}, the longest first: where two begin at one place, that is what is there.
        by_length = sorted(added.items(), key=lambda item: -len(item[1].content))
        self.controls = {
            token.content: number
            for number, token in by_length
            if token.special or token.content in controls
        }
        names = [re.escape(text) for text in self.controls]
        self.pattern = re.compile("|".join([*names, OPEN_MARK, CLOSE_MARK]))

    def encode(self, text):
        """The ids (N,) of `text`, in which the name of a control token is that token.

        Raises: ValueError if the tokenizer does not take the text.
        """
        return _ids(self._encoded(self.bpe, text))

    def encode_text(self, text):
        """The ids (N,) of `text`, in which the name of a control token is text like any other.

        Raises: as `encode`.
        """
        if not self.holds_control(text):
            return self.encode(text)
        return _ids(self._encoded(self._copy, text))

    def encode_answer(self, prompt, prompt_ids, answer):
        """The ids (N,) of `answer` where it continues `prompt`, which has the ids `prompt_ids`.

        Where the tokenizer puts nothing before a text they are those of `encode`. Where it does,
        they are what the whole text has after the prompt; if the prompt has other ids in the whole,
        because a token reaches over its end, those of the answer with nothing in front.
        Raises: as `encode`.
        """
        if self._bare is self.bpe:
            return self.encode(answer)
        n = len(prompt_ids)
        ids, _, stops = _positions(self._encoded(self.bpe, prompt + answer))
        if np.array_equal(ids[:n], prompt_ids) and (stops[:n] <= len(prompt)).all():
            return ids[n:]
        ids, _, _ = self._continued(self.bpe, answer)
        return ids

    def decode(self, ids):
        """The text of `ids`; an id that is no token's has none."""
        ids = np.asarray(ids).reshape(-1).tolist()
        with library_errors(f"the tokenizer of {self.where} does not take the ids {ids[:8]}"):
            return self.bpe.decode(ids, skip_special_tokens=False)

    def holds_control(self, text):
        """Does `text` hold the name of a control token?"""
        return bool(self.pattern.search(text))

    def shadowed(self, text):
        """`text`, in which nothing can be taken for a control token or for a part of one.

        Raises: ValueError for characters outside Unicode's planes in use.
        """
        stray = UNASSIGNED.search(text)
        if stray:
            raise ValueError(f"the text holds {stray[0]!a}, which is no character of Unicode's")
        text = self.pattern.sub(lambda match: _shadow(match[0]), text)
        # Its edges could make a control token with what a template writes before and after it.
        core = text.strip()
        start = text.find(core)
        stop = start + len(core)
        if len(core) < self._longest and any(core in control for control in self.controls):
            return text[:start] + _shadow(core) + text[stop:]
        for n in range(min(self._longest, len(core)), 0, -1):
            head = core[:n]
            if head in self._ends:
                core = _shadow(head) + core[n:]
            tail = core[-n:]
            if tail in self._beginnings:
                core = core[:-n] + _shadow(tail)
        return text[:start] + core + text[stop:]

    def encode_written(self, text, continues=False):
        """(ids (N,), starts (N,), stops (N,)) of a text in which what was typed is shadowed.

        Outside the shadows the name of a control token is that token. A token is made of the
        characters start .. stop of `text`. Nothing is put before a text that `continues` another.
        Raises: as `encode`.
        """
        bpe = self.bpe
        if SHADOWED.search(text):
            bpe = self._copy
            text = self.pattern.sub(lambda match: self._twins.get(match[0], match[0]), text)
            text = SHADOWED.sub(lambda match: chr(ord(match[0]) - SHADOW), text)
        if continues:
            return self._continued(bpe, text)
        return _positions(self._encoded(bpe, text))

    def _continued(self, bpe, text):
        """(ids, starts, stops) of `text` by `bpe`, with nothing put before it."""
        bare = self._bare if bpe is self.bpe else self._bare_copy
        parts = _positions(self._encoded(bpe, text))
        if bare is bpe:
            return parts
        # A tokenizer may also put a space after each added token: from the first of them on it
        # encodes as ever.
        ids, starts, _ = parts
        added = np.flatnonzero(np.isin(ids, self._added))
        n = added[0] if len(added) else len(ids)
        stop = starts[n] if len(added) else len(text)
        head = _positions(self._encoded(bare, text[:stop]))
        return tuple(np.concatenate([h, part[n:]]) for h, part in zip(head, parts, strict=True))

    def _encoded(self, bpe, text):
        with library_errors(f"the tokenizer of {self.where} does not take {text[:40]!a}"):
            return bpe.encode(text, add_special_tokens=False)

    @functools.cached_property
    def _bare(self):
        return _with_nothing_in_front(self.bpe)

    @functools.cached_property
    def _bare_copy(self):
        return _with_nothing_in_front(self._copy)

    @functools.cached_property
    def _longest(self):
        return max((len(text) for text in self.controls), default=0)

    @functools.cached_property
    def _beginnings(self):
        return {text[:n] for text in self.controls for n in range(1, len(text))}

    @functools.cached_property
    def _ends(self):
        return {text[n:] for text in self.controls for n in range(1, len(text))}

    @functools.cached_property
    def _twins(self):
        """{text of a control token: its name in the copy, as long as the text}."""
        return {text: len(text) * chr(TWIN + i) for i, text in enumerate(self.controls)}

    @functools.cached_property
    def _copy(self):
        """The tokenizer, with the control tokens under names that nobody types."""
        import tokenizers

        fields = json.loads(self.bpe.to_str())
        for token in fields["added_tokens"]:
            token["content"] = self._twins.get(token["content"], token["content"])
        model = fields["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {
                self._twins.get(text, text): number for text, number in model["vocab"].items()
            }
        else:
            model["vocab"] = [
                [self._twins.get(text, text), score] for text, score in model["vocab"]
            ]
        if model.get("unk_token") in self._twins:
            model["unk_token"] = self._twins[model["unk_token"]]
        # Of a control token that is in a merge another token is made.
        with library_errors(f"the tokenizer of {self.where} takes a control token for a part"):
            return tokenizers.Tokenizer.from_str(json.dumps(fields))


def _text_start(bpe):
    """The ids, a tuple, that the post-processor of a `tokenizers.Tokenizer` puts before a text."""
    from tokenizers import Tokenizer, models

    if bpe.post_processor is None:
        return ()
    # A text of one token, by whatever tokenizer: what comes before it is the same for each.
    one = Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).encode("a")
    encoded = bpe.post_processor.process(one)
    return tuple(encoded.ids[: encoded.special_tokens_mask.index(0)])


def _with_nothing_in_front(bpe):
    """A copy of a tokenizer that puts nothing before a text, or `bpe` if that does not."""
    import tokenizers

    fields = json.loads(bpe.to_str())
    parts = {name: fields[name] for name in ("normalizer", "pre_tokenizer")}
    bare = {name: _bare_part(part) for name, part in parts.items()}
    if bare == parts:
        return bpe
    return tokenizers.Tokenizer.from_str(json.dumps({**fields, **bare}))


def _bare_part(part):
    """A normalizer or pre-tokenizer, as JSON has it, that puts nothing before a text."""
    if part is None or part["type"] == "Prepend":
        return None
    changed = {
        key: value for key, value in NOTHING_IN_FRONT.get(part["type"], {}).items() if key in part
    }
    for key in ("normalizers", "pretokenizers"):
        if key in part:
            inner = [_bare_part(one) for one in part[key]]
            changed[key] = [one for one in inner if one is not None]
    return {**part, **changed}


def _ids(encoded):
    return np.array(encoded.ids, np.int64)


def _positions(encoded):
    """(ids (N,), starts (N,), stops (N,)): each token's place in the text."""
    offsets = np.array(encoded.offsets, np.int64).reshape(-1, 2)
    return _ids(encoded), offsets[:, 0], offsets[:, 1]


def _shadow(text):
    """`text` in other planes; what is shadowed already, or has no shadow, stays."""
    return "".join(
        chr(SHADOW + ord(character)) if ord(character) < 0x30000 else character
        for character in text
    )
