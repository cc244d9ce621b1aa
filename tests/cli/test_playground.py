"""The playground, driven in a Chromium without a window: what it computes is what NumPy and the library compute.

Two starts of the browser do it all, as each takes a second: one drives the page in a frame as wide as a phone, beside
copies with planted bugs; the other opens it by an address, in the dark.
"""

import base64
import hashlib
import html
import json
import re
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest

from minilora import Adam, Tensor
from minilora.architectures import PRESETS, blank
from minilora.cli import playground as module
from minilora.cli.main import main
from minilora.cli.playground import SCRIPTS, count, playground, read_measured
from minilora.lean import QUERY_BLOCK
from minilora.lora import LoRAPair
from minilora.memory import human_bytes
from minilora.step_cost import ITEMSIZES

BROWSERS = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge"]
DRIVER = Path(__file__).with_name("playground_driver.js")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
COUNTS = [
    {"model": "gpt2", "r": 16, "targets": ["q_proj", "v_proj"], "dtype": "float32", "batch": 2, "length": 100},
    {"model": "llama-3.1-8b", "r": 16, "targets": ATTENTION, "dtype": "bfloat16", "batch": 4, "length": 512},
    {"model": "gpt3-175b", "r": 1, "targets": ["up_proj"], "dtype": "float16", "batch": 1, "length": 2048},
    {"model": "qwen2.5-7b", "r": 256, "targets": [*ATTENTION, "gate_proj", "up_proj", "down_proj"],
     "dtype": "bfloat16", "batch": 3, "length": 1},
    {"model": "minilora-demo", "r": 7, "targets": ["o_proj", "down_proj"], "dtype": "float64", "batch": 8,
     "length": 128},
]  # fmt: skip
STEPS = 20
RUNS = [
    {"n": 8, "r": r, "k": 3, "alpha": alpha, "lr": lr, "method": method, "seed": 5}
    for method, r, alpha, lr in (("adam", 2, 4, 0.03), ("adam", 5, 1, 0.01), ("descent", 3, 6, 0.1))
]
# {planted bug: (the right text, the wrong one)} in what the page computes.
BUGS = {
    "dL/dA without s": ("A: product(transposed(pair.B), scaled)", "A: product(transposed(pair.B), E)"),
    "dL/dB with the wrong sign": ("B: product(scaled, ", "B: product(plus(E, E, -1 - pair.scaling), "),
    "the square root of r": ("scaling: alpha / r", "scaling: alpha / Math.sqrt(r)"),
    "B not zero": ("B: matrixOf(n, r, () => 0)", "B: matrixOf(n, r, () => 1e-3)"),
    "A too large": ("const bound = 1 / Math.sqrt(n)", "const bound = 1"),
    "Adam without a second moment": ("(Math.sqrt(squareHat) + EPSILON)", "(1 + EPSILON)"),
    "Adam without its correction": ("square[i][j] / (1 - beta2 ** time)", "square[i][j]"),
    "descent uphill": ("gradients[name], -settings.lr", "gradients[name], settings.lr"),
    "turned the wrong way": ("sine * value + cosine * y[i]", "cosine * y[i] - sine * value"),
    "no convergence": ("sweep < 60", "sweep < 2"),
    "smallest first": ("lengths[j] - lengths[i]", "lengths[i] - lengths[j]"),
    "one direction too few": ("k < r; k += 1", "k < r - 1; k += 1"),
    "a floor too low": ("sigma.slice(r)", "sigma.slice(r + 1)"),
    "one layer": ("layers * pair", "pair"),
    "square matrices": ("r * (linear.in + linear.out)", "2 * r * linear.in"),
    "adapted only": ("all: model.total + trainable", "all: model.total"),
    "break-even doubled": ("/ (linear.in + linear.out)", "/ (linear.in + linear.out) * 2"),
    "one moment": ("moments: 2 * trained", "moments: trained"),
    "no master copy": ("size < fullSize ? trained * fullSize : 0", "0"),
    "nothing packed": ("const packed = model.packed_bytes", "const packed = model.packed_numbers * size"),
    "the head forgotten": ("sums.fixed += trained ? table : 0;", ""),
    "W's gradient free": ("(1 + gradients) * 2 * widthIn", "(1 + (x.needsGradient ? 1 : 0)) * 2 * widthIn"),
    "no scores backward": ("sums.flopsByScore += 4 * q.width;", ""),
    "all pairs": ("sum += (stop - start) * stop;", "sum += (stop - start) * length;"),
    "inputs kept twice": ("value.kept = true;", ""),
    "frozen inputs kept": ("if (trained) {\n    keep", "if (true) {\n    keep"),
    "binary kilobytes": ("value /= 1000", "value /= 1024"),
    "rounded to all": ("value > 99 && value < 100", "false"),
}  # fmt: skip


