"""transformers' own code for Llama's family, with its few float32 islands in float64. Needs torch and transformers.

A model of theirs in float64 still computes its RMSNorms and its rotary angles in float32, because the source says so:
`hidden_states.to(torch.float32)`. Two libraries then agree to 1e-6 at best, which hides small bugs. Here the word is
read as float64 and nothing else changes: the formulas that are compared stay theirs.
"""

import contextlib

import torch
from transformers import modeling_rope_utils
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

MODULES = (modeling_rope_utils, modeling_llama, modeling_mistral, modeling_qwen2, modeling_qwen3)


class WideTorch:
    """`torch`, in which float32 is another name for float64."""

    float = torch.float64
    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@contextlib.contextmanager
def wide():
    """Within it models of transformers, made there and called there, compute in float64 throughout."""
    for module in MODULES:
        module.torch = WideTorch()
    try:
        yield
    finally:
        for module in MODULES:
            module.torch = torch
