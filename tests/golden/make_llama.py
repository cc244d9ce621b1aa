"""Make the golden folders of Llama's family, as `make.py` makes those of GPT-2, with which it shares what it can.

Each folder of `llama/` is one case: `base/`, `adapter/`, and `expected.npz`. Where torch, transformers and peft are
installed, this makes all of it again:

    python tests/golden/make_llama.py

The reference is transformers' own code in float64. It would compute RMSNorm and the rotary angles in float32 all the
same, so here these are in float64 too (tests/peers/wide.py says how). `as_is_logits`, of one case of each family, are
those of the code as it is.
"""

import json
import shutil
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.utils.logging import disable_progress_bar

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "peers"))

from make import close, logits, loss_of  # noqa: E402
from wide import wide  # noqa: E402

VOCABULARY = 23
# Angles of 10 positions, at a base of 10000, would tell one base from another only in the last digits.
ROPE = {"rope_type": "default", "rope_theta": 100.0}
# Of four wave lengths, 6 .. 199, one is left as it is, one divided, and two are in between.
LLAMA3 = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip


# Writing the folders.


def tiny(kind=LlamaConfig, **changes):
    """The configuration of a model of about 4,500 numbers: two query heads share one of keys and values."""
    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 32, "bos_token_id": 1,
             "eos_token_id": 2, "rope_parameters": ROPE}  # fmt: skip
    return kind(**{**sizes, **changes})


def drawn(config, dtype=torch.float32):
    """A model in which every number is random and matters: no norm is 1, and no bias 0."""
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, dtype=torch.float32)
            # Not model.to(dtype), which would round the angles too.
            weight.data = (1 + 0.2 * noise if "norm" in name else 0.3 * noise).to(dtype)
    return model


def save_base(case, model, **how):
    """Write `base/` as transformers does, less the settings for generating text, which nobody reads here."""
    model.save_pretrained(case / "base", **how)
    (case / "base" / "generation_config.json").unlink(missing_ok=True)


def save_adapter(case, ids, **lora):
    """Attach a random adapter to the base on the disk and write it as PEFT does, less the model card."""
    # In its own dtype: PEFT decides which one the adapter gets.
    base = AutoModelForCausalLM.from_pretrained(case / "base")
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **lora)).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "lora_" in key:
                weight.copy_(0.3 * torch.randn(weight.shape, dtype=torch.float32))
    config = model.peft_config["default"]
    # Else the path of this machine.
    config.base_model_name_or_path = "tiny-llama"
    # A set, which PEFT writes in an order that changes.
    config.target_modules = sorted(config.target_modules)
    model.save_pretrained(case / "adapter", save_embedding_layers=False)
    (case / "adapter" / "README.md").unlink()
    # PEFT sorts the keys of patterns when it saves, and the first that matches wins: none may come back as another.
    back = logits(PeftModel.from_pretrained(load_base(case), case / "adapter").double(), ids)
    assert close(back, logits(model.double(), ids)), f"{case.name}: the adapter comes back as another"


# Reading them back, in float64.


def load_base(case):
    """The model of `base/`, in float64."""
    return AutoModelForCausalLM.from_pretrained(case / "base").double().eval()


def load_adapted(case, **how):
    """The model of `base/` with its adapter on it, in float64."""
    model = PeftModel.from_pretrained(load_base(case), case / "adapter", **how).double().eval()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    return model


def expected(case, ids):
    """What the base computes, and the base with its adapter, attached and merged."""
    found = {"ids": ids.numpy(), "base_logits": logits(load_base(case), ids)}
    found["adapted_logits"] = logits(load_adapted(case), ids)
    assert close(logits(load_adapted(case).merge_and_unload(), ids), found["adapted_logits"])
    return found


def trained(case, ids, steps):
    """The loss, its gradients, and where the adapter is after some steps of AdamW, each under its key in the file."""
    model = load_adapted(case, is_trainable=True)
    weights = {k.replace(".default.", "."): p for k, p in model.named_parameters() if p.requires_grad}
    assert weights.keys() == load_file(case / "adapter" / "adapter_model.safetensors").keys()
    adam = torch.optim.AdamW(weights.values(), lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, foreach=False)
    loss = loss_of(model, ids)
    loss.backward()
    found = {"loss": loss.detach().numpy()}
    found |= {f"grad:{key}": weight.grad.numpy().copy() for key, weight in weights.items()}
    for _ in range(steps):
        adam.zero_grad()
        loss_of(model, ids).backward()
        adam.step()
    if steps:
        found |= {f"adamw:{key}": weight.detach().numpy().copy() for key, weight in weights.items()}
    return found


# The cases.

