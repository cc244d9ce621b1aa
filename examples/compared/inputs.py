"""The folder that every library loads: a base, its adapters, one batch. Knows minilora alone."""

import numpy as np

from minilora import GPT, GPTConfig, LoRAConfig, init_peft_adapter, save_adapter, save_gpt2

from .workloads import ADAPTERS, PROMPT


def write_inputs(work, folder, seed):
    """Write a GPT-2, two adapters and a batch of random numbers into `folder`.

    Those are base/, c_attn/ and all-linear/ (as PEFT has them), ids.npy (B, T + 1) and new.npy, how
    many tokens are written.
    """
    rng = np.random.default_rng(seed)
    config = GPTConfig(
        n_layer=work.layers,
        n_head=work.heads,
        n_embd=work.width,
        vocab_size=work.vocabulary,
        block_size=max(work.T, PROMPT + work.new),
    )
    base = GPT(config, rng)
    save_gpt2(base, folder / "base")
    for name, target_modules in ADAPTERS.items():
        config = LoRAConfig(r=work.r, alpha=work.alpha, target_modules=target_modules)
        adapter = init_peft_adapter(base, config, rng)
        for pair in adapter.pairs.values():
            # Not zero: an adapter that a library left out must show in its first loss.
            pair.lora_B.data[:] = 0.1 * rng.standard_normal(pair.lora_B.shape)
        save_adapter(adapter, folder / name)
    np.save(folder / "ids.npy", rng.integers(0, work.vocabulary, (work.batch, work.T + 1)))
    np.save(folder / "new.npy", work.new)
