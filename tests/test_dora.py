"""DoRA: a new one is the base to the bit, a trained one has rows of the learned length, and gradients as PEFT has."""

import numpy as np
import pytest
from hypothesis import given
from strategies import TinyMLP, close, contents, float_dtypes, integer_arrays, rngs, sides, tiny_gpt, tiny_mlp

from minilora import GradientError, LoRAConfig, Tensor, attach, gradcheck, init_adapter, init_dora, merge, stack
from minilora import dora as dora_module
from minilora.dora import DoRALinear, DoRAPair, row_norms
from minilora.lora import LoRALinear, LoRAPair
from minilora.nn import Linear
from minilora.quant import quantize, widen

CONFIG = LoRAConfig(2, 3, "all-linear")
U = {"float32": 2.0**-24, "float64": 2.0**-53}


def new_dora(base, seed=0, **options):
    return init_dora(base, LoRAConfig(2, 3, "all-linear", **options), np.random.default_rng(seed))


def learned(adapter, seed=1):
    """With random B, and magnitudes up to half as long again."""
    rng = np.random.default_rng(seed)
    for pair in adapter.pairs.values():
        pair.lora_B.data[...] = 0.5 * rng.standard_normal(pair.lora_B.shape)
        pair.magnitude.data[...] *= rng.uniform(0.5, 1.5, pair.magnitude.shape)
    return adapter


def a_layer(dtype="float64", seed=0, bias=True, dropout=0.0):
    """A layer of random numbers and an input for it."""
    rng = np.random.default_rng(seed)
    tensor = lambda *shape: Tensor(rng.standard_normal(shape).astype(dtype), requires_grad=True)
    linear = Linear(Tensor(tensor(5, 7).data), Tensor(tensor(5).data) if bias else None)
    pair = DoRAPair(tensor(2, 7), tensor(5, 2), 1.5, tensor(5))
    return DoRALinear(linear, pair, dropout), tensor(3, 7)


def by_the_formula(layer, x):
    """m (W + s BA) / ‖W + s BA‖ x + b, written out row by row."""
    W = layer.linear.weight.data + layer.pair.scaling * (layer.pair.lora_B.data @ layer.pair.lora_A.data)
    rows = [m * row / np.sqrt(np.dot(row, row)) for m, row in zip(layer.pair.magnitude.data, W, strict=True)]
    y = x @ np.array(rows).T
    return y if layer.linear.bias is None else y + layer.linear.bias.data


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_a_layer_computes_the_formula_and_so_does_the_merged_one(seed, bias):
    layer, x = a_layer(seed=seed, bias=bias)
    expected = by_the_formula(layer, x.data)
    assert close(layer(x).data, expected) and close(layer.merged()(x).data, expected)
    assert close(row_norms(layer.merged().weight.data), np.abs(layer.pair.magnitude.data))


@given(rngs, sides, sides, sides, float_dtypes)
def test_a_new_one_is_the_layer_to_the_bit_whatever_its_numbers(rng, n, m, r, dtype):
    drawn = lambda *shape: Tensor(rng.standard_normal(shape).astype(dtype))
    base = TinyMLP([Linear(drawn(m, n), drawn(m))])
    adapter = init_dora(base, LoRAConfig(r, 3, "all-linear"), rng, allow_large_r=True)
    x = drawn(3, n)
    assert np.array_equal(attach(base, adapter)(x).data, base(x).data)


def test_also_on_a_weight_that_lies_the_other_way_round():
    """As those of a file of GPT-2's do: rows are added up in another order there."""
    W = np.random.default_rng(0).standard_normal((40, 30)).astype("float32").T
    base = TinyMLP([Linear(Tensor(W))])
    model, x = attach(base, new_dora(base)), Tensor(np.ones((2, 40), "float32"))
    assert np.array_equal(model(x).data, base(x).data)


def test_a_start_with_the_norms_of_W_alone_is_not_the_base_to_the_bit_on_such_a_weight():
    """Why init_dora adds a product of zeros: numbers in another order are added up to another sum."""
    W = np.random.default_rng(0).standard_normal((400, 300)).astype("float32").T
    base = TinyMLP([Linear(Tensor(W))])
    adapter = new_dora(base)
    adapter.pairs["layers.0"].magnitude.data[...] = row_norms(W)
    changed = adapter.pairs["layers.0"].magnitude.data / adapter.pairs["layers.0"].row_norms(W)
    assert (changed != 1).any() and np.abs(changed - 1).max() < 400 * U["float32"]


