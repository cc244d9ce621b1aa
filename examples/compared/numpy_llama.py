"""The tasks on a language model in minilora, as its commands compute them."""

from minilora import Adam, attach, generate, load_adapter, load_model, merge
from minilora.quant import quantize
from minilora.training.threads import keep_freed_memory, parts_and_threads

from .llm_inputs import gguf_of
from .llm_workloads import PROMPT, masked
from .numpy_minilora import training, written
from .on_gpu import array_module_for, peak_memory
from .workloads import LR

__all__ = ["peak_memory", "prepare"]


def prepare(task, variant, job):
    """A function that does one unit of `task`.

    `variant` is how the base is stored: "" (float32, mapped from its folder), "gguf" (4 and 8 bits,
    mapped from its file) or "nf4" (4 bits, made when it is loaded). Writing merges the adapter
    first; "unmerged" leaves it beside the weights. "tf32" rounds the factors of a GPU's products to
    TF32.
    """
    if task in ("first-token", "shared"):
        return first_token(job, variant)
    base = load_base(job, variant)
    # The adapter was made for the base in float32: that in 4 bits, made of it, is another one.
    changes = ["other-precision"] if variant == "nf4" else []
    adapter = load_adapter(
        job.folder / "adapter", base, say=lambda account: None, accept_base=changes
    )
    model = attach(base, adapter, check_base=not changes)
    # Not before everything is loaded, or what loading has freed would be kept too.
    keep_freed_memory()
    if task == "generate":
        job = job._replace(prompt=job.inputs[:1, :PROMPT])
        writer = model if variant == "unmerged" else merge(model)
        return lambda: written(writer, job)
    if task == "answers":
        job = job._replace(targets=masked(job.targets))
    rows = len(job.inputs)
    backend = "numpy" if job.device == "cpu" else "cupy"
    parts, threads = parts_and_threads(None, min(job.threads, rows), backend)
    return training(model, Adam(adapter.parameters(), lr=LR), job, min(parts, rows), threads)


def load_base(job, variant):
    """The base, stored as `variant` says."""
    if variant == "gguf":
        return load_model(gguf_of(job.folder))
    base = load_model(job.folder / "base", array_module_for(job.device, variant))
    return quantize(base, "nf4") if variant == "nf4" else base


def first_token(job, variant):
    """A function that loads the base, keeps it, and writes one token: the ids of the row."""
    kept = []

    def load_and_write():
        kept.append(load_base(job, variant))
        return generate(kept[-1], job.inputs[:1, :PROMPT], 1)[0].tolist()

    return load_and_write
