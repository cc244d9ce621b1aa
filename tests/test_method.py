"""LoRA's relatives, all of them alike: made for a base, attached, trained, merged or not, and taken off again."""

import numpy as np
import pytest
from strategies import close, contents, nearly, tiny_gpt, tiny_llama, tiny_mlp

from minilora import (
    Adam,
    LoRAConfig,
    attach,
    generate,
    gradcheck,
    init_adapter,
    init_bias_only,
    init_bottleneck,
    init_dora,
    init_ia3,
    init_prefix,
    init_prompt,
    merge,
    widen,
)
from minilora.backend import get_array_module
from minilora.bottleneck import Bottleneck
from minilora.dora import DoRAPair
from minilora.graph import no_grad
from minilora.method import Method
from minilora.nn import Linear
from minilora.prefix import Prefix
from minilora.prompt import Prompt
from minilora.quant import quantize
from minilora.tensor import Tensor

IDS = np.array([[1, 2, 3, 4], [4, 0, 6, 6], [5, 5, 2, 1]])
TARGETS = np.array([[2, 3, 4, -100], [0, 6, 6, 1], [5, 2, 1, 0]])
LORA = LoRAConfig(2, 4, ["q_proj", "v_proj", "down_proj"])
METHODS = {
    "dora": lambda base, rng: init_dora(base, LORA, rng),
    "ia3": init_ia3,
    "bias_only": init_bias_only,
    "bottleneck": lambda base, rng: init_bottleneck(base, 3, rng),
    "prefix": lambda base, rng: init_prefix(base, 3, rng),
    "prompt": lambda base, rng: init_prompt(base, 3, rng),
}
BASES = {
    "gpt": lambda dtype="float64", **changes: tiny_gpt("learned", dtype=dtype, **changes),
    "rotary gpt": lambda dtype="float64", **changes: tiny_gpt("rope", dtype=dtype, **changes),
    # Queries in groups; as drawn, most of the family has no bias.
    "llama": lambda dtype="float64", **changes: tiny_llama(dtype=dtype, attention_bias=True, **changes),
}
# One layer, in which every number can be moved on its own in a short time.
SMALLEST = {"gpt": {"n_layer": 1, "n_embd": 4},
            "llama": {"num_hidden_layers": 1, "hidden_size": 6, "intermediate_size": 5, "head_dim": 2}}  # fmt: skip
MERGEABLE = ("dora", "ia3", "bias_only")
STARTS_AS_THE_BASE = (*MERGEABLE, "bottleneck")
every_method = pytest.mark.parametrize("method", METHODS)
every_base = pytest.mark.parametrize("base", BASES)


def new(method, base, seed=0):
    return METHODS[method](base, np.random.default_rng(seed))


def learned(adapter, seed=1, size=0.3):
    """`adapter` with random numbers added to all that it learns."""
    rng = np.random.default_rng(seed)
    for p in adapter.parameters():
        p.data += get_array_module(p.data).asarray((size * rng.standard_normal(p.shape)).astype(p.dtype))
    return adapter


def outputs(model, ids=IDS):
    with no_grad():
        return model(ids).data


@every_base
@pytest.mark.parametrize("method", STARTS_AS_THE_BASE)
def test_a_new_one_changes_no_bit_of_any_logit(method, base):
    for dtype in ("float32", "float64"):
        plain = BASES[base](dtype)
        adapter = new(method, plain)
        model = attach(plain, adapter)
        assert np.array_equal(outputs(model), outputs(plain))
        assert not np.array_equal(outputs(attach(plain, learned(adapter))), outputs(plain))


@every_base
@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_no_prefix_and_no_prompt_starts_as_the_base(method, base):
    plain = BASES[base]()
    assert np.abs(outputs(attach(plain, new(method, plain))) - outputs(plain)).max() > 0.01


def gradients_are_right(method, base, monkeypatch):
    """Of the loss of a whole model, with respect to everything that is learned, in float64."""
    plain = BASES[base](**SMALLEST[base])
    adapter = learned(new(method, plain))
    model = attach(plain, adapter)
    # In DoRA the norm of a row is a constant for the backward, and so here: test_dora.py says more.
    norms = {}
    for name, pair in getattr(adapter, "pairs", {}).items():
        weight = dict(plain.named_modules())[name].weight.data
        norms[id(weight)] = pair.row_norms(weight)
    monkeypatch.setattr(DoRAPair, "row_norms", lambda self, weight: norms[id(weight)])
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]

    def loss(*leaves):
        stands_for = {name: leaf for (name, _), leaf in zip(named, leaves, strict=True)}
        return model.rebuild(lambda name, _: stands_for.get(name)).loss(IDS[:2], TARGETS[:2])

    report = gradcheck(loss, *(p for _, p in named))
    assert report.compared == sum(p.size for p in adapter.parameters()) > 0


