"""The slope of a function along a line, from differences, and how far to trust it.

The line is x + t v, and the slope is that of φ(t) = Σ dy · f(x + t v) at t = 0. From a step h come

    D(h) = (φ(h) - φ(-h)) / 2h                      the central difference, wrong by O(h²)
    S(h) = (4 D(h/2) - D(h)) / 3                    wrong by O(h⁴)
    R(h) = (16 S(h/2) - S(h)) / 15                  wrong by O(h⁶)
    G(h) = Σ |dy| |f(h) - 2 f(0) + f(-h)| / h       how far the slopes on both sides are apart

(Richardson's extrapolation, 1911), and bounds on what they are wrong by:

* Truncation: what the last extrapolation has changed, half of |S - D| or |R - S|. What remains is
  of a higher order.
* Rounding: one value of f is taken to be right to 4 eps, four times what a correctly rounded one
  is. Then D(h) is right to (4 eps ‖dy f(0)‖ + 4 eps ‖dy f(h)‖) / 2h. The norms, and not the sums of
  |dy f|, because outputs are rounded independently: errors of n outputs add up to the root of n
  times one. Outputs that stay where they are, to the bit, are not rounded anew and are left out,
  unless all stay. Where terms cancel inside f this bound is too small. So the scatter of the finest
  steps is looked at, and if it is more, it is what counts.
* Position: eps ‖g x‖ / h, since f cannot know its own input better than to its last digit.

Each bound grows with f, so f times any factor gets the same answers.
"""

import math
from collections import namedtuple

import numpy as np

EPS = float(np.finfo(np.float64).eps)
TINY = float(np.finfo(np.float64).tiny)
# A power of two: x + h is then exact for most x, and so is the distance that was moved.
FIRST_STEP = 2.0**-15
# How many steps must agree with each other and contradict a gradient before it is called wrong, and
# at how many a kink must show before f is said to have one.
SEVERAL = 4
# A difference can tell whether a gradient is right to rtol if its own error is at most this times
# rtol. An error of 1e-5 is then seen at rtol = 1e-6, and more steps than one will do.
TRUST = 4

# If at the finest steps f still changes by more than this part of itself, steps see nothing of it.
UNRESOLVED = 2.0**-8

# D and G at one step, and bounds on the rounding of both.
Level = namedtuple("Level", "h slope noise gap gap_noise")
# An extrapolated slope, the bounds on its truncation and its noise (rounding and position), and the
# part of G that does not shrink with h.
Estimate = namedtuple("Estimate", "h slope truncation noise kink kink_noise")
# verdict: RIGHT, WRONG, or why nothing can be said; `error` bounds what `slope` is wrong by.
Settled = namedtuple("Settled", "verdict slope error h kink")

RIGHT = "right"
WRONG = "wrong"
KINK = "f has a kink there"
NOT_FINITE = "f is not finite beside it"
FLOAT32 = "f computes in less than float64 inside"
HIDDEN = "rounding hides the slope"


def norm(a):
    """The root of the sum of squares, also where the squares leave the range of float64."""
    squares = float(np.dot(a, a))
    if 1e-280 < squares < 1e280:
        return math.sqrt(squares)
    largest = float(np.abs(a).max(initial=0.0))
    if largest == 0 or not math.isfinite(largest):
        return largest
    return largest * math.sqrt(float(np.sum((a / largest) ** 2)))


