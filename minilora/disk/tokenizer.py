"""From text to token ids and back, as a model's files say: a tokenizer of theirs, or 96 characters.

Knows the files of tokenizers and the fields of config.json, no tensor.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import characters
from .base_files import is_gguf
from .chat_template import (
    MAP,
    SETTINGS,
    ChatTemplate,
    read_settings,
    read_special_texts,
    read_template,
)
from .checks import library_errors
from .conversation import Conversations, turn_end
from .folder import load_config
from .lfs import check_no_pointer
from .models import CONFIG, TENSORS, family_of_fields
from .reading import LARGEST_TOKENIZER, check_regular, read_object
from .token_stream import TokenStream
from .tokenizer_file import MOST_TOKENS, read_tokenizer_file
from .vocabulary import Vocabulary

# What GPT-2 ends a text with.
END = "<|endoftext|>"
ONE_FILE = "tokenizer.json"
VOCABULARY = "vocab.json"
MERGES = "merges.txt"
ADDED = "added_tokens.json"
GENERATION = "generation_config.json"


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back: encode(text) -> int64 array (N,), decode(ids) -> text.

    In `encode` the name of a control token, written out in a text, is that token; in `encode_text`
    it is text. Any of `ends` ends a text or an answer. `cuttable`: a text may be cut before each
    newline that something not blank follows, and its parts encoded one by one, with the same
    tokens. `start` are the ids that a text begins with for the model (Llama's `<s>`), often none;
    `begun` puts them in front, no other method does. `template` is the ChatTemplate of the model,
    or None: templates write the start themselves.
    """

    encode: Callable
    decode: Callable
    ends: tuple
    vocab_size: int
    cuttable: bool
    encode_text: Callable
    conversations: Conversations | None = None
    start: tuple = ()
    vocabulary: Vocabulary | None = None

    @property
    def end(self):
        """The id that training puts after an answer."""
        return self.ends[0]

    @property
    def template(self):
        """The model's ChatTemplate, or None."""
        return None if self.conversations is None else self.conversations.template

    def begun(self, ids):
        """`ids` (N,) of a text from its beginning on, with `start` in front, but never twice."""
        n = len(self.start)
        if tuple(ids[:n]) == self.start:
            return ids
        return np.concatenate([np.array(self.start, np.int64), ids])

    def encode_pair(self, prompt, answer, prompt_is_typed=False):
        """(ids (N,) of a prompt, with `start` in front; ids (M,) of an answer that continues it).

        The prompt's are those that a model is given when it is asked, so no token reaches over the
        end of it. Some tokenizers put a space before a text: none comes before the answer. With
        `prompt_is_typed` the names of control tokens in the prompt are text.
        Raises: as `encode`.
        """
        prompt_ids = self.encode_text(prompt) if prompt_is_typed else self.encode(prompt)
        if self.vocabulary is None:
            answer_ids = self.encode(answer)
        else:
            answer_ids = self.vocabulary.encode_answer(prompt, prompt_ids, answer)
        return self.begun(prompt_ids), answer_ids

    def encode_chat(self, messages, add_generation_prompt=False):
        """The ids (N,) of a conversation, [{"role": "user", "content": "..."}, ...].

        They are those of the text that the model's template makes of it, but for control tokens
        that stand in a content: these are text. With `add_generation_prompt` the assistant's turn
        is opened at the end.
        Raises: ValueError if there is no template, or if it refuses the messages.
        """
        return self._with_template().encode(messages, add_generation_prompt)

    def encode_answers(self, messages):
        """(ids (N,), is_answer (N,) bool) of a conversation: which tokens the assistant wrote.

        Raises: as `encode_chat`, and if the assistant's turns cannot be told.
        """
        return self._with_template().encode_answers(messages)

    def _with_template(self):
        if self.conversations is None:
            raise ValueError(
                "this model has no chat template, so that messages have no text: add its "
                "chat_template.jinja, take a model that was made for chat, or give prompts and "
                "answers"
            )
        return self.conversations

    def stream(self, after=()):
        """A TokenStream: the text of ids that come one at a time, after those of another text."""
        return TokenStream(self.decode, after)


