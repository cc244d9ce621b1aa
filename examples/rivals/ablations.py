"""What makes minilora fast, one trick at a time, and what switches each off. Knows the library's inside.

An op is switched off by giving the models `functional`'s form in the place of `lean`'s, in a process of its own that
does nothing else. What is here keeps what it computed, makes a new array each time, and checks nothing.
"""

import contextlib
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minilora import Tensor, attach, functional, gpt, lean, no_grad, optim
from minilora.tensor import record
from minilora.training.parts import PartWorkers

from . import numpy_minilora


def gelu_power(x):
    """`functional.gelu` with the formula's x³ written as NumPy's power."""
    c, a, X = math.sqrt(2 / math.pi), 0.044715, x.data
    t = np.tanh(c * (X + a * X**3))
    slope = lambda: 0.5 * (1 + t) + 0.5 * X * (1 - t * t) * c * (1 + 3 * a * X**2)
    return record(0.5 * X * (1 + t), (x, lambda dy: dy * slope()))


class GrowingCache:
    """One layer's keys and values in arrays that are made anew, one position longer, for each token."""

    def __init__(self, size):
        self.k = self.v = None  # arrays (B, S, C)

    length = property(lambda self: 0 if self.k is None else self.k.shape[1])

    def extend(self, k, v):
        """Append k, v (B, T, C) to what is held; returns all of it as Tensors (B, S + T, C)."""
        self.k = k.data if self.k is None else np.concatenate([self.k, k.data], axis=1)
        self.v = v.data if self.v is None else np.concatenate([self.v, v.data], axis=1)
        return Tensor(self.k), Tensor(self.v)


def generate(model, ids, max_new_tokens):
    """The likeliest tokens after `ids` (B, T); for each, the model reads everything before it again."""
    with no_grad():
        for _ in range(max_new_tokens):
            logits = model.head(model.hidden(ids)[:, -1]).data
            ids = np.concatenate([ids, logits.argmax(-1)[:, None]], axis=1)
    return ids


def attach_trainable(base, adapter):
    """`attach`, but the base is trainable too: all its gradients are computed, and no optimizer reads them."""
    model = attach(base, adapter)
    return model.map_tensors(lambda t: t if t.requires_grad else Tensor(t.data, requires_grad=True))


class ForgetfulWorkers(PartWorkers):
    """`PartWorkers` that start a batch without a gradient: Adam's zero_grad leaves those of the base where they are."""

    def backward(self, ids, targets, **options):
        """As `PartWorkers.backward`."""
        for p in self.model.parameters():
            p.grad = None
        return super().backward(ids, targets, **options)


class Trick(NamedTuple):
    """The tasks in which it is at work, and what is set where to switch it off: (place, attribute, plain)."""

    tasks: tuple
    off: tuple


WHOLE = 2**62  # as a block's size: everything is one block
NOISE, ALL = "nothing, the same twice", "all of these"
TRICKS = {  # name: what switches it off
    NOISE: Trick(("lora", "full", "generate"), ()),
    "parts of a batch on threads": Trick(("lora",), ((numpy_minilora, "IN_PARTS", None),)),  # BLAS takes all cores
    "freed memory kept": Trick(("lora",), ((numpy_minilora, "keep_freed_memory", lambda: False),)),
    "no gradient for frozen weights": Trick(
        ("lora",),
        ((numpy_minilora, "attach", attach_trainable), (numpy_minilora, "PartWorkers", ForgetfulWorkers)),
    ),
    "attention: blocks of queries": Trick(("lora",), ((lean, "QUERY_BLOCK", WHOLE),)),
    "attention: all of it": Trick(("lora",), ((gpt, "attention", functional.attention),)),
    "gelu: in place, derivative kept": Trick(("lora",), ((gpt, "gelu", functional.gelu),)),
    "gelu: that, and x*x*x for x**3": Trick(("lora",), ((gpt, "gelu", gelu_power),)),
    "loss: blocks of logits": Trick(("lora",), ((lean, "LOGIT_ROWS", WHOLE),)),
    "loss: that, and gradient at once": Trick(
        ("lora",), ((gpt, "linear_cross_entropy", functional.linear_cross_entropy),)
    ),
    "Adam in blocks": Trick(("full",), ((optim, "BLOCK", WHOLE),)),
    "a cache of keys and values": Trick(("generate",), ((numpy_minilora, "generate", generate),)),
    "a cache that is made once": Trick(("generate",), ((gpt, "KeyValueCache", GrowingCache),)),
    "merging first": Trick(("generate",), ((numpy_minilora, "merge", lambda model: model),)),
}
TRICKS[ALL] = Trick(("lora",), tuple(off for trick in TRICKS.values() if "lora" in trick.tasks for off in trick.off))


def prepare(task, variant, unit):
    """A function that does one unit of `task`, as minilora does it without the trick `variant`; "" is with them all.

    Memory is told from its first unit on: what loading needs for a moment would hide the difference in a large model.
    """
    for place, attribute, plain in TRICKS[variant].off if variant else ():
        setattr(place, attribute, plain)  # for good: this process does nothing else
    keep, numpy_minilora.keep_freed_memory = numpy_minilora.keep_freed_memory, lambda: False
    run = numpy_minilora.prepare(task, "", unit)
    numpy_minilora.keep_freed_memory = keep
    keep()  # not before: or what loading has freed would be kept too
    with contextlib.suppress(OSError):  # elsewhere than on Linux the peak is that of the whole life
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): forget the peak
    return run
