"""What `count` prints: the parameters, bytes and FLOPs of a model and its LoRA, from shapes alone.

Knows shapes and what they cost; no array of a model is read or made.
"""

import difflib
import textwrap
from pathlib import Path
from typing import NamedTuple

from ..architectures import PRESETS, blank, blank_quantized
from ..count import parameter_report
from ..disk.base_files import is_json
from ..disk.bases import SMOLLM2, find_base
from ..disk.models import families_of, load_model_config
from ..disk.peft import blank_peft_adapter
from ..lora import attach
from ..lora_config import LoRAConfig
from ..memory import human_bytes, human_flops, model_training_bytes
from ..packed import StoredTensor
from ..step_cost import itemsize_of, rule_of_thumb_flops, step_cost
from .folders import check_source

# Tokens in a row where nothing else is said, as in `finetune`.
LENGTH = 256
_PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "moments": "Adam's moments",
    "master": "master copy",
    "activations": "activations",
}
_NOT_COUNTED = (
    "Activations: what minilora keeps for backward, with no layer dropping out. Not counted: "
    "temporary arrays (scores of a block of queries, logits of some rows, a weight while it is "
    "widened, gradients on their way), on a small model as much again; the program and the data."
)


class CountJob(NamedTuple):
    """What to count.

    base: a name of PRESETS, or what `find_base` takes, or a config.json. ranks: one r or several.
    target: names, or "all-linear". dtype: of weights, gradients and activations. batch rows of
    `length` tokens (None: LENGTH, or the model's context if that is shorter).
    """

    base: str
    ranks: list
    target: list | str
    dtype: str
    batch: int
    length: int | None


def count(job, log):
    """Print what training costs: in full, with LoRA, and with LoRA on a base of 4 bits (QLoRA).

    Of several ranks each has a line; of one, all parts are printed.
    Raises: ValueError for a base that is not known, targets that it has not, an r larger than a
    weight, or rows longer than its context; what reading a configuration raises.
    """
    config = shape_of(job.base)
    length = job.length or min(LENGTH, config.block_size)
    full = blank(config)
    ways = [Ways(full, job, length, r) for r in job.ranks]
    total = parameter_report(full).total
    log(f"{job.base}: {total:,} parameters")
    log(f"  {families_of(full)[0].describe(config)}")
    if len(ways) > 1:
        _log_ranks(ways, job, length, log)
    else:
        _log_adapter(ways[0], job, log)
        _log_memory(ways[0], job, length, log)
        _log_flops(ways[0], total, job.batch * length, log)


class Ways:
    """What the three ways to train `full`, a model without numbers, take; LoRA has rank `r`.

    report: the ParameterReport of LoRA; memory: {"full", "LoRA", "QLoRA": TrainingBytes}; steps:
    {"full", "LoRA": StepCost}.
    """

    def __init__(self, full, job, length, r):
        # As a loader gives it: frozen.
        base = full.map_tensors(lambda t: StoredTensor(t.data))
        # alpha changes no count.
        config = LoRAConfig(r=r, alpha=r, target_modules=job.target)
        adapter = blank_peft_adapter(base, config)
        lora = attach(base, adapter, check_base=False)
        qlora = attach(blank_quantized(base), adapter, check_base=False)
        self.r = r
        self.report = parameter_report(lora)
        models = {"full": full, "LoRA": lora, "QLoRA": qlora}
        arguments = (job.batch, length, job.dtype)
        self.memory = {way: model_training_bytes(models[way], *arguments) for way in models}
        self.steps = {way: step_cost(models[way], *arguments) for way in ("full", "LoRA")}

    def share(self):
        """The share of parameters that LoRA trains, with four digits."""
        return f"{100 * self.report.trainable / self.report.total:.4g} %"


