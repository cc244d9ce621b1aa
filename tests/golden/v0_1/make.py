"""Make the folders that version 0.1.0 left: bases, adapters, a merged model and a run that was interrupted.

This file was run with version 0.1.0 (commit 41ff27d), and is kept to show how the folders next to it came about. It is
not for later versions, which write other files: they read these, and must find in them what 0.1.0 put there. With
minilora 0.1.0 installed, with its extra `hf`,

    python tests/golden/v0_1/make.py

makes all of it again: the same numbers, and the same bytes but for the order in which safetensors puts the entries of a
file's metadata, which is another each time. On another machine the logits, and what training gave, may end in other
digits.

What is expected comes from the models and the adapters in memory, not from what was read back, and is computed in
float64. That 0.1.0 reads the same from the disk is checked before anything is kept.
"""

import os
import shutil
import zlib
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import minilora.finetune as finetuning
import ml_dtypes
import numpy as np
from minilora.train import Interrupted

import minilora
from minilora import (
    GPT,
    GPTConfig,
    LoRAConfig,
    Tensor,
    attach,
    init_adapter,
    init_peft_adapter,
    load_adapter,
    load_model,
    merge,
    no_grad,
    save_adapter,
    save_merged,
    save_model,
)

HERE = Path(__file__).resolve().parent
MODULES = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj", "mlp.up_proj", "mlp.down_proj")
NOTES = (
    "A base is never written. An adapter is two thin matrices beside each of its weights, and what they learn can be "
    "added to the weights, taken off again, kept in a file of its own, or thrown away. The first matrix starts at "
    "random and the second at zero, so that at the start nothing has changed. This line is read by a model that knows "
    "ninety-six characters; it has no end of line, so that it is the same wherever it is checked out."
)


# What is drawn.


def drawn(rng, dtype="float32", **changes):
    """A GPT in which every number is random and matters: biases and LayerNorms are not 0 or 1."""
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 8, "vocab_size": 13, "block_size": 16}
    model = GPT(GPTConfig(**{**sizes, **changes}), rng, dtype)
    for p in model.parameters():
        if p.ndim == 1:
            p.data += (0.3 * rng.standard_normal(p.shape)).astype(dtype)
    return model


def learned(adapter, rng):
    """The adapter with a B that is not zero, as if it had been trained."""
    for pair in adapter.pairs.values():
        pair.lora_B.data += (0.5 * rng.standard_normal(pair.lora_B.shape)).astype(pair.lora_B.dtype)
    return adapter


# What is expected.


def logits(model, ids):
    """What the model computes in float64."""
    with no_grad():
        return model.astype("float64")(ids).data


def told(name, base, adapter, ids):
    """What is expected of an adapter: its logits, its tensors by our names, and the scaling of each module."""
    modules = list(adapter.pairs)
    return {
        f"{name}:logits": logits(attach(base.astype("float64"), adapter.astype("float64")), ids),
        f"{name}:modules": np.array(modules),
        f"{name}:scalings": np.array([adapter.config.scaling(module) for module in modules]),
        **{f"{name}:{key}": p.data for key, p in adapter.named_parameters()},
    }


def rounded(model):
    """The model with each number rounded to bfloat16."""
    cut = lambda t: Tensor(t.data.astype(ml_dtypes.bfloat16).astype(np.float32))
    return model.rebuild(lambda _, t: cut(t) if isinstance(t, Tensor) else None)


# The cases. Each writes its folders, and returns its base and its adapters as they are in memory, and what else is
# expected.


def rotary(case, rng):
    """Rotary positions, which GPT-2's format cannot hold; ranks and alphas by patterns; rsLoRA."""
    base = drawn(rng, positions="rope")
    patterns = {"rank_pattern": {r"h\.0\.attn\.q_proj": 1, "down_proj": 3},
                "alpha_pattern": {r"h\.1\..*": 7, "o_proj": 0.5}}  # fmt: skip
    rslora = {"use_rslora": True, "rank_pattern": {"k_proj": 5}, "alpha_pattern": {r"h\.0\.mlp\.up_proj": 11}}
    return base, {
        "adapter": init_adapter(base, LoRAConfig(2, 5, "all-linear", **patterns), rng),
        "adapter_rslora": init_adapter(base, LoRAConfig(3, 4, ["k_proj", "o_proj", "up_proj"], **rslora), rng),
    }, {}


def float64(case, rng):
    """The base and the adapter in float64, and no field of the configuration as it is by default."""
    odd = {"rope_theta": 50.0, "n_inner": 20, "layer_norm_epsilon": 1e-3, "tie_word_embeddings": False}
    base = drawn(rng, "float64", positions="rope", **odd)
    config = LoRAConfig(2, 3, r"h\.\d+\.(attn\.v_proj|mlp\..*)", dropout=0.25)
    return base, {"adapter": init_adapter(base, config, rng)}, {}


