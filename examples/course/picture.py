"""The look of the course's pictures: a light ground that dark pages can show too. Knows no lab."""

import hashlib
import re
from pathlib import Path

from minilora.cli import plot
from minilora.cli.plot import COMMAND, GROUND, INK

MISSING = f"that needs matplotlib: {COMMAND}"

# Apart also for those who do not see red and green: Okabe and Ito's colours, darkened to be read.
COLOURS = ["#0072b2", "#d55e00", "#007a5a", "#9a5b8f", "#8a6d00", "#3f8fbf", "#555555"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]

# In inches; at 144 dots an inch a picture is 1,008 wide, and its letters can be read on a phone.
SIZE = (7.0, 5.2)
# That of `minilora plot`, with room for several panels.
STYLE = {
    **plot.STYLE,
    "savefig.facecolor": GROUND,
    "grid.linewidth": 0.8,
    # Lines of the grid go behind bars.
    "axes.axisbelow": True,
    "font.size": 13,
    "axes.titlesize": 13,
    "legend.fontsize": 11.5,
    "lines.linewidth": 2.2,
    "lines.markersize": 7,
    "figure.dpi": 144,
}


def digest(text):
    """16 hex digits of the SHA-256 of the text of a result, which tell whose picture this is."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def drawn_from(file):
    """The digest that the picture `file` holds of the result it was drawn from; None without."""
    found = re.search(rb"tEXtSource\x00result ([0-9a-f]{16})", Path(file).read_bytes())
    return found and found[1].decode()


def save(file, draw, text):
    """Let `draw(figure)` fill a figure, and write it to `file`, a .png.

    `text` is that of the result that is drawn; the file holds its digest.
    Returns the file, or None where matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    cycle = matplotlib.cycler(color=COLOURS, marker=MARKERS)
    with matplotlib.rc_context({**STYLE, "axes.prop_cycle": cycle}):
        figure = Figure(figsize=SIZE, layout="constrained")
        draw(figure)
        # Without a date or a version in it, the same numbers make the same file.
        metadata = {"Software": None, "Source": f"result {digest(text)}"}
        figure.savefig(file, metadata=metadata)
    return file


def middle(values):
    """The mean of a list with a number for each seed."""
    return sum(values) / len(values)


def ranges(lists):
    """How far the values of each list reach below their mean, and how far above it."""
    # The mean of equal numbers may be rounded to less than they are.
    below = [max(0.0, middle(values) - min(values)) for values in lists]
    above = [max(0.0, max(values) - middle(values)) for values in lists]
    return below, above


def _shown(lists):
    """The ranges as matplotlib draws them; None if there are none, as with one seed."""
    below, above = ranges(lists)
    return [below, above] if any(below) or any(above) else None


def with_range(axes, x, lists, label, **style):
    """A line through the means of `lists`, one list of numbers for each x, and their ranges."""
    means = [middle(values) for values in lists]
    axes.errorbar(x, means, yerr=_shown(lists), capsize=4, label=label, **style)


def bars(axes, names, lists, form="{:.0f}", **style):
    """A horizontal bar for each name, the first on top, with its number and its range."""
    places = range(len(names))
    means = [middle(values) for values in lists]
    drawn = axes.barh(places, means, xerr=_shown(lists), capsize=4, ecolor=INK, **style)
    axes.bar_label(drawn, fmt=form, padding=3, fontsize=11)
    axes.set_yticks(places, names)
    # Axes may share their names: to invert them twice would undo it.
    axes.yaxis.set_inverted(True)
    axes.grid(axis="y", visible=False)
