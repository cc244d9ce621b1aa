"""Make the golden folders: tiny GPT-2s and LoRA adapters as transformers and PEFT write them, and what they compute.

Each folder next to this file is one case: `base/` a checkpoint, mostly also `adapter/`, and `expected.npz`, the
numbers that the two libraries compute in float64 from exactly what lies on the disk. The tests read the folders and
need neither library; this file is run only to make them again, where torch, transformers and peft are installed:

    python tests/golden/make.py

Every weight is drawn anew, LayerNorms and biases too: GPT-2 starts with biases of 0 and LayerNorm weights of 1, and
there a reader that mixes them up, or leaves them out, goes unseen. What comes out is the same every time, to the byte,
for the same versions of the libraries.
"""

import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model
from transformers.utils.logging import disable_progress_bar

HERE = Path(__file__).resolve().parent
ALL_FOUR = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]


# Writing the folders.


def tiny(**changes):
    """The configuration of a GPT-2 of 1,992 numbers. The last token ends a text, as in the real one."""
    sizes = {"n_layer": 2, "n_embd": 8, "n_head": 2, "vocab_size": 13, "n_positions": 16}
    return GPT2Config(**{**sizes, "bos_token_id": 12, "eos_token_id": 12, **changes})


def drawn(config, kind=GPT2LMHeadModel):
    """A model in which every number is random and matters: biases, positions and LayerNorms are not near 0 or 1."""
    model = kind(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape)
            is_norm = name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight"))
            weight.copy_(1 + 0.2 * noise if is_norm else 0.3 * noise)
    return model


def save_base(case, model, **how):
    """Write `base/` as transformers does, less the settings for generating text, which nobody reads here."""
    model.save_pretrained(case / "base", **how)
    (case / "base" / "generation_config.json").unlink(missing_ok=True)


def save_adapter(case, ids, name="adapter", **lora):
    """Attach a random adapter to the base on the disk and write it as PEFT does, less the model card."""
    kind = type(load_base(case))
    if kind is GPT2LMHeadModel:
        lora["task_type"] = "CAUSAL_LM"
    base = kind.from_pretrained(case / "base")  # in its own dtype: PEFT decides which one the adapter gets
    model = get_peft_model(base, LoraConfig(**lora)).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "magnitude" in key:
                weight.mul_(1 + 0.2 * torch.randn(weight.shape))
            elif "lora_" in key:
                weight.copy_(0.3 * torch.randn(weight.shape))
    config = model.peft_config["default"]
    config.base_model_name_or_path = "tiny-gpt2"  # else the path of this machine
    for field in ("target_modules", "exclude_modules"):  # sets, which PEFT writes in an order that changes
        if isinstance(getattr(config, field), set):
            setattr(config, field, sorted(getattr(config, field)))
    model.save_pretrained(case / name, save_embedding_layers=False)  # "auto" asks the hub for "tiny-gpt2"
    (case / name / "README.md").unlink()
    # PEFT sorts the keys of the file, those of rank_pattern and alpha_pattern too, and the first that matches wins.
    # A pattern whose order is not the alphabet's comes back as another adapter, without a word. None may be here.
    back = logits(PeftModel.from_pretrained(load_base(case), case / name).double(), ids)
    assert close(back, logits(model.double(), ids)), f"{case.name}: {name} comes back as another adapter"


# Reading them back, in float64.


def load_base(case):
    """The model of `base/`, in float64, as the class that wrote it."""
    config = json.loads((case / "base" / "config.json").read_text(encoding="utf-8"))
    kind = {"GPT2Model": GPT2Model, "GPT2LMHeadModel": GPT2LMHeadModel}[config["architectures"][0]]
    return kind.from_pretrained(case / "base").double().eval()


def load_adapted(case, name="adapter", **how):
    """The model of `base/` with an adapter on it, in float64."""
    model = PeftModel.from_pretrained(load_base(case), case / name, **how).double().eval()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    return model


def forward(model, ids):
    """Logits; those of a model without a head are its hidden states times the embedding, as if it had a tied one."""
    out = model(input_ids=ids, use_cache=False)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state @ model.get_input_embeddings().weight.T


