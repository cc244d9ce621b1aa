"""The training loop, and what to measure after it. Knows models with a `loss`, and optimizers."""

import contextlib
import math
from itertools import islice

import numpy as np
from tqdm import tqdm

from ..backend import get_array_module, to_device, to_numpy
from ..functional import IGNORE
from ..graph import no_grad
from ..lean import LOGIT_ROWS
from ..optim import clip_grad_norm
from .batches import answer_rows, pad_rows
from .parts import PartWorkers
from .threads import ctrl_c_deferred


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
    accumulate=1,
    workers=None,
    start=0,
    on_step=None,
    label="",
    quiet=False,
):
    """`steps` optimizer steps on `model`; returns the list of losses (nats per token).

    `schedule(step)` gives the learning rate of each step (default: the optimizer's own). Gradients
    are clipped to a joint norm of `max_norm`. Layers drop out if and only if there is a `seed`: it
    determines, with the step and the part, what each of them draws.

    Each batch is cut into `parts`, which `threads` compute at once (see `PartWorkers`), each part
    with one thread of BLAS. On one kind of processor seed and parts determine every bit, whatever
    the threads. `workers`, a `Workers` that was entered, takes the place of both. A step takes
    `accumulate` batches: N of B rows in P parts each give what one of N·B rows in N·P parts gives.

    A run that goes on after `start` steps is given the batches from there. After each step
    `on_step(steps, loss, norm)` is called with the number of steps since the very first, and the
    norm of the gradients before they were clipped; if it returns True, this step was the last.
    Unless `quiet` a progress bar is drawn, on a terminal alone.

    Shapes: `batches` yields (inputs, targets), both (B, T) integers.
    Raises: ValueError if a loss or a gradient is not finite, before that step touches a parameter;
    if the batches run out early; or if another training of this process needs another number of
    threads of BLAS (`blas_threads`).
    """
    if accumulate < 1:
        raise ValueError(f"train: a step takes at least one batch, got accumulate {accumulate}")
    if steps < 1:
        raise ValueError(f"train: steps must be at least 1, got {steps}")
    if not 0 <= start <= steps:
        raise ValueError(f"train: start must lie in 0 .. {steps}, the number of steps; got {start}")
    batches = iter(batches)
    losses = []
    with contextlib.ExitStack() as stack:
        workers = _entered(stack, model, parts, threads, workers)
        progress = stack.enter_context(_ProgressBar(steps, start, label, quiet))
        for step in range(start, steps):
            of_step = list(islice(batches, accumulate))
            if len(of_step) < accumulate:
                raise ValueError(f"train: the batches ended after {step} of {steps} steps")
            optimizer.zero_grad()
            loss = workers.backward(of_step, seed=seed, step=step)
            if not math.isfinite(loss):
                remedy = "lower the learning rate"
                if step == 0:
                    remedy = (
                        "no step was taken yet, so the model itself holds inf or nan, or far too "
                        "large numbers"
                    )
                raise ValueError(f"train: the loss is {loss} at step {step}; {remedy}")
            norm = clip_grad_norm(optimizer.params, max_norm)
            optimizer.step(None if schedule is None else schedule(step))
            losses.append(loss)
            progress.show(loss, sum(np.size(ids) for ids, _ in of_step))
            if on_step is not None and on_step(step + 1, loss, norm):
                break
    return losses


def _entered(stack, model, parts, threads, workers):
    """`workers`, or those that `parts` and `threads` ask for, as long as the stack lasts."""
    if workers is None:
        return stack.enter_context(PartWorkers(model, parts, threads))
    if (parts, threads) != (1, 1):
        raise ValueError(
            f"parts {parts} and threads {threads} beside workers: they have a number of parts of "
            "their own; leave both out"
        )
    return workers


def _bar(*arguments, quiet, **options):
    """A progress bar of tqdm's, on a terminal alone: in a file it would be one endless line.

    One that Ctrl-C leaves half made complains when it is freed.
    """
    with ctrl_c_deferred():
        return tqdm(*arguments, disable=quiet or None, **options)


def bars_aside():
    """Within this block no progress bar is on the screen: for a line that is to stay there."""
    return tqdm.external_write_mode()


class _ProgressBar:
    """The bar of a run: steps, the last loss, tokens a second."""

    def __init__(self, steps, start, label, quiet):
        self.n_tokens = 0
        self.bar = _bar(
            total=steps, initial=start, desc=label, unit="step", quiet=quiet, leave=False
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


def heldout_loss(model, batches, label=None, *, parts=1, threads=1, workers=None):
    """Mean loss in nats over every token of `batches` that carries one, however they are cut.

    `parts`, `threads` and `workers` are those of `train`. A `label` shows a progress bar.

    Shapes: `batches` holds (inputs, targets), both (B, T) integers.
    Raises: ValueError if no token carries a loss, or if the loss is not finite.
    """
    total = 0.0
    n_tokens = 0
    bar = _bar(batches, desc=label, unit="batch", quiet=label is None, leave=False)
    with no_grad(), _evaluation(model, part_loss, bar, parts, threads, workers) as results:
        for n, loss in results:
            total += n * loss
            n_tokens += n
    if not n_tokens:
        raise ValueError("heldout_loss: there is no batch to measure the loss on")
    if not math.isfinite(total):
        raise ValueError(
            f"heldout_loss: the loss is {total}: parameters of the model hold inf or nan, or far "
            "too large numbers; lower the alpha of its adapter, or its learning rate"
        )
    return total / n_tokens


@contextlib.contextmanager
def _evaluation(model, function, batches, parts, threads, workers):
    """What `function` gives of each part of the batches, in their order."""
    with contextlib.ExitStack() as stack:
        workers = _entered(stack, model, parts, threads, workers)
        yield stack.enter_context(contextlib.closing(workers.evaluate(function, batches)))


def part_loss(model, part):
    """(how many targets of a Part carry a loss, their mean loss)."""
    return np.count_nonzero(part.targets != IGNORE), model.loss(part.ids, part.targets).item()


def exact_match(model, pairs, batch=64, *, parts=1, threads=1):
    """For each (prompt ids, answer ids): is this what greedy decoding gives? A list of bool.

    As `exact_rows`.
    """
    return exact_rows(model, answer_rows(pairs), batch, parts=parts, threads=threads)


def exact_rows(model, rows, batch=64, *, parts=1, threads=1):
    """For each Row: does greedy decoding give all of it that is learned? A list of bool.

    One forward pass tells. Greedy decoding reproduces an answer if and only if, at each of its
    positions, the likeliest token after the answer so far is the right one. Logits are made at
    these positions alone, for LOGIT_ROWS of them at a time. Of several answers in a row each is
    asked for after the right ones before it. `parts` and `threads` are those of `train`.
    """
    # Rows alike in length share a batch, so that little is filled up.
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    starts = range(0, len(rows), batch)
    batches = (pad_rows([rows[i] for i in by_length[n : n + batch]]) for n in starts)
    right = np.zeros(len(rows), bool)
    n_done = 0
    with no_grad(), _evaluation(model, right_rows, batches, parts, threads, None) as results:
        for is_right in results:
            right[by_length[n_done : n_done + len(is_right)]] = is_right
            n_done += len(is_right)
    return right.tolist()


def right_rows(model, part):
    """Of which rows of a Part does greedy decoding give all that is learned? Booleans (rows,)."""
    is_wrong = np.zeros(part.targets.shape, bool)
    learned = part.targets != IGNORE
    is_wrong[learned] = _likeliest(model, part.ids, learned) != part.targets[learned]
    return ~is_wrong.any(axis=1)


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
