"""minilora on an NVIDIA GPU, beside PyTorch, transformers + PEFT: is it right, and how fast.

You learn whether the tests pass on this GPU, whether the demo runs there, and what a LoRA step and
writing cost in each library, in time and in memory of the GPU. The shapes are those of GPT-2 small,
of a GPT of 350 million and of SmolLM2-135M, with random weights, in float32 and in TF32. Each
library runs in a process of its own, with the same base, adapter and batch, and must compute the
same loss. The processes are called in turn, and the median of the ratios of each round is reported.

    python examples/gpu.py [--quick] [--phase tests small ...] [--json FILE]

Everything is kept in results/gpu.json, after each phase. A phase that fails or takes too long costs
no other one: they come in the order of their importance, and each is told what time is left. It
takes at most eight minutes: what runs then is ended. With --quick the shapes are small. Without a
GPU it ends with one line and status 2. PyTorch, transformers and PEFT come with
pip install -e '.[peers]'; what is missing is left out, and said.
"""

# Before the imports that take time: Ctrl-C ends this in one line.
from minilora.cli.ctrl_c import one_line_on_ctrl_c

one_line_on_ctrl_c()

import argparse
import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

from compared import llm_inputs, report
from compared.inputs import write_inputs
from compared.llm_workloads import LlmWorkload
from compared.rounds import DifferentResults, Program
from compared.session import session
from compared.workloads import Workload

from minilora import __version__
from minilora.backend import array_module

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "examples" / "results" / "gpu.json"
PEERS = ("torch", "transformers", "peft")
# Seconds for everything; and with less than LEAST left, a phase is not begun.
BUDGET = 470
LEAST = 15
# TF32 has 11 significant bits, an eighth of the error of bfloat16, for which benchmark.py allows
# 2e-2.
TF32_TOLERANCE = 2.5e-3

SMALL = Workload(layers=12, width=768, heads=12, T=256, batch=8, vocabulary=50257, new=64)
MEDIUM = Workload(layers=24, width=1024, heads=16, T=256, batch=8, vocabulary=50257, new=64)
SMOLLM2 = LlmWorkload(
    layers=30, width=576, inner=1536, heads=9, kv_heads=3, head_dim=64, vocabulary=49152,
    T=256, batch=8, new=64,
)  # fmt: skip
WORKLOADS = {"small": SMALL, "350M": MEDIUM, "smollm2": SMOLLM2}
QUICK_WORKLOADS = {
    "small": Workload(layers=2, width=32, heads=2, T=16, batch=2, vocabulary=97, new=8),
    "350M": Workload(layers=3, width=32, heads=4, T=16, batch=2, vocabulary=97, new=8),
    "smollm2": LlmWorkload(
        layers=2, width=32, inner=48, heads=4, kv_heads=2, head_dim=8, vocabulary=97,
        T=32, batch=2, new=8,
    ),
}  # fmt: skip

# What was aimed at: our time over theirs, both in float32, and our memory over theirs.
TIME_TARGETS = {"small": 1.0, "350M": 0.9}
MEMORY_TARGET = 0.8
# Whose time is put over whose.
PAIRS = {
    "step": [("minilora", "transformers"), ("minilora-tf32", "transformers-tf32")],
    "generate": [("minilora", "transformers"), ("minilora", "transformers-merged")],
}
LEGEND = (
    "ms: median of a step, or of writing. MB: of the GPU, at most, while one unit runs: in use by\n"
    "arrays, which leaves out what the libraries of CUDA take, but for the workspace of PyTorch's\n"
    "products; and held by the allocator, which had given back what it did not use"
)
ROW = "{:<10}{:<12}{:<21}{:>10}{:>12}{:>10}{:>10}".format
RATIO = "{:<10}{:<12}{:<44}{:>7}  {}".format


NO_MODULE = r"E\s+ModuleNotFoundError: No module named '(\w+)"


class Failed(Exception):
    """A phase did not do what it is for: the message says why, in one line."""


class Phase(NamedTuple):
    """A part of the whole: `most` seconds of it at most, and a size and a task to compare, or "".

    `run` is called with the session, the phase, the command line and the `time.monotonic()` at
    which it must have ended. It returns what is to be kept of it, a dict.
    """

    run: object
    most: float
    size: str = ""
    task: str = ""


# --- the tests and the demo: commands ---


def run_tests(running, phase, args, deadline):
    """The tests that need a GPU, with eight processes if pytest-xdist is here."""
    command = [sys.executable, "-m", "pytest", "-m", "cupy", "-p", "no:cacheprovider"]
    # A file that needs what is not installed here keeps no other from running.
    command += ["--continue-on-collection-errors", "-o", "addopts="]
    if importlib.util.find_spec("xdist"):
        command += ["-n", "8"]
    if args.quick:
        command.append("tests/test_kernels.py")
    status, lines = run_command(command, deadline)
    return verdict_of_tests(status, lines)


