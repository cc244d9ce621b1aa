"""Adam, its learning-rate schedules, and gradient clipping. Knows tensors, not models."""

import math
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial

import numpy as np

from .backend import get_array_module, to_device
from .kernels import adam_kernel, has_kernels, sum_of_squares
from .tensor import Tensor, check_same_layout

# How many numbers Adam updates at a time on the host, and from how many on threads pay.
BLOCK = 2**18
THREADS_PAY = 2**25


class Adam:
    """Adam with bias correction and decoupled weight decay (AdamW; plain Adam at weight_decay=0).

        m = β₁ m + (1-β₁) g        m̂ = m / (1-β₁ᵗ)
        v = β₂ v + (1-β₂) g²       v̂ = v / (1-β₂ᵗ)
        p -= lr · weight_decay · p,  p -= lr · m̂ / (√v̂ + eps)

    Two moments are held for each trainable tensor, of its shape and dtype. Frozen tensors are left
    out and cost nothing. Parameters are updated in place: no other model may share their arrays.
    On the host `threads` share the work on a large model; for a small one, or an adapter, it would
    not pay. They change no bit, because no number depends on another.

    Raises: ValueError if nothing is trainable, a hyper-parameter is out of range, or a gradient is
    missing at `step()`.
    Source: Kingma & Ba 2015, algorithm 1; Loshchilov & Hutter 2019, "Decoupled Weight Decay
    Regularization", algorithm 2.

    >>> from minilora import Tensor
    >>> x = Tensor([3.0], requires_grad=True)
    >>> adam = Adam([x], lr=1.0)
    >>> (x * x).sum().backward()
    >>> adam.step()
    >>> x.data
    array([2.])
    """

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, *, threads=1
    ):
        params = list(params)
        for p in params:
            if not isinstance(p, Tensor):
                raise TypeError(
                    f"Adam: expected Tensors, got {type(p).__name__}; pass model.parameters()"
                )
        # A tensor that is given twice is updated once.
        self.params = list({id(p): p for p in params if p.requires_grad}.values())
        if not self.params:
            raise ValueError(
                "Adam: none of these tensors is trainable; "
                "pass adapter.parameters() or an unfrozen model"
            )
        in_range = 0 <= lr < math.inf and 0 < eps < math.inf and 0 <= weight_decay < math.inf
        if not (in_range and all(0 <= b < 1 for b in betas)):
            raise ValueError(
                f"Adam: out of range: lr={lr}, betas={betas}, eps={eps}, "
                f"weight_decay={weight_decay}"
            )
        if threads < 1:
            raise ValueError(f"Adam: at least one thread has to update, got threads={threads}")
        self.threads = threads
        self.lr = lr
        self.betas = betas
        self.eps = eps
        self.weight_decay = weight_decay
        self.steps = 0
        self.m = [get_array_module(p.data).zeros_like(p.data) for p in self.params]
        self.v = [get_array_module(p.data).zeros_like(p.data) for p in self.params]

    def zero_grad(self):
        """Forget all gradients. `backward()` adds to what is there."""
        for p in self.params:
            p.grad = None

    def step(self, lr=None):
        """Update every parameter from its gradient, at rate `lr` (default: Adam's own)."""
        if lr is None:
            lr = self.lr
        if not 0 <= lr < math.inf:
            raise ValueError(
                f"Adam.step: the learning rate must be finite and not negative, got {lr}"
            )
        self._check_gradients()
        self.steps += 1
        beta1, beta2 = self.betas
        # Bias correction: the moments start at zero, so in the first steps they are too small.
        m_correction = 1 - beta1**self.steps
        v_correction = 1 - beta2**self.steps
        decay = 1 - lr * self.weight_decay
        # √v̂ + eps has its own correction; the other one goes into the rate, which is one number.
        numbers = (1 - beta1, 1 - beta2, decay, lr / m_correction, math.sqrt(v_correction))
        blocks = []
        for p, m, v in zip(self.params, self.m, self.v, strict=True):
            blocks += _blocks(p.data, p.grad, m, v)
        _for_each(partial(_update, numbers, self.eps), blocks, self.threads)

    def state_dict(self):
        """What another Adam needs, beside the parameters, to go on from here.

        {"steps": how many are done, "moments": {"m.0": array, ..., "v.0": array, ...}}; the arrays
        are Adam's own, not copies.
        """
        moments = {f"m.{i}": m for i, m in enumerate(self.m)}
        moments |= {f"v.{i}": v for i, v in enumerate(self.v)}
        return {"steps": self.steps, "moments": moments}

    def load_state_dict(self, state):
        """Go on, to the bit, from where another Adam was.

        Raises: ValueError, before anything changes, if the moments do not fit these parameters.
        """
        if state.keys() != {"steps", "moments"}:
            raise ValueError(
                f"Adam.load_state_dict: expected the keys steps and moments, got {list(state)}"
            )
        steps = state["steps"]
        if not isinstance(steps, int) or steps < 0:
            raise ValueError(
                f"Adam.load_state_dict: steps must be a whole number of at least 0, got {steps!r}"
            )
        own_moments = self.state_dict()["moments"]
        check_same_layout("Adam.load_state_dict", state["moments"], own_moments)
        for name, moment in own_moments.items():
            moment[...] = to_device(state["moments"][name], get_array_module(moment))
        self.steps = steps

    def _check_gradients(self):
        missing = [p.shape for p in self.params if p.grad is None]
        if missing:
            raise ValueError(
                f"Adam.step: no gradient for {len(missing)} of {len(self.params)} tensors "
                f"({missing[0]}); call loss.backward() first, or give Adam only what the loss "
                "depends on"
            )


