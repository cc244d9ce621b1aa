"""What each trick that makes minilora fast buys, measured by switching it off, one at a time.

You learn which of them matter on this machine, for a small model and for a large one, in time and
in memory, and that some buy nothing here. Each trick is switched off in a process of its own, by
putting the textbook's version in place (minilora/functional.py), and must compute the same loss.
The processes are called in turn, and the median of the ratios of each round is reported. The row
"nothing" is the same program twice: what is not further from 1 than it, is noise.

    python examples/tricks.py [--quick] [--workload tiny mid small] [--trick NAME ...]

Takes about ten seconds with --quick; in full half an hour on two cores, and 12 GB for "small".
"""

# Before the imports that take time: Ctrl-C ends this in one line.
from minilora.cli.ctrl_c import one_line_on_ctrl_c

one_line_on_ctrl_c()

import argparse
from pathlib import Path
from statistics import median

from compared import report
from compared.ablations import ABLATIONS, NOISE
from compared.rounds import Program
from compared.session import session
from compared.workloads import TASKS, WORKLOADS

from minilora.training.threads import cores

# The label of the program in which nothing is switched off.
ON = "all on"
QUICK = (
    NOISE,
    "no gradient for frozen weights",
    "gelu: that, and x*x*x for x**3",
    "a cache of keys and values",
)


def arguments():
    """The command line, with the defaults filled in."""
    names = "; ".join(ABLATIONS)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="tiny alone, a few tricks, two rounds")
    add("--workload", nargs="+", choices=WORKLOADS, help="default: all; with --quick, tiny")
    add("--trick", nargs="+", choices=ABLATIONS, metavar="NAME", help=names)
    add("--rounds", type=int, help="how often each is called; default 9, with --quick 2")
    add("--threads", type=int, help="for each process; default: the cores this one may use")
    add("--at-once", type=int, default=4, help="tricks in one group; fewer need less memory")
    add("--json", type=Path, help="write everything measured to this file, after each group")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.workload is None:
        args.workload = ["tiny"] if args.quick else list(WORKLOADS)
    if args.trick is None:
        args.trick = list(QUICK if args.quick else ABLATIONS)
    args.rounds = args.rounds or (2 if args.quick else 9)
    args.threads = args.threads or cores()
    return args


def groups(names, at_once):
    """(task, names) of what is measured together, at most `at_once` beside one reference."""
    for task in TASKS:
        at_work = [name for name in names if task in ABLATIONS[name].tasks]
        # Noise is measured beside others; alone it is if nothing else was asked for.
        if at_work == [NOISE] and list(names) != [NOISE]:
            continue
        for start in range(0, len(at_work), at_once):
            yield task, at_work[start : start + at_once]


def cost_of_each(outcome, labels):
    """{label: (seconds, off / on, peak bytes, off - on)}, medians over the rounds that count."""
    rounds = [outcome["rounds"][i] for i in report.quiet_rounds(outcome["foreign"])]
    peak = {label: memory.get("peak") for label, memory in outcome["memory"].items()}
    costs = {}
    for label in labels:
        if label in outcome["failed"]:
            continue
        seconds = median(times[label] for times in rounds)
        ratio = median(times[label] / times[ON] for times in rounds)
        costs[label] = (seconds, ratio, peak[label], peak[label] - peak[ON])
    return costs


def table_line(name, task, cells):
    """A line of the table, with two cells, time and memory, for each workload."""
    columns = [f"{time:>12}{memory:>11}" for time, memory in cells]
    return f"{name:<34}{task:<10}" + "".join(columns)


def reference_cells(costs):
    """The two cells of the program in which nothing is switched off: one unit, and the peak."""
    seconds, _, peak, _ = costs[ON]
    return f"{1e3 * seconds:,.1f} ms", f"{peak / 1e6:,.0f}"


def ablation_cells(costs, name):
    """The two cells of one ablation: the ratio of the times, and the difference of the peaks."""
    if name not in costs:
        return "ended", ""
    _, ratio, _, more = costs[name]
    return f"{ratio:.2f}", f"{round(more / 1e6):+,}"


def main():
    """Measure what the command line asks for, and print a line for each ablation."""
    args = arguments()
    seconds = 0.05 if args.quick else 0.4
    with session(args.threads, args.rounds, seconds, args.seed, args.json) as running:
        print(report.machine_lines(running.machine))
        print("time: off / on, median of the ratios. MB: peak after loading, off - on")
        print(f"{ON}: the time of one unit, and the peak\n")
        titles = [(f"{size}: time", "MB") for size in args.workload]
        print(table_line("switched off", "task", titles), flush=True)
        tasks_with_reference = set()
        for task, names in groups(args.trick, args.at_once):
            programs = [Program(ON, "ablations", "", task)]
            programs += [Program(name, "ablations", name, task) for name in names]
            costs_by_size = []
            for size in args.workload:
                outcome = running.measure(size, WORKLOADS[size], task, programs)
                costs = cost_of_each(outcome, [ON, *names])
                costs_by_size.append(costs)
                running.add(size, task, {"measured": costs}, outcome)
            if task not in tasks_with_reference:
                tasks_with_reference.add(task)
                cells = [reference_cells(costs) for costs in costs_by_size]
                print(table_line(ON, task, cells))
            for name in names:
                cells = [ablation_cells(costs, name) for costs in costs_by_size]
                print(table_line(name, task, cells), flush=True)


if __name__ == "__main__":
    main()
