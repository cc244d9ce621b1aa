"""Several adapters in one model: each row of a batch with its own. Knows adapters, not models.

Shapes: B rows of a batch, T time, r the largest rank among the adapters.
"""

import numpy as np

from . import functional as F
from .backend import get_array_module, to_device
from .lora import Adapter, check_plain
from .nn import AdaptedLayer, Module
from .tensor import Tensor, record


def stack(adapters):
    """One adapter for each batch row: row i goes through adapters[i], or the base alone.

    Shapes: a list of B Adapters or Nones; ranks, scalings and targets may differ. The model from
    `attach(base, stack(adapters))` takes ids (B, T). Nothing is copied: training it trains those
    adapters.
    Raises: ValueError if the list is empty or all None, or for pairs of another kind than LoRA's;
    TypeError for anything else in it.
    Source: the batching of Punica (Chen et al. 2023) and S-LoRA (Sheng et al. 2023), as one
    broadcast multiplication.
    """
    return BatchAdapter(adapters)


class BatchAdapter(Module):
    """The result of `stack`: to `attach` it is an adapter whose layers differ from row to row.

    `pairs` maps a module's name to a list: the LoRAPair of each row, or None.
    """

    def __init__(self, adapters):
        self.adapters = list(adapters)
        for adapter in self.adapters:
            if adapter is not None and not isinstance(adapter, Adapter):
                raise TypeError(
                    f"stack: rows must be Adapters or None, got {type(adapter).__name__}"
                )
        if all(adapter is None for adapter in self.adapters):
            raise ValueError(
                f"stack: {len(self.adapters)} rows and no adapter among them; "
                "give at least one Adapter"
            )
        self.pairs = {}
        for i, adapter in enumerate(self.adapters):
            if adapter is None:
                continue
            check_plain("stack", adapter)
            for name, pair in adapter.pairs.items():
                rows = self.pairs.setdefault(name, [None] * len(self.adapters))
                rows[i] = pair

    def adapted(self, name, linear):
        """The layer that stands for `linear`, the module `name`; None: itself."""
        if name not in self.pairs:
            return None
        rates = [0.0 if a is None else a.config.dropout for a in self.adapters]
        return BatchLoRALinear(linear, self.pairs[name], rates)

    def fit_errors(self, modules, fingerprint):
        """As `Adapter.fit_errors`, over all rows; an adapter that serves several is asked once."""
        distinct = {id(a): a for a in self.adapters if a is not None}
        errors = []
        for adapter in distinct.values():
            errors += adapter.fit_errors(modules, fingerprint)
        return errors


class BatchLoRALinear(AdaptedLayer):
    """y[i] = linear(x[i]) + pairs[i](x[i]) for each row i: x (B, T, in) -> (B, T, out).

    A pair of None adds nothing. `dropout` has a rate for each row.
    """

    def __init__(self, linear, pairs, dropout):
        self.linear = linear
        self.pairs = pairs
        self.dropout = dropout

    def __call__(self, x, rng=None):
        if x.ndim != 3 or x.shape[0] != len(self.pairs):
            raise ValueError(
                f"this model stacks {len(self.pairs)} adapters, one for each batch row; "
                f"got input {x.shape}"
            )
        # A row without a pair has None here, and stands for zeros.
        lora_As = [p if p is None else p.lora_A for p in self.pairs]
        lora_Bs = [p if p is None else p.lora_B for p in self.pairs]
        scalings = [0.0 if p is None else p.scaling for p in self.pairs]
        A = pad_and_stack(lora_As)  # (B, r, in)
        B = pad_and_stack(lora_Bs)  # (B, out, r)
        scaling = _column(scalings)  # (B, 1, 1)
        scaling = to_device(scaling.astype(x.dtype), get_array_module(x.data))
        # The update of LoRAPair, with a matrix for each row.
        read = F.dropout(x, _column(self.dropout), rng)
        thin = read @ A.transpose(0, 2, 1)  # (B, T, r)
        update = (thin * Tensor(scaling)) @ B.transpose(0, 2, 1)  # (B, T, out)
        return self.linear(x, rng) + update

    def merged(self):
        """Refused: there is one weight, and a different update for each row."""
        raise ValueError(
            "merge: the rows of a stacked model carry different adapters; "
            "merge one of them on its own"
        )


def _column(values):
    """A number for each batch row, (B, 1, 1), on the host."""
    return np.array(values, np.float64).reshape(-1, 1, 1)


def pad_and_stack(matrices):
    """(B, n, m) from a list of B matrices of at most (n, m).

    A smaller matrix is filled up with zeros, and None is a matrix of zeros: they add nothing.
    """
    present = [t for t in matrices if t is not None]
    n = max(t.shape[0] for t in present)
    m = max(t.shape[1] for t in present)
    first = present[0].data
    y = get_array_module(first).zeros((len(matrices), n, m), first.dtype)
    edges = []
    for i, t in enumerate(matrices):
        if t is None:
            continue
        own_part = (i, slice(t.shape[0]), slice(t.shape[1]))
        y[own_part] = t.data
        edges.append((t, lambda dy, own_part=own_part: dy[own_part]))
    return record(y, *edges)
