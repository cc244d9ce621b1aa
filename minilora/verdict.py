"""Is this number the slope? What differences at many steps say together. Knows no gradient's array.

A gradient is right if SEVERAL steps in a row, which agree with one another, agree with it; it is
wrong only if all such steps contradict it; and else there is a reason why nothing can be said.

A smooth function has one place where steps know the slope: beside it, coarser steps are wrong by
truncation and finer ones by rounding. Where inside f terms cancel, or are rounded to fewer digits,
the finest steps may agree on something else, or f stands still there. So the finest steps are not
the truest, and all places are asked.
"""

import math
from collections import namedtuple

import numpy as np

from .differences import EPS, FIRST_STEP, stands_still

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


def agrees(analytic, estimate, rtol, spread):
    """Does this estimate show that `analytic` is right to rtol? Not if it could not tell."""
    size = max(abs(analytic), abs(estimate.slope), spread)
    far = TRUST * rtol * size
    if size == 0 or abs(analytic - estimate.slope) > rtol * size or estimate.error > far:
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
        if level is not None and stands_still(level):
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
                return Settled(RIGHT, e.slope, e.error, h, 0.0)
            if analytic == 0 and e.slope == 0 and e.kink == 0 and _rests(line):
                return Settled(RIGHT, 0.0, 0.0, first, 0.0)
            tried.append(e)
            if _contradict(tried[-2:], analytic, rtol, spread):
                return Settled(WRONG, e.slope, e.error, max(h, tried[-2].h), e.kink)
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
    e = min(tried, key=lambda e: e.error)
    return Settled(HIDDEN, e.slope, e.error, e.h, e.kink)


def _leave_open(tried, h, analytic, rtol):
    """Is `analytic` possible by the estimates at steps finer than h?"""
    for e in tried:
        error = e.error + e.kink
        if e.h < h and abs(analytic - e.slope) > 2 * error + rtol * abs(analytic):
            return False
    return True


def _contradict(pair, analytic, rtol, spread):
    """Do two steps agree with each other, and not with `analytic`?"""
    if len(pair) < 2 or pair[0].h == pair[1].h:
        return False
    errors = [e.error for e in pair]
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
        error = w.error if stumbles else min(e.error for e in w.part)
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
            return Settled(RIGHT, e.slope, e.error, e.h, 0.0)
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
        if reach > 0 and analytic == 0:
            return settled._replace(verdict=RIGHT, slope=0.0)
        return settled
    if analytic == 0:
        allowed = all(abs(w.slope) <= 4 * w.error for w in windows)
        if allowed:
            return settled._replace(verdict=RIGHT, slope=0.0)
        return settled
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