Q_AND_V = {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"]}
ALL_LINEAR = {"r": 2, "lora_alpha": 6, "target_modules": "all-linear"}


def plain(config, lora, dtype=torch.float32, sharded=None, steps=0):
    """A case that transformers and PEFT write by themselves; `steps` of AdamW are asked of them too."""

    def make(case, ids):
        model = drawn(config, dtype)
        save_base(case, model, **({"max_shard_size": sharded} if sharded else {}))
        save_adapter(case, ids, **lora)
        return model, steps

    return make


def old_style(case, ids):
    """A config as transformers 4 wrote it, with null and absent where there is a usual value."""
    model = drawn(tiny(num_key_value_heads=4, rope_parameters={**ROPE, "rope_type": "linear", "factor": 2.0}))
    fields = {"architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
              "bos_token_id": 1, "eos_token_id": 2, "head_dim": None, "hidden_act": "silu", "hidden_size": 16,
              "initializer_range": 0.02, "intermediate_size": 24, "max_position_embeddings": 32, "mlp_bias": False,
              "model_type": "llama", "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": None,
              "pretraining_tp": 1, "rms_norm_eps": 1e-06, "rope_scaling": {"factor": 2.0, "type": "linear"},
              "rope_theta": 100.0, "torch_dtype": "float32", "transformers_version": "4.31.0", "use_cache": True,
              "vocab_size": VOCABULARY}  # fmt: skip
    (case / "base").mkdir()
    save_file(model.state_dict(), case / "base" / "model.safetensors", metadata={"format": "pt"})
    (case / "base" / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    save_adapter(case, ids, **Q_AND_V)
    return model, 0


# First match wins, in the order of the alphabet. Keys match the same module, with other values.
PATTERNS = {
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj", "o_proj", "gate_proj", "down_proj"],
    "use_rslora": True,
    "rank_pattern": {r"layers\.0\.self_attn\..*": 1, r"layers\.\d+\.self_attn\.q_proj": 3, "mlp.down_proj": 4},
    "alpha_pattern": {"layers.1.self_attn.o_proj": 9, r"layers\.1\..*": 7, "mlp.gate.proj": 3},
}

CASES = {
    "llama_tied": plain(tiny(tie_word_embeddings=True), ALL_LINEAR, steps=20),
    "llama_untied": plain(tiny(rms_norm_eps=1e-2), PATTERNS),
    "llama_head_dim": plain(tiny(head_dim=6, num_key_value_heads=1), Q_AND_V),
    "llama_bias": plain(tiny(attention_bias=True), ALL_LINEAR),
    "llama_linear": plain(tiny(rope_parameters={**ROPE, "rope_type": "linear", "factor": 2.0}), Q_AND_V),
    "llama_llama3": plain(tiny(head_dim=8, rope_parameters=LLAMA3, max_position_embeddings=128), Q_AND_V),
    "llama_old_style": old_style,
    "llama_bf16": plain(tiny(tie_word_embeddings=True), Q_AND_V, dtype=torch.bfloat16),
    "llama_f16": plain(tiny(tie_word_embeddings=True), Q_AND_V, dtype=torch.float16),
    "llama_sharded": plain(tiny(), Q_AND_V, sharded="6KB"),
    "mistral": plain(tiny(MistralConfig, sliding_window=None), Q_AND_V),
    "qwen2": plain(tiny(Qwen2Config, tie_word_embeddings=True), ALL_LINEAR),
    "qwen3": plain(tiny(Qwen3Config, head_dim=6), ALL_LINEAR),
}
# Those whose logits are also kept as transformers' code computes them untouched.
AS_IS = ("llama_tied", "mistral", "qwen2", "qwen3")


def main():
    """Make every case again, and print its size and how far its adapter moves the logits."""
    torch.set_num_threads(1)
    disable_progress_bar()
    lines = []
    for name, make in CASES.items():
        case = HERE / "llama" / name
        shutil.rmtree(case, ignore_errors=True)
        case.mkdir(parents=True)
        # Of the name, so that a new case changes no other.
        torch.manual_seed(zlib.crc32(name.encode()))
        ids = torch.randint(VOCABULARY, (2, 10))
        with wide():
            model, steps = make(case, ids)
            found = expected(case, ids) | trained(case, ids, steps)
            assert close(found["base_logits"], logits(model, ids)), f"{name}: the base comes back as another model"
        as_is = logits(load_base(case), ids)
        if name in AS_IS:
            found["as_is_logits"] = as_is
        np.savez(case / "expected.npz", **found)
        moved = np.abs(found["adapted_logits"] - found["base_logits"]).max()
        assert moved > 0.01, f"{name}: the adapter does next to nothing"
        size = sum(path.stat().st_size for path in case.rglob("*") if path.is_file())
        lines.append((name, size, moved, np.abs(as_is - found["base_logits"]).max()))
    print(f"\n{'case':16} {'bytes':>8}   largest |adapted - base| logit, |as it is - in float64|")
    for name, size, *numbers in lines:
        print(f"{name:16} {size:>8,}   {', '.join(f'{n:.2g}' for n in numbers)}")
    print(f"{'together':16} {sum(size for _, size, *_ in lines):>8,}")


if __name__ == "__main__":
    main()
