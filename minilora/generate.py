"""Text written one token at a time, greedy or sampled, with a key/value cache. Knows no model.

Any model will do that has `hidden(ids, cache)`, `head(hidden)`, `new_cache(size)` and a `config`
with vocab_size and block_size; for prompts of different lengths also `new_cache(size, starts)`.
"""

import operator

import numpy as np

from .backend import check_rng, to_numpy
from .functional import check_ids
from .graph import no_grad


def generate(
    model,
    ids,
    max_new_tokens,
    *,
    temperature=0.0,
    top_k=None,
    top_p=None,
    stop=None,
    rng=None,
):
    """Continue each prompt in `ids`, with no graph; the keywords are those of `generate_tokens`.

    Shapes: ids (B, T) integers -> NumPy array (B, T + n), n <= max_new_tokens: a row that has
    stopped is filled with its stop token. A list of B prompts (T,) of any lengths -> a list of B
    arrays (T + n,), each of which ends with its stop token.
    Raises: as `generate_tokens`.
    """
    prompts, starts = _left_padded(ids, model.config.vocab_size)
    tokens = generate_tokens(
        model,
        ids,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop=stop,
        rng=rng,
    )
    columns = [token[:, None] for token in tokens]
    written = np.concatenate([prompts, *columns], axis=1)
    if not isinstance(ids, (list, tuple)):
        return written
    stops = _stop_ids(stop, model.config.vocab_size)
    n_prompt = prompts.shape[1]
    return [
        row[start : n_prompt + _length(row[n_prompt:], stops)]
        for row, start in zip(written, starts, strict=True)
    ]


def generate_tokens(
    model,
    ids,
    max_new_tokens,
    *,
    temperature=0.0,
    top_k=None,
    top_p=None,
    stop=None,
    rng=None,
    cache=None,
):
    """An iterator over the new columns (B,) that continue `ids`: each is there once it is chosen.

    Temperature 0 takes the likeliest token. Otherwise `rng` draws tokens from
    softmax(logits / temperature): of the `top_k` likeliest if that is given, and of these from the
    nucleus, the fewest likeliest tokens that together have a probability of at least `top_p`. The
    token `stop`, or any of a collection `stop`, ends a row, which repeats it from then on. When
    every row has stopped, so does the iterator.
    `ids` is an array (B, T) or a list of B prompts (T,) of any lengths, which are padded on the
    left: no row sees its padding. `cache`, from `model.new_cache`, may hold what stands before ids.
    Raises: ValueError, before anything is computed, for ids that do not fit or would outgrow
    block_size, temperature < 0, top_k outside 1 .. V, top_p outside (0, 1], stop outside the
    vocabulary, temperature > 0 without an rng; later for logits of inf or nan, and for a given
    `cache` that has no room left.
    Source: Fan et al. 2018 (top-k sampling); Holtzman et al. 2020 (the nucleus).
    """
    V = model.config.vocab_size
    prompts, starts = _left_padded(ids, V)
    _check_lengths(prompts, max_new_tokens, model.config.block_size)
    _check_sampling(V, temperature, top_k, top_p, rng)
    stops = _stop_ids(stop, V)
    if cache is None:
        cache = _new_cache(model, prompts.shape[1] + max_new_tokens, starts)
    elif starts.any():
        raise ValueError("generate: a cache is continued by ids (B, T), not by different lengths")
    choose = lambda logits: _choose(logits, temperature, top_k, top_p, rng)
    return _tokens(model, prompts, cache, max_new_tokens, choose, stops)


def _tokens(model, ids, cache, max_new_tokens, choose, stops):
    """Yield the new columns (B,); the generator that `generate_tokens` returns."""
    stopped = np.zeros(len(ids), bool)
    # The model reads the whole prompt once, then one column at a time: the cache holds the rest.
    unread = ids
    for _ in range(max_new_tokens):
        # Not around the loop: while a generator waits, its caller may record.
        with no_grad():
            last = model.hidden(unread, cache)[:, -1]
            logits = to_numpy(model.head(last).data).astype(np.float64)
        token = np.where(stopped, unread[:, -1], choose(logits))
        unread = token[:, None].copy()
        yield token
        if not stops:
            continue
        stopped |= np.isin(unread[:, -1], stops)
        if stopped.all():
            return


