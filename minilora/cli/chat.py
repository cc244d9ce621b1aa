"""A conversation in the terminal: questions in, answers token by token, adapters at a command.

Knows models, adapters and the chat template of a base; of the terminal only `read_line`, `write`
and `warn`. Answers go through `write`, everything else through `warn`.
"""

from pathlib import Path

import numpy as np

from ..disk.models import load_model_config
from ..disk.peft import load_adapter
from ..disk.tokenizer import load_tokenizer
from ..lora import attach
from .folders import find_sources
from .generation import check_top_k, check_utf8, load_base, widened
from .messages import one_line
from .parser import nearest
from .text_stream import TextStream

# What `/adapter` calls the base alone.
BASE = "none"
# {command: (what may follow it, what it does)}
COMMANDS = {
    "adapter": (" NAME", f"let another adapter answer, or {BASE}: the base; no NAME lists them"),
    "reset": ("", "forget the conversation"),
    "help": ("", "show this"),
    "exit": ("", "end; so do Ctrl-D, and Ctrl-C where no answer is being written"),
}
# {our command: other words for it}
SYNONYMS = {
    "adapter": ("adapters", "lora", "use"),
    "reset": ("clear", "new", "forget"),
    "help": ("?", "h", "commands"),
    "exit": ("quit", "q", "bye"),
}


class ContextFullError(ValueError):
    """The conversation has outgrown the model's context."""


