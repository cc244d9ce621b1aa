"""How far a fine-tuning has come, and the lines that report it. Knows no model."""

import math
import sys
from dataclasses import dataclass, field

import numpy as np

from ..disk.checks import counted

# The report gives the mean loss of so many steps, at the start and at the end; of a run that is not
# twice as long it gives the loss of the first step and of the last.
REPORTED_STEPS = 10
# More digits than this nobody reads: a float32 has no more.
MOST_DIGITS = 8
# If a larger share of the steps is shortened, clipping is no exception any more.
CLIPPED_OFTEN = 0.9
# Gradients that grow to so many times the norm of the first step, where no step had been taken yet,
# are those of a learning rate that is too high.
GREW = 10


@dataclass
class Progress:
    """How far a run has come.

    before: the held-out loss before the first step, in nats per token (None: not measured). losses:
    that of each step. tokens, seconds: how many the steps took. evaluations: [steps done, held-out
    loss] of each measurement on the way. norms: of the gradients of each step, before clipping.
    """

    before: float | None = None
    losses: list = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    evaluations: list = field(default_factory=list)
    norms: list = field(default_factory=list)

    def as_json(self):
        """A copy, as a dict for JSON; `Progress(**copy)` goes on from it."""
        return {
            **vars(self),
            "losses": self.losses.copy(),
            "evaluations": self.evaluations.copy(),
            "norms": self.norms.copy(),
        }

    def best(self):
        """[steps done, held-out loss] of the evaluation with the lowest loss so far.

        Of equal ones the first: to stay where one is is no improvement. What was measured before
        the first step does not count, because nothing was learned there that could be kept.
        Raises: ValueError if there was no evaluation.
        """
        return min(self.evaluations, key=lambda evaluation: evaluation[1])

    def evaluations_since_best(self):
        """How many evaluations in a row, up to the last, have brought no improvement."""
        if not self.evaluations:
            return 0
        return len(self.evaluations) - 1 - self.evaluations.index(self.best())

    def count_tokens(self, batches):
        """`batches`, (inputs, targets), as they are, with their tokens counted."""
        for ids, targets in batches:
            self.tokens += ids.size
            yield ids, targets

    def report(self, after, steps):
        """What the steps took, and what was learned, as lines.

        `after` is the held-out loss of what is kept, or None if nothing is held out. `steps` is how
        many were planned.
        """
        speed = self.tokens / max(self.seconds, 1e-9)
        lines = [
            f"{counted(len(self.losses), 'step')} in {self.seconds:,.0f} s, {speed:,.0f} tokens/s; "
            f"training loss {self._training_loss()}"
        ]
        if len(self.losses) < steps:
            n = self.evaluations_since_best()
            last = "the last evaluation was" if n == 1 else f"{n} evaluations in a row were"
            lines.append(f"stopped after step {len(self.losses)} of {steps}: {last} no better")
        if self.evaluations:
            lines.append(self._best_and_last())
        elif after is not None:
            lines.append(f"held-out loss {_change(self.before, after)}")
        return lines

    def _training_loss(self):
        first, last, of_what = self._first_and_last()
        if len(self.losses) == 1:
            return f"{first:.3f} nats per token"
        return f"{_change(first, last)} ({of_what})"

    def _first_and_last(self):
        """The training loss at the start and at the end, and what of it that is."""
        n = REPORTED_STEPS
        if len(self.losses) < 2 * n:
            return self.losses[0], self.losses[-1], "first and last step"
        return np.mean(self.losses[:n]), np.mean(self.losses[-n:]), f"means of {n} steps"

    def remarks(self, after, clip):
        """What went otherwise than one hopes, as lines: losses that rose, gradients cut short.

        `after` is as for `report`, `clip` the norm to which gradients are shortened.
        """
        remarks = []
        first, last, _ = self._first_and_last()
        remedy = "lower the learning rate, or look at the data"
        if after is not None and not self.evaluations and after > self.before:
            remarks.append(f"the held-out loss rose, by {after - self.before:.2g}: {remedy}")
        elif after is None and last > first:
            if len(self.losses) < 2 * REPORTED_STEPS:
                remedy = "each step has other rows; hold some out to know (--eval-split)"
            remarks.append(f"the training loss rose, by {last - first:.2g}: {remedy}")
        n = len(self.norms)
        n_clipped = sum(norm > clip for norm in self.norms)
        if max(self.norms) > GREW * max(self.norms[0], clip):
            remarks.append(
                f"the norm of the gradients grew from {self.norms[0]:.2g} to {max(self.norms):.2g}"
                ", and clipping alone held them back: lower the learning rate"
            )
        elif n_clipped > CLIPPED_OFTEN * n:
            remarks.append(
                f"clipping shortened the gradients in {n_clipped} of {n} steps, to a norm of "
                f"{clip:g} (--clip)"
            )
        return remarks

    def _best_and_last(self):
        best_step, best_loss = self.best()
        last_step, last_loss = self.evaluations[-1]
        line = f"held-out loss {_change(self.before, best_loss)}, after step "
        if best_step == last_step:
            line += f"{best_step}, the last and the best, which is kept"
        else:
            line += f"{best_step}, which is kept; {last_loss:.3f} after step {last_step}, the last"
        if best_loss >= self.before:
            line += ". No evaluation was better than the start: choose a lower learning rate"
        return line


