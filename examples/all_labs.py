"""The whole course by one command: every lab in order, and how long each took.

You learn whether the numbers of the course come out on your machine: each lab prints its table, and
keeps its rows and its picture in the folder of --out. The base is trained once, by the first.

    python examples/all_labs.py [--quick] [--seed 0] [--seeds 3] [--jobs 1] [--out DIR] [LAB ...]

Takes about half an hour with three seeds on two cores, ten minutes with one, less than a minute
with --quick.
"""

# Before the imports that take time: Ctrl-C ends this in one line.
from minilora.cli.ctrl_c import one_line_on_ctrl_c

one_line_on_ctrl_c()

import argparse
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from course.lab import print_table

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
]

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("labs", nargs="*", metavar="LAB", help=f"default: {' '.join(LABS)}")
parser.add_argument("--quick", action="store_true", help="a few steps each: does it run here?")
parser.add_argument("--seed", type=int, default=0, help="the first seed")
parser.add_argument("--seeds", type=int, default=1, metavar="N", help="how many seeds")
parser.add_argument("--base", help="another base than the tiny one: smollm2, a folder, a .gguf")
parser.add_argument("--jobs", type=int, default=1, help="labs at once; times are then no times")
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


def run(name):
    """Run one lab: {its name, seconds, exit status}. What it prints comes in one piece."""
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
rows = [run(name) for name in names[:n_before]]
with ThreadPoolExecutor(args.jobs) as pool:
    rows += pool.map(run, names[n_before:])
total = time.perf_counter() - began
rows.append({"lab": "all of them", "seconds": total, "status": ""})
print()
print_table({"lab": ("lab", ""), "seconds": ("seconds", ".1f"), "status": ("", "")}, rows)
if any(row["status"] == "FAILED" for row in rows):
    sys.exit(1)
