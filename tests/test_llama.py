"""Llama's family: its formula, its gradient, its cache, LoRA on it, and what its configuration refuses."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    LLAMA3,
    SHAPE,
    close,
    contents,
    gpt_logits,
    gpts_and_ids,
    learned,
    new_adapter,
    seeds,
    sides,
    tiny_gpt,
    tiny_llama,
)  # fmt: skip

from minilora import functional as F
from minilora.decoder import KeyValueCache
from minilora.generate import generate
from minilora.gpt import GPT
from minilora.gradcheck import gradcheck
from minilora.graph import no_grad
from minilora.llama import Llama, LlamaConfig, frequencies
from minilora.lora import attach, init_adapter, merge
from minilora.lora_config import LoRAConfig
from minilora.tensor import Tensor

# What tells the members of the family from one another.
MEMBERS = {
    "llama": {}, "tied": {"tie_word_embeddings": True}, "a head for each query's": {"num_key_value_heads": 4},
    "one head of keys": {"num_key_value_heads": 1}, "biases": {"attention_bias": True, "output_bias": True},
    "qwen2": {"attention_bias": True}, "qwen3": {"qk_norm": True}, "eps": {"rms_norm_eps": 0.5},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}, "llama3": {"rope_scaling": LLAMA3},
}  # fmt: skip
every_member = pytest.mark.parametrize("changes", MEMBERS.values(), ids=MEMBERS)


@st.composite
def llamas_and_ids(draw, dtype="float64"):
    """A small model of the family, and some rows of ids for it."""
    G, n_kv, D = draw(sides), draw(st.integers(1, 2)), 2 * draw(st.integers(1, 2))
    sizes = {"num_attention_heads": G * n_kv, "num_key_value_heads": n_kv, "head_dim": D}
    flags = {name: draw(st.booleans()) for name in ("attention_bias", "qk_norm", "tie_word_embeddings")}
    changes = {**sizes, **flags, "hidden_size": draw(st.integers(1, 9))}
    model = tiny_llama(draw(seeds), dtype, **changes)
    ids = np.random.default_rng(draw(seeds)).integers(0, 9, (draw(sides), draw(st.integers(2, 7))))
    return model, ids


# --- the formula ----------------------------------------------------------------------------------------------------


def by_the_papers(model, ids):
    """Llama for one row of ids, head by head and query by query, in plain NumPy."""
    config, w = model.config, {name: p.data for name, p in model.named_parameters()}
    D, group = config.head_dim, config.num_attention_heads // config.num_key_value_heads

    def norm(name, x):
        return x / np.sqrt(np.mean(x * x) + config.rms_norm_eps) * w[f"{name}.weight"]

    def project(name, x):
        return w[f"{name}.weight"] @ x + w.get(f"{name}.bias", 0)

    def turned(name, x, position):
        """One head, normalised if the model has that, and turned pair by pair."""
        x = norm(name, x) if config.qk_norm else x
        pairs = x[: D // 2] + 1j * x[D // 2 :]
        for j in range(D // 2):
            pairs[j] *= np.exp(1j * position * angle(config, j))
        return np.concatenate([pairs.real, pairs.imag])

    states = [w["embed_tokens.weight"][i] for i in ids]
    for i in range(config.num_hidden_layers):
        name = f"layers.{i}.self_attn"
        normed = [norm(f"layers.{i}.input_layernorm", x) for x in states]
        q, k, v = ([project(f"{name}.{c}_proj", x).reshape(-1, D) for x in normed] for c in "qkv")
        for t in range(len(ids)):
            heads = []
            for h in range(config.num_attention_heads):
                query = turned(f"{name}.q_norm", q[t][h], t)
                keys = [turned(f"{name}.k_norm", k[s][h // group], s) for s in range(t + 1)]
                p = np.exp([query @ key / math.sqrt(D) for key in keys])
                heads.append(sum(p[s] * v[s][h // group] for s in range(t + 1)) / p.sum())
            states[t] = states[t] + project(f"{name}.o_proj", np.concatenate(heads))
            x = norm(f"layers.{i}.post_attention_layernorm", states[t])
            gate, up = (project(f"layers.{i}.mlp.{c}_proj", x) for c in ("gate", "up"))
            states[t] = states[t] + project(f"layers.{i}.mlp.down_proj", gate / (1 + np.exp(-gate)) * up)
    head = w["embed_tokens.weight"] if config.tie_word_embeddings else w["lm_head.weight"]
    return np.array([head @ norm("norm", x) for x in states])


def angle(config, j):
    """How far pair j turns from one position to the next, as transformers' documentation of rope types has it."""
    plain, scaling = config.rope_theta ** (-2 * j / config.head_dim), config.rope_scaling
    if scaling is None:
        return plain
    if scaling["rope_type"] == "linear":
        return plain / scaling["factor"]
    wavelength, context = 2 * math.pi / plain, scaling["original_max_position_embeddings"]
    if wavelength < context / scaling["high_freq_factor"]:
        return plain
    if wavelength > context / scaling["low_freq_factor"]:
        return plain / scaling["factor"]
    smooth = (context / wavelength - scaling["low_freq_factor"]) / (
        scaling["high_freq_factor"] - scaling["low_freq_factor"]
    )
    return (1 - smooth) * plain / scaling["factor"] + smooth * plain


