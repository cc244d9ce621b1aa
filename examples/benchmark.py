"""minilora beside PyTorch, transformers + PEFT and JAX: time, tokens/s, memory, and how near the products' own time.

You learn what training LoRA costs in each library on this machine, and how near each comes to the time of the matrix
products alone, at the best rate that NumPy's BLAS shows here. Each library runs in a process of its own, loads the same
folder, and must compute the same loss; they are called in turn, and the median of the per-round ratios is reported. How
each is written is in rivals/; the variants torch-compile (torch.compile), torch-bf16 (autocast) and torch-malloc (freed
memory kept, as minilora does) are named as such.

    python examples/benchmark.py [--quick] [--workload tiny mid small] [--task lora full ...] [--json FILE]

Without the others (pip install -e '.[peers]', and JAX) it measures minilora alone. Takes under a minute with --quick;
the whole takes about an hour on two cores, and all libraries together 16 GB for "small".
"""

from minilora.cli.ctrl_c import one_line_on_ctrl_c

one_line_on_ctrl_c()

import argparse
import sys
import tempfile
from pathlib import Path

from rivals import report
from rivals.material import write
from rivals.turns import GEMM, Contestant, Disagreement, contest
from rivals.workloads import DISTINCT, ROWS, SCALING, TASKS, WORKLOADS

from minilora.training.threads import cores

LIBRARIES = {  # name in the table: (file in rivals/, variant, what must be installed, how near its loss must be)
    "minilora": ("numpy_minilora", "", ["numpy"], 1e-4),
    "torch": ("torch_by_hand", "", ["torch"], 1e-4),
    "torch-compile": ("torch_by_hand", "compile", ["torch"], 1e-4),
    "torch-bf16": ("torch_by_hand", "bf16", ["torch"], 2e-2),
    "torch-malloc": ("torch_by_hand", "malloc", ["torch"], 1e-4),
    "transformers": ("transformers_peft", "", ["transformers", "peft", "torch"], 1e-4),
    "jax": ("jax_jit", "", ["jax"], 1e-4),
}
NOT_MADE = {("torch-compile", "generate"), ("torch-bf16", "generate")}  # a cache that grows would be compiled anew
EAGER = ("minilora", "torch", "transformers")  # what --quick and the scaling compare: nothing to compile


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny alone, three tasks, few rounds, nothing compiled")
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, help="default: all; with --quick, tiny")
    parser.add_argument("--task", nargs="+", choices=TASKS, help="; ".join(f"{k}: {v}" for k, v in TASKS.items()))
    parser.add_argument("--against", nargs="*", choices=LIBRARIES, help="default: all that are installed")
    parser.add_argument("--rounds", type=int, help="how often each is called; default 9, with --quick 3")
    parser.add_argument("--threads", type=int, help="for each process; default: the cores this one may use")
    parser.add_argument("--json", type=Path, help="write everything measured to this file, after each contest")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    absent = {name: [p for p in lib[2] if not report.installed(p)] for name, lib in LIBRARIES.items()}
    if asked := [f"{name} needs {' and '.join(absent[name])}" for name in args.against or () if absent[name]]:
        parser.error("; ".join(asked))
    args.workload = args.workload or (["tiny"] if args.quick else list(WORKLOADS))
    args.task = args.task or (["lora", "full", "generate"] if args.quick else list(TASKS))
    args.rounds = (3 if args.quick else 9) if args.rounds is None else max(1, args.rounds)
    args.threads = args.threads or cores()
    if args.against is None:
        args.against = [name for name in (EAGER if args.quick else LIBRARIES) if not absent[name]]
        if missing := sorted({package for packages in absent.values() for package in packages}):
            print(f"not installed: {', '.join(missing)}; pip install -e '.[peers]' jax brings all of them")
    return args


def contests(args):
    """(name of the size, Workload, task, contestants) of each contest, in order."""
    names = ["minilora", *(name for name in LIBRARIES if name in args.against and name != "minilora")]
    all_of = lambda task, chosen: [Contestant(n, *LIBRARIES[n][:2], task, LIBRARIES[n][3]) for n in chosen]
    for size in args.workload:
        for task in (task for task in args.task if task != "scaling"):
            chosen = [n for n in names if (n, task) not in NOT_MADE]
            yield size, WORKLOADS[size], task, all_of(task, chosen)
    if "scaling" in args.task:
        for size, work in SCALING.items():
            yield size, work, "lora", all_of("lora", [n for n in names if n in EAGER])
        for task in ("forward", "lora"):  # the adapters hold the same numbers, so the first losses are the same
            label = lambda n: f"stack of {n}" if n else "attached"
            rows = [Contestant(label(n), "numpy_minilora", str(n), task, steps=1) for n in (0, *DISTINCT)]
            yield f"{ROWS.batch} rows", ROWS, task, rows


def main():
    args = arguments()
    results, remarks = {"machine": report.machine(args.threads), "seed": args.seed, "results": []}, []
    print(report.heading(results["machine"]), report.FORMAT(*report.COLUMNS), sep="\n")
    with tempfile.TemporaryDirectory() as folder:
        try:
            for size, work, task, contestants in contests(args):
                place = Path(folder) / size
                if not place.exists():
                    write(work, place, args.seed)
                contestants = [*contestants, Contestant(GEMM, "numpy_minilora", "", GEMM)]
                outcome = contest(contestants, place, args.threads, args.rounds, 0.1 if args.quick else 0.4)
                summary = report.medians(outcome, work, task, contestants[0].label)
                for line in report.lines(size, task, summary["rows"]):
                    print(line, flush=True)
                remarks += report.remarks(size, task, outcome)
                results["results"].append({"size": size, "task": task, "shape": work._asdict(), **summary, **outcome})
                if args.json:
                    report.save(args.json, results)
        except Disagreement as error:
            sys.exit(f"stopped at {size}: {error}")
        except KeyboardInterrupt:
            remarks.append(f"interrupted at {size} {task}, which is left out")
    for remark in remarks:
        print(remark)


if __name__ == "__main__":
    main()
