"""The tree of named tensors: its names, and what each new tree made from it shares or copies. Knows no GPT, no LoRA."""

import math

import numpy as np
import pytest
from strategies import TinyMLP, contents, tiny_mlp

from minilora.backend import to_device
from minilora.nn import Embedding, LayerNorm, Linear, Module
from minilora.tensor import Tensor


class Tree(Module):
    """One of everything a tree can hold: Tensors, modules in lists, tuples and dicts, a shared Tensor, values."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.scale = Tensor(np.ones(2, "float32"), requires_grad=True)
        self.blocks = [Linear.init(2, 3, rng), Linear.init(3, 2, rng)]
        self.heads = {"a.b": Linear(self.blocks[0].weight), "none": None}
        self.bins = ([Tensor(np.zeros(1, "float32"))],)
        self.name, self.sizes = "tree", [2, 3]


NAMES = ["scale", "blocks.0.weight", "blocks.0.bias", "blocks.1.weight", "blocks.1.bias", "bins.0.0"]


def test_names_are_dotted_paths_and_a_shared_tensor_is_counted_once():
    tree = Tree()
    named = list(tree.named_parameters())
    assert sorted(name for name, _ in named) == sorted(NAMES)
    assert tree.parameters() == [p for _, p in named]
    assert len({id(p) for p in tree.parameters()}) == len(NAMES)


def test_modules_are_named_by_their_paths_the_root_by_the_empty_name():
    assert [name for name, _ in Tree().named_modules()] == ["", "blocks.0", "blocks.1", "heads.a.b"]


def test_rebuild_replaces_what_is_named_shares_the_rest_and_leaves_the_tree_alone():
    tree = Tree()
    before = contents(tree), vars(tree).copy(), list(tree.blocks), dict(tree.heads)
    seen, other = [], Linear.init(3, 2, np.random.default_rng(1))
    new = tree.rebuild(lambda name, child: seen.append(name) or (other if name == "blocks.1" else None))
    assert new.blocks[1] is other and new.blocks[0] is not tree.blocks[0] and type(new) is Tree
    assert new.scale is tree.scale and new.blocks[0].weight is tree.blocks[0].weight
    assert (new.name, new.sizes, new.heads["none"]) == ("tree", [2, 3], None)
    assert seen == ["", "scale", "blocks.0", "blocks.0.weight", "blocks.0.bias", "blocks.1", "heads.a.b",
                    "heads.a.b.weight", "bins.0.0"]
    assert (contents(tree), vars(tree), tree.blocks, tree.heads) == before


MADE = {
    "frozen": lambda tree: tree.frozen(),
    "trainable_copy": lambda tree: tree.trainable_copy(),
    "astype": lambda tree: tree.astype("float64"),
    "to_device": lambda tree: tree.to_device(np),
}


@pytest.mark.parametrize("make, shares, trainable, dtype", [
    ("frozen", True, [], "float32"),
    ("trainable_copy", False, NAMES, "float32"),
    ("astype", False, NAMES[:-1], "float64"),
    ("to_device", False, NAMES[:-1], "float32"),  # also where nothing has to move
])
def test_what_is_made_from_a_tree_shares_or_copies_as_it_says(make, shares, trainable, dtype):
    tree = Tree()
    before, flags = contents(tree), [p.requires_grad for p in tree.parameters()]
    new = MADE[make](tree)
    ours, theirs = dict(new.named_parameters()), dict(tree.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(np.shares_memory(ours[name].data, theirs[name].data) == shares for name in theirs)
    assert sorted(name for name, p in ours.items() if p.requires_grad) == sorted(trainable)
    assert all(p.dtype == dtype and np.array_equal(p.data, theirs[name].data) for name, p in ours.items())
    assert new.heads["a.b"].weight is new.blocks[0].weight  # what was shared is shared
    assert not any(p is q for p, q in zip(new.parameters(), tree.parameters(), strict=True))
    assert contents(tree) == before and [p.requires_grad for p in tree.parameters()] == flags


def test_a_trainable_copy_learns_without_its_original():
    tree = Tree()
    before = contents(tree)
    for p in tree.trainable_copy().parameters():
        p.data += 1
    assert contents(tree) == before


def test_a_tree_moves_to_a_device_and_back(device_xp):
    tree = Tree()
    there = tree.to_device(device_xp)
    assert all(isinstance(p.data, device_xp.ndarray) for p in there.parameters())
    assert contents(there) == contents(there.to_device(np)) == contents(tree)
    assert there.fingerprint() == tree.fingerprint()


def test_a_fingerprint_names_every_tensor_and_changes_with_any_value_or_shape_but_not_with_the_dtype():
    model = tiny_mlp(3, 4, 2)
    prints = model.fingerprint()
    assert prints.keys() == contents(model).keys() and all(len(p) == 16 and int(p, 16) >= 0 for p in prints.values())
    assert model.astype("float64").fingerprint() == model.frozen().fingerprint() == prints
    changed = model.rebuild(lambda name, t: Tensor(np.nextafter(t.data, 9)) if name == "layers.1.bias" else None)
    assert {name for name, p in changed.fingerprint().items() if p != prints[name]} == {"layers.1.bias"}
    flat = model.rebuild(lambda name, t: Tensor(t.data.reshape(-1, 2)) if name == "layers.1.weight" else None)
    assert flat.fingerprint()["layers.1.weight"] != prints["layers.1.weight"]


# --- a layer that wraps another ----------------------------------------------------------------------------------


class Doubled(Module):
    """A wrapper: twice what the wrapped layer computes."""

    transparent = ("inner",)

    def __init__(self, inner, gain):
        self.inner, self.gain = inner, gain

    def __call__(self, x, rng=None):
        return self.inner(x, rng) * self.gain


def wrapped():
    rng = np.random.default_rng(0)
    gain = Tensor(np.array(2.0, "float32"), requires_grad=True)
    return TinyMLP([Doubled(Linear.init(3, 4, rng), gain), Linear.init(4, 2, rng)])


def test_a_wrapped_layer_keeps_its_names_and_is_no_module_of_its_own():
    names = [name for name, _ in wrapped().named_parameters()]
    assert names == ["layers.0.weight", "layers.0.bias", "layers.0.gain", "layers.1.weight", "layers.1.bias"]
    kinds = {name: type(module) for name, module in wrapped().named_modules()}
    assert kinds == {"": TinyMLP, "layers.0": Doubled, "layers.1": Linear}


def test_rebuild_asks_for_the_wrapper_and_the_parts_of_what_it_wraps_but_not_for_that_itself():
    model, asked = wrapped(), []
    new = model.rebuild(lambda name, child: asked.append((name, type(child))))
    assert asked == [
        ("", TinyMLP), ("layers.0", Doubled), ("layers.0.weight", Tensor), ("layers.0.bias", Tensor),
        ("layers.0.gain", Tensor), ("layers.1", Linear), ("layers.1.weight", Tensor), ("layers.1.bias", Tensor),
    ]  # fmt: skip
    assert new.layers[0].inner is not model.layers[0].inner, "a new layer, over the same tensors"
    assert all(ours is theirs for ours, theirs in zip(new.parameters(), model.parameters(), strict=True))
    frozen = model.frozen()
    assert not any(p.requires_grad for p in frozen.parameters()) and contents(frozen) == contents(model)


def test_two_tensors_of_one_name_are_refused_where_one_would_be_lost():
    gain = lambda value: Tensor(np.array(value, "float32"))
    both = Doubled(Doubled(Linear.init(2, 2, np.random.default_rng(0)), gain(2.0)), gain(3.0))
    with pytest.raises(ValueError, match="two tensors are called gain"):
        both.state_dict()


# --- state -------------------------------------------------------------------------------------------------------


def test_a_state_dict_holds_the_arrays_themselves_by_the_names_of_the_parameters():
    tree = Tree()
    state = tree.state_dict()
    assert list(state) == [name for name, _ in tree.named_parameters()]
    assert all(state[name] is p.data for name, p in tree.named_parameters())


def test_a_loaded_state_is_written_into_the_modules_own_arrays(xp):
    model = tiny_mlp(3, 4, 2).to_device(xp)
    state = {name: p.data for name, p in tiny_mlp(3, 4, 2, seed=1).named_parameters()}
    arrays = model.state_dict()
    model.load_state_dict(state)
    assert contents(model) == contents(tiny_mlp(3, 4, 2, seed=1))
    assert all(model.state_dict()[name] is array for name, array in arrays.items())
    assert not any(np.shares_memory(to_device(arrays[name], np), state[name]) for name in state if xp is np)


@pytest.mark.parametrize("change, says", [
    (lambda state: state.pop("layers.0.bias"), ["layers.0.bias", "absent"]),
    (lambda state: state.update(more=np.zeros(2, "float32")), ["more", "absent"]),
    (lambda state: state.update({"layers.0.bias": np.zeros(3, "float32")}), ["layers.0.bias", "(3,)", "(4,)"]),
    (lambda state: state.update({"layers.0.bias": np.zeros(4)}), ["layers.0.bias", "float64", "float32"]),
], ids=["absent", "superfluous", "shape", "dtype"])  # fmt: skip
def test_a_state_that_does_not_fit_is_refused_with_both_sides_and_nothing_changes(change, says):
    model = tiny_mlp(3, 4, 2)
    before, state = contents(model), {name: a + 1 for name, a in model.state_dict().items()}
    change(state)
    with pytest.raises(ValueError) as caught:
        model.load_state_dict(state)
    assert all(part in str(caught.value) for part in says) and contents(model) == before


def test_a_state_is_not_loaded_into_frozen_tensors_whose_arrays_others_share():
    base = tiny_mlp(3, 4, 2)
    before = contents(base)
    with pytest.raises(ValueError, match=r"layers\.0\.weight is frozen.*trainable_copy"):
        base.frozen().load_state_dict({name: a + 1 for name, a in base.state_dict().items()})
    assert contents(base) == before


# --- the layers --------------------------------------------------------------------------------------------------


def test_a_new_linear_has_variance_one_over_its_inputs_and_no_bias():
    linear = Linear.init(400, 300, np.random.default_rng(0))
    assert linear.weight.shape == (300, 400) and linear.bias.shape == (300,)
    assert linear.weight.dtype == linear.bias.dtype == np.float32
    assert linear.weight.data.std() == pytest.approx(1 / math.sqrt(400), rel=0.02)
    assert not linear.bias.data.any() and linear.weight.requires_grad and linear.bias.requires_grad


def test_the_same_seed_draws_the_same_weights_in_any_dtype():
    first, second, exact = (tiny_mlp(3, 4, 2, dtype=dtype) for dtype in ("float32", "float32", "float64"))
    assert contents(first) == contents(second) == contents(exact.astype("float32"))
    assert contents(first) != contents(tiny_mlp(3, 4, 2, seed=1))


def test_layers_compute_their_formula_on_every_backend(xp):
    rng = np.random.default_rng(0)
    x, W, b, table = (rng.standard_normal(shape).astype("float32") for shape in ((2, 3, 4), (5, 4), (5,), (7, 4)))
    ids = np.array([[6, 0], [2, 2]])
    there = lambda a: Tensor(to_device(a, xp))
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    computed = [
        (Linear(there(W), there(b))(there(x)), x @ W.T + b),
        (Linear(there(W))(there(x)), x @ W.T),
        (Embedding(there(table))(ids), table[ids]),
        (LayerNorm(there(W[0]), there(W[1]))(there(x)), normed * W[0] + W[1]),
    ]
    for ours, expected in computed:
        assert isinstance(ours.data, xp.ndarray) and ours.dtype == np.float32
        assert np.allclose(to_device(ours.data, np), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weight, bias", [((3,), None), ((2, 3, 4), None), ((3, 4), (4,)), ((3, 4), (3, 1))])
def test_a_linear_of_shapes_that_do_not_fit_is_refused_with_both_shapes(weight, bias):
    tensors = [None if shape is None else Tensor(np.zeros(shape)) for shape in (weight, bias)]
    with pytest.raises(ValueError) as caught:
        Linear(*tensors)
    assert str(weight) in str(caught.value) and str(bias) in str(caught.value)


def test_an_input_of_another_width_is_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"x \(2, 5\) does not fit weight \(3, 4\)"):
        Linear(Tensor(np.zeros((3, 4))))(Tensor(np.zeros((2, 5))))
