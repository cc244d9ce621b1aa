"""Stacked adapters, one per batch row: each row, and each gradient, is what its adapter gives alone. Knows no GPT."""

import importlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import agree, contents, hunt, lattice_stacks, learned, tiny_mlp

from minilora.backend import to_device
from minilora.count import parameter_report
from minilora.graph import no_grad
from minilora.lora import attach, init_adapter, merge
from minilora.lora_config import LoRAConfig
from minilora.optim import Adam
from minilora.stack import stack
from minilora.tensor import Tensor

# `minilora.stack` is the function.
STACK_FILE = importlib.import_module("minilora.stack")
X = np.random.default_rng(7).standard_normal((3, 2, 6)).astype(np.float32)


def learned_adapter(base, r=2, targets="all-linear", seed=0, **options):
    return learned(init_adapter(base, LoRAConfig(r, 4, targets, **options), np.random.default_rng(seed)), seed)


def outputs(model, x=X):
    with no_grad():
        return model(Tensor(x)).data


def run(model, x, dy):
    """The output for x, and the gradient of x under the cotangent dy; adapters collect theirs."""
    x = Tensor(x, requires_grad=True)
    y = model(x)
    y.backward(dy)
    return y.data, x.grad


def gradients(adapter):
    return [np.zeros(p.shape, p.dtype) if p.grad is None else p.grad for p in adapter.parameters()]


def clear(adapters):
    for adapter in adapters:
        for p in adapter.parameters() if adapter else []:
            p.grad = None


# --- the algebra, to the last bit ------------------------------------------------------------------------------------


def equals_each_adapter_alone(case):
    """Every row of the stacked output, of x's gradient and of each A's and B's gradient is that of its row alone."""
    base, adapters, x, dy = case
    clear(adapters)
    y, dx = run(attach(base, stack(adapters)), x, dy)
    stacked = [gradients(a) if a else [] for a in adapters]
    clear(adapters)
    for i, adapter in enumerate(adapters):
        alone = attach(base, adapter) if adapter else base.frozen()
        y_alone, dx_alone = run(alone, x[i], dy[i])
        assert y.dtype == y_alone.dtype and np.array_equal(y[i], y_alone)
        assert np.array_equal(dx[i], dx_alone)
        assert all(map(np.array_equal, stacked[i], gradients(adapter) if adapter else []))


@given(lattice_stacks())
def test_stacked_equals_solo_for_outputs_and_all_gradients_bit_for_bit(case):
    equals_each_adapter_alone(case)


def rows_in_reverse(pad_and_stack):
    return lambda matrices: pad_and_stack(matrices[::-1])


def padded_with_ones(pad_and_stack):
    def padded(matrices):
        y = pad_and_stack(matrices)
        filled = [np.ones(y.shape[1:], y.dtype) if t is None else y.data[i] for i, t in enumerate(matrices)]
        for row, t in zip(filled, matrices, strict=True):
            if t is not None:
                row[t.shape[0] :], row[:, t.shape[1] :] = 1, 1
        y.data = np.stack(filled)
        return y

    return padded


def last_rank_cut(pad_and_stack):
    """As if every rank were the smallest one."""

    def cut(matrices):
        y = pad_and_stack(matrices)
        y.data = y.data.copy()
        r = min(min(t.shape) for t in matrices if t is not None)
        y.data[:, r:] = 0
        return y

    return cut


def first_of_all(column):
    return lambda values: column([values[0]] * len(values))


PLANTED = {
    "rows in the wrong order": (STACK_FILE, "pad_and_stack", rows_in_reverse),
    "padding that is not zero": (STACK_FILE, "pad_and_stack", padded_with_ones),
    "ranks cut to the smallest": (STACK_FILE, "pad_and_stack", last_rank_cut),
    "the scaling of row 0 for all": (STACK_FILE, "_column", first_of_all),
}


