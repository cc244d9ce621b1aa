"""The same files and the same numbers as torch, transformers and PEFT, asked live: pip install -e '.[peers]'.

Everything here is tiny, random, and in float64 unless it says otherwise. Each group of comparisons ends with a planted
bug that it must notice. `tests/golden` asks the same of files that were kept, without these libraries.
"""

import copy

import numpy as np
import pytest

import minilora.disk.adapter_file
import minilora.disk.models
import minilora.disk.peft
from minilora import (
    GPT,
    Adam,
    GPTConfig,
    LoRAConfig,
    Tensor,
    attach,
    combine,
    compress,
    extract,
    generate,
    init_adapter,
    init_peft_adapter,
    load_adapter,
    load_gpt2,
    merge,
    save_adapter,
    save_gpt2,
)
from minilora.decoder import KeyValueCache
from minilora.lora import LoRALinear
from minilora.nn import Embedding

WHY = "not here, so nothing is compared live: pip install -e '.[peers]'"
torch = pytest.importorskip("torch", reason=f"torch is {WHY}")
transformers = pytest.importorskip("transformers", reason=f"transformers is {WHY}")
peft = pytest.importorskip("peft", reason=f"peft is {WHY}")
st = pytest.importorskip("safetensors.torch", reason=f"safetensors.torch is {WHY}")

