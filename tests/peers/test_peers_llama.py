"""Llama's family beside torch, transformers and PEFT, asked live: pip install -e '.[peers]'.

Everything is tiny, random, and in float64 unless it says otherwise; theirs too, throughout (`wide.py`). Each group of
comparisons ends with a planted bug that it must notice. `tests/golden/llama` asks the same of files that were kept.
"""

import numpy as np
import pytest

import minilora.llama
from minilora import (
    Adam,
    LoRAConfig,
    attach,
    generate,
    init_adapter,
    load_adapter,
    load_model,
    merge,
    save_adapter,
    save_model,
)
from minilora.decoder import KeyValueCache
from minilora.disk.tokenizer import load_tokenizer
from minilora.quant import widen

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
    name_of,
    peft_weights,
    same_bits,
    same_dict,
    same_numbers,
    theirs,
    without_a_word,
)
from wide import wide  # noqa: E402

V = 23
QUIET = {"say": lambda line: None}
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Angles of some ten positions tell this base from another.
ROPE = {"rope_type": "default", "rope_theta": 100.0}
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}
# Of four wave lengths, 6 .. 199, one is left as it is, one divided, and two are in between.
LLAMA3 = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
SIZES = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": V, "max_position_embeddings": 128, "bos_token_id": 1,
         "eos_token_id": 2, "rope_parameters": ROPE}  # fmt: skip
# {name: (class of the configuration, what is not as in SIZES)}
KINDS = {
    "llama tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama untied": ("LlamaConfig", {"rms_norm_eps": 1e-2}),
    "llama with a head for each": ("LlamaConfig", {"num_key_value_heads": 4}),
    "llama with one head for all": ("LlamaConfig", {"num_key_value_heads": 1, "head_dim": 6}),
    "llama with biases": ("LlamaConfig", {"attention_bias": True}),
    "llama linear": ("LlamaConfig", {"rope_parameters": LINEAR}),
    "llama 3": ("LlamaConfig", {"rope_parameters": LLAMA3, "head_dim": 8, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {}),
    "mistral without a window": ("MistralConfig", {"sliding_window": None, "head_dim": 8}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 6}),
    "qwen3 with biases": ("Qwen3Config", {"attention_bias": True, "tie_word_embeddings": True}),
}
EACH_KIND = pytest.mark.parametrize("kind", KINDS)
# One of each architecture, where the rest is the same.
ARCHITECTURES = pytest.mark.parametrize("kind", ["llama tied", "mistral", "qwen2", "qwen3"])


@pytest.fixture
def rng():
    """Seeded: every test draws the same numbers each time."""
    return np.random.default_rng(7)


@pytest.fixture(autouse=True)
def float64_throughout(one_thread):
    with wide():
        yield


# Asking the peers.


def make_base(folder, rng, kind="llama tied", dtype=torch.float32, shards=None, **changes):
    """A random model of a kind in `folder`, written by transformers; returns the folder. No norm is 1, no bias 0."""
    name, special = KINDS[kind]
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, name)(**{**SIZES, **special, **changes})
    )
    with torch.no_grad():
        for key, p in model.named_parameters():
            noise = torch.from_numpy(rng.standard_normal(tuple(p.shape)))
            p.data = (1 + 0.2 * noise if "norm" in key else 0.3 * noise).to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(folder, **({"max_shard_size": shards} if shards else {}))
    return folder


def make_peft(base, folder, rng, **lora):
    """A random adapter for the model in `base`, written by PEFT; returns the folder."""
    model = theirs(base, None)
    with without_a_word():
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **lora))
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "lora_" in key:
                p.copy_(torch.from_numpy(0.3 * rng.standard_normal(tuple(p.shape))))
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def ours(folder, dtype="float64"):
    """The model in `folder` as minilora opens it, with plain weights."""
    return widen(load_model(folder)).astype(dtype)


def some_ids(rng, shape=(3, 11)):
    return rng.integers(0, V, shape)


# 1. Bases: the same numbers, and a folder that comes back the same.


def check_base(tmp_path, rng, kind, **how):
    folder, ids = make_base(tmp_path / "base", rng, kind, **how), some_ids(rng, (2, 40))
    there = theirs(folder)
    same_numbers(logits(ours(folder), ids), logits(there, ids), 1e-10)
    different(logits(there, ids), logits(there, ids[:, ::-1].copy()))


@EACH_KIND
def test_a_base_of_transformers_computes_the_same(tmp_path, rng, kind):
    check_base(tmp_path, rng, kind)


