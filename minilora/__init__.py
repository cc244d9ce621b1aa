"""LoRA from scratch in NumPy/CuPy: an autograd engine, a GPT, the adapters, and a gradient checker, all to be read.

Reading order: backend, graph, tensor, functional, gradcheck, nn, optim, gpt, lora_config, lora. Each file
imports only from those before it.
"""

from .compose import stack
from .count import parameter_report
from .disk.models import load_gpt2, load_model, save_gpt2, save_model
from .disk.peft import init_peft_adapter, load_adapter, save_adapter
from .disk.rounding import rounding_report, save_merged
from .generate import generate
from .gpt import GPT, GPTConfig
from .gradcheck import GradientError, check_vjp, gradcheck
from .graph import no_grad
from .lora import Adapter, attach, init_adapter, merge
from .lora_config import LoRAConfig
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
    "init_peft_adapter",
    "load_adapter",
    "load_gpt2",
    "load_model",
    "merge",
    "no_grad",
    "parameter_report",
    "rounding_report",
    "save_adapter",
    "save_gpt2",
    "save_merged",
    "save_model",
    "stack",
]
