"""LoRA from scratch in NumPy/CuPy: an autograd engine, a GPT, adapters, and a gradient checker.

All of it is to be read. Reading order: backend, graph, tensor, functional, gradcheck, nn, optim,
gpt, lora_config, lora. Each file imports only from those before it.

A public name loads its file when it is first used. So `import minilora` takes no time, `check_vjp`
needs NumPy alone, and only the names that read or write files need more.
"""

import importlib
import importlib.util
import sys
import types

__version__ = "0.7.0"

# {file: the public names that it defines}
_PUBLIC = {
    "graph": ["no_grad"],
    "tensor": ["Tensor"],
    "gradcheck": ["GradientError", "check_vjp", "gradcheck"],
    "optim": ["Adam"],
    "quant": ["quantize", "widen"],
    "gpt": ["GPT", "GPTConfig"],
    "llama": ["Llama", "LlamaConfig"],
    "lora_config": ["LoRAConfig"],
    "lora": ["Adapter", "attach", "init_adapter", "merge"],
    "dora": ["init_dora"],
    "ia3": ["init_ia3"],
    "bias_only": ["init_bias_only"],
    "bottleneck": ["init_bottleneck"],
    "prefix": ["init_prefix"],
    "prompt": ["init_prompt"],
    "generate": ["generate", "generate_tokens"],
    "stack": ["stack"],
    "compose": ["combine", "compress", "extract", "spectrum"],
    "count": ["parameter_report"],
    "disk.models": ["load_gpt2", "load_model", "save_gpt2", "save_model"],
    "disk.peft": ["init_peft_adapter", "init_peft_dora", "load_adapter", "save_adapter"],
    "disk.method_file": ["load_method", "save_method"],
    "disk.rounding": ["rounding_report", "save_merged"],
}
_FILE_OF = {name: file for file, names in _PUBLIC.items() for name in names}
__all__ = sorted(_FILE_OF)


def __getattr__(name):
    """Load what `minilora.name` stands for: a public name, or a file of this package.

    Raises: AttributeError if there is no such name.
    """
    if name in _FILE_OF:
        file = importlib.import_module(f".{_FILE_OF[name]}", __name__)
        return getattr(file, name)
    if not name.startswith("_") and importlib.util.find_spec(f".{name}", __name__):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})


class _Package(types.ModuleType):
    """The type of this package: a module in which a public name is stronger than a file.

    `minilora.generate`, `minilora.gradcheck` and `minilora.stack` are functions of files with the
    same names.
    """

    def __setattr__(self, name, value):
        # Python binds each file that it has imported to the file's name in the package.
        if name in _FILE_OF and isinstance(value, types.ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
