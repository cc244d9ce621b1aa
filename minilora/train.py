"""The training loop, and what to measure after it. Knows models that have a `loss`, and optimizers; nothing of LoRA."""

import math

import numpy as np
from tqdm import tqdm

from .backend import to_numpy
from .data import pack
from .functional import IGNORE
from .graph import no_grad
from .optim import clip_grad_norm


def train(model, optimizer, batches, steps, *, schedule=None, max_norm=1.0, label="", quiet=False):
    """`steps` optimizer steps on `model`, with a progress bar; returns the list of losses (nats per token).

    Shapes: `batches` yields (inputs, targets), both (B, T) integers. `schedule(step)` gives the learning rate of
    each step (default: the optimizer's own). Gradients are clipped to a joint norm of `max_norm`.
    Raises: ValueError if a loss or a gradient is not finite, before that step touches a parameter, or if the batches
    run out early.
    """
    if steps < 1:
        raise ValueError(f"train: steps must be at least 1, got {steps}")
    losses, tokens, batches = [], 0, iter(batches)
    with tqdm(total=steps, desc=label, unit="step", disable=quiet, leave=False) as bar:
        for step in range(steps):
            try:
                ids, targets = next(batches)
            except StopIteration:
                raise ValueError(f"train: the batches ended after {step} of {steps} steps") from None
            optimizer.zero_grad()
            loss = model.loss(ids, targets)
            losses.append(loss.item())  # waits for the device, as the norm below does: nan must be seen now
            if not math.isfinite(losses[-1]):
                raise ValueError(f"train: the loss is {losses[-1]} at step {step}; lower the learning rate")
            loss.backward()
            del loss  # and with it this step's graph, before the next one is made
            clip_grad_norm(optimizer.params, max_norm)
            optimizer.step(None if schedule is None else schedule(step))
            tokens += np.size(ids)
            speed = tokens / (bar.format_dict["elapsed"] or 1e-9)
            bar.set_postfix_str(f"loss {losses[-1]:.3f}, {speed:,.0f} tokens/s", refresh=False)
            bar.update()
    return losses


def heldout_loss(model, ids, length, batch=32):
    """Mean loss in nats per token over the whole text `ids`, cut into stretches of `length` positions."""
    n = (len(ids) - 1) // length
    if n < 1:
        raise ValueError(f"heldout_loss: a text of {len(ids)} tokens is shorter than one stretch of {length} + 1")
    inputs, targets = ids[: n * length].reshape(n, length), ids[1 : n * length + 1].reshape(n, length)
    with no_grad():
        sums = [len(i) * model.loss(i, t).item() for i, t in _slices(batch, inputs, targets)]
    return sum(sums) / n


def exact_match(model, pairs, batch=64):
    """For each (prompt, answer): does greedy decoding give exactly this answer? A list of bool.

    One forward pass tells: greedy decoding reproduces the answer if and only if the likeliest token is the right one
    at each of its positions, given the answer so far.
    """
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]))  # alike in length: little filling up
    right = np.zeros(len(pairs), bool)
    with no_grad():
        for (rows,) in _slices(batch, np.array(order)):
            inputs, targets = pack([pairs[i] for i in rows])
            best = to_numpy(model(inputs).data).argmax(-1)
            right[rows] = ((best == targets) | (targets == IGNORE)).all(axis=1)
    return right.tolist()


def _slices(n, *arrays):
    return ([a[start : start + n] for a in arrays] for start in range(0, len(arrays[0]), n))
