"""One input: its gradient against differences, element by element or along directions.

An input of few elements is moved in one element after the other. In a large one many move at once.
What disagrees there is traced to an element, and settled on that element alone.
"""

import math
from collections import Counter

import numpy as np

from .differences import (
    EPS,
    FIRST_STEP,
    FLOAT32,
    HIDDEN,
    KINK,
    NOT_FINITE,
    RIGHT,
    TRUST,
    WRONG,
    Line,
    Settled,
    norm,
    settle,
    settle_quickly,
)
from .mistakes import GradientError, pattern
from .subject import bracketed

REMEDIES = {
    KINK: "move the input away from it",
    NOT_FINITE: "choose inputs inside its domain",
    FLOAT32: "keep the dtype of the inputs inside f, and subtract no large numbers there",
    HIDDEN: "pass a larger rtol, or choose inputs at which f is less flat",
}
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


class Comparison:
    """What was found out about float input number k of a `Subject`.

    `compared`, `worst`: how many numbers agreed, and the largest relative error among them.
    `skipped`: {reason: how many could not be compared}. `failure`: a GradientError, or None.
    """

    def __init__(self, subject, k, dy, dx, rtol, rng):
        self.subject = subject
        self.k = k
        self.path = subject.paths[k]
        self.shape = subject.xs[k].shape
        self.x = subject.xs[k].reshape(-1)
        self.f = subject.along(k)
        self.dy = dy
        self.dx = dx.reshape(-1)
        self.rtol = rtol
        self.rng = rng
        self.compared = 0
        self.worst = 0.0
        self.skipped = Counter()
        self.examples = {}
        self.failure = None
        self.step = FIRST_STEP
        # h times the bound on the rounding of D(h), and ‖g x‖, where all elements move.
        self.noise = None
        self.sensitivity = None
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
        if settled.verdict == WRONG and distance <= 1e-3 * max(abs(analytic), abs(settled.slope)):
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
        reach = min(line.natural, 1e300)
        if max(abs(analytic), spread) * reach > 2.0**-20 * line.magnitude_far > 0:
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
                    return False
                total += weight * h * float(np.dot(dx[where], v))
            fits += abs(change - total) <= 0.01 * abs(change) > 0
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

    def compare_elements(self):
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
                error = e.truncation + e.noise + max(0.0, e.kink - e.kink_noise) / 2
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

    # A large input: many elements at once.

    def compare_directions(self, n):
        """Compare along n seeded directions, along the gradient's signs, at the ends of axes."""
        # Elements that were looked at alone, and stay where they are from then on.
        self.alone = ~np.isfinite(self.x)
        self.is_compared = np.zeros(self.x.size, bool)
        # Why an element could not be compared: the number of the reason, from 1 on.
        self.reason_of = np.zeros(self.x.size, np.int8)
        beyond = np.flatnonzero(self.alone)
        if beyond.size:
            self.pass_over(
                beyond, int(beyond[0]), Settled(NOT_FINITE, math.nan, math.inf, 0.0, 0.0)
            )
        self.relative = False
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
