"""What makes minilora fast, one thing at a time, and what switches each off. Knows its inside.

An op is switched off by giving the models functional's form of it in the place of lean's, in a
process that does nothing else. The replacements here keep what they computed, make a new array each
time, and check nothing.
"""

import contextlib
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minilora import Tensor, attach, decoder, functional, gpt, lean, nn, no_grad, optim
from minilora.tensor import record
from minilora.training.parts import PartWorkers

from . import numpy_minilora


def gelu_power(x):
    """`functional.gelu` with the formula's x³ written as NumPy's power."""
    X = x.data
    c = math.sqrt(2 / math.pi)
    a = 0.044715
    t = np.tanh(c * (X + a * X**3))
    y = 0.5 * X * (1 + t)
    # d tanh(u) = (1 - tanh²(u)) du
    slope = lambda: 0.5 * (1 + t) + 0.5 * X * (1 - t * t) * c * (1 + 3 * a * X**2)
    return record(y, (x, lambda dy: dy * slope()))


def textbook_attention(q, k, v, n_head, hidden=None):
    """`functional.attention`, which knows no padding."""
    return functional.attention(q, k, v, n_head)


class GrowingCache:
    """One layer's keys and values in arrays that are made anew, one position longer, each time."""

    def __init__(self, size, starts=None):
        self.starts = starts
        # Arrays (B, S, C), once there are any.
        self.k = None
        self.v = None

    length = property(lambda self: 0 if self.k is None else self.k.shape[1])

    def hidden(self):
        """No batch is filled up here."""
        return None

    def extend(self, k, v, front=None):
        """Append k and v, (B, T, C); returns all of them so far, as Tensors (B, S + T, C)."""
        if self.k is None:
            self.k = k.data
            self.v = v.data
        else:
            self.k = np.concatenate([self.k, k.data], axis=1)
            self.v = np.concatenate([self.v, v.data], axis=1)
        return Tensor(self.k), Tensor(self.v)


def generate_without_cache(model, ids, max_new_tokens):
    """The likeliest tokens after `ids` (B, T); for each, the model reads everything before it."""
    with no_grad():
        for _ in range(max_new_tokens):
            logits = model.head(model.hidden(ids)[:, -1]).data
            ids = np.concatenate([ids, logits.argmax(-1)[:, None]], axis=1)
    return ids


def attach_trainable(base, adapter):
    """`attach`, but the base has gradients too, which no optimizer reads."""
    trainable = lambda t: t if t.requires_grad else Tensor(t.data, requires_grad=True)
    return attach(base, adapter).map_tensors(trainable)


class ForgetfulWorkers(PartWorkers):
    """`PartWorkers` that start each batch without a gradient.

    Adam's zero_grad would leave those of a base that it does not train.
    """

    def backward(self, batches, **options):
        """As `PartWorkers.backward`."""
        for p in self.leaves:
            p.grad = None
        return super().backward(batches, **options)


def in_one_part(parts, threads, backend):
    """`parts_and_threads`, but BLAS alone takes all cores."""
    return 1, 1


def keep_nothing():
    """`keep_freed_memory`, but it does nothing."""
    return False


def unmerged(model):
    """`merge`, but the adapter stays beside the weights."""
    return model


class Ablation(NamedTuple):
    """One thing that is switched off: the tasks where it is at work, and what is set instead.

    changes: (module, attribute, value) of each attribute that is set.
    """

    tasks: tuple
    changes: tuple


# As the size of a block: everything is one block.
WHOLE = 2**62
NOISE = "nothing, the same twice"
ALL = "all of these"
ABLATIONS = {
    NOISE: Ablation(("lora", "full", "generate"), ()),
    "parts of a batch on threads": Ablation(
        ("lora",),
        ((numpy_minilora, "parts_and_threads", in_one_part),),
    ),
    "freed memory kept": Ablation(
        ("lora",),
        ((numpy_minilora, "keep_freed_memory", keep_nothing),),
    ),
    "no gradient for frozen weights": Ablation(
        ("lora",),
        (
            (numpy_minilora, "attach", attach_trainable),
            (numpy_minilora, "PartWorkers", ForgetfulWorkers),
        ),
    ),
    "attention: blocks of queries": Ablation(
        ("lora",),
        ((lean, "QUERY_BLOCK", WHOLE),),
    ),
    "attention: all of it": Ablation(
        ("lora",),
        ((decoder, "attention", textbook_attention),),
    ),
    "gelu: in place, derivative kept": Ablation(
        ("lora",),
        ((gpt, "gelu", functional.gelu),),
    ),
    "gelu: that, and x*x*x for x**3": Ablation(
        ("lora",),
        ((gpt, "gelu", gelu_power),),
    ),
    "layer norm: means by product": Ablation(
        ("lora",),
        ((nn, "layer_norm", functional.layer_norm),),
    ),
    "loss: blocks of logits": Ablation(
        ("lora",),
        ((lean, "LOGIT_ROWS", WHOLE),),
    ),
    "loss: that, and gradient at once": Ablation(
        ("lora",),
        ((decoder, "linear_cross_entropy", functional.linear_cross_entropy),),
    ),
    "Adam in blocks": Ablation(
        ("full",),
        ((optim, "BLOCK", WHOLE),),
    ),
    "a cache of keys and values": Ablation(
        ("generate",),
        ((numpy_minilora, "generate", generate_without_cache),),
    ),
    "a cache that is made once": Ablation(
        ("generate",),
        ((decoder, "KeyValueCache", GrowingCache),),
    ),
    "merging first": Ablation(
        ("generate",),
        ((numpy_minilora, "merge", unmerged),),
    ),
}


def _all_changes(task):
    """Of two that change the same attribute, the later one counts: it is the slower."""
    changes = []
    for ablation in ABLATIONS.values():
        if task in ablation.tasks:
            changes.extend(ablation.changes)
    return tuple(changes)


ABLATIONS[ALL] = Ablation(("lora",), _all_changes("lora"))


def prepare(task, variant, job):
    """A function that does one unit of `task` as minilora does it, without the ablation `variant`.

    With "" nothing is switched off. The peak of memory is counted from the first unit on: what
    loading needs for a moment would hide the differences in a large model.
    """
    if variant:
        # For good: this process does nothing else.
        for module, attribute, value in ABLATIONS[variant].changes:
            setattr(module, attribute, value)
    # Not before everything is loaded, or what loading has freed would be kept too.
    keep_freed_memory = numpy_minilora.keep_freed_memory
    numpy_minilora.keep_freed_memory = keep_nothing
    run = numpy_minilora.prepare(task, "", job)
    numpy_minilora.keep_freed_memory = keep_freed_memory
    keep_freed_memory()
    # proc(5): forget the peak. Elsewhere than on Linux it is that of the whole life.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return run
