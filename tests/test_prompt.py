"""Prompt tuning: learned vectors are read as tokens are, and outputs come for the real tokens alone."""

import numpy as np
import pytest
from strategies import close, tiny_gpt, tiny_llama

from minilora import Adam, attach, generate, init_prompt
from minilora import prompt as prompt_module
from minilora.graph import no_grad
from minilora.prompt import PromptedDecoder

IDS = np.array([[1, 2, 3], [4, 0, 6]])
BASES = {"gpt": tiny_gpt, "rotary gpt": lambda: tiny_gpt("rope"), "llama": tiny_llama,
         "untied gpt": lambda: tiny_gpt(tie_word_embeddings=False)}  # fmt: skip
every_base = pytest.mark.parametrize("base", BASES)


def outputs(model, ids=IDS):
    with no_grad():
        return model(ids).data


def new(base, length=3, seed=0):
    return init_prompt(base, length, np.random.default_rng(seed))


def with_the_text_before(base, ids=IDS, length=3, seed=0):
    """`ids` after the tokens that `new` draws."""
    before = np.random.default_rng(seed).integers(0, base.config.vocab_size, (1, length))
    return np.concatenate([np.repeat(before, len(ids), axis=0), ids], axis=1)


@every_base
def test_a_new_one_is_the_text_whose_embeddings_it_has(base):
    base = BASES[base]()
    expected = outputs(base, with_the_text_before(base))[:, 3:]
    assert close(outputs(attach(base, new(base))), expected)
    assert not close(expected, outputs(base))


@every_base
def test_and_so_it_writes_what_the_base_writes_after_that_text(base):
    base = BASES[base]()
    written = generate(base, with_the_text_before(base), 2)
    assert np.array_equal(generate(attach(base, new(base)), IDS, 2), written[:, 3:])


def test_the_loss_is_over_the_real_tokens():
    base = tiny_gpt()
    model = attach(base, new(base))
    targets = np.array([[2, 3, -100], [0, 6, 6]])
    far = np.full((2, 3), -100)
    expected = base.loss(with_the_text_before(base), np.concatenate([far, targets], axis=1)).item()
    assert abs(model.loss(IDS, targets).item() - expected) < 1e-13


@every_base
def test_the_context_is_shorter_by_the_prompt_and_the_rest_of_the_configuration_is_the_same(base):
    base = BASES[base]()
    model = attach(base, new(base))
    n = base.config.block_size - 3
    assert model.config.block_size == n
    ours, theirs = vars(model.config), vars(base.config)
    assert {key for key in ours if ours[key] != theirs[key]} <= {"block_size", "max_position_embeddings"}
    assert outputs(model, np.zeros((1, n), int)).shape[1] == n
    with pytest.raises(ValueError, match="positions do not fit"):
        model(np.zeros((1, n + 1), int))
    with pytest.raises(ValueError, match=f"do not fit in a context of {n}"):
        generate(model, np.zeros((1, n), int), 1)
    assert generate(model, np.zeros((1, n - 2), int), 2).shape == (1, n)


def test_it_is_one_vector_for_each_place_called_as_peft_calls_it():
    base = tiny_llama()
    assert {name: p.shape for name, p in new(base).named_parameters()} == {"prompt_embeddings": (3, 12)}
    names = [name for name, _ in attach(base, new(base)).named_parameters()]
    assert set(names) == {"prompt_embeddings", *(name for name, _ in base.named_parameters())}


def test_what_is_trained_is_a_copy_of_the_embeddings():
    base = tiny_gpt(dtype="float32")
    prompt = new(base)
    before = base.wte.weight.data.copy()
    attach(base, prompt).loss(IDS[:, :-1], IDS[:, 1:]).backward()
    Adam(prompt.parameters(), lr=1.0).step()
    assert np.array_equal(base.wte.weight.data, before)


@pytest.mark.parametrize("length", [8, 9])
def test_a_prompt_that_fills_the_context_is_refused(length):
    with pytest.raises(ValueError, match=rf"init_prompt: {length} vectors fill a context of 8 \(block_size\)"):
        new(tiny_gpt(), length)


# Planted bugs.


def after_the_text(self, ids, cache=None, rng=None):
    P = self.n_vectors
    ids, positions = self.model.checked(ids, cache, n_before=P)
    x = self.model.embedded(ids)
    vectors = prompt_module.for_each_row(self.prompt.prompt_embeddings, len(ids))
    return self.model.states(prompt_module.concatenate([x, vectors], axis=1), positions, cache, rng)[:, P:]


def with_positions_from_zero(self, ids, cache=None, rng=None):
    P = self.n_vectors
    ids, positions = self.model.checked(ids, cache, n_before=P)
    x = self.model.embedded(ids)
    vectors = prompt_module.for_each_row(self.prompt.prompt_embeddings, len(ids))
    x = prompt_module.concatenate([vectors, x], axis=1)
    return self.model.states(x, np.maximum(positions - P, 0), cache, rng)[:, P:]


@pytest.mark.parametrize("bug", [after_the_text, with_positions_from_zero])
@pytest.mark.parametrize("base", ["gpt", "llama"])
def test_planted_bugs_are_noticed(monkeypatch, bug, base):
    monkeypatch.setattr(PromptedDecoder, "hidden", bug)
    with pytest.raises(AssertionError):
        test_a_new_one_is_the_text_whose_embeddings_it_has(base)


@pytest.mark.parametrize("base", ["gpt", "llama"])
def test_vectors_before_the_padding_are_noticed(monkeypatch, base):
    """A row that was filled up on the left would read its padding after the prompt."""
    from test_method import test_a_prompt_that_is_filled_up_on_the_left_is_read_as_it_is_alone as property_

    def as_they_come(starts, n_vectors, n_columns, xp):
        return np.arange(len(starts))[:, None], np.arange(n_columns)[None]

    monkeypatch.setattr(prompt_module, "_padding_first", as_they_come)
    with pytest.raises(AssertionError):
        property_("prompt", base)


def test_a_row_begins_with_its_padding_then_come_the_vectors_and_then_the_text():
    rows, columns = prompt_module._padding_first(np.array([0, 2, 3]), 2, 6, np)
    assert rows.shape == (3, 1)
    assert columns.tolist() == [[0, 1, 2, 3, 4, 5], [2, 3, 0, 1, 4, 5], [2, 3, 4, 0, 1, 5]]
