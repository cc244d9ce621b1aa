"""LoRA on plain Linear layers: what is exact, what is bounded, what is shared and what is refused. Knows no GPT."""

import contextlib
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    Watch,
    agree,
    contents,
    float_dtypes,
    hunt,
    lattice_layers,
    learned,
    new_adapter,
    real_layers,
    seeds,
    sides,
    tiny_mlp,
)

from minilora import functional as F
from minilora.backend import to_device
from minilora.count import parameter_report
from minilora.graph import no_grad
from minilora.lora import Adapter, LoRALinear, LoRAPair, attach, init_adapter, merge
from minilora.lora_config import LoRAConfig
from minilora.nn import Linear
from minilora.optim import Adam
from minilora.stack import BatchLoRALinear
from minilora.tensor import Tensor

X = np.random.default_rng(7).standard_normal((2, 3, 6)).astype(np.float32)  # a batch for tiny_mlp(6, ...)


def outputs(model, x=X):
    with no_grad():
        return model(Tensor(x)).data


# --- the algebra, to the last bit ------------------------------------------------------------------------------------


def is_exact_on_the_lattice(case):
    """Unmerged, merged and plain whole-number arithmetic give the same numbers, in the dtype of the weights."""
    layer, x = case
    linear, pair = layer.linear, layer.pair
    W, A, B = (t.data.astype(np.int64) for t in (linear.weight, pair.lora_A, pair.lora_B))
    b = 0 if linear.bias is None else linear.bias.data
    expected = x.data.astype(np.int64) @ W.T + b + pair.scaling * (x.data.astype(np.int64) @ (B @ A).T)
    for y in (layer(x), layer.merged()(x)):
        assert y.dtype == x.dtype
        assert np.array_equal(y.data, expected)


def is_within_the_bound(case):
    """|unmerged - merged| stays under the derived forward-error bound, componentwise, from the actual operands.

    Each dot product of k terms is off by at most γ_k times the product of the magnitudes (Higham 2002, eq. 3.13),
    in any order of summation; both paths obey the same bound, hence the 2. Evaluated in extended precision.
    """
    layer, x = case
    assert np.all(np.abs(layer(x).data - layer.merged()(x).data) <= forward_error_bound(layer, x.data))


def forward_error_bound(layer, x):
    u = np.longdouble(np.finfo(x.dtype).eps) / 2
    gamma = lambda k: k * u / (1 - k * u)
    size = lambda a: np.abs(np.asarray(a).astype(np.longdouble))
    linear, pair = layer.linear, layer.pair
    W, A, B, x, s = map(size, (linear.weight.data, pair.lora_A.data, pair.lora_B.data, x, x.dtype.type(pair.scaling)))
    b, extra = (0, 0) if linear.bias is None else (size(linear.bias.data), 1)
    r, n = A.shape
    bound = gamma(n + 1 + extra) * (x @ W.T) + gamma(n + r + 2 + extra) * s * (x @ A.T @ B.T) + gamma(2 * extra) * b
    return 2 * bound * (1 + 1e-6)


@given(lattice_layers())
def test_merged_equals_unmerged_equals_whole_number_arithmetic_bit_for_bit(case):
    is_exact_on_the_lattice(case)


@given(float_dtypes.flatmap(real_layers))
def test_real_valued_merged_and_unmerged_differ_by_less_than_the_derived_bound(case):
    is_within_the_bound(case)


# What is added to W by a LoRA with a bug. Two of them need a square weight to be a bug rather than an error.
WRONG_UPDATES = {
    "scale omitted": lambda A, B, s: B @ A,
    "scale twice": lambda A, B, s: s * s * (B @ A),
    "transposed delta": lambda A, B, s: s * (B @ A).T,
    "A and B swapped": lambda A, B, s: s * (A.reshape(B.shape) @ B.reshape(A.shape)),
    "one rank dropped": lambda A, B, s: s * (B[:, 1:] @ A[1:]),
    "sign": lambda A, B, s: -s * (B @ A),
}


def plant(monkeypatch, place, update):
    """Let a pair's forward, or what is merged, use `update(A, B, scaling)` as the change of the weight."""

    def delta(self):
        return update(self.lora_A.data, self.lora_B.data, self.scaling)

    def forward(self, x):
        return F.linear(x, Tensor(delta(self)))

    monkeypatch.setattr(LoRAPair, place, {"delta": delta, "__call__": forward}[place])


