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

# SEVERAL steps in a row know a slope if they differ by no more than this part of it.
KNOWN = 0.01
# One part of the steps knows the slope apart from another if all between are this much vaguer.
BARRIER = 30
# If at the finest steps f still changes by more than this part of itself, steps see nothing of it.
UNRESOLVED = 2.0**-8

# D and G at one step, and bounds on the rounding of both.
Level = namedtuple("Level", "h slope noise gap gap_noise")
# An extrapolated slope, the bounds on its truncation and its noise (rounding and position), and the
# part of G that does not shrink with h.
Estimate = namedtuple("Estimate", "h slope truncation noise kink kink_noise")
# What SEVERAL estimates in a row say: a slope, by how much they differ, and the kink they see.
Window = namedtuple("Window", "h slope error kink kink_bound part")
# verdict: RIGHT, WRONG, or why nothing can be said; `error` bounds what `slope` is wrong by; chaos:
# whether the steps beside those that know the slope know nothing at all.
Settled = namedtuple("Settled", "verdict slope error h kink chaos", defaults=[False])

RIGHT = "right"
WRONG = "wrong"
KINK = "f has a kink there"
NOT_FINITE = "f is not finite, or fails, beside it"
FLOAT32 = "f is rounded to fewer digits than float64 has"
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
        # h times the bound on the rounding of D(h), at the last step; one that was known before.
        self.noise = None
        self.known_noise = None
        # What counts as a good part of the input: an element, or 1 if that is more.
        self.natural = 1.0
        # The largest size of f's values seen so far, within that and anywhere.
        self.magnitude = 0.0
        self.magnitude_far = 0.0
        # What a step is measured by: the element that moves, or 1, since the components of a
        # direction have the size of the input already.
        self.size = 1.0
        if v.size == 1:
            self.size = abs(float(x[where][0])) or 1.0
            self.natural = max(1.0, self.size)

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
        if self.known_noise is not None:
            self.noise = self.known_noise
        else:
            size = norm(np.multiply(dy, up, out=work)) + norm(np.multiply(dy, y, out=work))
            # Below the smallest normal number digits are lost.
            self.noise = 2 * EPS * (size + TINY * math.sqrt(max(1, y.size)))
            self.magnitude_far = max(self.magnitude_far, size)
            if h <= self.natural:
                self.magnitude = max(self.magnitude, size)
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

    def estimates(self):
        """(how far f stands still, R(h) for the steps beyond), from fine to coarse.

        They suit a function of unknown scale. At a step where f stands still, to the bit, its slope
        is not zero: it is too small to be seen there.
        """
        self.known_noise = None
        levels = [self.level(h) for h in self.steps()]
        finite = [level for level in levels if level is not None]
        reach = 0.0
        for level in reversed(finite):
            if level.slope != 0 or level.gap != 0:
                break
            reach = level.h
        found = []
        for three in zip(levels, levels[1:], levels[2:], strict=False):
            if None in three or three[2].h <= reach:
                continue
            wide = _extrapolated(three[0], three[1])
            narrow = _extrapolated(three[1], three[2])
            slope = (16 * narrow.slope - wide.slope) / 15
            noise = (16 * narrow.noise + wide.noise) / 15
            truncation = abs(slope - narrow.slope) / 2
            found.append(narrow._replace(h=wide.h, slope=slope, truncation=truncation, noise=noise))
        found.reverse()
        for n in range(len(found) - 1, 1, -1):
            # At a quarter of the step truncation is a 4096th, so the two differ by that at h.
            apart = abs(found[n].slope - found[n - 2].slope)
            found[n] = found[n]._replace(truncation=min(found[n].truncation, apart))
        return reach, found

    def steps(self):
        """From coarse to fine: what moves at a coarse step is rounded anew at a fine one too.

        Each is half the one before, but none a power of two: of a staircase with steps of 1 those
        would see a straight line.
        """
        if self.v.size > 1:
            # The components of a direction have the scale of the input already.
            exponents = range(3, -34, -1)
        elif self.x[self.where][0] == 0:
            exponents = range(6, -61, -1)
        else:
            exponent = math.frexp(self.size)[1]
            exponents = range(max(6, exponent - 6), exponent - 34, -1)
        return [1.29296875 * 2.0**k for k in exponents]


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
    reach, found = line.estimates()
    if not found and reach == 0:
        return Settled(NOT_FINITE, math.nan, math.inf, first, 0.0)
    windows = _windows(found)
    size = max(abs(analytic), spread)
    places = _places(windows, TRUST * rtol * size)
    if not places and reach >= 2.0**-12 * line.natural:
        # A constant, a staircase, or flat to the last digit, for a good part of its input.
        return _judge_still(line, reach, found, analytic)
    settled = _judge(line, reach, found, windows, places, analytic, rtol, spread)
    if settled.verdict == HIDDEN and found and _has_kink(found):
        kink = max(settled.kink, found[0].kink)
        settled = settled._replace(verdict=KINK, kink=kink)
    return settled


