"""How many numbers, how many bytes: counted from the arrays of a model and of its graph, never from a formula."""

from collections import namedtuple

from .graph import count_consumers


class ParameterReport(namedtuple("ParameterReport", "trainable total trainable_bytes total_bytes")):
    """Counts of numbers and of bytes, summed over the arrays of a model."""

    def __str__(self):
        share = 100 * self.trainable / self.total
        return f"{self.trainable:,} of {self.total:,} parameters are trainable ({share:.2f} %)"


def parameter_report(model):
    """How much of `model` (or of an adapter) is trained, counted from its arrays.

    Shapes: none; the result holds two counts of numbers and two of bytes. Raises: ValueError if there are none.
    Source: PEFT's `print_trainable_parameters`.
    """
    tensors = model.parameters()
    if not tensors:
        raise ValueError(f"parameter_report: {type(model).__name__} holds no tensors")
    trained = [t for t in tensors if t.requires_grad]
    return ParameterReport(
        sum(t.size for t in trained), sum(t.size for t in tensors),
        sum(t.data.nbytes for t in trained), sum(t.data.nbytes for t in tensors),
    )


def activation_bytes(loss, model):
    """Bytes of the arrays that the graph of `loss` keeps alive for backward, the model's own tensors left out.

    Counted by walking the graph: an array is held if some VJP closes over it, directly, in a tuple, or through a
    function.
    """
    own = {id(_owner(p.data)) for p in model.parameters()}
    vjps = (vjp for node in count_consumers(loss.node) for _, vjp in node.edges)
    held = {id(a): a for vjp in vjps for a in map(_owner, _closed_over(vjp)) if id(a) not in own}
    return sum(a.nbytes for a in held.values())


def _closed_over(function):
    """Every array a function can reach through its closure, also through functions and tuples in it."""
    for cell in function.__closure__ or ():
        for value in cell.cell_contents if isinstance(cell.cell_contents, tuple) else (cell.cell_contents,):
            if hasattr(value, "nbytes"):
                yield value
            elif hasattr(value, "__closure__"):
                yield from _closed_over(value)


def _owner(array):
    """The array that owns the memory of a view."""
    while getattr(array, "base", None) is not None:
        array = array.base
    return array
