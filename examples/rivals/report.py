"""Rounds become medians, medians a table and JSON; what they were measured on. Knows no library."""

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import numpy as np

from .turns import GEMM
from .workloads import NEW, flops, tokens

LIMIT = 0.05  # of the machine, used by others: from there on a round is not a quiet one
COLUMNS = ("size", "task", "library", "ms", "first / it", "tokens/s", "peak MB", "at start", "of GEMM floor")
FORMAT = "{:<10}  {:<10}  {:<14}{:>10}{:>15}{:>11}{:>9}{:>10}{:>15}".format


def quiet(foreign):
    """Which rounds count: those without foreign load if they are at least half, else all of them."""
    clean = [i for i, share in enumerate(foreign) if share is None or share <= LIMIT]
    return clean if 2 * len(clean) >= len(foreign) else list(range(len(foreign)))


def medians(outcome, work, task, reference):
    """One dict per contestant that lived: medians over the rounds that count; `ratio` is the median of the ratios.

    `ratio` is the time of `reference` over this one's, round by round: 2 says that `reference` takes twice as long.
    `share` is the time that the task's products would take at the best measured rate, over the time it took; not said
    of bf16, whose products are others.
    """
    counted = quiet(outcome["foreign"])
    rounds = [outcome["rounds"][i] for i in counted]
    rates = [outcome["rates"][i] for i in counted if outcome["rates"][i]]
    best = max(median(column) for column in zip(*rates, strict=True)) if rates else None
    rows = []
    for label in (label for label in outcome["memory"] if label != GEMM and rounds and label in rounds[0]):
        seconds = median(r[label] for r in rounds)
        ratio = median(r[reference] / r[label] for r in rounds) if reference in rounds[0] else None
        share = flops(work, task) / best / seconds if best and "bf16" not in label else None
        rows.append({"library": label, "seconds": seconds, "ratio": ratio, "tokens_per_s": tokens(work, task) / seconds,
                     "peak_bytes": outcome["memory"][label]["peak"], "start_bytes": outcome["memory"][label]["start"],
                     "share": share})  # fmt: skip
    return {"flops": flops(work, task), "gemm_flops_per_s": best, "rows": rows}


def lines(size, task, rows):
    """The rows of `medians` as lines of the table."""
    for row in rows:
        ratio, share = row["ratio"], row["share"]
        yield FORMAT(
            size, task, row["library"], f"{1e3 * row['seconds']:,.2f}", "" if ratio is None else f"{ratio:.2f}",
            f"{row['tokens_per_s']:,.0f}", f"{row['peak_bytes'] / 1e6:,.0f}", f"{row['start_bytes'] / 1e6:,.0f}",
            "" if share is None else f"{100 * share:.0f} %",
        )  # fmt: skip


def remarks(size, task, outcome):
    """What the table does not tell of one contest: who died, whose tokens differ, and how quiet the machine was."""
    where, foreign = f"{size} {task}", outcome["foreign"]
    for label, why in outcome["failed"].items():
        yield f"{where}: {label} ended: {why}"
    for label in (label for label, same in outcome["same_tokens"].items() if not same):
        yield f"{where}: {label} wrote other tokens (with random weights, rounding can decide)"
    loud = sum(share is not None and share > LIMIT for share in foreign)
    if loud:
        left_out = "left out" if len(quiet(foreign)) < len(foreign) else "counted all the same, they are too many"
        yield f"{where}: {loud} of {len(foreign)} rounds had foreign load, at most {max(foreign):.0%}; {left_out}"


def machine(threads):
    """What the numbers were measured on, as a dict."""
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    packages = ("minilora", "numpy", "threadpoolctl", "torch", "transformers", "peft", "jax")
    return {
        "cpu": cpu_name(), "cores": os.cpu_count(), "threads": threads, "system": platform.platform(),
        "python": platform.python_version(), "blas": f"{blas.get('name')} {blas.get('version')}",
        "versions": {name: found for name in packages if (found := installed(name))},
        "foreign_load_is_seen": Path("/proc/stat").exists(),
    }  # fmt: skip


def heading(found):
    """The lines above the table: what `machine` found."""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    load = "" if found["foreign_load_is_seen"] else "; foreign load cannot be seen on this system"
    return (f"{found['cpu']}, {found['cores']} cores; {found['threads']} threads for each process{load}\n"
            f"python {found['python']}, {versions}; NumPy's BLAS: {found['blas']}\n"
            f"ms: median of a step, a pass or {NEW} tokens. first / it: median ratio of the first row's time to this "
            "one's\nMB: resident, at most, and after import. GEMM floor: the task's products at the best rate of "
            "NumPy's BLAS in the same rounds\nminilora keeps freed memory, as its commands do; NAME-malloc: so does "
            "the other")  # fmt: skip


def installed(package):
    """Its version, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_name(info="/proc/cpuinfo"):
    """The processor's name as Linux tells it, or what Python knows elsewhere."""
    try:
        entries = (line.partition(":") for line in Path(info).read_text(encoding="utf-8").splitlines())
        return next(value.strip() for key, _, value in entries if key.strip() == "model name")
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def save(path, results):
    """Write the JSON anew, whole at every moment."""
    part = Path(f"{path}.part")
    part.write_text(json.dumps(results, indent=1), encoding="utf-8")
    part.replace(path)
