"""The folder that every library loads: a Llama, an adapter, one batch. Knows minilora alone."""

import json

import numpy as np

from minilora import LoRAConfig, init_adapter, load_model, save_adapter, save_model
from minilora.disk.bases import find_base
from minilora.llama import Llama, LlamaConfig
from minilora.quant import widen

from .llm_workloads import PROMPT, SMOLLM2

# Where the path of the GGUF file is written, if the base is the real one.
GGUF = "gguf.json"


def write_inputs(work, folder, seed):
    """Write a base, an adapter and a batch of random numbers into `folder`.

    Those are base/, adapter/ (on every linear, in PEFT's layout), ids.npy (B, T + 1) and new.npy,
    how many tokens are written; and gguf.json, the path of the file that the base came from.
    SmolLM2 itself is the base where it is installed, else random weights of the same shape.
    """
    rng = np.random.default_rng(seed)
    source = real_base(work)
    if source is None:
        save_model(random_base(work, rng), folder / "base")
    else:
        save_model(widen(load_model(source)), folder / "base")
        (folder / GGUF).write_text(json.dumps(str(source)), encoding="utf-8")
    base = load_model(folder / "base")
    config = LoRAConfig(r=work.r, alpha=work.alpha, target_modules="all-linear")
    adapter = init_adapter(base, config, rng)
    for pair in adapter.pairs.values():
        # Not zero: an adapter that a library left out must show in its first loss.
        pair.lora_B.data[:] = 0.02 * rng.standard_normal(pair.lora_B.shape)
    save_adapter(adapter, folder / "adapter")
    n_positions = max(work.T, PROMPT)
    np.save(folder / "ids.npy", rng.integers(0, work.vocabulary, (work.batch, n_positions + 1)))
    np.save(folder / "new.npy", work.new)


def real_base(work):
    """The path of SmolLM2's file, or None for another shape or where it is not installed."""
    if work != SMOLLM2:
        return None
    try:
        return find_base("smollm2")
    except FileNotFoundError:
        return None


def random_base(work, rng):
    """A Llama of this shape, its weights drawn."""
    config = LlamaConfig(
        num_hidden_layers=work.layers,
        hidden_size=work.width,
        intermediate_size=work.inner,
        num_attention_heads=work.heads,
        num_key_value_heads=work.kv_heads,
        head_dim=work.head_dim,
        vocab_size=work.vocabulary,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    return Llama(config, rng)


def gguf_of(folder):
    """The path of the GGUF file that the base in `folder` came from, or None."""
    path = folder / GGUF
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