class Line:
    """The function `f` of one flat array, on the line x[where] + t v.

    Shapes: `f(x)` returns a flat array like `y = f(x)` and the cotangent `dy`, or None where it
    is not finite. `where`, a slice or an array of indices, selects the elements of x that move;
    `v` has one component for each.
    """

    def __init__(self, f, x, where, v, dy, y):
        self.f = f
        self.x = x
        self.where = where
        self.v = v
        self.dy = dy
        self.y = y
        # ‖g x‖ over the elements that move. Of a single one it is found from its slope.
        self.sensitivity = 0.0
        # Which outputs have moved at any step so far; None stands for all.
        self.moved = np.zeros(y.shape, bool)
        # h times the bound on the rounding of D(h); where all move it is computed once.
        self.noise = None
        # What a step is measured by: the element that moves, or 1, since the components of a
        # direction have the size of the input already.
        self.size = 1.0
        if v.size == 1:
            self.size = abs(float(x[where][0])) or 1.0

    def point(self, t):
        """(x moved by t v, by how much its first moved element has really moved)."""
        old = self.x[self.where]
        new = t * self.v
        new += old
        if new.size == self.x.size:
            moved = new
        else:
            moved = self.x.copy()
            moved[self.where] = new
        return moved, float(new[0] - old[0])

    def pair(self, h):
        """(f(h), f(-h), the step as it was really made), or None where f is not finite."""
        above, forth = self.point(h)
        below, back = self.point(-h)
        up = self.f(above)
        if up is None:
            return None
        down = self.f(below)
        if down is None:
            return None
        if self.v.size == 1:
            # For one element that is known exactly.
            h = (forth - back) / (2 * float(self.v[0]))
        return (up, down, h) if h > 0 else None

    def level(self, h, with_gap=True):
        """The `Level` of the step h from two calls of f, or None where f is not finite."""
        pair = self.pair(h)
        if pair is None:
            return None
        up, down, h = pair
        # Sums of what is not finite are not finite either.
        with np.errstate(all="ignore"):
            level = self._level(up, down, h, with_gap)
        return level if all(math.isfinite(number) for number in level) else None

    def _level(self, up, down, h, with_gap):
        dy = self.dy
        y = self.y
        if self.moved is not None:
            self.moved |= up != y
            if with_gap:
                self.moved |= down != y
            kept = np.flatnonzero(self.moved)
            # If all stay, each may have been about to move.
            if kept.size:
                dy = dy[kept]
                y = y[kept]
                up = up[kept]
                down = down[kept]
        # One array for all that is computed on the way: for large outputs memory takes the time.
        work = up - down
        slope = float(np.dot(dy, work)) / (2 * h)
        gap = 0.0
        if with_gap:
            np.subtract(up, y, out=work)
            work += down
            work -= y
            work *= dy
            np.abs(work, out=work)
            gap = float(work.sum()) / h
        if self.moved is not None or self.noise is None:
            size = norm(np.multiply(dy, up, out=work)) + norm(np.multiply(dy, y, out=work))
            # Below the smallest normal number digits are lost.
            self.noise = 2 * EPS * (size + TINY * math.sqrt(max(1, y.size)))
        sensitivity = self.sensitivity
        if self.v.size == 1:
            sensitivity = abs(float(self.x[self.where][0]) * slope)
        noise = (self.noise + EPS * sensitivity) / h
        # The roundings of G are added without their signs: n of them, and not the root of n.
        return Level(h, slope, noise, gap, 4 * math.sqrt(max(1, y.size)) * noise)

    def estimate(self, h):
        """S(h), an `Estimate` from four calls of f, or None where f is not finite."""
        wide = self.level(h)
        narrow = self.level(h / 2)
        if wide is None or narrow is None:
            return None
        return _extrapolated(wide, narrow)

    def estimates(self, coarsest=math.inf):
        """R(h) at the steps h that suit a function of unknown scale, from fine to coarse."""
        steps = self.steps()
        # Some of the coarser ones all the same: they show which outputs move at all.
        for h in [h for h in steps if h > coarsest][::6]:
            self.level(h)
        levels = [self.level(h) for h in steps if h <= coarsest]
        found = []
        for three in zip(levels, levels[1:], levels[2:], strict=False):
            if None in three:
                continue
            wide = _extrapolated(three[0], three[1])
            narrow = _extrapolated(three[1], three[2])
            slope = (16 * narrow.slope - wide.slope) / 15
            noise = (16 * narrow.noise + wide.noise) / 15
            found.append(
                narrow._replace(
                    h=wide.h,
                    slope=slope,
                    truncation=abs(slope - narrow.slope) / 2,
                    noise=noise,
                )
            )
        return found[::-1]

    def steps(self):
        """From coarse to fine: what moves at a coarse step is rounded anew at a fine one too."""
        if self.v.size > 1:
            # The components of a direction have the scale of the input already.
            return [2.0**k for k in range(3, -34, -1)]
        x = float(self.x[self.where][0])
        if x == 0:
            return [2.0**k for k in range(6, -61, -1)]
        exponent = math.frexp(x)[1]
        return [2.0**k for k in range(max(6, exponent - 6), exponent - 34, -1)]


def _extrapolated(wide, narrow):
    slope = (4 * narrow.slope - wide.slope) / 3
    noise = (4 * narrow.noise + wide.noise) / 3
    # Of a smooth function G(h) is proportional to h; what is left is of its fourth derivative.
    kink = 2 * narrow.gap - wide.gap
    if kink < 0.01 * wide.gap:
        kink = 0.0
    kink_noise = 2 * narrow.gap_noise + wide.gap_noise
    return Estimate(wide.h, slope, abs(slope - narrow.slope) / 2, noise, kink, kink_noise)