@given(integer_arrays((3, 3), 2), integer_arrays((1, 3), 2), integer_arrays((3, 1), 2), integer_arrays((2, 3), 2))
def test_on_whole_numbers_with_a_magnitude_that_is_the_norm_it_is_lora_to_the_bit(W, A, B, x):
    """m / ‖W + ΔW‖ is one exactly, and what is left is LoRA."""
    pair = DoRAPair(Tensor(A), Tensor(B), 2.0, Tensor(np.ones(3)))
    norms = pair.row_norms(W)
    if not norms.all():
        return
    pair = DoRAPair(pair.lora_A, pair.lora_B, 2.0, Tensor(norms))
    layer = DoRALinear(Linear(Tensor(W)), pair)
    plain = LoRALinear(layer.linear, LoRAPair(pair.lora_A, pair.lora_B, 2.0))
    assert np.array_equal(layer(Tensor(x)).data, plain(Tensor(x)).data)
    assert np.array_equal(layer.merged().weight.data, plain.merged().weight.data)


@pytest.mark.parametrize("dtype", U)
def test_merged_and_unmerged_differ_by_rounding_alone(dtype):
    """Each output is a sum of n + 1 products of numbers that took at most r + n + 10 roundings."""
    for seed in range(5):
        layer, x = a_layer(dtype, seed)
        W = np.abs(layer.linear.weight.data).astype("float64")
        A, B = (np.abs(t.data).astype("float64") for t in (layer.pair.lora_A, layer.pair.lora_B))
        scale = np.abs(layer.pair.magnitude.data / layer.pair.row_norms(layer.linear.weight.data))
        size = np.abs(x.data) @ (W + 1.5 * B @ A).T * scale + np.abs(layer.linear.bias.data)
        difference = np.abs(layer(x).data.astype("float64") - layer.merged()(x).data)
        assert (difference <= 2 * (7 + 2 + 20) * U[dtype] * size).all()


# The gradient: all but that of the norm.


def function_of(layer):
    """The layer as a function of x, A, B and m."""

    def f(x, A, B, m):
        pair = DoRAPair(A, B, layer.pair.scaling, m)
        return DoRALinear(layer.linear, pair)(x)

    return f


def test_with_the_norms_held_constant_all_gradients_are_the_derivatives(monkeypatch):
    layer, x = a_layer()
    norms = layer.pair.row_norms(layer.linear.weight.data)
    monkeypatch.setattr(DoRAPair, "row_norms", lambda self, weight: norms)
    pair = layer.pair
    report = gradcheck(function_of(layer), x, pair.lora_A, pair.lora_B, pair.magnitude)
    assert report.compared == x.size + sum(p.size for p in pair.parameters())


def test_of_x_and_of_the_magnitude_they_are_the_derivatives_as_they_stand():
    layer, x = a_layer()
    f = function_of(layer)
    A, B = layer.pair.lora_A, layer.pair.lora_B
    assert gradcheck(lambda x, m: f(x, A, B, m), Tensor(x.data * 1), layer.pair.magnitude)


@pytest.mark.parametrize("which", ["lora_A", "lora_B"])
def test_of_A_and_B_they_are_not_and_the_checker_sees_it(which):
    """The part that the paper leaves out is there."""
    layer, x = a_layer()
    factors = {"lora_A": layer.pair.lora_A, "lora_B": layer.pair.lora_B}

    def f(factor):
        return function_of(layer)(x, *(factors | {which: factor}).values(), layer.pair.magnitude)

    with pytest.raises(GradientError):
        gradcheck(f, factors[which])


def test_what_is_left_out_lies_along_the_rows_of_the_weight():
    """The whole derivative by V = W + ΔW is what is here less its part along each row: a longer row gives one W'."""
    layer, x = a_layer(bias=False)
    dy = np.random.default_rng(3).standard_normal((3, 5))
    V = layer.linear.weight.data + layer.pair.delta()
    norms = row_norms(V)[:, None]
    here = layer.pair.magnitude.data[:, None] * (dy.T @ x.data) / norms
    whole = here - (here * V).sum(-1, keepdims=True) * V / norms**2
    layer(x).backward(dy)
    assert close(layer.pair.lora_B.grad, layer.pair.scaling * here @ layer.pair.lora_A.data.T)

    def lengths(V):
        """Σ dy · y by V, norm and all."""
        square = (V * V).sum(-1, keepdims=True)
        return (x @ (V * layer.pair.magnitude.reshape(-1, 1) * (square.log() * -0.5).exp()).transpose() * dy).sum()

    leaf = Tensor(V, requires_grad=True)
    lengths(leaf).backward()
    assert close(leaf.grad, whole) and not close(leaf.grad, here)


# Dropout.


def test_dropout_is_on_all_that_dora_adds_and_not_on_the_base():
    """(W' - W) x̃ + W x + b, as PEFT has it."""
    layer, x = a_layer(dropout=0.5)
    mask = (np.random.default_rng(4).random(x.shape, np.float32) >= 0.5) / 0.5
    read = x.data * mask
    merged = layer.merged()
    expected = layer.linear(x).data + read @ (merged.weight.data - layer.linear.weight.data).T
    assert close(layer(x, np.random.default_rng(4)).data, expected)
    assert not close(layer(x, np.random.default_rng(4)).data, layer(x).data)


