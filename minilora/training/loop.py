"""The training loop, and what to measure after it. Knows models with a `loss`, and optimizers."""

import contextlib
import math

import numpy as np
from tqdm import tqdm

from ..backend import get_array_module, to_device, to_numpy
from ..functional import IGNORE
from ..graph import no_grad
from ..lean import LOGIT_ROWS
from ..optim import clip_grad_norm
from .batches import answer_rows, pad_rows
from .parts import PartWorkers
from .threads import blas_threads, cores, ctrl_c_deferred


class Interrupted(KeyboardInterrupt):
    """Ctrl-C: the message says where it fell and what was kept."""


def train(
    model,
    optimizer,
    batches,
    steps,
    *,
    schedule=None,
    max_norm=1.0,
    seed=None,
    parts=1,
    threads=1,
    start=0,
    on_step=None,
    label="",
    quiet=False,
):
    """`steps` optimizer steps on `model`; returns the list of losses (nats per token).

    `schedule(step)` gives the learning rate of each step (default: the optimizer's own). Gradients
    are clipped to a joint norm of `max_norm`. Layers drop out if and only if there is a `seed`: it
    determines, with the step and the part, what each of them draws.

    Each batch is cut into `parts`, which `threads` compute at once (see `PartWorkers`); a part has
    its share of the cores for BLAS. On one machine seed and parts determine every bit, whatever the
    threads.

    A run that goes on after `start` steps is given the batches from there. After each step
    `on_step(steps, loss)` is called with the number of steps since the very first; if it returns
    True, this step was the last. A progress bar is drawn unless `quiet`.

    Shapes: `batches` yields (inputs, targets), both (B, T) integers.
    Raises: ValueError if a loss or a gradient is not finite, before that step touches a parameter,
    or if the batches run out early.
    """
    if steps < 1:
        raise ValueError(f"train: steps must be at least 1, got {steps}")
    if not 0 <= start <= steps:
        raise ValueError(f"train: start must lie in 0 .. {steps}, the number of steps; got {start}")
    batches = iter(batches)
    losses = []
    with contextlib.ExitStack() as stack:
        if parts > 1:
            # By parts, not by threads: BLAS on another number of threads may round differently.
            stack.enter_context(blas_threads(max(1, cores() // parts)))
        workers = stack.enter_context(PartWorkers(model, parts, threads))
        progress = stack.enter_context(_ProgressBar(steps, start, label, quiet))
        for step in range(start, steps):
            try:
                ids, targets = next(batches)
            except StopIteration:
                raise ValueError(
                    f"train: the batches ended after {step} of {steps} steps"
                ) from None
            optimizer.zero_grad()
            loss = workers.backward(ids, targets, seed=seed, step=step)
            if not math.isfinite(loss):
                raise ValueError(
                    f"train: the loss is {loss} at step {step}; lower the learning rate"
                )
            clip_grad_norm(optimizer.params, max_norm)
            optimizer.step(None if schedule is None else schedule(step))
            losses.append(loss)
            progress.show(loss, np.size(ids))
            if on_step is not None and on_step(step + 1, loss):
                break
    return losses


def _bar(*arguments, **options):
    """A progress bar of tqdm's. One that Ctrl-C leaves half made complains when it is freed."""
    with ctrl_c_deferred():
        return tqdm(*arguments, **options)


def bars_aside():
    """Within this block no progress bar is on the screen: for a line that is to stay there."""
    return tqdm.external_write_mode()


class _ProgressBar:
    """The bar of a run: steps, the last loss, tokens a second."""

    def __init__(self, steps, start, label, quiet):
        self.n_tokens = 0
        self.bar = _bar(
            total=steps, initial=start, desc=label, unit="step", disable=quiet, leave=False
        )

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        self.bar.close()

    def show(self, loss, n_tokens):
        """One step more, of `n_tokens`."""
        self.n_tokens += n_tokens
        seconds = self.bar.format_dict["elapsed"] or 1e-9
        speed = self.n_tokens / seconds
        self.bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s", refresh=False)
        self.bar.update()


def heldout_loss(model, batches, label=None):
    """Mean loss in nats over every token of `batches` that carries one, however they are cut.

    Shapes: `batches` holds (inputs, targets), both (B, T) integers. A `label` shows a progress bar.
    Raises: ValueError if no token carries a loss.
    """
    total = 0.0
    n_tokens = 0
    bar = _bar(batches, desc=label, unit="batch", disable=label is None, leave=False)
    with no_grad():
        for ids, targets in bar:
            n = int((targets != IGNORE).sum())
            total += n * model.loss(ids, targets).item()
            n_tokens += n
    if not n_tokens:
        raise ValueError("heldout_loss: there is no batch to measure the loss on")
    return total / n_tokens


def exact_match(model, pairs, batch=64):
    """For each (prompt ids, answer ids): is this what greedy decoding gives? A list of bool.

    As `exact_rows`.
    """
    return exact_rows(model, answer_rows(pairs), batch)


def exact_rows(model, rows, batch=64):
    """For each Row: does greedy decoding give all of it that is learned? A list of bool.

    One forward pass tells. Greedy decoding reproduces an answer if and only if, at each of its
    positions, the likeliest token after the answer so far is the right one. Logits are made at
    these positions alone, for LOGIT_ROWS of them at a time. Of several answers in a row each is
    asked for after the right ones before it.
    """
    # Rows alike in length share a batch, so that little is filled up.
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    right = np.zeros(len(rows), bool)
    with no_grad():
        for start in range(0, len(rows), batch):
            chosen = by_length[start : start + batch]
            inputs, targets = pad_rows([rows[i] for i in chosen])
            is_wrong = np.zeros(targets.shape, bool)
            learned = targets != IGNORE
            is_wrong[learned] = _likeliest(model, inputs, learned) != targets[learned]
            right[chosen] = ~is_wrong.any(axis=1)
    return right.tolist()


def _likeliest(model, inputs, where):
    """The likeliest next tokens (N,) after those of `inputs` (B, T) where `where`, booleans, is."""
    hidden = model.hidden(inputs)
    xp = get_array_module(hidden.data)
    # Indices that are arrays must be on the device too.
    places = [to_device(index, xp) for index in np.nonzero(where)]
    likeliest = []
    for start in range(0, len(places[0]), LOGIT_ROWS):
        block = slice(start, start + LOGIT_ROWS)
        logits = model.head(hidden[places[0][block], places[1][block]])
        likeliest.append(to_numpy(logits.data.argmax(-1)))
    return np.concatenate(likeliest)
