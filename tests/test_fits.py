"""Whether an adapter belongs on a base: every reason why not, and nothing changed by the question. Knows no GPT."""

import numpy as np
import pytest
from strategies import TinyMLP, contents, grown, learned, new_adapter, small_gpt, small_llama, tiny_mlp, trained_adapter

from minilora import fits
from minilora.fits import GROWN_VOCABULARY, OTHER_PRECISION, MoreRows, changes_of, check_fits
from minilora.functional import linear
from minilora.graph import no_grad
from minilora.lora import Adapter, LoRAPair, attach, merge
from minilora.lora_config import LoRAConfig
from minilora.nn import Linear, LinearLayer, Module, table_rows
from minilora.quant import quantize
from minilora.stack import stack
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
    (lambda base: tiny_mlp(6, 5), ValueError, ["layers.1", "nothing there"]),
    (without_activation, ValueError, ["layers.0", "layers.1", "nothing there"]),
    (lambda base: tiny_mlp(6, 5, 4, seed=9), ValueError, ["layers.0.weight", "made for", "this base has"]),
    (with_another_bias, ValueError, ["layers.1.bias", "made for", "this base has"]),
    (lambda base: tiny_mlp(6, 5, 4, 3), ValueError, ["layers.2.weight", "absent"]),
    (lambda base: attach(base, new_adapter(base)), ValueError,
     ["layers.0 already carries an adapter", "merge", "stack"]),
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


def test_a_transposed_pair_is_refused():
    base = TinyMLP([Linear(Tensor(np.ones((3, 5))))])
    pair = LoRAPair(Tensor(np.ones((2, 3))), Tensor(np.ones((5, 2))), 1.0)
    with pytest.raises(ValueError, match=r"layers\.0: weight \(3, 5\)"):
        attach(base, Adapter(LoRAConfig(2, 4, ["0"]), {"layers.0": pair}, None))


class Halved(LinearLayer):
    """A weight that is kept as whole numbers of halves, as a quantised layer keeps its own."""

    def __init__(self, halves):
        self.halves = halves  # an int8 array (out, in): no Tensor, so no part of the tree

    out_features = property(lambda self: self.halves.shape[0])
    in_features = property(lambda self: self.halves.shape[1])
    dtype = property(lambda self: np.dtype("float32"))
    xp = property(lambda self: np)

    def __call__(self, x, rng=None):
        return linear(x, Tensor(self.halves.astype(np.float32) / 2))

    def plus(self, update):
        return Linear(Tensor(self.halves.astype(np.float32) / 2 + update))


def test_a_layer_that_stores_its_weight_in_another_way_carries_lora_and_merges():
    rng = np.random.default_rng(0)
    base = TinyMLP([Halved(rng.integers(-3, 4, (5, 6)).astype(np.int8))])
    adapter = new_adapter(base)
    for p in adapter.parameters():
        p.data[...] = rng.integers(-2, 3, p.shape)
    model, x = attach(base, adapter), rng.integers(-3, 4, (2, 6)).astype(np.float32)
    assert np.array_equal(outputs(model, x), outputs(merge(model), x))
    assert not np.array_equal(outputs(model, x), outputs(base, x))


class Scaled(Module):
    """A wrapper that has nothing to do with LoRA."""

    transparent = ("inner",)

    def __init__(self, inner):
        self.inner = inner


def test_only_what_carries_an_adapter_is_said_to():
    base = tiny_mlp(6, 5)
    wrapped = TinyMLP([Scaled(base.layers[0])])
    with pytest.raises(ValueError, match="the base has Scaled there, not a linear layer"):
        attach(wrapped, new_adapter(base))


# --- a base that was changed on purpose -------------------------------------------------------------------------------


BASES = {
    "gpt": lambda: small_gpt(), "gpt, a head of its own": lambda: small_gpt(tie_word_embeddings=False),
    "llama": lambda: small_llama(tie_word_embeddings=True), "llama, a head of its own": lambda: small_llama(),
}  # fmt: skip
every_base = pytest.mark.parametrize("make", BASES.values(), ids=BASES)


def changes(model, base, rows=None):
    """What differs between `model` and the base of an adapter of `base`."""
    adapter = trained_adapter(base)
    return changes_of(model, adapter.base_fingerprint, adapter.base_stored, adapter.base_rows if rows is None else rows)


@every_base
def test_more_tokens_are_seen_in_every_table_and_nothing_else_is(make):
    base = make()
    tables = [name for name, n in table_rows(base).items() if n == 11]
    assert changes(grown(base), base) == dict.fromkeys(tables, MoreRows(11, 14)) and len(tables) == 1 + (
        not base.config.tie_word_embeddings)  # fmt: skip
    assert changes(base, base) == {}


def with_the_first_row_changed(base):
    model = grown(base)
    table = next(iter(table_rows(base)))
    return model.rebuild(lambda name, x: Tensor(x.data + np.eye(14, 1, dtype=x.dtype)) if name == table else None)


NOT_GROWN = {
    "a row from before was changed": with_the_first_row_changed,
    "fewer tokens": lambda base: grown(small_gpt(vocab_size=8)),
    "a weight beside": lambda base: grown(small_gpt(seed=1)),
    "more positions": lambda base: grown(base, 3, ("wpe.weight",), block_size=19),
    "other tokens": lambda base: small_gpt(seed=1, vocab_size=14),
    "new tokens first": lambda base: grown(base).rebuild(
        lambda name, x: Tensor(x.data[::-1].copy()) if name == "wte.weight" else None),
}  # fmt: skip


@pytest.mark.parametrize("other", NOT_GROWN.values(), ids=NOT_GROWN)
def test_what_is_more_than_new_tokens_is_another_base(other):
    base = small_gpt()
    assert changes(other(base), base) is None


def test_a_table_whose_length_nobody_noted_is_not_known_to_have_grown():
    base = small_gpt()
    assert changes(grown(base), base, rows={}) is None
    assert changes(grown(base), base, rows={"wte.weight": 10}) is None


def test_both_changes_are_told_apart():
    base = small_llama()
    found = changes(quantize(grown(base), "nf4"), base)
    names = {name: fits.NAME_OF[type(change)] for name, change in found.items()}
    assert {names[f"{table}.weight"] for table in ("embed_tokens", "lm_head")} == {GROWN_VOCABULARY}
    assert set(names.values()) == {GROWN_VOCABULARY, OTHER_PRECISION} and len(names) == 2 + 7 * 2


def test_planted_a_comparison_of_lengths_alone_is_seen(monkeypatch):
    by_length = lambda tensor, expected, n: MoreRows(n, len(tensor.data)) if n else None
    monkeypatch.setattr(fits, "_more_rows", by_length)
    base = small_gpt()
    wrong = [name for name, other in NOT_GROWN.items() if changes(other(base), base) is not None]
    assert "a row from before was changed" in wrong and "new tokens first" in wrong
