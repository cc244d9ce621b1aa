"""Several adapters in one model: each row of a batch with its own. Knows adapters, not what they adapt."""

import numpy as np

from .backend import get_array_module, to_device
from .lora import Adapter, LoRALinear
from .nn import Module
from .tensor import record


def stack(adapters):
    """One adapter per batch row, for `attach`: row i of each batch goes through adapters[i], or the base alone.

    Shapes: a list of B Adapters or Nones; ranks, scalings and targets may differ. The model from
    `attach(base, stack(adapters))` takes ids (B, T). Nothing is copied: training it trains those adapters.
    Raises: ValueError if the list is empty or all None; TypeError for anything else in it.
    Source: the batching of Punica (Chen et al. 2023) and S-LoRA (Sheng et al. 2023), as one broadcast multiplication.
    """
    return Stack(adapters)


class Stack(Module):
    """The result of `stack`: to `attach` it is an adapter whose layers differ from row to row."""

    def __init__(self, adapters):
        self.rows = list(adapters)
        if not any(self.rows):
            raise ValueError(f"stack: {len(self.rows)} rows and no adapter among them; give at least one Adapter")
        wrong = [type(a).__name__ for a in self.rows if a is not None and not isinstance(a, Adapter)]
        if wrong:
            raise TypeError(f"stack: rows must be Adapters or None, got {', '.join(wrong)}")
        self.pairs = dict.fromkeys(name for a in self.rows if a is not None for name in a.pairs)

    def misfits(self, modules, fingerprint):
        """As `Adapter.misfits`, over all rows."""
        distinct = {id(a): a for a in self.rows if a is not None}.values()
        return [line for adapter in distinct for line in adapter.misfits(modules, fingerprint)]

    def layer(self, name, linear, rng):
        """The layer that stands for the Linear `name`."""
        return StackedLoRALinear(linear, [a if a is None or name in a.pairs else None for a in self.rows], name, rng)


class StackedLoRALinear(LoRALinear):
    """A LoRALinear whose A, B and scaling have a leading batch axis: x (B, T, in) -> (B, T, out)."""

    def __init__(self, linear, rows, name, rng):
        column = lambda values: np.array(values, np.float64).reshape(-1, 1, 1)
        scaling = column([0 if a is None else a.config.scaling(name) for a in rows])
        dropout = column([0 if a is None else a.config.dropout for a in rows])
        super().__init__(linear, None, None, scaling, dropout, rng)
        self.pairs = [None if a is None else a.pairs[name] for a in rows]

    def __call__(self, x):
        if x.ndim != 3 or x.shape[0] != len(self.pairs):
            raise ValueError(f"this model stacks {len(self.pairs)} adapters, one per batch row; got input {x.shape}")
        A = stack_rows([p and p.lora_A for p in self.pairs])  # (B, r, in)
        B = stack_rows([p and p.lora_B for p in self.pairs])  # (B, out, r)
        scaling = to_device(self.scaling.astype(x.dtype), get_array_module(x.data))  # (B, 1, 1)
        return LoRALinear(self, A, B, scaling, self.dropout, self.rng)(x)

    def merged(self):
        """Refused: there is one weight, and a different update for each row."""
        raise ValueError("merge: the rows of a stacked model carry different adapters; merge one of them on its own")


def stack_rows(matrices):
    """(rows, n, m) from a list of matrices; None is a row of zeros; zeros fill up smaller ones: they add nothing."""
    first = next(t for t in matrices if t is not None)
    sizes = [t.shape for t in matrices if t is not None]
    y = get_array_module(first.data).zeros((len(matrices), *map(max, zip(*sizes, strict=True))), first.dtype)
    edges = []
    for i, t in enumerate(matrices):
        if t is not None:
            n, m = t.shape
            y[i, :n, :m] = t.data
            edges.append((t, lambda dy, i=i, n=n, m=m: dy[i, :n, :m]))
    return record(y, *edges)