def load_tokenizer(base):
    """The Tokenizer of a model: the folder `base`, or a `.gguf` file.

    A folder's is read from `tokenizer.json`, else from `vocab.json` and `merges.txt`, through the
    library `tokenizers`, with the tokens that `added_tokens.json` and `tokenizer_config.json` add.
    A model of minilora's with 96 tokens and none of these files knows the characters of
    `characters.py`. No token is added to a text by encoding it.

    `start` is what transformers puts before a text: what the post-processor in `tokenizer.json`
    does, whatever `add_bos_token` says beside it; without that file the `bos_token`, or GPT-2's, if
    the `add_bos_token` of `tokenizer_config.json` is true.

    `ends` are, each once and in this order: the `eos_token` of `tokenizer_config.json`, or else of
    `special_tokens_map.json`; the `eos_token_id` of `config.json` and that of
    `generation_config.json`, one or a list; if these say nothing, `<|endoftext|>`; at last the
    token that the chat template ends a turn with.
    Raises: FileNotFoundError that names the missing file, ValueError for files that are damaged, do
    not fit the model's vocab_size, or have no token that ends a text.
    """
    base = Path(base)
    if is_gguf(base):
        return _of_gguf(base)
    fields = load_config(base, TENSORS, CONFIG)
    files = [name for name in (ONE_FILE, VOCABULARY, MERGES) if (base / name).exists()]
    if not files and _knows_characters(fields):
        return Tokenizer(
            characters.encode,
            characters.decode,
            ends=(0,),
            vocab_size=len(characters.ALPHABET),
            cuttable=True,
            encode_text=characters.encode,
        )
    bpe = _of_folder(base, files)
    specials = read_special_texts(base)
    vocabulary = Vocabulary(bpe, [*specials.values(), END], base)
    _check_vocabulary(base, vocabulary.size, fields.get("vocab_size"))
    ends = _ends(base, vocabulary, specials.get("eos_token"), fields)
    start = vocabulary.start
    if ONE_FILE not in files:
        start = _stated_start(base, vocabulary, specials.get("bos_token"))
    return _tokenizer(vocabulary, ends, read_template(base), start)


def _of_gguf(path):
    """The Tokenizer of a GGUF file."""
    # A model in a folder does not need what reads such files.
    from .gguf import gguf_fields, gguf_tokenizer

    bpe, ends, text = gguf_tokenizer(path)
    specials = {"eos_token": bpe.id_to_token(ends[0])}
    # A template may write it, whether texts without one begin with it or not.
    bos = gguf_fields(path)["bos_token_id"]
    if bos is not None:
        specials["bos_token"] = bpe.id_to_token(bos)
    # As of a folder.
    _make_control(bpe, specials.values())
    template = None
    if text is not None:
        template = ChatTemplate(text, specials, f"{path}: tokenizer.chat_template")
    vocabulary = Vocabulary(bpe, [*specials.values(), END], path)
    return _tokenizer(vocabulary, ends, template, vocabulary.start)


def _tokenizer(vocabulary, ends, template, start):
    """The Tokenizer of a Vocabulary, whose turns end as `template` says, None for no template."""
    ends = list(ends)
    conversations = None
    if template is not None:
        ends.append(turn_end(vocabulary, template))
        ends = [number for number in ends if number is not None]
        conversations = Conversations(vocabulary, template, ends)
    return Tokenizer(
        vocabulary.encode,
        vocabulary.decode,
        ends=tuple(dict.fromkeys(ends)),
        vocab_size=vocabulary.size,
        cuttable=_is_cuttable(vocabulary.bpe),
        encode_text=vocabulary.encode_text,
        conversations=conversations,
        start=start,
        vocabulary=vocabulary,
    )


def _knows_characters(fields):
    family = family_of_fields(fields)
    if family is None or not family.knows_characters:
        return False
    return fields.get("vocab_size") == len(characters.ALPHABET)


