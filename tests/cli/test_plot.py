"""The picture of a log: what is drawn is what was logged, it can be read, and what cannot be drawn is told."""

import io
import json
import sys

import numpy as np
import pytest

from minilora.cli import plot as module
from minilora.cli.main import main
from minilora.cli.plot import COLOURS, GROUND, INK, Curve, draw, read_curves, smoothed

LOSSES = [5.0, 3.0, 4.0, 1.0]


def write_log(path, losses=LOSSES, evaluations=((0, 6.0), (2, 4.5), (4, 5.5)), run="abc"):
    """A log of these losses, and of evaluations after some of the steps."""
    lines = []
    for step in range(len(losses) + 1):
        if step:
            lines.append({"run": run, "step": step, "loss": losses[step - 1], "lr": 0.1, "tokens": 8 * step,
                          "seconds": 0.5 * step})  # fmt: skip
        for at, loss in evaluations:
            if at == step:
                lines.append({"run": run, "step": step, "eval_loss": loss, "tokens": 8 * step, "seconds": 0.5 * step})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def log(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_log(tmp_path / "run.jsonl").name


@pytest.fixture
def figure():
    return pytest.importorskip("matplotlib.figure", reason="the extra plot is not installed").Figure()


def test_what_is_drawn_is_what_was_logged(log, figure, tmp_path):
    write_log(tmp_path / "other.jsonl", [2.0], [])
    draw(figure, read_curves([log, "other.jsonl"]))
    raw, smooth, heldout, other_raw, other_smooth = figure.axes[0].lines
    assert [list(line.get_xdata()) for line in (raw, smooth, heldout)] == [[1, 2, 3, 4]] * 2 + [[0, 2, 4]]
    assert list(raw.get_ydata()) == LOSSES and list(smooth.get_ydata()) == list(smoothed(LOSSES))
    assert list(heldout.get_ydata()) == [6.0, 4.5, 5.5]
    assert list(other_raw.get_ydata()) == [2.0]
    colours = [line.get_color() for line in (raw, smooth, heldout, other_raw, other_smooth)]
    assert colours == [COLOURS[0]] * 3 + [COLOURS[1]] * 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "run, training", "run, held out", "other, training"]  # fmt: skip
    assert heldout.get_linestyle() != smooth.get_linestyle(), "apart also without colours"
    assert raw.get_linewidth() < smooth.get_linewidth()


def test_logs_of_one_name_are_called_by_their_paths(tmp_path):
    (tmp_path / "a").mkdir()
    paths = [write_log(tmp_path / name) for name in ("a/run.jsonl", "run.jsonl", "b.jsonl")]
    assert [curve.name for curve in read_curves(paths)] == [str(paths[0]), str(paths[1]), "b"]


@pytest.mark.parametrize("n, width", [(1, 1), (19, 1), (20, 1), (40, 2), (100, 5)])
def test_the_smooth_line_is_the_mean_over_the_last_twentieth_of_the_steps(n, width):
    losses = np.random.default_rng(0).normal(size=n)
    means = [losses[max(0, i - width + 1) : i + 1].mean() for i in range(n)]
    assert np.allclose(smoothed(list(losses)), means, rtol=0, atol=1e-13)


# It can be read.


def luminance(colour):
    """Of "#rrggbb", in 0 .. 1. Source: WCAG 2.2, relative luminance."""
    parts = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


def contrast(one, other):
    darker, lighter = sorted([luminance(one), luminance(other)])
    return (lighter + 0.05) / (darker + 0.05)


def test_lines_and_letters_stand_out_from_the_ground():
    """By WCAG 2.2: 3 for what is drawn, 7 for letters. And the ground stands out from a dark page."""
    assert contrast("#ffffff", "#000000") == 21
    assert min(contrast(colour, GROUND) for colour in COLOURS) > 3
    assert contrast(INK, GROUND) > 7 and contrast(GROUND, "#0d1117") > 7


def test_the_picture_hides_what_is_behind_it_and_is_as_wide_as_a_page(log, capsys):
    image = pytest.importorskip("matplotlib.image", reason="the extra plot is not installed")
    assert main(["plot", log]) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.splitlines() == [
        "run.jsonl: 4 steps, training loss 5.000 -> 1.000, held-out loss 6.000 -> 5.500, lowest 4.500 after step 2",
        "kept in run.png: a picture",
    ]
    content = open("run.png", "rb").read()
    pixels = image.imread(io.BytesIO(content))
    assert pixels.shape == (540, 720, 4) and (pixels[:, :, 3] == 1).all()
    ground = [int(GROUND[i : i + 2], 16) for i in (1, 3, 5)]
    assert (np.round(255 * pixels[0, 0, :3]) == ground).all()
    # A picture is drawn anew, and the same log makes the same one.
    assert main(["plot", log, "--out", "run.png"]) == 0
    assert open("run.png", "rb").read() == content


def test_a_step_or_a_measurement_alone_can_be_drawn(figure, tmp_path):
    for losses, evaluations in (([2.0], []), ([], [(0, 3.0)])):
        [curve] = read_curves([write_log(tmp_path / "a.jsonl", losses, evaluations)])
        draw(type(figure)(), [curve])
        assert "step" in module._in_words(curve)
    words = module._in_words(Curve("a", [], [0], [3.0]))
    assert words == "0 steps, held-out loss 3.000 -> 3.000, lowest 3.000 after step 0"


# What is refused.


@pytest.mark.parametrize("arguments, complaint", [
    (["missing.jsonl"], "missing.jsonl: No such file or directory"),
    (["run.jsonl", "other.jsonl"], "other.jsonl, line 1 is of another program"),
    (["cut.jsonl"], "cut.jsonl, line 2: cut off"),
    (["run.jsonl", "--out", "notes.png"], "notes.png exists and is no picture; choose another name"),
    (["run.jsonl", "--out", "run.pdf"], "run.pdf: a picture is a .png"),
    (["run.jsonl", "--out", "nowhere/run.png"], "nowhere does not exist; make the folder of the picture first"),
    (["run.jsonl", "--out", "folder.png"], "folder.png is a folder"),
    (["run.jsonl"] * 7, "7 logs: a picture has colours for 6; draw several pictures"),
], ids=str)  # fmt: skip
def test_what_cannot_be_drawn_is_told_in_one_line_and_leaves_no_picture(log, arguments, complaint, capsys, tmp_path):
    pytest.importorskip("matplotlib", reason="the extra plot is not installed")
    (tmp_path / "other.jsonl").write_text('{"loss": 2.0, "epoch": 1}\n')
    (tmp_path / "cut.jsonl").write_text((tmp_path / log).read_text().splitlines()[0] + '\n{"run": "abc", "st')
    (tmp_path / "notes.png").write_text("mine")
    (tmp_path / "folder.png").mkdir()
    before = sorted(tmp_path.iterdir())
    assert main(["plot", *arguments]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("minilora: ") and complaint in err and err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before and (tmp_path / "notes.png").read_text() == "mine"


def test_without_matplotlib_the_command_that_brings_it_is_told(log, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["plot", log]) == 1
    assert capsys.readouterr() == ("", "minilora: minilora plot needs matplotlib: pip install -e '.[plot]'\n")
    assert not (tmp_path / "run.png").exists()