from asking import (  # noqa: E402
    adapted,
    different,
    edit,
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

V = 13
SIZES = {"n_layer": 2, "n_embd": 8, "n_head": 2, "vocab_size": V, "n_positions": 16, "bos_token_id": V - 1,
         "eos_token_id": V - 1}  # fmt: skip
ALL_FOUR = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
FILE = "adapter_model.safetensors"
QUIET = {"say": lambda line: None}


@pytest.fixture
def rng():
    """Seeded: every test draws the same numbers each time."""
    return np.random.default_rng(7)


# Asking the peers.


def drawn(model, rng):
    """Every number of `model` random and of consequence: biases and LayerNorms are not 0 and 1."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.from_numpy(rng.standard_normal(tuple(p.shape)))
            p.copy_(1 + 0.2 * noise if "ln_" in name and name.endswith("weight") else 0.3 * noise)
    return model.eval()


def make_gpt2(folder, rng, dtype=torch.float32, shards=None, **changes):
    """A random GPT-2 in `folder`, written by transformers; returns the folder."""
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**SIZES, **changes}))
    drawn(model, rng).to(dtype).save_pretrained(folder, **({"max_shard_size": shards} if shards else {}))
    return folder


def make_peft(base, folder, rng, **lora):
    """A random adapter for the GPT-2 in `base`, written by PEFT; returns the folder."""
    model = theirs(base, None)
    with without_a_word():
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=True, **lora))
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "lora_" in key:
                p.copy_(torch.from_numpy(0.3 * rng.standard_normal(tuple(p.shape))))
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def ours(folder, dtype="float64"):
    """The same as minilora opens it."""
    return load_gpt2(folder).astype(dtype)


def some_ids(rng, shape=(3, 11)):
    return rng.integers(0, V, shape)


# 1. PEFT -> minilora -> PEFT: the same keys, the same bits, and nobody complains.

FROM_PEFT = {
    "default": {"r": 2, "lora_alpha": 5},
    "all-linear": {"r": 3, "lora_alpha": 6, "target_modules": "all-linear"},
    "patterns and rsLoRA": {
        "r": 2, "lora_alpha": 4, "target_modules": ALL_FOUR, "use_rslora": True,
        "rank_pattern": {"attn.c_proj": 3, r"h\.1\.attn\.c_attn": 5},
        "alpha_pattern": {r"h\.0\..*": 7, "mlp.c.fc": 3},
    },
    "regex": {"r": 2, "lora_alpha": 3, "lora_dropout": 0.1,
              "target_modules": r"transformer\.h\.\d+\.(attn\.c_attn|mlp\.c_proj)"},
    "layers": {"r": 2, "lora_alpha": 4, "target_modules": ["c_attn", "c_fc"], "layers_to_transform": [1]},
    "layers of a pattern": {"r": 2, "lora_alpha": 4, "target_modules": ["c_proj"], "layers_to_transform": 0,
                            "layers_pattern": "h"},
    "excluded": {"r": 2, "lora_alpha": 4, "target_modules": ["c_attn", "c_proj"], "exclude_modules": ["mlp.c_proj"]},
    "excluded by a regex": {"r": 2, "lora_alpha": 4, "target_modules": ["c_proj", "c_fc"],
                            "exclude_modules": r".*\.0\.mlp\..*"},
    "rank above the width": {"r": 12, "lora_alpha": 12, "target_modules": ["c_attn"]},
}  # fmt: skip


def check_peft_round_trip(tmp_path, rng, **lora):
    base = make_gpt2(tmp_path / "base", rng)
    first, ids = make_peft(base, tmp_path / "first", rng, **lora), some_ids(rng)
    save_adapter(load_adapter(first, load_gpt2(base), **QUIET), tmp_path / "second")
    same_bits(files_of(tmp_path / "second"), files_of(first))
    before, after = adapted(base, first), adapted(base, tmp_path / "second")
    same_bits(after.state_dict(), before.state_dict())
    assert np.array_equal(logits(after, ids), logits(before, ids))  # and so every scaling is the same
    after.save_pretrained(tmp_path / "third", save_embedding_layers=False)
    same_dict(*({key: t.double() for key, t in files_of(tmp_path / name).items()} for name in ("third", "first")), 0)
    wide = ours(base)
    model = attach(wide, load_adapter(first, wide, **QUIET))
    same_numbers(logits(model, ids), logits(before, ids), 1e-12)
    different(logits(model, ids), logits(wide, ids))


@pytest.mark.parametrize("lora", FROM_PEFT.values(), ids=FROM_PEFT)
def test_an_adapter_of_peft_comes_back_the_same(tmp_path, rng, lora):
    check_peft_round_trip(tmp_path, rng, **lora)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_of_a_narrow_base_comes_back_the_same(tmp_path, rng, dtype):
    base = make_gpt2(tmp_path / "base", rng, dtype)
    first = make_peft(base, tmp_path / "first", rng, r=2, lora_alpha=4)
    save_adapter(load_adapter(first, load_gpt2(base), **QUIET), tmp_path / "second")
    same_bits(files_of(tmp_path / "second"), files_of(first))
    same_bits(adapted(base, tmp_path / "second", None).state_dict(), adapted(base, first, None).state_dict())


def test_the_adapters_bits_are_compared(tmp_path, rng, monkeypatch):
    def one_bit_off(*arguments):
        A, B, columns = join(*arguments)
        return A, np.nextafter(B, np.float32(9)), columns

    join = minilora.disk.peft.join
    monkeypatch.setattr(minilora.disk.peft, "join", one_bit_off)
    with pytest.raises(AssertionError, match="lora_B.weight: other bits"):
        check_peft_round_trip(tmp_path, rng, **FROM_PEFT["default"])


@pytest.mark.parametrize("planted", ["a warning", "a log"])
def test_a_complaint_of_peft_is_heard(tmp_path, rng, planted):
    base = make_gpt2(tmp_path / "base", rng)
    folder = make_peft(base, tmp_path / "adapter", rng, r=2, lora_alpha=4)
    if planted == "a warning":
        edit(folder / "adapter_config.json", minilora="a field PEFT does not know")
        with pytest.raises(AssertionError, match="Unexpected keyword"):
            adapted(base, folder)
    else:
        tensors = files_of(base)
        del tensors["transformer.ln_f.bias"]
        st.save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(AssertionError, match="ln_f.bias"):
            theirs(base)


# 2. Trained here, used there.

TRAINED = {
    "c_attn as PEFT has it": (init_peft_adapter, LoRAConfig(r=2, alpha=5, target_modules=["c_attn"])),
    "all-linear as PEFT has it": (init_peft_adapter, LoRAConfig(r=2, alpha=5, target_modules="all-linear")),
    "patterns in PEFT's names": (init_peft_adapter, LoRAConfig(
        r=2, alpha=5, target_modules=["c_attn", "c_proj"], rank_pattern={"h.1.attn.c_attn": 3, "mlp.c_proj": 1},
        alpha_pattern={"attn.c_proj": 7}, use_rslora=True)),
    "q and v": (init_adapter, LoRAConfig(r=2, alpha=5, target_modules=["q_proj", "v_proj"])),
    "k alone": (init_adapter, LoRAConfig(r=2, alpha=5, target_modules=["k_proj"])),
    "every linear apart": (init_adapter, LoRAConfig(r=2, alpha=5, target_modules="all-linear")),
    "down": (init_adapter, LoRAConfig(r=2, alpha=5, target_modules=["down_proj"])),
    "patterns": (init_adapter, LoRAConfig(
        r=2, alpha=4, target_modules=["q_proj", "v_proj", "o_proj", "up_proj"],
        rank_pattern={"q_proj": 4, "h.1.mlp.up_proj": 1}, alpha_pattern={"q_proj": 8, "h.0.attn.o_proj": 9})),
    "rsLoRA": (init_adapter, LoRAConfig(r=3, alpha=5, target_modules="all-linear", use_rslora=True)),
    "rsLoRA and patterns": (init_adapter, LoRAConfig(
        r=2, alpha=3, target_modules=["k_proj", "v_proj", "down_proj"], use_rslora=True,
        rank_pattern={"down_proj": 3, "h.0.attn.(k|v)_proj": 1}, alpha_pattern={"h.1.*": 2.5})),
}  # fmt: skip


def trained(base, make, config, rng, steps=3):
    """An adapter after a few steps of Adam on random text."""
    adapter = make(base, config, rng)
    model, adam = attach(base, adapter), Adam(adapter.parameters(), lr=0.1)
    for _ in range(steps):
        ids = some_ids(rng)
        adam.zero_grad()
        model.loss(ids[:, :-1], ids[:, 1:]).backward()
        adam.step()
    return adapter


def check_trained_here(tmp_path, rng, make, config):
    folder, ids = make_gpt2(tmp_path / "base", rng), some_ids(rng)
    base = ours(folder)
    adapter = trained(base, make, config, rng)
    model = attach(base, adapter)
    save_adapter(adapter, tmp_path / "adapter")
    there = adapted(folder, tmp_path / "adapter")
    same_bits(peft.get_peft_model_state_dict(there, save_embedding_layers=False), files_of(tmp_path / "adapter"))
    different(logits(model, ids), logits(base, ids))
    same_numbers(logits(there, ids), logits(model, ids), 1e-10)
    save_gpt2(merge(model), tmp_path / "merged")
    merged_there, merged = there.merge_and_unload(), theirs(tmp_path / "merged")
    same_dict(merged.state_dict(), merged_there.state_dict(), 1e-10)
    same_numbers(logits(merged, ids), logits(merged_there, ids), 1e-10)
    again = load_adapter(tmp_path / "adapter", base, **QUIET)
    assert np.array_equal(logits(attach(base, again), ids), logits(model, ids))


@pytest.mark.parametrize("make, config", TRAINED.values(), ids=TRAINED)
def test_an_adapter_trained_here_is_the_same_in_peft(tmp_path, rng, make, config):
    check_trained_here(tmp_path, rng, make, config)


def test_a_wrong_scaling_is_noticed(tmp_path, rng, monkeypatch):
    too_small = lambda scaling, r, use_rslora: scaling * r**0.5
    monkeypatch.setattr("minilora.disk.peft_config.alpha_for", too_small)
    with pytest.raises(AssertionError, match="logits: differ by"):
        check_trained_here(tmp_path, rng, *TRAINED["c_attn as PEFT has it"])


def test_a_block_in_the_wrong_rows_is_noticed(tmp_path, rng, monkeypatch):
    join = minilora.disk.peft.join
    monkeypatch.setattr(minilora.disk.peft, "join", lambda name, parts, *rest: join(name, parts[::-1], *rest))
    with pytest.raises(AssertionError, match="logits: differ by"):
        check_trained_here(tmp_path, rng, *TRAINED["q and v"])


# 3. Computed of adapters: sums, compressed ones and extracted ones, used there and beside PEFT's own.


def two_of_peft(tmp_path, rng):
    """(the folder of a base, those of two adapters by PEFT, of other targets, ranks and strengths)."""
    base = make_gpt2(tmp_path / "base", rng)
    one = make_peft(base, tmp_path / "one", rng, r=3, lora_alpha=5, target_modules=["c_attn", "mlp.c_fc"])
    two = make_peft(base, tmp_path / "two", rng, r=2, lora_alpha=3, target_modules=["c_attn"], use_rslora=True)
    return base, one, two


def check_composed(tmp_path, rng, ours_of, peft_of):
    """What `ours_of` makes of two adapters, and what PEFT does, compute the same there; ours also here."""
    base, *folders = two_of_peft(tmp_path, rng)
    model, ids = ours(base), some_ids(rng)
    composed = ours_of(model, *(load_adapter(folder, model, **QUIET) for folder in folders))
    save_adapter(composed, tmp_path / "composed")
    there = adapted(base, tmp_path / "composed")
    different(logits(there, ids), logits(model, ids))
    same_numbers(logits(there, ids), logits(attach(model, composed), ids), 1e-10)
    both = adapted(base, folders[0])
    both.load_adapter(folders[1], "two")
    peft_of(both, adapters=["default", "two"])
    both.set_adapter("theirs")
    same_numbers(logits(there, ids), logits(both, ids), 1e-10)


WEIGHTS = [0.75, -0.25]
by_peft = lambda kind, **how: lambda model, adapters: model.add_weighted_adapter(
    adapters, WEIGHTS, "theirs", combination_type=kind, **how
)


@pytest.mark.parametrize("ours_of, peft_of", [
    (lambda model, one, two: combine([one, two], WEIGHTS), by_peft("cat")),
    (lambda model, one, two: compress(combine([one, two], WEIGHTS), 2).adapter, by_peft("svd", svd_rank=2)),
    # Merging and taking the base away again is the long way round, to 1e-15.
    (lambda model, one, two: extract(model, merge(attach(model, combine([one, two], WEIGHTS))), 8).adapter,
     by_peft("svd", svd_rank=8)),
], ids=["combine", "compress", "extract"])  # fmt: skip
def test_a_sum_a_compressed_sum_and_an_extracted_one_are_those_of_peft(tmp_path, rng, ours_of, peft_of):
    check_composed(tmp_path, rng, ours_of, peft_of)


def test_what_is_no_sum_is_noticed(tmp_path, rng):
    """PEFT's "linear" adds the factors apart, which is another matrix; and one module of rank 1 too few."""
    with pytest.raises(AssertionError, match="logits: differ by"):
        check_composed(tmp_path, rng, lambda model, one, two: combine([one, two], [-0.25, 0.75]), by_peft("cat"))
    other_rank = lambda model, one, two: compress(combine([one, two], WEIGHTS), 1).adapter
    with pytest.raises(AssertionError, match="logits: differ by"):
        check_composed(tmp_path / "rank", rng, other_rank, by_peft("svd", svd_rank=2))


# 4. Checkpoints.

CHECKPOINTS = {
    "plain": {},
    "sharded": {"shards": "3KB"},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "float64": {"dtype": torch.float64},
    "untied": {"tie_word_embeddings": False},
    "n_inner": {"n_inner": 20, "layer_norm_epsilon": 1e-3, "n_head": 4},
}


def check_checkpoint(tmp_path, rng, like=True, **how):
    first, ids = make_gpt2(tmp_path / "first", rng, **how), some_ids(rng)
    dtype = how.get("dtype", torch.float32)
    save_gpt2(load_gpt2(first), tmp_path / "second", dtype=name_of(dtype), like=first if like else None)
    before, after = theirs(first, None), theirs(tmp_path / "second", None)
    assert after.dtype == before.dtype == dtype and type(after) is type(before)
    same_bits(after.state_dict(), before.state_dict())
    same_bits(files_of(tmp_path / "second"), files_of(first))
    # In memory of their own: torch rounds by where a number lies, and these two lie where their files have them.
    before, after = (copy.deepcopy(model).double() for model in (before, after))
    same_numbers(logits(after, ids), logits(before, ids), 0)
    same_numbers(logits(ours(first), ids), logits(before, ids), 1e-12)
    if like:
        kept = [{k: v for k, v in m.config.to_dict().items() if k != "_name_or_path"} for m in (before, after)]
        assert {k: v for k, v in kept[1].items() if k != "n_ctx"} == kept[0]


@pytest.mark.parametrize("like", [True, False], ids=["like it", "afresh"])
@pytest.mark.parametrize("how", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_checkpoint_of_transformers_comes_back_the_same(tmp_path, rng, how, like):
    check_checkpoint(tmp_path, rng, like, **how)


def test_a_square_weight_the_wrong_way_round_is_noticed(tmp_path, rng, monkeypatch):
    def careless(*model):
        return {k: (parts, turned and "attn.c_proj" not in k) for k, (parts, turned) in layout(*model).items()}

    layout = minilora.disk.models._layout
    monkeypatch.setattr(minilora.disk.models, "_layout", careless)
    with pytest.raises(AssertionError, match="logits: differ by"):  # the bits agree: both ways are wrong
        check_checkpoint(tmp_path, rng)


OWN = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "narrow": {"n_inner": 12, "layer_norm_epsilon": 1e-2},
    "one head": {"n_head": 1, "n_layer": 1},
}


@pytest.mark.parametrize("changes", OWN.values(), ids=OWN)
def test_a_model_made_here_computes_the_same_there(tmp_path, rng, changes):
    sizes = {"n_layer": 3, "n_head": 4, "n_embd": 16, "vocab_size": V, "block_size": 16, **changes}
    model, ids = GPT(GPTConfig(**sizes), rng, "float64"), some_ids(rng, (2, 16))
    model = model.map_tensors(lambda t: Tensor(t.data + 0.2 * rng.standard_normal(t.shape), t.requires_grad))
    save_gpt2(model, tmp_path)
    there = theirs(tmp_path, None)
    assert there.dtype == torch.float64
    same_numbers(logits(there, ids), logits(model, ids), 1e-10)
    different(logits(model, ids), logits(model, ids[:, ::-1]))


HARD = [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 1 + 2**-11, 1 + 3 * 2**-11, 1e-40, 6e-8, 2**-25, 3 * 2**-25,
        -3e-5, -0.0, 65504.0]  # fmt: skip


def check_rounding(tmp_path, rng, dtype):
    """Random weights of all sizes, ties, and numbers that are subnormal in the narrow dtype."""
    sizes = GPTConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=V, block_size=16)
    size = lambda shape: rng.standard_normal(shape) * 10.0 ** rng.integers(-9, 4, shape)
    model = GPT(sizes, rng).map_tensors(lambda t: Tensor(size(t.shape).astype(np.float32), True))
    model.wte.weight.data.flat[: len(HARD)] = HARD
    save_gpt2(model, tmp_path / "wide")
    save_gpt2(model, tmp_path / "narrow", dtype=name_of(dtype))
    wide = files_of(tmp_path / "wide")
    assert {t.dtype for t in wide.values()} == {torch.float32}
    same_bits(files_of(tmp_path / "narrow"), {key: t.to(dtype) for key, t in wide.items()})
    same_bits(theirs(tmp_path / "narrow", None).state_dict(), theirs(tmp_path / "wide", None).to(dtype).state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_rounded_as_torch_does(tmp_path, rng, dtype):
    check_rounding(tmp_path, rng, dtype)


def test_rounding_down_is_noticed(tmp_path, rng, monkeypatch):
    towards_zero = lambda name, x, dtype: (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32).astype(dtype)
    monkeypatch.setattr("minilora.disk.models.rounded", towards_zero)
    with pytest.raises(AssertionError, match="other bits"):
        check_rounding(tmp_path, rng, torch.float16)


# 5. Gradients.

GRADIENTS = {"c_attn": ["c_attn"], "all-linear": "all-linear", "attn.c_proj": ["attn.c_proj"]}


def saved_gradients(tmp_path, thing):
    """The gradients of an adapter or of a model, under the names and in the orientation of the peers."""
    gradients = thing.map_tensors(lambda t: Tensor(t.grad))
    if isinstance(thing, GPT):
        save_gpt2(gradients, tmp_path / "gradients")
    else:
        save_adapter(gradients, tmp_path / "gradients", allow_untrained=True)
    return files_of(tmp_path / "gradients")


def check_lora_gradients(tmp_path, rng, targets):
    folder, ids = make_gpt2(tmp_path / "base", rng), some_ids(rng)
    make_peft(folder, tmp_path / "adapter", rng, r=3, lora_alpha=5, target_modules=targets)
    base = ours(folder)
    adapter, there = load_adapter(tmp_path / "adapter", base, **QUIET), adapted(folder, tmp_path / "adapter",
                                                                               is_trainable=True)  # fmt: skip
    loss, their_loss = attach(base, adapter).loss(ids[:, :-1], ids[:, 1:]), loss_of(there, ids)
    loss.backward()
    their_loss.backward()
    same_numbers(loss.data, their_loss.detach(), 1e-12, "loss")
    found, wanted = saved_gradients(tmp_path, adapter), {k: p.grad for k, p in peft_weights(there).items()}
    assert min(g.abs().max() for g in wanted.values()) > 1e-4
    same_dict(found, wanted, 1e-9)


@pytest.mark.parametrize("targets", GRADIENTS.values(), ids=GRADIENTS)
def test_the_gradients_of_lora_are_torchs(tmp_path, rng, targets):
    check_lora_gradients(tmp_path, rng, targets)


def check_base_gradients(tmp_path, rng, **changes):
    folder, ids = make_gpt2(tmp_path / "base", rng, **changes), some_ids(rng)
    model, there = ours(folder).trainable_copy(), theirs(folder)
    model.loss(ids[:, :-1], ids[:, 1:]).backward()
    loss_of(there, ids).backward()
    wanted = {key: p.grad for key, p in there.named_parameters()}
    assert all(g.abs().max() > 1e-4 for g in wanted.values())
    same_dict(saved_gradients(tmp_path, model), wanted, 1e-9)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"n_inner": 20, "n_head": 4, "n_layer": 3}],
                         ids=["tied", "untied", "other sizes"])  # fmt: skip