def logits(model, ids):
    """The logits as a float64 array."""
    with torch.no_grad():
        out = forward(model.double().eval(), ids).numpy()
    assert out.dtype == np.float64
    return out


def close(a, b):
    """Equal but for the rounding of float64."""
    return np.abs(a - b).max() < 1e-12


def loss_of(model, ids):
    """The mean cross entropy of the next token, over all tokens but the first of each row."""
    guesses = forward(model, ids)[:, :-1]
    return torch.nn.functional.cross_entropy(guesses.flatten(0, 1), ids[:, 1:].flatten())


def expected(case, ids):
    """What the base computes, and where there is an adapter, what it computes attached and merged."""
    found = {"ids": ids.numpy(), "base_logits": logits(load_base(case), ids)}
    if (case / "adapter").exists():
        found["adapted_logits"] = logits(load_adapted(case), ids)
        found["merged_logits"] = logits(load_adapted(case).merge_and_unload(), ids)
        assert close(found["merged_logits"], found["adapted_logits"])
    return found


def trained(case, ids, steps):
    """The loss, its gradients, and where the adapter is after some steps of AdamW, each under its key in the file."""
    model = load_adapted(case, is_trainable=True)
    # In the model a magnitude is the weight of a module, in the file it is not called so.
    name_in_file = lambda key: key.replace(".default.", ".").replace("vector.weight", "vector")
    weights = {name_in_file(k): p for k, p in model.named_parameters() if p.requires_grad}
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


# The cases. Each writes its folder and returns the model it drew, and what is expected beyond the usual.


def plain(config=None, dtype=torch.float32, sharded=None, steps=None, kind=GPT2LMHeadModel, **lora):
    """A case that transformers and PEFT write by themselves; `steps` asks for the gradients and steps of AdamW too."""

    def make(case, ids):
        model = drawn(config or tiny(), kind).to(dtype)
        save_base(case, model, **({"max_shard_size": sharded} if sharded else {}))
        if lora:
            save_adapter(case, ids, **lora)
        return model, trained(case, ids, steps) if steps is not None else {}

    return make


def layers(case, ids):
    """Layers chosen by a list of numbers, and in a second adapter by one number and the name of what it counts."""
    model = drawn(tiny(n_layer=3))
    save_base(case, model)
    save_adapter(case, ids, target_modules=["c_attn", "mlp.c_proj"], layers_to_transform=[0, 2], r=2, lora_alpha=4)
    second = {"target_modules": ["attn.c_proj", "c_fc"], "layers_to_transform": 1, "layers_pattern": "h"}
    save_adapter(case, ids, name="adapter_pattern", **second, r=2, lora_alpha=4)
    return model, {"pattern_logits": logits(load_adapted(case, "adapter_pattern"), ids)}