PROPERTIES = {
    "lattice": (lattice_layers(square=True), is_exact_on_the_lattice),
    "bound": (real_layers("float64", square=True), is_within_the_bound),
}


@pytest.mark.parametrize("cases, holds", PROPERTIES.values(), ids=PROPERTIES)
@pytest.mark.parametrize("place", ["delta", "__call__"])
@pytest.mark.parametrize("update", WRONG_UPDATES.values(), ids=WRONG_UPDATES)
def test_each_planted_bug_in_the_layer_or_the_merge_is_killed(monkeypatch, update, place, cases, holds):
    plant(monkeypatch, place, update)
    with pytest.raises(AssertionError):
        hunt(cases, holds)


@pytest.mark.parametrize("cases, holds", PROPERTIES.values(), ids=PROPERTIES)
@pytest.mark.parametrize("place", ["delta", "__call__"])
def test_the_right_update_planted_the_same_way_survives(monkeypatch, place, cases, holds):
    plant(monkeypatch, place, lambda A, B, s: s * (B @ A))
    hunt(cases, holds)


@given(lattice_layers(), st.data())
def test_gradients_of_A_and_B_are_those_of_the_formula_bit_for_bit(case, data):
    layer, x = case
    dy = data.draw(st.sampled_from([-2.0, 1.0, 3.0])) * np.ones((x.shape[0], layer.pair.out_features), x.dtype)
    layer(x).backward(dy)
    A, B, s = layer.pair.lora_A.data, layer.pair.lora_B.data, layer.pair.scaling
    assert np.array_equal(layer.pair.lora_A.grad, s * (dy @ B).T @ x.data)
    assert np.array_equal(layer.pair.lora_B.grad, s * dy.T @ (x.data @ A.T))
    assert np.array_equal(x.grad, dy @ (layer.linear.weight.data + s * (B @ A)))


@given(lattice_layers(), st.data())
def test_an_update_depends_on_the_product_alone_not_on_how_it_is_factored(case, data):
    """Gauge invariance: A -> M A and B -> B M⁻¹ with M a permutation of the ranks times powers of two, all exact."""
    layer, x = case
    r = layer.pair.r
    order = data.draw(st.permutations(range(r)))
    factors = np.array(data.draw(st.lists(st.sampled_from([0.25, 1.0, 2.0, -4.0]), min_size=r, max_size=r)), x.dtype)
    A = Tensor(factors[:, None] * layer.pair.lora_A.data[order])
    B = Tensor(layer.pair.lora_B.data[:, order] / factors)
    other = LoRALinear(layer.linear, LoRAPair(A, B, layer.pair.scaling))
    assert np.array_equal(other(x).data, layer(x).data)
    assert np.array_equal(other.merged().weight.data, layer.merged().weight.data)


@given(lattice_layers())
def test_the_update_has_at_most_rank_r(case):
    layer, _ = case
    delta = layer.merged().weight.data - layer.linear.weight.data
    assert np.linalg.matrix_rank(delta.astype(np.float64)) <= layer.pair.r


@given(lattice_layers())
def test_subtracting_the_update_from_a_merged_weight_of_whole_numbers_gives_the_weight_back(case):
    layer, _ = case
    assert np.array_equal(layer.merged().weight.data - layer.pair.delta(), layer.linear.weight.data)


# --- a new adapter -----------------------------------------------------------------------------------------------


widths = st.lists(sides, min_size=2, max_size=4)


@given(seeds, widths, sides, st.booleans(), st.sampled_from([0.0, 0.5]), float_dtypes)
def test_attaching_a_new_adapter_changes_no_output_and_merging_it_no_weight(seed, sizes, r, rslora, dropout, dtype):
    base = tiny_mlp(*sizes, seed=seed, dtype=dtype)
    config = LoRAConfig(r, 3.0, "all-linear", dropout, rslora)
    model = attach(base, init_adapter(base, config, np.random.default_rng(seed), allow_large_r=True))
    x = np.random.default_rng(seed).standard_normal((2, 3, sizes[0])).astype(dtype)
    assert np.array_equal(outputs(model, x), outputs(base, x))
    merged = dict(merge(model).named_parameters())
    assert all(np.array_equal(merged[name].data, p.data) for name, p in base.named_parameters())


