"""What the command line does with folders, besides training: generate, merge, compare.

Knows folders and models, and no arguments.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..compose import stack
from ..disk.folder import check_unused
from ..disk.models import TENSORS, load_model
from ..disk.peft import load_adapter
from ..disk.rounding import save_merged
from ..disk.tokenizer import load_tokenizer
from ..generate import generate
from ..lora import attach, merge
from ..training.datasets import load_data
from ..training.loop import heldout_loss
from .folders import check_source

# The exponential of a loss above this is not a float any more.
LARGEST_EXPONENT = 700


@dataclass(frozen=True)
class Sampling:
    """How many tokens are written, and how each is chosen: as `minilora.generate` takes it."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    seed: int


def continue_prompt(base, adapters, prompt, sampling, xp, warn):
    """A list of texts: `prompt` and what the model in the folder `base` writes after it.

    `adapters` are folders: there is a text under each of them, all made in one batch. Without any,
    the base alone writes one text. `sampling` is a Sampling, `xp` the array module to compute with;
    `warn` is given, line by line, what a user should know beside the texts.
    Raises: ValueError if the prompt is empty, too long or not UTF-8, or if top_k exceeds the
    vocabulary.
    """
    _check_utf8(prompt)
    _check_sources(base, adapters)
    model = load_model(base, xp)
    tokenizer = load_tokenizer(base)
    prompt_ids = tokenizer.encode(prompt)
    _check_room(prompt_ids, sampling, model.config.block_size)
    if sampling.top_k is not None and sampling.top_k > tokenizer.vocab_size:
        raise ValueError(
            f"top-k is {sampling.top_k}, but there are only {tokenizer.vocab_size} tokens; "
            "choose a smaller one"
        )
    loaded = [load_adapter(folder, model, say=warn) for folder in adapters]
    rows = _written(
        _with_adapters(model, loaded), prompt_ids, max(1, len(loaded)), sampling, tokenizer.end
    )
    texts = []
    for row in rows:
        new = row[len(prompt_ids) :].tolist()
        _warn_of_unknown(new, tokenizer.vocab_size, model.config.vocab_size, warn)
        end = new.index(tokenizer.end) if tokenizer.end in new else len(new)
        texts.append(prompt + tokenizer.decode(new[:end]))
    return texts


def merge_folders(base, adapter, out, log, *, dtype, allow_rounding):
    """Merge the adapter in the folder `adapter` into the model in `base`; write it to `out`.

    Raises: ValueError if `out` is not empty, or as `save_merged`.
    """
    check_unused(out)
    _check_sources(base, [adapter])
    model = load_model(base)
    adapted = attach(model, load_adapter(adapter, model, say=log), check_base=False)
    save_merged(adapted, out, dtype=dtype, like=base, allow_rounding=allow_rounding, say=log)
    size = (Path(out) / TENSORS).stat().st_size
    log(f"kept in {out}: a plain model, {size / 1e6:,.1f} MB")


def compare(base, adapter, data, xp, log, *, batch, length):
    """Print the loss of a model on the file `data`, without and with an adapter.

    `base` and `adapter` are folders; `batch` is how many rows are computed at once, `length` how
    many tokens a row of text has (None: as `load_data`).
    """
    _check_sources(base, [adapter])
    model = load_model(base, xp)
    examples = load_data(data, load_tokenizer(base), model.config.block_size, length)
    adapted = attach(model, load_adapter(adapter, model, say=log), check_base=False)
    log(f"data {data}: {examples}")
    without = _loss(model, examples, batch, "without")
    with_it = _loss(adapted, examples, batch, "with")
    log(f"{'nats per token':<20} {'loss':>8} {'perplexity':>11}")
    log(f"{'without the adapter':<20} {without:>8.4f} {_perplexity(without):>11.5g}")
    log(f"{'with it':<20} {with_it:>8.4f} {_perplexity(with_it):>11.5g}")
    log(f"{'difference':<20} {with_it - without:>+8.4f}")


def _check_sources(base, adapters):
    """Raise unless the folders hold what they should, before anything is read."""
    check_source(base, "model")
    for folder in adapters:
        check_source(folder, "adapter")


def _check_utf8(prompt):
    """Raise ValueError for what a terminal in another encoding has made of a prompt."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        wrong = prompt[error.start]
        raise ValueError(
            f"the prompt is not UTF-8: character {error.start + 1} is {wrong!a}"
        ) from None


def _check_room(prompt_ids, sampling, context):
    """Raise ValueError unless the prompt holds a token, and the new ones fit behind it."""
    if len(prompt_ids) == 0:
        raise ValueError("the prompt is empty; give at least one word to go on from")
    if len(prompt_ids) + sampling.max_new_tokens > context:
        raise ValueError(
            f"the prompt has {len(prompt_ids)} tokens: with {sampling.max_new_tokens} new ones "
            f"they outgrow the model's context of {context}; shorten the prompt or ask for fewer "
            "new tokens"
        )


def _with_adapters(model, adapters):
    """The model that writes one row under each of the Adapters."""
    if not adapters:
        return model
    if len(adapters) == 1:
        # One adapter for all rows costs nothing once it is merged.
        return merge(attach(model, adapters[0], check_base=False))
    return attach(model, stack(adapters), check_base=False)


def _written(model, prompt_ids, n_rows, sampling, end):
    """Token ids (n_rows, T): the prompt in each row, and what `model` writes after it."""
    prompts = np.repeat(prompt_ids[None], n_rows, axis=0)
    with tqdm(
        total=sampling.max_new_tokens, desc="generating", unit="token", delay=1, leave=False
    ) as bar:
        return generate(
            model,
            prompts,
            sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            stop=end,
            rng=np.random.default_rng(sampling.seed),
            on_token=lambda token: bar.update(),
        )


def _warn_of_unknown(new_ids, known_by_tokenizer, known_by_model, warn):
    """Warn of new tokens without a text: a table of embeddings may be longer than a vocabulary."""
    unknown = sum(token >= known_by_tokenizer for token in new_ids)
    if unknown:
        warn(
            f"{unknown} of {len(new_ids)} new tokens are left out: the tokenizer knows "
            f"{known_by_tokenizer:,}, the model {known_by_model:,}"
        )


def _loss(model, examples, batch, label):
    """Nats per token of `examples`, once through them."""
    bar = tqdm(examples.epoch(batch), desc=label, unit="batch", delay=1, leave=False)
    return heldout_loss(model, bar)


def _perplexity(loss):
    return math.exp(min(loss, LARGEST_EXPONENT))