def _left_padded(ids, V):
    """Ids (B, T), padded on the left, and the columns (B,) at which the rows begin."""
    if not isinstance(ids, (list, tuple)):
        ids = check_ids("token ids", ids, V).astype(np.int64)
        if ids.ndim != 2 or ids.size == 0:
            raise ValueError(
                f"generate: ids must have shape (B, T) with B, T >= 1, got {ids.shape}"
            )
        return ids, np.zeros(len(ids), np.int64)
    rows = [check_ids(f"token ids of row {i}", row, V) for i, row in enumerate(ids)]
    shapes = [row.shape for row in rows]
    if not rows or any(row.ndim != 1 or row.size == 0 for row in rows):
        raise ValueError(
            f"generate: a list of ids must hold rows of shape (T,) with T >= 1, got {shapes}"
        )
    lengths = np.array([len(row) for row in rows])
    starts = lengths.max() - lengths
    padded = np.zeros((len(rows), lengths.max()), np.int64)
    for i, row in enumerate(rows):
        padded[i, starts[i] :] = row
    return padded, starts


def _new_cache(model, size, starts):
    """A cache of `size` positions; a model is asked for `starts` only where rows differ in them."""
    cache = model.new_cache(size, starts) if starts.any() else model.new_cache(size)
    if cache is None:
        raise ValueError("generate: the model made no cache, but reads each new token alone")
    return cache


def _check_lengths(ids, max_new_tokens, block_size):
    if max_new_tokens < 0 or ids.shape[1] + max_new_tokens > block_size:
        raise ValueError(
            f"generate: ids {ids.shape} and {max_new_tokens} new tokens do not fit in a context of "
            f"{block_size} (block_size); shorten the input or ask for fewer"
        )


def _check_sampling(V, temperature, top_k, top_p, rng):
    if not 0 <= temperature < np.inf:
        raise ValueError(f"generate: temperature must be finite and at least 0, got {temperature}")
    if rng is not None:
        check_rng(rng)
    elif temperature > 0:
        raise ValueError(f"generate: at temperature {temperature} tokens are drawn: pass an rng")
    if top_k is not None and not 1 <= top_k <= V:
        raise ValueError(f"generate: top_k must be None or lie in 1 .. {V}, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p must be None or lie in (0, 1], got {top_p}")


def _stop_ids(stop, V):
    """The ids that end a row, as a list: of None, of one id, or of a collection of ids."""
    if stop is None:
        return []
    if isinstance(stop, (int, np.integer)):
        stop = [stop]
    try:
        stops = [operator.index(id_) for id_ in stop]
    except TypeError:
        raise TypeError(
            f"generate: stop must be None, a token id or a collection of them, got {stop!r}"
        ) from None
    for id_ in stops:
        if not 0 <= id_ < V:
            raise ValueError(f"generate: stop must be None or lie in 0 .. {V - 1}, got {id_}")
    return stops


def _length(new, stops):
    """How many of the new ids (n,) of a row are its own: up to its stop token, or all."""
    ends = np.flatnonzero(np.isin(new, stops))
    return ends[0] + 1 if ends.size else len(new)


def _choose(logits, temperature, top_k, top_p, rng):
    """One token id for each row of logits (B, V), which are written over."""
    if not np.isfinite(logits).all():
        raise ValueError(
            "generate: the model's logits are inf or nan: its parameters hold such numbers, or far "
            "too large ones"
        )
    if temperature == 0:
        return logits.argmax(-1)
    # The likeliest is 0 and stays it, however small the temperature; others may become -inf.
    logits -= logits.max(-1, keepdims=True)
    with np.errstate(over="ignore"):
        logits /= temperature
    if top_k is not None or top_p is not None:
        logits = _likeliest(logits, top_k, top_p)
    # Gumbel-max: the largest of logits plus Gumbel noise is a draw from their softmax.
    return (logits + rng.gumbel(size=logits.shape)).argmax(-1)


def _likeliest(logits, top_k, top_p):
    """Logits (B, V), the largest of which is 0, with -inf for what is not to be drawn."""
    order = np.argsort(-logits, axis=-1, kind="stable")
    ranked = np.take_along_axis(logits, order, axis=-1)
    if top_k is not None:
        ranked[:, top_k:] = -np.inf
    if top_p is not None:
        p = np.exp(ranked)
        p /= p.sum(-1, keepdims=True)
        # A token is in the nucleus if the likelier ones do not fill it: the first always is.
        likelier = p.cumsum(-1) - p
        ranked[likelier >= top_p] = -np.inf
    kept = np.empty_like(logits)
    np.put_along_axis(kept, order, ranked, axis=-1)
    return kept