@given(seeds, st.booleans())
def test_at_the_start_the_gradient_of_every_A_is_exactly_zero_and_of_every_B_is_not(seed, rslora):
    base = tiny_mlp(6, 5, 4, seed=seed)
    adapter = new_adapter(base, seed=seed, use_rslora=rslora)
    y = attach(base, adapter)(Tensor(X))
    (y * y).sum().backward()
    for pair in adapter.pairs.values():
        assert not pair.lora_A.grad.any()
        assert pair.lora_B.grad.any()


def test_B_is_zero_and_the_spread_of_A_depends_on_the_inputs_and_not_on_the_rank():
    base = tiny_mlp(300, 200)
    for r in (2, 16, 128):
        pair = new_adapter(base, r=r).pairs["layers.0"]
        A, B = pair.lora_A, pair.lora_B
        assert A.shape == (r, 300) and B.shape == (200, r) and A.dtype == B.dtype == np.float32
        assert A.requires_grad and B.requires_grad and not B.data.any()
        assert np.abs(A.data).max() <= 1 / math.sqrt(300)
        assert A.data.std() == pytest.approx(1 / math.sqrt(3 * 300), rel=0.05)  # of a uniform distribution: bound / √3


def test_the_same_generator_draws_the_same_adapter():
    base = tiny_mlp(6, 5)
    assert contents(new_adapter(base, seed=3)) == contents(new_adapter(base, seed=3)) != contents(new_adapter(base))


@pytest.mark.parametrize("r, alpha, rslora, scaling", [(8, 16, False, 2), (8, 4, False, 0.5), (16, 8, True, 2),
                                                       (2, 1, True, 1 / math.sqrt(2))])
def test_the_scaling_is_alpha_over_r_or_over_its_root(r, alpha, rslora, scaling):
    config = LoRAConfig(r, alpha, ["layers.0"], use_rslora=rslora)
    base = tiny_mlp(32, 32, dtype="float64")
    adapter = learned(init_adapter(base, config, np.random.default_rng(0)))
    pair, merged = adapter.pairs["layers.0"], merge(attach(base, adapter)).layers[0]
    assert config.scaling_of("layers.0") == scaling
    assert np.allclose(merged.weight.data - base.layers[0].weight.data, scaling * pair.lora_B.data @ pair.lora_A.data)


@pytest.mark.parametrize("targets, chosen", [
    ("all-linear", ["layers.0", "layers.1", "layers.2"]),
    (["layers.1"], ["layers.1"]),
    (["2", "layers.0"], ["layers.0", "layers.2"]),
    (("0", "0"), ["layers.0"]),
    (r"layers\.[12]", ["layers.1", "layers.2"]),
    (".*", ["layers.0", "layers.1", "layers.2"]),
])
def test_targets_are_dotted_endings_or_a_regular_expression_for_whole_names(targets, chosen):
    assert list(new_adapter(tiny_mlp(6, 5, 4, 3), targets=targets).pairs) == chosen


def test_targets_come_in_the_order_of_the_model_not_of_the_alphabet_or_of_the_list():
    base = tiny_mlp(*[3] * 12)
    assert list(new_adapter(base, targets=["10", "2"]).pairs) == ["layers.2", "layers.10"]


def test_an_adapter_names_its_tensors_by_the_modules_they_adapt():
    adapter = new_adapter(tiny_mlp(6, 5, 4), targets=["0"])
    assert [name for name, _ in adapter.named_parameters()] == ["layers.0.lora_A", "layers.0.lora_B"]
    assert adapter.parameters() == [adapter.pairs["layers.0"].lora_A, adapter.pairs["layers.0"].lora_B]


def test_a_model_that_is_a_single_linear_is_adapted_too_or_refused_but_not_silently_left_alone():
    base = Linear.init(6, 5, np.random.default_rng(0))
    try:
        model = attach(base, learned(new_adapter(base)))
    except ValueError:
        return
    assert not np.array_equal(outputs(model), outputs(base))


# --- what is shared, what is written, what is kept alive -------------------------------------------------------------


def trained_one_step(model, seed=0, lr=0.1):
    y = model(Tensor(X))
    (y * y).sum().backward()
    Adam(model.parameters(), lr=lr).step()
    return model