def _change(before, after):
    """Two losses, with as many digits as tell them apart."""
    for digits in range(3, MOST_DIGITS + 1):
        told = f"{before:.{digits}f}"
        told_after = f"{after:.{digits}f}"
        if told != told_after:
            return f"{told} -> {told_after} nats per token"
    return f"{before:.3f} nats per token, unchanged"


def check_progress(fields, steps, *, planned, is_measured, eval_every):
    """Raise ValueError unless `fields`, from JSON, are the Progress of a run after `steps` steps.

    `planned` is how many steps the run has, `is_measured` whether something is held out, on which
    it measures the loss after each `eval_every` steps (None: before and after).
    """
    names = vars(Progress()).keys()
    if not isinstance(fields, dict) or fields.keys() != names:
        raise ValueError(f"progress must have {', '.join(names)}, got {fields!r:.100}")
    if steps > planned:
        raise ValueError(f"steps is {steps}, of {planned} that the run has")
    for name in ("losses", "norms"):
        values = fields[name]
        are_numbers = isinstance(values, list) and all(map(_is_measured, values))
        if not are_numbers or len(values) != steps:
            raise ValueError(f"{name} must be {steps} numbers, one a step, got {values!r:.100}")
    if type(fields["tokens"]) is not int or fields["tokens"] < steps:
        raise ValueError(f"tokens of {steps} steps cannot be {fields['tokens']!r:.100}")
    if not _is_measured(fields["seconds"]) or fields["seconds"] < 0:
        raise ValueError(f"seconds cannot be {fields['seconds']!r:.100}")
    before = fields["before"]
    if before is None:
        may_be = not is_measured or steps == 0
    else:
        may_be = is_measured and _is_measured(before)
    if not may_be:
        raise ValueError(f"before, the held-out loss, cannot be {before!r:.100}")
    due = []
    if eval_every is not None:
        due = [n for n in range(1, steps + 1) if n % eval_every == 0 or n == planned]
    evaluations = fields["evaluations"]
    if not isinstance(evaluations, list) or not all(map(_is_evaluation, evaluations)):
        raise ValueError(f"evaluations must be of [steps, loss] each, got {evaluations!r:.100}")
    if [n for n, _ in evaluations] != due:
        raise ValueError(f"evaluations must be of the steps {due}, got {evaluations!r:.100}")


def _is_measured(value):
    return type(value) in (int, float) and math.isfinite(value)


def _is_evaluation(value):
    if not isinstance(value, list) or len(value) != 2:
        return False
    return type(value[0]) is int and _is_measured(value[1])


def peak_memory():
    """The most bytes this process has held so far, or None where the system does not tell."""
    try:
        import resource
    except ImportError:
        # Windows has no such module.
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Source: getrusage(2). Bytes on macOS, kilobytes elsewhere.
    return peak if sys.platform == "darwin" else 1024 * peak
