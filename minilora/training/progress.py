"""How far a fine-tuning has come, and the lines that report it. Knows no model."""

import sys
from dataclasses import dataclass, field

import numpy as np

# The report gives the mean loss of so many steps, at the start and at the end.
REPORTED_STEPS = 10


@dataclass
class Progress:
    """How far a run has come.

    before: the held-out loss before the first step, in nats per token (None: not measured). losses:
    that of each step. tokens, seconds: how many the steps took. evaluations: [steps done, held-out
    loss] of each measurement on the way.
    """

    before: float | None = None
    losses: list = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    evaluations: list = field(default_factory=list)

    def as_json(self):
        """A copy, as a dict for JSON; `Progress(**copy)` goes on from it."""
        return {
            **vars(self),
            "losses": self.losses.copy(),
            "evaluations": self.evaluations.copy(),
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
        n = min(REPORTED_STEPS, len(self.losses))
        speed = self.tokens / max(self.seconds, 1e-9)
        first = np.mean(self.losses[:n])
        last = np.mean(self.losses[-n:])
        lines = [
            f"{len(self.losses)} steps in {self.seconds:,.0f} s, {speed:,.0f} tokens/s; training "
            f"loss {first:.3f} -> {last:.3f} nats per token (means of {n} steps)"
        ]
        if len(self.losses) < steps:
            lines.append(
                f"stopped after step {len(self.losses)} of {steps}: "
                f"{self.evaluations_since_best()} evaluations in a row were no better"
            )
        if self.evaluations:
            lines.append(self._best_and_last())
        elif after is not None:
            lines.append(f"held-out loss {self.before:.3f} -> {after:.3f} nats per token")
        return lines

    def _best_and_last(self):
        best_step, best_loss = self.best()
        last_step, last_loss = self.evaluations[-1]
        line = f"held-out loss {self.before:.3f} -> {best_loss:.3f} nats per token, after step "
        if best_step == last_step:
            line += f"{best_step}, the last and the best, which is kept"
        else:
            line += f"{best_step}, which is kept; {last_loss:.3f} after step {last_step}, the last"
        if best_loss >= self.before:
            line += ". No evaluation was better than the start: choose a lower learning rate"
        return line


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