def _of_folder(folder, files):
    """The `tokenizers.Tokenizer` of a folder that has `files` of those it can be read from."""
    if ONE_FILE in files:
        return _read_one_file(folder)
    if VOCABULARY in files and MERGES in files:
        return _read_two_files(folder)
    missing = f"{ONE_FILE}, or {VOCABULARY} and {MERGES},"
    if VOCABULARY in files:
        missing = MERGES
    elif MERGES in files:
        missing = VOCABULARY
    raise FileNotFoundError(
        f"{folder}: {missing} is missing; without it no text can be turned into tokens. Copy it "
        "from where the model came from"
    )


def _check_vocabulary(folder, size, room):
    """Raise ValueError unless the model's embedding has a row for each token."""
    if type(room) is not int or not 0 < size <= room:
        raise ValueError(
            f"{folder}: the tokenizer has {size} tokens, the model (config.json: vocab_size) "
            f"{room}; these files do not belong together"
        )


def _ends(folder, vocabulary, eos_token, fields):
    """The ids that end a text, of which the first is the tokenizer's `eos_token`, if it has one."""
    ends = []
    if eos_token is not None:
        ends.append(_named_token(folder, vocabulary, "eos_token", eos_token))
    generation = folder / GENERATION
    stated = [(folder / CONFIG, fields)]
    if generation.exists():
        stated.append((generation, read_object(generation)))
    for path, saying in stated:
        ends += _numbered_ends(path, vocabulary, saying.get("eos_token_id"))
    if not ends:
        if vocabulary.bpe.token_to_id(END) is None:
            raise ValueError(
                f"{folder}: no token ends a text: set eos_token_id in {CONFIG} to the id of the "
                f"token that does, one of 0 .. {vocabulary.size - 1}"
            )
        ends = [vocabulary.bpe.token_to_id(END)]
    return ends


def _stated_start(folder, vocabulary, bos_token):
    """What a text begins with by the settings in `folder`: the id of `bos_token`, or nothing."""
    settings = read_settings(folder)
    adds_bos = settings.get("add_bos_token")
    if not isinstance(adds_bos, (bool, type(None))):
        raise ValueError(
            f"{folder / SETTINGS}: add_bos_token must be true or false, got {adds_bos!r:.50}"
        )
    # Where bos_token is null transformers adds none either.
    if bos_token is None and "bos_token" not in settings:
        bos_token = END
    if not adds_bos or bos_token is None:
        return ()
    return (_named_token(folder, vocabulary, "bos_token", bos_token),)


def _named_token(folder, vocabulary, name, text):
    number = vocabulary.bpe.token_to_id(text)
    if number is None:
        path = folder / SETTINGS
        if name not in read_settings(folder) and (folder / MAP).exists():
            path = folder / MAP
        raise ValueError(
            f"{path}: {name} {text!r} is none of the {vocabulary.size} tokens; take all files "
            "of the tokenizer from one place"
        )
    return number


def _numbered_ends(path, vocabulary, stated):
    """The ids in an `eos_token_id`, which is a number, a list of numbers or None."""
    if stated is None:
        return []
    numbers = stated if isinstance(stated, list) else [stated]
    for number in numbers:
        if type(number) is not int or not 0 <= number < vocabulary.size:
            remedy = "the id of the token that ends a text"
            known = vocabulary.bpe.token_to_id(END)
            if known is not None:
                remedy = f"{known}, which is {END}, or to another one"
            raise ValueError(
                f"{path}: eos_token_id {stated!r}: {number!r} is none of the tokenizer's ids, "
                f"0 .. {vocabulary.size - 1}; set it to {remedy}"
            )
    return numbers


def _is_cuttable(bpe):
    """Does it split as GPT-2's does, so that no token reaches over a newline?"""
    for token in bpe.get_added_tokens_decoder().values():
        if token.lstrip or token.rstrip or any(map(str.isspace, token.content)):
            return False
    split = bpe.pre_tokenizer
    if bpe.normalizer is not None or not getattr(split, "use_regex", False):
        return False
    # Each part of a cut text would get a space before it.
    return not split.add_prefix_space


