"""A base packed in fewer bits once it is loaded, and what that did to it. Knows packed weights."""

import numpy as np
from tqdm import tqdm

from ..count import parameter_report
from ..packed import PackedTensor, StoredTensor
from ..quant import quantize
from .tensor_file import release_pages


def quantized_base(model, kind, log, quiet=False):
    """`model` with the weights of its linears packed as `kind`: what `quant.quantize` takes.

    `log` gets a line on what that did: the bytes of the model before and after, and how far a
    weight W is from what it was, ‖packed - W‖ / ‖W‖ in Frobenius's norm, on average over them.
    """
    for p in model.parameters():
        if isinstance(p, StoredTensor):
            # What is packed has other values, which no file can vouch for.
            p.verify()
    with tqdm(desc="packing", unit="layer", delay=1, leave=False, disable=quiet or None) as bar:
        packed = quantize(model, kind, on_layer=lambda name: bar.update())
    # The weights were read whole. What is left of their file is the embedding, the norms, biases.
    release_pages(_stored_arrays(model))
    sources = [p.source for p in packed.parameters() if getattr(p, "source", None)]
    before = " and ".join(sorted({source.kind for source in sources}))
    error = np.mean([source.error for source in sources])
    log(
        f"the weights of {len(sources)} linears, {before} before, are packed as {kind}: "
        f"{_megabytes(model)} become {_megabytes(packed)}, and a weight is {error:.1%} off on "
        "average"
    )
    return packed


def _stored_arrays(model):
    """The arrays that hold the numbers of a model, as they are stored."""
    for p in model.parameters():
        yield from p.packed.arrays if isinstance(p, PackedTensor) else [p.data]


def _megabytes(model):
    return f"{parameter_report(model).total_bytes / 1e6:,.2f} MB"