def test_the_gradients_of_every_weight_are_torchs(tmp_path, rng, changes):
    check_base_gradients(tmp_path, rng, **changes)


def test_a_gradient_that_stops_at_an_adapter_is_noticed(tmp_path, rng, monkeypatch):
    def deaf(self, x, rng=None):
        return self.linear(x, rng) + self.pair(Tensor(x.data))

    monkeypatch.setattr(LoRALinear, "__call__", deaf)
    with pytest.raises(AssertionError, match="lora_.*: differ by"):
        check_lora_gradients(tmp_path, rng, "all-linear")


def test_a_tied_head_without_its_gradient_is_noticed(tmp_path, rng, monkeypatch):
    monkeypatch.setattr(GPT, "head_layer", lambda self: Embedding(Tensor(self.wte.weight.data)))
    with pytest.raises(AssertionError, match="wte.weight: differ by"):
        check_base_gradients(tmp_path, rng)


# 6. Adam.


def check_adam(tmp_path, rng, weight_decay, whole):
    folder, ids = make_gpt2(tmp_path / "base", rng), some_ids(rng)
    make_peft(folder, tmp_path / "adapter", rng, r=2, lora_alpha=4)
    base = ours(folder)
    if whole:
        trainee, there = base.trainable_copy(), theirs(folder)
        model, weights = trainee, dict(there.named_parameters())
    else:
        trainee = load_adapter(tmp_path / "adapter", base, **QUIET)
        model, there = attach(base, trainee), adapted(folder, tmp_path / "adapter", is_trainable=True)
        weights = peft_weights(there)
    start = {key: p.detach().numpy().copy() for key, p in weights.items()}
    settings = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": weight_decay}
    adam, their_adam = Adam(trainee.parameters(), **settings), torch.optim.AdamW(weights.values(), **settings)
    for _ in range(20):
        adam.zero_grad()
        their_adam.zero_grad()
        model.loss(ids[:, :-1], ids[:, 1:]).backward()
        loss_of(there, ids).backward()
        adam.step()
        their_adam.step()
    (save_gpt2 if whole else save_adapter)(trainee, tmp_path / "after")
    after = {key: p.detach().numpy() for key, p in weights.items()}
    assert min(np.abs(after[key] - start[key]).max() for key in start) > 0.01
    same_dict(files_of(tmp_path / "after"), after, 1e-8)