def rank_file(folder, **changes):
    """A file as the lab on the rank leaves it."""
    rows = [{"method": "full", "r": None, "lr": 3e-3, "loss": [2.0, 2.1], "share_of_full": [100.0, 100.0]}]
    for r, low, high in ((1, 50.2, 55.9), (64, 91.0, 104.4)):
        rows.append({"method": "lora", "r": r, "lr": 1e-2, "loss": [2.3, 2.2], "share_of_full": [high, low]})
    fields = {"lab": "rank", "base": "tiny", "setting": "40 steps on </script><b>code", "seeds": [0, 1], "rows": rows,
              "machine": {"cpu": "some processor"}, "quick": False, **changes}  # fmt: skip
    file = folder / "rank.json"
    file.write_text(json.dumps({key: value for key, value in fields.items() if value != "left out"}))
    return file


def scripts():
    """What computes: the scripts that need no page."""
    pure = SCRIPTS[: SCRIPTS.index("quiz.js")]
    return "\n".join((module.PAGE / name).read_text(encoding="utf-8") for name in pure)


def with_bug(text, bug):
    right, wrong = BUGS[bug]
    assert text.count(right) == 1, bug
    return text.replace(right, wrong)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The text of the page, with what a lab measured."""
    return playground([read_measured(rank_file(tmp_path_factory.mktemp("measured")))])


@pytest.fixture(scope="module")
def data(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def browse(file, folder, *flags):
    """What the document is after the browser has opened it."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"there is no browser to drive; looked for {', '.join(BROWSERS)}")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
               "--allow-file-access-from-files", *flags, "--dump-dom", file]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120)
    assert "<html" in ended.stdout, ended.stderr[-2000:]
    return ended.stdout


def signed_anew(page, changed):
    """The page with a changed script, whose digest its policy names."""
    script = re.search(r"<script>(.*)</script>", page, re.DOTALL)[1]
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (script, changed)]
    assert page.count(digests[0]) == 1
    return page.replace(script, changed).replace(*digests)


def random(*shape):
    return np.random.default_rng(shape).normal(size=shape)


MATRICES = [random(9, 9), random(5, 3), random(3, 5), random(8, 2) @ random(2, 8), np.zeros((3, 3)),
            np.pad(random(4, 3), ((0, 0), (0, 2))), 1e-9 * random(4, 4)]  # fmt: skip
TASK = {"W": random(6, 5), "tuned": random(5, 6).T}
PAIR = {"A": random(3, 5), "B": random(6, 3), "scaling": 0.7}


@pytest.fixture(scope="module")
def found(page, data, tmp_path_factory):
    """What the driver found in the browser."""
    folder = tmp_path_factory.mktemp("browser")
    script = re.search(r"<script>(.*)</script>", page, re.DOTALL)[1]
    wrong = script
    for bug in ("dL/dA without s", "turned the wrong way", "one moment"):
        wrong = with_bug(wrong, bug)
    injected = '<script>document.title = "owned"</script><img src="x.png" onerror="document.title = 1">'
    unsigned = page.replace(script, script + "\n").replace("</main>", f"{injected}</main>")
    changed = {"page": page, "wrong": signed_anew(page, wrong), "unsigned": unsigned}
    frames = []
    for i, (name, text) in enumerate(changed.items()):
        (folder / f"{i}.html").write_text(text, encoding="utf-8")
        frames.append(f'<iframe id="{html.escape(name)}" src="{i}.html" width="360" height="700"></iframe>')
    sources = {"right": scripts()} | {bug: with_bug(scripts(), bug) for bug in BUGS}
    to_list = lambda arrays: {name: np.asarray(array).tolist() for name, array in arrays.items()}
    models = [model | {"shapes": {linear["name"]: linear for linear in model["linears"]}} for model in data["models"]]
    job = {"sources": sources, "models": models, "dtypes": data["dtypes"], "counts": COUNTS,
           "query_block": QUERY_BLOCK, "runs": RUNS,
           "steps": STEPS, "matrices": [M.tolist() for M in MATRICES], "task": to_list(TASK), "pair": to_list(PAIR),
           "bytes": BYTES, "shares": [share for share, _ in PERCENTS]}  # fmt: skip
    driver = f"const JOB = {json.dumps(job)};\n".replace("</", "<\\/") + DRIVER.read_text(encoding="utf-8")
    harness = f'<!doctype html><meta charset="utf-8"><script>{driver}</script>{"".join(frames)}<pre id="found"></pre>'
    (folder / "harness.html").write_text(harness, encoding="utf-8")
    dom = browse((folder / "harness.html").as_uri(), folder, "--virtual-time-budget=20000")
    answer = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)[1]))
    assert "error" not in answer, answer.get("error")
    return answer


