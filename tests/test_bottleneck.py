"""Bottleneck adapters: where they stand, what they compute, and why no weight does the same."""

import numpy as np
import pytest
from strategies import close, tiny_gpt, tiny_llama

from minilora import LoRAConfig, attach, init_adapter, init_bottleneck
from minilora.bottleneck import Bottleneck, WithBottleneck
from minilora.functional import gelu
from minilora.graph import no_grad
from minilora.tensor import Tensor

IDS = np.array([[1, 2, 3, 4], [4, 0, 6, 6]])
TARGETS = np.array([[2, 3, 4, -100], [0, 6, 6, 1]])


def learned(adapter, seed=1):
    rng = np.random.default_rng(seed)
    for p in adapter.parameters():
        p.data += 0.5 * rng.standard_normal(p.shape)
    return adapter


def new(base, n_inner=3, **options):
    return init_bottleneck(base, n_inner, np.random.default_rng(0), **options)


def test_it_is_h_and_what_two_thin_layers_make_of_it():
    base = tiny_gpt()
    adapter = learned(new(base))
    part = adapter.parts["h.0.mlp"]
    mlp, x = base.h[0].mlp, Tensor(np.random.default_rng(2).standard_normal((2, 3, 8)))
    h = mlp(x).data
    inner = gelu(Tensor(h @ part.down.weight.data.T + part.down.bias.data)).data
    expected = h + inner @ part.up.weight.data.T + part.up.bias.data
    assert close(attach(base, adapter).h[0].mlp(x).data, expected)


@pytest.mark.parametrize("base", [tiny_gpt(), tiny_llama()], ids=["gpt", "llama"])
@pytest.mark.parametrize("after_attention", [True, False])
def test_it_stands_after_attention_and_mlp_or_after_the_mlp_alone(base, after_attention):
    adapter = new(base, after_attention=after_attention)
    halves = {name.split(".")[2] for name in adapter.parts}
    attention = "attn" if hasattr(base, "h") else "self_attn"
    assert halves == ({attention, "mlp"} if after_attention else {"mlp"})
    C = base.head_layer().weight.shape[1]
    assert sum(p.size for p in adapter.parameters()) == len(adapter.parts) * (2 * 3 * C + 3 + C)


def test_at_the_start_down_has_a_gradient_of_exactly_zero_and_up_has_not():
    base = tiny_gpt(dtype="float32")
    adapter = new(base)
    attach(base, adapter).loss(IDS, TARGETS).backward()
    for part in adapter.parts.values():
        assert not part.down.weight.grad.any() and part.up.weight.grad.any()


def bend(model, x, step):
    """How far the attention of block 0, on one token alone, is from affine between x - step and x + step."""
    with no_grad():
        low, middle, high = (model.h[0].attn(Tensor(a[None, None])).data for a in (x - step, x, x + step))
    return np.abs((low + high) / 2 - middle).max() / np.abs(high - low).max()


def test_no_weight_computes_what_it_does():
    """On one token attention is affine, whatever its weights: LoRA keeps it so, to rounding. A bottleneck does not."""
    base = tiny_gpt()
    rng = np.random.default_rng(3)
    x, step = rng.standard_normal((2, 8))
    lora = init_adapter(base, LoRAConfig(2, 4, "all-linear"), rng)
    for pair in lora.pairs.values():
        pair.lora_B.data += rng.standard_normal(pair.lora_B.shape)
    assert bend(base, x, step) < 1e-14 and bend(attach(base, lora), x, step) < 1e-14
    assert bend(attach(base, learned(new(base))), x, step) > 1e-3


@pytest.mark.parametrize("bug", [
    lambda patch: patch.setattr(WithBottleneck, "__call__", lambda self, *a: self.bottleneck(self.module(*a))),
    lambda patch: patch.setattr(Bottleneck, "__call__", lambda self, h: self.up(self.down(h))),
], ids=["what it adds to is lost", "no gelu"])  # fmt: skip
def test_planted_bugs_are_noticed(monkeypatch, bug):
    bug(monkeypatch)
    with pytest.raises(AssertionError):
        test_it_is_h_and_what_two_thin_layers_make_of_it()
    with pytest.raises(AssertionError):
        test_no_weight_computes_what_it_does()
        base = tiny_gpt()
        assert np.array_equal(attach(base, new(base))(IDS).data, base(IDS).data)