def test_nothing_that_is_done_with_a_base_writes_to_it():
    base = tiny_mlp(6, 5, 4)
    before, tensors, y = contents(base), base.parameters(), outputs(base)
    adapter = learned(new_adapter(base))
    merged = merge(trained_one_step(attach(base, adapter)))
    assert not np.array_equal(outputs(merged), y)
    assert contents(base) == before and np.array_equal(outputs(base), y)
    assert list(before) == ["layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias"]
    assert all(now is then and now.requires_grad for now, then in zip(base.parameters(), tensors, strict=True))


def test_attach_shares_every_array_and_merge_only_those_that_did_not_change():
    base = tiny_mlp(6, 5, 4)
    adapter = learned(new_adapter(base, targets=["layers.0"]))
    model = attach(base, adapter)
    ours, theirs = (dict(m.named_parameters()) for m in (model, base))
    assert ours.keys() - theirs.keys() == {"layers.0.lora_A", "layers.0.lora_B"}
    assert all(ours[name].data is theirs[name].data for name in theirs)
    assert all(ours[name] is p for name, p in adapter.named_parameters())
    plain = merge(model)
    assert type(plain.layers[0]) is type(plain.layers[1]) is Linear
    shared = {name for name, p in plain.named_parameters() if np.shares_memory(p.data, theirs[name].data)}
    assert shared == theirs.keys() - {"layers.0.weight"}
    assert not any(p.requires_grad for p in plain.parameters())


def test_only_the_adapter_is_trainable_and_only_it_gets_a_gradient():
    base = tiny_mlp(6, 5, 4, 3)
    adapter = learned(new_adapter(base, targets=["1"]))
    model = attach(base, adapter)
    model(Tensor(X)).sum().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert with_gradient == trainable == {"layers.1.lora_A", "layers.1.lora_B"}
    assert all(p.grad is None for p in base.parameters())


def test_two_adapters_on_one_base_are_two_models_at_once_in_any_order():
    base = tiny_mlp(6, 5, 4)
    one, two = (learned(new_adapter(base, seed=s), seed=s) for s in (1, 2))
    first, second = outputs(attach(base, one)), outputs(attach(base, two))
    later, earlier = attach(base, two), attach(base, one)
    assert np.array_equal(outputs(earlier), first) and np.array_equal(outputs(later), second)
    assert not np.array_equal(first, second)
    untouched = contents(two)
    trained_one_step(earlier)
    assert contents(two) == untouched and np.array_equal(outputs(later), second)


def test_a_merged_model_stays_as_it_is_when_the_adapter_learns_on():
    base = tiny_mlp(6, 5, 4)
    model = attach(base, learned(new_adapter(base)))
    plain = merge(model)
    before = outputs(plain)
    trained_one_step(model)
    assert np.array_equal(outputs(plain), before)


def test_the_input_of_a_frozen_linear_is_freed_and_of_an_adapted_one_kept(monkeypatch, no_garbage_collector):
    base = tiny_mlp(6, 5, 4, 3)
    model = attach(base, new_adapter(base, targets=["layers.1"]))
    watch = Watch(model, monkeypatch)
    y = model(Tensor(X))
    assert watch.alive("layers.1") and not watch.alive("layers.2")
    full = Watch(base, monkeypatch)
    y = base(Tensor(X))
    assert full.alive("layers.1") and full.alive("layers.2") and y.requires_grad


def test_below_the_lowest_adapter_there_is_no_graph(monkeypatch):
    base = tiny_mlp(6, 5, 4, 3)
    model = attach(base, new_adapter(base, targets=["layers.1"]))
    watch = Watch(model, monkeypatch)
    y = model(Tensor(X))
    assert [watch.traced(f"layers.{i}") for i in range(3)] == [False, False, True]
    leaves, unseen = set(), [y.node]
    while unseen:
        node = unseen.pop()
        below = [n for nodes, _ in node.edges for n in nodes if n is not None]
        unseen += below
        leaves |= set() if below else {node}
    assert leaves == {p.node for p in model.parameters() if p.requires_grad}


