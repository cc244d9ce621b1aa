"""Text written one token at a time, greedy or sampled, with a key/value cache. Knows no particular model."""

import numpy as np

from .backend import to_numpy
from .functional import check_ids
from .gpt import KeyValueCache
from .graph import no_grad
from .nn import check_rng


def generate(model, ids, max_new_tokens, *, temperature=0.0, top_k=None, stop=None, rng=None, after=None):
    """Continue each row of `ids`, one token at a time, with a key/value cache and no graph.

    Shapes: ids (B, T) integers -> NumPy array (B, T + n), n <= max_new_tokens. temperature 0 takes the likeliest
    token, else tokens are drawn by `rng` from softmax(logits / temperature), of the top_k likeliest if given.
    After the token `stop` a row is filled with it; when every row has stopped, generation ends. `after(token)` is
    called with each new column (B,): for showing progress.
    Raises: ValueError for ids that do not fit or would outgrow block_size, temperature < 0, top_k outside 1 .. V,
    stop outside the vocabulary, or temperature > 0 without an rng.
    Source: Fan et al. 2018 (top-k sampling).
    """
    V, limit = model.config.vocab_size, model.config.block_size
    ids = check_ids("token ids", ids, V).astype(np.int64)
    if ids.ndim != 2 or ids.size == 0 or max_new_tokens < 0 or ids.shape[1] + max_new_tokens > limit:
        raise ValueError(f"generate: ids {ids.shape} + {max_new_tokens} new tokens: need (B, T), sum <= {limit}")
    if not 0 <= temperature < np.inf or (temperature > 0 and rng is None):
        raise ValueError(f"generate: temperature {temperature}, rng {rng}: need 0 <= temperature, and an rng if > 0")
    if rng is not None:
        check_rng(rng)
    if not (top_k is None or 1 <= top_k <= V) or not (stop is None or 0 <= stop < V):
        raise ValueError(f"generate: top_k {top_k} must be None or 1 .. {V}, stop {stop} None or 0 .. {V - 1}")

    cache, unread = [KeyValueCache(ids.shape[1] + max_new_tokens) for _ in range(model.config.n_layer)], ids
    stopped = np.zeros(len(ids), bool)
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
            if after is not None:
                after(token)
            if stopped.all():
                break
    return ids


def _choose(logits, temperature, top_k, rng):
    """One token id per row of logits (B, V)."""
    if np.isnan(logits).any():
        raise ValueError("generate: the model's logits are nan; its parameters hold inf or nan")
    if temperature == 0:
        return logits.argmax(-1)
    if top_k is not None:
        unlikely = np.argsort(-logits, axis=-1, kind="stable")[:, top_k:]
        np.put_along_axis(logits, unlikely, -np.inf, axis=-1)
    return (logits / temperature + rng.gumbel(size=logits.shape)).argmax(-1)  # Gumbel-max: a draw from softmax
