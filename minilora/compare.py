"""One input: its gradient against differences, element by element, and what its error says."""

import math
from collections import Counter

import numpy as np

from .differences import EPS, FIRST_STEP, Line, norm
from .mistakes import GradientError, pattern
from .subject import bracketed
from .verdict import (
    FLOAT32,
    HIDDEN,
    KINK,
    NOT_FINITE,
    RIGHT,
    WRONG,
    Settled,
    settle,
)

REMEDIES = {
    KINK: "move the input away from it",
    NOT_FINITE: "choose inputs inside its domain",
    FLOAT32: "keep the dtype of the inputs inside f, and subtract no large numbers there",
    HIDDEN: "pass a larger rtol, or choose inputs at which f is less flat",
}


class Comparison:
    """What was found out about float input number k of a `Subject`.

    `compared`, `worst`: how many numbers agreed, and the largest relative error among them.
    `skipped`: {reason: how many could not be compared}. `failure`: a GradientError, or None.
    """

    def __init__(self, subject, k, dy, dx, rtol):
        self.subject = subject
        self.k = k
        self.path = subject.paths[k]
        self.shape = subject.xs[k].shape
        self.x = subject.xs[k].reshape(-1)
        self.f = subject.along(k)
        self.dy = dy
        self.dx = dx.reshape(-1)
        self.rtol = rtol
        self.compared = 0
        self.worst = 0.0
        self.skipped = Counter()
        self.examples = {}
        self.failure = None
        self._nearby = {}

    def reasons(self):
        """A sentence for each reason why numbers could not be compared."""
        return [
            f"{n} of {self.path}: {reason}, {self.examples[reason]}"
            for reason, n in self.skipped.items()
            if n > 0
        ]

    def index(self, i):
        """The index of flat element i in the shape of the input."""
        return tuple(int(j) for j in np.unravel_index(i, self.shape))

    def where(self, i):
        """How one writes element i: `input 0[1, 2]`."""
        return f"{self.path}{bracketed(self.index(i))}"

    def accept(self, n, analytic, slope, spread=0.0):
        """Count n numbers as compared."""
        self.compared += n
        size = max(abs(analytic), abs(slope), spread)
        if size > 0:
            self.worst = max(self.worst, float(abs(analytic - slope) / size))

    def skip(self, n, i, settled):
        """Count n numbers as not compared; element i is the example."""
        self.skipped[settled.verdict] += n
        if settled.verdict in self.examples:
            return
        example = f"first at {self.where(i)}"
        if math.isfinite(settled.slope):
            error = max(settled.error, settled.kink / 2)
            example += f" (gradient {self.dx[i]:.3g}, differences {settled.slope:.3g}"
            if math.isfinite(error):
                example += f" ± {error:.2g}"
            example += ")"
        self.examples[settled.verdict] = f"{example}: {REMEDIES[settled.verdict]}"

    # One element alone.

    def element(self, i):
        """The line on which element i moves alone."""
        return Line(self.f, self.x, slice(i, i + 1), np.ones(1), self.dy, self.subject.y)

    def settle_element(self, i, step=FIRST_STEP):
        """The verdict on element i; `step` is in units of its size, if that is more than 1."""
        if not math.isfinite(self.x[i]):
            return Settled(NOT_FINITE, math.nan, math.inf, step, 0.0)
        size = self.unit(i)
        settled = self.settle_line(self.element(i), slice(i, i + 1), np.ones(1), 0.0, step * size)
        return settled._replace(h=settled.h / size)

    def unit(self, i):
        """The power of two next to the size of element i, and at least 1."""
        return 2.0 ** min(1000, max(0, math.frexp(float(self.x[i]))[1]))

    def settle_line(self, line, where, v, spread, step):
        """`settle`, and second thoughts before a gradient is called wrong, or hidden.

        It may be small enough to be rounding's alone. And what it says of outputs that have not
        moved may be too little to move them.
        """
        analytic = float(np.dot(self.dx[where], v))
        settled = settle(line, analytic, self.rtol, step, spread)
        if settled.verdict not in (WRONG, HIDDEN, FLOAT32):
            return settled
        distance = abs(analytic - settled.slope)
        close = distance <= 1e-3 * max(abs(analytic), abs(settled.slope))
        if settled.verdict == WRONG and (close or abs(settled.slope) <= settled.error):
            own = [abs(np.dot(dx[where] - self.dx[where], v)) for dx in self.nearby(2.0**-50)]
            error = settled.error + 4 * float(max(own))
            if distance <= error:
                settled = settled._replace(verdict=HIDDEN, error=error)
        if settled.verdict == WRONG and self.says_more(line, where, v, settled, analytic):
            settled = settled._replace(verdict=HIDDEN)
        far_off = distance > 0.02 * max(abs(analytic), abs(settled.slope))
        unsure = settled.verdict == WRONG and settled.chaos and far_off
        if unsure and self.adds_up(line, where, v):
            settled = settled._replace(verdict=FLOAT32)
        if not abs(settled.slope) <= settled.error + settled.kink / 2:
            return settled
        # What changes f by more than a millionth of it is no residue.
        claimed = max(abs(analytic), spread) * min(line.natural, 1e300)
        limit = 2.0**-20 * line.magnitude_far
        if limit > 0 and claimed > limit:
            return settled
        # Where the inputs move by a millionth, a gradient that means something hardly changes. What
        # remains of terms that cancel becomes another number: a zero that rounding has blurred.
        changes = [np.abs(np.dot(dx[where] - self.dx[where], v)) for dx in self.nearby(2.0**-20)]
        if max(changes) > abs(analytic) / 8:
            return settled._replace(verdict=RIGHT, slope=analytic, h=step)
        return settled

    def says_more(self, line, where, v, settled, analytic):
        """Is what differs only what the gradient says of outputs too large to show it?"""
        if line.moved is None or line.moved.all() or not line.moved.any():
            return False
        dx = self.subject.gradients(self.dy * line.moved)[self.k].reshape(-1)
        seen = float(np.dot(dx[where], v))
        size = max(abs(seen), abs(settled.slope))
        if abs(seen - settled.slope) > self.rtol * size + 4 * settled.error:
            return False
        unmoved = norm(np.where(line.moved, 0.0, self.dy * self.subject.y))
        return abs(analytic - seen) * line.natural <= 8 * EPS * unmoved

    def adds_up(self, line, where, v):
        """Is the sum of the gradient along the line what f changes by, over steps of some size?

        Then it is right, and f is rounded too much to show it at the finest steps.
        """
        nodes, weights = np.polynomial.legendre.leggauss(8)
        fits = 0
        for h in (line.natural / 2, line.natural / 4, line.natural / 8, line.natural / 16):
            pair = line.pair(h) if math.isfinite(h) else None
            if pair is None:
                continue
            with np.errstate(all="ignore"):
                change = float(np.dot(self.dy, pair[0] - pair[1]))
            total = 0.0
            for node, weight in zip(nodes, weights, strict=True):
                xs = list(self.subject.xs)
                xs[self.k] = line.point(node * h)[0].reshape(self.shape)
                try:
                    with np.errstate(all="ignore"):
                        dx = self.subject.gradients(self.dy, xs)[self.k].reshape(-1)
                except Exception:
                    # The gradient has left its domain there, so its sum is not known.
                    return False
                total += weight * h * float(np.dot(dx[where], v))
            if change != 0 and abs(change - total) <= 0.01 * abs(change):
                fits += 1
        return fits >= 2

    def nearby(self, distance):
        """What vjp says where every input has moved by about `distance` of itself."""
        if distance in self._nearby:
            return self._nearby[distance]
        rng = np.random.default_rng(0)
        # The first with inputs as they are: a vjp that draws random numbers shows here.
        found = [self.subject.gradients(self.dy)[self.k].reshape(-1)]
        if not np.array_equal(found[0], self.dx):
            raise ValueError(
                "vjp is not deterministic: two calls on the same inputs, and the gradients of "
                f"{self.path} differ by {np.abs(found[0] - self.dx).max():.3g}; fix its randomness"
            )
        # Residues of rounding are small whole numbers of one unit, and often the same by chance.
        times = 16 if self.x.size <= 2**16 else 4
        for _ in range(times):
            moved = []
            for x in self.subject.xs:
                typical = np.abs(x).mean() if x.any() else 1.0
                size = np.where(x == 0, typical, x)
                moved.append(x + distance * size * rng.uniform(-1, 1, x.shape))
            try:
                with np.errstate(all="ignore"):
                    dx = self.subject.gradients(self.dy, moved)[self.k]
            except Exception:
                # It may have left the domain of f, which its author need not have guarded.
                continue
            found.append(dx.reshape(-1))
        self._nearby[distance] = found
        return found

    # A small input: each element.

    def compare(self):
        """Compare element after element; at the first that is wrong, say what is wrong with all."""
        step = FIRST_STEP
        for i in range(self.x.size):
            settled = self.settle_element(i, step)
            if settled.verdict == WRONG:
                self.failure = self.blame(i, settled)
                return
            if settled.verdict == RIGHT:
                # What fitted here is likely to fit its neighbour.
                step = settled.h
                self.accept(1, self.dx[i], settled.slope)
            else:
                self.skip(1, i, settled)

    def blame(self, i, settled):
        """The GradientError for element i of a small input, with what is wrong with the others."""
        everyone = np.arange(self.x.size)
        numerical, errors = self.look_at(everyone, settled.h)
        return self.failure_at(i, settled, everyone, numerical, errors)

    def look_at(self, elements, step):
        """(slopes, their errors) of some elements, from two steps; nan where not finite."""
        numerical = np.full(elements.size, np.nan)
        errors = np.full(elements.size, np.inf)
        for n, i in enumerate(elements):
            for h in (step, FIRST_STEP):
                e = self.element(i).estimate(h * self.unit(i))
                if e is None:
                    continue
                error = e.error + max(0.0, e.kink - e.kink_noise) / 2
                if error < errors[n]:
                    numerical[n] = e.slope
                    errors[n] = error
        return numerical, errors

    def failure_at(self, i, settled, elements, numerical, errors):
        """The GradientError for element i, which is one of the `elements` that were looked at."""
        analytic = self.dx[elements]
        numerical[elements == i] = settled.slope
        errors[elements == i] = settled.error
        size = np.maximum(np.abs(analytic), np.abs(numerical))
        is_wrong = np.abs(analytic - numerical) > self.rtol * size + errors
        is_wrong[elements == i] = True
        wrong = int(np.count_nonzero(is_wrong))
        everyone = elements.size == self.x.size
        found = None
        if np.isfinite(numerical).all() and (wrong > 1 or self.x.size == 1):
            if everyone:
                analytic = analytic.reshape(self.shape)
                numerical = numerical.reshape(self.shape)
            found = pattern(analytic, numerical, float(errors.max()))
        slope = settled.slope
        allowed = self.rtol * max(abs(self.dx[i]), abs(slope)) + settled.error
        message = f"gradient {self.dx[i]:.9g}, differences {slope:.9g}, allowed {allowed:.2g}"
        message += f", at {self.where(i)}\n{wrong} of "
        message += f"{elements.size} numbers" if everyone else f"the {elements.size} looked at"
        message += " is wrong" if wrong == 1 else " are wrong"
        if found:
            message += f": {found}"
        return GradientError(
            message,
            input=self.path,
            index=self.index(i),
            analytic=float(self.dx[i]),
            numerical=slope,
            allowed=float(allowed),
            wrong=wrong,
            of=elements.size,
            pattern=found,
        )