def _update(numbers, eps, block):
    """One step of the arrays (w, g, m, v) in `block`, in place but for the gradient g."""
    new_in_m, new_in_v, decay, rate, v_root = numbers
    w, g, m, v = block
    xp = get_array_module(w)
    if has_kernels(xp):
        # The same lines, as one kernel.
        adam_kernel(xp)(g, *numbers, eps, w, m, v)
        return
    m += new_in_m * (g - m)
    v += new_in_v * (g * g - v)
    if decay != 1:
        w *= decay
    denominator = xp.sqrt(v) / v_root + eps
    w -= rate * (m / denominator)


def _for_each(function, blocks, threads):
    """Call `function(block)` for each of the blocks of arrays, on so many threads if it pays."""
    if threads == 1 or sum(block[0].size for block in blocks) < THREADS_PAY:
        for block in blocks:
            function(block)
        return
    with ThreadPoolExecutor(threads) as pool:
        # The context carries np.errstate into the thread.
        futures = [pool.submit(copy_context().run, function, block) for block in blocks]
    for future in futures:
        future.result()


def _blocks(*arrays):
    """The arrays in views of about BLOCK numbers along the first axis.

    The work on one block stays in the processor's cache. On a GPU the whole is one block.
    """
    first = arrays[0]
    if first.size <= BLOCK or get_array_module(*arrays) is not np:
        return [arrays]
    n_rows = max(1, BLOCK * len(first) // first.size)
    starts = range(0, len(first), n_rows)
    return [tuple(a[start : start + n_rows] for a in arrays) for start in starts]


def clip_grad_norm(params, max_norm):
    """Scale all gradients so that their joint Euclidean norm is at most `max_norm`.

    Returns the norm before, a float.
    Raises: ValueError, before anything changes, if the norm is not finite or max_norm not positive.
    Source: Pascanu, Mikolov & Bengio 2013.
    """
    if not max_norm > 0:
        raise ValueError(f"clip_grad_norm: max_norm must be positive, got {max_norm}")
    params = [p for p in params if p.grad is not None]
    # From a GPU one number crosses to the host, however many tensors there are.
    norm = math.sqrt(float(sum_of_squares([p.grad for p in params])))
    if not math.isfinite(norm):
        raise ValueError(
            f"the gradient norm is {norm}: lower the learning rate, or look for inf/nan in the data"
        )
    if norm > max_norm:
        for p in params:
            p.grad = p.grad * (max_norm / norm)
    return norm


def warmup_cosine(step, total, peak, warmup=0, final=0.1):
    """The learning rate at `step` (0, 1, ...).

    It rises linearly to `peak` over `warmup` steps, then falls along a cosine to final · peak.
    Source: Loshchilov & Hutter 2017, "SGDR", eq. 5, with a linear warm-up.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)))


def warmup_linear(step, total, peak, warmup=0, final=0.1):
    """The learning rate at `step` (0, 1, ...).

    It rises linearly to `peak` over `warmup` steps, then falls in a straight line to final · peak.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return peak * (1 - (1 - final) * progress)


def warmup_constant(step, total, peak, warmup=0):
    """The learning rate at `step`: it rises linearly to `peak` over `warmup` steps, and stays."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak


# {what a schedule is called: the learning rate at a step of so many, with a peak and a warm-up}
SCHEDULES = {"cosine": warmup_cosine, "linear": warmup_linear, "constant": warmup_constant}
