"""LoRA from scratch in NumPy/CuPy: an autograd engine, a GPT, the adapters, and a gradient checker, all to be read.

Reading order: backend, graph, tensor, functional, gradcheck, nn, optim, gpt, lora. Each file imports only from
those before it.
"""

from .compose import stack
from .count import parameter_report
from .files import load_adapter, load_model, save_adapter, save_model
from .gpt import GPT, GPTConfig, generate
from .gradcheck import GradientError, check_vjp, gradcheck
from .graph import no_grad
from .lora import Adapter, LoRAConfig, attach, init_adapter, merge
from .optim import Adam
from .tensor import Tensor

__version__ = "0.1.0"

__all__ = [
    "GPT",
    "Adam",
    "Adapter",
    "GPTConfig",
    "GradientError",
    "LoRAConfig",
    "Tensor",
    "attach",
    "check_vjp",
    "generate",
    "gradcheck",
    "init_adapter",
    "load_adapter",
    "load_model",
    "merge",
    "no_grad",
    "parameter_report",
    "save_adapter",
    "save_model",
    "stack",
]
