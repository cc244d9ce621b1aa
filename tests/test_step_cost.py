"""What a step will cost, told from shapes: to the byte what its graph keeps, to the FLOP what is multiplied in it."""

import math

import numpy as np
import pytest
import strict_array
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import small_gpt, small_llama

from minilora import (
    LoRAConfig,
    Tensor,
    attach,
    init_adapter,
    init_bias_only,
    init_bottleneck,
    init_ia3,
    init_prefix,
    lean,
    stack,
)
from minilora.architectures import PRESETS, blank, blank_adapter, blank_quantized
from minilora.count import activation_bytes, n_parameters
from minilora.packed import StoredTensor
from minilora.quant import quantize
from minilora.step_cost import StepCost, rule_of_thumb_flops, step_cost, step_flops

ROWS = 80  # more positions than one block of queries
MODELS = {
    "gpt": lambda **how: small_gpt(block_size=ROWS, **how),
    "gpt with rope, untied": lambda **how: small_gpt(
        positions="rope", tie_word_embeddings=False, block_size=ROWS, **how
    ),
    "llama": lambda **how: small_llama(max_position_embeddings=ROWS, **how),
    "qwen3": lambda **how: small_llama(qk_norm=True, attention_bias=True, max_position_embeddings=ROWS, **how),
    "one head of keys, tied": lambda **how: small_llama(
        num_key_value_heads=1, tie_word_embeddings=True, max_position_embeddings=ROWS, **how
    ),
}
# Where the last starts, gradients end in the middle of the model.
TARGETS = [
    None, "all-linear", ["q_proj", "v_proj"], ["k_proj"], ["o_proj"], ["up_proj"], ["down_proj"],
    r".*\.1\..*q_proj",
]  # fmt: skip
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
every_target = pytest.mark.parametrize("targets", TARGETS, ids=str)


def adapted(base, targets, r=2):
    """`base` with an adapter; the base itself, which is trained in full, without targets."""
    if targets is None:
        return base
    config = LoRAConfig(r=r, alpha=3, target_modules=targets)
    return attach(base, init_adapter(base, config, np.random.default_rng(1)))


def stored(model):
    """The model as a loader would have it: frozen, over arrays that nobody writes."""
    return model.map_tensors(lambda t: StoredTensor(t.data))


@every_target
@every_model
def test_a_step_keeps_as_many_bytes_as_its_shapes_say(make, targets):
    for dtype, (batch, length) in (("float32", (2, 5)), ("float64", (1, 1)), ("float32", (1, 70))):
        model = adapted(make(dtype=dtype), targets)
        ids = np.random.default_rng(2).integers(0, 11, (batch, length))
        kept = activation_bytes(model.loss(ids, ids), model)
        assert step_cost(model, batch, length, dtype).activations == kept > 0


@pytest.mark.parametrize("make", [small_gpt, small_llama])
def test_what_a_base_is_stored_in_changes_what_is_kept_as_it_is_counted(make):
    ids = np.random.default_rng(2).integers(0, 11, (2, 5))
    plain = make()
    kept = set()
    for base in (plain, stored(plain), quantize(plain.frozen(), "nf4"), quantize(stored(plain), "nf4")):
        model = adapted(base, "all-linear")
        kept.add(activation_bytes(model.loss(ids, ids), model))
        assert step_cost(model, 2, 5).activations == activation_bytes(model.loss(ids, ids), model)
    # The RMSNorm of a file's weights keeps less.
    assert len(kept) == (2 if make is small_llama else 1)


@given(st.sampled_from(list(MODELS)), st.data())
@settings(max_examples=25)
def test_whatever_is_trained_of_a_model_a_step_keeps_what_its_shapes_say(kind, data):
    """Any tensors: biases alone, one norm, half a block. Gradients then begin anywhere."""
    base = MODELS[kind]()
    names = [name for name, _ in base.named_parameters()]
    trained = data.draw(st.sets(st.sampled_from(names), min_size=1, max_size=3))
    model = base.rebuild(lambda name, x: Tensor(x.data) if isinstance(x, Tensor) and name not in trained else None)
    ids = np.random.default_rng(2).integers(0, 11, (2, 3))
    assert step_cost(model, 2, 3).activations == activation_bytes(model.loss(ids, ids), model)


