"""How many numbers and bytes: counted from the arrays of a model and its graph, by no formula."""

from collections import namedtuple

from .architectures import blank_adapter
from .graph import count_consumers
from .lora_config import LoRAConfig
from .packed import PackedTensor


class ParameterReport(namedtuple("ParameterReport", "trainable total trainable_bytes total_bytes")):
    """Counts of numbers and of bytes, summed over the arrays of a model."""

    def __str__(self):
        share = 100 * self.trainable / self.total
        return f"{self.trainable:,} of {self.total:,} parameters are trainable ({share:.2f} %)"


def parameter_report(model):
    """How much of `model` (or of an adapter) is trained, counted from its arrays.

    Raises: ValueError if it holds no tensor.
    Source: PEFT's `print_trainable_parameters`.
    """
    tensors = model.parameters()
    if not tensors:
        raise ValueError(f"parameter_report: {type(model).__name__} holds no tensors")
    trainable = [t for t in tensors if t.requires_grad]
    return ParameterReport(
        trainable=sum(t.size for t in trainable),
        total=sum(t.size for t in tensors),
        trainable_bytes=sum(t.nbytes for t in trainable),
        total_bytes=sum(t.nbytes for t in tensors),
    )


def n_parameters(model):
    """How many numbers a model or an adapter holds."""
    return parameter_report(model).total


def adapter_parameters(model, r, target_modules):
    """How many numbers LoRA of rank `r` has on `model`: counted from an adapter without numbers.

    Raises: as `init_adapter`.
    """
    # alpha changes no count.
    config = LoRAConfig(r=r, alpha=r, target_modules=target_modules)
    return n_parameters(blank_adapter(model, config))


def activation_bytes(loss, model):
    """Bytes of the arrays that the graph of `loss` keeps alive for backward, the model's own aside.

    Counted by a walk over the graph: an array is held if some VJP closes over it, directly, in a
    tuple or list, or through a function.
    """
    model_arrays = {id(_owner(_stored(p))) for p in model.parameters()}
    held = {}
    for node in count_consumers(loss.node):
        for _, vjp in node.edges:
            for array in _closed_over(vjp):
                owner = _owner(array)
                if id(owner) not in model_arrays:
                    held[id(owner)] = owner
    return sum(array.nbytes for array in held.values())


def _closed_over(value):
    """Every array that `value` is, or can reach: through closures, tuples and lists."""
    if hasattr(value, "nbytes"):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _closed_over(item)
    else:
        for cell in getattr(value, "__closure__", None) or ():
            yield from _closed_over(cell.cell_contents)


def _stored(tensor):
    """What holds the numbers of a tensor: a weight of few bits is not widened to be counted."""
    return tensor.packed if isinstance(tensor, PackedTensor) else tensor.data


def _owner(array):
    """The array that owns the memory of a view."""
    while getattr(array, "base", None) is not None:
        array = array.base
    return array