def verdict_of_tests(status, lines):
    """{"output": ...} of pytest's lines. Raises: Failed unless what failed are imports alone."""
    absent = sorted({found[1] for line in lines if (found := re.match(NO_MODULE, line))})
    summary = lines[-1].strip("= ") if lines else "it printed nothing"
    if absent:
        summary += f" (not installed: {', '.join(absent)})"
    if status and (not absent or re.search(r"\d+ failed|no tests ran|interrupted", summary)):
        raise Failed(f"status {status}: {summary}")
    return {"output": [*lines[-20:], summary]}


def run_demo(running, phase, args, deadline):
    """The quick form of the demo."""
    command = [sys.executable, "-m", "minilora", "demo", "--quick", "--backend", "cupy"]
    status, lines = run_command([*command, "--out", str(running.folder / "demo")], deadline)
    last = lines[-1] if lines else "it printed nothing"
    if status:
        raise Failed(f"status {status}: {last}")
    return {"output": lines[-20:]}


def run_command(command, deadline):
    """(its status, the lines that it printed). Raises: Failed if its time is over."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        # Ctrl-C is for this process, which then ends the other.
        start_new_session=True,
    )
    try:
        printed, _ = process.communicate(timeout=deadline - time.monotonic())
    except subprocess.TimeoutExpired:
        raise Failed("its time was over") from None
    finally:
        end(process)
    return process.returncode, [line for line in printed.splitlines() if line.strip()]


def end(process):
    """End the process and those that it started, if they have not ended."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def paths():
    """PYTHONPATH for a process that imports minilora from this clone."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


# --- the benchmark: programs of compared/ ---


def programs(size, task, alone):
    """The Programs of one comparison, minilora first: the losses of all must be those of it."""
    llama = size == "smollm2"
    ours = "numpy_llama" if llama else "numpy_minilora"
    theirs = "transformers_llama" if llama else "transformers_peft"
    # A Llama's is merged before it writes as it is.
    merged = "" if llama else "merged"
    here = Program("minilora", ours, merged if task == "generate" else "", task, device="cuda")
    there = Program("transformers", theirs, "", task, device="cuda")
    if task == "generate":
        chosen = [here, there, there._replace(label="transformers-merged", variant="merged")]
    else:
        in_tf32 = lambda program: program._replace(
            label=f"{program.label}-tf32", variant="tf32", tolerance=TF32_TOLERANCE
        )
        chosen = [here, in_tf32(here), there, in_tf32(there)]
    return [program for program in chosen if not (alone and program.module == theirs)]


def run_comparison(running, phase, args, deadline):
    """One task in every library, at one size."""
    size = phase.size
    work = (QUICK_WORKLOADS if args.quick else WORKLOADS)[size]
    chosen = programs(size, phase.task, args.alone)
    try:
        outcome = running.measure(size, work, phase.task, chosen, deadline)
    except DifferentResults as error:
        raise Failed(str(error)) from None
    rounds = [outcome["rounds"][i] for i in report.quiet_rounds(outcome["foreign"])]
    rows = rows_of(outcome, rounds, work.tokens(phase.task))
    if not rows:
        raise Failed("; ".join(f"{label}: {why}" for label, why in outcome["failed"].items()))
    kept = {"shape": work._asdict(), "rows": rows, "over": ratios_of(phase, rounds, rows)}
    return {**kept, **outcome}


def rows_of(outcome, rounds, n_tokens):
    """One dict for each program that ran to the end."""
    rows = []
    for label, memory in outcome["memory"].items():
        times = [each[label] for each in rounds if label in each]
        if times and label not in outcome["failed"]:
            seconds = median(times)
            rate = n_tokens / seconds
            row = {"library": label, "seconds": seconds, "tokens_per_s": rate, **memory["device"]}
            rows.append(row)
    return rows


def ratios_of(phase, rounds, rows):
    """[what, ours over theirs, what was aimed at or None], for each of PAIRS that was measured."""
    memory = {row["library"]: row["allocated"] for row in rows}
    over = report.paired(rounds)
    generates = phase.task == "generate"
    found = []
    for ours, theirs in PAIRS["generate" if generates else "step"]:
        if not {ours, theirs} <= memory.keys():
            continue
        aims = ours == "minilora" and not generates
        time_target = TIME_TARGETS.get(phase.size) if aims else None
        found.append([f"time, over {theirs}", over[ours][theirs], time_target])
        memory_target = MEMORY_TARGET if aims else None
        found.append([f"memory, over {theirs}", memory[ours] / memory[theirs], memory_target])
    return found


# In the order of their importance.
PHASES = {
    "tests": Phase(run_tests, 150),
    "small": Phase(run_comparison, 90, "small", "lora"),
    "350M": Phase(run_comparison, 110, "350M", "lora"),
    "smollm2": Phase(run_comparison, 90, "smollm2", "all-linear"),
    "demo": Phase(run_demo, 90),
    "small-writes": Phase(run_comparison, 60, "small", "generate"),
    "smollm2-writes": Phase(run_comparison, 60, "smollm2", "generate"),
    "350M-writes": Phase(run_comparison, 60, "350M", "generate"),
}


# --- the whole ---


def arguments():
    """The command line, with the defaults filled in."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="small shapes, one round, a part of the tests")
    add("--phase", nargs="+", choices=PHASES, default=list(PHASES), help="default: all")
    add("--rounds", type=int, help="how often each is called; default 7, with --quick 1")
    add("--budget", type=float, default=BUDGET, help="seconds for everything (default %(default)s)")
    add("--json", type=Path, help="default: results/gpu.json, and with --quick no file")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    args.absent = [name for name in PEERS if report.installed_version(name) is None]
    args.alone = bool(args.absent)
    if args.rounds is None:
        args.rounds = 1 if args.quick else 7
    args.rounds = max(1, args.rounds)
    if args.json is None and not args.quick:
        args.json = RESULTS
    return args


