"""A prompt, and what a model writes after it, under none, one or several adapters.

Knows folders, models and tokenizers, and no arguments.
"""

from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from tqdm import tqdm

from .. import quant
from ..count import parameter_report
from ..disk.models import load_model, load_model_config
from ..disk.peft import load_adapter
from ..disk.quantized import quantized_base
from ..disk.tokenizer import load_tokenizer
from ..generate import generate_tokens
from ..lora import attach, merge
from ..stack import stack
from ..training.threads import blas_threads
from .folders import find_sources
from .text_stream import TextStream


@dataclass(frozen=True)
class Sampling:
    """How many tokens are written, and how each is chosen: as `minilora.generate` takes it."""

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def tokens(self, model, ids, n, rng, stop, cache=None):
        """An iterator over the columns of at most n new tokens, as `generate_tokens`.

        One row is written with one thread of BLAS, see `one_row_at_a_time`.
        """
        tokens = generate_tokens(
            model,
            ids,
            n,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            stop=stop,
            rng=rng,
            cache=cache,
        )
        return one_row_at_a_time(tokens) if len(ids) == 1 else tokens


def one_row_at_a_time(tokens):
    """The items of the iterator `tokens`, all but the first computed with one thread of BLAS.

    The first reads the prompt, many rows at once. After it a single row meets each weight. Then
    memory sets the pace, and on a busy machine threads would wait for each other at every product:
    a token could take ten times as long.
    """
    yield from islice(tokens, 1)
    with blas_threads(1):
        yield from tokens


@dataclass(frozen=True)
class Continuation:
    """What is to be written: `samples` texts after `prompt`, under each of the adapters.

    `base` is what `find_base` takes, `adapters` are folders; without any, the base alone writes.
    `stops` are texts before which a text ends. `quantize` is what the base is packed as when it is
    loaded, None to leave it as it is; `accept_base` as for `load_adapter`. `cut_prompt`: of a
    prompt that is too long its end is kept.
    """

    base: str
    prompt: str
    sampling: Sampling
    adapters: list = field(default_factory=list)
    samples: int = 1
    stops: tuple = ()
    quantize: str | None = None
    accept_base: tuple = ()
    cut_prompt: bool = False


def continue_prompt(job, xp, warn, write=None):
    """A list of texts for the Continuation `job`: the prompt, and what is written after it.

    The samples under the first adapter come first. All are made in one batch by the array module
    `xp`. `warn` is given, line by line, what a user should know beside the texts. `write`, where
    there is one text, is given the pieces of it as they come.
    Raises: ValueError, before any tensor is read, if the prompt is empty, too long or not UTF-8, or
    if top_k exceeds the vocabulary; and as reading the folders does.
    """
    check_utf8("the prompt", job.prompt)
    base = find_sources(job.base, job.adapters)
    tokenizer = load_tokenizer(base)
    check_top_k(job.sampling.top_k, tokenizer)
    context = load_model_config(base).block_size
    prompt_ids = _prompt_ids(tokenizer, job, context, warn)
    model = load_base(base, xp, job.quantize, warn)
    loaded = [
        load_adapter(folder, model, accept_base=job.accept_base, say=warn)
        for folder in job.adapters
    ]
    model = _with_adapters(model, loaded, job.samples, warn)
    n_texts = job.samples * max(1, len(loaded))
    streams = [TextStream(tokenizer, job.stops, after=prompt_ids) for _ in range(n_texts)]
    if write is not None and n_texts == 1:
        write(job.prompt)
        for piece in _pieces(model, prompt_ids, job.sampling, tokenizer.ends, streams[0]):
            write(piece)
    else:
        _write_all(model, prompt_ids, job.sampling, tokenizer.ends, streams)
    _warn_of_unknown(streams, tokenizer.vocab_size, model.config.vocab_size, warn)
    return [job.prompt + stream.text for stream in streams]


