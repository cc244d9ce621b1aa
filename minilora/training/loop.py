"""The training loop, and what to measure after it. Knows models that have a `loss`, and optimizers; nothing of LoRA."""

import contextlib
import math

import numpy as np
from tqdm import tqdm

from ..backend import to_numpy
from ..functional import IGNORE
from ..graph import no_grad
from ..optim import clip_grad_norm
from .batches import pad_pairs
from .parts import Replicas
from .threads import blas_threads, check_threads, cores


class Interrupted(Exception):
    """Ctrl-C: the message says where it fell and what was kept."""


def train(model, optimizer, batches, steps, *, schedule=None, max_norm=1.0, label="", quiet=False, start=0, after=None,
          threads=1):
    """`steps` optimizer steps on `model`, with a progress bar; returns the list of losses (nats per token).

    Shapes: `batches` yields (inputs, targets), both (B, T) integers. `schedule(step)` gives the learning rate of
    each step (default: the optimizer's own). Gradients are clipped to a joint norm of `max_norm`.
    A run that goes on after `start` steps is given the batches from there. `after(done, loss)` is called after each
    step, with the number of steps done since the very first. With `threads` above 1 each batch is computed in as many
    parts at once (give no more than it has rows), and BLAS has its share of the cores in each (needs threadpoolctl).
    Raises: ValueError if a loss or a gradient is not finite, before that step touches a parameter, or if the batches
    run out early; as `check_threads`.
    """
    check_threads(threads)
    if steps < 1:
        raise ValueError(f"train: steps must be at least 1, got {steps}")
    if not 0 <= start <= steps:
        raise ValueError(f"train: start must lie in 0 .. {steps}, the number of steps; got {start}")
    losses, tokens, batches = [], 0, iter(batches)
    share = contextlib.nullcontext() if threads == 1 else blas_threads(max(1, cores() // threads))
    progress = lambda: tqdm(total=steps, initial=start, desc=label, unit="step", disable=quiet, leave=False)
    with share, Replicas(model, threads) as replicas, progress() as bar:
        for step in range(start, steps):
            try:
                ids, targets = next(batches)
            except StopIteration:
                raise ValueError(f"train: the batches ended after {step} of {steps} steps") from None
            optimizer.zero_grad()
            losses.append(replicas.backward(ids, targets))  # waits for the device, as the norm below does
            if not math.isfinite(losses[-1]):
                raise ValueError(f"train: the loss is {losses[-1]} at step {step}; lower the learning rate")
            clip_grad_norm(optimizer.params, max_norm)
            optimizer.step(None if schedule is None else schedule(step))
            tokens += np.size(ids)
            speed = tokens / (bar.format_dict["elapsed"] or 1e-9)
            bar.set_postfix_str(f"loss {losses[-1]:.3f}, {speed:,.0f} tokens/s", refresh=False)
            bar.update()
            if after is not None:
                after(step + 1, losses[-1])
    return losses


def heldout_loss(model, batches, label=None):
    """Mean loss in nats over every token of `batches` that carries one, so that it is the same however they are cut.

    Shapes: `batches` holds (inputs, targets), both (B, T) integers. A `label` shows a progress bar.
    Raises: ValueError if no token carries a loss.
    """
    total = tokens = 0
    with no_grad():
        for ids, targets in tqdm(batches, desc=label, unit="batch", disable=label is None, leave=False):
            carrying = int((targets != IGNORE).sum())
            total += carrying * model.loss(ids, targets).item()
            tokens += carrying
    if not tokens:
        raise ValueError("heldout_loss: there is no batch to measure the loss on")
    return total / tokens


def exact_match(model, pairs, batch=64):
    """For each (prompt ids, answer ids): does greedy decoding give exactly this answer? A list of bool.

    One forward pass tells: greedy decoding reproduces the answer if and only if the likeliest token is the right one
    at each of its positions, given the answer so far.
    """
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]))  # alike in length: little filling up
    right = np.zeros(len(pairs), bool)
    with no_grad():
        for rows in (order[i : i + batch] for i in range(0, len(order), batch)):
            inputs, targets = pad_pairs([pairs[i] for i in rows])
            best = to_numpy(model(inputs).data).argmax(-1)
            right[rows] = ((best == targets) | (targets == IGNORE)).all(axis=1)
    return right.tolist()
