"""A large input: many elements move at once, along directions; what disagrees is traced to one.

The directions are random, but seeded, and made so that each element shows as much as any other.
"""

import math

import numpy as np

from .compare import Comparison
from .differences import FIRST_STEP, Line, norm
from .mistakes import GradientError
from .verdict import HIDDEN, KINK, NOT_FINITE, RIGHT, TRUST, WRONG, Settled, settle_quickly

# How many times elements with terms below 2⁻¹³ of the largest move among themselves.
LEVELS = 8
# How many elements that disturb a direction are looked at alone, at most.
DISTURBERS = 8


def components(rng, n):
    """n numbers of 0.5 to 1, of either sign: none is small, and their sums seldom cancel."""
    u = rng.random(n)
    u -= 0.5
    u += np.copysign(0.5, u)
    return u


def scale(x, relative=False):
    """The size of each element, by which a direction moves it: max(1, |x|), or |x| if `relative`.

    Where x is 0, it has no size of its own; it gets the mean of |x| then.
    """
    size = np.abs(x)
    if not relative:
        return np.maximum(1.0, size, out=size)
    size[size == 0] = size.mean() or 1.0
    return size


def direction(x, seed, relative=False):
    """The direction in which a large input `x` is moved: what `GradientError.seed` stands for.

    Shapes: like x. Components are 0.5 to 1 times the `scale` of x, of either sign.
    """
    v = components(np.random.default_rng(seed), x.size).reshape(x.shape)
    v *= scale(x, relative)
    return v


def equalized(v, size):
    """(v shortened so that terms of `size` come to one size, those too small for that).

    Each term of Σ dx v then shows as much as any other. Too small is what lies below 2⁻¹³ of the
    largest: the others would have to move by too little. Zeros stand with the smallest terms,
    having no size.
    """
    top = float(size.max())
    if top == 0:
        return v, np.zeros(0, np.int64)
    floor = max(2.0**-13 * top, float(size.min(initial=top, where=size > 0)))
    small = np.flatnonzero(size < floor)
    if not size[small].any():
        small = small[:0]
    weight = np.maximum(size, floor)
    np.divide(floor, weight, out=weight)
    weight *= v
    return weight, small


