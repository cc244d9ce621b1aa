"""What the relatives of LoRA share: few tensors, by the modules of a base they belong to.

Each relative is a short file of its own, and has three parts: a *part*, the few numbers learned for
one module; the module in which they stand beside the base's; and `init_<method>(base, ..., rng)`,
which makes a Method of such parts. All are used alike:

    prefix = init_prefix(base, 16, rng)
    model = attach(base, prefix)
    adam = Adam(prefix.parameters(), lr=1e-2)

The base is never written. Knows modules, no model and no method.
"""

from .fits import base_errors, part_errors
from .lora import adapted_names
from .nn import Module


class Method(Module):
    """What one of LoRA's relatives learns, as data apart from any model: to `attach` an adapter.

    `parts` maps a module's name to what is learned for it, a Module that offers
    `beside(module)`, the AdaptedModule in which it stands, and `misfit(name, module)`, a line that
    says why it cannot stand there, or None. `base_fingerprint` is that of the base.
    """

    def __init__(self, parts, base_fingerprint):
        self.parts = dict(parts)
        if not self.parts:
            raise ValueError("Method: no parts, so nothing is learned; use init_... or load_method")
        self.base_fingerprint = base_fingerprint

    def named_parameters(self):
        """(name, Tensor) for all that is learned, as the adapted model calls it."""
        for name, p in super().named_parameters():
            # The name of the whole model is empty.
            yield name.removeprefix("parts.").removeprefix("."), p

    def adapted(self, name, module):
        """The module that stands for `module`, called `name`, in an adapted model; None: itself."""
        if name not in self.parts:
            return None
        return self.parts[name].beside(module)

    def fit_errors(self, modules, fingerprint):
        """Why this does not belong on a base of these modules: lines, or none."""
        misfit = lambda name, part, module: part.misfit(name, module)
        errors = part_errors(self.parts, modules, misfit)
        return errors or base_errors(self.base_fingerprint, fingerprint)


def modules_of_kind(who, base, kind, what):
    """{name: module} of the modules of `base` that are of the class `kind`, `what` in words.

    Raises: ValueError if there is none, or if the base carries an adapter.
    """
    carrying = adapted_names(base)
    if carrying:
        raise ValueError(
            f"{who}: {carrying[0] or 'the model'} already carries an adapter; "
            "call it on the base, or on merge(model)"
        )
    modules = {name: m for name, m in base.named_modules() if isinstance(m, kind)}
    if not modules:
        raise ValueError(f"{who}: this {type(base).__name__} has no {what}")
    return modules


def check_length(who, name, n):
    """Raise ValueError unless `n`, the argument `name` of `who`, is a whole number from 1 on."""
    if type(n) is not int or n < 1:
        raise ValueError(f"{who}: {name} must be a whole number of at least 1, got {n!r}")