@pytest.mark.parametrize("base", ["gpt", "llama"])
@every_method
def test_all_gradients_are_right_through_a_whole_model(method, base, monkeypatch):
    gradients_are_right(method, base, monkeypatch)


@every_base
@every_method
def test_what_is_learned_has_the_names_that_the_adapted_model_gives_it(method, base):
    plain = BASES[base]()
    adapter = new(method, plain)
    in_model = dict(attach(plain, adapter).named_parameters())
    assert {name: id(p) for name, p in adapter.named_parameters()} == {
        name: id(p) for name, p in in_model.items() if p.requires_grad}  # fmt: skip
    own = {name for name, _ in plain.named_parameters()}
    assert own <= in_model.keys() and len(adapter.parameters()) > 0


@every_base
@every_method
def test_training_changes_what_is_learned_and_no_bit_of_the_base(method, base):
    plain = BASES[base]("float32")
    before, logits = contents(plain), outputs(plain)
    adapter = new(method, plain)
    start = contents(adapter)
    model = attach(plain, adapter)
    adam = Adam(adapter.parameters(), lr=0.03)
    losses = []
    for _ in range(12):
        adam.zero_grad()
        loss = model.loss(IDS, TARGETS)
        losses.append(loss.item())
        loss.backward()
        adam.step()
    assert losses[-1] < 0.97 * losses[0]
    assert contents(plain) == before and np.array_equal(outputs(plain), logits)
    assert all(p.grad is None for p in plain.parameters())
    assert start != contents(adapter)