@given(widths, sides, st.booleans())
def test_the_report_counts_r_times_in_plus_out_per_adapted_layer(sizes, r, only_first):
    base = tiny_mlp(*sizes)
    config = LoRAConfig(r, 1, ["0"] if only_first else "all-linear")
    adapter = init_adapter(base, config, np.random.default_rng(0), allow_large_r=True)
    pairs = list(zip(sizes, sizes[1:], strict=False))
    added = sum(r * (n + m) for n, m in (pairs[:1] if only_first else pairs))
    plain = sum(n * m + m for n, m in pairs)
    report = parameter_report(attach(base, adapter))
    assert report == (added, added + plain, 4 * added, 4 * (added + plain))
    assert parameter_report(adapter) == (added, added, 4 * added, 4 * added)
    assert f"{added:,} of {added + plain:,}" in str(report)


# --- dropout -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recording", [True, False])
def test_an_adapter_drops_out_if_and_only_if_a_generator_is_passed_whether_a_graph_is_recorded_or_not(recording):
    base = tiny_mlp(6, 5)
    adapter = learned(new_adapter(base, dropout=0.5))
    model = attach(base, adapter)
    still = attach(base, Adapter(LoRAConfig(2, 4, "all-linear"), adapter.pairs, adapter.base_fingerprint))

    def y(model, seed=None):
        with contextlib.nullcontext() if recording else no_grad():
            return model(Tensor(X), rng=None if seed is None else np.random.default_rng(seed)).data

    assert np.array_equal(y(model), y(still)) and np.array_equal(y(still, 0), y(still))
    assert np.array_equal(y(model, 0), y(model, 0))
    assert not np.array_equal(y(model, 0), y(model)) and not np.array_equal(y(model, 0), y(model, 1))
    assert np.array_equal(outputs(merge(model)), outputs(merge(still)))
    new = attach(base, new_adapter(base, dropout=0.5))
    assert np.array_equal(y(new, 0), outputs(base)), "nothing of the base drops out"


def test_what_drops_out_of_the_adapters_input_is_the_share_of_the_rate_and_the_rest_is_scaled_up():
    base = tiny_mlp(1, 1)
    pair = LoRAPair(Tensor(np.ones((1, 1), np.float32)), Tensor(np.ones((1, 1), np.float32)), 1.0)
    model = attach(base, Adapter(LoRAConfig(1, 1, "all-linear", dropout=0.75), {"layers.0": pair}, None))
    x = np.ones((4000, 1), np.float32)
    update = model(Tensor(x), rng=np.random.default_rng(0)).data - base(Tensor(x)).data
    assert set(np.round(update.ravel(), 5)) == {0.0, 4.0}
    assert np.mean(update == 0) == pytest.approx(0.75, abs=0.03)


class Spy(Linear):
    """A Linear that remembers the generator it was called with."""

    def __call__(self, x, rng=None):
        self.rng = rng
        return super().__call__(x, rng)


@pytest.mark.parametrize("wrap", [
    lambda spy, pair: LoRALinear(spy, pair), lambda spy, pair: BatchLoRALinear(spy, [pair], [0.0]),
], ids=["LoRALinear", "BatchLoRALinear"])  # fmt: skip
def test_a_held_layer_is_called_with_the_generator(wrap):
    ones = lambda *shape: Tensor(np.ones(shape))
    spy, rng = Spy(ones(4, 3)), np.random.default_rng(0)
    wrap(spy, LoRAPair(ones(2, 3), ones(4, 2), 1.0))(ones(1, 2, 3), rng)
    assert spy.rng is rng


@pytest.mark.parametrize("rng", [0, np.random, "seed"], ids=str)
def test_what_is_no_generator_is_refused_where_it_would_draw(rng):
    base = tiny_mlp(6, 5)
    model = attach(base, new_adapter(base, dropout=0.5))
    with pytest.raises(TypeError, match=r"must be a numpy\.random\.Generator.*write np\.random\.default_rng"):
        model(Tensor(X), rng=rng)


# --- every backend -----------------------------------------------------------------------------------------------