def _judge_still(line, reach, found, analytic):
    """The verdict where f does not change at all, not even when x moves by `reach`."""
    for part in (0.5, 0.9, 0.99, 2.0):
        # How large f is elsewhere: inside it, terms may be as large here.
        line.level(part * line.size)
    unseen = 8 * EPS * line.magnitude_far
    if found:
        # If it goes on with a step, of a staircase or of rounding, less than one is not seen.
        unseen = max(unseen, 2 * _first_change(line, reach, found[0].h))
    settled = Settled(HIDDEN, 0.0, unseen / reach, reach, 0.0)
    if analytic == 0:
        return settled._replace(verdict=RIGHT)
    # Where f is zero wherever it was looked at, nothing tells how large its terms are.
    if line.magnitude_far > 0 and abs(analytic) * reach > unseen:
        return settled._replace(verdict=WRONG)
    return settled


def _first_change(line, reach, moving):
    """By how much f changes at the first step that changes it, between `reach` and `moving`."""
    change = math.inf
    for _ in range(10):
        middle = (reach + moving) / 2
        level = line.level(middle)
        if level is not None and level.slope == 0 and level.gap == 0:
            reach = middle
            continue
        moving = middle
        if level is not None:
            change = level.h * (2 * abs(level.slope) + level.gap)
    return change if math.isfinite(change) else 0.0


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
            if _contradict(tried[-2:], analytic, rtol, spread):
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
        pair = line.pair(h * line.natural) if math.isfinite(line.natural) else None
        if pair is None:
            continue
        up, down, _ = pair
        if np.array_equal(up, line.y) and np.array_equal(down, line.y):
            return True
    return False