def _read_one_file(folder):
    """The tokenizer in tokenizer.json, with what the files beside it add."""
    path = folder / ONE_FILE
    check_no_pointer(path)
    bpe = read_tokenizer_file(path)
    for number, token in _added_tokens(folder).items():
        if bpe.token_to_id(token.content) is None:
            bpe.add_tokens([token])
        if bpe.token_to_id(token.content) != number:
            raise ValueError(
                f"{folder}: {token.content!r} is token {bpe.token_to_id(token.content)} by "
                f"{ONE_FILE}, and {number} by {ADDED} or {SETTINGS}; take all files of the "
                "tokenizer from one place"
            )
    _make_control(bpe, read_special_texts(folder).values())
    return bpe


def _read_two_files(folder):
    """The tokenizer in vocab.json and merges.txt, with what the files beside them add."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    paths = [str(folder / VOCABULARY), str(folder / MERGES)]
    for path in paths:
        check_regular(path, LARGEST_TOKENIZER)
        check_no_pointer(path)
    where = f"{' and '.join(paths)}: damaged, or of another kind"
    with library_errors(where):
        vocabulary, merges = models.BPE.read_file(*paths)
    added = _added_tokens(folder)
    texts = {number: text for text, number in vocabulary.items()}
    for number, token in added.items():
        present = texts.get(number, token.content)
        if vocabulary.get(token.content, number) != number or present != token.content:
            raise ValueError(
                f"{folder}: token {number} is {token.content!r} by {ADDED} or {SETTINGS}, and "
                f"{VOCABULARY} has {present!r}: {vocabulary.get(present, number)}; take all files "
                "of the tokenizer from one place"
            )
        vocabulary[token.content] = number
    with library_errors(where):
        bpe = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_tokens(list(added.values()))
    _make_control(bpe, read_special_texts(folder).values())
    if bpe.token_to_id(END) is not None:
        bpe.add_special_tokens([END])
    return bpe


def _make_control(bpe, names):
    """Make a control token of each token of the vocabulary that is one of `names`."""
    added = {token.content for token in bpe.get_added_tokens_decoder().values()}
    for text in names:
        if text not in added and bpe.token_to_id(text) is not None:
            bpe.add_special_tokens([text])


def _added_tokens(folder):
    """{id: AddedToken} of `added_tokens.json` and the `added_tokens_decoder` of the settings."""
    named = read_special_texts(folder).values()
    tokens = {}
    path = folder / ADDED
    if path.exists():
        for text, number in read_object(path).items():
            special = text in named
            flags = {"content": text, "special": special, "normalized": not special}
            tokens[_added_id(path, text, number)] = _added_token(path, text, flags)
    path = folder / SETTINGS
    decoder = read_settings(folder).get("added_tokens_decoder")
    if decoder is None:
        decoder = {}
    if not isinstance(decoder, dict):
        raise ValueError(
            f"{path}: added_tokens_decoder must be an object, from an id to a token with its "
            f"flags, got {decoder!r:.80}"
        )
    for number, saved in decoder.items():
        where = f"{path}: added_tokens_decoder"
        # The names of fields are texts.
        its_id = int(number) if re.fullmatch("-?[0-9]{1,10}", number) else number
        tokens[_added_id(where, number, its_id)] = _added_token(where, number, saved)
    return dict(sorted(tokens.items()))


def _added_id(where, name, number):
    if type(number) is not int or not 0 <= number < MOST_TOKENS:
        raise ValueError(f"{where}: {name!r:.50}: {number!r:.50} is no id of a token")
    return number


def _added_token(where, name, saved):
    """The AddedToken that `saved` describes, an object with a content and flags."""
    from tokenizers import AddedToken

    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    try:
        chosen = {flag: saved[flag] for flag in flags if flag in saved}
        return AddedToken(saved["content"], **chosen)
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(
            f"{where}: {name!r:.50}: {json.dumps(saved)[:80]} is no token with its flags: {error}"
        ) from None
