"""Where an adapter comes from: what a run writes into its receipt. Knows a run, and no folder."""

import contextlib
import platform
import time

import numpy as np

from .. import __version__
from ..disk.peft import digest_of
from ..disk.receipt import date_text
from .run_file import settings_of
from .threads import blas_kernel


def provenance(run, progress, after, command):
    """The fields of a receipt (see disk/receipt.py) but for `tensors`, of a run that has ended now.

    `run` has `config`, `learned`, `train_data`, `heldout` and `identity`, as finetune.py makes
    them; `progress` is its Progress, `after` the held-out loss of what is kept, or None. `command`
    is what the run was started with.
    """
    config = run.config
    best_step = None
    if progress.evaluations:
        best_step, _ = progress.best()
    arrays = run.identity["arrays"]
    return {
        "date": date_text(time.time()),
        "command": command,
        "parent": run.learned.origin,
        "base": {"name": str(config.base), "fingerprint": digest_of(run.learned.fingerprint)},
        "data": {
            "path": str(config.data),
            "sha256": run.identity["data"]["sha256"],
            "trained_on": str(run.train_data),
            "held_out": None if run.heldout is None else str(run.heldout),
        },
        "settings": settings_of(config, arrays),
        "parts": arrays["parts (--parts)"],
        "versions": {
            "minilora": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
        },
        "machine": {
            "arrays": arrays["module"],
            "processor": processor(),
            "blas": blas_kernel(),
        },
        "steps": len(progress.losses),
        "tokens": progress.tokens,
        "seconds": progress.seconds,
        "losses": {
            "first": float(progress.losses[0]),
            "last": float(progress.losses[-1]),
            "held_out_before": None if progress.before is None else float(progress.before),
            "held_out_after": None if after is None else float(after),
            "best_step": best_step,
        },
        "updates": run.learned.update_sizes(),
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