@every_member
def test_the_logits_are_those_of_the_papers(changes):
    """1e-10 is a margin."""
    model, ids = tiny_llama(**changes), np.array([[1, 2, 3, 4, 5, 0, 8], [8, 8, 0, 1, 7, 3, 3]])
    assert np.allclose(gpt_logits(model, ids), [by_the_papers(model, row) for row in ids], rtol=1e-10, atol=1e-10)


@given(llamas_and_ids())
def test_so_are_those_of_any_shape(case):
    model, ids = case
    assert np.allclose(gpt_logits(model, ids), [by_the_papers(model, row) for row in ids], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("changes", [c for c in MEMBERS.values() if c], ids=[n for n, c in MEMBERS.items() if c])
def test_each_difference_within_the_family_changes_what_it_computes(changes):
    """With the tensors of the plain model wherever the other one has them too."""
    plain, other = tiny_llama(), tiny_llama(**changes)
    shared = {n: p for n, p in plain.named_parameters() if dict(other.named_parameters()).get(n, p).shape == p.shape}
    other = other.rebuild(lambda name, x: shared.get(name))
    ids = np.arange(30)[None] % 9
    assert not np.allclose(gpt_logits(plain, ids), gpt_logits(other, ids), rtol=1e-3, atol=1e-3)


def test_llama_3_slows_down_what_turns_seldom_and_nothing_else():
    scaling = {**LLAMA3, "original_max_position_embeddings": 512}
    shape = {**SHAPE, "head_dim": 64, "rope_theta": 1e4}
    plain, slow = (frequencies(LlamaConfig(**{**shape, "rope_scaling": s})) for s in (None, scaling))
    assert slow[0] == plain[0] and slow[-1] == plain[-1] / 8
    between = (slow < plain) & (slow > plain / 8)
    assert between.any() and np.all(np.diff(slow / plain) <= 0)


# --- the gradient ------------------------------------------------------------------------------------------------


@every_member
def test_the_gradient_of_the_whole_model_is_right_in_every_parameter(changes):
    model, rng = tiny_llama(num_hidden_layers=1, **changes), np.random.default_rng(1)
    ids, targets = rng.integers(0, 9, (2, 5)), rng.integers(0, 9, (2, 5))
    targets[0, 2] = -100
    names = [name for name, _ in model.named_parameters()]

    def loss(*leaves):
        stands_for = dict(zip(names, leaves, strict=True))
        return model.rebuild(lambda name, _: stands_for.get(name)).loss(ids, targets)

    report = gradcheck(loss, *model.parameters(), max_elements=0)
    assert report.compared == sum(p.size for p in model.parameters()) and report.skipped == 0


# --- the cache, prompts of several lengths, and keys in front -----------------------------------------------------


def reads_the_same_by_cache(case):
    """1e-10 of the largest logit is a margin, thousands of times what float64 leaves of so small a model."""
    model, ids = case
    at_once, cache = gpt_logits(model, ids), model.new_cache(ids.shape[1])
    pieces = [ids[:, :1], ids[:, 1:-1], ids[:, -1:]]
    piecewise = np.concatenate([gpt_logits(model, piece, cache) for piece in pieces if piece.size], axis=1)
    assert np.abs(piecewise - at_once).max() <= 1e-10 * np.abs(at_once).max()


@given(llamas_and_ids())
def test_logits_read_through_the_cache_are_those_read_at_once(case):
    reads_the_same_by_cache(case)


def test_the_cache_holds_the_heads_of_keys_alone():
    model = tiny_llama()
    cache = model.new_cache(5)
    gpt_logits(model, [[1, 2, 3]], cache)
    assert cache[0].keys_and_values.shape == (2, 1, 5, 2 * 6)  # two heads of keys, not the four of queries


def padded_logits(model, rows, pad=0):
    """The logits of each row, read in one batch that is filled up on the left, in two pieces through a cache."""
    longest = max(map(len, rows))
    starts = np.array([longest - len(row) for row in rows])
    ids = np.array([[pad] * s + list(row) for s, row in zip(starts, rows, strict=True)])
    cache = model.new_cache(longest, starts)
    pieces = [gpt_logits(model, part, cache) for part in (ids[:, :-1], ids[:, -1:]) if part.size]
    logits = np.concatenate(pieces, axis=1)
    return [logits[i, s:] for i, s in enumerate(starts)]


def padding_changes_nothing(case):
    model, ids = case
    rows = [row[: 1 + i % len(row)] for i, row in enumerate(ids)]
    for ours, row in zip(padded_logits(model, rows), rows, strict=True):
        alone = gpt_logits(model, row[None])[0]
        assert np.abs(ours - alone).max() <= 1e-10 * np.abs(alone).max()


@given(st.one_of(llamas_and_ids(), gpts_and_ids()))
def test_a_row_filled_up_on_the_left_reads_as_it_does_alone(case):
    padding_changes_nothing(case)


def test_what_the_padding_is_changes_no_bit():
    model, rows = tiny_llama(dtype="float32"), [[1, 2, 3, 4], [5]]
    for a, b in zip(padded_logits(model, rows, 0), padded_logits(model, rows, 7), strict=True):
        assert np.array_equal(a, b)


def test_keys_in_front_are_seen_by_all_and_have_a_gradient():
    """As if their positions came first: but they are not turned, and no position is counted for them."""
    model, rng = tiny_llama(), np.random.default_rng(2)
    attention = model.layers[0].self_attn
    x, front_k, front_v = (rng.standard_normal((2, n, 12)) for n in (3, 2, 2))
    rope = (np.ones((3, 3)), np.zeros((3, 3)))
    run = lambda *tensors: attention(tensors[0], rope, front=tensors[1:])
    assert gradcheck(run, x, front_k, front_v).skipped == 0
    y, moved = (run(*map(Tensor, (x, front_k, v))).data for v in (front_v, front_v + 1))
    assert not np.isclose(y, moved).any()
    with no_grad():
        cache = KeyValueCache(3)
        front = (Tensor(front_k), Tensor(front_v))
        cut = lambda a, part: a[part]
        pieces = [attention(Tensor(x[:, t : t + 1]), [cut(a, slice(t, t + 1)) for a in rope], cache, front=front)
                  for t in range(3)]  # fmt: skip
    assert np.allclose(np.concatenate([p.data for p in pieces], axis=1), y, rtol=1e-12, atol=1e-12)
    assert (cache.length, cache.n_front) == (3, 2)


def values_in_the_place_of_keys(extend):
    return lambda self, k, v, front=None: extend(self, k, k, front)


def padding_in_sight(hidden):
    return lambda self: None


def positions_from_the_left(checked):
    def wrong(self, ids, cache=None):
        ids, positions = checked(self, ids, cache)
        return ids, positions if positions.ndim == 1 else np.broadcast_to(positions.max(0), positions.shape)

    return wrong


@pytest.mark.parametrize("owner, name, bug, model", [
    (KeyValueCache, "extend", values_in_the_place_of_keys, tiny_llama),
    (KeyValueCache, "hidden", padding_in_sight, tiny_llama),
    (GPT, "checked", positions_from_the_left, tiny_gpt),  # rotary positions tell distances alone
], ids=["values", "padding", "positions"])
def test_planted_bugs_in_the_cache_are_killed(monkeypatch, owner, name, bug, model):
    monkeypatch.setattr(owner, name, bug(getattr(owner, name)))
    ids = np.array([[1, 2, 3, 4], [4, 3, 2, 1], [5, 6, 0, 1]])
    with pytest.raises(AssertionError):
        padding_changes_nothing((model(), ids))


# --- LoRA, which needs no line for this model -------------------------------------------------------------------------


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], ["mlp.down_proj"], r"layers\.1\..*"], ids=str)
@every_member
def test_a_new_adapter_is_invisible_and_a_learned_one_merges(changes, targets):
    base, ids = tiny_llama(dtype="float32", **changes), np.array([[1, 2, 3, 4], [8, 0, 8, 2]])
    before, logits = contents(base), gpt_logits(base, ids)
    adapter = init_adapter(base, LoRAConfig(2, 4, targets), np.random.default_rng(0), allow_large_r=True)
    model = attach(base, adapter)
    assert np.array_equal(gpt_logits(model, ids), logits)
    learned(adapter)
    assert not np.allclose(gpt_logits(model, ids), logits, atol=1e-3)
    exact = attach(base.astype("float64"), adapter.astype("float64"))
    assert close(gpt_logits(merge(exact), ids), gpt_logits(exact, ids))
    assert contents(base) == before


