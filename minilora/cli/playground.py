"""The playground: one HTML file that counts, decomposes and trains in its reader's browser.

Knows the shapes of models, and how the file is put together. What it does there is in page/.
"""

import base64
import hashlib
import json
import math
import os
from pathlib import Path

from .. import __version__
from ..architectures import PRESETS, blank, blank_quantized
from ..count import n_parameters
from ..disk.reading import open_regular, read_object
from ..lean import QUERY_BLOCK
from ..lora import linear_names
from ..packed import PackedTensor
from ..step_cost import ITEMSIZES
from .counting import CountJob, Ways

PAGE = Path(__file__).with_name("page")
# In the order in which each needs the ones before it.
SCRIPTS = (
    "matrices.js",
    "training.js",
    "counting.js",
    "step.js",
    "quiz.js",
    "drawing.js",
    "settings.js",
    "cost.js",
    "low_rank.js",
    "live.js",
    "measured.js",
    "page.js",
)
# The first line of the page, by which it is known again.
MARK = "<!doctype html><!-- minilora playground -->"
# What the lab on the rank has measured, where the package lies in its repository.
RESULTS = Path(__file__).parents[2] / "examples" / "results"
# {base of the lab: the model of this page that has its shape}
MODELS = {"tiny": "minilora-demo", "smollm2": "smollm2-135m"}
# What the controls show first, by their names on the page.
START = {
    "model": "gpt2",
    "r": 8,
    "alpha": 16,
    "dtype": "bfloat16",
    "batch": 4,
    "length": 512,
    "train-r": 2,
    "train-k": 4,
    "train-alpha": 4,
    "train-method": "adam",
    "train-lr": 0.01,
    "train-seed": 1,
}


def write_playground(file, measured, log):
    """Write the page to `file`, which is new, or such a page to be written anew.

    `measured` has the files that the lab on the rank has left; None for those of the repository.
    Raises: ValueError or OSError, before anything is written, if another file or a folder is in
    its place, or for what `read_measured` refuses.
    """
    file = Path(file)
    _check_place(file)
    if measured is None:
        measured = [path for name in ("rank.json", "rank_*.json") for path in RESULTS.glob(name)]
    text = playground([read_measured(results) for results in measured])
    _write_whole(file, text)
    log(f"kept in {file}: one page of {len(text.encode()) / 1e3:,.0f} kB; open it in a browser")
    if measured:
        log(f"quality: as measured in {', '.join(map(str, measured))}")
    else:
        log("quality: not measured; python examples/rank.py measures it, --measured shows it")


def _check_place(file):
    """Raise unless the page can be written to `file`, and no other file would be lost."""
    if file.is_dir():
        raise ValueError(f"{file} is a folder; choose a name for the page in it")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"{file.parent} does not exist; make the folder of the page first")
    if not file.exists():
        return
    with open_regular(file) as page:
        beginning = page.read(len(MARK))
    if beginning != MARK.encode():
        raise ValueError(f"{file} exists and is no such page; choose another name")


def playground(measured=()):
    """The page as a text. `measured` has what `read_measured` returns, for each file."""
    script = '"use strict";\n' + "\n".join(_part(name) for name in SCRIPTS)
    style = _part("page.css")
    data = {
        "models": [shapes(name, config) for name, config in PRESETS.items()],
        "dtypes": [{"name": name, "bytes": size} for name, size in ITEMSIZES.items()],
        "query_block": QUERY_BLOCK,
        "start": START,
        "checks": checks(),
        "measured": list(measured),
    }
    page = _part("page.html")
    page = page.replace("{{policy}}", _policy(script, style))
    page = page.replace("{{version}}", __version__)
    page = page.replace("{{style}}", style)
    page = page.replace("{{script}}", script)
    # Last: what was measured is a text of somebody else, in which no mark is looked for.
    return page.replace("{{data}}", _embedded(data))


def _part(name):
    return (PAGE / name).read_text(encoding="utf-8")


