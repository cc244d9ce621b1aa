"""The names that an expression of claims.json may use: numbers, bytes, work, by this library.

Counted from models without arrays, and from the objects that the library makes. Knows no claim.
"""

import ast
import math
import tempfile
from pathlib import Path

import numpy as np

from minilora import Adam, LoRAConfig, Tensor, attach, init_adapter, save_adapter
from minilora.architectures import PRESETS, blank, blank_adapter
from minilora.count import adapter_parameters, n_parameters
from minilora.lora import LoRAPair, linear_names
from minilora.nn import Linear
from minilora.step_cost import step_flops

__all__ = [
    "adam_bytes", "adapter", "adapter_file", "attaching_changes", "bytes_each", "kinds", "lines_of",
    "matrix", "pair", "parameters", "root", "scaling", "spread", "state_bytes", "step_work",
    "width",
]  # fmt: skip

EXAMPLES = Path(__file__).resolve().parent.parent
root = math.sqrt


def parameters(name):
    """How many numbers a preset model has."""
    return n_parameters(blank(PRESETS[name]))


def width(name):
    """How many channels a preset model has."""
    config = PRESETS[name]
    return config.n_embd if hasattr(config, "n_embd") else config.hidden_size


def adapter(name, r, targets="all"):
    """How many numbers LoRA trains in a preset model: targets are "all", or "q,v" and the like."""
    return adapter_parameters(blank(PRESETS[name]), r, _target_modules(targets))


def _target_modules(targets):
    if targets == "all":
        return "all-linear"
    return [f"{target}_proj" for target in targets.split(",")]


def kinds(name, part=""):
    """How many kinds of linear layer a preset model has, or those whose name has the part."""
    endings = {each.split(".", 2)[-1] for each in linear_names(blank(PRESETS[name]))}
    return sum(part in ending for ending in endings)


def _without_numbers(*shape):
    """A tensor of a shape, all of whose elements are one number in memory."""
    return Tensor(np.broadcast_to(np.float32(0), shape))


def matrix(n_out, n_in):
    """How many numbers the weight of a linear layer has."""
    return Linear(_without_numbers(n_out, n_in)).weight.size


def pair(n_out, n_in, r):
    """How many numbers lora_A and lora_B have together."""
    lora_A = _without_numbers(r, n_in)
    lora_B = _without_numbers(n_out, r)
    return sum(p.size for p in LoRAPair(lora_A, lora_B, 1.0).parameters())


def scaling(r, alpha, use_rslora=False):
    """What the update is multiplied by."""
    config = LoRAConfig(r=r, alpha=alpha, target_modules="all-linear", use_rslora=use_rslora)
    return config.scaling_of("a layer")


def spread(n_in):
    """The standard deviation of a lora_A that reads n_in numbers: uniform in ±1/√n_in."""
    return 1 / math.sqrt(3 * n_in)


def bytes_each(dtype):
    """Bytes of one number. In 4 bits, scales aside, it is half a byte."""
    sizes = {"float32": 4, "float16": 2, "bfloat16": 2, "4 bits": 0.5}
    return sizes[dtype]


def adam_bytes():
    """Bytes that Adam holds for each number it trains, in float32."""
    adam = Adam([Tensor(np.zeros(1, "float32"), requires_grad=True)])
    return sum(moment.nbytes for moment in [*adam.m, *adam.v])


def state_bytes():
    """Bytes for each number that is trained in float32: weight, gradient, Adam's two moments."""
    return bytes_each("float32") + bytes_each("float32") + adam_bytes()


def step_work(name, r=None, targets="all", batch=1, length=512):
    """Floating-point operations of a training step of a preset model: LoRA of rank r, or full."""
    model = blank(PRESETS[name])
    if r is not None:
        config = LoRAConfig(r=r, alpha=r, target_modules=_target_modules(targets))
        model = attach(model, blank_adapter(model, config), check_base=False)
    return step_flops(model, batch, length)


def lines_of(file, name):
    """Lines of code of a class or function among the examples, its docstring and comments aside."""
    source = (EXAMPLES / file).read_text(encoding="utf-8")
    named = [each for each in ast.parse(source).body if getattr(each, "name", "") == name]
    node = named[0]
    if ast.get_docstring(node):
        node.body = node.body[1:]
    return len(ast.unparse(node).splitlines())


def _small_adapter(name, r):
    """(a preset model with random weights, an adapter on each of its linear layers)"""
    rng = np.random.default_rng(0)
    base = type(blank(PRESETS[name]))(PRESETS[name], rng)
    return base, init_adapter(base, LoRAConfig(r=r, alpha=2 * r, target_modules="all-linear"), rng)


def attaching_changes(name, r):
    """The largest change of a logit when a new adapter is attached to a preset model."""
    base, adapter = _small_adapter(name, r)
    ids = np.arange(24)[None] % base.config.vocab_size
    return float(np.abs(attach(base, adapter)(ids).data - base(ids).data).max())


def adapter_file(name, r):
    """Bytes of the file in which an adapter of a preset model is saved."""
    _, adapter = _small_adapter(name, r)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(adapter, folder, allow_untrained=True)
        return (Path(folder) / "adapter_model.safetensors").stat().st_size
