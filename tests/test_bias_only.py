"""BitFit: the biases and nothing else, trained as full fine-tuning would train them."""

import numpy as np
import pytest
from strategies import contents, tiny_gpt, tiny_llama

from minilora import Adam, attach, init_bias_only, merge
from minilora.bias_only import Rebiased
from minilora.graph import no_grad

IDS = np.array([[1, 2, 3, 4], [4, 0, 6, 6]])
TARGETS = np.array([[2, 3, 4, -100], [0, 6, 6, 1]])


def outputs(model):
    with no_grad():
        return model(IDS).data


def trained(base):
    biases = init_bias_only(base)
    adam = Adam(biases.parameters(), lr=0.1)
    for _ in range(3):
        adam.zero_grad()
        attach(base, biases).loss(IDS, TARGETS).backward()
        adam.step()
    return biases


def test_it_is_every_bias_of_the_model_those_of_its_norms_too():
    base = tiny_gpt()
    named = dict(init_bias_only(base).named_parameters())
    assert list(named) == [name for name, _ in base.named_parameters() if name.endswith(".bias")]
    assert "ln_f.bias" in named and "h.1.ln_2.bias" in named
    # Each is a copy.
    own = dict(base.named_parameters())
    for name, p in named.items():
        assert np.array_equal(p.data, own[name].data) and not np.shares_memory(p.data, own[name].data)


def test_of_a_llama_it_is_those_few_that_have_one():
    base = tiny_llama(attention_bias=True)
    named = [name for name, _ in init_bias_only(base).named_parameters()]
    assert named == [f"layers.{i}.self_attn.{x}_proj.bias" for i in range(2) for x in "qkv"]
    with pytest.raises(ValueError, match="no layer of this Llama has a bias; use LoRA"):
        init_bias_only(tiny_llama())


def test_the_gradients_are_those_of_full_fine_tuning_to_the_bit():
    base = tiny_gpt("rope")
    whole, biases = base.trainable_copy(), init_bias_only(base)
    whole.loss(IDS, TARGETS).backward()
    attach(base, biases).loss(IDS, TARGETS).backward()
    full = dict(whole.named_parameters())
    for name, p in biases.named_parameters():
        assert np.array_equal(p.grad, full[name].grad) and p.grad.any() == full[name].grad.any()


def test_merged_it_computes_the_same_bits_and_shares_all_but_the_biases_with_the_base():
    base = tiny_gpt()
    biases = trained(base)
    model = attach(base, biases)
    merged = merge(model)
    assert np.array_equal(outputs(merged), outputs(model)) and not np.array_equal(outputs(merged), outputs(base))
    own = dict(base.named_parameters())
    for name, p in merged.named_parameters():
        assert (p.data is own[name].data) == (not name.endswith(".bias"))
    assert contents(biases) == {name: p.data.tobytes() for name, p in merged.named_parameters() if "bias" in name}


@pytest.mark.parametrize("bug", ["merges the old bias", "merges the trained array itself"])
def test_a_wrong_merge_is_noticed(monkeypatch, bug):
    base = tiny_gpt()
    if bug == "merges the old bias":
        own = dict(base.named_modules())
        first = own["h.0.attn.q_proj"]
        monkeypatch.setattr(Rebiased, "merged", lambda self: first)
        with pytest.raises((AssertionError, ValueError)):
            test_merged_it_computes_the_same_bits_and_shares_all_but_the_biases_with_the_base()
        return
    monkeypatch.setattr(Rebiased, "merged", lambda self: self.module)
    biases = trained(base)
    merged = merge(attach(base, biases))
    assert any(p is q for p in merged.parameters() for q in biases.parameters())


def test_a_bias_for_a_layer_without_one_is_refused():
    with_bias, without = tiny_llama(attention_bias=True), tiny_llama()
    with pytest.raises(ValueError, match=r"q_proj is adapted, but the base has Linear there, not a layer with a bias"):
        attach(without, init_bias_only(with_bias), check_base=False)
