"""Prefix tuning: keys and values that every query sees, as if a text stood before; and no weight that does the same."""

import numpy as np
import pytest
from strategies import close, tiny_gpt, tiny_llama

from minilora import LoRAConfig, Tensor, attach, init_adapter, init_prefix
from minilora import prefix as prefix_module
from minilora.decoder import KeyValueCache
from minilora.graph import no_grad
from minilora.prefix import PrefixedAttention

IDS = np.array([[1, 2, 3], [4, 0, 6]])


def outputs(model, ids=IDS):
    with no_grad():
        return model(ids).data


def new(base, length=3, seed=0):
    return init_prefix(base, length, np.random.default_rng(seed))


def drawn_ids(base, length=3, seed=0):
    """The tokens that `new` draws."""
    return np.random.default_rng(seed).integers(0, base.config.vocab_size, (1, length))


def without_positions(base):
    """A GPT whose vectors for positions are all zero: to it, a text has no beginning."""
    return base.rebuild(lambda name, t: Tensor(0 * t.data) if name == "wpe.weight" else None)


def test_a_new_one_is_a_text_that_stands_before_without_taking_positions():
    base = without_positions(tiny_gpt())
    before = np.repeat(drawn_ids(base), len(IDS), axis=0)
    expected = outputs(base, np.concatenate([before, IDS], axis=1))[:, 3:]
    assert close(outputs(attach(base, new(base))), expected)
    assert not close(expected, outputs(base))


@pytest.mark.parametrize("base", [tiny_gpt(), tiny_gpt("rope"), tiny_llama()], ids=["gpt", "rotary gpt", "llama"])
def test_the_context_is_as_long_as_before(base):
    n = base.config.block_size
    ids = np.zeros((1, n), int)
    assert outputs(attach(base, new(base, length=5)), ids).shape == (1, n, base.config.vocab_size)


def test_it_has_two_vectors_for_each_layer_and_place_as_wide_as_its_keys():
    base = tiny_llama()
    shapes = {name: p.shape for name, p in new(base).named_parameters()}
    assert shapes == {f"layers.{i}.self_attn.prefix_{kind}": (3, 12) for i in (0, 1) for kind in ("keys", "values")}


def bend(model, x, step):
    """How far the attention of block 0, on one token alone, is from affine between x - step and x + step."""
    with no_grad():
        low, middle, high = (model.h[0].attn(Tensor(a[None, None])).data for a in (x - step, x, x + step))
    return np.abs((low + high) / 2 - middle).max() / np.abs(high - low).max()


def test_a_prefix_has_no_equivalent_W():
    """On one token attention is affine, whatever the weights of q, k, v and o: so is LoRA on all of them, to rounding.

    With a prefix it is not. No weights, and so no merge, computes for these inputs what a prefix does.
    """
    base, rng = tiny_gpt(), np.random.default_rng(3)
    x, step = rng.standard_normal((2, 8))
    lora = init_adapter(base, LoRAConfig(2, 4, "all-linear"), rng)
    for pair in lora.pairs.values():
        pair.lora_B.data += rng.standard_normal(pair.lora_B.shape)
    assert bend(base, x, step) < 1e-14 and bend(attach(base, lora), x, step) < 1e-14
    assert bend(attach(base, new(base)), x, step) > 1e-3


def test_two_inputs_have_no_common_update_of_the_weights():
    """What the prefix adds to 2x is not twice what it adds to x, as it would be if it were W x."""
    base = tiny_gpt()
    base = base.rebuild(lambda name, t: Tensor(0 * t.data) if name.endswith("_proj.bias") else None)
    model, x = attach(base, new(base)), np.random.default_rng(3).standard_normal(8)
    with no_grad():
        added = [(model.h[0].attn(a).data - base.h[0].attn(a).data)
                 for a in (Tensor(x[None, None]), Tensor(2 * x[None, None]))]  # fmt: skip
    assert np.abs(2 * added[0] - added[1]).max() > 0.05 * np.abs(added[1]).max()


def test_a_prefix_as_long_as_the_context_fits_and_a_longer_one_has_no_start():
    base = tiny_gpt()
    attach(base, new(base, length=base.config.block_size))
    with pytest.raises(ValueError, match="9 positions do not fit in a context of 8"):
        new(base, length=9)


def test_keys_of_another_width_are_refused():
    base, other = tiny_llama(), tiny_llama(num_key_value_heads=4)
    with pytest.raises(ValueError, match=r"24 channels of keys, but prefix_keys \(3, 12\) and prefix_values \(3, 12\)"):
        attach(other, new(base), check_base=False)


# Planted bugs.


def values_for_keys(self, x, rope=None, cache=None, rng=None):
    rows = [prefix_module.for_each_row(p, len(x.data)) for p in (self.prefix.prefix_values, self.prefix.prefix_keys)]
    return self.attention(x, rope, cache, rng, front=rows)


@pytest.mark.parametrize("bug", [values_for_keys], ids=lambda bug: bug.__name__)
def test_planted_bugs_are_noticed(monkeypatch, bug):
    monkeypatch.setattr(PrefixedAttention, "__call__", bug)
    with pytest.raises(AssertionError):
        test_a_new_one_is_a_text_that_stands_before_without_taking_positions()


def test_a_mask_of_padding_that_hides_the_prefix_too_is_noticed(monkeypatch):
    from test_method import test_a_prompt_that_is_filled_up_on_the_left_is_read_as_it_is_alone as property_

    def hidden(self):
        if self.starts is None:
            return None
        return np.arange(-self.n_front, self.length) < np.asarray(self.starts)[:, None]

    monkeypatch.setattr(KeyValueCache, "hidden", hidden)
    with pytest.raises(AssertionError):
        property_("prefix", "llama")