def _policy(script, style):
    """A Content-Security-Policy under which nothing is loaded, and only these two texts count."""
    return (
        f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _digest(text):
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _embedded(data):
    """JSON that stays inside its element, whatever texts it holds."""
    return json.dumps(data, allow_nan=False).replace("<", "\\u003c")


def shapes(name, config):
    """What the page has to know of a model: a dict of sizes, for JSON.

    `linears` has, for each kind of linear layer, its name, in, out, and in how many layers it is.
    """
    model = blank(config)
    modules = dict(model.named_modules())
    linears = {}
    for path in linear_names(model):
        kind = path.rpartition(".")[2]
        layer = modules[path]
        sizes = {"in": layer.in_features, "out": layer.out_features}
        linears.setdefault(kind, {"name": kind, **sizes, "layers": 0})["layers"] += 1
    packed = [p for p in blank_quantized(model).parameters() if isinstance(p, PackedTensor)]
    attention = [layer for path, layer in modules.items() if path.endswith("attn")]
    vocabulary, width = model.head_layer().weight.shape
    return {
        "name": name,
        "total": n_parameters(model),
        "linears": list(linears.values()),
        "layers": len(model.blocks()),
        "width": width,
        "vocabulary": vocabulary,
        "context": config.block_size,
        "heads": attention[0].n_head,
        "rotary": getattr(config, "positions", "rope") == "rope",
        "norm": type(modules["ln_f" if "ln_f" in modules else "norm"]).__name__,
        "packed_numbers": sum(p.size for p in packed),
        "packed_bytes": sum(p.nbytes for p in packed),
    }


def checks():
    """[{settings, expected}]: a setting for each model, and what this library counts for it.

    The page counts the same when it opens, and says if a number differs.
    """
    found = []
    for i, (name, config) in enumerate(PRESETS.items()):
        targets = ["q_proj", "v_proj"]
        if i % 2:
            targets = kinds_of_linears(blank(config))
        settings = {
            "model": name,
            "r": 8 + i,
            "targets": targets,
            "dtype": list(ITEMSIZES)[i % len(ITEMSIZES)],
            "batch": 1 + i % 3,
            "length": min(500, config.block_size),
        }
        found.append({"settings": settings, "expected": count(settings)})
    return found


def kinds_of_linears(model):
    """The last part of the names of its linear layers, each once."""
    return list(dict.fromkeys(name.rpartition(".")[2] for name in linear_names(model)))


def count(settings):
    """What `minilora count` counts for `settings` of the page: a dict for JSON.

    Raises: ValueError as that command.
    """
    job = CountJob(
        settings["model"],
        [settings["r"]],
        settings["targets"],
        settings["dtype"],
        settings["batch"],
        settings["length"],
    )
    ways = Ways(blank(PRESETS[job.base]), job, job.length, settings["r"])
    return {
        "trainable": ways.report.trainable,
        "total": ways.report.total,
        "memory": {name: memory._asdict() for name, memory in ways.memory.items()},
        "work": {name: step.flops for name, step in ways.steps.items()},
    }


def read_measured(file):
    """What the lab on the rank has measured, for the page: a dict of fields of its file.

    Raises: OSError; ValueError that names what is not as that lab writes it.
    """
    file = Path(file)
    measured = read_object(file)
    try:
        _check_measured(measured)
    except ValueError as error:
        raise ValueError(f"{file}: {error}; examples/rank.py writes such a file") from None
    machine = measured.get("machine")
    base = measured.get("base")
    fields = ("method", "r", "lr", "loss", "share_of_full")
    return {
        "model": MODELS.get(base) if isinstance(base, str) else None,
        "setting": measured["setting"],
        "seeds": measured["seeds"],
        "cpu": machine.get("cpu") if isinstance(machine, dict) else None,
        "rows": [{key: row.get(key) for key in fields} for row in measured["rows"]],
    }


def _check_measured(measured):
    """Raise ValueError unless this is the whole file of a run of the lab on the rank."""
    if measured.get("lab") != "rank":
        raise ValueError(f"its lab is {measured.get('lab')!r}, where 'rank' is needed")
    if measured.get("quick"):
        raise ValueError("it is of a run with --quick, which shows that the lab runs and no more")
    if not isinstance(measured.get("setting"), str):
        raise ValueError(f"its setting must be a text, got {measured.get('setting')!r}")
    for key in ("seeds", "rows"):
        if not isinstance(measured.get(key), list) or not measured[key]:
            raise ValueError(f"its {key} must be a list that is not empty")
    for row in measured["rows"]:
        _check_row(row, len(measured["seeds"]))


def _check_row(row, n_seeds):
    if not isinstance(row, dict) or row.get("method") not in ("full", "lora"):
        raise ValueError(f"a row must have a method, 'full' or 'lora', got {row!r}")
    name = f"its row {row.get('method')} r={row.get('r')}"
    if row["method"] == "lora" and not (type(row.get("r")) is int and row["r"] >= 1):
        raise ValueError(f"{name}: r must be a whole number of at least 1")
    if not _is_number(row.get("lr")):
        raise ValueError(f"{name}: lr must be a number, got {row.get('lr')!r}")
    for key in ("loss", "share_of_full"):
        values = row.get(key)
        if not isinstance(values, list) or len(values) != n_seeds:
            raise ValueError(f"{name}: {key} must have a number for each of {n_seeds} seeds")
        if not all(_is_number(value) for value in values):
            raise ValueError(f"{name}: {key} must be finite numbers, got {values}")


def _is_number(value):
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value)


def _write_whole(file, text):
    """Write `text` to `file` at once: whoever looks sees all of it, or what was there before."""
    part = file.with_name(f".{file.name}.part")
    try:
        part.write_text(text, encoding="utf-8", newline="\n")
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
