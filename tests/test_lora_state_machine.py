"""Adapters made, attached, trained, stacked, merged, dropped and kept in any order: the base never moves."""

import copy

import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule, run_state_machine_as_test
from strategies import contents, tiny_mlp

from minilora.graph import no_grad
from minilora.lora import Adapter, LoRALinear, LoRAPair, attach, init_adapter, merge
from minilora.lora_config import LoRAConfig
from minilora.nn import Linear, Module
from minilora.optim import Adam
from minilora.stack import stack
from minilora.tensor import Tensor

X = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)  # two rows: a stack has one adapter for each


def outputs(model):
    with no_grad():
        return model(Tensor(X)).data.tobytes()


class Adapters(RuleBasedStateMachine):
    """One base; adapters come and go on it. What each adapter holds changes only when it is itself trained."""

    adapters, attached, kept = (Bundle(name) for name in ("adapters", "attached", "kept"))

    def __init__(self):
        super().__init__()
        self.base = tiny_mlp(4, 5, 3)
        self.base_before = contents(self.base), outputs(self.base), [id(p) for p in self.base.parameters()]
        self.held = {}  # adapter -> its contents when last it was made or trained
        self.merges = []  # (a merged model, its outputs then)

    @rule(target=adapters, r=st.integers(1, 3), seed=st.integers(0, 9), rslora=st.booleans(),
          names=st.sampled_from(["all-linear", ("0",), ("layers.1",)]))
    def make(self, r, seed, rslora, names):
        adapter = init_adapter(self.base, LoRAConfig(r, 4, names, use_rslora=rslora), np.random.default_rng(seed))
        assert outputs(attach(self.base, adapter)) == self.base_before[1]
        self.held[adapter] = contents(adapter)
        return adapter

    @rule(target=attached, adapter=adapters)
    def attach_one(self, adapter):
        return attach(self.base, adapter), [adapter]

    @rule(target=attached, one=adapters, other=st.none() | adapters, swapped=st.booleans())
    def attach_stack(self, one, other, swapped):
        rows = [other, one] if swapped else [one, other]
        return attach(self.base, stack(rows)), rows

    @rule(pair=attached, lr=st.sampled_from([0.01, 1.0]))
    def train(self, pair, lr):
        model, rows = pair
        y = model(Tensor(X))
        (y * y).mean().backward()
        adam = Adam(model.parameters(), lr=lr)
        adam.step()
        adam.zero_grad()
        for adapter in {a for a in rows if a is not None}:
            assert contents(adapter) != self.held[adapter]  # training does something
            self.held[adapter] = contents(adapter)

    @rule(pair=attached)
    def merge_it(self, pair):
        model, rows = pair
        if len(rows) == 1:
            plain = merge(model)
            self.merges.append((plain, outputs(plain)))
        else:
            with pytest.raises(ValueError, match="rows"):
                merge(model)

    @rule(pair=consumes(attached))
    def drop(self, pair):
        del pair

    @rule(target=kept, adapter=adapters)
    def keep_in_memory(self, adapter):
        copies = {
            name: (pair.lora_A.data.copy(), pair.lora_B.data.copy(), pair.scaling)
            for name, pair in adapter.pairs.items()
        }
        return adapter, copies, outputs(attach(self.base, adapter))

    @rule(target=adapters, memory=kept)
    def recall(self, memory):
        adapter, copies, then = memory
        pairs = {
            name: LoRAPair(Tensor(A.copy(), True), Tensor(B.copy(), True), scaling)
            for name, (A, B, scaling) in copies.items()
        }
        again = Adapter(adapter.config, pairs, adapter.base_fingerprint)
        assert outputs(attach(self.base, again)) == then
        self.held[again] = contents(again)
        return again

    @invariant()
    def the_base_is_what_it_was(self):
        assert (contents(self.base), outputs(self.base), [id(p) for p in self.base.parameters()]) == self.base_before
        assert all(p.requires_grad and p.grad is None for p in self.base.parameters())

    @invariant()
    def an_adapter_changes_only_when_it_is_trained(self):
        assert all(contents(adapter) == held for adapter, held in self.held.items())

    @invariant()
    def a_merged_model_stays_what_it_was(self):
        assert all(outputs(plain) == then for plain, then in self.merges)


quick = settings(max_examples=60, stateful_step_count=15)
TestAdapters = Adapters.TestCase
TestAdapters.settings = quick


# --- bugs that the machine must find -----------------------------------------------------------------------------


def merge_in_place(self):
    """Writes W."""
    W = self.linear.weight.data
    W += self.pair.delta()
    return Linear(Tensor(W), self.linear.bias)


def merge_with_what_it_will_learn(self):
    """Keeps the adapter beside the weight instead of adding it: a plain layer that follows what the pair learns."""
    plain = copy.copy(self.linear)
    plain.__class__ = type("Following", (Linear,), {"__call__": lambda plain, x, rng=None: self(x)})
    return plain


def share_A(self, A, B, scaling):
    """Gives every pair of one shape the A of the first."""
    self.lora_A, self.lora_B, self.scaling = first_A.setdefault(A.shape, A), B, scaling


first_A = {}


PLANTED = {
    "a merge that writes W in place": (LoRALinear, "merged", merge_in_place),
    "a merge that goes on following the adapter": (LoRALinear, "merged", merge_with_what_it_will_learn),
    "an attach that leaves the base trainable": (Module, "frozen", lambda self: self),
    "adapters that share their A": (LoRAPair, "__init__", share_A),
}


@pytest.mark.parametrize("owner, name, bug", PLANTED.values(), ids=PLANTED)
def test_the_machine_finds_a_planted_bug(monkeypatch, owner, name, bug):
    monkeypatch.setattr(owner, name, bug)
    hunting = settings(max_examples=200, stateful_step_count=20, phases=[Phase.generate], database=None,
                       derandomize=True, print_blob=False)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(Adapters, settings=hunting)
