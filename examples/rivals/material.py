"""The folder that every library loads: a random base, its adapters, one batch. Knows workloads and minilora."""

import numpy as np

from minilora import GPT, GPTConfig, LoRAConfig, init_peft_adapter, save_adapter, save_gpt2

from .workloads import ADAPTERS, NEW, PROMPT


def write(work, folder, seed):
    """base/ (a GPT-2), c_attn/ and all-linear/ (adapters, as PEFT has them) and ids.npy (B, T + 1) in `folder`."""
    rng = np.random.default_rng(seed)
    shape = {"n_layer": work.layers, "n_head": work.heads, "n_embd": work.width, "vocab_size": work.vocabulary}
    base = GPT(GPTConfig(**shape, block_size=max(work.T, PROMPT + NEW)), rng)
    save_gpt2(base, folder / "base")
    for name, targets in ADAPTERS.items():
        adapter = init_peft_adapter(base, LoRAConfig(r=work.r, alpha=work.alpha, target_modules=targets), rng)
        for pair in adapter.pairs.values():  # not zero: an adapter that was left out must show in the first loss
            pair.lora_B.data[:] = 0.1 * rng.standard_normal(pair.lora_B.shape)
        save_adapter(adapter, folder / name)
    np.save(folder / "ids.npy", rng.integers(0, work.vocabulary, (work.batch, work.T + 1)))