@pytest.mark.parametrize("whole", [False, True], ids=["adapter", "whole model"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_twenty_steps_of_adam_are_torchs(tmp_path, rng, weight_decay, whole):
    check_adam(tmp_path, rng, weight_decay, whole)


def test_weight_decay_in_the_gradient_is_noticed(tmp_path, rng, monkeypatch):
    def coupled(self, lr=None):
        for p in self.params:
            p.grad = p.grad + 0.1 * p.data
        self.weight_decay = 0.0
        step(self, lr)

    step = Adam.step
    monkeypatch.setattr(Adam, "step", coupled)
    with pytest.raises(AssertionError, match="differ by"):
        check_adam(tmp_path, rng, 0.1, whole=False)


# 7. Generation.


def check_generation(tmp_path, rng, stop=None):
    sizes = {"n_positions": 32, "n_embd": 16, "tie_word_embeddings": False}  # a tied one repeats itself
    folder, ids = make_gpt2(tmp_path / "base", rng, **sizes), some_ids(rng, (6, 4))
    make_peft(folder, tmp_path / "adapter", rng, target_modules="all-linear", r=3, lora_alpha=6)
    base = ours(folder)
    model = attach(base, load_adapter(tmp_path / "adapter", base, **QUIET))
    answers = []
    for here, there in ((base, theirs(folder)), (model, adapted(folder, tmp_path / "adapter"))):
        prompt, end = torch.from_numpy(ids), V + 5 if stop is None else stop  # a token that never comes: no end
        with without_a_word():
            wanted = there.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                                    max_new_tokens=28, eos_token_id=end, pad_token_id=end)  # fmt: skip
        answers.append(generate(here, ids, 28, stop=stop))
        assert np.array_equal(answers[-1], wanted.numpy()), "other tokens"
    assert min(len(np.unique(answer[:, 4:])) for answer in answers) > 3
    assert answers[0].shape != answers[1].shape or (answers[0] != answers[1]).any()


@pytest.mark.parametrize("stop", [None, 3, 7])
def test_greedy_generation_takes_the_same_tokens(tmp_path, rng, stop):
    check_generation(tmp_path, rng, stop)


def test_a_cache_that_loses_its_place_is_noticed(tmp_path, rng, monkeypatch):
    def behind(self, k, v, front=None, extend=KeyValueCache.extend):
        held = extend(self, k, v, front)
        self.length -= 1
        return held

    monkeypatch.setattr(KeyValueCache, "extend", behind)
    with pytest.raises(AssertionError, match="other tokens"):
        check_generation(tmp_path, rng)


# 8. The square trap: attn.c_proj is (C, C), and no shape tells which way round it is.


def check_square(tmp_path, rng):
    folder, ids = make_gpt2(tmp_path / "base", rng), some_ids(rng)
    make_peft(folder, tmp_path / "theirs", rng, target_modules=["attn.c_proj"], r=8, lora_alpha=8)  # r = in = out
    base = ours(folder)
    adapter = load_adapter(tmp_path / "theirs", base, **QUIET)
    same_numbers(logits(attach(base, adapter), ids), logits(adapted(folder, tmp_path / "theirs"), ids), 1e-12)
    for pair in adapter.pairs.values():
        update = pair.lora_B.data @ pair.lora_A.data
        different(update, update.T, 0.5)
    made = trained(base, init_adapter, LoRAConfig(r=8, alpha=8, target_modules=["o_proj"]), rng, steps=5)
    save_adapter(made, tmp_path / "ours")
    there = adapted(folder, tmp_path / "ours")
    same_numbers(logits(attach(base, made), ids), logits(there, ids), 1e-10)
    save_gpt2(merge(attach(base, made)), tmp_path / "merged")
    same_dict(theirs(tmp_path / "merged").state_dict(), there.merge_and_unload().state_dict(), 1e-10)


def test_a_square_update_is_the_right_way_round(tmp_path, rng):
    check_square(tmp_path, rng)


@pytest.mark.parametrize("way", ["reading", "writing"])
def test_a_square_update_the_wrong_way_round_is_noticed(tmp_path, rng, monkeypatch, way):
    factors, join = minilora.disk.adapter_file._factors, minilora.disk.peft.join
    if way == "reading":  # (B A)ᵀ = Aᵀ Bᵀ, and with r = in = out every shape fits
        turned = lambda pair: {"lora_A": pair["lora_B"].T, "lora_B": pair["lora_A"].T}
        both_turned = lambda *arguments: {name: turned(pair) for name, pair in factors(*arguments).items()}
        monkeypatch.setattr(minilora.disk.adapter_file, "_factors", both_turned)
    else:
        monkeypatch.setattr(minilora.disk.peft, "join", lambda *args: (*(x.T for x in join(*args)[1::-1]), {}))
    with pytest.raises(AssertionError, match="logits: differ by"):
        check_square(tmp_path, rng)


# 9. What PEFT opens without a word, and computes something else with. load_adapter refuses each, and names it.


def two_module_adapter(tmp_path, rng):
    """(base folder, adapter folder) for c_attn and mlp.c_proj, as PEFT writes them."""
    base = make_gpt2(tmp_path / "base", rng)
    lora = {"r": 2, "lora_alpha": 16, "target_modules": ["c_attn", "mlp.c_proj"]}
    return base, make_peft(base, tmp_path / "adapter", rng, **lora)


def wrong_base(tmp_path, rng):
    """Another base of the same shapes. The adapter is ours: PEFT's own say nothing about their base."""
    right, wrong = make_gpt2(tmp_path / "right", rng), make_gpt2(tmp_path / "wrong", rng)
    save_adapter(trained(ours(right), *TRAINED["c_attn as PEFT has it"], rng), tmp_path / "adapter")
    return right, wrong, tmp_path / "adapter"


def deeper(tmp_path, rng):
    """The adapter of a model of three layers, on two."""
    deep = make_gpt2(tmp_path / "deep", rng, n_layer=3)
    return deep, make_gpt2(tmp_path / "base", rng), make_peft(deep, tmp_path / "adapter", rng, r=2, lora_alpha=4)


def narrower(tmp_path, rng):
    """The configuration names fewer modules than the file holds."""
    base, folder = two_module_adapter(tmp_path, rng)
    edit(folder / "adapter_config.json", target_modules=["c_attn"])
    return base, base, folder


def misspelt(tmp_path, rng):
    """One of two targets is misspelt, so that half of what was asked for is there."""
    base, folder = two_module_adapter(tmp_path, rng)
    edit(folder / "adapter_config.json", target_modules=["c_attn", "mpl.c_proj"])
    st.save_file({k: t for k, t in files_of(folder).items() if "c_attn" in k}, folder / FILE, metadata={"format": "pt"})
    return base, base, folder


def without_alpha(tmp_path, rng):
    """No lora_alpha, which PEFT takes to be 8: here half of what training used."""
    base, folder = two_module_adapter(tmp_path, rng)
    edit(folder / "adapter_config.json", lora_alpha=None)
    return base, base, folder


SILENT = [
    (wrong_base, r"does not fit this base.*h\.0\.attn\.k_proj\.bias: made for \w+, this base has"),
    (deeper, r"superfluous: transformer\.h\.2\.attn\.c_attn"),
    (narrower, r"superfluous: transformer\.h\.0\.mlp\.c_proj, transformer\.h\.1\.mlp\.c_proj"),
    (misspelt, r"\['mpl\.c_proj'\] match no Linear"),
    (without_alpha, "no lora_alpha"),
]


def check_refused(base, folder, complaint):
    with pytest.raises(ValueError, match=f"(?s){complaint}"):
        load_adapter(folder, ours(base), **QUIET)


@pytest.mark.parametrize("make, complaint", SILENT, ids=[make.__name__ for make, _ in SILENT])
def test_what_peft_opens_in_silence_is_refused(tmp_path, rng, make, complaint):
    _, base, folder = make(tmp_path, rng)
    ids = some_ids(rng)
    different(logits(adapted(base, folder), ids), logits(theirs(base), ids))  # opened, heard by without_a_word, at work
    check_refused(base, folder, complaint)


def test_without_alpha_peft_computes_with_another_scale(tmp_path, rng):
    base, folder = two_module_adapter(tmp_path, rng)
    ids, right = some_ids(rng), adapted(base, folder)
    edit(folder / "adapter_config.json", lora_alpha=None)
    different(logits(adapted(base, folder), ids), logits(right, ids))


@pytest.mark.parametrize("call", ["from_pretrained", "load_adapter"])
def test_names_of_another_class_do_nothing_in_peft_and_are_refused_here(tmp_path, rng, call):
    base, folder = two_module_adapter(tmp_path, rng)
    renamed = {key.replace("base_model.model.transformer", "base_model.model.model"): t
               for key, t in files_of(folder).items()}  # fmt: skip
    st.save_file(renamed, folder / FILE, metadata={"format": "pt"})
    ids = some_ids(rng)
    if call == "from_pretrained":  # complains of missing keys, and goes on
        with pytest.raises(AssertionError, match="missing adapter keys"):
            adapted(base, folder)
    else:  # does not even complain
        (tmp_path / "good").mkdir()
        model = adapted(base, make_peft(base, tmp_path / "good", rng, r=2, lora_alpha=4))
        with without_a_word():
            model.load_adapter(folder, "other")
        model.set_adapter("other")
        assert np.array_equal(logits(model, ids), logits(theirs(base), ids))
    check_refused(base, folder, "none of the file's modules is in the base.*The file has model.h.0.attn.c_attn")


def test_an_adapter_named_like_a_module_empties_another_ones_file(tmp_path, rng):
    base, folder = two_module_adapter(tmp_path, rng)
    model = adapted(base, folder)
    with without_a_word():
        model.load_adapter(folder, "h")
        model.save_pretrained(tmp_path / "saved", selected_adapters=["default"], save_embedding_layers=False)
    assert len(files_of(folder)) == 8 and files_of(tmp_path / "saved") == {}
    check_refused(base, tmp_path / "saved", "holds no tensor")


def test_a_base_is_recognised_if_the_file_tells_it_and_said_to_be_unverified_if_not(tmp_path, rng):
    base, folder = two_module_adapter(tmp_path, rng)
    said = []
    load_adapter(folder, ours(base), say=said.append)
    save_adapter(trained(ours(base), *TRAINED["q and v"], rng), tmp_path / "ours")
    load_adapter(tmp_path / "ours", ours(base), say=said.append)
    assert "8 tensors, all used" in said[0] and "UNVERIFIED" in said[0]
    assert "4 tensors, all used" in said[1] and "recognised" in said[1]


def test_a_loader_that_skips_what_it_does_not_know_is_noticed(tmp_path, rng, monkeypatch):
    _, base, folder = narrower(tmp_path, rng)
    monkeypatch.setattr("minilora.disk.peft.check_same_tensors", lambda *names: None)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        check_refused(base, folder, "superfluous")
