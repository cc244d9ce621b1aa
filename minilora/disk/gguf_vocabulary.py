"""The vocabulary in the settings of a GGUF file as a tokenizer of the library `tokenizers`.

Two kinds: byte-level BPE with merges ("gpt2"), and SentencePiece with scores ("llama"). Knows no
tensor and opens no file.
Source: src/llama-vocab.cpp of llama.cpp; transformers' convert_slow_tokenizer.py.
"""

import numpy as np

from .checks import library_errors

# What a token is. The rest are plain pieces of text.
_NORMAL = 1
_UNKNOWN = 2
_CONTROL = 3
_USER_DEFINED = 4
# No piece of a word is as long; the time to find the merges of one grows with its square.
_LONGEST_PIECE = 1000
# SentencePiece's mark for a space.
_SPACE = "\u2581"

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# How a text is split before its parts are merged, by llama.cpp's name: the regular expressions of
# the models' own tokenizer.json. None stands for GPT-2's, which the library has.
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}| "
    r"?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    "gpt-2": None,
    "smollm": None,
    "starcoder": None,
    "refact": None,
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "qwen2": _QWEN2,
    "tekken": _TEKKEN,
}
# Each digit is a part of its own.
_SINGLE_DIGITS = ("smollm", "starcoder", "refact")
# A part that is a token is that token, whether merges lead to it or not; a text begins with `bos`.
_WHOLE_PARTS = ("llama-bpe", "llama-v3", "llama3", "tekken")
# Texts are normalized to Unicode's NFC.
_COMPOSED = ("qwen2",)


def read_vocabulary(path, settings):
    """The `tokenizers.Tokenizer` that `settings`, those of the GGUF file `path`, describe.

    As in transformers, it puts `bos` in front (and `eos` behind) where the file asks for it and
    encode is called with add_special_tokens=True; with False no token is added.
    Raises: ValueError that names the file and what it lacks, or what is not implemented.
    """
    reader = _Vocabulary(path, settings)
    kind = reader.setting("model", str)
    if kind == "gpt2":
        bpe = _byte_level(reader)
    elif kind == "llama":
        bpe = _sentencepiece(reader)
    else:
        reader.refuse(f"its tokenizer is of the kind {kind!r:.50}; only gpt2 and llama are read")
    _add_tokens(reader, bpe)
    _add_ends(reader, bpe)
    return bpe


