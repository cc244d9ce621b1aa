"""Numbers and bytes, counted from arrays, against what the interpreter and a hand count say."""

import tracemalloc

import numpy as np
import pytest

from minilora import GPT, GPTConfig, LoRAConfig, Tensor, attach, init_adapter
from minilora.count import activation_bytes, parameter_report
from minilora.disk.characters import ALPHABET
from minilora.nn import Linear, Module


def test_the_report_counts_numbers_and_bytes_of_what_is_trainable_and_of_all():
    class Pair(Module):
        def __init__(self):
            self.trained = Linear.init(3, 2, np.random.default_rng(0), "float64")
            self.frozen = Linear.init(4, 2, np.random.default_rng(0), "float64").frozen()

    report = parameter_report(Pair())
    assert report == (6 + 2, 6 + 2 + 8 + 2, 8 * 8, 8 * 18)
    assert str(report).startswith("8 of 18 parameters")


def test_nothing_to_count_is_refused():
    with pytest.raises(ValueError, match="Module holds no tensors"):
        parameter_report(Module())


def lora_model(base, targets, rng):
    return attach(base, init_adapter(base, LoRAConfig(r=2, alpha=4, target_modules=targets), rng))


def test_the_counted_activations_are_what_the_forward_pass_leaves_allocated():
    rng = np.random.default_rng(0)
    base = GPT(GPTConfig(n_layer=2, n_head=4, n_embd=64, vocab_size=96, block_size=64), rng)
    ids = rng.integers(0, len(ALPHABET), (16, 64))  # enough for the graph's own objects not to count
    for model in (base, lora_model(base, ["q_proj", "v_proj"], rng), lora_model(base, "all-linear", rng)):
        model.loss(ids, ids)  # whatever is made only once
        tracemalloc.start()
        before, _ = tracemalloc.get_traced_memory()
        loss = model.loss(ids, ids)
        after, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert activation_bytes(loss, model) == pytest.approx(after - before, rel=0.01)


def test_lora_on_two_projections_holds_less_and_on_all_linears_hardly_less():
    rng = np.random.default_rng(0)
    base = GPT(GPTConfig(n_layer=3, n_head=4, n_embd=32, vocab_size=96, block_size=64), rng)
    ids = rng.integers(0, 96, (4, 32))
    full, few, every = (
        activation_bytes(model.loss(ids, ids), model)
        for model in (base, lora_model(base, ["q_proj", "v_proj"], rng), lora_model(base, "all-linear", rng))
    )
    assert few < 0.85 * full
    assert every > 0.95 * full


def test_activations_of_a_hand_counted_graph():
    class Square:
        def parameters(self):
            return []

    x = Tensor(np.ones(10), requires_grad=True)
    y = x * x * 2.0  # x*x keeps x twice (one array); *2 keeps a Python number
    assert activation_bytes(y.sum(), Square()) == x.data.nbytes