# What it computes.

BYTES = [0, 999, 1000, 9995, 27_262_976, 999_499, 999_500, 999_999, 350_000_000_000, 2_793_668_149_248]
PERCENTS = [(0.958333, "95.8 %"), (1, "100 %"), (0.99526, "99.53 %"), (0.999999, "99.99990 %"), (0.000853, "0.0853 %"),
            (0, "0 %"), (0.5, "50 %")]  # fmt: skip


@pytest.fixture(scope="module")
def counted():
    """What the library counts for COUNTS, and the ranks at which LoRA breaks even."""
    expected = []
    for settings in COUNTS:
        modules = blank(PRESETS[settings["model"]]).blocks()[0].named_modules()
        shapes = [layer.weight.shape for name, layer in modules if name.rpartition(".")[2] in settings["targets"]]
        expected.append(count(settings) | {"even": [n * m / (n + m) for n, m in shapes]})
    return expected


def check(answer, counted):
    """Everything a copy of the scripts computed, against NumPy and this library."""
    check_decompositions(answer)
    check_gradients(answer["gradients"])
    for settings, run in zip(RUNS, answer["runs"], strict=True):
        check_run(settings, run)
    for ours, theirs in zip(answer["counts"], counted, strict=True):
        work = ours.pop("work")
        assert ours == {name: value for name, value in theirs.items() if name != "work"}
        # So many FLOPs are beyond the whole numbers that JavaScript has.
        assert work.keys() == theirs["work"].keys()
        assert all(np.isclose(work[way], flops, rtol=1e-14, atol=0) for way, flops in theirs["work"].items())
    assert [text.replace("\xa0", " ") for text in answer["bytes"]] == [human_bytes(n) for n in BYTES]
    assert [text.replace("\xa0", " ") for text in answer["percents"]] == [text for _, text in PERCENTS]


def check_decompositions(answer):
    for M, parts, best, floor in zip(
        MATRICES, answer["decomposed"], answer["truncated"], answer["floors"], strict=True
    ):
        U, V, sigma = np.array(parts["left"]).T, np.array(parts["right"]).T, np.array(parts["sigma"])
        size = np.linalg.norm(M)
        expected = np.zeros(len(sigma))
        expected[: min(M.shape)] = np.linalg.svd(M, compute_uv=False)
        assert np.abs(sigma - expected).max() <= 1e-14 * size
        assert np.abs(U * sigma @ V.T - M).max() <= 1e-14 * size
        assert np.abs(V.T @ V - np.eye(len(V))).max() <= 1e-13
        there = sigma > 1e-12 * size
        assert np.abs(U[:, there].T @ U[:, there] - np.eye(there.sum())).max(initial=0) <= 1e-12
        error = np.linalg.norm(M - best)
        assert abs(error - np.linalg.norm(expected[2:])) <= 1e-14 * size
        assert abs(floor * size**2 - error**2) <= 1e-13 * size**2


