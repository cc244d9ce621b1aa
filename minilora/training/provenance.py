"""Where an adapter comes from: what is written into its receipt. Knows runs, and no folder."""

import contextlib
import platform
import time

import numpy as np

from .. import __version__
from ..disk.peft import digest_of
from ..disk.receipt import date_text
from .learned import finite, update_sizes
from .run_file import settings_of
from .threads import blas_kernel


def provenance(command, base, fingerprint, parents, updates, run=None):
    """The fields of a receipt (see disk/receipt.py) but for `tensors`, of what is made now.

    `command` is what it is made by, `base` the name of its base, `fingerprint` that one's, or None
    if it is not known. `parents` are the SHA-256 of the files of adapters that it is made of,
    `updates` what `update_sizes` gives, `run` what `of_run` does.
    """
    return {
        "date": date_text(time.time()),
        "command": command,
        "parents": parents,
        "base": {
            "name": str(base),
            "fingerprint": None if fingerprint is None else digest_of(fingerprint),
        },
        "run": run,
        "versions": {
            "minilora": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
        },
        "machine": {"processor": processor(), "blas": blas_kernel()},
        "updates": updates,
    }


def provenance_of(adapter, model, command, base, parents=()):
    """`provenance` of an Adapter for `model` that no run has made; `base` is the model's name."""
    updates = update_sizes(model, adapter)
    return provenance(command, base, adapter.base_fingerprint, list(parents), updates)


def of_run(run, progress, after):
    """What a receipt says of a run that has ended.

    `run` has `typed`, `train_data`, `heldout` and `identity`, as finetune.py makes them;
    `progress` is its Progress, `after` the held-out loss of what is kept, or None.
    """
    config = run.typed
    best_step = None
    if progress.evaluations:
        best_step, _ = progress.best()
    arrays = run.identity["arrays"]
    return {
        "data": {
            "path": str(config.data),
            "sha256": run.identity["data"]["sha256"],
            "trained_on": str(run.train_data),
            "held_out": None if run.heldout is None else str(run.heldout),
        },
        "settings": settings_of(config, arrays),
        "arrays": arrays["module"],
        "parts": arrays["parts (--parts)"],
        "steps": len(progress.losses),
        "tokens": progress.tokens,
        "seconds": progress.seconds,
        # NumPy's numbers are none of JSON's.
        "losses": {
            "first": float(progress.losses[0]),
            "last": float(progress.losses[-1]),
            "held_out_before": finite(progress.before),
            "held_out_after": finite(after),
            "best_step": best_step,
        },
    }


def processor():
    """What this machine computes with, in words: "AMD EPYC 9B14, x86_64"."""
    name = platform.processor()
    # Linux tells its name there alone.
    with contextlib.suppress(OSError), open("/proc/cpuinfo", errors="replace") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        name = names[0] if names else name
    machine = platform.machine()
    return ", ".join(dict.fromkeys(word for word in (name, machine) if word)) or "unknown"
