"""DoRA beside PEFT, asked live: pip install -e '.[peers]'. On a GPT-2, whose c_attn is a Conv1D, and on a Llama.

Everything is tiny, random, and in float64. `tests/golden/dora` asks the same of files that were kept.
"""

import numpy as np
import pytest

import minilora.dora
from minilora import (
    Adam,
    LoRAConfig,
    attach,
    init_dora,
    init_peft_dora,
    load_adapter,
    load_model,
    merge,
    save_adapter,
)
from minilora.dora import DoRAPair
from minilora.quant import widen
from minilora.tensor import Tensor

WHY = "not here, so nothing is compared live: pip install -e '.[peers]'"
torch = pytest.importorskip("torch", reason=f"torch is {WHY}")
transformers = pytest.importorskip("transformers", reason=f"transformers is {WHY}")
peft = pytest.importorskip("peft", reason=f"peft is {WHY}")
st = pytest.importorskip("safetensors.torch", reason=f"safetensors.torch is {WHY}")

from asking import (  # noqa: E402
    adapted,
    different,
    files_of,
    logits,
    loss_of,
    peft_weights,
    same_bits,
    same_dict,
    same_numbers,
    theirs,
    without_a_word,
)
from wide import wide  # noqa: E402

V = 13
QUIET = {"say": lambda line: None}
BASES = {
    "gpt2": lambda: transformers.GPT2Config(
        n_layer=2, n_embd=8, n_head=2, vocab_size=V, n_positions=16, bos_token_id=V - 1, eos_token_id=V - 1),
    "llama": lambda: transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=16, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=V, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True),
}  # fmt: skip
FROM_PEFT = {
    "c_attn": ("gpt2", {"r": 2, "lora_alpha": 5, "target_modules": ["c_attn"]}),
    "all-linear": ("gpt2", {"r": 3, "lora_alpha": 6, "target_modules": "all-linear"}),
    "patterns and rsLoRA": ("gpt2", {
        "r": 2, "lora_alpha": 4, "target_modules": ["attn.c_attn", "attn.c_proj"], "use_rslora": True,
        "rank_pattern": {"attn.c_proj": 3}, "alpha_pattern": {r"h\.0\..*": 7}}),
    "a llama": ("llama", {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "all of a llama": ("llama", {"r": 2, "lora_alpha": 3, "target_modules": "all-linear"}),
}  # fmt: skip
every_case = pytest.mark.parametrize("kind, lora", FROM_PEFT.values(), ids=FROM_PEFT)


@pytest.fixture
def rng():
    """Seeded: every test draws the same numbers each time."""
    return np.random.default_rng(7)


@pytest.fixture(autouse=True)
def float64_throughout(one_thread):
    with wide():
        yield


def make_base(kind, folder, rng):
    """A random model in `folder`, written by transformers; returns the folder."""
    model = transformers.AutoModelForCausalLM.from_config(BASES[kind]())
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.from_numpy(rng.standard_normal(tuple(p.shape)))
            is_norm = "norm" in name or ("ln_" in name and name.endswith("weight"))
            p.copy_(1 + 0.2 * noise if is_norm else 0.3 * noise)
    model.save_pretrained(folder)
    return folder


def make_peft(base, folder, rng, **lora):
    """A random DoRA adapter for the model in `base`, written by PEFT; returns the folder."""
    model = theirs(base, None)
    with without_a_word():
        lora |= {"task_type": "CAUSAL_LM", "use_dora": True, "fan_in_fan_out": model.config.model_type == "gpt2"}
        model = peft.get_peft_model(model, peft.LoraConfig(**lora))
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "magnitude" in key:
                p.mul_(torch.from_numpy(rng.uniform(0.6, 1.5, tuple(p.shape))))
            elif "lora_" in key:
                p.copy_(torch.from_numpy(0.3 * rng.standard_normal(tuple(p.shape))))
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def ours(folder):
    return widen(load_model(folder)).astype("float64")


def some_ids(rng, shape=(3, 11)):
    return rng.integers(0, V, shape)


# PEFT -> minilora -> PEFT: the same keys, the same bits, the same numbers.


def check_round_trip(tmp_path, rng, kind, lora):
    base = make_base(kind, tmp_path / "base", rng)
    first, ids = make_peft(base, tmp_path / "first", rng, **lora), some_ids(rng)
    save_adapter(load_adapter(first, load_model(base), **QUIET), tmp_path / "second")
    same_bits(files_of(tmp_path / "second"), files_of(first))
    assert any(key.endswith("lora_magnitude_vector") for key in files_of(first))
    before, after = adapted(base, first), adapted(base, tmp_path / "second")
    assert np.array_equal(logits(after, ids), logits(before, ids))
    plain = ours(base)
    model = attach(plain, load_adapter(first, plain, **QUIET))
    same_numbers(logits(model, ids), logits(before, ids), 1e-10)
    same_numbers(logits(merge(model), ids), logits(before.merge_and_unload(), ids), 1e-10)
    different(logits(model, ids), logits(plain, ids))


@every_case
def test_an_adapter_of_peft_computes_the_same_and_comes_back_the_same(tmp_path, rng, kind, lora):
    check_round_trip(tmp_path, rng, kind, lora)


# Trained here, and opened there.


def trained(base, adapter, rng, steps=3):
    model, adam = attach(base, adapter), Adam(adapter.parameters(), lr=0.1)
    for _ in range(steps):
        ids = some_ids(rng)
        adam.zero_grad()
        model.loss(ids[:, :-1], ids[:, 1:]).backward()
        adam.step()
    return adapter


@pytest.mark.parametrize("kind, make, config", [
    ("gpt2", init_peft_dora, LoRAConfig(2, 5, ["c_attn", "mlp.c_proj"])),
    ("gpt2", init_dora, LoRAConfig(2, 3, "all-linear")),
    ("llama", init_dora, LoRAConfig(2, 3, "all-linear", use_rslora=True, rank_pattern={"q_proj": 3})),
], ids=["c_attn as PEFT has it", "an A for each part", "llama"])  # fmt: skip
def test_an_adapter_trained_here_is_the_same_in_peft(tmp_path, rng, kind, make, config):
    folder, ids = make_base(kind, tmp_path / "base", rng), some_ids(rng)
    base = ours(folder)
    adapter = trained(base, make(base, config, rng), rng)
    model = attach(base, adapter)
    save_adapter(adapter, tmp_path / "adapter")
    there = adapted(folder, tmp_path / "adapter")
    same_bits(peft.get_peft_model_state_dict(there, save_embedding_layers=False), files_of(tmp_path / "adapter"))
    different(logits(model, ids), logits(base, ids))
    same_numbers(logits(there, ids), logits(model, ids), 1e-10)
    same_numbers(logits(merge(model), ids), logits(there.merge_and_unload(), ids), 1e-10)


def test_a_new_one_starts_where_peft_starts(tmp_path, rng):
    folder = make_base("gpt2", tmp_path / "base", rng)
    fresh = peft.get_peft_model(theirs(folder), peft.LoraConfig(
        task_type="CAUSAL_LM", use_dora=True, fan_in_fan_out=True, r=2, lora_alpha=2, target_modules=["c_attn"]))
    adapter = init_peft_dora(ours(folder), LoRAConfig(2, 2, ["c_attn"]), rng)
    save_adapter(adapter, tmp_path / "new", allow_untrained=True)
    key = "base_model.model.transformer.h.1.attn.c_attn.lora_magnitude_vector"
    same_numbers(files_of(tmp_path / "new")[key], peft.get_peft_model_state_dict(fresh)[key], 1e-14, "magnitudes")


# The gradients: those of A and B are without the norm's, as there.


def saved_gradients(tmp_path, adapter):
    save_adapter(adapter.map_tensors(lambda t: Tensor(t.grad)), tmp_path / "gradients", allow_untrained=True)
    return files_of(tmp_path / "gradients")


def check_gradients(tmp_path, rng, kind, lora):
    folder, ids = make_base(kind, tmp_path / "base", rng), some_ids(rng)
    make_peft(folder, tmp_path / "adapter", rng, **lora)
    base = ours(folder)
    adapter = load_adapter(tmp_path / "adapter", base, **QUIET)
    there = adapted(folder, tmp_path / "adapter", is_trainable=True)
    loss, their_loss = attach(base, adapter).loss(ids[:, :-1], ids[:, 1:]), loss_of(there, ids)
    loss.backward()
    their_loss.backward()
    same_numbers(loss.data, their_loss.detach(), 1e-12, "loss")
    # In the model a magnitude is the weight of a module, in the file it is not called so.
    wanted = {key.replace("vector.weight", "vector"): p.grad for key, p in peft_weights(there).items()}
    same_dict(saved_gradients(tmp_path, adapter), wanted, 1e-9)


@pytest.mark.parametrize("case", ["c_attn", "patterns and rsLoRA", "a llama"])
def test_the_gradients_are_torchs(tmp_path, rng, case):
    check_gradients(tmp_path, rng, *FROM_PEFT[case])


# Dropout, with one mask on both sides.


class Masked(torch.nn.Module):
    """Stands for a dropout: multiplies by a mask that was drawn here."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, x):
        return x * self.mask


def test_with_the_same_mask_dropout_does_the_same(tmp_path, rng):
    folder, ids = make_base("llama", tmp_path / "base", rng), some_ids(rng)
    lora = {"r": 2, "lora_alpha": 5, "lora_dropout": 0.4, "target_modules": ["model.layers.1.mlp.up_proj"]}
    make_peft(folder, tmp_path / "adapter", rng, **lora)
    base = ours(folder)
    model = attach(base, load_adapter(tmp_path / "adapter", base, **QUIET))
    there = adapted(folder, tmp_path / "adapter").train()
    mask = (np.random.default_rng(1).random((*ids.shape, 16), np.float32) >= np.float32(0.4)) / 0.6
    layer = there.get_submodule("base_model.model.model.layers.1.mlp.up_proj")
    layer.lora_dropout["default"] = Masked(torch.from_numpy(mask))
    dropped = model(ids, rng=np.random.default_rng(1)).data
    same_numbers(dropped, logits(there, ids), 1e-10)
    different(dropped, logits(model, ids))


# Planted bugs.


@pytest.mark.parametrize("plant, check", [
    (lambda patch: patch.setattr(DoRAPair, "row_norms", lambda self, W: minilora.dora.row_norms(W)), check_round_trip),
    (lambda patch: patch.setattr("minilora.disk.peft.join_magnitudes", lambda name, parts, pairs: np.concatenate(
        [pairs[part].magnitude.data for part in parts[::-1]])), check_round_trip),
    (lambda patch: patch.setattr(minilora.dora, "Tensor", lambda a, **k: Tensor(a * 1.001)), check_gradients),
], ids=["the norm of W alone", "blocks the wrong way round", "a norm that is a little off"])  # fmt: skip
def test_planted_bugs_are_noticed(tmp_path, rng, monkeypatch, plant, check):
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check(tmp_path, rng, *FROM_PEFT["c_attn"])
