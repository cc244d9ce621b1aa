"""Whether an adapter belongs on a base: every reason why not, and nothing changed by the question. Knows no GPT."""

import numpy as np
import pytest
from strategies import TinyMLP, contents, learned, new_adapter, tiny_mlp

from minilora.compose import stack
from minilora.fits import check_fits
from minilora.graph import no_grad
from minilora.lora import attach
from minilora.tensor import Tensor

X = np.random.default_rng(7).standard_normal((2, 3, 6)).astype(np.float32)  # a batch for tiny_mlp(6, ...)


def outputs(model, x=X):
    with no_grad():
        return model(Tensor(x)).data


def without_activation(base):
    """The same weights under other names."""
    other = TinyMLP([])
    other.blocks = base.layers
    return other


def with_another_bias(base):
    return base.rebuild(lambda name, t: Tensor(t.data + 1) if name == "layers.1.bias" else None)


@pytest.mark.parametrize("other, error, says", [
    (lambda base: tiny_mlp(6, 7, 4), ValueError, ["layers.0", "(7, 6)", "(2, 6)", "(5, 2)"]),
    (lambda base: tiny_mlp(6, 5), ValueError, ["layers.1", "NoneType"]),
    (without_activation, ValueError, ["layers.0", "layers.1", "not Linear"]),
    (lambda base: tiny_mlp(6, 5, 4, seed=9), ValueError, ["layers.0.weight", "made for", "this base has"]),
    (with_another_bias, ValueError, ["layers.1.bias", "made for", "this base has"]),
    (lambda base: tiny_mlp(6, 5, 4, 3), ValueError, ["layers.2.weight", "absent"]),
    (lambda base: attach(base, new_adapter(base)), ValueError, ["layers.0 already carries LoRA", "merge", "stack"]),
    (lambda base: base.astype("float64"), TypeError, ["layers.0", "float32", "float64"]),
], ids=["shape", "fewer layers", "names", "weights", "an unadapted bias", "more layers", "attached twice", "dtype"])
def test_an_adapter_is_refused_on_a_base_it_does_not_fit_and_nothing_has_changed(other, error, says):
    base = tiny_mlp(6, 5, 4)
    adapter, wrong = learned(new_adapter(base)), other(base)
    before = contents(adapter), contents(wrong), outputs(base)
    with pytest.raises(error) as caught:
        attach(wrong, adapter)
    assert all(part in str(caught.value) for part in says)
    assert (contents(adapter), contents(wrong)) == before[:2]
    assert np.array_equal(outputs(base), before[2])


def test_another_base_is_accepted_on_request_and_a_float64_copy_is_the_same_base():
    base = tiny_mlp(6, 5, 4)
    adapter = learned(new_adapter(base))
    model, changed = attach(base, adapter), with_another_bias(base)
    assert np.allclose(outputs(attach(changed, adapter, check_base=False)), outputs(model) + 1, atol=1e-5)
    exact = attach(base.astype("float64"), adapter.astype("float64"))
    assert np.allclose(outputs(exact, X.astype(np.float64)), outputs(attach(base, adapter)), rtol=1e-5, atol=1e-5)


def test_a_long_list_of_misfits_is_cut_short_and_counted():
    base, other = tiny_mlp(*[6] * 11), tiny_mlp(*[6] * 11, seed=1)
    with pytest.raises(ValueError, match=r"and 2 more"):  # ten weights differ; all biases are zero
        attach(other, new_adapter(base))


def test_the_reasons_that_say_most_come_first():
    """A tensor that only one side has says more than one that differs."""
    base, larger = tiny_mlp(6, 5, 4), tiny_mlp(6, 5, 4, 3, seed=1)
    with pytest.raises(ValueError) as caught:
        attach(larger, new_adapter(base))
    names = [line.split(":")[0].strip() for line in str(caught.value).split("\n")[1:]]
    assert names[:2] == ["layers.2.bias", "layers.2.weight"] and "layers.0.weight" in names


def test_an_adapter_that_serves_several_rows_is_asked_once():
    base, other = tiny_mlp(6, 5), tiny_mlp(6, 5, seed=1)
    adapter = new_adapter(base)
    with pytest.raises(ValueError) as caught:
        check_fits("attach", other, stack([adapter, None, adapter]))
    assert str(caught.value).count("layers.0.weight") == 1


def test_an_adapter_whose_base_is_unknown_is_asked_for_its_shapes_alone():
    base, other = tiny_mlp(6, 5), tiny_mlp(6, 5, seed=1)
    adapter = new_adapter(base)
    adapter.base_fingerprint = None
    check_fits("attach", other, adapter)
    with pytest.raises(ValueError, match=r"layers\.0: weight \(7, 6\)"):
        check_fits("attach", tiny_mlp(6, 7), adapter)