class Conversation:
    """What has been said, and who answers next: `models` is {name: model}, `name` the one chosen.

    Another model is another entry: all share the arrays of one base, and nothing is loaded or
    changed to switch.
    """

    def __init__(self, models, name, tokenizer, sampling, system=None):
        self.models = models
        self.name = name
        self.tokenizer = tokenizer
        self.sampling = sampling
        self._rng = np.random.default_rng(sampling.seed)
        self._opening = opening(system)
        self.reset()

    def reset(self):
        """Forget what was said, but for the system's message."""
        self.messages = list(self._opening)
        self._forget_cache()

    def switch(self, name):
        """Let the model `name` answer from now on; what was said stays."""
        self.name = name
        self._forget_cache()

    def answer(self, text, write):
        """Write the model's answer to `text`, piece by piece; what it lacks, or None.

        Whatever was written is remembered, also if Ctrl-C ended it.
        Raises: ContextFullError if there is no room for an answer; the question is then forgotten.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        context = self.models[self.name].config.block_size
        ids = chat_ids(self.tokenizer, messages, context)
        n = min(self.sampling.max_new_tokens, context - len(ids))
        stream = TextStream(self.tokenizer)
        try:
            for token in self._tokens(ids, n):
                write(stream.push(token))
            write(stream.finish())
        except KeyboardInterrupt:
            if stream.text:
                self._remember(messages, stream.text)
            raise
        self._remember(messages, stream.text)
        if stream.unknown:
            return (
                f"{stream.unknown} of {stream.tokens} new tokens are left out: the tokenizer has "
                "no text for them"
            )
        if stream.ended:
            return None
        if n < self.sampling.max_new_tokens:
            return (
                f"cut: the conversation fills the model's context of {context} tokens; see /reset"
            )
        return f"cut after {n} tokens; --max-new-tokens allows more"

    def _remember(self, messages, reply):
        self.messages = [*messages, {"role": "assistant", "content": reply}]

    def _tokens(self, ids, n):
        """Yield at most n ids that follow `ids`, of which only what the cache lacks is read."""
        model = self.models[self.name]
        size = len(ids) + n
        if self._cache is not None and size <= self._size and _goes_on(ids, self._read):
            cache = self._cache
            unread = ids[len(self._read) :]
        else:
            # Room for what will follow: a whole context may be more than the memory there is.
            self._size = min(2 * size, model.config.block_size)
            cache = model.new_cache(self._size)
            unread = ids
        # If this does not come to its end, nobody can say how far the cache has got.
        self._forget_cache()
        tokens = self.sampling.tokens(
            model, unread[None], n, self._rng, self.tokenizer.ends, cache=cache
        )
        new = []
        for token in tokens:
            new.append(int(token[0]))
            yield new[-1]
        self._cache = cache
        # The last token was chosen, and not read.
        self._read = [*ids, *new[:-1]]

    def _forget_cache(self):
        # The cache of the model that answers, and the ids that are in it.
        self._cache = None
        self._read = []


def _goes_on(ids, beginning):
    """Do `ids` begin with the ids `beginning`, and go on?"""
    n = len(beginning)
    return len(ids) > n and np.array_equal(ids[:n], beginning)


def opening(system):
    """The messages a conversation begins with."""
    return [] if system is None else [{"role": "system", "content": system}]


def chat_ids(tokenizer, messages, context):
    """The ids of a conversation, up to where the model answers.

    Raises: ContextFullError if they leave no room for an answer; as the template does.
    """
    ids = tokenizer.encode_chat(messages, add_generation_prompt=True)
    if len(ids) == 0:
        raise ValueError("the base's chat template writes nothing of this message; use generate")
    if len(ids) >= context:
        raise ContextFullError(
            f"with this message the conversation has {len(ids)} tokens, and the model's context is "
            f"{context}: say it in fewer words"
        )
    return ids


def chat(
    base,
    adapters,
    sampling,
    xp,
    *,
    read_line,
    write,
    warn,
    system=None,
    message=None,
    quantize=None,
    accept_base=(),
):
    """Hold a conversation with the model in `base`, under one of the adapters at a time.

    `adapters` are folders, of which the first answers. `message` is answered alone, None to answer
    the lines of `read_line()`, which returns None at their end. `quantize` is what the base is
    packed as when it is loaded; `accept_base` as for `load_adapter`.
    Raises: ValueError or OSError, before any tensor is read, if the base has no chat template, or
    the template does not take these messages.
    """
    path = find_sources(base, adapters)
    folders = named(adapters)
    tokenizer = load_tokenizer(path)
    if tokenizer.template is None:
        raise ValueError(
            f"{base} has no chat template, which says how a conversation is written out for it; "
            "minilora generate continues a text"
        )
    check_top_k(sampling.top_k, tokenizer)
    for what, text in (("the system's message", system), ("the message", message)):
        if text is not None:
            check_utf8(what, text)
    first = "hello" if message is None else message
    context = load_model_config(path).block_size
    chat_ids(tokenizer, [*opening(system), {"role": "user", "content": first}], context)

    models = _models(load_base(path, xp, quantize, warn), folders, accept_base, warn)
    conversation = Conversation(models, next(iter(models)), tokenizer, sampling, system)
    if message is None:
        warn(f"{_who_answers(conversation)}; /help shows the commands")
        converse(conversation, read_line, write, warn)
        return
    why_cut = conversation.answer(message, write)
    write("\n")
    if why_cut is not None:
        warn(why_cut)


def named(folders):
    """{what a folder is called in the conversation: the folder}: its name, if no other has it."""
    names = [Path(folder).resolve().name for folder in folders]
    table = {}
    for folder, name in zip(folders, names, strict=True):
        if names.count(name) > 1 or name == BASE:
            name = str(folder)
        if name in table or name == BASE:
            raise ValueError(
                f"--adapter {folder}: another one has the name {name}; rename a folder"
            )
        table[name] = folder
    return table


def _models(base, folders, accept_base, warn):
    """{name: model}: the base under each adapter, and alone. All share the arrays of one base."""
    adapters = {}
    for name, folder in folders.items():
        adapters[name] = load_adapter(folder, base, accept_base=accept_base, say=warn)
    base = widened(base, warn)
    models = {name: attach(base, adapters[name], check_base=False) for name in adapters}
    return {**models, BASE: base}


def converse(conversation, read_line, write, warn):
    """Answer line after line, and do the commands among them, until one or the input ends it."""
    while (line := read_line()) is not None:
        if line.startswith("/"):
            if not _obeyed(conversation, line, warn):
                return
        elif line.strip():
            _answered(conversation, line, write, warn)


def _answered(conversation, line, write, warn):
    """Answer one message. Ctrl-C ends the answer and not the conversation."""
    try:
        check_utf8("the message", line)
        why_cut = conversation.answer(line, write)
    except KeyboardInterrupt:
        why_cut = "stopped; Ctrl-C once more ends the conversation"
    except ContextFullError as error:
        warn(f"({one_line(error)}, or begin a new one with /reset)")
        return
    except ValueError as error:
        warn(f"({one_line(error)})")
        return
    write("\n")
    if why_cut is not None:
        warn(f"({why_cut})")


def _obeyed(conversation, line, warn):
    """Do the command in `line`; False if it ends the conversation."""
    word, _, rest = line[1:].partition(" ")
    rest = rest.strip()
    if word not in COMMANDS:
        meant = nearest(word, COMMANDS, SYNONYMS)
        suggestion = "; see /help" if meant is None else f": did you mean /{meant}?"
        warn(f"(there is no /{word}{suggestion})")
    elif rest and word != "adapter":
        warn(f"(/{word} takes nothing after it; a message may begin with / after a space)")
    elif word == "exit":
        return False
    elif word == "reset":
        conversation.reset()
        warn("(a new conversation)")
    elif word == "help":
        for command, (more, meaning) in COMMANDS.items():
            warn(f"  {f'/{command}{more}':<14} {meaning}")
    elif rest:
        _switch(conversation, rest, warn)
    else:
        for name in conversation.models:
            mark = "*" if name == conversation.name else " "
            warn(f"{mark} {name}")
    return True


def _switch(conversation, name, warn):
    """Let the adapter `name` answer, if there is one."""
    if name not in conversation.models:
        warn(f"(there is no adapter {name}; there are {', '.join(conversation.models)})")
        return
    conversation.switch(name)
    warn(f"({_who_answers(conversation)}; the conversation goes on, /reset begins a new one)")


def _who_answers(conversation):
    if conversation.name == BASE:
        return "the base answers"
    return f"the adapter {conversation.name} answers"
