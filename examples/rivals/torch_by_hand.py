"""A GPT-2 with LoRA as one would write it in PyTorch today. Variants: compile, bf16. Knows the benchmark's tasks.

Attention, gelu, cross entropy and AdamW are PyTorch's own fused ones; q, k and v are one product; nothing is merged.
"""

import contextlib
import json

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from .workloads import LR, NEW, adapter_of, trains


class Linear(nn.Linear):
    """y = x Wᵀ + b + scaling · (x Aᵀ) Bᵀ, from GPT-2's (in, out) weight; without the update if there are no factors."""

    def __init__(self, weight, bias, factors, scaling):
        super().__init__(*weight.shape, device="meta")
        self.weight, self.bias = nn.Parameter(weight.T.contiguous()), nn.Parameter(bias)
        self.A, self.B = (nn.Parameter(f) for f in factors) if factors else (None, None)
        self.scaling = scaling

    def forward(self, x):
        """(..., in) -> (..., out)"""
        y = F.linear(x, self.weight, self.bias)
        return y if self.A is None else y + F.linear(F.linear(x, self.A) * self.scaling, self.B)


class Block(nn.Module):
    """Attention and MLP, each beside the residual stream."""

    def __init__(self, config, norm, linear):
        super().__init__()
        self.heads = config["n_head"]
        self.ln_1, self.ln_2 = norm("ln_1"), norm("ln_2")
        self.c_attn, self.c_proj = linear("attn.c_attn"), linear("attn.c_proj")
        self.c_fc, self.mlp_proj = linear("mlp.c_fc"), linear("mlp.c_proj")

    def forward(self, x, cache=None, start=0):
        """(B, T, C) -> (B, T, C); a cache (2, B, H, S, D) takes this call's keys and values at `start`."""
        B, T, C = x.shape
        qkv = self.c_attn(self.ln_1(x)).split(C, dim=2)
        q, k, v = (part.view(B, T, self.heads, C // self.heads).transpose(1, 2) for part in qkv)
        if cache is not None:
            cache[0, :, :, start : start + T], cache[1, :, :, start : start + T] = k, v
            k, v = cache[:, :, :, : start + T]
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)  # one new token sees all there is
        x = x + self.c_proj(seen.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class GPT(nn.Module):
    """GPT-2 from a folder, with the adapter in another folder or none."""

    def __init__(self, base, adapter):
        super().__init__()
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
        tensors = load_file(base / "model.safetensors")
        lora, factors = {"lora_alpha": 0, "r": 1}, {}
        if adapter:
            lora = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
            factors = load_file(adapter / "adapter_model.safetensors")
        get = lambda name: tensors[f"transformer.{name}"]

        def norm(name):
            layer = nn.LayerNorm(config["n_embd"], config["layer_norm_epsilon"])
            layer.weight, layer.bias = nn.Parameter(get(f"{name}.weight")), nn.Parameter(get(f"{name}.bias"))
            return layer

        def linear(name):
            keys = [f"base_model.model.transformer.{name}.lora_{factor}.weight" for factor in "AB"]
            pair = [factors.pop(key) for key in keys if key in factors]
            scaling = lora["lora_alpha"] / lora["r"]
            return Linear(get(f"{name}.weight"), get(f"{name}.bias"), pair, scaling)

        self.wte, self.wpe = nn.Parameter(get("wte.weight")), nn.Parameter(get("wpe.weight"))
        in_block = lambda make, i: lambda name: make(f"h.{i}.{name}")
        blocks = range(config["n_layer"])
        self.h = nn.ModuleList(Block(config, in_block(norm, i), in_block(linear, i)) for i in blocks)
        self.ln_f = norm("ln_f")
        if factors:
            raise ValueError(f"{adapter}: no place for {', '.join(factors)}")
        for name, p in self.named_parameters():
            p.requires_grad_(adapter is None or name.endswith((".A", ".B")))

    def hidden(self, ids, caches=None, start=0):
        """What the head reads, (B, T) -> (B, T, C)."""
        x = F.embedding(ids, self.wte) + self.wpe[start : start + ids.shape[1]]
        for i, block in enumerate(self.h):
            x = block(x, None if caches is None else caches[i], start)
        return self.ln_f(x)

    def forward(self, ids, targets):
        """The mean loss, in nats per token."""
        logits = F.linear(self.hidden(ids), self.wte)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))

    def generate(self, ids):
        """NEW tokens more than (1, T), greedily, with a cache that is allocated once."""
        C, H, start = self.wte.shape[1], self.h[0].heads, 0
        caches = torch.empty(len(self.h), 2, 1, H, ids.shape[1] + NEW, C // H)
        unread = ids
        for _ in range(NEW):
            last = self.hidden(unread, caches, start)[:, -1]
            start += unread.shape[1]
            unread = F.linear(last, self.wte).argmax(-1, keepdim=True)
            ids = torch.cat([ids, unread], 1)
        return ids[0].tolist()


def prepare(task, variant, unit):
    """A function that does one unit of `task`; `variant` is "", "compile" or "bf16" (autocast: the weights stay)."""
    torch.set_num_threads(unit.threads)
    folder = adapter_of(task)
    model = GPT(unit.folder / "base", folder and unit.folder / folder)
    inputs, targets, prompt = map(torch.from_numpy, (unit.inputs, unit.targets, unit.prompt))
    loss_of = torch.compile(model) if variant == "compile" else model
    half = lambda: torch.autocast("cpu", torch.bfloat16) if variant == "bf16" else contextlib.nullcontext()
    return unit_of(task, model, loss_of, half, inputs, targets, prompt)


def unit_of(task, model, loss_of, half, inputs, targets, prompt):
    """One unit, once everything is loaded."""
    if task == "generate":
        return torch.inference_mode()(lambda: model.generate(prompt))
    if not trains(task):

        @torch.inference_mode()
        def forward():
            with half():
                return loss_of(inputs, targets).item()

        return forward
    adamw = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], LR, weight_decay=0, fused=True)

    def step():
        with half():
            loss = loss_of(inputs, targets)
        loss.backward()
        adamw.step()
        adamw.zero_grad()
        return loss.item()

    return step
