"""The whole course by one command: every lab in order, and how long each took.

You learn whether the numbers of the course come out on your machine: each lab prints its table, and
keeps its rows and its picture in the folder of --out; all_labs.json holds the times. The base is
trained once, by the first.

    python examples/all_labs.py [--quick] [--seed 0] [--seeds 3] [--jobs 1] [--out DIR] [LAB ...]

Takes about 35 minutes with three seeds and two jobs on two cores.
"""

# Before the imports that take time: Ctrl-C ends this in one line.
from minilora.cli.ctrl_c import one_line_on_ctrl_c

one_line_on_ctrl_c()

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from course.lab import machine, print_table

from minilora.disk.bases import find_base

HERE = Path(__file__).parent
# In the order of the course.
LABS = [
    "environment",
    "lora_math",
    "lora_layer",
    "gradients",
    "alpha",
    "cost",
    "rank",
    "spectrum",
    "intrinsic",
    "targets",
    "methods",
    "merge",
    "swap",
    "forgetting",
    "compose",
    "quantised",
    "security_qa",
    "troubleshooting",
    "four_domains",
    "incident_json",
]
# Those that measure milliseconds have the machine to themselves, whatever --jobs says.
TIMED = ["cost", "methods", "merge"]
# Those that are about a language model, if no other base is named.
LANGUAGE_MODEL_OF = {"incident_json": "smollm2"}

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("labs", nargs="*", metavar="LAB", help=f"default: {' '.join(LABS)}")
parser.add_argument("--quick", action="store_true", help="a few steps each: does it run here?")
parser.add_argument("--seed", type=int, default=0, help="the first seed")
parser.add_argument("--seeds", type=int, default=1, metavar="N", help="how many seeds")
parser.add_argument("--base", help="another base than the tiny one: smollm2, a folder, a .gguf")
parser.add_argument("--jobs", type=int, default=1, help="labs at once; timed ones run alone")
parser.add_argument("--out", default="minilora-labs", metavar="DIR")
args = parser.parse_args()
for name in args.labs:
    if name not in LABS:
        parser.error(f"there is no lab {name}: {' '.join(LABS)}")
if args.jobs < 1:
    parser.error(f"--jobs {args.jobs}: at least 1")

options = ["--seed", str(args.seed), "--seeds", str(args.seeds), "--out", args.out]
if args.quick:
    options.append("--quick")


def has_base(name):
    """Does this lab ask for a base? Some have only matrices of their own."""
    return "with_base=False" not in (HERE / f"{name}.py").read_text(encoding="utf-8")


def missing_base(name):
    """Why a lab that is about a language model cannot run: None if it can.

    Such a model comes by itself, and not everybody wants one.
    """
    if args.base or name not in LANGUAGE_MODEL_OF:
        return None
    try:
        find_base(LANGUAGE_MODEL_OF[name])
    except OSError as error:
        return str(error)


def run(name):
    """Run one lab: {its name, seconds, exit status}. What it prints comes in one piece."""
    missing = missing_base(name)
    if missing:
        print(f"\n=== {name} is left out: {missing}", flush=True)
        return {"lab": name, "seconds": 0.0, "status": "left out"}
    began = time.perf_counter()
    command = [sys.executable, str(HERE / f"{name}.py"), *options]
    if args.base and has_base(name):
        command += ["--base", args.base]
    # Several bars at once would write over one another.
    lab = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    print(f"\n=== {name}\n{lab.stdout}", flush=True)
    if lab.returncode:
        # A lab that was killed leaves no line.
        lines = lab.stderr.strip().splitlines() or [f"exit status {lab.returncode}"]
        print(f"{name}: {lines[-1]}", file=sys.stderr)
    return {"lab": name, "seconds": seconds, "status": "ok" if lab.returncode == 0 else "FAILED"}


names = args.labs or LABS
began = time.perf_counter()
# The first lab that needs the base makes it, for all others.
needs_base = [has_base(name) for name in names]
n_before = needs_base.index(True) + 1 if any(needs_base) else 0
alone = [name for i, name in enumerate(names) if i < n_before or name in TIMED]
outcomes = {name: run(name) for name in alone}
with ThreadPoolExecutor(args.jobs) as pool:
    others = [name for name in names if name not in alone]
    outcomes |= dict(zip(others, pool.map(run, others), strict=True))
rows = [outcomes[name] for name in names]
total = time.perf_counter() - began
rows.append({"lab": "all of them", "seconds": total, "status": ""})
Path(args.out).mkdir(parents=True, exist_ok=True)
file = Path(args.out) / "all_labs.json"
kept = {"labs": rows, "seeds": args.seeds, "jobs": args.jobs, "quick": args.quick}
file.write_text(json.dumps(kept | {"machine": machine()}, indent=1) + "\n", encoding="utf-8")
print()
print_table({"lab": ("lab", ""), "seconds": ("seconds", ".1f"), "status": ("", "")}, rows)
if any(row["status"] == "FAILED" for row in rows):
    sys.exit(1)
