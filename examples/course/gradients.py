"""Are the gradients of a method of fine-tuning right? Asked of a tiny model, in float64."""

import numpy as np

from minilora import GPT, GPTConfig, GradientError, gradcheck

CONFIG = GPTConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=7, block_size=36)


def gradients_checked(make, most_tensors=None):
    """(how many gradients agree with central differences, of how many numbers).

    make(model, rng) -> (a model to train, what is trained in it). Of many tensors the first
    `most_tensors` are checked. Numbers of a tensor of more than 100 are checked many at once.
    Raises: GradientError if one is wrong.
    """
    rng = np.random.default_rng(0)
    model, trained = make(GPT(CONFIG, rng, "float64"), rng)
    # Away from the start, where many gradients are zero.
    for p in trained.parameters():
        p.data += 0.1 * rng.standard_normal(p.shape)
    ids = rng.integers(0, CONFIG.vocab_size, (2, 5))
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def agree(names):
        names = names[:most_tensors]

        def loss(*leaves):
            leaf_of = dict(zip(names, leaves, strict=True))
            return model.rebuild(lambda name, _: leaf_of.get(name)).loss(ids[:, :-1], ids[:, 1:])

        return gradcheck(loss, *(named[name] for name in names), max_elements=100).compared

    total = sum(p.size for p in named.values())
    magnitudes = [name for name in named if name.endswith("magnitude")]
    try:
        return agree(list(named)), total
    except GradientError:
        if not magnitudes:
            raise
        # By design DoRA takes the norm of a row for a constant: of A and B it computes a part.
        return agree(magnitudes), total
