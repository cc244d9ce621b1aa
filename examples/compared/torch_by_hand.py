"""A GPT-2 with LoRA as one would write it in PyTorch today. Variants: compile, bf16.

Attention, gelu, cross entropy and AdamW are PyTorch's own fused ones; q, k and v are one product;
nothing is merged.
"""

import contextlib
import json

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from .workloads import LR, adapter_of, trains


class Linear(nn.Linear):
    """y = x Wᵀ + b + scaling · (x Aᵀ) Bᵀ; without the update if A and B are None.

    Shapes: weight (in, out), as in GPT-2's files; A (r, in), B (out, r).
    """

    def __init__(self, weight, bias, A, B, scaling):
        super().__init__(*weight.shape, device="meta")
        self.weight = nn.Parameter(weight.T.contiguous())
        self.bias = nn.Parameter(bias)
        self.A = None if A is None else nn.Parameter(A)
        self.B = None if B is None else nn.Parameter(B)
        self.scaling = scaling

    def forward(self, x):
        """(..., in) -> (..., out)"""
        y = F.linear(x, self.weight, self.bias)
        if self.A is None:
            return y
        thin = F.linear(x, self.A)
        return y + F.linear(thin * self.scaling, self.B)


class Block(nn.Module):
    """Attention and MLP, each beside the residual stream."""

    def __init__(self, config, norm, linear):
        super().__init__()
        self.heads = config["n_head"]
        self.ln_1 = norm("ln_1")
        self.c_attn = linear("attn.c_attn")
        self.c_proj = linear("attn.c_proj")
        self.ln_2 = norm("ln_2")
        self.c_fc = linear("mlp.c_fc")
        self.mlp_proj = linear("mlp.c_proj")

    def forward(self, x, cache=None, start=0):
        """(B, T, C) -> (B, T, C); a cache (2, B, H, S, D) takes keys and values at `start`."""
        B, T, C = x.shape
        q, k, v = self.c_attn(self.ln_1(x)).split(C, dim=2)
        # (B, T, C) -> (B, H, T, D)
        split_heads = lambda t: t.view(B, T, self.heads, C // self.heads).transpose(1, 2)
        q = split_heads(q)
        k = split_heads(k)
        v = split_heads(v)
        if cache is not None:
            end = start + T
            cache[0, :, :, start:end] = k
            cache[1, :, :, start:end] = v
            k, v = cache[:, :, :, :end]
        # One new token may see all there is.
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)
        x = x + self.c_proj(heads.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class GPT(nn.Module):
    """GPT-2 from a folder, with the adapter in another folder or none."""

    def __init__(self, base, adapter):
        super().__init__()
        config = _read_json(base / "config.json")
        tensors = load_file(base / "model.safetensors")
        factors = {}
        scaling = 0
        if adapter is not None:
            lora = _read_json(adapter / "adapter_config.json")
            factors = load_file(adapter / "adapter_model.safetensors")
            scaling = lora["lora_alpha"] / lora["r"]
        get = lambda name: tensors[f"transformer.{name}"]

        def norm(name):
            layer = nn.LayerNorm(config["n_embd"], config["layer_norm_epsilon"])
            layer.weight = nn.Parameter(get(f"{name}.weight"))
            layer.bias = nn.Parameter(get(f"{name}.bias"))
            return layer

        def linear(name):
            A = factors.pop(f"base_model.model.transformer.{name}.lora_A.weight", None)
            B = factors.pop(f"base_model.model.transformer.{name}.lora_B.weight", None)
            return Linear(get(f"{name}.weight"), get(f"{name}.bias"), A, B, scaling)

        def block(i):
            in_block = lambda name: f"h.{i}.{name}"
            return Block(
                config, lambda name: norm(in_block(name)), lambda name: linear(in_block(name))
            )

        self.wte = nn.Parameter(get("wte.weight"))
        self.wpe = nn.Parameter(get("wpe.weight"))
        self.h = nn.ModuleList(block(i) for i in range(config["n_layer"]))
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

    def generate(self, ids, n_tokens):
        """`n_tokens` tokens more than (1, T), greedily, with a cache that is allocated once."""
        C = self.wte.shape[1]
        H = self.h[0].heads
        caches = torch.empty(len(self.h), 2, 1, H, ids.shape[1] + n_tokens, C // H)
        start = 0
        unread = ids
        for _ in range(n_tokens):
            last = self.hidden(unread, caches, start)[:, -1]
            start += unread.shape[1]
            unread = F.linear(last, self.wte).argmax(-1, keepdim=True)
            ids = torch.cat([ids, unread], 1)
        return ids[0].tolist()


def _read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def prepare(task, variant, job):
    """A function that does one unit of `task`.

    `variant` is "", "compile" or "bf16" (autocast: the weights stay in float32).
    """
    torch.set_num_threads(job.threads)
    adapter = adapter_of(task)
    model = GPT(job.folder / "base", None if adapter is None else job.folder / adapter)
    if task == "generate":
        prompt = torch.from_numpy(job.prompt)
        return torch.inference_mode()(lambda: model.generate(prompt, job.new))

    loss_of_batch = torch.compile(model) if variant == "compile" else model
    inputs = torch.from_numpy(job.inputs)
    targets = torch.from_numpy(job.targets)

    def loss_of():
        if variant == "bf16":
            precision = torch.autocast("cpu", torch.bfloat16)
        else:
            precision = contextlib.nullcontext()
        with precision:
            return loss_of_batch(inputs, targets)

    if trains(task):
        return training(model, loss_of)
    return torch.inference_mode()(lambda: loss_of().item())


def peak_memory(run):
    """{"allocated", "reserved"}: bytes of the GPU while one unit runs, at most.

    In use by tensors, and held by PyTorch's allocator, which had given back what it did not use.
    """
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run()
    allocated = torch.cuda.max_memory_allocated()
    return {"allocated": allocated, "reserved": torch.cuda.max_memory_reserved()}


def training(model, loss_of):
    """A function that does one training step on whatever `model` trains, and returns its loss."""
    trained = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trained, LR, weight_decay=0, fused=True)

    def step():
        loss = loss_of()
        loss.backward()
        adamw.step()
        adamw.zero_grad()
        return loss.item()

    return step