def shape_of(base):
    """The configuration that `base` names: what a path holds, smollm2's, or a known model's.

    A path that exists comes first, as everywhere. Capitals do not count in a name, nor what stands
    before a slash: meta-llama/Llama-3.1-8B is llama-3.1-8b.
    Raises: ValueError with the nearest names if there is none; what reading a configuration raises.
    """
    path = Path(base)
    if base.strip() and path.exists():
        if not is_json(path):
            path = find_base(base)
            check_source(path, "model")
        return load_model_config(path)
    name = base.rpartition("/")[2].lower()
    if name in PRESETS:
        return PRESETS[name]
    if base == SMOLLM2:
        return load_model_config(find_base(base))
    near = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.5)
    hint = f"known are {', '.join(PRESETS)}"
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    raise ValueError(
        f"--base {base!r} is no path and no known model (a folder, config.json, .gguf or smollm2 "
        f"would do too); {hint}"
    )


def _log_ranks(ways, job, length, log):
    """A line for each rank."""
    full = ways[0].memory["full"].together
    _log_setting(job, length, log)
    log(
        f"In full it takes {human_bytes(full)} and {human_flops(ways[0].steps['full'].flops)} a "
        f"step; LoRA on {_targets(job)}:"
    )
    log(
        f"{'r':>6} {'trainable':>14} {'share':>10}" + _cells(["adapter", "LoRA", "QLoRA", "a step"])
    )
    for way in ways:
        n = way.report.trainable
        cells = [human_bytes(n * itemsize_of(job.dtype))]
        cells += [human_bytes(way.memory[name].together) for name in ("LoRA", "QLoRA")]
        cells.append(human_flops(way.steps["LoRA"].flops))
        log(f"{way.r:>6} {n:>14,} {way.share():>10}" + _cells(cells))
    _log_note(ways[0], job, log)


def _log_adapter(way, job, log):
    """How many numbers are trained, and what they take in a file."""
    n = way.report.trainable
    log(
        f"LoRA r={way.r} on {_targets(job)}: {n:,} of {way.report.total:,} parameters are "
        f"trainable ({way.share()})"
    )
    sizes = f"{human_bytes(n * itemsize_of(job.dtype))} in {job.dtype}"
    if job.dtype != "float32":
        sizes += f", {human_bytes(n * itemsize_of('float32'))} in float32"
    log(f"  the adapter takes {sizes}")


def _targets(job):
    return job.target if isinstance(job.target, str) else ", ".join(job.target)


def _log_memory(way, job, length, log):
    """The table of bytes: a line for each part, a column for each way to train."""
    _log_setting(job, length, log)
    log(f"{'':<15}" + _cells(way.memory))
    for part, title in _PARTS.items():
        sizes = [getattr(memory, part) for memory in way.memory.values()]
        # Without 16 bits there is no master copy.
        if any(sizes):
            log(f"{title:<15}" + _cells(map(human_bytes, sizes)))
    sums = [memory.together for memory in way.memory.values()]
    log(f"{'together':<15}" + _cells(map(human_bytes, sums)))
    _log_note(way, job, log)


def _log_setting(job, length, log):
    log("")
    log(
        f"Memory of training in {job.dtype} with Adam, {job.batch} x {length} = "
        f"{job.batch * length:,} tokens a step"
    )


def _log_note(way, job, log):
    """What is counted, and what is not."""
    moments = "float64" if job.dtype == "float64" else "float32"
    note = f"QLoRA: the linears of the base in NF4, the rest of it in {job.dtype}. "
    note += f"Adam's moments are {moments}"
    if way.memory["full"].master:
        note += ", as is the master copy of what is trained"
    log(textwrap.fill(f"{note}. {_NOT_COUNTED}", 100))


def _log_flops(way, n_parameters, n_tokens, log):
    """The table of FLOPs. QLoRA multiplies what LoRA does."""
    log("")
    log("FLOPs of the matrix products of a step (QLoRA's are LoRA's)")
    log(f"{'':<15}" + _cells(way.steps))
    for part in ("forward", "backward", "flops"):
        title = "together" if part == "flops" else part
        numbers = [getattr(step, part) for step in way.steps.values()]
        log(f"{title:<15}" + _cells(map(human_flops, numbers)))
    rule = human_flops(rule_of_thumb_flops(n_parameters, n_tokens))
    log(f"The rule of thumb for full fine-tuning, 6 x parameters x tokens: {rule}")


def _cells(texts):
    return "".join(f" {text:>12}" for text in texts)