@pytest.mark.parametrize("owner, name, bug", PLANTED.values(), ids=PLANTED)
def test_each_planted_bug_in_the_stacking_is_killed(monkeypatch, owner, name, bug):
    monkeypatch.setattr(owner, name, bug(getattr(owner, name)))
    with pytest.raises(AssertionError):
        hunt(lattice_stacks(), equals_each_adapter_alone)


@given(lattice_stacks(), st.data())
def test_permuting_the_rows_permutes_the_outputs_and_nothing_else(case, data):
    order = data.draw(st.permutations(range(len(case.adapters))))
    y = attach(case.base, stack(case.adapters))(Tensor(case.x)).data
    permuted = attach(case.base, stack([case.adapters[i] for i in order]))(Tensor(case.x[order])).data
    assert np.array_equal(permuted, y[order])


@given(lattice_stacks(), st.data())
def test_an_adapter_in_several_rows_collects_the_sum_of_their_gradients(case, data):
    adapter = next(a for a in case.adapters if a)
    rows = [a and adapter for a in case.adapters]
    clear(rows)
    run(attach(case.base, stack(rows)), case.x, case.dy)
    together = gradients(adapter)
    clear(rows)
    model = attach(case.base, adapter)
    for i, row in enumerate(rows):
        if row:
            run(model, case.x[i], case.dy[i])  # backward adds to what is there
    assert all(map(np.array_equal, together, gradients(adapter)))


# --- what a stack shares and what it trains ------------------------------------------------------------------------


def test_adapters_of_different_ranks_scalings_and_targets_share_one_batch():
    base = tiny_mlp(6, 5, 4, dtype="float64")
    adapters = [learned_adapter(base, 1, ["0"]), None, learned_adapter(base, 3, ["1"], seed=1, use_rslora=True)]
    x = X.astype(np.float64)
    y = outputs(attach(base, stack(adapters)), x)
    for i, adapter in enumerate(adapters):
        alone = outputs(attach(base, adapter) if adapter else base, x[i : i + 1])
        assert np.allclose(y[i], alone[0], rtol=1e-12, atol=1e-12)  # a margin: real numbers, other matrix shapes


def test_a_stacked_model_holds_each_tensor_once_and_trains_its_adapters_and_no_other():
    base = tiny_mlp(6, 5, 4)
    one, two, other = (learned_adapter(base, seed=s) for s in range(3))
    model = attach(base, stack([one, two, one]))
    before = [contents(a) for a in (one, two, other, base)]
    assert parameter_report(model).trainable == parameter_report(one).trainable + parameter_report(two).trainable
    model(Tensor(X)).sum().backward()
    Adam(model.parameters(), lr=0.1).step()
    changed = [contents(a) != then for a, then in zip((one, two, other, base), before, strict=True)]
    assert changed == [True, True, False, False]


def test_rows_of_none_learn_nothing_and_compute_the_base():
    base = tiny_mlp(6, 5, 4)
    y = outputs(attach(base, stack([learned_adapter(base), None, learned_adapter(base, seed=1)])))
    assert np.array_equal(y[1], outputs(base)[1])
    assert not np.array_equal(y[0], outputs(base)[0])


def test_an_adapter_that_went_wrong_spoils_its_own_row_only():
    base = tiny_mlp(6, 5, 4)
    good, bad = learned_adapter(base), learned_adapter(base, r=3, seed=1)
    expected = outputs(attach(base, stack([None, good, bad])))[:2]
    bad.pairs["layers.0"].lora_B.data[:] = np.nan
    y = outputs(attach(base, stack([None, good, bad])))
    assert np.array_equal(y[:2], expected) and np.isnan(y[2]).all()


def test_a_stacked_model_converts_to_float64_like_any_other():
    base = tiny_mlp(6, 5, 4)
    model = attach(base, stack([learned_adapter(base, use_rslora=True), None, learned_adapter(base, seed=1)]))
    exact = outputs(model.astype("float64"), X.astype(np.float64))
    assert exact.dtype == np.float64
    assert np.allclose(exact, outputs(model), rtol=1e-5, atol=1e-5)