def check_utf8(what, text):
    """Raise ValueError for what a terminal in another encoding has made of a text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        wrong = text[error.start]
        raise ValueError(f"{what} is not UTF-8: character {error.start + 1} is {wrong!a}") from None


def check_top_k(top_k, tokenizer):
    """Raise ValueError unless there are so many tokens to draw from."""
    if top_k is not None and top_k > tokenizer.vocab_size:
        raise ValueError(
            f"top-k is {top_k}, but there are only {tokenizer.vocab_size} tokens; "
            "choose a smaller one"
        )


def load_base(base, xp, quantize, warn):
    """The model in `base`, packed as `quantize` says: None leaves it as it is stored."""
    model = load_model(base, xp)
    if quantize is None:
        return model
    return quantized_base(model, quantize, warn)


def widened(model, warn):
    """`model` with every weight as floats, for all tokens; `warn` gets what memory that takes."""
    wide = quant.widen(model)
    _tell_of_widening(model, wide, warn)
    return wide


def _tell_of_widening(model, wide, warn):
    kinds = sorted(set(quant.stored_as(model).values()))
    if kinds:
        before = parameter_report(model).total_bytes
        after = parameter_report(wide).total_bytes
        warn(
            f"the base is stored as {' and '.join(kinds)}: widened once to write with it, "
            f"{before / 1e6:,.1f} MB become {after / 1e6:,.1f} MB of memory"
        )


def _prompt_ids(tokenizer, job, context, warn):
    """The ids of the prompt that are read. Raises: ValueError if none are, or too many."""
    ids = tokenizer.encode(job.prompt)
    if len(ids) == 0:
        raise ValueError("the prompt is empty; give at least one word to go on from")
    prompt_ids = tokenizer.begun(ids)
    n_new = job.sampling.max_new_tokens
    n_prompt = len(prompt_ids)
    if n_prompt + n_new <= context:
        return prompt_ids
    # What every text begins with stays in front of one that is cut.
    room = context - n_new - len(tokenizer.start)
    if room < 1:
        raise ValueError(
            f"{n_new} new tokens leave no room for a prompt in the model's context of {context}; "
            "ask for fewer new tokens"
        )
    if not job.cut_prompt:
        raise ValueError(
            f"the prompt has {n_prompt} tokens: with {n_new} new ones they outgrow the model's "
            f"context of {context}; shorten the prompt, ask for fewer new tokens, or keep only "
            "its end with --cut-prompt"
        )
    warn(
        f"of the {n_prompt} tokens of the prompt the model reads the last {room}: with {n_new} new "
        f"ones they fill its context of {context}"
    )
    return tokenizer.begun(prompt_ids[-room:])


def _with_adapters(model, adapters, samples, warn):
    """The plain or stacked model that writes `samples` rows under each of the Adapters."""
    if len(adapters) == 1:
        # One adapter for all rows costs nothing once it is merged, which widens what it changes.
        merged = quant.widen(merge(attach(model, adapters[0], check_base=False)))
        _tell_of_widening(model, merged, warn)
        return merged
    model = widened(model, warn)
    if not adapters:
        return model
    rows = [adapter for adapter in adapters for _ in range(samples)]
    return attach(model, stack(rows), check_base=False)


def _pieces(model, prompt_ids, sampling, ends, stream):
    """Yield the pieces of one text as they become certain."""
    rng = np.random.default_rng(sampling.seed)
    for token in sampling.tokens(model, prompt_ids[None], sampling.max_new_tokens, rng, ends):
        yield stream.push(int(token[0]))
        if stream.ended:
            return
    yield stream.finish()


def _write_all(model, prompt_ids, sampling, ends, streams):
    """Write each of the texts to its end, all in one batch: a row of it for each stream."""
    prompts = np.repeat(prompt_ids[None], len(streams), axis=0)
    rng = np.random.default_rng(sampling.seed)
    n = sampling.max_new_tokens
    with tqdm(total=n, desc="generating", unit="token", delay=1, leave=False, disable=None) as bar:
        for token in sampling.tokens(model, prompts, n, rng, ends):
            bar.update()
            for stream, id_ in zip(streams, token.tolist(), strict=True):
                stream.push(id_)
            if all(stream.ended for stream in streams):
                return
    for stream in streams:
        stream.finish()


def _warn_of_unknown(streams, known_by_tokenizer, known_by_model, warn):
    """Warn of new tokens without a text: a table of embeddings may be longer than a vocabulary."""
    for stream in streams:
        if stream.unknown:
            warn(
                f"{stream.unknown} of {stream.tokens} new tokens are left out: the tokenizer knows "
                f"{known_by_tokenizer:,}, the model {known_by_model:,}"
            )
