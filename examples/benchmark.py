"""minilora beside PyTorch, transformers + PEFT and JAX: time, memory, and what is left to gain.

You learn what training LoRA costs in each library on this machine, and how near each comes to the
time of the matrix products alone, at the best rate that NumPy's BLAS shows here. Each library runs
in a process of its own, loads the same folder, and must compute the same loss. The processes are
called in turn, and the median of the ratios of each round is reported. How each is written is in
compared/. The variants torch-compile (torch.compile), torch-bf16 (autocast) and torch-malloc (freed
memory kept, as minilora does) are named as such.

    python examples/benchmark.py [--quick] [--workload tiny mid small] [--task lora full ...]

Without the others (pip install -e '.[peers]', and JAX) it measures minilora alone. Takes under a
minute with --quick; the whole takes about an hour on two cores, and 16 GB for "small".
"""

# Before the imports that take time: Ctrl-C ends this in one line.
from minilora.cli.ctrl_c import one_line_on_ctrl_c

one_line_on_ctrl_c()

import argparse
from pathlib import Path
from typing import NamedTuple

from compared import report
from compared.rounds import GEMM, Program
from compared.session import session
from compared.workloads import DISTINCT, ROWS, SCALING, TASKS, WORKLOADS, Workload

from minilora.training.threads import cores


class Library(NamedTuple):
    """A file of compared/ and a variant of it, what it imports, and how near its loss must be."""

    module: str
    variant: str
    packages: tuple
    tolerance: float = 1e-4


LIBRARIES = {
    "minilora": Library("numpy_minilora", "", ("numpy",)),
    "torch": Library("torch_by_hand", "", ("torch",)),
    "torch-compile": Library("torch_by_hand", "compile", ("torch",)),
    "torch-bf16": Library("torch_by_hand", "bf16", ("torch",), tolerance=2e-2),
    "torch-malloc": Library("torch_by_hand", "malloc", ("torch",)),
    "transformers": Library("transformers_peft", "", ("transformers", "peft", "torch")),
    "jax": Library("jax_jit", "", ("jax",)),
}
# Not measured: a cache that grows would be compiled anew for each token.
NOT_MADE = {("torch-compile", "generate"), ("torch-bf16", "generate")}
# Those with nothing to compile, which --quick and the scaling compare.
EAGER = ("minilora", "torch", "transformers")


class Comparison(NamedTuple):
    """Programs that do the same task on the same workload; `size` is its name in the table."""

    size: str
    workload: Workload
    task: str
    programs: list


def arguments():
    """The command line, with the defaults filled in."""
    tasks = "; ".join(f"{name}: {what}" for name, what in TASKS.items())
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="tiny, three tasks, few rounds, nothing compiled")
    add("--workload", nargs="+", choices=WORKLOADS, help="default: all; with --quick, tiny")
    add("--task", nargs="+", choices=TASKS, help=tasks)
    add("--against", nargs="*", choices=LIBRARIES, help="default: all that are installed")
    add("--rounds", type=int, help="how often each is called; default 9, with --quick 3")
    add("--threads", type=int, help="for each process; default: the cores this one may use")
    add("--json", type=Path, help="write everything measured to this file, after each comparison")
    add("--seed", type=int, default=0)
    args = parser.parse_args()

    absent = {name: absent_packages(library) for name, library in LIBRARIES.items()}
    if args.against is None:
        candidates = EAGER if args.quick else LIBRARIES
        args.against = [name for name in candidates if not absent[name]]
        if any(absent.values()):
            print(install_hint(absent.values()))
    elif any(absent[name] for name in args.against):
        parser.error(install_hint(absent[name] for name in args.against))
    if args.workload is None:
        args.workload = ["tiny"] if args.quick else list(WORKLOADS)
    if args.task is None:
        args.task = ["lora", "full", "generate"] if args.quick else list(TASKS)
    if args.rounds is None:
        args.rounds = 3 if args.quick else 9
    args.rounds = max(1, args.rounds)
    args.threads = args.threads or cores()
    return args


def absent_packages(library):
    """Those of its packages that are not installed."""
    return [name for name in library.packages if report.installed_version(name) is None]


def install_hint(absent):
    """One line on the packages of several lists, and how to install them."""
    names = sorted({name for packages in absent for name in packages})
    return f"not installed: {', '.join(names)}; pip install -e '.[peers]' jax brings all of them"


def program(name, task):
    """The Program that does `task` in the library of this name."""
    library = LIBRARIES[name]
    return Program(name, library.module, library.variant, task, library.tolerance)


def comparisons(workloads, tasks, against):
    """Each Comparison, in the order of the table; minilora, which the ratios refer to, is first."""
    names = ["minilora"]
    names += [name for name in LIBRARIES if name in against and name != "minilora"]
    for size in workloads:
        for task in tasks:
            if task != "scaling":
                made = [name for name in names if (name, task) not in NOT_MADE]
                programs = [program(name, task) for name in made]
                yield Comparison(size, WORKLOADS[size], task, programs)
    if "scaling" in tasks:
        for size, workload in SCALING.items():
            programs = [program(name, "lora") for name in names if name in EAGER]
            yield Comparison(size, workload, "lora", programs)
        for task in ("forward", "lora"):
            yield Comparison(f"{ROWS.batch} rows", ROWS, task, adapters_in_one_batch(task))


def adapters_in_one_batch(task):
    """One adapter for all rows of a batch, and stacks of several, all in minilora.

    The adapters hold the same numbers, so the first losses are the same, and the later ones differ.
    """
    programs = [Program("attached", "numpy_minilora", "0", task, steps=1)]
    for n in DISTINCT:
        programs.append(Program(f"stack of {n}", "numpy_minilora", str(n), task, steps=1))
    return programs


def main():
    """Measure what the command line asks for, and print a line for each program."""
    args = arguments()
    seconds = 0.1 if args.quick else 0.4
    with session(args.threads, args.rounds, seconds, args.seed, args.json) as running:
        print(report.machine_lines(running.machine))
        print(report.LEGEND)
        print(report.HEADER)
        for size, workload, task, programs in comparisons(args.workload, args.task, args.against):
            floor = Program(GEMM, "numpy_minilora", "", GEMM)
            outcome = running.measure(size, workload, task, [*programs, floor])
            summary = report.medians(outcome, workload, task, reference=programs[0].label)
            for line in report.table_lines(size, task, summary["rows"]):
                print(line, flush=True)
            running.add(size, task, {"shape": workload._asdict(), **summary}, outcome)


if __name__ == "__main__":
    main()