@pytest.mark.parametrize("kind", ["llama tied", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_base_of_another_dtype_computes_the_same(tmp_path, rng, kind, dtype):
    check_base(tmp_path, rng, kind, dtype=dtype)


def plain_rotary(monkeypatch):
    unscaled = lambda config: config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    monkeypatch.setattr(minilora.llama, "frequencies", unscaled)


def abrupt_llama3(monkeypatch):
    """Nothing is blended: what is not left as it is, is divided."""
    real = minilora.llama.frequencies

    def changed(config):
        plain = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
        return np.where(np.isclose(real(config), plain), plain, plain / config.rope_scaling["factor"])

    monkeypatch.setattr(minilora.llama, "frequencies", changed)


def no_normed_heads(monkeypatch):
    monkeypatch.setattr(minilora.llama.Attention, "normed", lambda self, x, which: x)


@pytest.mark.parametrize("kind, plant", [
    ("llama linear", plain_rotary), ("llama 3", plain_rotary), ("llama 3", abrupt_llama3), ("qwen3", no_normed_heads)
])  # fmt: skip
def test_another_forward_is_noticed(tmp_path, rng, monkeypatch, kind, plant):
    plant(monkeypatch)
    with pytest.raises(AssertionError, match="logits: differ by"):
        check_base(tmp_path, rng, kind)


def check_base_round_trip(tmp_path, rng, kind, like, dtype=torch.float32, shards=None):
    first, ids = make_base(tmp_path / "first", rng, kind, dtype, shards), some_ids(rng)
    save_model(load_model(first), tmp_path / "second", dtype=name_of(dtype), like=first if like else None)
    before, after = theirs(first, None), theirs(tmp_path / "second", None)
    # Written afresh, a mistral is a llama: they compute the same, and nothing in a model tells them apart.
    name = type(before).__name__ if like else type(before).__name__.replace("Mistral", "Llama")
    assert type(after).__name__ == name and after.dtype == before.dtype == dtype
    same_bits(after.state_dict(), before.state_dict())
    same_bits(files_of(tmp_path / "second"), files_of(first))
    same_numbers(logits(theirs(tmp_path / "second"), ids), logits(theirs(first), ids), 1e-14)
    if like:
        # A Qwen2 has no head_dim of its own; it is written all the same.
        ours_alone = {"_name_or_path", "head_dim"}
        kept = [{k: v for k, v in m.config.to_dict().items() if k not in ours_alone} for m in (before, after)]
        assert kept[1] == kept[0]


@pytest.mark.parametrize("like", [True, False], ids=["like it", "afresh"])
@EACH_KIND
def test_a_folder_of_transformers_comes_back_the_same(tmp_path, rng, kind, like):
    check_base_round_trip(tmp_path, rng, kind, like)


@pytest.mark.parametrize("how", [{"dtype": torch.bfloat16}, {"dtype": torch.float16}, {"shards": "6KB"}])
def test_so_does_a_narrow_one_and_one_in_shards(tmp_path, rng, how):
    check_base_round_trip(tmp_path, rng, "llama tied", True, **how)


# 2. PEFT -> minilora -> PEFT.

FROM_PEFT = {
    "q and v": {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"r": 3, "lora_alpha": 6, "target_modules": "all-linear"},
    "patterns and rsLoRA": {
        "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "o_proj", "down_proj"], "use_rslora": True,
        "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 5, "mlp.down_proj": 3},
        "alpha_pattern": {r"layers\.0\..*": 7, "self_attn.o.proj": 3},
    },
    "regex": {"r": 2, "lora_alpha": 3, "lora_dropout": 0.1,
              "target_modules": r"model\.layers\.\d+\.(self_attn\.k_proj|mlp\.up_proj)"},
    "layers": {"r": 2, "lora_alpha": 4, "target_modules": ["v_proj", "gate_proj"], "layers_to_transform": [1]},
    "layers of a pattern": {"r": 2, "lora_alpha": 4, "target_modules": ["o_proj"], "layers_to_transform": 0,
                            "layers_pattern": "layers"},
    "excluded": {"r": 2, "lora_alpha": 4, "target_modules": EVERY, "exclude_modules": ["mlp.down_proj"]},
    "rank above the width": {"r": 20, "lora_alpha": 12, "target_modules": ["k_proj"]},
}  # fmt: skip


def check_peft_round_trip(tmp_path, rng, kind="llama tied", dtype=torch.float32, **lora):
    base = make_base(tmp_path / "base", rng, kind, dtype)
    first, ids = make_peft(base, tmp_path / "first", rng, **lora), some_ids(rng)
    save_adapter(load_adapter(first, load_model(base), **QUIET), tmp_path / "second")
    same_bits(files_of(tmp_path / "second"), files_of(first))
    before, after = adapted(base, first), adapted(base, tmp_path / "second")
    same_bits(after.state_dict(), before.state_dict())
    after.save_pretrained(tmp_path / "third", save_embedding_layers=False)
    same_dict(*({key: t.double() for key, t in files_of(tmp_path / name).items()} for name in ("third", "first")), 0)
    plain = ours(base)
    model = attach(plain, load_adapter(first, plain, **QUIET))
    same_numbers(logits(model, ids), logits(before, ids), 1e-10)
    same_numbers(logits(merge(model), ids), logits(before, ids), 1e-10)
    different(logits(model, ids), logits(plain, ids))


@pytest.mark.parametrize("lora", FROM_PEFT.values(), ids=FROM_PEFT)
def test_an_adapter_of_peft_comes_back_the_same(tmp_path, rng, lora):
    check_peft_round_trip(tmp_path, rng, **lora)


@EACH_KIND
def test_an_adapter_on_every_linear_does_for_each_kind(tmp_path, rng, kind):
    check_peft_round_trip(tmp_path, rng, kind, **FROM_PEFT["all-linear"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_on_a_narrow_base_comes_back_the_same(tmp_path, rng, dtype):
    check_peft_round_trip(tmp_path, rng, dtype=dtype, **FROM_PEFT["all-linear"])


# 3. Gradients, and the steps of AdamW.


def of_peft(adapter, pick):
    """{key of PEFT's file: array} of what `pick` takes from each tensor of an adapter of ours."""
    found = {}
    for module, pair in adapter.pairs.items():
        found[f"base_model.model.model.{module}.lora_A.weight"] = pick(pair.lora_A)
        found[f"base_model.model.model.{module}.lora_B.weight"] = pick(pair.lora_B)
    return found


def check_lora_gradients(tmp_path, rng, kind, targets="all-linear"):
    folder, ids = make_base(tmp_path / "base", rng, kind), some_ids(rng)
    make_peft(folder, tmp_path / "adapter", rng, r=3, lora_alpha=5, target_modules=targets)
    base, there = ours(folder), adapted(folder, tmp_path / "adapter", is_trainable=True)
    adapter = load_adapter(tmp_path / "adapter", base, **QUIET)
    loss, their_loss = attach(base, adapter).loss(ids[:, :-1], ids[:, 1:]), loss_of(there, ids)
    loss.backward()
    their_loss.backward()
    same_numbers(loss.data, their_loss.detach(), 1e-11, "loss")
    wanted = {k: p.grad for k, p in peft_weights(there).items()}
    assert min(g.abs().max() for g in wanted.values()) > 1e-4
    same_dict(of_peft(adapter, lambda t: t.grad), wanted, 1e-9)


@EACH_KIND
def test_the_gradients_of_lora_are_torchs(tmp_path, rng, kind):
    check_lora_gradients(tmp_path, rng, kind)


def check_every_gradient(tmp_path, rng, kind):
    folder, ids = make_base(tmp_path / "base", rng, kind), some_ids(rng)
    model, there = ours(folder).trainable_copy(), theirs(folder)
    model.loss(ids[:, :-1], ids[:, 1:]).backward()
    loss_of(there, ids).backward()
    wanted = {key.removeprefix("model."): p.grad for key, p in there.named_parameters()}
    small = [key for key, g in wanted.items() if g.abs().max() < 1e-4]
    assert not small
    same_dict({name: p.grad for name, p in model.named_parameters()}, wanted, 1e-9)


@EACH_KIND
def test_the_gradients_of_every_weight_are_torchs(tmp_path, rng, kind):
    check_every_gradient(tmp_path, rng, kind)


def test_a_norm_that_passes_its_gradient_on_unchanged_is_noticed(tmp_path, rng, monkeypatch):
    from minilora.nn import RMSNorm
    from minilora.tensor import Tensor

    def deaf(self, x, call=RMSNorm.__call__):
        # Its value, and as its gradient that of the weight alone.
        value = call(self, Tensor(x.data))
        return x * self.weight + Tensor(value.data - x.data * self.weight.data)

    monkeypatch.setattr(RMSNorm, "__call__", deaf)
    with pytest.raises(AssertionError, match="lora_.*: differ by"):
        check_lora_gradients(tmp_path, rng, "llama tied")


def check_adam(tmp_path, rng, kind, whole, weight_decay=0.01):
    folder, ids = make_base(tmp_path / "base", rng, kind), some_ids(rng)
    base = ours(folder)
    if whole:
        model = base.trainable_copy()
        there = theirs(folder)
        trained = {f"model.{name}".replace("model.lm_head", "lm_head"): p for name, p in model.named_parameters()}
        weights = dict(there.named_parameters())
    else:
        make_peft(folder, tmp_path / "adapter", rng, r=2, lora_alpha=4, target_modules="all-linear")
        adapter = load_adapter(tmp_path / "adapter", base, **QUIET)
        model, there = attach(base, adapter), adapted(folder, tmp_path / "adapter", is_trainable=True)
        trained, weights = of_peft(adapter, lambda t: t), peft_weights(there)
    start = {key: p.detach().numpy().copy() for key, p in weights.items()}
    settings = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": weight_decay}
    adam, their_adam = Adam(list(trained.values()), **settings), torch.optim.AdamW(weights.values(), **settings)
    for _ in range(20):
        adam.zero_grad()
        their_adam.zero_grad()
        model.loss(ids[:, :-1], ids[:, 1:]).backward()
        loss_of(there, ids).backward()
        adam.step()
        their_adam.step()
    after = {key: p.detach().numpy() for key, p in weights.items()}
    assert min(np.abs(after[key] - start[key]).max() for key in start) > 0.01
    same_dict({key: t.data for key, t in trained.items()}, after, 1e-9)


@pytest.mark.parametrize("whole", [False, True], ids=["adapter", "whole model"])
@ARCHITECTURES
def test_twenty_steps_of_adam_are_torchs(tmp_path, rng, kind, whole):
    check_adam(tmp_path, rng, kind, whole)


def test_weight_decay_in_the_gradient_is_noticed(tmp_path, rng, monkeypatch):
    def coupled(self, lr=None, step=Adam.step):
        for p in self.params:
            p.grad = p.grad + self.weight_decay * p.data
        self.weight_decay = 0.0
        step(self, lr)

    monkeypatch.setattr(Adam, "step", coupled)
    with pytest.raises(AssertionError, match="differ by"):
        check_adam(tmp_path, rng, "llama tied", whole=False)


def test_ours_to_peft_and_back_is_the_same_to_the_bit(tmp_path, rng):
    folder = make_base(tmp_path / "base", rng)
    base = load_model(folder)
    first = trained(base, TRAINED["patterns"], rng)
    save_adapter(first, tmp_path / "first")
    there = adapted(folder, tmp_path / "first", None)
    with without_a_word():
        there.save_pretrained(tmp_path / "second", save_embedding_layers=False)
    again = load_adapter(tmp_path / "second", base, **QUIET)
    assert again.pairs.keys() == first.pairs.keys()
    for name, pair in first.pairs.items():
        assert again.pairs[name].scaling == pair.scaling
        for part in ("lora_A", "lora_B"):
            assert np.array_equal(getattr(again.pairs[name], part).data, getattr(pair, part).data), name


# 4. Trained here, used there.

TRAINED = {
    "q and v": LoRAConfig(r=2, alpha=5, target_modules=["q_proj", "v_proj"]),
    "every linear": LoRAConfig(r=2, alpha=5, target_modules="all-linear"),
    "patterns": LoRAConfig(r=2, alpha=4, target_modules=["q_proj", "v_proj", "o_proj", "up_proj"],
                           rank_pattern={"q_proj": 4, r"layers\.1\.mlp\.up_proj": 1},
                           alpha_pattern={"q_proj": 8, r"layers\.0\.self_attn\.o_proj": 9}),
    "rsLoRA": LoRAConfig(r=3, alpha=5, target_modules="all-linear", use_rslora=True),
}  # fmt: skip


def trained(base, config, rng, steps=3):
    """An adapter after a few steps of Adam on random text."""
    adapter = init_adapter(base, config, rng)
    model, adam = attach(base, adapter), Adam(adapter.parameters(), lr=0.1)
    for _ in range(steps):
        ids = some_ids(rng)
        adam.zero_grad()
        model.loss(ids[:, :-1], ids[:, 1:]).backward()
        adam.step()
    return adapter


def check_trained_here(tmp_path, rng, kind, config):
    folder, ids = make_base(tmp_path / "base", rng, kind), some_ids(rng)
    base = ours(folder)
    adapter = trained(base, config, rng)
    model = attach(base, adapter)
    save_adapter(adapter, tmp_path / "adapter")
    there = adapted(folder, tmp_path / "adapter")
    same_bits(peft.get_peft_model_state_dict(there, save_embedding_layers=False), files_of(tmp_path / "adapter"))
    different(logits(model, ids), logits(base, ids))
    same_numbers(logits(there, ids), logits(model, ids), 1e-10)
    save_model(merge(model), tmp_path / "merged", like=folder)
    merged_there, merged = there.merge_and_unload(), theirs(tmp_path / "merged")
    same_dict(merged.state_dict(), merged_there.state_dict(), 1e-10)
    same_numbers(logits(merged, ids), logits(merged_there, ids), 1e-10)


@pytest.mark.parametrize("config", TRAINED.values(), ids=TRAINED)
@pytest.mark.parametrize("kind", ["llama with one head for all", "qwen3"])
def test_an_adapter_trained_here_is_the_same_in_peft(tmp_path, rng, kind, config):
    check_trained_here(tmp_path, rng, kind, config)


@EACH_KIND
def test_so_is_one_on_every_linear_of_each_kind(tmp_path, rng, kind):
    check_trained_here(tmp_path, rng, kind, TRAINED["every linear"])


def test_a_wrong_scaling_is_noticed(tmp_path, rng, monkeypatch):
    too_small = lambda scaling, r, use_rslora: scaling * r**0.5
    monkeypatch.setattr("minilora.disk.peft_config.alpha_for", too_small)
    with pytest.raises(AssertionError, match="logits: differ by"):
        check_trained_here(tmp_path, rng, "llama tied", TRAINED["q and v"])


# 5. Generation.


def their_tokens(model, ids, n, end, mask=None):
    """What transformers generates, greedily, after the prompts `ids`."""
    prompt = torch.from_numpy(ids)
    mask = torch.ones_like(prompt) if mask is None else torch.from_numpy(mask)
    with without_a_word():
        out = model.generate(input_ids=prompt, attention_mask=mask, do_sample=False, max_new_tokens=n, eos_token_id=end,
                             pad_token_id=end)  # fmt: skip
    return out.numpy()


def check_generation(tmp_path, rng, kind, stop=None):
    folder, ids = make_base(tmp_path / "base", rng, kind, tie_word_embeddings=False), some_ids(rng, (6, 4))
    make_peft(folder, tmp_path / "adapter", rng, target_modules="all-linear", r=3, lora_alpha=6)
    base = ours(folder)
    model = attach(base, load_adapter(tmp_path / "adapter", base, **QUIET))
    # A token that never comes: no end.
    end = V + 5 if stop is None else stop
    answers = []
    for here, there in ((base, theirs(folder)), (model, adapted(folder, tmp_path / "adapter"))):
        answers.append(generate(here, ids, 28, stop=stop))
        assert np.array_equal(answers[-1], their_tokens(there, ids, 28, end)), "other tokens"
    assert min(len(np.unique(answer[:, 4:])) for answer in answers) > 3
    assert answers[0].shape != answers[1].shape or (answers[0] != answers[1]).any()


@pytest.mark.parametrize("stop", [None, 3])
@EACH_KIND
def test_greedy_generation_takes_the_same_tokens(tmp_path, rng, kind, stop):
    check_generation(tmp_path, rng, kind, stop)


def test_a_cache_that_loses_its_place_is_noticed(tmp_path, rng, monkeypatch):
    def behind(self, *keys_and_values, extend=KeyValueCache.extend):
        held = extend(self, *keys_and_values)
        self.length -= 1
        return held

    monkeypatch.setattr(KeyValueCache, "extend", behind)
    with pytest.raises(AssertionError, match="other tokens"):
        check_generation(tmp_path, rng, "llama tied")


def test_a_merged_folder_gives_the_same_tokens_there(tmp_path, rng):
    folder, ids = make_base(tmp_path / "base", rng, "llama 3"), some_ids(rng, (4, 5))
    base = load_model(folder)
    adapter = trained(base, TRAINED["every linear"], rng, steps=10)
    merged = merge(attach(base, adapter))
    save_model(merged, tmp_path / "merged", like=folder)
    here = generate(load_model(tmp_path / "merged"), ids, 20)
    assert np.array_equal(here, generate(merged, ids, 20))
    assert np.array_equal(here, their_tokens(theirs(tmp_path / "merged", None), ids, 20, V + 5))
    assert len(np.unique(here[:, 5:])) > 3


# 6. Files of GGUF, as llama.cpp's converter writes them.

GGUF_SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
              "num_hidden_layers": 2, "max_position_embeddings": 128, "tie_word_embeddings": True}  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'"
    " }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def permuted(rows, n_head):
    """The rows of q or k in the order of llama.cpp: neighbours are a pair, not the two halves of a head."""
    return rows.reshape(n_head, 2, -1, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def make_gguf(path, folder, bpe, order):
    """The llama in `folder` as a GGUF file with quantised weights, and `bpe`, a byte-level BPE, as its tokenizer."""
    import json

    gguf = pytest.importorskip("gguf")
    from gguf.quants import quantize

    fields = json.loads((folder / "config.json").read_text())
    tensors = {key.removeprefix("model."): t.float().numpy() for key, t in files_of(folder).items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(fields["num_hidden_layers"])
    writer.add_context_length(fields["max_position_embeddings"])
    writer.add_embedding_length(fields["hidden_size"])
    writer.add_feed_forward_length(fields["intermediate_size"])
    writer.add_head_count(fields["num_attention_heads"])
    writer.add_head_count_kv(fields["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(fields["rms_norm_eps"])
    writer.add_rope_freq_base(fields["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(fields["hidden_size"] // fields["num_attention_heads"])
    writer.add_vocab_size(fields["vocab_size"])
    data = json.loads(bpe.to_str())
    vocabulary = sorted(bpe.get_vocab(), key=bpe.token_to_id)
    special = {token["content"] for token in data["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token in special else 1 for token in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in data["model"]["merges"]])
    writer.add_bos_token_id(vocabulary.index("<|im_start|>"))
    writer.add_eos_token_id(vocabulary.index("<|im_end|>"))
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
             "layers.": "blk.", "embed_tokens": "token_embd", "norm.weight": "output_norm.weight"}  # fmt: skip
    kinds = gguf.GGMLQuantizationType
    for name, array in tensors.items():
        if "q_proj" in name or "k_proj" in name:
            array = order(array, fields["num_attention_heads" if "q_proj" in name else "num_key_value_heads"])
        short = name
        for one, other in names.items():
            if one != "norm.weight" or name == one:
                short = short.replace(one, other)
        kind = kinds.F32 if array.ndim == 1 else kinds.Q8_0 if "embed" in name else kinds.Q4_1
        writer.add_tensor(short, quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def chat_bpe(bpe_folder):
    """A byte-level BPE with ChatML's control tokens."""
    import tokenizers

    bpe = tokenizers.Tokenizer.from_file(str(bpe_folder / "tokenizer.json"))
    bpe.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return bpe


@pytest.fixture
def gguf_file(tmp_path, rng, chat_bpe):
    return random_gguf(tmp_path, rng, chat_bpe)


def random_gguf(tmp_path, rng, bpe, order=permuted):
    size = bpe.get_vocab_size()
    folder = make_base(tmp_path / "before", rng, "llama tied", vocab_size=size, **GGUF_SIZES)
    return make_gguf(tmp_path / "base.gguf", folder, bpe, order)


def of_gguf(path, dtype=torch.float64):
    """The model in a GGUF file as transformers' own import reads it."""
    with without_a_word():
        model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name).eval()
    return model.to(dtype)


def check_gguf(rng, path, other=None):
    ids = rng.integers(0, 300, (3, 20))
    there = of_gguf(other or path)
    same_numbers(logits(ours(path), ids), logits(there, ids), 1e-10)
    different(logits(there, ids), logits(there, ids[:, ::-1].copy()))


def test_a_gguf_file_computes_the_same(rng, gguf_file):
    check_gguf(rng, gguf_file)


def test_rows_of_q_and_k_in_another_order_are_noticed(tmp_path, chat_bpe):
    """The same numbers are drawn twice, and written in two orders."""
    files = []
    for name, order in (("as it is", permuted), ("not permuted", lambda rows, n_head: rows)):
        (tmp_path / name).mkdir()
        files.append(random_gguf(tmp_path / name, np.random.default_rng(1), chat_bpe, order))
    check_gguf(np.random.default_rng(2), files[0])
    with pytest.raises(AssertionError, match="logits: differ by"):
        check_gguf(np.random.default_rng(2), *files)


def test_an_adapter_on_a_gguf_base_is_the_same_in_peft(tmp_path, rng, gguf_file):
    base = load_model(gguf_file)
    adapter = init_adapter(base, TRAINED["every linear"], rng)
    for pair in adapter.pairs.values():
        pair.lora_B.data[:] = 0.3 * rng.standard_normal(pair.lora_B.shape)
    save_adapter(adapter, tmp_path / "adapter")
    with without_a_word():
        there = peft.PeftModel.from_pretrained(of_gguf(gguf_file), tmp_path / "adapter").eval()
    wide_base = ours(gguf_file)
    model = attach(wide_base, load_adapter(tmp_path / "adapter", wide_base, **QUIET))
    ids = rng.integers(0, 300, (3, 20))
    same_numbers(logits(model, ids), logits(there, ids), 1e-10)
    different(logits(model, ids), logits(wide_base, ids))


def test_a_gguf_base_merged_and_saved_gives_the_same_tokens_there(tmp_path, rng, gguf_file):
    base = load_model(gguf_file)
    adapter = init_adapter(base, TRAINED["every linear"], rng)
    for pair in adapter.pairs.values():
        pair.lora_B.data[:] = 0.3 * rng.standard_normal(pair.lora_B.shape)
    merged = merge(attach(base, adapter))
    save_model(merged, tmp_path / "merged", like=gguf_file)
    there = theirs(tmp_path / "merged", None)
    with without_a_word():
        their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    messages = [{"role": "user", "content": "Does the quick fox jump? 1 + 1 = 2, café 😀"}]
    tokenizer = load_tokenizer(gguf_file)
    prompt = tokenizer.encode_chat(messages, add_generation_prompt=True)
    assert prompt.tolist() == chat_ids(their_tokenizer, messages, add_generation_prompt=True)
    assert prompt.tolist() == load_tokenizer(tmp_path / "merged").encode_chat(
        messages, add_generation_prompt=True
    ).tolist()
    here = generate(merged, prompt[None], 20)
    assert np.array_equal(here, their_tokens(there, prompt[None], 20, 10**6))
    assert len(np.unique(here[0, len(prompt) :])) > 3
    assert tokenizer.decode(here[0]) == their_tokenizer.decode(here[0].tolist())
    assert there.generation_config.eos_token_id in (tokenizer.end, list(tokenizer.ends))


# 7. Text: chat templates, and the files that tokenizers come in.

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou "
    "are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ "
    "'<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system = "
    "messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system = false %}{% endif %}"
    "{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}{% if loop.index0 == 0 and system %}{% set content = "
    "'<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] "
    "%}{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{{- bos_token }}\n{%- if messages[0]['role'] == 'system' %}\n    {%- set system_message = "
    "messages[0]['content']|trim %}\n    {%- set messages = messages[1:] %}\n{%- else %}\n    {%- set system_message ="
    " '' %}\n{%- endif %}\n{{- '<|im_start|>system\\n\\n' }}\n{{- 'Cutting Knowledge Date: December 2023\\n' }}\n"
    "{{- system_message }}\n{{- '<|im_end|>' }}\n{%- for message in messages %}\n    {{- '<|im_start|>' + "
    "message['role'] + '\\n\\n' + message['content'] | trim + '<|im_end|>' }}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n\\n' }}\n{%- endif %}\n"
)
MARKED = (
    "{% for message in messages %}\n    {% if message.role == 'assistant' %}\n{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}\n\n    {% else %}\n{{ '<|im_start|>' ~ "
    "message.role ~ '\n' ~ message.content }}<|im_end|>\n    {% endif %}\n{% endfor %}\n"
    "{% if add_generation_prompt %}\n<|im_start|>assistant\n{% endif %}\n"
)
AS_JSON = (
    "{%- for message in messages -%}{%- if loop.index > 2 -%}{%- break -%}{%- endif -%}<|im_start|>"
    "{{ message | tojson(indent=2) }}<|im_end|>{%- endfor -%}{{ strftime_now('%Y') }}"
)
TEMPLATES = {"ChatML": TEMPLATE, "SmolLM2": SMOLLM2, "Llama 2": LLAMA_2, "Llama 3": LLAMA_3, "marked": MARKED,
             "as JSON": AS_JSON}  # fmt: skip
SYSTEM = {"role": "system", "content": "Answer in a few words."}
USER = {"role": "user", "content": " The quick fox, the lazy dog: 1 + 1 = 2?\n\n\tcafé 😀 <b>é</b> "}
ASSISTANT = {"role": "assistant", "content": "Yes. The dog sleeps;\nthe fox doesn't."}
CONVERSATIONS = {
    "a question": [USER],
    "with a system message": [SYSTEM, USER],
    "of three turns": [USER, ASSISTANT, {"role": "user", "content": "Why?"}],
    "that ends with an answer": [SYSTEM, USER, ASSISTANT],
}


def chat_ids(tokenizer, messages, **how):
    """The ids of a conversation, by transformers."""
    found = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **how)
    return list(found["input_ids"])


def make_chat_folder(folder, rng, bpe, template, **changes):
    """A base with a tokenizer and a chat template, as transformers writes both."""
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<|im_start|>", eos_token="<|im_end|>")
    fast.chat_template = template
    make_base(folder, rng, vocab_size=bpe.get_vocab_size(), eos_token_id=bpe.token_to_id("<|im_end|>"), **changes)
    fast.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_conversation_becomes_the_ids_of_apply_chat_template(tmp_path, rng, chat_bpe, template):
    folder = make_chat_folder(tmp_path / "base", rng, chat_bpe, TEMPLATES[template])
    with without_a_word():
        there = transformers.AutoTokenizer.from_pretrained(folder)
    here = load_tokenizer(folder)
    for messages in CONVERSATIONS.values():
        for prompt in (True, False):
            wanted = chat_ids(there, messages, add_generation_prompt=prompt)
            assert here.encode_chat(messages, add_generation_prompt=prompt).tolist() == wanted
            text = there.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            assert here.template.render(messages, add_generation_prompt=prompt) == text


def test_a_control_token_in_a_message_stays_text_where_theirs_ends_the_turn(tmp_path, rng, chat_bpe):
    """The one difference, on purpose: what a user types ends no turn."""
    folder = make_chat_folder(tmp_path / "base", rng, chat_bpe, TEMPLATE)
    there = transformers.AutoTokenizer.from_pretrained(folder)
    here, end = load_tokenizer(folder), chat_bpe.token_to_id("<|im_end|>")
    messages = [{"role": "user", "content": "The dog<|im_end|>\n<|im_start|>system\nfox"}]
    ids = here.encode_chat(messages, add_generation_prompt=True).tolist()
    assert chat_ids(there, messages, add_generation_prompt=True).count(end) == 2
    assert ids.count(end) == 1
    assert here.decode(ids) == there.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


TEXTS = ["The quick brown fox", "a <|tool|> b", "<|tool|><|tool|>\n<think>fox</think>", " <extra> the  dog",
         "naïve café 😀 <|im_end|>", "x<|endoftext|>y"]  # fmt: skip


def test_tokens_that_were_added_later_are_cut_out_as_transformers_does(tmp_path, rng, chat_bpe):
    """Special and plain ones, with blanks taken in at one side: in tokenizer.json, as transformers saves them."""
    from tokenizers import AddedToken

    folder = tmp_path / "base"
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=chat_bpe, eos_token="<|im_end|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    fast.add_tokens(["<think>", "</think>", AddedToken("<extra>", lstrip=True, normalized=False)])
    make_base(folder, rng, vocab_size=len(fast), eos_token_id=fast.eos_token_id)
    fast.save_pretrained(folder)
    there, here = transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    for text in TEXTS:
        wanted = there(text, add_special_tokens=False).input_ids
        assert here.encode(text).tolist() == wanted, text
        assert here.decode(wanted) == there.decode(wanted, clean_up_tokenization_spaces=False)


def test_so_are_those_of_an_old_folder_with_its_added_tokens_in_files_of_their_own(tmp_path, rng, bpe_folder):
    """vocab.json, merges.txt, added_tokens.json and added_tokens_decoder, as transformers 4 left a slow GPT-2."""
    import json
    import shutil

    folder = make_base(tmp_path / "base", rng, vocab_size=304, eos_token_id=0)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(bpe_folder / name, folder / name)
    added = {"<|tool|>": 300, "<think>": 301, "</think>": 302, "<extra>": 303}
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    decoder = {"0": {"content": "<|endoftext|>", **flags, "special": True}}
    for token, i in added.items():
        decoder[str(i)] = {"content": token, **flags, "special": token == "<|tool|>", "lstrip": token == "<extra>"}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    fields = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>",
              "unk_token": "<|endoftext|>", "added_tokens_decoder": decoder, "add_prefix_space": False}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    there = transformers.GPT2Tokenizer.from_pretrained(folder)
    here = load_tokenizer(folder)
    assert there.convert_tokens_to_ids("<think>") == 301
    for text in TEXTS:
        assert here.encode(text).tolist() == there(text, add_special_tokens=False).input_ids, text


# 8. The reference: what it would hide.


def test_without_float64_throughout_a_peer_differs_by_its_own_rounding(tmp_path, rng):
    import wide as module

    folder, ids = make_base(tmp_path / "base", rng), some_ids(rng)
    for patched in module.MODULES:
        patched.torch = torch
    difference = np.abs(logits(theirs(folder), ids) - logits(ours(folder), ids)).max()
    assert 1e-8 < difference < 2e-5