def check_gradients(found):
    """The textbook's derivatives, by this library's own graph."""
    A, B = (Tensor(PAIR[name], requires_grad=True) for name in "AB")
    E = Tensor(TASK["W"] - TASK["tuned"]) + PAIR["scaling"] * (B @ A)
    loss = 0.5 * (E * E).sum()
    loss.backward()
    assert np.isclose(found["loss"], loss.data, rtol=1e-14)
    assert np.allclose(found["A"], A.grad, rtol=1e-12) and np.allclose(found["B"], B.grad, rtol=1e-12)


def check_run(settings, run):
    """The same steps by this library: LoRAPair, its graph, and its Adam."""
    n, r = settings["n"], settings["r"]
    task, pair = run["task"], run["pair"]
    update = np.array(task["update"])
    expected = np.where(np.arange(n) < settings["k"], 0.8 ** np.arange(n), 0)
    assert np.abs(np.linalg.svd(update, compute_uv=False) - expected).max() <= 1e-13
    assert np.array_equal(np.array(task["W"]) + update, task["tuned"])
    A, B = np.array(pair["A"], float), np.array(pair["B"], float)
    assert A.shape == (r, n) and 0.8 / n**0.5 < np.abs(A).max() <= 1 / n**0.5 and abs(A.mean()) < 0.1
    assert B.shape == (n, r) and not B.any() and pair["scaling"] == settings["alpha"] / r
    ours = LoRAPair(Tensor(A, requires_grad=True), Tensor(B, requires_grad=True), settings["alpha"] / r)
    adam = Adam(ours.parameters(), lr=settings["lr"])
    losses = []
    for _ in range(STEPS + 1):
        E = ours(Tensor(np.eye(n))) - Tensor(update.T)
        loss = 0.5 * (E * E).sum()
        losses.append(float(loss.data))
        adam.zero_grad()
        loss.backward()
        if settings["method"] == "adam":
            adam.step()
        else:
            for p in ours.parameters():
                p.data -= settings["lr"] * p.grad
    assert len(run["losses"]) == len(losses) and np.allclose(run["losses"], losses, rtol=1e-9)
    assert not run["diverged"] and losses[-1] < 0.9 * losses[0]


def test_what_the_page_computes_is_what_numpy_and_the_library_compute(found, counted):
    check(found["computed"]["right"], counted)


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_noticed(found, counted, bug):
    with pytest.raises(AssertionError):
        check(found["computed"][bug], counted)


# What a person sees of it, in a frame as narrow as a phone.


def test_the_page_shows_what_minilora_count_counts(found, counted, capsys):
    for settings, shown, expected in zip(COUNTS, found["page"]["counts"], counted, strict=True):
        numbers = {"trainable": shown["trainable"], "total": shown["total"], "memory": shown["memory"]}
        assert numbers == {name: expected[name] for name in numbers}
        assert shown["shown"] == f"{expected['trainable']:,}"
        assert shown["file"] == expected["trainable"] * ITEMSIZES[settings["dtype"]]
    settings, shown = COUNTS[1], found["page"]["counts"][1]
    arguments = ["--target", *settings["targets"]]
    for name in ("r", "dtype", "batch", "length"):
        arguments += [f"--{name}", str(settings[name])]
    assert main(["count", "--base", settings["model"], *arguments]) == 0
    told = capsys.readouterr().out
    for name, *sizes in shown["cells"][1:]:
        (line,) = [line for line in told.splitlines() if line.startswith(name) and "B" in line]
        assert line.removeprefix(name).split() == " ".join(sizes).replace("\xa0", " ").split()
    full, lora = re.search(r"backward .*\ntogether +(\S+ \w+) +(\S+ \w+)", told).groups()
    assert f"takes {full} a step, LoRA {lora}:" in shown["said"].replace("\xa0", " ")


def test_nothing_is_wider_than_a_phone(found):
    assert 300 < found["page"]["width"] <= 360
    assert [shown["overflow"] for shown in found["page"]["counts"]] == [0] * len(COUNTS)


def test_a_value_that_is_none_is_named_and_changes_nothing(found):
    assert found["page"]["wrong"] == [[False, "Rank r must be a whole number from 1 to 256.", True, "true"]] * 4
    assert found["page"]["slid"] == ["16", True, "rank 16"]
    assert all("choose a target" in text for text in found["page"]["nothing"])