def old_style(case, ids):
    """As the file of 2019 on the hub looks: no prefix, the causal masks among the weights, a config of few fields.

    Its `attn.bias` is a mask, 1 where a position may look, and not a bias. The adapter, which PEFT made on it, does
    say `transformer.`: that is in the class and not in the file.
    """
    config = tiny()
    model = drawn(config)
    tensors = dict(model.transformer.state_dict())
    for i in range(config.n_layer):
        tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, config.n_positions, config.n_positions).tril()
        tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    fields = {"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
              "bos_token_id": 12, "embd_pdrop": 0.1, "eos_token_id": 12, "initializer_range": 0.02,
              "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 16, "n_embd": 8, "n_head": 2, "n_layer": 2,
              "n_positions": 16, "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1,
              "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True,
              "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
              "vocab_size": 13}  # fmt: skip
    (case / "base").mkdir()
    save_file(tensors, case / "base" / "model.safetensors")  # with no metadata, not even the format
    (case / "base" / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    save_adapter(case, ids, target_modules=["c_attn"], r=2, lora_alpha=4)
    return model, {}


def untied_conflict(case, ids):
    """The tensors of `untied`, and a config that says the head is the embedding: transformers warns and keeps both."""
    shutil.copytree(HERE / "untied" / "base", case / "base")
    rewrite_config(case, tie_word_embeddings=True)
    return load_base(HERE / "untied"), {}


def equal_head(case, ids):
    """The tied head is in the file too, a copy of the embedding; many fine-tuned models come like this."""
    model = drawn(tiny())
    save_base(case, model)
    tensors = load_file(case / "base" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    save_file(tensors, case / "base" / "model.safetensors", metadata={"format": "pt"})
    return model, {}


def rewrite_config(case, **changes):
    """Change fields of `base/config.json` by hand."""
    path = case / "base" / "config.json"
    fields = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# First match wins, in the order of the file, which is the alphabet's. Each of these two has keys that match the same
# module, with other values. A dot matches any character, in "c.fc" an underscore. Nothing matches h.0.mlp.c_proj.
RANKS = {
    "attn.c_proj": 3,  # both layers
    r"h\.0\.attn\..*": 1,  # so only c_attn is left
    r"h\.\d+\.attn\.c_attn": 5,  # so only layer 1 is left
}
ALPHAS = {
    "h.1.attn.c_proj": 9,
    r"h\.1\..*": 7,  # the rest of layer 1
    r"h\.\d\.attn\.c_proj": 11,  # so only layer 0 is left
    "mlp.c.fc": 3,  # so only layer 0 is left
}

CASES = {
    "c_attn": plain(r=2, lora_alpha=5, steps=20),
    "all_linear": plain(target_modules="all-linear", r=3, lora_alpha=6, steps=0),
    "patterns": plain(
        target_modules=ALL_FOUR, r=2, lora_alpha=4, use_rslora=True, rank_pattern=RANKS, alpha_pattern=ALPHAS
    ),
    "regex": plain(
        target_modules=r"transformer\.h\.\d+\.(attn\.c_attn|mlp\.c_proj)", r=2, lora_alpha=3, lora_dropout=0.1
    ),
    "layers": layers,
    "bf16": plain(dtype=torch.bfloat16, target_modules=["c_attn"], r=2, lora_alpha=5),
    "f16": plain(dtype=torch.float16),
    "old_style": old_style,
    "untied": plain(tiny(tie_word_embeddings=False)),
    "untied_conflict": untied_conflict,
    "equal_head": equal_head,
    "sharded": plain(sharded="3KB"),
    "inner": plain(tiny(n_inner=20, layer_norm_epsilon=1e-3, n_head=4), target_modules="all-linear", r=2, lora_alpha=4),
    "bare": plain(kind=GPT2Model, target_modules=["c_attn", "mlp.c_fc"], r=2, lora_alpha=4),
    "dora": plain(target_modules=ALL_FOUR, r=2, lora_alpha=3, use_dora=True, rank_pattern={"mlp.c_proj": 3}, steps=20),
    "exclude": plain(target_modules=["c_attn", "c_proj", "c_fc"], exclude_modules=["mlp.c_proj"], r=2, lora_alpha=4),
}


def main():
    """Make every case again, and print its size and how far its adapter moves the logits."""
    torch.set_num_threads(1)
    disable_progress_bar()
    lines = []
    for name, make in CASES.items():
        case = HERE / name
        shutil.rmtree(case, ignore_errors=True)
        case.mkdir()
        torch.manual_seed(zlib.crc32(name.encode()))  # of the name, so that a new case changes no other
        ids = torch.randint(13, (2, 10))
        model, more = make(case, ids)
        found = expected(case, ids) | more
        assert close(found["base_logits"], logits(model, ids)), f"{name}: the base comes back as another model"
        np.savez(case / "expected.npz", **found)
        adapted = [found[key] for key in ("adapted_logits", "pattern_logits") if key in found]
        moved = [np.abs(there - found["base_logits"]).max() for there in adapted]
        assert not moved or min(moved) > 0.01, f"{name}: the adapter does next to nothing"
        size = sum(path.stat().st_size for path in case.rglob("*") if path.is_file())
        lines.append((name, size, *moved))
    print(f"\n{'case':16} {'bytes':>8}   largest |adapted - base| logit")
    for name, size, *moved in lines:
        print(f"{name:16} {size:>8,}   {', '.join(f'{m:.2f}' for m in moved) or 'no adapter'}")
    print(f"{'together':16} {sum(size for _, size, *_ in lines):>8,}")


if __name__ == "__main__":
    main()
