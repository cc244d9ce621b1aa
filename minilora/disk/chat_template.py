"""Chat templates: from the messages of a conversation to its text. Knows no token ids.

A template is a text in jinja2's language that comes with a model. It is used as it is.
"""

import re
from pathlib import Path

from .reading import LARGEST_TEMPLATE, read_bytes, read_object

TEMPLATE = "chat_template.jinja"
SETTINGS = "tokenizer_config.json"
# Where the special tokens stand in older folders.
MAP = "special_tokens_map.json"
# The special tokens that every tokenizer of transformers may have. A field that ends alike may hold
# something else: `add_bos_token` is true or false.
SPECIAL = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip
# The template of several that is meant for conversations without tools.
DEFAULT = "default"
# A block whose contents the assistant wrote, and what stands around them while it is rendered:
# Unicode keeps these two for the use within programs.
MARKED = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
OPEN_MARK = "\ufdd2"
CLOSE_MARK = "\ufdd3"
# More of a template's message than this is no message.
LONGEST_MESSAGE = 300


class ChatTemplate:
    """A chat template, compiled.

    `text` is its source, `specials` what else it may write, by name: {"bos_token": "<s>", ...}.
    `where` names its file in messages.
    Raises: ValueError, one line, if it is no template.
    """

    def __init__(self, text, specials=None, where="the chat template"):
        # jinja2 is imported where a model has a template.
        from .template_sandbox import Environment

        self.text = text
        self.specials = dict(specials or {})
        self.where = where
        self._environment = Environment((OPEN_MARK, CLOSE_MARK))
        self._compiled = self._guarded(self._environment.from_string, text)

    def render(self, messages, add_generation_prompt=False):
        """The text of `messages`, [{"role": "user", "content": "..."}, ...].

        With `add_generation_prompt`, what opens an assistant's turn stands at the end.
        Raises: ValueError, one line, if the template fails, refuses the messages, or takes longer
        or more room than a conversation can.
        """
        text, _ = self.render_marked(messages, add_generation_prompt)
        return text

    def render_marked(self, messages, add_generation_prompt=False):
        """(text, [(start, stop), ...] of what the template has between `{% generation %}` marks).

        The list is None for a template without such marks.
        Raises: as `render`.
        """
        variables = {
            **self.specials,
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        text = self._guarded(self._environment.run, self._compiled, variables)
        return self._without_marks(text)

    def _without_marks(self, marked):
        pieces = marked.split(OPEN_MARK)
        text = pieces[0]
        spans = []
        for piece in pieces[1:]:
            inside, _, after = piece.partition(CLOSE_MARK)
            spans.append((len(text), len(text) + len(inside)))
            text += inside + after.replace(CLOSE_MARK, "")
        if not MARKED.search(self.text):
            return text, None
        return text, spans

    def _guarded(self, function, *arguments):
        """The result of `function`; whatever goes wrong in it is one line that names the file."""
        try:
            return function(*arguments)
        except Exception as error:
            # A template can raise anything that Python can.
            message = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"{self.where}: the chat template fails: {message[:LONGEST_MESSAGE]}"
            ) from None


def read_template(folder):
    """The ChatTemplate in the folder of a model, or None if it has none.

    It is `chat_template.jinja`, else the `chat_template` of `tokenizer_config.json`, which is a
    text, or a list of named ones, of which that named "default" is taken.
    Raises: ValueError that names the file, for one that is no template, or no UTF-8.
    """
    folder = Path(folder)
    specials = read_special_texts(folder)
    path = folder / TEMPLATE
    if path.exists():
        try:
            text = read_bytes(path, LARGEST_TEMPLATE).decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 ({error.reason}); save it as UTF-8") from None
        # As Python reads a text: a line end of Windows is a newline, and so is one of old Macs.
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        return ChatTemplate(text, specials, path)
    stated = read_settings(folder).get("chat_template")
    if stated is None:
        return None
    where = folder / SETTINGS
    return ChatTemplate(_default_of(stated, where), specials, where)


def _default_of(stated, where):
    """The text of the template that a `chat_template` field states."""
    if isinstance(stated, list):
        named = {}
        for item in stated:
            if isinstance(item, dict) and isinstance(item.get("name"), str):
                named[item["name"]] = item.get("template")
        if DEFAULT not in named:
            raise ValueError(
                f'{where}: chat_template holds {sorted(named)}; one must be named "{DEFAULT}"'
            )
        stated = named[DEFAULT]
    if not isinstance(stated, str):
        raise ValueError(
            f"{where}: chat_template must be a text or a list of named ones, got {stated!r:.80}"
        )
    return stated


def read_settings(folder):
    """What `tokenizer_config.json` says, a dict; empty if there is no such file."""
    return _read_object(Path(folder) / SETTINGS)


def read_special_texts(folder):
    """{"eos_token": "<|im_end|>", ...}: the special tokens that the files of a tokenizer name.

    Those of `tokenizer_config.json`; and those of `special_tokens_map.json` of which the former
    says nothing.
    Raises: ValueError that names the file, as `special_texts`.
    """
    settings = read_settings(folder)
    path = Path(folder) / MAP
    in_map = special_texts(_read_object(path), path)
    texts = {name: text for name, text in in_map.items() if name not in settings}
    return {**texts, **special_texts(settings, Path(folder) / SETTINGS)}


def _read_object(path):
    if not path.exists():
        return {}
    return read_object(path)


def special_texts(settings, where):
    """The special tokens among `settings`, the fields of the file `where`: {name: text}.

    Raises: ValueError for one of SPECIAL that is no text, nor an object with a content, nor null.
    """
    texts = {}
    for name, value in settings.items():
        if not name.endswith("_token"):
            continue
        # A token with its flags is an object.
        text = value.get("content") if isinstance(value, dict) else value
        if _is_unicode(text):
            texts[name] = text
        elif name in SPECIAL and value is not None:
            raise ValueError(
                f"{where}: {name} must be the text of a token, or an object with its content, got "
                f"{value!r:.80}"
            )
    return texts


def _is_unicode(text):
    """Is it a text, and no half of a pair of surrogates in it?"""
    return isinstance(text, str) and not re.search("[\ud800-\udfff]", text)
