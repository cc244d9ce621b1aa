"""Adam, its learning-rate schedule, and gradient clipping. Knows tensors, not models."""

import math

import numpy as np

from .backend import get_array_module, to_device
from .tensor import Tensor

BLOCK = 2**16  # numbers that Adam updates at a time on the host


class Adam:
    """Adam with bias correction and decoupled weight decay (AdamW; plain Adam at weight_decay=0).

    m = β₁ m + (1-β₁) g,  v = β₂ v + (1-β₂) g²,  p -= lr · weight_decay · p,  p -= lr · m̂ / (√v̂ + eps)

    Shapes: `params` are Tensors of any shape; two moments of the same shape and dtype are held for each trainable
    one. Frozen tensors are left out and cost nothing. Parameters are updated in place: their arrays must be theirs.
    Raises: ValueError if nothing is trainable, a hyper-parameter is out of range, or a gradient is missing at `step()`.
    Source: Kingma & Ba 2015, algorithm 1; Loshchilov & Hutter 2019, "Decoupled Weight Decay", algorithm 2.

    >>> from minilora import Tensor
    >>> x = Tensor([3.0], requires_grad=True)
    >>> adam = Adam([x], lr=1.0)
    >>> (x * x).sum().backward()
    >>> adam.step()
    >>> x.data
    array([2.])
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        params = list(params)
        wrong = [type(p).__name__ for p in params if not isinstance(p, Tensor)]
        if wrong:
            raise TypeError(f"Adam: expected Tensors, got {wrong[0]}; pass model.parameters()")
        self.params = list({id(p): p for p in params if p.requires_grad}.values())
        if not self.params:
            raise ValueError("Adam: none of these tensors is trainable; pass adapter.parameters() or an unfrozen model")
        in_range = 0 <= lr < math.inf and 0 < eps < math.inf and 0 <= weight_decay < math.inf
        if not (in_range and all(0 <= b < 1 for b in betas)):
            raise ValueError(f"Adam: out of range: lr={lr}, betas={betas}, eps={eps}, weight_decay={weight_decay}")
        self.lr, self.betas, self.eps, self.weight_decay, self.steps = lr, betas, eps, weight_decay, 0
        self.m = [get_array_module(p.data).zeros_like(p.data) for p in self.params]
        self.v = [get_array_module(p.data).zeros_like(p.data) for p in self.params]

    def zero_grad(self):
        """Forget all gradients. `backward()` adds to what is there."""
        for p in self.params:
            p.grad = None

    def step(self, lr=None):
        """Update every parameter from its gradient, at rate `lr` (default: the one given at the start)."""
        lr = self.lr if lr is None else lr
        if not 0 <= lr < math.inf:
            raise ValueError(f"Adam.step: the learning rate must be finite and not negative, got {lr}")
        missing = [p.shape for p in self.params if p.grad is None]
        if missing:
            raise ValueError(f"Adam.step: no gradient for {len(missing)} of {len(self.params)} tensors ({missing[0]}); "
                             "call loss.backward() first, or give Adam only what the loss depends on")
        self.steps += 1
        (b1, b2), t = self.betas, self.steps
        arrays = [(p.data, p.grad, m, v) for p, m, v in zip(self.params, self.m, self.v, strict=True)]
        for w, g, m, v in (block for each in arrays for block in _blocks(*each)):
            m += (1 - b1) * (g - m)
            v += (1 - b2) * (g * g - v)
            denominator = get_array_module(g).sqrt(v) / math.sqrt(1 - b2**t) + self.eps
            if self.weight_decay:
                w *= 1 - lr * self.weight_decay
            w -= (lr / (1 - b1**t)) * (m / denominator)

    def state(self):
        """{name: moment}, not copied: with the parameters and `steps`, all that another Adam needs to go on."""
        return {f"{kind}.{i}": a for kind in "mv" for i, a in enumerate(getattr(self, kind))}

    def restore(self, state, steps):
        """Go on, to the bit, after those `steps`. Raises: ValueError, with nothing changed, if `state` does not fit."""
        ours, theirs = ({n: (a.shape, a.dtype.name) for n, a in s.items()} for s in (self.state(), state))
        if ours != theirs or steps < 0:
            odd = [f"{n}: {theirs.get(n)}, not {ours.get(n)}" for n in ours | theirs if theirs.get(n) != ours.get(n)]
            raise ValueError(f"Adam.restore: {steps} steps and {len(theirs)} moments do not fit here; {odd[:4]}")
        for name, moment in self.state().items():
            moment[...] = to_device(state[name], get_array_module(moment))
        self.steps = steps


def _blocks(*arrays):
    """The arrays in views of about BLOCK numbers, along the first axis: work on one stays in the cache."""
    if arrays[0].size <= BLOCK or get_array_module(*arrays) is not np:
        return [arrays]
    rows = max(1, BLOCK * len(arrays[0]) // arrays[0].size)
    return [tuple(a[start : start + rows] for a in arrays) for start in range(0, len(arrays[0]), rows)]


def clip_grad_norm(params, max_norm):
    """Scale all gradients so that their joint Euclidean norm is at most `max_norm`; returns the norm before (a float).

    Source: Pascanu, Mikolov & Bengio 2013. Raises: ValueError if the norm is not finite, before anything is changed,
    or max_norm is not positive.
    """
    if not max_norm > 0:
        raise ValueError(f"clip_grad_norm: max_norm must be positive, got {max_norm}")
    params = [p for p in params if p.grad is not None]
    norm = math.sqrt(float(sum((p.grad * p.grad).sum() for p in params)))  # one number crosses to the host
    if not math.isfinite(norm):
        raise ValueError(f"the gradient norm is {norm}: lower the learning rate, or look for inf/nan in the data")
    if norm > max_norm:
        for p in params:
            p.grad = p.grad * (max_norm / norm)
    return norm


def warmup_cosine(step, total, peak, warmup=0, final=0.1):
    """Learning rate at `step` (0, 1, ...): linear up to `peak` over `warmup` steps, then a cosine down to final · peak.

    Source: Loshchilov & Hutter 2017, "SGDR", eq. 5, with a linear warm-up.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)))
