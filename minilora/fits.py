"""Does this adapter belong on this base? The reasons why not. Knows layers, not LoRA.

An adapter is whatever offers `fit_errors(modules, fingerprint)`: lines that say what does not fit.
"""

from collections import namedtuple

from .nn import AdaptedModule, LinearLayer, digest_of, table_rows
from .packed import PackedTensor
from .quant import KINDS, quantized, storage_of
from .tensor import Tensor, check_same

# How many reasons a message shows.
MOST_LINES = 8

# Ways in which a base may be another one than an adapter was trained on, on purpose. Each is
# accepted by its name, and by no other.
OTHER_PRECISION = "other-precision"
GROWN_VOCABULARY = "grown-vocabulary"
ACCEPTABLE = (OTHER_PRECISION, GROWN_VOCABULARY)

# A weight that is stored in another precision than when an adapter was trained on it: how it was
# stored then, how it is now, and ‖difference‖ / ‖the one with more bits‖.
OtherPrecision = namedtuple("OtherPrecision", "trained_on now error")
# A table that has more rows than when an adapter was trained on it, the first of which are those.
MoreRows = namedtuple("MoreRows", "trained_on now")
# {class of a change: the name by which it is accepted}
NAME_OF = {OtherPrecision: OTHER_PRECISION, MoreRows: GROWN_VOCABULARY}


def check_fits(who, base, adapter, check_base=True):
    """Raise ValueError with the reasons why `adapter` does not belong on the model `base`.

    They are all of one kind: layers it cannot stand beside, or else tensors of another base.

    With check_base=False shapes are compared and the fingerprint is not.
    Raises: TypeError for something that is no adapter, another dtype or another backend.
    """
    if not hasattr(adapter, "fit_errors"):
        raise TypeError(
            f"{who}: expected an Adapter or a stack of them, got {type(adapter).__name__}"
        )
    modules = dict(base.named_modules())
    fingerprint = base.fingerprint() if check_base else None
    errors = adapter.fit_errors(modules, fingerprint)
    if not errors:
        return
    raise ValueError(
        f"{who}: this adapter does not fit this base; give the one it was trained on:"
        + indented(errors)
    )


def changes_of(base, fingerprint, stored, rows):
    """{tensor: OtherPrecision or MoreRows} of what differs between `base` and that of an adapter.

    `fingerprint` is that of the adapter's base, `stored` {tensor: kind} of its packed weights,
    `rows` {tensor: how many} of its tables. {} if nothing differs.
    None if the two differ in anything else: in a tensor that is not what `quantize` makes of the
    other, nor the same rows with others after them.
    """
    tensors = dict(base.named_parameters())
    if fingerprint is None or fingerprint.keys() != tensors.keys():
        return None
    # A table of positions is none of the vocabulary.
    vocabulary = getattr(getattr(base, "config", None), "vocab_size", None)
    tables = {name for name, n in table_rows(base).items() if n == vocabulary}
    changes = {}
    for name, tensor in tensors.items():
        expected = fingerprint[name]
        if digest_of(tensor) == expected:
            continue
        change = _other_precision(name, tensor, expected, stored.get(name))
        if change is None and name in tables:
            change = _more_rows(tensor, expected, rows.get(name))
        if change is None:
            return None
        changes[name] = change
    return changes


def _more_rows(tensor, expected, n):
    """The MoreRows of a table; `expected` is the digest it should have, of `n` rows.

    None if its first rows are not those, or if nobody knows how many there were.
    """
    if n is None or n >= len(tensor.data) or digest_of(Tensor(tensor.data[:n])) != expected:
        return None
    return MoreRows(n, len(tensor.data))


def _other_precision(name, tensor, expected, kind):
    """The OtherPrecision of one tensor; `expected` is the digest it should have, stored as `kind`.

    None if neither is the other one quantised.
    """
    source = tensor.source if isinstance(tensor, PackedTensor) else None
    if source is not None and source.digest == expected:
        return OtherPrecision(source.kind, tensor.kind, source.error)
    if kind not in KINDS:
        return None
    try:
        as_trained = quantized(name, tensor, kind)
    except ValueError:
        # What cannot be stored as that kind never was.
        return None
    if digest_of(as_trained) == expected:
        return OtherPrecision(kind, storage_of(tensor), as_trained.source.error)
    return None


def indented(lines):
    """`lines` for a message, each on a line of its own; of many the first, and how many more."""
    shown = lines[:MOST_LINES]
    if len(lines) > MOST_LINES:
        shown = [*shown, f"... and {len(lines) - MOST_LINES} more"]
    return "".join(f"\n  {line}" for line in shown)


def pair_errors(pairs, modules):
    """Which of `pairs`, {module name: pair}, cannot stand beside their modules, and why."""
    return part_errors(pairs, modules, _misfit_of_pair)


def _misfit_of_pair(name, pair, module):
    if not isinstance(module, LinearLayer):
        return not_a("a linear layer", name, module)
    if (module.out_features, module.in_features) == (pair.out_features, pair.in_features):
        return None
    return (
        f"{name}: weight {(module.out_features, module.in_features)}, "
        f"but lora_A {pair.lora_A.shape} and lora_B {pair.lora_B.shape}"
    )


def part_errors(parts, modules, misfit):
    """Which of `parts`, {module name: part}, cannot stand beside their modules, and why.

    `misfit(name, part, module)` is a line that says why a part does not fit a plain module, or
    None.
    Raises: TypeError if a part has another dtype or backend than its module.
    """
    carrying = [name for name, module in modules.items() if isinstance(module, AdaptedModule)]
    errors = []
    for name, part in parts.items():
        module = modules.get(name)
        if module is None:
            errors.append(f"{name} is adapted, but the base has nothing there")
            continue
        # The module itself, or a layer in it.
        inside = [other for other in carrying if _is_in(other, name)]
        if inside:
            where = inside[0] or "the model"
            errors.append(f"{where} already carries an adapter; merge first, or use stack")
            continue
        line = misfit(name, part, module)
        if line is not None:
            errors.append(line)
        else:
            who = f"attaching an adapter to {name}"
            check_same(who, _numbers_of(module), *part.parameters())
    return errors


def _is_in(other, name):
    """Is the module `other` the module `name`, or in it? The name of the whole model is empty."""
    return name in ("", other) or other.startswith(f"{name}.")


def not_a(kind, name, module):
    """The line that says that the module `name` is not of the `kind` that its part needs."""
    return f"{name} is adapted, but the base has {type(module).__name__} there, not {kind}"


def _numbers_of(module):
    """An empty tensor with the dtype and the backend in which a module computes."""
    # A layer may store its weight in another way than as a tensor, a packed tensor as other arrays.
    if not isinstance(module, LinearLayer):
        module = module.parameters()[0]
    return Tensor(module.xp.zeros(0, module.dtype))


def base_errors(expected, fingerprint):
    """In which tensors two fingerprints differ, as lines. Either may be None: not known."""
    if expected is None or fingerprint is None:
        return []
    both = expected.keys() & fingerprint.keys()
    one_sided = expected.keys() ^ fingerprint.keys()
    errors = []
    # Tensors that only one side has come first: they say most.
    for name in [*sorted(one_sided), *sorted(both)]:
        expected_digest = expected.get(name, "absent")
        digest = fingerprint.get(name, "absent")
        if digest != expected_digest:
            errors.append(f"{name}: made for {expected_digest}, this base has {digest}")
    return errors