def test_every_backend_computes_what_numpy_does(xp):
    host = tiny_mlp(6, 5, 4)
    results = {}
    for module in (np, xp):
        base = host.to_device(module)
        adapter = learned(new_adapter(base))
        model = attach(base, adapter)
        y = model(Tensor(to_device(X, module)))
        (y * y).sum().backward()
        gradients = [p.grad for p in adapter.parameters()]
        Adam(adapter.parameters(), lr=0.1).step()
        plain = merge(model)
        results[module] = [y.data, *gradients, *(p.data for p in adapter.parameters()), plain.layers[0].weight.data]
    assert all(isinstance(a, xp.ndarray) for a in results[xp])
    assert all(agree(xp, ours, numpys) for ours, numpys in zip(results[xp], results[np], strict=True))


def test_one_seed_draws_the_same_adapter_on_every_backend(device_xp):
    host = tiny_mlp(6, 5, 4)
    there = new_adapter(host.to_device(device_xp))
    assert all(isinstance(p.data, device_xp.ndarray) for p in there.parameters())
    assert contents(there) == contents(new_adapter(host)) != contents(new_adapter(host, seed=1))


def test_an_adapter_of_one_backend_is_refused_on_a_base_of_another(device_xp):
    base = tiny_mlp(6, 5)
    adapter, there = new_adapter(base), base.to_device(device_xp)
    with pytest.raises(TypeError, match=f"{device_xp.__name__} and numpy|numpy and {device_xp.__name__}"):
        attach(there, adapter)


# --- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field, value", [
    ("r", 0), ("r", -2), ("r", 2.0), ("r", True), ("r", None), ("r", "2"),
    ("alpha", math.nan), ("alpha", math.inf), ("alpha", 0), ("alpha", -1.0), ("alpha", "16"), ("alpha", None),
    ("alpha", True),
    ("dropout", 1.0), ("dropout", -0.1), ("dropout", math.nan), ("dropout", "0.1"), ("dropout", None),
    ("use_rslora", "false"), ("use_rslora", None),
    ("target_modules", []), ("target_modules", ""), ("target_modules", ["q_proj", 3]),
    ("target_modules", None), ("target_modules", 3),
])
def test_a_config_names_the_field_that_is_wrong_and_its_value(field, value):
    with pytest.raises((ValueError, TypeError)) as caught:
        LoRAConfig(**{"r": 2, "alpha": 4, "target_modules": ["0"], field: value})
    shown = tuple(value) if isinstance(value, list) else value
    assert f"LoRAConfig: {field} must" in str(caught.value) and repr(shown) in str(caught.value)


def test_alpha_has_no_default():
    with pytest.raises(TypeError, match="alpha"):
        LoRAConfig(r=2, target_modules=["0"])


@pytest.mark.parametrize("targets, unmatched", [
    (["q_prj"], "q_prj"),
    (["layers.0", "layer.1"], "layer.1"),  # half right is wrong
    (["ayers.0"], "ayers.0"),  # an ending begins at a dot
    ("layers", "layers"),  # a string is matched against the whole name
    ("0", "regex"),
])
def test_a_pattern_that_matches_nothing_is_refused_with_what_exists(targets, unmatched):
    with pytest.raises(ValueError) as caught:
        new_adapter(tiny_mlp(6, 5, 4), targets=targets)
    assert unmatched in str(caught.value) and "layers.0, layers.1" in str(caught.value)


def test_a_string_that_is_no_regular_expression_is_refused_with_what_is_wrong_in_it():
    with pytest.raises(ValueError, match=r"'\(\('.* regular expression.*unterminated"):
        new_adapter(tiny_mlp(6, 5, 4), targets="((")


def test_a_rank_larger_than_the_weight_needs_an_explicit_word():
    base = tiny_mlp(6, 5, 3)
    with pytest.raises(ValueError, match=r"r=4 exceeds min\(in, out\) of layers\.1, weight \(3, 5\).*allow_large_r"):
        new_adapter(base, r=4)
    large = init_adapter(base, LoRAConfig(4, 1, "all-linear"), np.random.default_rng(0), allow_large_r=True)
    assert large.pairs["layers.1"].lora_A.shape == (4, 5)


def test_an_adapter_cannot_be_made_for_a_model_that_has_one():
    base = tiny_mlp(6, 5)
    with pytest.raises(ValueError, match=r"layers\.0 already carries an adapter.*merge"):
        new_adapter(attach(base, new_adapter(base)))


