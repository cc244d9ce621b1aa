"""Prompt tuning: learned vectors that stand before the embedded text. Knows no model.

To the model they are P more tokens, which are no word: they take the first P positions, and go
through every layer. Outputs come for the real tokens alone. There is no weight into which tokens
could be merged.

Source: Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning".
"""

import numpy as np

from .backend import check_rng, to_device
from .decoder import Decoder
from .fits import not_a
from .functional import concatenate
from .graph import no_grad
from .method import Method, check_length, modules_of_kind
from .nn import AdaptedModule, Module
from .prefix import for_each_row
from .tensor import Tensor


class Prompt(Module):
    """The vectors `prompt_embeddings` (P, C) that stand before every text."""

    def __init__(self, prompt_embeddings):
        self.prompt_embeddings = prompt_embeddings

    def beside(self, module):
        """The model `module` that reads these vectors first."""
        return PromptedDecoder(module, self)

    def misfit(self, name, module):
        """Why a model cannot read these vectors, as a line; None if it can."""
        if not isinstance(module, Decoder):
            return not_a("a decoder", "the model", module)
        C = module.head_layer().weight.shape[1]
        shape = self.prompt_embeddings.shape
        n_vectors = shape[0] if shape else 0
        if shape == (n_vectors, C) and 0 < n_vectors < module.config.block_size:
            return None
        return (
            f"the model: {C} channels and a context of {module.config.block_size}, "
            f"but prompt_embeddings {shape}"
        )


class PromptedDecoder(Decoder, AdaptedModule):
    """A decoder that reads P learned vectors before every text; called and asked as one.

    Its context is P positions shorter than that of the model in it.
    """

    transparent = ("model", "prompt")

    def __init__(self, model, prompt):
        self.model = model
        self.prompt = prompt

    n_vectors = property(lambda self: len(self.prompt.prompt_embeddings.data))
    config = property(lambda self: self.model.config.shortened(self.n_vectors))

    def hidden(self, ids, cache=None, rng=None):
        """Ids to the states that the head reads: (B, T) -> (B, T, C).

        `cache`, from `new_cache`, takes up the vectors with the first ids.
        """
        if cache is not None and cache[0].length > 0:
            return self.model.hidden(ids, cache, rng)
        P = self.n_vectors
        ids, positions = self.model.checked(ids, cache, n_before=P)
        x = self.model.embedded(ids)
        x = concatenate([for_each_row(self.prompt.prompt_embeddings, len(ids)), x], axis=1)
        if cache is not None and cache[0].starts is not None:
            # A row that was filled up on the left begins with its padding, which nobody sees.
            x = x[_padding_first(cache[0].starts, P, x.shape[1], x.xp)]
        return self.model.states(x, positions, cache, rng)[:, P:]

    def embedded(self, ids):
        """Ids to vectors, the learned ones aside: (B, T) -> (B, T, C)."""
        return self.model.embedded(ids)

    def states(self, x, positions, cache=None, rng=None):
        """As the model's own."""
        return self.model.states(x, positions, cache, rng)

    def blocks(self):
        """The layers, in order."""
        return self.model.blocks()

    def head_layer(self):
        """The Embedding whose table is the head."""
        return self.model.head_layer()

    def new_cache(self, size, starts=None):
        """An empty key/value cache for `size` ids, and for the vectors before them."""
        return self.model.new_cache(size + self.n_vectors, starts)

    def merged(self):
        """Refused: there is no weight to which it could be added."""
        raise ValueError(
            "merge: a prompt is tokens before the text, and no weight; "
            "keep the base and the prompt apart"
        )


def _padding_first(starts, n_vectors, n_columns, xp):
    """The index that moves the vectors of each row behind its padding: rows and columns."""
    columns = np.arange(n_columns) - np.zeros_like(starts)[:, None]
    starts = np.asarray(starts)[:, None]
    # Padding comes from behind the vectors, the vectors from the front; the rest stays.
    source = np.where(columns < starts, columns + n_vectors, columns - starts)
    source = np.where(columns < starts + n_vectors, source, columns)
    rows = np.arange(len(starts))[:, None]
    return to_device(rows, xp), to_device(source, xp)


def init_prompt(base, length, rng):
    """A prompt of `length` vectors for `base`: the embeddings of so many tokens, drawn by `rng`.

    A new prompt is not the identity: the model reads those tokens before the text.

    Shapes: prompt_embeddings (length, C), in the base's dtype and on its backend.
    Raises: ValueError if `length` is below 1 or fills the context, or if the base is no decoder or
    carries an adapter.
    Source: Lester et al. 2021, section 3.2 ("sampled vocabulary").
    """
    check_length("init_prompt", "length", length)
    modules_of_kind("init_prompt", base, Decoder, "embeddings: it is no decoder")
    if length >= base.config.block_size:
        raise ValueError(
            f"init_prompt: {length} vectors fill a context of {base.config.block_size} "
            "(block_size); use fewer"
        )
    ids = check_rng(rng).integers(0, base.config.vocab_size, (1, length))
    with no_grad():
        vectors = base.embedded(ids).data[0].copy()
    return Method({"": Prompt(Tensor(vectors, requires_grad=True))}, base.fingerprint())
