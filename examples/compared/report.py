"""From rounds to medians, from medians to a table; and the machine they were measured on."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import numpy as np

from .rounds import GEMM
from .workloads import NEW

# A round in which others used more than this part of the machine is not a quiet one.
FOREIGN_LIMIT = 0.05
FORMAT = "{:<10}  {:<10}  {:<20}{:>10}{:>15}{:>11}{:>9}{:>10}{:>15}".format
HEADER = FORMAT(
    "size",
    "task",
    "library",
    "ms",
    "first / it",
    "tokens/s",
    "peak MB",
    "at start",
    "of GEMM floor",
)


def quiet_rounds(foreign):
    """The numbers of the rounds that count: those without foreign load, or all if those are few."""
    quiet = [i for i, share in enumerate(foreign) if share is None or share <= FOREIGN_LIMIT]
    if 2 * len(quiet) >= len(foreign):
        return quiet
    return list(range(len(foreign)))


def medians(outcome, work, task, reference):
    """One dict for each program that ran to the end, of medians over the rounds that count.

    `ratio` is the time of `reference` over that of this program, the median of the ratios of each
    round: 2 means that `reference` takes twice as long. `share` is the time that the products of
    the task would take at the best measured rate, over the time of this program. bf16 has none: its
    products are others.
    """
    counted = quiet_rounds(outcome["foreign"])
    rounds = [outcome["rounds"][i] for i in counted]
    best_rate = _best_rate([outcome["rates"][i] for i in counted])
    n_flops = work.flops(task)
    rows = []
    for label, memory in outcome["memory"].items():
        if label == GEMM or not rounds or label not in rounds[0]:
            continue
        seconds = median(times[label] for times in rounds)
        ratio = None
        if reference in rounds[0]:
            ratio = median(times[reference] / times[label] for times in rounds)
        share = None
        if best_rate is not None and "bf16" not in label:
            share = n_flops / best_rate / seconds
        rows.append(
            {
                "library": label,
                "seconds": seconds,
                "ratio": ratio,
                "tokens_per_s": work.tokens(task) / seconds,
                "peak_bytes": memory["peak"],
                "start_bytes": memory["start"],
                "share": share,
            }
        )
    return {"flops": n_flops, "gemm_flops_per_s": best_rate, "rows": rows}


def paired(rounds):
    """{label: {other: the median of label's time over other's}} of rounds {label: seconds}.

    Each ratio is made within one round, so that what slows a whole round down counts in neither.
    """
    labels = list(dict.fromkeys(label for times in rounds for label in times))
    ratios = {}
    for label in labels:
        ratios[label] = {}
        for other in labels:
            both = [times for times in rounds if label in times and other in times]
            if both:
                ratios[label][other] = median(times[label] / times[other] for times in both)
    return ratios


def _best_rate(rates):
    """The median FLOP/s of the shape that has the highest; None if no round has rates."""
    by_shape = zip(*[rate for rate in rates if rate], strict=True)
    return max((median(column) for column in by_shape), default=None)


def table_lines(size, task, rows):
    """The rows of `medians` as lines under HEADER."""
    for row in rows:
        yield FORMAT(
            size,
            task,
            row["library"],
            f"{1e3 * row['seconds']:,.2f}",
            "" if row["ratio"] is None else f"{row['ratio']:.2f}",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['peak_bytes'] / 1e6:,.0f}",
            f"{row['start_bytes'] / 1e6:,.0f}",
            "" if row["share"] is None else f"{100 * row['share']:.0f} %",
        )


def remarks(size, task, outcome):
    """What the table does not show: who ended, whose tokens differ, how quiet the machine was."""
    where = f"{size} {task}"
    for label, why in outcome["failed"].items():
        yield f"{where}: {label} ended: {why}"
    for label, same in outcome["same_tokens"].items():
        if not same:
            yield f"{where}: {label} wrote other tokens (with random weights, rounding can decide)"
    foreign = outcome["foreign"]
    loud = [share for share in foreign if share is not None and share > FOREIGN_LIMIT]
    if loud:
        consequence = "left out"
        if len(quiet_rounds(foreign)) == len(foreign):
            consequence = "counted all the same, they are too many"
        yield (
            f"{where}: {len(loud)} of {len(foreign)} rounds had foreign load, "
            f"at most {max(loud):.0%}; {consequence}"
        )


def describe_machine(threads):
    """What the numbers are measured on, as a dict."""
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    packages = ("minilora", "numpy", "threadpoolctl", "torch", "transformers", "peft", "jax")
    packages += ("cupy-cuda12x", "cupy-cuda13x")
    versions = {package: installed_version(package) for package in packages}
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "system": platform.platform(),
        "python": platform.python_version(),
        "blas": f"{blas.get('name')} {blas.get('version')}",
        "versions": {package: number for package, number in versions.items() if number},
        "foreign_load_is_seen": Path("/proc/stat").exists(),
    }


def machine_lines(machine):
    """Two lines on what `describe_machine` found."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    warning = ""
    if not machine["foreign_load_is_seen"]:
        warning = "; foreign load cannot be seen on this system"
    return (
        f"{machine['cpu']}, {machine['cores']} cores; "
        f"{machine['threads']} threads for each process{warning}\n"
        f"python {machine['python']}, {versions}; NumPy's BLAS: {machine['blas']}"
    )


LEGEND = (
    f"ms: median of a step, a pass or {NEW} tokens. "
    "first / it: median ratio of the first row's time to this one's\n"
    "MB: resident, at most, and after import. "
    "GEMM floor: the task's products at the best rate of NumPy's BLAS in the same rounds\n"
    "minilora keeps freed memory, as its commands do; NAME-malloc: so does the other"
)


def installed_version(package):
    """The version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_name(info="/proc/cpuinfo"):
    """The processor's name as Linux gives it, or what Python knows elsewhere."""
    try:
        lines = Path(info).read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()