def gpt2(case, rng):
    """Learned positions, in GPT-2's format. q, k and v are one layer there, whether they were trained so or apart."""
    base = drawn(rng)
    apart = {"rank_pattern": {r"h\.1\.attn\.v_proj": 6}, "alpha_pattern": {r"h\.1\.attn\.v_proj": 14}}
    some = ["h.0.attn.q_proj", "h.1.attn.q_proj", "h.1.attn.v_proj", "up_proj"]
    return base, {
        "adapter_c_attn": init_peft_adapter(base, LoRAConfig(2, 5, ["c_attn"]), rng),  # three pairs, one lora_A
        "adapter_apart": init_adapter(base, LoRAConfig(3, 7, ["q_proj", "v_proj"], **apart), rng),
        "adapter_apart_rslora": init_adapter(base, LoRAConfig(3, 7, some, use_rslora=True), rng),
    }, {}


def untied(case, rng):
    """GPT-2's format with a head of its own, and an adapter by PEFT's names."""
    base = drawn(rng, tie_word_embeddings=False, n_inner=20, layer_norm_epsilon=1e-3, n_head=4)
    config = LoRAConfig(3, 7, "all-linear", alpha_pattern={"mlp.c_fc": 2})
    return base, {"adapter": init_peft_adapter(base, config, rng)}, {}


def merged(case, rng):
    """A merged model that was stored in bfloat16."""
    base = drawn(rng, n_layer=1)
    adapter = learned(init_adapter(base, LoRAConfig(2, 4, list(MODULES)), rng), rng)
    model = attach(base, adapter)
    save_merged(model, case / "base", dtype="bfloat16", say=lambda text: None)
    return rounded(merge(model)), {}, {}


def checkpoint(case, rng):
    """A run on a text that was interrupted, and the adapter of one that was not.

    `out` is what the first left: a folder `checkpoint`, after 3 steps of 8. `whole` is what the second gave.
    """
    base = drawn(rng, n_layer=1, vocab_size=96, block_size=32, positions="rope")
    save_model(base, case / "base")
    (case / "notes.txt").write_bytes(NOTES.encode())
    given = {"base": "checkpoint/base", "data": "checkpoint/notes.txt", "alpha": 4, "r": 2, "lr": 1e-2, "steps": 8,
             "batch": 4, "seed": 3, "eval_split": 0.2, "length": 16, "dropout": 0.1, "save_every": 5}  # fmt: skip
    clock, rate = finetuning.time, finetuning.warmup_cosine

    def ctrl_c(step, *rest):  # in a step, when its dropout has been drawn
        if step == 3:
            raise KeyboardInterrupt
        return rate(step, *rest)

    def run(out):
        ticks = count()
        finetuning.time = SimpleNamespace(perf_counter=lambda: next(ticks) / 4)  # the seconds are kept as well
        return finetuning.finetune(finetuning.Settings(out=out, **given), say=lambda text: None, quiet=True)

    try:
        whole = run("checkpoint/whole")
        finetuning.warmup_cosine = ctrl_c
        run("checkpoint/out")
    except Interrupted as stop:
        print(stop)
    finally:
        finetuning.time, finetuning.warmup_cosine = clock, rate
    found = {"steps": np.array(3), "losses": np.array(whole.losses), "before": np.array(whole.before),
             "after": np.array(whole.after)}  # fmt: skip
    return base, {"whole": whole.adapter}, found


CASES = (rotary, float64, gpt2, untied, merged, checkpoint)


def main():
    """Make every case again, check that 0.1.0 reads it, and print its size and how far an adapter moves the logits."""
    if minilora.__version__ != "0.1.0":
        raise SystemExit(f"these are the files of version 0.1.0; this is {minilora.__version__}")
    os.chdir(HERE)  # the folder of the base is noted in an adapter
    total = 0
    for make in CASES:
        case = Path(make.__name__)
        shutil.rmtree(case, ignore_errors=True)
        case.mkdir()
        rng = np.random.default_rng(zlib.crc32(make.__name__.encode()))  # of the name: a new case changes no other
        base, adapters, found = make(case, rng)
        if not (case / "base").exists():
            save_model(base, case / "base")
        ids = rng.integers(0, base.config.vocab_size, (1, 12) if base.config.vocab_size < 20 else (1, 4))
        found = {"ids": ids, "base_logits": logits(base, ids), **found}
        back, moved = load_model(case / "base"), []
        assert back.fingerprint() == base.fingerprint()
        for name, adapter in adapters.items():
            if not (case / name).exists():
                save_adapter(learned(adapter, rng), case / name, base_model=f"{case}/base")
            expected = told(name, base, adapter, ids)
            again = told(name, back, load_adapter(case / name, back, say=lambda text: None), ids)
            assert expected.keys() == again.keys(), (case, name)
            for key, value in expected.items():
                assert np.array_equal(value, again[key]) and value.dtype == again[key].dtype, (case, name, key)
            moved.append(np.abs(expected[f"{name}:logits"] - found["base_logits"]).max())
            found |= expected
        np.savez_compressed(case / "expected.npz", **found)
        assert not moved or min(moved) > 0.01, f"{case}: an adapter does next to nothing"
        size = sum(path.stat().st_size for path in case.rglob("*") if path.is_file())
        total += size
        print(f"{case!s:12} {size:>8,}   {', '.join(f'{m:.2f}' for m in moved) or 'no adapter'}")
    print(f"{'together':12} {total:>8,}")


if __name__ == "__main__":
    main()