def test_all_linear_is_every_projection_of_every_block():
    adapter = new_adapter(tiny_llama())
    parts = [f"self_attn.{c}_proj" for c in "qkvo"] + [f"mlp.{c}_proj" for c in ("gate", "up", "down")]
    assert list(adapter.pairs) == [f"layers.{i}.{part}" for i in range(2) for part in parts]


def test_its_gradients_reach_every_factor():
    base = tiny_llama()
    adapter = learned(new_adapter(base))
    attach(base, adapter).loss([[1, 2, 3]], [[2, 3, 4]]).backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())
    assert all(p.grad is None for p in base.parameters())


def test_it_generates_what_it_would_say_token_by_token():
    model, ids = tiny_llama(), np.array([[1, 2, 3], [4, 0, 8]])
    expected = ids
    for _ in range(10):
        expected = np.concatenate([expected, gpt_logits(model, expected)[:, -1].argmax(-1)[:, None]], axis=1)
    assert np.array_equal(generate(model, ids, 10), expected)


# --- what is refused, and what a blank model costs --------------------------------------------------------------------


@pytest.mark.parametrize("changes, says", [
    ({"hidden_size": 0}, "hidden_size must be a whole number"), ({"vocab_size": 2.0}, "vocab_size must be a whole"),
    ({"num_hidden_layers": True}, "num_hidden_layers"), ({"num_key_value_heads": 3}, "multiple of 3"),
    ({"head_dim": 5}, "head_dim must be even"), ({"head_dim": None, "hidden_size": 13}, "multiple of 4 heads"),
    ({"rms_norm_eps": 0}, "rms_norm_eps must be finite and positive"), ({"rope_theta": math.inf}, "rope_theta"),
    ({"rope_theta": 10**400}, "rope_theta"), ({"qk_norm": 1}, "qk_norm must be True or False"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling must be None or a dict"),
    ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling"), ({"rope_scaling": "linear"}, "rope_scaling"),
    ({"rope_scaling": {**LLAMA3, "factor": -1}}, "rope_scaling"),
    ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "rope_scaling"),
    ({"rope_scaling": {**LLAMA3, "beta_fast": 32}}, "rope_scaling"),
], ids=str)
def test_a_shape_that_makes_no_sense_is_refused_by_its_field(changes, says):
    with pytest.raises(ValueError, match=f"LlamaConfig: .*{says}"):
        LlamaConfig(**{**SHAPE, **changes})