@every_base
@pytest.mark.parametrize("method", MERGEABLE)
def test_merged_it_computes_the_same_and_carries_nothing(method, base):
    plain = BASES[base]()
    before = contents(plain)
    adapter = learned(new(method, plain))
    model = attach(plain, adapter)
    kept = contents(adapter)
    merged = merge(model)
    assert close(outputs(merged), outputs(model)) and not close(outputs(merged), outputs(plain))
    assert [n for n, _ in merged.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert not any(p.requires_grad for p in merged.parameters())
    # Nothing is shared with what is learned.
    logits = outputs(merged)
    learned(adapter, seed=5)
    assert np.array_equal(outputs(merged), logits) and contents(plain) == before and contents(adapter) != kept


@pytest.mark.parametrize("method, reason", [
    ("bottleneck", "merge: a bottleneck has a gelu between its two layers, so no weight"),
    ("prefix", "merge: a prefix gives attention further keys and values, mixed in by a softmax, so no weight"),
    ("prompt", "merge: a prompt is tokens before the text, and no weight"),
])  # fmt: skip
def test_what_is_no_change_of_weights_is_not_merged_and_says_why(method, reason):
    base = tiny_gpt()
    with pytest.raises(ValueError, match=f"^{reason}.*keep the base and the {method} apart"):
        merge(attach(base, new(method, base)))


@pytest.mark.parametrize("method", MERGEABLE)
def test_a_merge_that_is_not_finite_is_refused(method):
    base = tiny_gpt()
    adapter = new(method, base)
    adapter.parameters()[-1].data[0] = np.nan
    with pytest.raises(ValueError, match=r"merge: the merged (weight|bias) of h\.1.*|merge.*ln_f.* is not finite"):
        merge(attach(base, adapter))


@every_base
@every_method
def test_a_prompt_that_is_filled_up_on_the_left_is_read_as_it_is_alone(method, base):
    """Also when it goes on, through the cache."""
    plain = BASES[base]()
    model = attach(plain, learned(new(method, plain)))
    padded = np.array([[0, 0, 1], [2, 6, 3], [0, 4, 5]])
    cache = model.new_cache(4, np.array([2, 0, 1]))
    with no_grad():
        last = [model(ids, cache=cache).data[:, -1] for ids in (padded, np.array([[6], [1], [2]]))]
    for row, prompt in enumerate([[1, 6], [2, 6, 3, 1], [4, 5, 2]]):
        alone = outputs(model, np.array([prompt]))[0]
        assert close(last[0][row], alone[-2]) and close(last[1][row], alone[-1])


@every_method
def test_texts_from_prompts_of_several_lengths_are_those_of_each_alone(method):
    plain = tiny_llama(attention_bias=True)
    model = attach(plain, learned(new(method, plain)))
    prompts = [np.array([1]), np.array([2, 6, 3]), np.array([4, 5])]
    for prompt, text in zip(prompts, generate(model, prompts, 3), strict=True):
        assert np.array_equal(text, generate(model, prompt[None], 3)[0])


@every_base
@every_method
def test_read_in_pieces_through_a_cache_the_logits_are_the_same(method, base):
    plain = BASES[base]()
    model = attach(plain, learned(new(method, plain)))
    cache = model.new_cache(4)
    with no_grad():
        pieces = [model(IDS[:, :1], cache=cache).data, model(IDS[:, 1:3], cache=cache).data,
                  model(IDS[:, 3:], cache=cache).data]  # fmt: skip
    assert close(np.concatenate(pieces, axis=1), outputs(model))


@pytest.mark.parametrize("base", ["gpt", "llama"])
@every_method
def test_every_backend_computes_what_numpy_does(method, base, xp):
    results = {}
    for module in (np, xp):
        plain = BASES[base]("float32").to_device(module)
        adapter = learned(new(method, plain))
        model = attach(plain, adapter)
        model.loss(IDS, TARGETS).backward()
        gradients = [p.grad for p in adapter.parameters()]
        arrays = [outputs(model), *gradients]
        if method in MERGEABLE:
            arrays.append(outputs(merge(model)))
        results[module] = arrays, generate(model, [[1], [2, 3]], 2)
    (ours, our_text), (numpys, numpy_text) = results[xp], results[np]
    assert all(isinstance(a, xp.ndarray) for a in ours)
    assert all(nearly(a, b) for a, b in zip(ours, numpys, strict=True))
    assert all(map(np.array_equal, our_text, numpy_text))


@every_method
def test_a_base_of_4_bits_is_as_good_as_its_widened_twin(method):
    packed = quantize(tiny_gpt(dtype="float32", n_embd=32, n_inner=64), "q4_0")
    wide = widen(packed)
    logits = []
    for base in (packed, wide):
        adapter = learned(new(method, base))
        model = attach(base, adapter)
        logits.append(outputs(model))
        if method in MERGEABLE:
            assert np.abs(outputs(merge(model)) - logits[-1]).max() < 1e-4 * np.abs(logits[-1]).max()
    assert np.array_equal(*logits)


# What is refused.


@every_method
def test_it_is_refused_on_another_base_and_on_one_that_carries_something(method):
    base = tiny_gpt(seed=0)
    adapter = new(method, base)
    with pytest.raises(ValueError, match=r"made for \w{16}, this base has \w{16}"):
        attach(tiny_gpt(seed=1), adapter)
    with pytest.raises(ValueError, match="already carries|absent"):
        attach(attach(base, adapter), adapter)
    for carried in (adapter, init_adapter(base, LORA, np.random.default_rng(0))):
        with pytest.raises(ValueError, match=f"init_{method if method != 'dora' else 'adapter'}: .* already carries"):
            new(method, attach(base, carried))


@every_method
def test_it_is_refused_on_a_base_of_other_shapes_also_unchecked(method):
    small, large = tiny_gpt(), tiny_gpt(n_embd=12, n_head=2)
    adapter = new(method, small)
    before = contents(large)
    with pytest.raises(ValueError, match=r"h\.0\S*: .*8|ln_1: bias \(12,\), but \(8,\)|the model: 12 channels"):
        attach(large, adapter, check_base=False)
    with pytest.raises(ValueError, match="the base has nothing there|not a decoder"):
        attach(tiny_mlp(8, 8), adapter, check_base=False)
    assert contents(large) == before


@every_method
@pytest.mark.parametrize("carried", ["lora", "ia3", "bias_only"])
def test_it_is_refused_beside_or_around_a_layer_that_carries_something_also_unchecked(method, carried):
    base = tiny_gpt()
    other = init_ia3(base) if carried == "ia3" else init_bias_only(base)
    if carried == "lora":
        other = init_adapter(base, LoRAConfig(2, 4, "all-linear"), np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"h\.0\.\S* already carries an adapter; merge first"):
        attach(attach(base, other), new(method, base), check_base=False)


def tensor(*shape):
    return Tensor(np.ones(shape), requires_grad=True)


@pytest.mark.parametrize("name, part, says", [
    ("h.0.mlp", Bottleneck(Linear(tensor(3, 8)), Linear(tensor(1, 3))), r"8 channels.*\(3, 8\).*\(1, 3\)"),
    ("h.0.mlp", Bottleneck(Linear(tensor(3, 8)), Linear(tensor(8, 4))), r"8 channels.*\(3, 8\).*\(8, 4\)"),
    ("", Prompt(tensor(8)), r"8 channels.*prompt_embeddings \(8,\)"),
    ("", Prompt(tensor(1, 2, 8)), r"prompt_embeddings \(1, 2, 8\)"),
    ("", Prompt(tensor()), r"prompt_embeddings \(\)"),
    ("", Prompt(tensor(0, 8)), r"prompt_embeddings \(0, 8\)"),
    ("h.0.attn", Prefix(tensor(), tensor()), r"8 channels.*prefix_keys \(\)"),
    ("h.0.attn", Prefix(tensor(8), tensor(8)), r"prefix_keys \(8,\)"),
    ("h.0.attn", Prefix(tensor(0, 8), tensor(0, 8)), r"prefix_keys \(0, 8\)"),
    ("h.0.attn", Prefix(tensor(2, 8), tensor(1, 8)), r"prefix_keys \(2, 8\) and prefix_values \(1, 8\)"),
])  # fmt: skip
def test_a_part_whose_shapes_would_broadcast_or_fail_later_is_refused(name, part, says):
    with pytest.raises(ValueError, match=says):
        attach(tiny_gpt(), Method({name: part}, None))


def test_a_method_of_no_parts_is_refused():
    with pytest.raises(ValueError, match="Method: no parts"):
        Method({}, None)


@every_method
def test_another_dtype_is_refused_and_both_converted_are_not(method):
    base = tiny_gpt(dtype="float32")
    adapter = learned(new(method, base))
    with pytest.raises(TypeError, match="mixes float32 and float64"):
        attach(base.astype("float64"), adapter)
    exact = outputs(attach(base.astype("float64"), adapter.astype("float64")))
    assert exact.dtype == np.float64 and np.abs(exact - outputs(attach(base, adapter))).max() < 1e-4


@pytest.mark.parametrize("method", [name for name in METHODS if name != "dora"])
def test_a_model_without_the_modules_that_are_needed_is_refused(method):
    model = tiny_llama() if method == "bias_only" else tiny_mlp(4, 4)
    with pytest.raises(ValueError, match=rf"init_{method}: .*(TinyMLP has no|no layer of this Llama has a bias)"):
        new(method, model)


@pytest.mark.parametrize("init, name", [(init_bottleneck, "n_inner"), (init_prefix, "length"), (init_prompt, "length")])
@pytest.mark.parametrize("n", [0, -1, 1.5, True, "3"])
def test_a_size_that_is_no_whole_number_is_refused(init, name, n):
    with pytest.raises(ValueError, match=f"{init.__name__}: {name} must be a whole number of at least 1, got {n!r}"):
        init(tiny_gpt(), n, np.random.default_rng(0))


@every_method
def test_randomness_is_passed_in_and_a_seed_gives_the_same_numbers(method):
    base = tiny_gpt()
    assert contents(new(method, base, seed=3)) == contents(new(method, base, seed=3))
    with pytest.raises(TypeError, match="numpy.random.Generator"):
        METHODS[method](base, 0)


# Planted bugs, each of which a test above must notice.



def test_a_method_whose_parts_share_the_bases_arrays_is_noticed(monkeypatch):
    """A copy that is none: training would write the base."""
    from minilora import bias_only

    tensor = bias_only.Tensor
    real = init_bias_only

    def sharing(base, rng=None):
        made = real(base, rng)
        modules = dict(base.named_modules())
        parts = {name: bias_only.Bias(tensor(modules[name].bias.data, requires_grad=True)) for name in made.parts}
        return Method(parts, made.base_fingerprint)

    monkeypatch.setitem(METHODS, "bias_only", sharing)
    with pytest.raises(AssertionError):
        test_training_changes_what_is_learned_and_no_bit_of_the_base("bias_only", "gpt")


def test_a_wrong_gradient_is_noticed(monkeypatch):
    from minilora import prefix

    def without_a_gradient(vectors, B):
        right = prefix.Tensor(np.zeros((B, 1, 1))) + vectors
        return prefix.Tensor(right.data.copy()) + right * 0.0

    monkeypatch.setattr(prefix, "for_each_row", without_a_gradient)
    with pytest.raises(Exception, match="gradient"):
        gradients_are_right("prefix", "gpt", monkeypatch)
