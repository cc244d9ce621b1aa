"""What a fine-tuning trains, and as what it is kept: an adapter, or all of a model. Knows no steps.

Both have `model`, which computes the loss; `module`, whose tensors are trained; `fingerprint`, that
of the base; `save(folder)`; and for reports `summary`, `noun` and `file`, the name of the file of
tensors. `is_large` says whether a copy of it after each step would be a burden.
"""

from ..count import parameter_report
from ..disk import models, peft
from ..lora import attach
from ..quant import stored_as


class LearnedAdapter:
    """A new adapter for `base`, which stays as it is. `config` is a FineTuneConfig."""

    is_large = False
    noun = "the adapter"
    file = peft.TENSORS

    def __init__(self, base, config, rng):
        init = peft.init_peft_dora if config.dora else peft.init_peft_adapter
        self.module = init(base, config.lora_config(), rng)
        self.model = attach(base, self.module, check_base=False)
        self.fingerprint = self.module.base_fingerprint
        self.base = str(config.base)
        sizes = parameter_report(self.model)
        kind = "DoRA adapter" if config.dora else "adapter"
        self.summary = f"{kind} r={config.r}, alpha={config.alpha:g}: {sizes}"

    def save(self, folder):
        """Write the adapter into `folder`, in PEFT's format."""
        peft.save_adapter(self.module, folder, base_model=self.base)


class LearnedModel:
    """A trainable copy of `base`, in arrays of its own. `path` is where the base lies."""

    is_large = True
    noun = "the model"
    file = models.TENSORS

    def __init__(self, base, path):
        self.fingerprint = base.fingerprint()
        self.model = base.trainable_copy()
        self.module = self.model
        self.path = path
        self.summary = f"full fine-tuning: {parameter_report(self.model)}"

    def save(self, folder):
        """Write a plain model into `folder`, with the tokenizer and settings of its base."""
        models.save_model(self.model, folder, like=self.path)


def training_bytes(base, keeps_best):
    """{what: bytes} that full fine-tuning of `base` holds all the time, activations aside.

    It is known before any of it is there: each array has the shape and the dtype of a weight.
    `keeps_best`: a copy of the best weights so far is among them.
    """
    weights = sum(p.size * p.dtype.itemsize for p in base.parameters())
    parts = {"weights": weights, "gradients": weights, "Adam's two moments": 2 * weights}
    if keeps_best:
        parts["the best weights so far"] = weights
    return parts


def report_full(base, keeps_best, log):
    """Log what full fine-tuning of `base` will take, and what is widened for it."""
    kinds = sorted(set(stored_as(base).values()))
    parts = training_bytes(base, keeps_best)
    if kinds:
        before = parameter_report(base).total_bytes
        log(
            f"the base is stored as {' and '.join(kinds)}: widened to be trained, "
            f"{before / 1e6:,.1f} MB become {parts['weights'] / 1e6:,.1f} MB"
        )
    terms = [f"{what} {n / 1e6:,.1f}" for what, n in parts.items()]
    log(
        f"memory of full fine-tuning: {sum(parts.values()) / 1e6:,.1f} MB ({', '.join(terms)}), "
        "and what a step computes"
    )