class Directions(Comparison):
    """The comparison of a large input. What it counts is what `Comparison` counts."""

    def __init__(self, subject, k, dy, dx, rtol, rng):
        super().__init__(subject, k, dy, dx, rtol)
        self.rng = rng
        self.step = FIRST_STEP
        # Whether elements move by parts of themselves, also those below 1.
        self.relative = False
        # h times the bound on the rounding of D(h), and ‖g x‖, where all elements move.
        self.noise = None
        self.sensitivity = None
        # Elements that were looked at alone, and stay where they are from then on.
        self.alone = ~np.isfinite(self.x)
        self.is_compared = np.zeros(self.x.size, bool)
        # Why an element could not be compared: the number of the reason, from 1 on.
        self.reason_of = np.zeros(self.x.size, np.int8)

    def compare(self, n):
        """Compare along n seeded directions, along the gradient's signs, at the ends of axes."""
        beyond = np.flatnonzero(self.alone)
        if beyond.size:
            self.pass_over(
                beyond, int(beyond[0]), Settled(NOT_FINITE, math.nan, math.inf, 0.0, 0.0)
            )
        everything = slice(0, self.x.size)
        seed, v, size = self.draw()
        self.compare_blocks(everything, seed, v, size)
        for _ in range(n - 1):
            seed, v, size = self.draw()
            self.compare_along(everything, equalized(v, size)[0], seed)
        at_ends = ends(self.shape)
        if at_ends.size:
            self.compare_along(at_ends, v[at_ends], seed)
        # Here no two terms have opposite signs, so an error of all elements alike shows most.
        self.compare_along(everything, np.copysign(v, self.dx, out=v), seed)
        self.compared = int(np.count_nonzero(self.is_compared))
        for number, reason in enumerate(self.examples, start=1):
            left = np.count_nonzero((self.reason_of == number) & ~self.is_compared)
            self.skipped[reason] = int(left)

    def draw(self):
        """(a seed, the direction it stands for, the size of each term of Σ dx v)."""
        seed = int(self.rng.integers(2**32))
        v = direction(self.x, seed, self.relative)
        size = np.abs(self.dx)
        size *= scale(self.x, self.relative)
        return seed, v, size

    def compare_blocks(self, where, seed, v, size):
        """Compare the elements of `where`, those with terms of one size at a time; count them."""
        for level in range(LEVELS):
            equal, small = equalized(v[where], size[where])
            # Elements below 1 have moved by more than themselves. They may not have borne that.
            borne = self.relative or not (np.abs(self.x[where]) < 0.125).any()
            # The first looks for kinks too. All elements move, so it sees those of each.
            settled = self.compare_along(where, equal, seed, quickly=level > 0, closely=borne)
            if settled is None:
                return
            if settled.verdict != RIGHT and not borne:
                if self.is_borne_by_parts(where):
                    self.compare_blocks(where, *self.draw())
                    return
                # To take every step for the few smallest terms of very many would take long.
                if level == 0 or self.x.size <= 2**17:
                    settled = self.compare_along(where, equal, seed)
                if settled is None:
                    return
            self.count(where, small, settled)
            if small.size == 0:
                return
            where = np.arange(self.x.size)[where][small]
        # More than thirty digits below the largest: nobody has looked at these.
        unseen = Settled(HIDDEN, math.nan, math.inf, self.step, 0.0)
        self.count(where, np.zeros(0, np.int64), unseen)

    def is_borne_by_parts(self, where):
        """Does it agree if each element moves by parts of itself? Then go on like that."""
        self.relative = True
        seed, v, size = self.draw()
        settled = self.compare_along(
            where, equalized(v[where], size[where])[0], seed, closely=False
        )
        self.relative = settled is not None and settled.verdict == RIGHT
        return self.relative

    def count(self, where, small, settled):
        """Count the elements that moved, but for the small ones and those looked at alone."""
        others = ~self.alone[where]
        others[small] = False
        members = np.arange(self.x.size)[where][others]
        if settled.verdict == RIGHT:
            self.is_compared[members] = True
        elif members.size:
            self.pass_over(members, int(members[0]), settled)

    def pass_over(self, members, i, settled):
        """Note that `members` could not be compared, for the reason of element i."""
        self.skip(0, i, settled)
        self.is_compared[members] = False
        self.reason_of[members] = list(self.examples).index(settled.verdict) + 1

    def compare_along(self, where, v, seed, quickly=True, closely=True):
        """The verdict along one direction, or None once a number was found wrong.

        If `quickly`, two calls of f may be enough. If `closely`, what disturbs it is looked at
        alone and then left out, and every step is tried.
        """
        if self.failure is not None:
            return None
        for _ in range(DISTURBERS):
            if self.alone.any():
                v = np.where(self.alone[where], 0.0, v)
            if not v.any():
                # Each of its elements was looked at alone.
                return Settled(RIGHT, 0.0, 0.0, self.step, 0.0)
            line, analytic, spread = self.line(where, v)
            if quickly and self.agrees_at_once(line, analytic, spread):
                return Settled(RIGHT, analytic, 0.0, self.step, 0.0)
            settled = settle_quickly(line, analytic, self.rtol, self.step, spread)
            if line.moved is None and math.isfinite(line.noise or math.inf):
                self.noise = line.noise
            if settled.verdict == RIGHT:
                if line.moved is None:
                    # What fitted this direction is likely to fit the others.
                    self.step = settled.h
                self.accept(0, analytic, settled.slope, spread)
                return settled
            if settled.verdict != WRONG and not closely:
                return settled
            if not self.look_closer(where, v, settled):
                break
            if self.failure is not None:
                return None
        settled = self.settle_line(line, where, v, spread, self.step)
        if settled.verdict == WRONG:
            self.failure = self.failure_along(where, v, seed, settled)
            return None
        return settled

    def line(self, where, v):
        """(the Line, the slope that the gradient says, the norm of its terms)."""
        with np.errstate(over="ignore"):
            terms = self.dx[where] * v
        line = Line(self.f, self.x, where, v, self.dy, self.subject.y)
        if self.relative:
            # What of the input is a good part is unknown: it moves by parts of itself.
            line.natural = math.inf
        if v.size < self.x.size:
            line.sensitivity = norm(self.dx[where] * self.x[where])
        else:
            if self.sensitivity is None:
                self.sensitivity = norm(self.dx * self.x)
            line.sensitivity = self.sensitivity
            # Each output counts as one that moves, and the bound on rounding is the same for all
            # such lines.
            line.moved = None
            line.known_noise = self.noise
        return line, float(terms.sum()), norm(terms)

    def agrees_at_once(self, line, analytic, spread):
        """Do two calls of f show that `analytic` is right?"""
        level = line.level(self.step, with_gap=False)
        if level is None:
            return False
        slope = level.slope
        size = max(abs(analytic), abs(slope), spread)
        if size == 0 or level.noise > TRUST * self.rtol * size:
            return False
        if abs(analytic - slope) > self.rtol * size:
            return False
        self.accept(0, analytic, slope, spread)
        return True

    def look_closer(self, where, v, settled):
        """Find the element that disturbs this direction most. True if the direction can go on."""
        measure = self.bend if settled.verdict == KINK else self.residual
        i = self.narrow(where, v, lambda *half: measure(*half, settled.h))
        if self.alone[i]:
            return False
        alone = self.settle_element(i)
        if alone.verdict == WRONG:
            others = np.random.default_rng(i).integers(0, self.x.size, 4)
            last = self.x.size - 1
            looked_at = np.unique([max(0, i - 1), i, min(last, i + 1), *others])
            self.failure = self.failure_at(i, alone, looked_at, *self.look_at(looked_at, alone.h))
            return True
        if alone.verdict == RIGHT and settled.verdict in (WRONG, HIDDEN):
            # Then the disagreement lies elsewhere.
            return False
        if alone.verdict == RIGHT:
            self.accept(0, self.dx[i], alone.slope)
            self.alone[i] = True
            self.is_compared[i] = True
            return True
        # A kink is seldom alone: what is 0 here is 0 elsewhere too, and bends there as well.
        alike = np.flatnonzero((self.x == self.x[i]) & ~self.alone)
        self.pass_over(alike, i, alone)
        self.alone[alike] = True
        return True

    def residual(self, where, v, h):
        """By how much gradient and differences disagree along these elements."""
        if not v.any():
            return 0.0
        line, analytic, _ = self.line(where, v)
        # Its rounding is not asked for: which outputs move makes no difference then.
        line.moved = None
        line.known_noise = 0.0
        level = line.level(h, with_gap=False)
        return math.inf if level is None else analytic - level.slope

    def bend(self, where, v, h):
        """How far the one-sided slopes along these elements are apart."""
        if not v.any():
            return 0.0
        estimate = self.line(where, v)[0].estimate(h)
        return math.inf if estimate is None else estimate.kink

    def narrow(self, where, v, measure):
        """The element that has most of `measure`, a sum over elements, by halving."""
        low = 0
        high = v.size
        total = measure(where, v)
        while high - low > 1:
            middle = (low + high) // 2
            left = measure(_part(where, low, middle), v[low:middle])
            in_left = abs(left) >= abs(total - left)
            if math.isinf(total):
                # No sum tells anything where f is not finite: follow the half in which it is not.
                in_left = math.isinf(left)
            if in_left:
                high = middle
                total = left
            else:
                low = middle
                total = total if math.isinf(total) else total - left
        return int(np.arange(self.x.size)[_part(where, low, high)][0])

    def failure_along(self, where, v, seed, settled):
        """The GradientError for a direction of which no single element could be found wrong."""
        _, analytic, spread = self.line(where, v)
        allowed = self.rtol * max(abs(analytic), abs(settled.slope), spread) + settled.error
        message = f"gradient {analytic:.9g}, differences {settled.slope:.9g}, allowed {allowed:.2g}"
        how = ", relative=True" if self.relative else ""
        message += f", along direction(x, {seed}{how}) of {self.path}\n"
        message += f"{np.size(v)} of its {self.x.size} numbers moved; no single one was found wrong"
        return GradientError(
            message,
            input=self.path,
            analytic=analytic,
            numerical=settled.slope,
            allowed=float(allowed),
            seed=seed,
        )


def _part(where, low, high):
    """Elements low to high of those that `where`, a slice or an array of indices, selects."""
    if isinstance(where, slice):
        return slice(where.start + low, where.start + high)
    return where[low:high]


def ends(shape):
    """The first and the last elements along each axis, as flat indices."""
    found = [np.zeros(0, np.int64)]
    for axis, n in enumerate(shape):
        for end in (0, n - 1):
            flat = np.zeros(1, np.int64)
            for i, m in enumerate(shape):
                steps = np.array([end]) if i == axis else np.arange(m)
                flat = np.add.outer(flat, math.prod(shape[i + 1 :]) * steps).reshape(-1)
            found.append(flat)
    return np.unique(np.concatenate(found))
