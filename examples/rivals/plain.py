"""Each fast path of minilora as a textbook has it, and a switch that puts it in place of ours. Knows its inside.

Shapes: B batch, T time (positions), S positions attended to (S >= T), C channels, H heads, D = C / H, V vocabulary.
What is here keeps what it computed, makes a new array for every operation, and checks nothing: it is there to be read,
to be compared with, and to be timed. NumPy only.
"""

import contextlib
import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minilora import Tensor, attach, functional, no_grad, optim
from minilora.functional import IGNORE, linear
from minilora.tensor import record
from minilora.training.parts import Replicas

from . import numpy_minilora


def attention(q, k, v, n_head):
    """softmax(q kᵀ / √D + mask) v in whole squares (T, S), of which the probabilities are kept for the gradient."""
    (B, T, C), S = q.shape, k.shape[1]
    scale = 1 / math.sqrt(C // n_head)
    split = lambda a: a.reshape(B, -1, n_head, C // n_head).swapaxes(1, 2)  # (B, T, C) -> (B, H, T, D)
    join = lambda a: a.swapaxes(1, 2).reshape(B, -1, C)  # and back
    Q, K, V = split(q.data), split(k.data), split(v.data)
    seen = np.tril(np.ones((T, S), bool), S - T)
    scores = np.where(seen, Q @ K.swapaxes(-1, -2) * scale, -math.inf)
    e = np.exp(scores - scores.max(-1, keepdims=True))
    P = e / e.sum(-1, keepdims=True)

    def dqkv(dy):
        dO = split(dy)
        dP = dO @ V.swapaxes(-1, -2)
        dS = P * (dP - (dP * P).sum(-1, keepdims=True)) * scale
        return join(dS @ K), join(dS.swapaxes(-1, -2) @ Q), join(P.swapaxes(-1, -2) @ dO)

    return record(join(P @ V), ((q, k, v), dqkv))


def gelu(x, cube=lambda x: x * x * x):
    """0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³))); the gradient keeps x and computes the tanh again."""
    c, a, x_ = math.sqrt(2 / math.pi), 0.044715, x.data
    t = lambda: np.tanh(c * (x_ + a * cube(x_)))

    def dx(dy):
        t_ = t()
        return dy * (0.5 * (1 + t_) + 0.5 * x_ * (1 - t_ * t_) * c * (1 + 3 * a * x_ * x_))

    return record(0.5 * x_ * (1 + t()), (x, dx))


def gelu_power(x):
    """`gelu` with the formula's x³ written as NumPy's power."""
    return gelu(x, cube=lambda x: x**3)


def layer_norm(x, weight, bias, eps=1e-5):
    """(x - mean) / √(var + eps) · weight + bias over the last axis."""
    std = np.sqrt(x.data.var(-1, keepdims=True) + eps)
    normed = (x.data - x.data.mean(-1, keepdims=True)) / std

    def dx(dy):
        d = dy * weight_
        return (d - d.mean(-1, keepdims=True) - normed * (d * normed).mean(-1, keepdims=True)) / std

    weight_ = weight.data
    y = normed * weight_ + bias.data
    return record(y, (x, dx), (weight, lambda dy: dy * normed), (bias, lambda dy: dy))


def cross_entropy(logits, targets):
    """Mean of -log softmax(logits)[target]: logits (..., V), targets (...) integers -> a scalar; -100 has no loss."""
    shape, targets = logits.shape, np.reshape(targets, -1)
    rows = np.flatnonzero(targets != IGNORE)
    at_target = rows, targets[rows]
    z = logits.data.reshape(-1, shape[-1])
    z = z - z.max(-1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))

    def dlogits(dy):
        d = np.exp(log_p)
        d[at_target] -= 1
        d[targets == IGNORE] = 0
        return (d * (dy / rows.size)).reshape(shape)

    return record(np.asarray(-log_p[at_target].mean()), (logits, dlogits))


def linear_cross_entropy(x, weight, targets):
    """All logits, then their loss: (..., V) numbers, and as many again for the gradient."""
    return cross_entropy(linear(x, weight), targets)


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


class ForgetfulReplicas(Replicas):
    """`Replicas` that start each batch without a gradient: Adam's zero_grad leaves those of the base where they are."""

    def backward(self, ids, targets):
        """As `Replicas.backward`."""
        for p in self.leaves[0]:
            p.grad = None
        return super().backward(ids, targets)


class Trick(NamedTuple):
    """The tasks in which it is at work, and what is set where to switch it off: (place, attribute, plain)."""

    tasks: tuple
    off: tuple


writing = sys.modules["minilora.generate"]
WHOLE = 2**62  # as a block's size: everything is one block
NOISE, ALL = "nothing, the same twice", "all of these"
TRICKS = {  # name: what switches it off
    NOISE: Trick(("lora", "full", "generate"), ()),
    "parts of a batch on threads": Trick(("lora",), ((numpy_minilora, "IN_PARTS", None),)),  # BLAS takes all cores
    "freed memory kept": Trick(("lora",), ((numpy_minilora, "keep_freed_memory", lambda: False),)),
    "no gradient for frozen weights": Trick(
        ("lora",),
        ((numpy_minilora, "attach", attach_trainable), (numpy_minilora, "Replicas", ForgetfulReplicas)),
    ),
    "attention: blocks of queries": Trick(("lora",), ((functional, "QUERIES", WHOLE),)),
    "attention: all of it": Trick(("lora",), ((functional, "attention", attention),)),
    "gelu: in place, derivative kept": Trick(("lora",), ((functional, "gelu", gelu),)),
    "gelu: that, and x*x*x for x**3": Trick(("lora",), ((functional, "gelu", gelu_power),)),
    "layer norm: means by product": Trick(("lora",), ((functional, "layer_norm", layer_norm),)),
    "loss: blocks of logits": Trick(("lora",), ((functional, "LOGITS", WHOLE),)),
    "loss: that, and gradient at once": Trick(("lora",), ((functional, "linear_cross_entropy", linear_cross_entropy),)),
    "Adam in blocks": Trick(("full",), ((optim, "BLOCK", WHOLE),)),
    "a cache of keys and values": Trick(("generate",), ((numpy_minilora, "generate", generate),)),
    "a cache that is made once": Trick(("generate",), ((writing, "KeyValueCache", GrowingCache),)),
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
