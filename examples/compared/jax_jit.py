"""A GPT-2 with LoRA and Adam in plain JAX, all of a unit under one jit.

The adapter stays beside the weights. JAX has no setting for its threads: it takes as many as the
process may use cores.
"""

import json
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from .workloads import LR, adapter_of, trains

BETA_1 = 0.9
BETA_2 = 0.999
EPS = 1e-8


def linear(p, name, x):
    """(..., in) -> (..., out) by GPT-2's (in, out) weight, and the update if `name` has one."""
    y = x @ p[f"{name}.weight"] + p[f"{name}.bias"]
    if f"{name}.lora_A" in p:
        thin = x @ p[f"{name}.lora_A"].T
        y += p["scaling"] * thin @ p[f"{name}.lora_B"].T
    return y


def norm(p, name, x, eps):
    """Layer norm over the last axis."""
    d = x - x.mean(-1, keepdims=True)
    variance = (d * d).mean(-1, keepdims=True)
    return d / (variance + eps) ** 0.5 * p[f"{name}.weight"] + p[f"{name}.bias"]


def hidden(p, config, ids, caches=None, start=0):
    """(what the head reads (B, T, C), caches).

    Each cache (2, B, S, H, D) is returned with the keys and values of this call in it.
    """
    B, T = ids.shape
    H = config["n_head"]
    eps = config["layer_norm_epsilon"]
    positions = start + jnp.arange(T)
    new_caches = []
    x = p["wte.weight"][ids] + p["wpe.weight"][positions]
    for i in range(config["n_layer"]):
        qkv = linear(p, f"h.{i}.attn.c_attn", norm(p, f"h.{i}.ln_1", x, eps))
        qkv = qkv.reshape(B, T, 3, H, -1)
        q = qkv[:, :, 0]
        kv = jnp.moveaxis(qkv[:, :, 1:], 2, 0)
        if caches is not None:
            kv = jax.lax.dynamic_update_slice(caches[i], kv, (0, 0, start, 0, 0))
            new_caches.append(kv)
        scores = jnp.einsum("bthd,bshd->bhts", q, kv[0]) / math.sqrt(q.shape[-1])
        visible = jnp.arange(kv.shape[2]) <= positions[:, None]
        weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf))
        heads = jnp.einsum("bhts,bshd->bthd", weights, kv[1])
        x += linear(p, f"h.{i}.attn.c_proj", heads.reshape(B, T, -1))
        up = linear(p, f"h.{i}.mlp.c_fc", norm(p, f"h.{i}.ln_2", x, eps))
        x += linear(p, f"h.{i}.mlp.c_proj", jax.nn.gelu(up, approximate=True))
    return norm(p, "ln_f", x, eps), new_caches


def mean_loss(p, config, inputs, targets):
    """The mean loss, in nats per token."""
    h, _ = hidden(p, config, inputs)
    logits = h @ p["wte.weight"].T
    chosen = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return (jax.nn.logsumexp(logits, -1) - chosen).mean()


def load(job, adapter):
    """(config, trained, frozen): two dicts of arrays in GPT-2's names."""
    config = _read_json(job.folder / "base" / "config.json")
    tensors = load_file(job.folder / "base" / "model.safetensors")
    base = {name.removeprefix("transformer."): array for name, array in tensors.items()}
    if adapter is None:
        return config, base, {}
    lora = _read_json(job.folder / adapter / "adapter_config.json")
    base["scaling"] = np.float32(lora["lora_alpha"] / lora["r"])
    pairs = {}
    for name, array in load_file(job.folder / adapter / "adapter_model.safetensors").items():
        name = name.removeprefix("base_model.model.transformer.").removesuffix(".weight")
        pairs[name] = array
    return config, pairs, base


def _read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def prepare(task, variant, job):
    """A function that does one unit of `task`. There is one variant, ""."""
    # JAX makes its threads at its first array.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job.threads])
    config, trained, frozen = load(job, adapter_of(task))
    trained = jax.tree.map(jnp.asarray, trained)
    frozen = jax.tree.map(jnp.asarray, frozen)
    if task == "generate":
        prompt = jnp.asarray(job.prompt, jnp.int32)
        compiled = jax.jit(lambda p, ids: written(p, config, ids, job.new))

        def write():
            tokens = compiled(trained | frozen, prompt)
            return [*job.prompt[0].tolist(), *np.asarray(tokens).tolist()]

        return write

    inputs = jnp.asarray(job.inputs, jnp.int32)
    targets = jnp.asarray(job.targets, jnp.int32)

    def loss_of(trained, frozen, inputs, targets):
        return mean_loss(trained | frozen, config, inputs, targets)

    if trains(task):
        return training(trained, frozen, loss_of, inputs, targets)
    forward = jax.jit(loss_of)
    return lambda: float(forward(trained, frozen, inputs, targets))


def training(trained, frozen, loss_of, inputs, targets):
    """A function that does one step with Adam, all of it under one jit."""

    def adam_step(state, frozen, inputs, targets):
        p, m, v, t = state
        loss, g = jax.value_and_grad(loss_of)(p, frozen, inputs, targets)
        t = t + 1
        m = jax.tree.map(lambda m, g: BETA_1 * m + (1 - BETA_1) * g, m, g)
        v = jax.tree.map(lambda v, g: BETA_2 * v + (1 - BETA_2) * g * g, v, g)

        def moved(p, m, v):
            rms = jnp.sqrt(v / (1 - BETA_2**t))
            return p - LR / (1 - BETA_1**t) * m / (rms + EPS)

        return (jax.tree.map(moved, p, m, v), m, v, t), loss

    m = jax.tree.map(jnp.zeros_like, trained)
    v = jax.tree.map(jnp.zeros_like, trained)
    state = (trained, m, v, jnp.float32(0))
    compiled = jax.jit(adam_step, donate_argnums=0)

    def step():
        nonlocal state
        state, loss = compiled(state, frozen, inputs, targets)
        return float(loss)

    return step


def written(p, config, prompt, n_tokens):
    """The `n_tokens` after `prompt` (1, T), greedily, (n_tokens,)."""
    T = prompt.shape[1]
    H = config["n_head"]
    empty = jnp.zeros((config["n_layer"], 2, 1, T + n_tokens, H, config["n_embd"] // H))
    likeliest = lambda h: (h[:, -1] @ p["wte.weight"].T).argmax(-1).astype(jnp.int32)
    h, caches = hidden(p, config, prompt, empty)

    def one_token(carry, _):
        token, caches, start = carry
        h, caches = hidden(p, config, token[:, None], caches, start)
        return (likeliest(h), caches, start + 1), token[0]

    # The last pass computes a token that nobody reads.
    _, tokens = jax.lax.scan(one_token, (likeliest(h), caches, T), None, length=n_tokens)
    return tokens