def test_the_address_follows_the_controls(found):
    words = dict(word.split("=") for word in found["page"]["address"].lstrip("#").split("&"))
    assert {name: words[name] for name in COUNTS[-1]} == {
        name: ",".join(value) if name == "targets" else str(value) for name, value in COUNTS[-1].items()
    }


def test_quality_is_shown_only_where_it_was_measured(found):
    unlike, like, alpha, other = found["page"]["quality"]
    assert "Measured for these settings: 91 to 104 %" in like and "2 seeds" in like and "40 steps" in like
    assert unlike.startswith("Not measured for minilora-demo") and unlike == other
    assert "128 / 64 = 2;" in alpha and "√r = 16." in alpha
    assert [text.replace("\xa0", " ") for text in found["page"]["measured"]] == [
        "full", "0.003", "2.050", "100 %", "", "r = 1", "0.01", "2.250", "53 %", "50 to 56",
        "r = 64", "0.01", "2.250", "98 %", "91 to 104"]  # fmt: skip
    (note,) = found["page"]["notes"]
    assert note.startswith("40 steps on </script><b>code Seeds 0, 1, on some processor.")


def test_the_matrix_is_decomposed_and_its_error_told(found):
    for shown in found["page"]["low"]:
        sigma, keep = np.array(shown["sigma"]), shown["keep"]
        assert shown["numbers"] == 32 * keep and f"= {32 * keep} numbers instead of 256" in shown["text"]
        assert np.isclose(shown["error"], (sigma[keep:] ** 2).sum() / (sigma**2).sum(), atol=1e-24)
        assert ("nothing is missing" in shown["text"]) == (keep == 16 or (keep, shown["matrix"]) == (4, "rank4"))
    assert {shown["keep"] for shown in found["page"]["low"]} == {0, 4, 16}


def test_the_training_starts_pauses_steps_and_begins_again_by_buttons(found):
    begun, stepped, ran, again, risky, diverged = found["training"]
    assert (begun["steps"], stepped["steps"], again["steps"]) == (0, 2, 0)
    assert begun["loss"] == begun["first"] == again["loss"] > stepped["loss"] > ran["loss"]
    assert "|dL/dA| is 0," in begun["text"] and "|dL/dA| is 0," not in stepped["text"]
    assert "no better than 29.1" in begun["text"] and round(begun["floor"], 3) == 0.291
    assert (begun["run"], ran["name"], ran["run"]) == ("Start", "Pause", "Start")
    assert ran["steps"] == ran["rested"] >= 8
    assert risky["floor"] == 0 and "can reach W′ exactly" in risky["text"]
    assert diverged["diverged"] and diverged["steps"] < 40 and "lower learning rate" in diverged["text"]


def test_each_question_has_one_right_answer_and_says_why_of_every_one(found):
    questions = found["page"]["questions"]
    assert len(questions) == 7
    for question in questions:
        right = [text for text in question["said"] if text.startswith("✓ Right. ")]
        wrong = [text for text in question["said"] if text.startswith("✗ Not so. ")]
        assert len(right) == 1 and len(right + wrong) == len(question["said"]) == 3
        assert question["live"] == "polite" and min(map(len, question["said"])) > 40
    told = " ".join(" ".join(question["said"]) for question in questions).replace("\xa0", " ")
    # 16 bytes for each number of Llama-2-7B; GPT-2, on q and v, and on every linear.
    for number in ("108 GB", "53.9 GB", "24,576 numbers instead of 589,824 are 95.8 % fewer", "589,824 numbers",
                   "2,654,208", "99.53 % and 97.9 %", "124,439,808", "99.88 % and 99.41 %", "16.8 MB", "80.0 MB"):
        assert number in told


def test_a_screen_reader_finds_names_and_headings_in_order(found):
    page = found["page"]
    for nothing in ("nameless", "unreachable", "dangling", "doubled", "small"):
        assert page[nothing] == [], nothing
    assert page["pictures"] == 0
    levels = page["headings"]
    assert levels.count(1) == 1 and levels[0] == 1 and levels.count(2) == 6
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))


def test_the_page_checks_itself_and_says_what_is_wrong(found):
    state, text, on_top, _ = found["checks"]["page"]
    assert state == "passed" and not on_top
    assert text.startswith(f"When it opened, this page checked itself: {len(PRESETS)} counts")
    state, text, on_top, _ = found["checks"]["wrong"]
    assert state == "failed" and text.startswith("Do not trust this page") and on_top
    for part in ("of gpt2 it counts other numbers", "the decomposition misses", "the gradients differ"):
        assert part in text


