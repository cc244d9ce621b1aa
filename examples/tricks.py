"""What each trick that makes minilora fast buys, measured by switching it off, one at a time.

You learn which of them matter on this machine, for a small model and for a large one, in time and in memory, and that
some buy nothing here. Each trick is switched off in a process of its own, by putting the textbook's version in place
(minilora/functional.py), and must compute the same loss; the processes are called in turn, and the median of the
per-round ratios is reported.
The row "nothing" is the same program twice: what is not further from 1 than it, is noise.

    python examples/tricks.py [--quick] [--workload tiny mid small] [--trick NAME ...] [--json FILE]

Takes about ten seconds with --quick; in full half an hour on two cores, and 12 GB for "small".
"""

from minilora.cli.ctrl_c import one_line_on_ctrl_c

one_line_on_ctrl_c()

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import median

from rivals import report
from rivals.ablations import NOISE, TRICKS
from rivals.material import write
from rivals.turns import Contestant, Disagreement, contest
from rivals.workloads import TASKS, WORKLOADS

from minilora.training.threads import cores

ON = "all on"
QUICK = (NOISE, "no gradient for frozen weights", "gelu: that, and x*x*x for x**3", "a cache of keys and values")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny alone, a few tricks, two rounds")
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, help="default: all; with --quick, tiny")
    parser.add_argument("--trick", nargs="+", choices=TRICKS, metavar="NAME", help="; ".join(TRICKS))
    parser.add_argument("--rounds", type=int, help="how often each is called; default 9, with --quick 2")
    parser.add_argument("--threads", type=int, help="for each process; default: the cores this one may use")
    parser.add_argument("--at-once", type=int, default=4, help="tricks in one contest; fewer need less memory")
    parser.add_argument("--json", type=Path, help="write everything measured to this file, after each contest")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.workload = args.workload or (["tiny"] if args.quick else list(WORKLOADS))
    args.trick = args.trick or (QUICK if args.quick else list(TRICKS))
    args.rounds, args.threads = args.rounds or (2 if args.quick else 9), args.threads or cores()
    return args


def groups(args):
    """(task, tricks) of each contest: no more tricks than fit into memory at once, each beside the same reference."""
    for task in TASKS:
        chosen = [name for name in args.trick if task in TRICKS[name].tasks]
        if chosen == [NOISE] != args.trick:  # noise beside nothing
            continue
        for start in range(0, len(chosen), args.at_once):
            yield task, chosen[start : start + args.at_once]


def measure(outcome, labels):
    """{label: (seconds, off / on, peak bytes, off - on)}: medians over the rounds that count."""
    rounds, memory = [outcome["rounds"][i] for i in report.quiet(outcome["foreign"])], outcome["memory"]
    return {
        label: (median(r[label] for r in rounds), median(r[label] / r[ON] for r in rounds),
                memory[label]["peak"], memory[label]["peak"] - memory[ON]["peak"])
        for label in labels if label not in outcome["failed"]
    }  # fmt: skip


def line(name, task, cells):
    """A row: two cells for each workload."""
    return f"{name:<34}{task:<10}" + "".join(f"{time:>12}{memory:>11}" for time, memory in cells)


def main():
    args = arguments()
    results, remarks, told = {"machine": report.machine(args.threads), "seed": args.seed, "results": []}, [], set()
    print(*report.heading(results["machine"]).splitlines()[:2], sep="\n")
    print("time: off / on, median of the ratios; MB: peak after loading, off - on; all on: one unit, and peak\n")
    print(line("switched off", "task", [(f"{size}: time", "MB") for size in args.workload]), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        try:
            for task, tricks in groups(args):
                variants = {ON: "", **{name: name for name in tricks}}
                contestants = [Contestant(name, "ablations", variant, task) for name, variant in variants.items()]
                rows = []
                for size in args.workload:
                    place = Path(folder) / size
                    if not place.exists():
                        write(WORKLOADS[size], place, args.seed)
                    outcome = contest(contestants, place, args.threads, args.rounds, 0.05 if args.quick else 0.4)
                    rows.append(measure(outcome, [ON, *tricks]))
                    remarks += report.remarks(size, task, outcome)
                    results["results"].append({"size": size, "task": task, "measured": rows[-1], **outcome})
                    if args.json:
                        report.save(args.json, results)
                if task not in told:
                    told.add(task)
                    print(line(ON, task, [(f"{1e3 * row[ON][0]:,.1f} ms", f"{row[ON][2] / 1e6:,.0f}") for row in rows]))
                for name in tricks:
                    cells = [row.get(name) for row in rows]
                    cells = [(f"{c[1]:.2f}", f"{round(c[3] / 1e6):+,}") if c else ("ended", "") for c in cells]
                    print(line(name, task, cells), flush=True)
        except Disagreement as error:
            sys.exit(f"stopped at {size}: {error}")
        except KeyboardInterrupt:
            remarks.append(f"interrupted at {task}, {', '.join(tricks)}, which is left out")
    for remark in remarks:
        print(remark)


if __name__ == "__main__":
    main()