def agrees(analytic, estimate, rtol, spread, error=None):
    """Does this estimate show that `analytic` is right to rtol? Not if it could not tell."""
    size = max(abs(analytic), abs(estimate.slope), spread)
    far = TRUST * rtol * size
    if error is None:
        error = estimate.truncation + estimate.noise
    if size == 0 or abs(analytic - estimate.slope) > rtol * size or error > far:
        return False
    return estimate.kink - estimate.kink_noise <= far


def settle(line, analytic, rtol, first=FIRST_STEP, spread=0.0):
    """Is `analytic` the slope of `line`? A `Settled`: RIGHT, WRONG, or the reason why nobody knows.

    It is content if a few steps say so (`settle_quickly`), and else takes all that could suit.
    `spread` is a size below which a slope counts as small: that of a sum of many terms.
    """
    settled = settle_quickly(line, analytic, rtol, first, spread)
    if settled.verdict == RIGHT:
        return settled
    # Two steps that agree and contradict `analytic` need no coarser ones; finer ones may differ.
    found = line.estimates(8 * settled.h if settled.verdict == WRONG else math.inf)
    if not found:
        return Settled(NOT_FINITE, math.nan, math.inf, first, 0.0)
    # The size of f's value, which its rounding was reckoned from.
    value = line.noise / (4 * EPS)
    settled = _judge(found, analytic, rtol, spread, value)
    if settled.verdict == WRONG and abs(analytic - settled.slope) > 0.01 * abs(analytic):
        if _seen_from_afar(found, analytic, line.size):
            return settled._replace(verdict=FLOAT32)
    return settled


def _seen_from_afar(found, analytic, size):
    """Do only the finest steps contradict `analytic`?

    In float32 f stands still, or stumbles, until x moves by a good part of 1e-7 of itself.
    """
    far = [e for e in found if 2.0**-8 <= e.h / size <= 2.0**-3]
    fit = [abs(analytic - e.slope) < 0.01 * abs(analytic) for e in far]
    return sum(fit) >= SEVERAL


def settle_quickly(line, analytic, rtol, first=FIRST_STEP, spread=0.0):
    """RIGHT if a few steps show it, and else why to look closer: WRONG, KINK, NOT_FINITE, HIDDEN.

    It looks at `first` and, by what limits it there, at coarser or finer steps. WRONG stands here
    for a suspicion: two steps say so.
    """
    h = first
    factor = 64.0
    before = None
    tried = []
    for _ in range(4):
        e = line.estimate(h)
        limited_by_noise = False
        if e is not None:
            if agrees(analytic, e, rtol, spread) and _leave_open(tried, h, analytic, rtol):
                return Settled(RIGHT, e.slope, e.truncation + e.noise, h, 0.0)
            if analytic == 0 and e.slope == 0 and e.kink == 0 and _rests(line):
                return Settled(RIGHT, 0.0, 0.0, first, 0.0)
            tried.append(e)
            far_from_rounding = h >= 2.0**-21 * line.size
            if far_from_rounding and _contradict(tried[-2:], analytic, rtol, spread):
                return Settled(WRONG, e.slope, e.truncation + e.noise, max(h, tried[-2].h), e.kink)
            far = TRUST * rtol * max(abs(analytic), abs(e.slope), spread)
            limited_by_noise = e.noise > far
        if before is not None and limited_by_noise != before:
            # The right step lies between the last two.
            factor = math.sqrt(factor)
        before = limited_by_noise
        if not limited_by_noise:
            h /= factor
        elif factor < 64 or far == 0:
            h *= factor
        else:
            # Rounding goes with 1 / h: this is the step at which it would not matter.
            h *= 2.0 ** min(18, math.frexp(4 * e.noise / far)[1])
    if not tried:
        return Settled(NOT_FINITE, math.nan, math.inf, first, 0.0)
    bent = [e for e in tried if e.kink > 2 * e.kink_noise + TRUST * rtol * abs(e.slope)]
    if len(bent) == len(tried):
        e = min(bent, key=lambda e: e.h)
        return Settled(KINK, e.slope, math.inf, e.h, e.kink)
    e = min(tried, key=lambda e: e.truncation + e.noise)
    return Settled(HIDDEN, e.slope, e.truncation + e.noise, e.h, e.kink)


