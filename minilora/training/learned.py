"""What a fine-tuning trains, and as what it is kept: an adapter, or all of a model. Knows no steps.

Both have `model`, which computes the loss; `module`, whose tensors are trained; `fingerprint`, that
of the base; `origin`, the SHA-256 of the file that was gone on from, or None; `check_learned()`,
which raises ValueError if there is nothing to save; `save(folder, receipt)`; `update_sizes()`, for
the receipt; and for reports `summary`, `noun`, `file`, the name of the file of tensors, and
`remarks()`. `is_large` says whether a copy of it after each step would be a burden.
"""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..backend import to_numpy
from ..count import parameter_report
from ..disk import models, peft
from ..disk.base_files import companions_of
from ..disk.receipt import sha256_of
from ..kernels import sum_of_squares
from ..lora import Adapter, LoRAPair, attach
from ..low_rank import product_norm
from ..nn import table_rows
from ..quant import stored_as


class LearnedAdapter:
    """An adapter for `base`, which stays as it is. `config` is a FineTuneConfig.

    It is new, or the one in `config.from_adapter`; `log` is told what that is.
    """

    is_large = False
    noun = "the adapter"
    file = peft.TENSORS

    def __init__(self, base, config, rng, log):
        self.origin = None
        if config.from_adapter is None:
            init = peft.init_peft_dora if config.dora else peft.init_peft_adapter
            self.module = init(base, config.lora_config(), rng)
        else:
            self.module = _adapter_to_go_on_from(base, config, log)
            self.origin = sha256_of(Path(config.from_adapter) / peft.TENSORS)
        # What no file could hold is not trained.
        peft.check_savable(self.module)
        self.model = attach(base, self.module, check_base=False)
        self.fingerprint = self.module.base_fingerprint
        self.base_model = base
        recipe = self.module.config
        self.is_plain = all(type(pair) is LoRAPair for pair in self.module.pairs.values())
        kind = "adapter" if self.is_plain else "DoRA adapter"
        sizes = parameter_report(self.model)
        self.summary = f"{kind} r={recipe.r}, alpha={recipe.alpha:g}: {sizes}"

    def check_learned(self):
        """Raise ValueError for an adapter that changes nothing."""
        peft.check_trained(self.module)

    def save(self, folder, receipt):
        """Write the adapter into `folder`, in PEFT's format, with a receipt beside it.

        Both name the base as the receipt does.
        """
        name = receipt["base"]["name"]
        peft.save_adapter(self.module, folder, base_model=name, receipt=receipt)

    def update_sizes(self):
        """How large each update is, as `update_sizes` says."""
        return update_sizes(self.base_model, self.module)

    def remarks(self):
        """Lines on what was learned that nobody would guess: that it changes nothing."""
        if not self.is_plain:
            # DoRA also gives each row another length.
            return []
        largest = 0.0
        for _, norm, weight_norm in _norms(self.base_model, self.module):
            share = norm / (weight_norm or 1.0)
            if share >= np.finfo(self.module.parameters()[0].dtype).eps:
                return []
            largest = max(largest, share)
        return [
            f"the adapter does nothing: its updates are at most {largest:.1e} of a weight, in "
            "Frobenius's norm, and rounding changes more than that; give a larger alpha or a "
            "higher learning rate"
        ]


class LearnedModel:
    """A trainable copy of `base`, in arrays of its own. `path` is where the base lies.

    Raises: ValueError if the base's tokenizer cannot go along into `folder`.
    """

    is_large = True
    noun = "the model"
    file = models.TENSORS

    def __init__(self, base, path, folder):
        companions_of(path, folder)
        self.origin = None
        self.fingerprint = base.fingerprint()
        self.model = base.trainable_copy()
        self.module = self.model
        self.path = path
        self.summary = f"full fine-tuning: {parameter_report(self.model)}"

    def check_learned(self):
        """A model that learned nothing is a model."""

    def save(self, folder, receipt):
        """Write a plain model into `folder`, with a receipt, and its base's tokenizer."""
        models.save_model(self.model, folder, like=self.path, receipt=receipt)

    def update_sizes(self):
        """There are none: the base's weights are not kept beside those that are trained."""
        return {}

    def remarks(self):
        """There are none."""
        return []


def _adapter_to_go_on_from(base, config, log):
    """The adapter in `config.from_adapter`, as one of this base and with the dropout of this run.

    Raises: as `load_adapter`.
    """
    adapter = peft.load_adapter(
        config.from_adapter, base, accept_base=config.accept_base, say=log
    )
    recipe = replace(adapter.config, dropout=config.dropout)
    # The file may not have said which base it was; from now on it is this one.
    return Adapter(recipe, adapter.pairs, base.fingerprint(), stored_as(base), table_rows(base))


def update_sizes(base, adapter):
    """{module: {"norm": |dW|, "share": |dW| / |W|}} of an adapter of `base`, in Frobenius's norm.

    What no float can say is None, as the share where W is zero. What DoRA makes of the length of a
    row is not in it.
    """
    sizes = {}
    for name, norm, weight_norm in _norms(base, adapter):
        share = norm / weight_norm if weight_norm else math.inf
        sizes[name] = {"norm": finite(norm), "share": finite(share)}
    return sizes


def finite(number):
    """`number` as a float, None if it is not finite, or None itself."""
    return float(number) if number is not None and math.isfinite(number) else None


def _norms(base, adapter):
    """(module, |dW|, |W|) of each pair, one after the other, in Frobenius's norm."""
    modules = dict(base.named_modules())
    for name, pair in adapter.pairs.items():
        A = to_numpy(pair.lora_A.data).astype(np.float64)
        B = to_numpy(pair.lora_B.data).astype(np.float64)
        # A packed weight is widened here, one at a time.
        weight = modules[name].weight.data
        weight_norm = math.sqrt(float(sum_of_squares([weight])))
        yield name, float(pair.scaling * product_norm(A, B)), weight_norm


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
