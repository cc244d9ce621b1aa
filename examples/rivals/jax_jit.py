"""A GPT-2 with LoRA and Adam in plain JAX, all of a unit under one jit. Knows the benchmark's tasks.

The adapter stays beside the weights. JAX has no setting for its threads: it takes as many as it may use cores.
"""

import json
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from .workloads import LR, NEW, adapter_of, trains


def linear(p, name, x):
    """GPT-2's (in, out) weight, and the update beside it if `name` is adapted: (..., in) -> (..., out)."""
    y = x @ p[f"{name}.weight"] + p[f"{name}.bias"]
    if f"{name}.lora_A" in p:
        y += p["scaling"] * (x @ p[f"{name}.lora_A"].T) @ p[f"{name}.lora_B"].T
    return y


def norm(p, name, x, eps):
    """Layer norm over the last axis."""
    d = x - x.mean(-1, keepdims=True)
    return d / ((d * d).mean(-1, keepdims=True) + eps) ** 0.5 * p[f"{name}.weight"] + p[f"{name}.bias"]


def hidden(p, config, ids, caches=None, start=0):
    """(what the head reads (B, T, C), caches): each cache (2, B, S, H, D) with this call's keys and values in it."""
    (B, T), H, eps = ids.shape, config["n_head"], config["layer_norm_epsilon"]
    positions, written = start + jnp.arange(T), []
    x = p["wte.weight"][ids] + p["wpe.weight"][positions]
    for i in range(config["n_layer"]):
        qkv = linear(p, f"h.{i}.attn.c_attn", norm(p, f"h.{i}.ln_1", x, eps)).reshape(B, T, 3, H, -1)
        q, kv = qkv[:, :, 0], jnp.moveaxis(qkv[:, :, 1:], 2, 0)
        if caches is not None:
            kv = jax.lax.dynamic_update_slice(caches[i], kv, (0, 0, start, 0, 0))
            written.append(kv)
        scores = jnp.einsum("bthd,bshd->bhts", q, kv[0]) / math.sqrt(q.shape[-1])
        seen = jnp.arange(kv.shape[2]) <= positions[:, None]
        share = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
        x += linear(p, f"h.{i}.attn.c_proj", jnp.einsum("bhts,bshd->bthd", share, kv[1]).reshape(B, T, -1))
        up = linear(p, f"h.{i}.mlp.c_fc", norm(p, f"h.{i}.ln_2", x, eps))
        x += linear(p, f"h.{i}.mlp.c_proj", jax.nn.gelu(up, approximate=True))
    return norm(p, "ln_f", x, eps), written


def load(unit, adapter):
    """(config, trained, frozen): two dicts of arrays in GPT-2's names."""
    config = json.loads((unit.folder / "base" / "config.json").read_text(encoding="utf-8"))
    base = load_file(unit.folder / "base" / "model.safetensors")
    base = {name.removeprefix("transformer."): array for name, array in base.items()}
    if adapter is None:
        return config, base, {}
    lora = json.loads((unit.folder / adapter / "adapter_config.json").read_text(encoding="utf-8"))
    pairs = load_file(unit.folder / adapter / "adapter_model.safetensors")
    short = lambda name: name.removeprefix("base_model.model.transformer.").removesuffix(".weight")
    base["scaling"] = np.float32(lora["lora_alpha"] / lora["r"])
    return config, {short(name): array for name, array in pairs.items()}, base


def prepare(task, variant, unit):
    """A function that does one unit of `task`. There is one variant, ""."""
    if hasattr(os, "sched_setaffinity"):  # JAX makes its threads at its first array
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: unit.threads])
    config, trained, frozen = load(unit, adapter_of(task))
    trained, frozen = (jax.tree.map(jnp.asarray, tree) for tree in (trained, frozen))
    inputs, targets, prompt = (jnp.asarray(ids, jnp.int32) for ids in (unit.inputs, unit.targets, unit.prompt))

    def loss_of(trained, frozen, inputs, targets):
        p = trained | frozen
        logits = hidden(p, config, inputs)[0] @ p["wte.weight"].T
        chosen = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        return (jax.nn.logsumexp(logits, -1) - chosen).mean()

    if task == "generate":
        write = jax.jit(lambda p, ids: written(p, config, ids))
        return lambda: [*unit.prompt[0].tolist(), *np.asarray(write(trained | frozen, prompt)).tolist()]
    if not trains(task):
        forward = jax.jit(loss_of)
        return lambda: float(forward(trained, frozen, inputs, targets))

    def adam_step(state, frozen, inputs, targets):
        p, m, v, t = state
        loss, g = jax.value_and_grad(loss_of)(p, frozen, inputs, targets)
        t, b1, b2 = t + 1, 0.9, 0.999
        m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, m, g)
        v = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, v, g)
        move = lambda p, m, v: p - LR / (1 - b1**t) * m / (jnp.sqrt(v / (1 - b2**t)) + 1e-8)
        return (jax.tree.map(move, p, m, v), m, v, t), loss

    zeros = lambda: jax.tree.map(jnp.zeros_like, trained)
    state, step = (trained, zeros(), zeros(), jnp.float32(0)), jax.jit(adam_step, donate_argnums=0)

    def run():
        nonlocal state
        state, loss = step(state, frozen, inputs, targets)
        return float(loss)

    return run


def written(p, config, prompt):
    """The NEW tokens after `prompt` (1, T), greedily, (NEW,)."""
    T, H = prompt.shape[1], config["n_head"]
    empty = jnp.zeros((config["n_layer"], 2, 1, T + NEW, H, config["n_embd"] // H))
    choose = lambda h: (h[:, -1] @ p["wte.weight"].T).argmax(-1).astype(jnp.int32)
    h, caches = hidden(p, config, prompt, empty)

    def one(carry, _):
        token, caches, start = carry
        h, caches = hidden(p, config, token[:, None], caches, start)
        return (choose(h), caches, start + 1), token[0]

    return jax.lax.scan(one, (choose(h), caches, T), None, length=NEW)[1]  # its last pass writes what nobody reads
