"""(IA)³: factors where the paper has them, merged into rows and columns."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import close, float_dtypes, integer_arrays, sides, tiny_gpt, tiny_llama

from minilora import attach, init_ia3, merge
from minilora.graph import no_grad
from minilora.ia3 import Factors, ScaledLinear
from minilora.nn import Linear
from minilora.tensor import Tensor

IDS = np.array([[1, 2, 3, 4], [4, 0, 6, 6]])


def outputs(model, ids=IDS):
    with no_grad():
        return model(ids).data


def drawn(base, seed=1):
    """Factors around one."""
    ia3, rng = init_ia3(base), np.random.default_rng(seed)
    for p in ia3.parameters():
        p.data[...] = rng.uniform(0.5, 1.5, p.shape)
    return ia3


@st.composite
def lattice_cases(draw):
    """A layer of whole numbers with factors that are powers of two, so that nothing is rounded, and an input."""
    dtype, n, m, of_inputs = draw(float_dtypes), draw(sides), draw(sides), draw(st.booleans())
    whole = lambda *shape: draw(integer_arrays(shape, dtype=dtype))
    linear = Linear(Tensor(whole(m, n)), Tensor(whole(m)) if draw(st.booleans()) else None)
    factors = 2.0 ** whole(n if of_inputs else m)
    return linear, Tensor(factors.astype(dtype)), of_inputs, Tensor(whole(3, n))


@given(lattice_cases())
def test_a_layer_computes_the_formula_and_merged_it_does_to_the_bit(case):
    linear, factors, of_inputs, x = case
    W, l, b = linear.weight.data, factors.data, 0 if linear.bias is None else linear.bias.data
    expected = (x.data * l) @ W.T + b if of_inputs else l * (x.data @ W.T + b)
    layer = ScaledLinear(linear, Factors(factors, of_inputs))
    assert np.array_equal(layer(x).data, expected) and np.array_equal(layer.merged()(x).data, expected)


@pytest.mark.parametrize("model, inner", [(tiny_gpt(), 32), (tiny_llama(), 10)], ids=["gpt", "llama"])
def test_it_has_a_factor_for_each_key_each_value_and_each_channel_inside_the_mlp(model, inner):
    ia3 = init_ia3(model)
    kinds = {name.rpartition(".")[0].split(".", 2)[2] for name, _ in ia3.named_parameters()}
    attention = "attn" if inner == 32 else "self_attn"
    assert kinds == {f"{attention}.k_proj", f"{attention}.v_proj", "mlp.down_proj"}
    n_kv = dict(model.named_modules())[f"{'h' if inner == 32 else 'layers'}.0.{attention}.k_proj"].out_features
    assert sum(p.size for p in ia3.parameters()) == 2 * (2 * n_kv + inner)
    assert all((p.data == 1).all() and p.requires_grad for p in ia3.parameters())


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True}, {"attention_bias": True, "output_bias": True}])
def test_merged_it_is_the_same_also_where_keys_are_normalised_afterwards(changes):
    base = tiny_llama(**changes)
    model = attach(base, drawn(base))
    assert close(outputs(merge(model)), outputs(model)) and not close(outputs(model), outputs(base))


def test_factors_of_the_wrong_side_or_length_are_refused():
    base = tiny_gpt()
    ia3 = init_ia3(base)
    ia3.parts["h.0.mlp.down_proj"].of_inputs = False
    with pytest.raises(ValueError, match=r"h\.0\.mlp\.down_proj: weight \(8, 32\), but \(32,\) factors of outputs"):
        attach(base, ia3)


def without_the_bias(self):
    return Linear(Tensor(self.linear.weight.data * self.factors.ia3_l.data[:, None]), self.linear.bias)


def rows_for_columns(self):
    return Linear(Tensor(self.linear.weight.data * self.factors.ia3_l.data), self.linear.bias)


@pytest.mark.parametrize("bug", [without_the_bias, rows_for_columns])
def test_a_wrong_merge_is_noticed(monkeypatch, bug):
    monkeypatch.setattr(ScaledLinear, "merged", bug)
    linear = Linear(Tensor(np.arange(4.0).reshape(2, 2)), Tensor(np.ones(2)))
    with pytest.raises(AssertionError):
        test_a_layer_computes_the_formula_and_merged_it_does_to_the_bit.hypothesis.inner_test(
            (linear, Tensor(np.array([2.0, 4.0])), False, Tensor(np.ones((1, 2)))))  # fmt: skip
