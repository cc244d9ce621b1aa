"""kernels.py: on every backend the same sums, within derived bounds; and how many calls a step asks of a device.

A sum of n products, in any order, is off by at most γ_n Σ |products|, γ_n = n u / (1 - n u) (Higham 2002, eq. 3.13).
"""

import functools
import inspect
import sys

import numpy as np
import pytest
import strict_array
from strategies import tiny_gpt, tiny_llama
from test_lean import is_within_the_bounds, plant

import minilora.gpt
import minilora.nn
import minilora.optim
import minilora.training.loop
from minilora import GPT, Adam, GPTConfig, LoRAConfig, Tensor, attach, init_adapter, kernels, lean
from minilora.backend import to_device, to_numpy
from minilora.optim import clip_grad_norm
from minilora.packed import StoredTensor
from minilora.training.loop import train

U = 2.0**-24
gamma = lambda n: n * U / (1 - n * U)
SUMS = {  # name: (ours, of two arrays; the sum in float64; how many numbers are summed)
    "row_sum": (lambda a, b: kernels.row_sum(a), lambda a, b: a.sum(-1, keepdims=True), -1),
    "row_mean": (lambda a, b: kernels.row_mean(a), lambda a, b: a.mean(-1, keepdims=True), -1),
    "column_sum": (lambda a, b: kernels.column_sum(a), lambda a, b: a.sum(-2, keepdims=True), -2),
    "row_dot": (kernels.row_dot, lambda a, b: (a * b).sum(-1, keepdims=True), -1),
    "row_mean_dot": (kernels.row_mean_dot, lambda a, b: (a * b).mean(-1, keepdims=True), -1),
    "sum_of_squares": (lambda a, b: kernels.sum_of_squares([a, b]), lambda a, b: (a * a).sum() + (b * b).sum(), None),
}


def sums_are_right(name, xp, shape):
    """Ours in float32 on the backend, against float64."""
    ours, exact, axis = SUMS[name]
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    n = 2 * a.size if axis is None else shape[axis]
    found = to_numpy(ours(to_device(a, xp), to_device(b, xp)))
    wide = a.astype(np.float64), b.astype(np.float64)
    limit = gamma(n + 2) * exact(*map(abs, wide))
    assert found.dtype == np.float32 and found.shape == exact(*wide).shape
    return bool(np.all(abs(found - exact(*wide)) <= limit))


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 40), (1, 1), (2, 2, 9, 65)])
def test_a_sum_is_right_on_every_backend(name, shape, xp):
    assert sums_are_right(name, xp, shape)


@pytest.mark.parametrize("name, bug", [
    ("row_sum", lambda a, b: kernels.row_sum(a[..., :-1])), ("row_mean", lambda a, b: kernels.row_sum(a)),
    ("column_sum", lambda a, b: kernels.column_sum(a) * 1.001), ("row_dot", lambda a, b: kernels.row_dot(a, a)),
    ("row_mean_dot", kernels.row_dot), ("sum_of_squares", lambda a, b: kernels.sum_of_squares([a, a])),
])  # fmt: skip
def test_a_planted_bug_in_a_sum_is_found(name, bug, monkeypatch):
    monkeypatch.setitem(SUMS, name, (bug, *SUMS[name][1:]))
    assert not sums_are_right(name, np, (5, 7))


LAYOUTS = {"rows": lambda w: w, "columns": lambda w: np.asfortranarray(w), "every other row": lambda w: w[::2]}