def described_gpu():
    """What the GPU is, as a dict. Raises: Failed if there is none."""
    try:
        runtime = array_module("cupy").cuda.runtime
        properties = runtime.getDeviceProperties(0)
        found = {
            "name": properties["name"].decode(),
            "memory_bytes": int(properties["totalGlobalMem"]),
            "cuda_of_the_driver": runtime.driverGetVersion(),
            "cuda_of_the_runtime": runtime.runtimeGetVersion(),
        }
    # No CuPy, no driver, no GPU: each has an exception of its own.
    except Exception as error:
        raise Failed(f"this needs CuPy and an NVIDIA GPU: {error}") from None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        asked = subprocess.run(query, capture_output=True, encoding="utf-8", timeout=20)
        found["driver"] = asked.stdout.strip()
    return found


def run_phases(running, args, deadline):
    """Run each phase, print how it ended, and keep that."""
    for name in args.phase:
        phase = PHASES[name]
        running.current = name
        # A size is that of a folder of inputs, and those of Llama's family have other inputs.
        running.write = llm_inputs.write_inputs if phase.size == "smollm2" else write_inputs
        began = time.monotonic()
        kept = {}
        failed = ""
        if deadline - began < LEAST:
            failed = f"left out: {max(0, deadline - began):.0f} seconds were left"
        else:
            try:
                kept = phase.run(running, phase, args, min(deadline, began + phase.most))
            except Failed as error:
                failed = str(error)
        took = time.monotonic() - began
        print(f"{name + ':':<17}{took:6.1f} s  {failed or last_words(kept)}", flush=True)
        summary = {"phase": name, "took": took, "why_failed": failed}
        running.add(phase.size, phase.task, summary, kept)


def last_words(kept):
    """How a phase ended: the last line of a command, or which programs failed."""
    if "output" in kept:
        return kept["output"][-1]
    failed = [f"without {label}: {why}" for label, why in kept["failed"].items()]
    return "; ".join(failed) or "measured"


def print_tables(results):
    """What was measured: by program, and as ratios with what was aimed at."""
    measured = [each for each in results if "rows" in each]
    print(f"\n{LEGEND}")
    print(ROW("size", "task", "library", "ms", "tokens/s", "MB used", "MB held"))
    for each in measured:
        for row in each["rows"]:
            numbers = [f"{1e3 * row['seconds']:,.1f}", f"{row['tokens_per_s']:,.0f}"]
            numbers += [f"{row[key] / 1e6:,.0f}" for key in ("allocated", "reserved")]
            print(ROW(each["size"], each["task"], row["library"], *numbers))
    print("\nminilora over theirs, in the same precision; below 1, minilora takes less")
    print(RATIO("size", "task", "what", "ratio", "aimed at"))
    for each in measured:
        for what, ratio, target in each["over"]:
            verdict = ""
            if target is not None:
                verdict = f"{target:.2f}: {'holds' if ratio <= target else 'does not hold'}"
            print(RATIO(each["size"], each["task"], what, f"{ratio:.2f}", verdict))
    for each in results:
        if each["why_failed"]:
            print(f"{each['phase']} failed: {each['why_failed']}")


def main():
    """Run what the command line asks for, within the budget, and print what came of it."""
    deadline = time.monotonic()
    args = arguments()
    deadline += args.budget
    # Before CuPy is imported anywhere: compiling takes a tenth of the time.
    os.environ["CUPY_NVRTC_USE_PCH"] = "1"
    try:
        gpu = described_gpu()
    except Failed as error:
        print(f"gpu.py: {error}", file=sys.stderr)
        sys.exit(2)
    os.environ["PYTHONPATH"] = paths()
    seconds = 0.05 if args.quick else 0.4
    with session(1, args.rounds, seconds, args.seed, args.json) as running:
        # One folder for the kernels of all processes: each is compiled once.
        os.environ.setdefault("CUPY_CACHE_DIR", str(running.folder / "kernels"))
        running.machine["gpu"] = gpu
        running.machine["versions"]["minilora"] = __version__
        print(report.machine_lines(running.machine))
        print("; ".join(f"{key} {value}" for key, value in gpu.items()))
        if args.absent:
            missing = ", ".join(args.absent)
            print(f"not installed: {missing}; minilora is measured alone")
        run_phases(running, args, deadline)
        print_tables(running.results)


if __name__ == "__main__":
    main()