class _Vocabulary:
    """The settings of the tokenizer, by their names without `tokenizer.ggml`."""

    def __init__(self, path, settings):
        self.where = f"{path}, its tokenizer"
        self.settings = settings
        self.tokens = self.setting("tokens", list)
        types = self.setting("token_type", np.ndarray)
        if len(types) != len(self.tokens):
            self.refuse(f"{len(self.tokens)} tokens, and token_type has {len(types)}")
        self.types = types.tolist()
        self.ids = {token: index for index, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            twice = next(t for index, t in enumerate(self.tokens) if self.ids[t] != index)
            self.refuse(f"token {twice!r:.50} is there twice")

    def refuse(self, why):
        raise ValueError(f"{self.where}: {why}")

    def setting(self, key, kind, default=None):
        """A setting, which must be of the type `kind`."""
        value = self.settings.get(f"tokenizer.ggml.{key}", default)
        if type(value) is not kind:
            if f"tokenizer.ggml.{key}" not in self.settings:
                self.refuse(f"tokenizer.ggml.{key} is absent")
            self.refuse(f"tokenizer.ggml.{key} is no {kind.__name__}, got {value!r:.50}")
        return value

    def has(self, key):
        return f"tokenizer.ggml.{key}" in self.settings

    def token(self, key):
        """The text of the token that the setting `key` names; None if it is absent."""
        if not self.has(key):
            return None
        index = self.setting(key, int)
        if not 0 <= index < len(self.tokens):
            self.refuse(f"{key}={index} must be one of its {len(self.tokens)} tokens")
        return self.tokens[index]

    def of_type(self, kind):
        return [token for token, its in zip(self.tokens, self.types, strict=True) if its == kind]

    def merges(self):
        """The pairs that are merged, in this order."""
        pairs = []
        for merge in self.setting("merges", list):
            pair = tuple(merge.split(" "))
            if len(pair) != 2:
                self.refuse(f"the merge {merge!r:.50} must be two pieces with a space between")
            pairs.append(pair)
        return pairs


def _byte_level(reader):
    """A BPE over bytes, each written as a letter: GPT-2's, Llama 3's, Qwen's, SmolLM's."""
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    split = reader.setting("pre", str)
    if split not in SPLITS:
        reader.refuse(
            f"it splits texts as {split!r:.50} does (tokenizer.ggml.pre); only "
            f"{', '.join(SPLITS)} are read"
        )
    bpe = _bpe(reader, reader.merges(), ignore_merges=split in _WHOLE_PARTS)
    steps = []
    if split in _SINGLE_DIGITS:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if SPLITS[split] is not None:
        steps.append(pre_tokenizers.Split(Regex(SPLITS[split]), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=SPLITS[split] is None))
    bpe.pre_tokenizer = steps[0]
    # A single step stands alone, as in GPT-2's own file.
    if len(steps) > 1:
        bpe.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if split in _COMPOSED:
        bpe.normalizer = normalizers.NFC()
    bpe.decoder = decoders.ByteLevel()
    return bpe


def _sentencepiece(reader):
    """A BPE over characters: Llama's, Llama 2's, Mistral's."""
    from tokenizers import decoders, normalizers

    if reader.has("merges"):
        pairs = reader.merges()
    else:
        pairs = _merges_of_scores(reader)
    has_bytes = all(f"<0x{byte:02X}>" in reader.ids for byte in range(256))
    unknown = reader.token("unknown_token_id")
    if unknown is None:
        unknown = next(iter(reader.of_type(_UNKNOWN)), None)
    if unknown is None and not has_bytes:
        reader.refuse(
            "it has neither the 256 bytes nor a token for what is unknown, so that letters would "
            "be lost"
        )
    bpe = _bpe(reader, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=has_bytes)
    prefixed = reader.setting("add_space_prefix", bool, default=True)
    spaces = [normalizers.Replace(" ", _SPACE)]
    parts = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefixed:
        # A space goes before each text between control tokens, and the first is taken off again.
        spaces.insert(0, normalizers.Prepend(_SPACE))
        parts.append(decoders.Strip(" ", 1, 0))
    bpe.normalizer = normalizers.Sequence(spaces)
    bpe.decoder = decoders.Sequence(parts)
    return bpe


def _merges_of_scores(reader):
    """The merges that SentencePiece's scores stand for: whatever makes the best piece comes first.

    Only plain pieces take part: no merge leads from text to a control token.
    """
    scores = reader.setting("scores", np.ndarray)
    if len(scores) != len(reader.tokens) or not np.isfinite(scores).all():
        reader.refuse(f"scores must be {len(reader.tokens)} finite numbers, one for each token")
    score_of = {}
    for token, kind, score in zip(reader.tokens, reader.types, scores.tolist(), strict=True):
        if kind == _NORMAL:
            score_of[token] = score
            if len(token) > _LONGEST_PIECE:
                reader.refuse(f"token {token!r:.50} is {len(token):,} letters long")
    merges = []
    for piece, score in score_of.items():
        for cut in range(1, len(piece)):
            left = piece[:cut]
            right = piece[cut:]
            if left in score_of and right in score_of:
                merges.append((score, len(left), len(right), left, right))
    # Equal scores: the longer left part first, as transformers has it.
    merges.sort(key=lambda merge: merge[:3], reverse=True)
    return [(left, right) for *_, left, right in merges]


def _bpe(reader, merges, **settings):
    """A bare BPE of the tokens of a file, each with its own id."""
    # Imported where it is used: whoever only reads tensors does not wait for it.
    from tokenizers import Tokenizer, models

    with library_errors(f"{reader.where}: its merges do not belong to its tokens"):
        return Tokenizer(models.BPE(vocab=reader.ids, merges=merges, **settings))


def _add_tokens(reader, bpe):
    """Take control tokens, and those that users defined, out of a text before it is split."""
    from tokenizers import AddedToken

    for kind, is_special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [
            AddedToken(token, special=is_special, normalized=False)
            for token in reader.of_type(kind)
            if token
        ]
        with library_errors(f"{reader.where}: a token cannot be added"):
            bpe.add_tokens(added)


def _add_ends(reader, bpe):
    """Put bos in front and eos behind, where the file asks for it, as a post-processor does it."""
    from tokenizers import processors

    bos = reader.token("bos_token_id")
    eos = reader.token("eos_token_id")
    is_llama = reader.setting("model", str) == "llama"
    starts_by_default = is_llama or reader.settings.get("tokenizer.ggml.pre") in _WHOLE_PARTS
    starts = reader.setting("add_bos_token", bool, default=starts_by_default)
    ends = reader.setting("add_eos_token", bool, default=False)
    template = ["$A"]
    if starts and bos is not None:
        template.insert(0, bos)
    if ends and eos is not None:
        template.append(eos)
    if (starts and bos is None and reader.has("add_bos_token")) or (ends and eos is None):
        reader.refuse("it asks for a token before or behind each text, and does not say which")
    if len(template) > 1:
        named = [(token, reader.ids[token]) for token in template if token != "$A"]
        around = f"bos {bos!r:.50} and eos {eos!r:.50} cannot be put around texts"
        with library_errors(f"{reader.where}: {around}"):
            bpe.post_processor = processors.TemplateProcessing(
                single=template, special_tokens=list(dict.fromkeys(named))
            )
