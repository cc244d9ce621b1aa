"""Text written one token at a time, greedy or sampled, with a key/value cache. Knows no model.

Any model will do that has `hidden(ids, cache)`, `head(hidden)`, `new_cache(size)` and a `config`
with vocab_size and block_size.
"""

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
    stop=None,
    rng=None,
    on_token=None,
):
    """Continue each row of `ids`, one token at a time, with no graph.

    Temperature 0 takes the likeliest token. Otherwise `rng` draws tokens from
    softmax(logits / temperature), of the top_k likeliest if that is given. After the token `stop` a
    row is filled with it; when every row has stopped, generation ends. `on_token(token)` is called
    with each new column (B,), to show progress.

    Shapes: ids (B, T) integers -> NumPy array (B, T + n), n <= max_new_tokens.
    Raises: ValueError for ids that do not fit or would outgrow block_size, temperature < 0, top_k
    outside 1 .. V, stop outside the vocabulary, temperature > 0 without an rng, or logits of nan.
    Source: Fan et al. 2018 (top-k sampling).
    """
    V = model.config.vocab_size
    ids = check_ids("token ids", ids, V).astype(np.int64)
    _check_lengths(ids, max_new_tokens, model.config.block_size)
    _check_sampling(V, temperature, top_k, stop, rng)
    cache = model.new_cache(ids.shape[1] + max_new_tokens)
    if cache is None:
        raise ValueError("generate: the model made no cache, but reads each new token alone")
    stopped = np.zeros(len(ids), bool)
    # The model reads the whole prompt once, then one column at a time: the cache holds the rest.
    unread = ids
    with no_grad():
        for _ in range(max_new_tokens):
            last = model.hidden(unread, cache)[:, -1]
            logits = to_numpy(model.head(last).data).astype(np.float64)
            token = _choose(logits, temperature, top_k, rng)
            if stop is not None:
                token[stopped] = stop
                stopped |= token == stop
            unread = token[:, None]
            ids = np.concatenate([ids, unread], axis=1)
            if on_token is not None:
                on_token(token)
            if stopped.all():
                break
    return ids


def _check_lengths(ids, max_new_tokens, block_size):
    if ids.ndim != 2 or ids.size == 0:
        raise ValueError(f"generate: ids must have shape (B, T) with B, T >= 1, got {ids.shape}")
    if max_new_tokens < 0 or ids.shape[1] + max_new_tokens > block_size:
        raise ValueError(
            f"generate: ids {ids.shape} and {max_new_tokens} new tokens do not fit in a context of "
            f"{block_size} (block_size); shorten the input or ask for fewer"
        )


def _check_sampling(V, temperature, top_k, stop, rng):
    if not 0 <= temperature < np.inf:
        raise ValueError(f"generate: temperature must be finite and at least 0, got {temperature}")
    if rng is not None:
        check_rng(rng)
    elif temperature > 0:
        raise ValueError(f"generate: at temperature {temperature} tokens are drawn: pass an rng")
    if top_k is not None and not 1 <= top_k <= V:
        raise ValueError(f"generate: top_k must be None or lie in 1 .. {V}, got {top_k}")
    if stop is not None and not 0 <= stop < V:
        raise ValueError(f"generate: stop must be None or lie in 0 .. {V - 1}, got {stop}")


def _choose(logits, temperature, top_k, rng):
    """One token id for each row of logits (B, V)."""
    if np.isnan(logits).any():
        raise ValueError("generate: the model's logits are nan; its parameters hold inf or nan")
    if temperature == 0:
        return logits.argmax(-1)
    if top_k is not None:
        unlikely = np.argsort(-logits, axis=-1, kind="stable")[:, top_k:]
        np.put_along_axis(logits, unlikely, -np.inf, axis=-1)
    # Gumbel-max: the largest of logits plus Gumbel noise is a draw from their softmax.
    return (logits / temperature + rng.gumbel(size=logits.shape)).argmax(-1)