def times_rows_is_right(xp, n, layout, dtype, times_rows=None):
    """x wᵀ within γ_in Σ |x w|, whatever the layout of w, and however few of its numbers are a large weight."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((n, 30)).astype(dtype)
    w = LAYOUTS[layout](rng.standard_normal((26, 30)).astype(dtype))
    found = to_numpy((times_rows or kernels.times_rows)(to_device(x, xp), to_device(w, xp)))
    wide_x, wide_w = x.astype(np.float64), w.astype(np.float64)
    assert found.dtype == dtype and found.shape == (n, len(w))
    return bool(np.all(abs(found - wide_x @ wide_w.T) <= gamma(31) * (abs(wide_x) @ abs(wide_w).T)))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n", [0, 1, 2])
@pytest.mark.parametrize("large", [1, 26 * 30, 1 << 20])
def test_a_row_times_the_rows_of_a_weight_is_their_product(n, layout, dtype, large, xp, monkeypatch):
    monkeypatch.setattr(kernels, "DOT_SIZE", large)
    assert times_rows_is_right(xp, n, layout, dtype)


def test_a_product_with_the_columns_or_of_the_last_row_is_found(monkeypatch):
    monkeypatch.setattr(kernels, "DOT_SIZE", 1)
    bugs = [lambda x, w: np.vecdot(x, w[::-1])[None], lambda x, w: x[-1:] @ np.roll(w, 1, axis=1).T]
    assert not any(times_rows_is_right(np, 1, "rows", "float32", bug) for bug in bugs)


def test_tensors_of_several_dtypes_have_one_sum_of_squares(xp):
    arrays = [to_device(np.full(n, 2.0, dtype), xp) for n, dtype in ((3, "float32"), (4, "float64"))]
    assert float(kernels.sum_of_squares(arrays)) == 28
    assert float(kernels.sum_of_squares([])) == 0


def test_a_block_is_small_on_the_host_and_as_long_as_memory_allows_on_a_device(device_xp):
    assert kernels.block_length(np, 64, 1000) == 64
    assert kernels.block_length(device_xp, 64, 1 << 20) == 512
    # One row there has to be.
    assert kernels.block_length(device_xp, 64, 1 << 40) == 1


@pytest.mark.parametrize("queries", [1, 7, 64])
def test_attention_on_a_device_may_be_cut_into_blocks_of_any_size(queries, device_xp, monkeypatch):
    monkeypatch.setattr(lean, "MOST_QUERIES", queries)
    is_within_the_bounds("attention, 150 queries, 150 keys", "float32", xp=device_xp)


def test_the_loss_on_a_device_may_be_cut_into_blocks_of_any_size(device_xp, monkeypatch):
    # 50 logits of 4 bytes in a row: two rows at a time.
    monkeypatch.setattr(kernels, "GPU_BLOCK_BYTES", 400)
    is_within_the_bounds("loss", "float32", xp=device_xp)


# --- what only a GPU has: kernels -------------------------------------------------------------------------------------

KERNELS = {  # what is wrong: (case of test_lean.py, or None for Adam; the kernel; its text, the text with the bug)
    "gelu, other constant": ("gelu", "gelu_kernel", "0.044715", "0.0447"),
    "gelu, wrong derivative": ("gelu", "gelu_kernel", "T(6) * c", "T(5.999) * c"),
    "swiglu, sigmoid of half": ("swiglu", "swiglu_kernel", "tanh(g * T(0.5))", "tanh(g)"),
    "swiglu, wrong derivative": ("swiglu", "swiglu_kernel", "dup * (T(1) - s)", "dup * s"),
    "Adam without a square": (None, "adam_kernel", "(g * g - v)", "(g - v)"),
    "Adam without decay": (None, "adam_kernel", "w *= decay;", ""),
}


def adam_steps(xp):
    """What three steps leave behind."""
    rng = np.random.default_rng(1)
    p = Tensor(to_device(rng.standard_normal((37, 11)), xp), requires_grad=True)
    adam = Adam([p], lr=0.01, weight_decay=0.1)
    for _ in range(3):
        p.grad = to_device(rng.standard_normal(p.shape), xp)
        adam.step()
    return [to_numpy(a) for a in (p.data, adam.m[0], adam.v[0])]


def check_kernel(case, xp):
    if case is not None:
        return is_within_the_bounds(case, "float32", xp=xp)
    # Some ten roundings in each of three steps, of numbers of size 1.
    for ours, numpys in zip(adam_steps(xp), adam_steps(np), strict=True):
        assert np.all(abs(ours - numpys) <= 100 * 2.0**-53 * (1 + abs(numpys)))


def test_adam_takes_the_same_steps_on_a_device(device_xp):
    check_kernel(None, device_xp)


@pytest.mark.parametrize("bug", KERNELS)
@pytest.mark.cupy
def test_each_bug_planted_in_a_kernel_is_found(bug, monkeypatch):
    cupy = pytest.importorskip("cupy")
    case, name, text, planted = KERNELS[bug]
    source = inspect.getsource(getattr(kernels, name))
    assert source.count(text) == 1
    for changed in (text, planted):
        names = {}
        exec(source.replace(text, changed).replace('"minilora_', '"planted_'), vars(kernels), names)
        monkeypatch.setattr(minilora.optim if case is None else lean, name, names[name])
        if changed == text:
            check_kernel(case, cupy)
        else:
            with pytest.raises(AssertionError):
                check_kernel(case, cupy)


# --- how many calls a step asks for -----------------------------------------------------------------------------------


def calls_of_a_step(n_layer, targets):
    """{operation: how often} of a LoRA step of a GPT, after the first: constants are made by then."""
    rng = np.random.default_rng(0)
    base = GPT(GPTConfig(n_layer, 2, 8, 11, 130), rng).to_device(strict_array)
    adapter = init_adapter(base, LoRAConfig(2, 4, targets), rng)
    model = attach(base, adapter)
    adam = Adam(adapter.parameters())
    # Longer than two blocks of queries are on the host.
    ids = rng.integers(0, 11, (2, 131))
    for _ in range(2):
        strict_array.CALLS.clear()
        adam.zero_grad()
        model.loss(ids[:, :-1], ids[:, 1:]).backward()
        clip_grad_norm(adam.params, 1e9)
        adam.step()
    return strict_array.CALLS.copy()


@pytest.mark.parametrize("targets, most", [(["q_proj", "v_proj"], 199), ("all-linear", 375)])
def test_a_block_of_a_model_asks_a_device_for_no_more_calls_than_these(targets, most):
    """The stand-in makes no kernels: gelu and Adam are 10 and 13 calls there, not 1."""
    calls = calls_of_a_step(3, targets)
    calls.subtract(calls_of_a_step(2, targets))
    assert calls.total() <= most, calls.most_common()


# --- how often a step waits -------------------------------------------------------------------------------------------

MODELS = {
    "a GPT": tiny_gpt, "a GPT with rotary positions": functools.partial(tiny_gpt, "rope"), "a Llama": tiny_llama,
    "a Llama from a file": lambda dtype: tiny_llama(dtype=dtype).map_tensors(lambda t: StoredTensor(t.data)),
}  # fmt: skip


def third_step(model, full=False, seed=None):
    """(what waits, what is called) in the third step that `train` takes, as training does it."""
    rng = np.random.default_rng(0)
    base = model(dtype="float32").to_device(strict_array)
    trained = base.trainable_copy()
    learned = trained
    if not full:
        learned = init_adapter(base, LoRAConfig(2, 4, "all-linear", dropout=0.5), rng)
        trained = attach(base, learned)
    ids = rng.integers(0, base.config.vocab_size, (3, 2, 8))
    counts = {}

    def after_step(step, loss, norm):
        counts[step] = strict_array.WAITS.copy(), strict_array.CALLS.copy()
        strict_array.WAITS.clear()
        strict_array.CALLS.clear()

    batches = [(batch[:, :-1], batch[:, 1:]) for batch in ids]
    train(trained, Adam(learned.parameters()), batches, 3, seed=seed, on_step=after_step, quiet=True)
    return counts[3]


@pytest.mark.parametrize("seed", [None, 0], ids=["without dropout", "with dropout"])
@pytest.mark.parametrize("model", MODELS)
def test_a_step_waits_for_its_loss_and_for_the_norm_and_for_nothing_else(model, seed):
    waits, _ = third_step(MODELS[model], seed=seed)
    assert waits == {"item": 1, "float": 1}


WAITING = {  # what is wrong: (model, the module that uses a function, that function, its line, the line with the bug)
    "an op reads a number": ("a GPT", minilora.gpt, lean.gelu, "X = x.data", "X = x.data; float(X.max())"),
    "a gradient reads one": ("a Llama", minilora.nn, lean.rms_norm, "d *= rstd", "d *= rstd; bool(d.max() > 0)"),
    "the norm, tensor by tensor": ("a Llama", minilora.training.loop, clip_grad_norm,
                                   "float(sum_of_squares([p.grad for p in params]))",
                                   "sum(float((p.grad * p.grad).sum()) for p in params)"),
}  # fmt: skip


@pytest.mark.parametrize("bug", WAITING)
def test_a_planted_wait_is_found(bug, monkeypatch):
    model, user, function, line, planted = WAITING[bug]
    plant(monkeypatch, function, line, planted)
    monkeypatch.setattr(user, function.__name__, getattr(sys.modules[function.__module__], function.__name__))
    waits, _ = third_step(MODELS[model])
    assert waits.total() > 2


def test_only_full_training_adds_in_no_fixed_order():
    """`add.at`, the gradient of the embedding, is atomic on a GPU."""
    assert {full: third_step(tiny_gpt, full)[1]["add.at"] > 0 for full in (False, True)} == {False: False, True: True}