def test_nothing_is_loaded_and_no_script_runs_but_its_own(found):
    assert found["page"]["loaded"] == []
    assert found["checks"]["unsigned"] == [None, "", False, "LoRA, to play with"]


def test_an_address_sets_the_controls_and_says_what_it_does_not_know(page, tmp_path):
    (tmp_path / "p.html").write_text(page, encoding="utf-8")
    address = "model=smollm2-135m&r=9&targets=gate_proj,nobody&length=9000&foo=1&train-r=4&steps=60&matrix=wavelet"
    picture = tmp_path / "p.png"
    flags = ["--force-prefers-reduced-motion", "--blink-settings=preferredColorScheme=0", "--window-size=500,700"]
    dom = browse(f"{(tmp_path / 'p.html').as_uri()}#{address}", tmp_path, *flags, f"--screenshot={picture}")
    ignored = html.unescape(re.search(r'<p id="ignored"[^>]*>(.*?)</p>', dom)[1])
    assert "says targets=nobody, length=9000, foo=1, matrix=wavelet, which this page does not know" in ignored
    shown = json.loads(html.unescape(re.search(r'id="cost"[^>]*data-numbers="(.*?)"', dom)[1]))
    assert shown["trainable"] == 30 * 9 * (576 + 1536)
    trained = json.loads(html.unescape(re.search(r'id="training"[^>]*data-numbers="(.*?)"', dom)[1]))
    assert trained["steps"] == 60 and trained["loss"] < 0.1 * trained["first"]
    # With less motion wished for, nothing moves: a press of the button is a picture.
    assert re.search(r'<button[^>]*id="run"[^>]*>Run 100 steps</button>', dom)
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG") and struct.unpack(">II", content[16:24]) == (500, 700)
    # Dark: of the bytes of the first lines, which hold no letter, most are those of the ground.
    matplotlib = pytest.importorskip("matplotlib.image", reason="the extra plot, which reads pictures, is not there")
    assert matplotlib.imread(picture)[:8, :, :3].mean() < 0.15


# What needs no browser.


def colours(style):
    """The two themes of the style sheet: {name: colour}, light and dark."""
    light, dark = (dict(re.findall(r"--([\w-]+): (#\w{6});", part)) for part in style.split("@media", 2)[:2])
    assert light.keys() == dark.keys()
    return light, dark


