"""How the peers are asked, and how their numbers and files are compared with ours. Needs torch and PEFT."""

import contextlib
import json
import logging
import warnings

import numpy as np
import peft
import safetensors.torch as st
import torch
import transformers

from minilora import no_grad

# Of transformers to PEFT 0.21.2, about no file: at every load.
AMONG_THEM = "`is_gradient_checkpointing` is deprecated"


@contextlib.contextmanager
def without_a_word():
    """Fail if anything is warned of or logged at level WARNING or above, by whatever library."""
    said = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    known = [logging.getLogger(name) for name in list(logging.root.manager.loggerDict)]
    closed = [logging.root, *(logger for logger in known if not logger.propagate)]  # the root does not hear those
    assert all(logging.getLogger(name).isEnabledFor(logging.WARNING) for name in ("transformers", "peft", "torch"))
    for logger in closed:
        logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            yield
    finally:
        for logger in closed:
            logger.removeHandler(handler)
    said += [f"{w.category.__name__}: {w.message}" for w in warned if not str(w.message).startswith(AMONG_THEM)]
    assert not said, "\n".join(said)


def theirs(folder, dtype=torch.float64):
    """The model in `folder` as transformers opens it, without a word; dtype None keeps the dtype of the file."""
    with without_a_word():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    return model if dtype is None else model.to(dtype)


def adapted(base, folder, dtype=torch.float64, **how):
    """The model in `base` with the adapter in `folder`, as PEFT opens it, without a word."""
    model = theirs(base, dtype)
    with without_a_word():
        return peft.PeftModel.from_pretrained(model, folder, **how).eval()


def logits(model, ids):
    """The logits of either kind of model, as an array."""
    if isinstance(model, torch.nn.Module):
        with torch.no_grad():
            return model(input_ids=torch.from_numpy(ids), use_cache=False).logits.numpy()
    with no_grad():  # and so without dropout
        return model(ids).data


def loss_of(model, ids):
    """Mean cross entropy of the next token, in torch."""
    guesses = model(input_ids=torch.from_numpy(ids), use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(guesses.flatten(0, 1), torch.from_numpy(ids[:, 1:]).flatten())


def peft_weights(model):
    """The trainable tensors of a PEFT model, under the keys of the file."""
    return {key.replace(".default.", "."): p for key, p in model.named_parameters() if p.requires_grad}


def name_of(dtype):
    """The name by which minilora calls a dtype of torch."""
    return str(dtype).removeprefix("torch.")


# Comparing. Everything goes through these, and the planted bugs must fail in them.


def same_numbers(a, b, atol, what="logits"):
    """Equal within `atol`, finite, and both float64."""
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape and a.dtype == b.dtype == np.float64, f"{what}: {a.dtype} {a.shape}, {b.dtype} {b.shape}"
    assert np.isfinite(a).all() and np.abs(a - b).max() <= atol, f"{what}: differ by {np.abs(a - b).max():.2g}"


def same_dict(a, b, atol):
    """The same keys, and under each the same numbers within `atol`."""
    assert a.keys() == b.keys()
    for key in a:
        same_numbers(a[key], b[key], atol, key)


def same_bits(a, b):
    """The same keys, and under each a torch tensor of the same dtype, shape and bits."""
    assert a.keys() == b.keys() and a
    for key in a:
        assert a[key].dtype == b[key].dtype and a[key].shape == b[key].shape, key
        bits = [t.detach().contiguous().flatten().view(torch.uint8) for t in (a[key], b[key])]
        assert torch.equal(*bits), f"{key}: other bits"


def different(a, b, least=0.01):
    """What is compared must move something, or equality says nothing."""
    assert np.abs(a - b).max() > least


def files_of(folder):
    """All tensors of a folder, of one file or of its shards, as torch reads them."""
    return {key: t for path in sorted(folder.glob("*.safetensors")) for key, t in st.load_file(path).items()}


def edit(path, **changes):
    """Change fields of a JSON file by hand; None takes one out."""
    fields = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))