def _leave_open(tried, h, analytic, rtol):
    """Is `analytic` possible by the estimates at steps finer than h?"""
    for e in tried:
        error = e.truncation + e.noise + e.kink
        if e.h < h and abs(analytic - e.slope) > 2 * error + rtol * abs(analytic):
            return False
    return True


def _contradict(pair, analytic, rtol, spread):
    """Do two steps agree with each other, and not with `analytic`?"""
    if len(pair) < 2 or pair[0].h == pair[1].h:
        return False
    errors = [e.truncation + e.noise for e in pair]
    if abs(pair[0].slope - pair[1].slope) > sum(errors):
        return False
    for e, error in zip(pair, errors, strict=True):
        size = max(abs(analytic), abs(e.slope), spread)
        if abs(analytic - e.slope) <= rtol * size + error + e.kink / 2:
            return False
    return True


def _rests(line):
    """Does f stay where it is, to the bit, when x moves by a good part of itself?"""
    for h in (2.0**-3, 2.0**-6, 2.0**-9):
        pair = line.pair(h * max(1.0, line.size))
        if pair is None:
            continue
        up, down, _ = pair
        if np.array_equal(up, line.y) and np.array_equal(down, line.y):
            return True
    return False


def _judge(found, analytic, rtol, spread, value):
    """What estimates at many steps, from fine to coarse, say together of `analytic`.

    Source: to go on to coarser steps for as long as each lies within what all finer ones leave
    open, and there to take the best, is Lepski's method (1991).
    """
    # If terms cancel inside f, rounding is worse than its bound, and the finest steps show it.
    fine = found[: SEVERAL + 1]
    measured = max(
        [abs(e.slope - next_.slope) * e.h for e, next_ in zip(fine, fine[1:], strict=False)]
        or [0.0]
    )
    resolved = measured <= UNRESOLVED * value
    low = -math.inf
    high = math.inf
    trusted = []
    for n, e in enumerate(found):
        truncation = e.truncation
        if n > 1:
            # At a quarter of the step truncation is a 4096th, so the two differ by that at h.
            truncation = min(truncation, abs(e.slope - found[n - 2].slope))
        if e.noise > 0:
            worse = max(1.0, measured / e.h / e.noise)
            e = e._replace(noise=worse * e.noise, kink_noise=worse * e.kink_noise)
        error = truncation + e.noise
        low = max(low, e.slope - error)
        high = min(high, e.slope + error)
        if low > high:
            break
        trusted.append((error, e))
    error, best = min(trusted, key=lambda pair: pair[0])
    size = max(abs(analytic), abs(best.slope), spread)
    has_kink = _has_kink([e for _, e in trusted]) or _has_kink(found)
    distance = abs(analytic - best.slope)
    if analytic == 0 and distance <= error and not has_kink:
        return Settled(RIGHT, 0.0, error, best.h, 0.0)
    for own_error, e in trusted:
        if agrees(analytic, e, rtol, spread, own_error):
            return Settled(RIGHT, e.slope, own_error, e.h, 0.0)
    against = [e for own_error, e in trusted if abs(analytic - e.slope) > rtol * size + own_error]
    # Within a kink every slope between the two sides could be meant.
    kink = min(e.kink + e.kink_noise for _, e in trusted)
    if resolved and len(against) >= SEVERAL and distance - error - rtol * size > kink / 2:
        return Settled(WRONG, best.slope, error, best.h, kink)
    if has_kink:
        return Settled(KINK, best.slope, error, best.h, max(kink, found[0].kink))
    return Settled(HIDDEN, best.slope, error, best.h, kink)


def _has_kink(found):
    """Does the gap between the sides stay, or grow, in the same way from step to finer step?

    It stays at a kink; at a jump, or where the slope is infinite, it grows by one factor each time,
    or the slope itself does. The gap of a smooth function shrinks; what rounding makes of gaps and
    slopes is not regular.
    """
    gaps = [e.kink for e in found if e.kink > 2 * e.kink_noise]
    slopes = [abs(e.slope) for e in found]
    return _goes_on(gaps, 0.9) or _goes_on(slopes, 1.2)


def _goes_on(numbers, least):
    """Do the first of these stand to the next in one ratio, of at least `least`?"""
    first = numbers[: SEVERAL + 1]
    if len(first) <= SEVERAL or min(first) == 0:
        return False
    growth = [a / b for a, b in zip(first, first[1:], strict=False)]
    return min(growth) > least and max(growth) < 1.05 * min(growth)
