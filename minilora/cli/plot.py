"""The command plot: the losses in the logs of runs, as a picture. Knows logs, and no models."""

import io
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np

from ..disk.checks import counted
from ..disk.reading import open_regular
from ..training.run_log import read_log

COMMAND = "pip install -e '.[plot]'"
# How every PNG file begins.
PNG = b"\x89PNG\r\n\x1a\n"

# The ground is light and hides what is behind it, so that a dark page shows the picture as well.
GROUND = "#fbfaf7"
INK = "#1f2328"
FAINT = "#d8d5cc"
# Okabe and Ito's colours, darkened: apart also for those who do not see red and green.
COLOURS = ("#0072b2", "#d55e00", "#007a5a", "#9a5b8f", "#8a6d00", "#555555")
# 7.2 inches of 100 dots are 720. A phone shows half of that, and letters of 15 points on it.
INCHES = (7.2, 5.4)
DOTS = 100
STYLE = {
    "figure.facecolor": GROUND,
    "axes.facecolor": GROUND,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.color": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 15,
    "legend.frameon": False,
    "lines.linewidth": 2.5,
    "lines.markersize": 8,
}
# The smooth line shows at each step the mean over the last 1/SMOOTH of all steps.
SMOOTH = 20

# A log to draw: lists of numbers. `losses` are those of the steps 1, 2, ...
Curve = namedtuple("Curve", "name losses eval_steps eval_losses")


def plot(paths, out, log):
    """Draw the logs in the files `paths` into the picture `out`, and print what is in each.

    `out` is a .png, new or one to draw anew; None: the first log's name, ending in .png.
    Raises: ImportError with a remedy where there is no matplotlib; ValueError or OSError, before
    anything is written, for what `read_log` refuses, for too many logs, and for another file where
    the picture is to be.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(f"minilora plot needs matplotlib: {COMMAND}") from None
    out = Path(paths[0]).with_suffix(".png") if out is None else Path(out)
    _check_picture(out)
    if len(paths) > len(COLOURS):
        raise ValueError(
            f"{len(paths)} logs: a picture has colours for {len(COLOURS)}; draw several pictures"
        )
    curves = read_curves(paths)
    for path, curve in zip(paths, curves, strict=True):
        log(f"{path}: {_in_words(curve)}")
    with rc_context(STYLE):
        figure = Figure(figsize=INCHES, dpi=DOTS, layout="constrained")
        draw(figure, curves)
        content = io.BytesIO()
        # Without a version in it, the same logs make the same file.
        figure.savefig(content, format="png", metadata={"Software": None})
    out.write_bytes(content.getvalue())
    log(f"kept in {out}: a picture")


def _check_picture(out):
    """Raise unless `out` is a place for a picture, where no other file would be lost."""
    if out.suffix.lower() != ".png":
        raise ValueError(f"{out}: a picture is a .png; choose a name that ends so")
    if out.is_dir():
        raise ValueError(f"{out} is a folder; choose another name for the picture")
    if not out.parent.is_dir():
        raise FileNotFoundError(
            f"{out.parent} does not exist; make the folder of the picture first"
        )
    if not out.exists():
        return
    with open_regular(out) as file:
        beginning = file.read(len(PNG))
    if beginning != PNG:
        raise ValueError(f"{out} exists and is no picture; choose another name")


def read_curves(paths):
    """A Curve for each of the logs in the files `paths`. Raises: as `read_log`."""
    curves = []
    for path, name in zip(paths, _names(paths), strict=True):
        records = read_log(path)
        steps = [record for record in records if "loss" in record]
        evaluations = [record for record in records if "eval_loss" in record]
        curves.append(
            Curve(
                name,
                [record["loss"] for record in steps],
                [record["step"] for record in evaluations],
                [record["eval_loss"] for record in evaluations],
            )
        )
    return curves


def _names(paths):
    """What the logs are called in the picture: their files' names, or paths where those agree."""
    stems = [Path(path).stem for path in paths]
    count = Counter(stems)
    return [
        stem if count[stem] == 1 else str(path) for stem, path in zip(stems, paths, strict=True)
    ]


def draw(figure, curves):
    """Draw the Curves into a figure of matplotlib's, with a legend under them."""
    axes = figure.subplots()
    for curve, colour in zip(curves, COLOURS, strict=False):
        steps = np.arange(1, len(curve.losses) + 1)
        axes.plot(steps, curve.losses, color=colour, linewidth=1, alpha=0.3)
        axes.plot(steps, smoothed(curve.losses), color=colour, label=f"{curve.name}, training")
        if curve.eval_losses:
            axes.plot(
                curve.eval_steps,
                curve.eval_losses,
                color=colour,
                linestyle="--",
                marker="o",
                label=f"{curve.name}, held out",
            )
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside lower center", ncols=1 if len(curves) == 1 else 2)


def smoothed(losses):
    """The mean over each step and those before it, as many as make 1/SMOOTH of all: an array (n,).

    The first steps have fewer before them.
    """
    n = len(losses)
    width = max(1, n // SMOOTH)
    sums = np.concatenate([[0.0], np.cumsum(losses)])
    ends = np.arange(1, n + 1)
    starts = np.maximum(ends - width, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _in_words(curve):
    """What the curve shows, for those who do not see it."""
    text = counted(len(curve.losses), "step")
    if curve.losses:
        means = smoothed(curve.losses)
        text += f", training loss {curve.losses[0]:.3f} -> {means[-1]:.3f}"
    if curve.eval_losses:
        best = int(np.argmin(curve.eval_losses))
        text += (
            f", held-out loss {curve.eval_losses[0]:.3f} -> {curve.eval_losses[-1]:.3f}, lowest "
            f"{curve.eval_losses[best]:.3f} after step {curve.eval_steps[best]:,}"
        )
    return text