def test_with_dropout_a_new_one_still_changes_nothing_but_rounding():
    base = tiny_mlp(6, 5, 4, dtype="float64")
    model = attach(base, new_dora(base, dropout=0.4))
    x = Tensor(np.random.default_rng(0).standard_normal((3, 6)))
    assert close(model(x, np.random.default_rng(1)).data, base(x).data)


def test_the_gradients_with_dropout_are_right(monkeypatch):
    layer, x = a_layer(dropout=0.3)
    norms = layer.pair.row_norms(layer.linear.weight.data)
    monkeypatch.setattr(DoRAPair, "row_norms", lambda self, weight: norms)

    def f(x, A, B, m):
        pair = DoRAPair(A, B, 1.5, m)
        return DoRALinear(layer.linear, pair, 0.3)(x, np.random.default_rng(4))

    assert gradcheck(f, x, layer.pair.lora_A, layer.pair.lora_B, layer.pair.magnitude)


# A base of few bits, and what is refused.


@pytest.mark.parametrize("kind", ["q4_0", "q8_0", "nf4"])
def test_a_packed_base_stays_packed_and_its_widened_twin_computes_the_same_bits(kind):
    base = quantize(tiny_mlp(32, 64, 32), kind)
    adapter = learned(new_dora(base))
    x = Tensor(np.random.default_rng(0).standard_normal((3, 32)).astype("float32"))
    model, twin = attach(base, adapter), attach(widen(base), adapter)
    assert np.array_equal(model(x).data, twin(x).data)
    assert np.array_equal(merge(model)(x).data, merge(twin)(x).data)
    assert adapter.base_stored == {f"layers.{i}.weight": kind.upper() for i in (0, 1)}
    dy = np.ones((3, 32), "float32")
    gradients = []
    for each in (model, twin):
        for p in adapter.parameters():
            p.grad = None
        each(x).backward(dy)
        gradients.append([p.grad for p in adapter.parameters()])
    assert all(map(np.array_equal, *gradients))


def test_a_row_of_zeros_has_no_direction_and_is_refused():
    base = tiny_mlp(6, 5, 4)
    weights = contents(base)
    zeroed = base.rebuild(lambda name, t: Tensor(t.data * [[1], [0], [1], [1]]) if name == "layers.1.weight" else None)
    with pytest.raises(ValueError, match=r"init_dora: row 1 of layers\.1\.weight is zero: it has no direction"):
        new_dora(zeroed.astype("float32"))
    assert contents(base) == weights


def test_a_magnitude_of_another_size_is_refused():
    layer, _ = a_layer()
    with pytest.raises(ValueError, match=r"DoRAPair: lora_B \(5, 2\), magnitude \(7,\)"):
        DoRAPair(layer.pair.lora_A, layer.pair.lora_B, 1.5, Tensor(np.ones(7)))


def test_it_is_not_stacked_because_its_update_is_no_product():
    base = tiny_mlp(6, 5)
    plain = init_adapter(base, CONFIG, np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"stack: layers\.0 has a DoRAPair, whose update is not a product"):
        stack([plain, new_dora(base)])


def test_what_init_adapter_refuses_is_refused():
    with pytest.raises(ValueError, match="match no Linear layer"):
        init_dora(tiny_gpt(), LoRAConfig(2, 4, ["nothing"]), np.random.default_rng(0))
    with pytest.raises(ValueError, match="r=9 exceeds"):
        init_dora(tiny_gpt(), LoRAConfig(9, 4, ["q_proj"]), np.random.default_rng(0))


# Planted bugs.


def norms_of_columns(weight):
    return (weight * weight).sum(0) ** 0.5


@pytest.mark.parametrize("plant", [
    lambda patch: patch.setattr(dora_module, "row_norms", norms_of_columns),
    lambda patch: patch.setattr(DoRAPair, "row_norms", lambda self, weight: row_norms(weight)),
    lambda patch: patch.setattr(DoRAPair, "row_norms", lambda self, weight: row_norms(weight + self.delta()) ** 2),
    lambda patch: patch.setattr(DoRALinear, "__call__", lambda self, x, rng=None: self.merged()(x) - self.linear.bias),
    lambda patch: patch.setattr(DoRALinear, "__call__", lambda self, x, rng=None: self.linear(x) + self.pair(x)),
], ids=["columns", "the norm of W alone", "squared", "no bias", "LoRA"])  # fmt: skip
def test_each_planted_bug_is_noticed(monkeypatch, plant):
    plant(monkeypatch)
    with pytest.raises((AssertionError, ValueError)):
        for seed in range(2):
            test_a_layer_computes_the_formula_and_so_does_the_merged_one(seed, True)