def luminance(colour):
    """The relative luminance of "#rrggbb". Source: WCAG 2.2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_texts_and_marks_can_be_told_from_their_ground():
    assert contrast("#000000", "#ffffff") == 21 and round(contrast("#777777", "#ffffff"), 2) == 4.48
    for theme in colours((module.PAGE / "page.css").read_text(encoding="utf-8")):
        for ground in ("ground", "panel"):
            for text in ("ink", "quiet", "blue", "orange", "green"):
                assert contrast(theme[text], theme[ground]) >= 4.5, (text, ground)
            assert contrast(theme["edge"], theme[ground]) >= 3
        assert contrast(theme["on-accent"], theme["blue"]) >= 4.5
        assert min(contrast(theme[f"bar-{i}"], theme["ground"]) for i in range(1, 6)) >= 3


def test_the_page_is_one_file_that_names_no_other(page):
    assert re.findall(r"https?://[^\"' ]+", page) == ["http://www.w3.org/2000/svg"]
    assert not re.search(r"\bsrc=|@import|url\(|<link|{{|fetch\(|XMLHttpRequest|localStorage|cookie", page)
    assert all(place.startswith("#") for place in re.findall(r'href="(.*?)"', page))
    policy = re.search(r'Content-Security-Policy" content="(.*?)"', page)[1]
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy


def test_a_text_that_was_measured_cannot_leave_its_place(page, data):
    assert data["measured"][0]["setting"] == "40 steps on </script><b>code"
    assert page.count("</script>") == 2 and "<b>code" not in page


@pytest.fixture
def quickly(monkeypatch):
    """The page with two models, and without the checks, which take most of its time."""
    monkeypatch.setattr(module, "PRESETS", {name: PRESETS[name] for name in ("gpt2", "llama-2-7b")})
    monkeypatch.setattr(module, "checks", list)


def test_the_command_writes_the_page_and_writes_it_anew(quickly, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    file = tmp_path / "page.html"
    assert main(["playground", "--html", str(file)]) == 0
    out, err = capsys.readouterr()
    assert err == "" and re.match(rf"kept in {re.escape(str(file))}: one page of [\d,]+ kB; open it", out)
    assert "quality: not measured" in out
    first = file.read_text(encoding="utf-8")
    assert first.startswith(module.MARK) and '"measured": []' in first
    measured = rank_file(tmp_path)
    assert main(["playground", "--html", str(file)]) == 0
    assert f"quality: as measured in {measured}" in capsys.readouterr().out
    assert "some processor" in file.read_text(encoding="utf-8")
    assert {path.name for path in tmp_path.iterdir()} == {"page.html", "rank.json"}


@pytest.mark.parametrize("place, message", [
    (".", "is a folder"), ("nowhere/page.html", "nowhere does not exist"), ("notes.html", "is no such page"),
])  # fmt: skip
def test_no_other_file_is_lost(quickly, place, message, tmp_path, capsys):
    (tmp_path / "notes.html").write_text("<!doctype html><p>Mine")
    assert main(["playground", "--html", str(tmp_path / place)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1
    assert (tmp_path / "notes.html").read_text() == "<!doctype html><p>Mine" and len(list(tmp_path.iterdir())) == 1


def test_a_page_is_written_whole_or_not_at_all(quickly, tmp_path, monkeypatch, capsys):
    file = tmp_path / "page.html"
    file.write_text(f"{module.MARK} of yesterday")

    def fails(*arguments):
        raise OSError("no space")

    monkeypatch.setattr(module.os, "replace", fails)
    assert main(["playground", "--html", str(file)]) == 1
    assert "no space" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"] and file.read_text().endswith("yesterday")


ROW = {"method": "lora", "r": 2, "lr": 0.1, "loss": [1.0, 2.0], "share_of_full": [1.0, 2.0]}


@pytest.mark.parametrize("changes, message", [
    ({"lab": "alpha"}, "its lab is 'alpha', where 'rank' is needed"), ({"quick": True}, "of a run with --quick"),
    ({"setting": "left out"}, "its setting must be a text, got None"), ({"setting": 3}, "got 3"),
    ({"seeds": []}, "its seeds must be a list"), ({"rows": "left out"}, "its rows must be a list"),
    ({"rows": [3]}, "a row must have a method, 'full' or 'lora', got 3"),
    ({"rows": [ROW | {"method": "magic"}]}, "a row must have a method"),
    ({"rows": [ROW | {"r": 0}]}, "its row lora r=0: r must be"), ({"rows": [ROW | {"r": None}]}, "r must be"),
    ({"rows": [ROW | {"r": True}]}, "r must be"), ({"rows": [ROW | {"r": 1.5}]}, "r must be"),
    ({"rows": [ROW | {"lr": "fast"}]}, "lr must be a number, got 'fast'"),
    ({"rows": [ROW | {"loss": [1.0]}]}, "loss must have a number for each of 2 seeds"),
    ({"rows": [ROW | {"loss": [1.0, float("nan")]}]}, "loss must be finite numbers"),
    ({"rows": [ROW | {"share_of_full": None}]}, "share_of_full must have a number for each of 2 seeds"),
])  # fmt: skip
def test_a_file_that_the_lab_did_not_write_is_refused(quickly, changes, message, tmp_path, capsys):
    file = rank_file(tmp_path, **changes)
    assert main(["playground", "--html", str(tmp_path / "p.html"), "--measured", str(file)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and f"{file}: " in err and message in err and err.count("\n") == 1
    assert not (tmp_path / "p.html").exists()


@pytest.mark.parametrize("text, message", [("{", "is not JSON"), ("[]", "expected an object"), (None, "No such file")])
def test_a_file_that_is_none_is_refused(text, message, tmp_path, capsys):
    file = tmp_path / "rank.json"
    if text is not None:
        file.write_text(text)
    assert main(["playground", "--html", str(tmp_path / "p.html"), "--measured", str(file)]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "p.html").exists()