@pytest.fixture
def products(monkeypatch):
    """The FLOPs of every product of two matrices so far, of queries in blocks as the host cuts them."""
    monkeypatch.setattr(lean, "MOST_QUERIES", lean.QUERY_BLOCK)
    flops = []
    plain = strict_array.ndarray.__matmul__

    def counted(a, b):
        if 1 not in (*a.shape[-2:], *b.shape[-2:]):
            stack_of = math.prod(np.broadcast_shapes(a.shape[:-2], b.shape[:-2]))
            flops.append(2 * stack_of * a.shape[-2] * a.shape[-1] * b.shape[-1])
        return plain(a, b)

    monkeypatch.setattr(strict_array.ndarray, "__matmul__", counted)
    return flops


@every_target
@every_model
def test_a_step_multiplies_as_often_as_its_shapes_say(make, targets, products):
    base = make().to_device(strict_array)
    model = adapted(base, targets)
    for batch, length in ((2, 5), (2, 70)):
        ids = np.random.default_rng(2).integers(0, 11, (batch, length))
        products.clear()
        model.loss(ids, ids).backward()
        cost = step_cost(model, batch, length)
        assert cost.flops == step_flops(model, batch, length) == sum(products)
        # Without a graph, only what is forward is left.
        products.clear()
        base.frozen().loss(ids, ids)
        assert step_cost(base.frozen(), batch, length) == StepCost(sum(products), 0, 0)


def test_a_model_without_numbers_costs_what_a_real_one_does():
    base = small_llama()
    config = LoRAConfig(r=2, alpha=3, target_modules=["q_proj", "down_proj"])
    empty = blank(base.config)
    assert step_cost(empty, 3, 4) == step_cost(base, 3, 4)
    shapes = attach(stored(empty), blank_adapter(empty, config), check_base=False)
    assert step_cost(shapes, 3, 4) == step_cost(adapted(stored(base), ["q_proj", "down_proj"]), 3, 4)
    packed = attach(blank_quantized(stored(empty)), blank_adapter(empty, config), check_base=False)
    assert step_cost(packed, 3, 4) == step_cost(shapes, 3, 4)


def test_the_rule_of_thumb_is_the_products_of_full_fine_tuning_but_for_attention_and_tables():
    config = PRESETS["llama-2-7b"]
    model = blank(config)
    batch, length = 4, 512
    n_tokens = batch * length
    # Scores and values forward, the scores again and four gradients; 64 queries meet at most the keys before them.
    attention = 7 * 32 * 2 * 4096 * batch * sum(64 * stop for stop in range(64, 513, 64))
    no_products = 32000 * 4096 + (2 * 32 + 1) * 4096
    expected = rule_of_thumb_flops(n_parameters(model) - no_products, n_tokens) + attention
    assert step_flops(model, batch, length) == expected
    assert rule_of_thumb_flops(n_parameters(model), n_tokens) == pytest.approx(expected, rel=0.05)


def test_lora_saves_the_gradients_of_weights_and_keeps_the_forward_pass():
    base = blank(PRESETS["llama-3.1-8b"])
    config = LoRAConfig(r=16, alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    full = step_cost(base, 4, 512, "bfloat16")
    lora = step_cost(attach(base, blank_adapter(base, config), check_base=False), 4, 512, "bfloat16")
    assert 1 < lora.forward / full.forward < 1.01
    assert 0.5 < lora.backward / full.backward < 0.52
    assert step_cost(base, 4, 512).activations == pytest.approx(2 * full.activations, rel=1e-4)


@pytest.mark.parametrize("arguments, message", [
    ((0, 4), "0 rows of 4 tokens: at least one of each"), ((4, 0), "4 rows of 0 tokens"),
    ((1, 17), "rows of 17 tokens do not fit in the model's context of 16"),
    ((1, 4, "int8"), "dtype must be one of float16, bfloat16, float32, float64, got 'int8'"),
])  # fmt: skip
def test_a_step_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        step_cost(small_gpt(), *arguments)


def test_what_is_not_known_is_refused():
    base = small_gpt()
    adapter = init_adapter(base, LoRAConfig(r=2, alpha=2, target_modules="all-linear"), np.random.default_rng(0))
    with pytest.raises(TypeError, match="what a .* costs is not known here"):
        step_cost(attach(base, stack([adapter, None])), 2, 4)
    rng = np.random.default_rng(0)
    relatives = [init_ia3(base), init_bias_only(base), init_bottleneck(base, 2, rng), init_prefix(base, 2, rng)]
    relatives.append(init_bottleneck(base, 2, rng, after_attention=False))
    for relative in relatives:
        with pytest.raises(TypeError, match="what a .* costs is not known here"):
            step_cost(attach(base, relative), 2, 4)
    with pytest.raises(TypeError, match="expected a GPT or a Llama, got Adapter"):
        step_cost(adapter, 2, 4)