def test_every_backend_computes_what_numpy_does(xp):
    results = {}
    for module in (np, xp):
        base = tiny_mlp(6, 5, 4).to_device(module)
        adapters = [learned_adapter(base, 1), None, learned_adapter(base, 3, ["1"], seed=1, dropout=0.5)]
        model = attach(base, stack(adapters))
        y = model(Tensor(to_device(X, module)), rng=np.random.default_rng(0))
        (y * y).sum().backward()
        results[module] = [y.data, *(p.grad for a in adapters if a for p in a.parameters())]
    assert all(isinstance(a, xp.ndarray) for a in results[xp])
    assert all(agree(xp, ours, numpys) for ours, numpys in zip(results[xp], results[np], strict=True))


# --- dropout -----------------------------------------------------------------------------------------------------


def test_each_row_has_the_dropout_of_its_adapter():
    base = tiny_mlp(6, 5)
    adapters = [learned_adapter(base), None, learned_adapter(base, dropout=0.9)]
    model = attach(base, stack(adapters))
    thinned, still = model(Tensor(X), rng=np.random.default_rng(0)).data, outputs(model)
    assert np.array_equal(model(Tensor(X)).data, still), "without a generator nothing drops out, graph or no graph"
    assert [np.array_equal(thinned[i], still[i]) for i in range(3)] == [True, True, False]


# --- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, error, says", [
    ([], ValueError, ["0 rows", "at least one Adapter"]),
    ([None, None], ValueError, ["2 rows", "at least one Adapter"]),
    (["english"], TypeError, ["Adapters or None", "str"]),
    ([tiny_mlp(6, 5), None], TypeError, ["Adapters or None", "TinyMLP"]),
    ([learned_adapter(tiny_mlp(6, 5)), 1], TypeError, ["Adapters or None", "int"]),
    (learned_adapter(tiny_mlp(6, 5)), TypeError, ["Adapter"]),
])
def test_a_stack_takes_adapters_and_none_and_says_what_else_it_got(rows, error, says):
    with pytest.raises(error) as caught:
        stack(rows)
    assert all(part in str(caught.value) for part in says)


@pytest.mark.parametrize("x", [X[:2], X[0], X[:, :, None], np.concatenate([X, X])], ids=lambda x: str(x.shape))
def test_a_batch_with_another_number_of_rows_is_refused_with_both_numbers(x):
    base = tiny_mlp(6, 5)
    model = attach(base, stack([learned_adapter(base), None, None]))
    with pytest.raises(ValueError) as caught:
        model(Tensor(x))
    assert "stacks 3 adapters" in str(caught.value) and str(x.shape) in str(caught.value)


def test_merging_a_stacked_model_is_refused_and_nothing_has_changed():
    base = tiny_mlp(6, 5, 4)
    adapter = learned_adapter(base)
    model, before = attach(base, stack([adapter, None])), (contents(base), contents(adapter))
    with pytest.raises(ValueError, match="rows of a stacked model carry different adapters; merge one of them"):
        merge(model)
    assert (contents(base), contents(adapter)) == before


def test_a_stack_is_refused_as_a_whole_if_one_of_its_adapters_does_not_fit():
    base = tiny_mlp(6, 5, 4)
    stranger = learned_adapter(tiny_mlp(6, 7, 4))
    with pytest.raises(ValueError, match=r"layers\.0: weight \(5, 6\), but lora_A \(2, 6\) and lora_B \(7, 2\)"):
        attach(base, stack([learned_adapter(base), stranger]))


@pytest.mark.parametrize("first", ["one", "stack"])
def test_a_stack_cannot_be_put_on_a_model_that_carries_an_adapter_nor_the_reverse(first):
    base = tiny_mlp(6, 5)
    adapter = learned_adapter(base)
    several = stack([adapter, None])
    lower, upper = (adapter, several) if first == "one" else (several, adapter)
    with pytest.raises(ValueError, match=r"layers\.0 already carries an adapter"):
        attach(attach(base, lower), upper)
