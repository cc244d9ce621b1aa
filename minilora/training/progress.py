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
    that of each step. tokens, seconds: how many the steps took.
    """

    before: float | None = None
    losses: list = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    def as_json(self):
        """A copy, as a dict for JSON; `Progress(**copy)` goes on from it."""
        return {**vars(self), "losses": self.losses.copy()}

    def count_tokens(self, batches):
        """`batches`, (inputs, targets), as they are, with their tokens counted."""
        for ids, targets in batches:
            self.tokens += ids.size
            yield ids, targets

    def report(self, after):
        """What the steps took, and what was learned, as lines.

        `after` is the held-out loss after the last step, or None if nothing is held out.
        """
        n = min(REPORTED_STEPS, len(self.losses))
        speed = self.tokens / max(self.seconds, 1e-9)
        first = np.mean(self.losses[:n])
        last = np.mean(self.losses[-n:])
        lines = [
            f"{len(self.losses)} steps in {self.seconds:,.0f} s, {speed:,.0f} tokens/s; training "
            f"loss {first:.3f} -> {last:.3f} nats per token (means of {n} steps)"
        ]
        if after is not None:
            lines.append(f"held-out loss {self.before:.3f} -> {after:.3f} nats per token")
        return lines


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