def _windows(found):
    """What each SEVERAL estimates in a row say together."""
    windows = []
    for i in range(len(found) - SEVERAL + 1):
        part = found[i : i + SEVERAL]
        slopes = sorted(e.slope for e in part)
        slope = slopes[len(slopes) // 2]
        error = slopes[-1] - slopes[0] + min(e.noise for e in part)
        kink = max(0.0, min(e.kink - e.kink_noise for e in part))
        kink_bound = min(e.kink + e.kink_noise for e in part)
        windows.append(Window(part[0].h, slope, error, kink, kink_bound, part))
    return windows


def _places(windows, far):
    """The windows that know a slope, each better than any beside it, the best first.

    A smooth function has one. Where inside f terms cancel, or are rounded to fewer digits, the
    finest steps can agree on another slope; then steps between know much less than either.
    """
    known = [w for w in windows if w.error <= KNOWN * abs(w.slope)]
    if not known:
        return []
    best = min(known, key=lambda w: w.error / abs(w.slope))
    places = [best]
    for w in known:
        low = min(w.h, best.h)
        high = max(w.h, best.h)
        between = [o.error for o in windows if low < o.h < high]
        if max(between, default=0.0) >= BARRIER * w.error:
            places.append(w)
    # A kink that only coarser steps see lies beside x.
    smooth = [w.h for w in places if w.kink <= max(far, KNOWN * abs(w.slope))]
    finest = min(smooth, default=math.inf)
    return [w for w in places if w.kink <= max(far, KNOWN * abs(w.slope)) or w.h < finest]


def _judge(line, reach, found, windows, places, analytic, rtol, spread):
    """What estimates at many steps, from fine to coarse, say together of `analytic`.

    It is right if one of the places says so, and wrong only if all contradict it.
    """
    if not found:
        return Settled(HIDDEN, 0.0, math.inf, reach, 0.0)
    settled = Settled(HIDDEN, found[0].slope, math.inf, found[0].h, found[0].kink)
    if not windows or not _is_resolved(line, found):
        return settled
    if not places:
        return _judge_vague(line, reach, found, windows, analytic)
    best = places[0]
    settled = Settled(HIDDEN, best.slope, best.error, best.h, best.kink_bound)
    # By how much f stands still too long, or scatters too much, for what float64 explains.
    rough = max(abs(e.slope - best.slope) * e.h for e in found if e.h <= best.h)
    rough = max(rough, abs(best.slope) * reach)
    if rough <= 32 * EPS * (line.magnitude + line.size * abs(best.slope)):
        rough = 0.0
    stumbles = len(places) > 1 or rough > 0
    for w in places:
        size = max(abs(analytic), abs(w.slope), spread)
        error = w.error if stumbles else min(e.truncation + e.noise for e in w.part)
        far = rtol * size / 100 if stumbles else TRUST * rtol * size
        if abs(analytic - w.slope) <= rtol * size and max(error, w.kink) <= far:
            return Settled(RIGHT, w.slope, w.error, w.h, 0.0)
    # Where many finer steps lie closer together than the bound on rounding, what they show counts.
    finer = [abs(e.slope - best.slope) * e.h for e in found if e.h < best.h]
    shown = 2 * max(finer) if len(finer) >= 2 * SEVERAL else math.inf
    for e in found:
        close = abs(e.slope - best.slope) <= 4 * best.error
        e = e._replace(noise=min(e.noise, shown / e.h))
        if close and not stumbles and agrees(analytic, e, rtol, spread):
            return Settled(RIGHT, e.slope, e.truncation + e.noise, e.h, 0.0)
    if analytic == 0 and reach > 0 and best.kink > KNOWN * abs(best.slope):
        # It stands still up to a kink, which lies beside x.
        return settled._replace(verdict=RIGHT, slope=0.0)
    for w in places:
        size = max(abs(analytic), abs(w.slope), spread)
        error = 4 * w.error
        if w.h >= best.h:
            error += 4 * rough / w.h
        if abs(analytic - w.slope) - w.kink_bound / 2 - rtol * size <= error:
            return settled._replace(verdict=FLOAT32) if stumbles else settled
    if analytic == 0 and rough > 0:
        # The slope of a staircase is zero. Whether f is one, or only rounded, nobody can say.
        return settled._replace(verdict=FLOAT32)
    beside = [w for w in windows if best.h < w.h <= 512 * best.h]
    chaos = any(w.error > abs(w.slope) for w in beside)
    return settled._replace(verdict=WRONG, chaos=chaos)


def _is_resolved(line, found):
    """Does f change little from one of the finest steps to the next, measured by itself?"""
    fine = found[: SEVERAL + 1]
    steps = zip(fine, fine[1:], strict=False)
    return max(abs(a.slope - b.slope) * a.h for a, b in steps) <= UNRESOLVED * line.magnitude


def _judge_vague(line, reach, found, windows, analytic):
    """The same where no steps know the slope: it may be zero, or lie below what can be seen."""
    least = min(windows, key=lambda w: abs(w.slope) + w.error)
    settled = Settled(HIDDEN, least.slope, least.error, least.h, least.kink_bound)
    if _has_kink(found):
        # Beside a kink, at finer steps, it may still have stood still.
        return settled._replace(verdict=RIGHT, slope=0.0) if reach > 0 == analytic else settled
    if analytic == 0:
        allowed = all(abs(w.slope) <= 4 * w.error for w in windows)
        return settled._replace(verdict=RIGHT, slope=0.0) if allowed else settled
    for w in windows:
        bound = abs(w.slope) + 4 * w.error + w.kink_bound / 2
        bound += 8 * EPS * line.magnitude_far / w.h
        if w.h <= line.natural and abs(analytic) <= 10 * bound:
            return settled
    return settled._replace(verdict=WRONG)


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