def test_what_is_left_out_is_what_transformers_takes():
    config = LlamaConfig(**{**SHAPE, "num_key_value_heads": None, "head_dim": None, "num_attention_heads": 3})
    assert (config.num_key_value_heads, config.head_dim, config.n_layer, config.block_size) == (3, 4, 2, 40)


@pytest.mark.parametrize("ids, error", [([[9]], ValueError), ([[-1]], ValueError), ([[0.5]], TypeError),
                                        ([1], ValueError), ([[]], ValueError), ([[0] * 41], ValueError)], ids=str)
def test_ids_that_it_cannot_read_are_refused(ids, error):
    with pytest.raises(error):
        tiny_llama()(np.array(ids))


def test_a_blank_model_of_seven_billion_numbers_takes_no_memory():
    config = LlamaConfig(32, 4096, 11008, 32, 32000, 4096)
    blank = Llama(config, None)
    assert sum(p.size for p in blank.parameters()) == 6_738_415_616
    assert sum(p.data.base.nbytes for p in blank.parameters() if p.ndim == 2) < 2000
    assert not blank.embed_tokens.weight.data.flags.writeable


def test_a_head_of_keys_that_serves_the_wrong_group_is_noticed():
    model, ids = tiny_llama(), np.array([[1, 2, 3, 4]])
    k = dict(model.named_parameters())["layers.0.self_attn.k_proj.weight"].data.reshape(2, 6, 12)
    swapped = Tensor(k[::-1].reshape(12, 12).copy())
    wrong = model.rebuild(lambda name, _: swapped if name == "layers.0.self_attn.k_proj.weight" else None)
    assert not close(gpt_logits(wrong, ids)[0], by_the_papers(model, ids[0]))
    assert close(gpt_logits(model, ids)[0], by_the_papers(model, ids[0]))
    assert F.check_attention(*(Tensor(np.ones((1, 1, n))) for n in (24, 12, 12)), 4) == 2