@pytest.mark.parametrize("A, B", [((2, 6), (5, 3)), ((6, 2), (5, 2)), ((2,), (5, 2)), ((2, 6), (5, 2, 1))])
def test_two_factors_without_one_rank_are_refused_with_both_shapes(A, B):
    with pytest.raises(ValueError) as caught:
        LoRAPair(Tensor(np.zeros(A)), Tensor(np.zeros(B)), 1.0)
    assert all(str(part) in str(caught.value) for part in ("(r, in)", "(out, r)", A, B))


def test_a_scaling_from_numpy_does_not_widen_what_is_merged():
    A, B = Tensor(np.ones((2, 6), np.float32)), Tensor(np.ones((5, 2), np.float32))
    for scaling in (np.float64(0.5), np.float32(0.5), 1, np.array(0.5)):
        pair = LoRAPair(A, B, scaling)
        assert pair.delta().dtype == np.float32 and type(pair.scaling) is float


def test_an_adapter_keeps_its_pairs_when_the_dictionary_it_was_made_from_changes():
    base = tiny_mlp(6, 5)
    pairs = dict(new_adapter(base).pairs)
    adapter = Adapter(LoRAConfig(2, 4, "all-linear"), pairs, None)
    pairs.clear()
    assert list(adapter.pairs) == ["layers.0"]


def test_a_pair_of_another_rank_than_the_recipes_computes_what_the_pair_says():
    """The configuration is a recipe and a record: the pair alone says r and scaling."""
    base = tiny_mlp(6, 5)
    rng = np.random.default_rng(0)
    A, B = (Tensor(rng.integers(-3, 4, shape).astype(np.float32)) for shape in ((3, 6), (5, 3)))
    adapter = Adapter(LoRAConfig(2, 1, ["0"]), {"layers.0": LoRAPair(A, B, 0.25)}, None)
    model = attach(base, adapter)
    assert adapter.pairs["layers.0"].r == 3
    expected = base.layers[0].weight.data + np.float32(0.25) * (B.data @ A.data)
    assert np.array_equal(merge(model).layers[0].weight.data, expected)


def test_an_adapter_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no pair of lora_A and lora_B; use init_adapter or load_adapter"):
        Adapter(LoRAConfig(2, 1, ["0"]), {}, None)


def test_what_is_no_adapter_is_refused_by_its_type():
    base = tiny_mlp(6, 5)
    with pytest.raises(TypeError, match="attach: expected an Adapter or a stack of them, got NoneType"):
        attach(base, None)


@pytest.mark.parametrize("model", [tiny_mlp(6, 5), new_adapter(tiny_mlp(6, 5))], ids=["a plain model", "an adapter"])
def test_merging_what_carries_no_adapter_is_refused(model):
    with pytest.raises(ValueError, match="no layer of this model carries an adapter; call it on what attach returned"):
        merge(model)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_merge_that_would_not_be_finite_is_refused_and_the_base_is_as_before(broken):
    base = tiny_mlp(6, 5, 4)
    before, adapter = contents(base), learned(new_adapter(base))
    adapter.pairs["layers.1"].lora_B.data[1, 0] = broken
    with pytest.raises(ValueError, match=r"layers\.1.*not finite"):
        merge(attach(base, adapter))
    assert contents(base) == before


# --- where LoRA ends ---------------------------------------------------------------------------------------------


def test_lora_and_its_stacks_work_where_there_is_no_gpt():
    """In a Python of its own, in which `import minilora.gpt` fails and the package's own `__init__` has not run."""
    program = """
import sys, types
package = types.ModuleType("minilora")
package.__path__ = [sys.argv[1]]
sys.modules.update({"minilora": package, "minilora.gpt": None})
import numpy as np
from minilora import lora, nn, stack, tensor
from minilora import lora_config as targets
class Model(nn.Module):
    def __init__(self, rng):
        self.proj = nn.Linear.init(4, 3, rng)
    def __call__(self, x):
        return self.proj(x)
rng = np.random.default_rng(0)
base = Model(rng)
adapter = lora.init_adapter(base, targets.LoRAConfig(2, 4, ["proj"]), rng)
x = tensor.Tensor(np.ones((2, 1, 4), np.float32))
lora.attach(base, stack.stack([adapter, None]))(x).sum().backward()
lora.merge(lora.attach(base, adapter))(x)
"""
    folder = Path(F.__file__).parent
    done = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
