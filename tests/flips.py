"""Flips: one bit of every byte of every small file that the library writes, in turn, and who notices.

    python tests/flips.py [--step 1] [--only adapter ...] [--json FILE]

A file that was flipped is refused, or it is harmless: what is computed from it is the same, by `==`. Nothing else.
"""

import argparse
import contextlib
import io
import os
import shutil
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from fuzz import keep_results, kept_results
from kills import contents
from tiny_files import RUN, inside, write_all

from minilora import attach, load_adapter, load_model, no_grad
from minilora.cli.main import main as run_program


class Target(NamedTuple):
    """Files that are flipped: the `needs` of tiny_files.py, one `file` of them, and `use()`, what is made of them."""

    needs: tuple
    file: str
    use: object


class Refused(Exception):
    """The program ended with one line."""


def program(*argv):
    """What the program prints; Refused with its last line where it ends with 1."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_program(list(argv))
    if code != 0:
        raise Refused(err.getvalue().strip())
    return out.getvalue(), err.getvalue()


def computed(model):
    """All numbers of a model, and the logits that it gives."""
    with no_grad():
        logits = model(np.arange(12)[None] * 7 % 200).data
    return {name: p.data.tobytes() for name, p in model.named_parameters()}, logits.tobytes()


def use_adapter():
    """The numbers of the model with the adapter."""
    base = load_model("gpt2")
    return computed(attach(base, load_adapter("lora", base, say=lambda line: None)))


def use_model():
    """The numbers of a model that its check has passed."""
    program("inspect", "--verify", "gpt2")
    return computed(load_model("gpt2"))


def use_checkpoint():
    """What the run that goes on from it leaves."""
    program(*RUN, "--resume")
    return contents(Path("run"))


CHECKPOINT = ("gpt2", "q.jsonl", "run", "log.jsonl")
TARGETS = {
    "adapter_model.safetensors": Target(("gpt2", "lora"), "lora/adapter_model.safetensors", use_adapter),
    "adapter_config.json": Target(("gpt2", "lora"), "lora/adapter_config.json", use_adapter),
    "model.safetensors": Target(("gpt2",), "gpt2/model.safetensors", use_model),
    "config.json": Target(("gpt2",), "gpt2/config.json", use_model),
    "checkpoint.safetensors": Target(CHECKPOINT, "run/checkpoint/checkpoint.safetensors", use_checkpoint),
    "checkpoint.json": Target(CHECKPOINT, "run/checkpoint/checkpoint.json", use_checkpoint),
}


def fresh(files, folder, needs):
    """A new folder with these of the files of tiny_files.py."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in needs:
        copy = shutil.copytree if (files / name).is_dir() else shutil.copyfile
        copy(files / name, folder / name)


def outcome(name, place, files, folder, expected):
    """What becomes of a flip at byte `place`: "refused", "harmless", "silent", or what escapes, with its type."""
    target = TARGETS[name]
    fresh(files, folder, target.needs)
    with inside(folder):
        path = Path(target.file)
        content = bytearray(path.read_bytes())
        # Another bit from byte to byte, and no order that numbers of 4 bytes have as well.
        content[place] ^= 1 << (place * 5 + place // 8) % 8
        path.write_bytes(content)
        try:
            found = target.use()
        except (Refused, ValueError, TypeError, OSError):
            return "refused"
        except Exception as error:
            return f"{type(error).__name__}"
    return "harmless" if found == expected else "silent"


def untouched(name, files, folder):
    """What is made of the files as they are."""
    fresh(files, folder, TARGETS[name].needs)
    with inside(folder):
        return TARGETS[name].use()


def flip_all(name, step, files, places=None):
    """{outcome: [places]} of flips at each `step`-th byte of a target, or at `places`."""
    size = (files / TARGETS[name].file).stat().st_size
    found = {}
    with tempfile.TemporaryDirectory(prefix="flips-") as scratch:
        folder = Path(scratch) / "case"
        expected = untouched(name, files, folder)
        for place in range(0, size, step) if places is None else places:
            found.setdefault(outcome(name, place, files, folder, expected), []).append(place)
    return found


def _share(job, files):
    name, places = job
    with contextlib.redirect_stderr(io.StringIO()):
        return name, flip_all(name, 1, files, places)


def main():
    """Run the command at the top of this file; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--step", type=int, default=1, help="flip each so many-th byte")
    parser.add_argument("--only", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--json", metavar="FILE", help="keep the table in a file of results")
    args = parser.parse_args()
    found = {name: {} for name in args.only}
    with tempfile.TemporaryDirectory(prefix="flips-") as scratch:
        files = Path(scratch) / "files"
        write_all(files)
        jobs = []
        for name in args.only:
            places = list(range(0, (files / TARGETS[name].file).stat().st_size, args.step))
            jobs += [(name, places[start : start + 500]) for start in range(0, len(places), 500)]
        with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn")) as pool:
            for name, outcomes in pool.map(partial(_share, files=files), jobs):
                for what, places in outcomes.items():
                    found[name].setdefault(what, []).extend(places)
    counts = {}
    columns = ["refused", "harmless", "silent"]
    for name, outcomes in found.items():
        counted = counts[name] = Counter({what: len(places) for what, places in outcomes.items()})
        escaped = [what for what in counted if what not in columns]
        others = [f"{what} {counted[what]}, first at byte {outcomes[what][0]}" for what in escaped]
        line = ", ".join(f"{counted[what]:,} {what}" for what in columns)
        print(f"{name}: {counted.total():,} flips: {line} {' '.join(others)}")
        if found[name].get("silent"):
            print(f"  silent at bytes {found[name]['silent'][:12]}")
    if args.json:
        # Beside those of other files, which may have been flipped in larger steps.
        kept = kept_results(args.json).get("flips", {})
        for name, counted in counts.items():
            kept[name] = {"step": args.step, "flips": counted.total(), **{what: counted[what] for what in columns}}
        keep_results(args.json, flips={name: kept[name] for name in TARGETS if name in kept})
    wrong = [name for name, counted in counts.items() if set(counted) - {"refused", "harmless"}]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
