"""The slope of a function along a line, from differences, and bounds on its errors. Judges nothing.

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
  unless all stay. Where terms cancel inside f this bound is too small: `verdict.py` therefore
  looks at how far steps agree with one another.
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

# D and G at one step, and bounds on the rounding of both.
Level = namedtuple("Level", "h slope noise gap gap_noise")


class Estimate(namedtuple("Estimate", "h slope truncation noise kink kink_noise")):
    """An extrapolated slope and the bounds on its truncation and its noise (rounding and position).

    `kink` is the part of G that does not shrink with h, `kink_noise` the bound on its rounding.
    """

    __slots__ = ()
    error = property(lambda self: self.truncation + self.noise)


def stands_still(level):
    """Has f not changed at all, on neither side?"""
    return level.slope == 0 and level.gap == 0


def norm(a):
    """The root of the sum of squares, also where the squares leave the range of float64."""
    with np.errstate(all="ignore"):
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
        with np.errstate(all="ignore"):
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
            if not stands_still(level):
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
