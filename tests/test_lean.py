"""lean.py against functional.py: values and gradients within derived bounds; and the other shortcuts, to the bit.

Shapes: B batch, T time, S keys, C channels, D channels of a head, V vocabulary.
The bounds are derived here, to first order in u, half the distance from 1 to the next number. A sum of n products, in
any order, in blocks or not, is off by at most γ_n Σ |products|, γ_n = n u / (1 - n u) (Higham 2002, eq. 3.13); so are
n roundings of one number. exp, log and tanh are taken to be right to 4 units in the last place, 8u. Products of errors
are paid for by SLACK: no relative error in a bound is above a thousandth.
"""

import inspect
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from strategies import contents

import minilora.gpt
import minilora.optim
from minilora import Adam, LoRAConfig, Tensor, attach, decoder, init_adapter, lean
from minilora import functional as F
from minilora.backend import to_device, to_numpy
from minilora.decoder import KeyValueCache
from minilora.generate import generate
from minilora.gpt import GPT, GPTConfig
from minilora.graph import no_grad
from minilora.packed import StoredTensor
from minilora.training.parts import PartWorkers

ROOT = Path(__file__).resolve().parent.parent
WHOLE = 2**62  # as a block's size: everything is one block
HEADS, SLACK = 2, 1.01
unit_roundoff = lambda dtype: float(np.finfo(dtype).eps) / 2
both_dtypes = pytest.mark.parametrize("dtype", ["float32", "float64"])


def gamma(n, u):
    return n * u / (1 - n * u)


# --- the bounds: [of y, of the gradient of each input] from float64 inputs, the gradient dy of y, and u ---------------


def attention_bounds(q, k, v, dy, u):
    """Every probability is P exp(±θ), with one θ for the row of a query, whether it is divided or made from log sums.

    A score is a sum of D products, scaled (3 roundings more): off by γ_{D+3} |q| |k|. Let e be the row's largest such
    error and A its largest |score|. Then θ adds up what both ways may lose:
        the score itself                                  e
        the log of the sum of exp(s - top):               e + 2A u (s - top) + 8u (exp) + γ_S (the sum) + 8 log S u
        top + log sum, and s minus it                     (A + log S) u, (2A + log S) u
        exp, and a division                               8u, u
    """
    D = q.shape[2] // HEADS
    group = HEADS // (k.shape[2] // D)  # so many heads of queries share one of keys, and its gradient is a sum
    split = lambda a: a.reshape(*a.shape[:2], -1, D).swapaxes(1, 2)
    join = lambda a: a.swapaxes(1, 2).reshape(a.shape[0], a.shape[2], -1)
    turned = lambda a: a.swapaxes(-1, -2)
    over_group = lambda a: a.reshape(a.shape[0], -1, group, *a.shape[2:]).sum(2)
    q, k, v, dO = map(split, (q, k, v, dy))
    k, v = (np.repeat(a, group, axis=1) for a in (k, v))
    T, S = q.shape[2], k.shape[2]
    scale, seen = D**-0.5, np.tril(np.ones((T, S), bool), S - T)
    s = np.where(seen, q @ turned(k) * scale, -np.inf)
    P = np.exp(s - s.max(-1, keepdims=True))
    P /= P.sum(-1, keepdims=True)
    q, k, v, dO = map(np.abs, (q, k, v, dO))
    over_row = lambda a: np.where(seen, a, 0).max(-1, keepdims=True)
    e, A = over_row(gamma(D + 3, u) * scale * q @ turned(k)), over_row(abs(s))
    theta = 2 * e + gamma(S, u) + u * (5 * A + 10 * np.log(S) + 17)
    assert theta.max() < 1e-3
    y = (theta + gamma(S, u)) * (P @ v)
    # dP = dO vᵀ is off by γ_D G, G = |dO| |v|ᵀ. Σ dP P = Σ dO O is off by (θ + γ_S + γ_D) g, g = Σ P G, either way.
    # dS = P (dP - that): both errors, θ for P, and 2 roundings. Then a sum over keys, or queries, and the scale: 3.
    G = dO @ turned(v)
    g = (P * G).sum(-1, keepdims=True)
    off, M = P * (2 * theta + gamma(S, u) + gamma(D, u) + 2 * u) * (G + g), P * (G + g)
    dq = (off + (gamma(S, u) + 3 * u) * M) @ k * scale
    dk = over_group(turned(off + (gamma(T * group, u) + 3 * u) * M) @ q * scale)
    return [join(a) for a in (y, dq, dk, over_group(turned((theta + gamma(T * group, u)) * P) @ dO))]


def gelu_bounds(x, dy, u):
    """s = (1 + t) / 2 with t = tanh(z), z = c (x + a x³), terms of one sign: z is off by γ_10 |z|, with its constants.

    tanh passes on (1 - t²) of it and adds 8u |t|; 1 + t is rounded: e for s. Then y = x s, and the derivative
    s + p, p = x s (1 - s) w, w = 2c (1 + 3 a x²), in which s, 1 - s, w and the products are off.
    """
    c, a = np.sqrt(2 / np.pi), 0.044715
    z, w = c * (x + a * x**3), 2 * c * (1 + 3 * a * x * x)
    t = np.tanh(z)
    s = (1 + t) / 2
    e = (1 - t * t) * gamma(10, u) * abs(z) / 2 + 4 * u * abs(t) + 2 * u * s
    p = abs(x) * s * (1 - s) * w
    d = abs(x) * w * (e + u + s * (1 - s) * gamma(14, u)) + e + 4 * u * (1 + p)
    return [abs(x) * (e + u * s), abs(dy) * d]


def swiglu_bounds(g, up, dy, u):
    """s = (1 + t) / 2 with t = tanh(g / 2), and g / 2 is exact: e for s, as in gelu. Then silu = g s, y = silu up.

    The derivative by g is up (s + silu (1 - s)): s, 1 - s, silu and the products are off.
    """
    t = np.tanh(g / 2)
    s = (1 + t) / 2
    e = 4 * u * abs(t) + 2 * u * s
    silu = abs(g) * (e + u * s)
    d = abs(up) * (e + silu * (1 - s) + abs(g) * s * (e + 3 * u) + 4 * u * (s + abs(g) * s))
    return [abs(up) * (silu + u * abs(g) * s), abs(dy) * (d + u * abs(up) * s), abs(dy) * (silu + u * abs(g) * s)]


def rms_norm_bounds(x, weight, dy, u):
    """The mean of squares is off by γ_{C+3} of itself; 1/√ halves that, and adds 4u: ρ for 1/rms, and so for normed."""
    C, mean = x.shape[-1], lambda a: a.mean(-1, keepdims=True)
    rms = np.sqrt(mean(x * x) + 1e-6)
    rho = gamma(C + 3, u) / 2 + 4 * u
    assert rho < 1e-3
    normed = abs(x) / rms
    # For the gradient normed may be y / weight: two roundings more.
    e = (rho + 3 * u) * normed
    # dx = (d - normed · mean(d normed)) / rms with d = dy w: each term's own error, and three roundings.
    d = abs(dy * weight)
    along = mean(d * normed)
    terms = d + normed * along
    off = u * d + normed * (mean(d * e) + gamma(C + 3, u) * along) + e * along + 3 * u * terms
    rows = x.size // C
    dweight = (abs(dy) * e + gamma(rows + 1, u) * abs(dy) * normed).reshape(-1, C).sum(0)
    return [abs(weight) * ((rho + 3 * u) * normed), (off + (rho + u) * terms) / rms, dweight]


def layer_norm_bounds(x, weight, bias, dy, u):
    """The mean is off by γ_{C+1} mean |x|, a centred x by that and a rounding, e; 1/std by ρ of itself; so is normed.

    The variance is off by the mean of 2 |x - mean| e + e², and by γ_{C+2} of itself; 1/√ halves that, and adds 4u.
    """
    C, mean = x.shape[-1], lambda a: a.mean(-1, keepdims=True)
    dev = x - mean(x)
    e = gamma(C + 1, u) * mean(abs(x)) + u * abs(dev)
    var = mean(dev * dev) + 1e-5
    rho = (mean(2 * abs(dev) * e + e * e) + gamma(C + 2, u) * var) / (2 * var) + 4 * u
    assert rho.max() < 1e-3
    normed = abs(dev) / np.sqrt(var)
    e = e / np.sqrt(var) + (rho + u) * normed
    y = abs(weight) * (e + 2 * u * normed) + u * abs(bias)
    # dx = (d - mean d - normed · mean(d normed)) / std with d = dy w: each term's own error, and three roundings.
    d = abs(dy * weight)
    m, along = mean(d), mean(d * normed)
    terms = d + m + normed * along
    off = u * d + gamma(C + 2, u) * m + normed * (mean(d * e) + gamma(C + 3, u) * along) + e * along + 3 * u * terms
    rows = x.size // C
    dweight = (abs(dy) * e + gamma(rows + 1, u) * abs(dy) * normed).reshape(-1, C).sum(0)
    return [y, (off + (rho + u) * terms) / np.sqrt(var), dweight, gamma(rows, u) * abs(dy).reshape(-1, C).sum(0)]


def loss_bounds(x, weight, targets, dy, u):
    """A logit is a sum of C products, off by at most e in its row; softmax, and -log of it, is then off by θ.

    θ is as in attention: 2e, γ_V for the sum, exp and log, and the subtractions of numbers up to A and log V, where A
    is the row's largest |logit|. The mean adds γ_{n+2} of the losses; a gradient sums over V, or over the n rows, and
    is divided, subtracted from and multiplied: 4u.
    """
    kept, C, V = targets.reshape(-1) != F.IGNORE, x.shape[-1], len(weight)
    X, t = x.reshape(-1, C)[kept], targets.reshape(-1)[kept]
    n, z = len(X), X @ weight.T
    e = (gamma(C, u) * abs(X) @ abs(weight).T).max(-1, keepdims=True)
    theta = 2 * e + gamma(V, u) + u * (6 * abs(z).max(-1, keepdims=True) + 10 * np.log(V) + 17)
    assert theta.max() < 1e-3
    P = np.exp(z - z.max(-1, keepdims=True))
    P /= P.sum(-1, keepdims=True)
    one_hot = np.arange(V) == t[:, None]
    loss = theta.mean() + gamma(n + 2, u) * -np.log(P[one_hot]).mean()
    off = lambda terms: abs(dy) / n * (P * theta + (gamma(terms, u) + 4 * u) * abs(P - one_hot))
    dx = np.zeros_like(x).reshape(-1, C)
    dx[kept] = off(V) @ abs(weight)
    return [np.asarray(loss), dx.reshape(x.shape), off(n).T @ abs(X)]


# --- what is compared: more queries, and more labelled rows, than a block has, and not a multiple ---------------------


def attention_inputs(rng, T, S, n_kv_head=HEADS):
    return [rng.standard_normal((2, n, 8 * heads)) for n, heads in ((T, HEADS), (S, n_kv_head), (S, n_kv_head))]


def some_targets(rng):
    targets = rng.integers(0, 50, (2, 350))
    targets[:, ::7] = F.IGNORE
    return targets


TARGETS = some_targets(np.random.default_rng(5))
CASES = {  # name: (ours, the textbook's, bounds, inputs); ours is looked up when it is called, as the model does it
    **{f"attention, {T} queries, {S} keys": (
        lambda *qkv: lean.attention(*qkv, HEADS), lambda *qkv: F.attention(*qkv, HEADS), attention_bounds,
        lambda rng, T=T, S=S: attention_inputs(rng, T, S),
    ) for T, S in ((150, 150), (65, 65), (130, 167))},
    "attention, one head of keys for all": (
        lambda *qkv: lean.attention(*qkv, HEADS), lambda *qkv: F.attention(*qkv, HEADS), attention_bounds,
        lambda rng: attention_inputs(rng, 130, 150, n_kv_head=1),
    ),
    "swiglu": (lambda *a: lean.swiglu(*a), F.swiglu, swiglu_bounds,
               lambda rng: [np.append(3 * rng.standard_normal(1000), [0.0, -0.0, 50.0, -50.0]),
                            rng.standard_normal(1004)]),
    "rms norm": (lambda *a: lean.rms_norm(*a), F.rms_norm, rms_norm_bounds,
                 lambda rng: [1 + rng.standard_normal((60, 48)), rng.standard_normal(48)]),
    "gelu": (lambda x: lean.gelu(x), F.gelu, gelu_bounds,
             lambda rng: [np.append(3 * rng.standard_normal(1000), [0.0, -0.0, 11.0, -11.0])]),
    "layer norm": (lambda *a: lean.layer_norm(*a), F.layer_norm, layer_norm_bounds,
                   lambda rng: [2 + rng.standard_normal((60, 48)), *rng.standard_normal((2, 48))]),
    "loss": (lambda *a: lean.linear_cross_entropy(*a, TARGETS), lambda *a: F.linear_cross_entropy(*a, TARGETS),
             lambda x, W, dy, u: loss_bounds(x, W, TARGETS, dy, u),
             lambda rng: [rng.standard_normal((2, 350, 16)), rng.standard_normal((50, 16))]),
}  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES)


def results(op, arrays, dy, xp=np):
    """The value of `op` and the gradient of each of its inputs, computed by `xp`."""
    tensors = [Tensor(to_device(a, xp), requires_grad=True) for a in arrays]
    y = op(*tensors)
    y.backward(to_device(dy.astype(y.dtype), xp))
    return [to_numpy(a) for a in (y.data, *(t.grad for t in tensors))]


def is_within_the_bounds(case, dtype, op=None, xp=np):
    """`op`, ours unless it is given, in `dtype`, against the textbook's in float64, on the same float32 inputs."""
    ours, textbooks, bounds, inputs = CASES[case]
    rng = np.random.default_rng(3)
    arrays = [a.astype(np.float32).astype(np.float64) for a in inputs(rng)]
    y = textbooks(*map(Tensor, arrays)).data
    dy = rng.standard_normal(y.shape).astype(np.float32).astype(np.float64)
    expected = results(textbooks, arrays, dy)
    found = results(op or ours, [a.astype(dtype) for a in arrays], dy, xp)
    limits = zip(*(bounds(*arrays, dy, unit_roundoff(d)) for d in (dtype, "float64")), strict=True)  # one for each side
    for a, b, limit in zip(found, expected, limits, strict=True):
        assert a.dtype == dtype and a.shape == b.shape == sum(limit).shape
        assert np.all(abs(a - b) <= SLACK * sum(limit))


@every_case
@both_dtypes
def test_a_lean_op_differs_from_the_textbooks_by_less_than_the_derived_bound(case, dtype):
    is_within_the_bounds(case, dtype)


@every_case
@both_dtypes
def test_on_a_device_a_lean_op_obeys_the_same_bound(case, dtype, device_xp):
    is_within_the_bounds(case, dtype, xp=device_xp)


@every_case
def test_the_textbooks_version_obeys_the_same_bound(case):
    is_within_the_bounds(case, "float32", CASES[case][1])


@pytest.mark.parametrize("norm", [F.layer_norm, F.rms_norm, lean.layer_norm, lean.rms_norm])
def test_squares_that_overflow_are_warned_of(norm):
    """The result is zeros then: finite, so that nothing else tells."""
    x = Tensor(np.linspace(-1, 1, 8, dtype="f4")[None] * np.float32(1e30))
    weight = Tensor(np.ones(8, "f4"))
    bias = [Tensor(np.zeros(8, "f4"))] if norm.__name__ == "layer_norm" else []
    with pytest.warns(RuntimeWarning, match="overflow encountered"):
        norm(x, weight, *bias)


@both_dtypes
@pytest.mark.parametrize("n_tiny", [0, 1, 3])
def test_rms_norm_by_a_weight_from_a_file_obeys_the_bound_too(dtype, n_tiny):
    """There x / rms is taken from y, unless a number of the weight is too small to divide by."""
    rng = np.random.default_rng(3)
    x, w, dy = (rng.standard_normal(shape).astype(np.float32).astype(np.float64) for shape in ((60, 48), 48, (60, 48)))
    w[:n_tiny] = [0.0, 1e-30, -1e-36][:n_tiny]
    exact = results(F.rms_norm, [x, w], dy)[:2]
    leaf = Tensor(x.astype(dtype), requires_grad=True)
    y = lean.rms_norm(leaf, StoredTensor(w.astype(dtype)))
    y.backward(dy.astype(dtype))
    for ours, theirs, limit in zip((y.data, leaf.grad), exact, rms_norm_bounds(x, w, dy, unit_roundoff(dtype)),
                                   strict=False):  # fmt: skip
        assert np.all(abs(ours - theirs) <= SLACK * (limit + 1e-14 * abs(theirs)) + 1e-37)


def test_the_inputs_are_cut_into_several_blocks_and_a_rest():
    labelled = np.count_nonzero(TARGETS != F.IGNORE)
    assert 150 > 2 * lean.QUERY_BLOCK and 150 % lean.QUERY_BLOCK
    assert labelled > 2 * lean.LOGIT_ROWS and labelled % lean.LOGIT_ROWS


@pytest.mark.parametrize("case", ["attention, 150 queries, 150 keys", "loss"])
@pytest.mark.parametrize("size", [1, 7, WHOLE])
def test_so_do_blocks_of_any_size(monkeypatch, case, size):
    monkeypatch.setattr(lean, "QUERY_BLOCK", size)
    monkeypatch.setattr(lean, "LOGIT_ROWS", size)
    is_within_the_bounds(case, "float32")


# --- to the bit -------------------------------------------------------------------------------------------------------


def adam_steps(block, monkeypatch):
    """Everything that three steps leave behind, in blocks of so many numbers."""
    monkeypatch.setattr(minilora.optim, "BLOCK", block)
    rng = np.random.default_rng(1)
    params = [Tensor(rng.standard_normal(s).astype(np.float32), requires_grad=True) for s in ((37, 11), (200,), (2, 3))]
    adam = Adam(params, lr=0.01, weight_decay=0.1)
    for _ in range(3):
        for p in params:
            p.grad = rng.standard_normal(p.shape).astype(np.float32)
        adam.step()
    return [p.data for p in params] + list(adam.state_dict()["moments"].values())


def adam_in_blocks_is_adam_in_one(monkeypatch):
    """Each number has its own sums: in any block the same operations are done to it."""
    blocks, whole = (adam_steps(size, monkeypatch) for size in (64, WHOLE))
    assert all(np.array_equal(a, b) for a, b in zip(blocks, whole, strict=True))


def caches_hold_the_same():
    """Keys and values are copied, never computed with."""
    rng, ours, growing = np.random.default_rng(2), KeyValueCache(12), GrowingCache(12)
    for T in (5, 1, 1, 4):
        k, v = (Tensor(rng.standard_normal((3, T, 8)).astype(np.float32)) for _ in range(2))
        ours_now, growing_now = ours.extend(k, v), growing.extend(k, v)
        assert ours.length == growing.length
        assert all(np.array_equal(a.data, b.data) for a, b in zip(ours_now, growing_now, strict=True))


def test_adam_in_blocks_takes_the_same_steps_to_the_bit(monkeypatch):
    adam_in_blocks_is_adam_in_one(monkeypatch)


def test_a_cache_made_once_holds_the_same_as_one_that_grows():
    caches_hold_the_same()


class GrowingCache:
    """One layer's keys and values in arrays that are made anew, one position longer, for each token."""

    def __init__(self, size, starts=None):
        self.k = self.v = None  # arrays (B, S, C)
        self.starts = starts

    def hidden(self):
        return None

    length = property(lambda self: 0 if self.k is None else self.k.shape[1])

    def extend(self, k, v, front=None):
        self.k = k.data if self.k is None else np.concatenate([self.k, k.data], axis=1)
        self.v = v.data if self.v is None else np.concatenate([self.v, v.data], axis=1)
        return Tensor(self.k), Tensor(self.v)


def without_a_cache(model, ids, max_new_tokens):
    """The likeliest tokens after `ids` (B, T); for each, the model reads everything before it again."""
    with no_grad():
        for _ in range(max_new_tokens):
            logits = model.head(model.hidden(ids)[:, -1]).data
            ids = np.concatenate([ids, logits.argmax(-1)[:, None]], axis=1)
    return ids


def small_model(dtype="float32"):
    rng = np.random.default_rng(0)
    base = GPT(GPTConfig(n_layer=3, n_head=2, n_embd=16, vocab_size=19, block_size=70), rng, dtype)
    adapter = init_adapter(base, LoRAConfig(r=2, alpha=4, target_modules=["q_proj", "v_proj", "up_proj"]), rng)
    for pair in adapter.pairs.values():
        pair.lora_B.data[:] = rng.standard_normal(pair.lora_B.shape)
    return base, adapter


def gradients(model, adapter):
    ids = np.random.default_rng(1).integers(0, 19, (3, 71))
    loss = model.loss(ids[:, :-1], ids[:, 1:])
    loss.backward()
    return loss.item(), [p.grad for p in adapter.parameters()]


def same(ours, theirs):
    return ours[0] == theirs[0] and all(np.array_equal(a, b) for a, b in zip(ours[1], theirs[1], strict=True))


def test_gradients_of_frozen_weights_change_no_other_to_the_bit():
    """Nodes that are there only for the base lie beside or below the others, which meet in the same order."""
    (base, adapter), (other_base, other) = small_model(), small_model()
    trainable = lambda t: t if t.requires_grad else Tensor(t.data, requires_grad=True)
    model = attach(other_base, other).map_tensors(trainable)
    assert same(gradients(attach(base, adapter), adapter), gradients(model, other))
    assert all(p.grad is not None for p in model.parameters()) and contents(base) == contents(other_base)


def test_one_part_on_no_thread_is_the_plain_step_to_the_bit():
    (base, adapter), (other_base, other) = small_model(), small_model()
    ids = np.random.default_rng(1).integers(0, 19, (3, 71))
    with PartWorkers(attach(other_base, other)) as workers:
        loss = workers.backward([(ids[:, :-1], ids[:, 1:])])
    assert same(gradients(attach(base, adapter), adapter), (loss, [p.grad for p in other.parameters()]))


@pytest.mark.parametrize("length", [1, 17])
def test_each_way_to_generate_writes_the_same_tokens(monkeypatch, length):
    """In float64, where no two logits of this model are so near each other that rounding could decide."""
    model, prompt = small_model("float64")[0], np.arange(2 * length).reshape(2, length) % 19
    tokens = generate(model, prompt, 40)
    assert np.array_equal(tokens, without_a_cache(model, prompt, 40))
    monkeypatch.setattr(decoder, "KeyValueCache", GrowingCache)
    assert np.array_equal(tokens, generate(model, prompt, 40))


BEFORE_AND_AFTER = """
import numpy as np
from minilora.training.threads import keep_freed_memory
from test_lean import gradients, same, small_model, attach
def step():
    base, adapter = small_model()
    return gradients(attach(base, adapter), adapter)
first, kept, second, third = step(), keep_freed_memory(), step(), step()
print(same(first, second) and same(first, third))
"""


def test_memory_that_is_kept_changes_no_bit():
    command = [sys.executable, "-c", BEFORE_AND_AFTER]  # it is kept for good: in a process of its own
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT / "tests", env=environment, capture_output=True, encoding="utf-8")
    assert done.stdout.strip() == "True", done.stderr


# --- planted bugs: a line of ours is changed, and the comparison must fail --------------------------------------------

CACHE, BLOCKS = KeyValueCache.extend, minilora.optim._blocks
BUGS = {  # what is wrong: (case or comparison, function, its line, the line with the bug)
    "last queries dropped": ("attention", lean.attention, "range(0, T, step)",
                             "range(0, T - step, step)"),
    "mask off by one": ("attention", lean._future, "dtype), -1)", "dtype), -2)"),
    "last key out of sight": ("attention", lean._future, "dtype), -1)", "dtype), 0)"),
    "dq not scaled": ("attention", lean.attention, "@ K[:, :, keys]) * scale", "@ K[:, :, keys])"),
    "dk of the last block alone": ("attention", lean.attention, "dK_seen += ", "dK_seen[...] = "),
    "softmax half way back": ("attention", lean.attention, "dscores -= along[..., queries]", "pass"),
    "the group's mask not repeated": ("attention, one head", lean._future, "xp.repeat(mask, G, axis=1)",
                                      "xp.tile(mask, (1, G))"),
    "silu, wrong derivative": ("swiglu", lean.swiglu, "s *= 1 - silu", "s *= 1 - s"),
    "mean of a square too few": ("rms norm", lean.rms_norm, "rstd *= 1 / C", "rstd *= 1 / (C - 1)"),
    "rms norm taken for a scale": ("rms norm", lean.rms_norm, "along *= 1 / C", "along *= 0"),
    "gelu, other constant": ("gelu", lean.gelu, "a = 0.044715", "a = 0.0447"),
    "gelu, last numbers dropped": ("gelu", lean.gelu, "range(0, flat.size, GELU_BLOCK)",
                                   "range(0, flat.size - GELU_BLOCK, GELU_BLOCK)"),
    "gelu, wrong derivative": ("gelu", lean.gelu, "d *= 6 * c * a", "d *= 5.999 * c * a"),
    "other variance": ("layer norm", lean.layer_norm, "row_mean_dot(normed, normed)",
                       "row_mean_dot(normed, normed) * 48 / 47"),
    "two terms of three": ("layer norm", lean.layer_norm, "d -= normed * along", "pass"),
    "last rows dropped": ("loss", lean.linear_cross_entropy, "range(0, n, step)",
                          "range(0, n - step, step)"),
    "dW of the last rows alone": ("loss", lean.linear_cross_entropy, "dW += ", "dW = "),
    "softmax without one-hot": ("loss", lean.linear_cross_entropy, "E[at_target] -= sums[:, 0]", "pass"),
    "mean over silent rows": ("loss", lean.linear_cross_entropy, "loss / n)", "loss / targets.size)"),
    "last block not updated": ("Adam", BLOCKS, "range(0, len(first), n_rows)", "range(0, len(first) - n_rows, n_rows)"),
    "values over keys": ("cache", CACHE, "cached[1, :, start:stop]", "cached[0, :, start:stop]"),
}  # fmt: skip


def plant(monkeypatch, function, line, bug):
    """Let minilora use `function` with `bug` in the place of `line`."""
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(line) == 1, f"{function.__name__} has no such line any more: plant the bug in another"
    place, names = KeyValueCache if function is CACHE else sys.modules[function.__module__], {}
    # It sees the names of its module, QUERY_BLOCK and all.
    exec(source.replace(line, bug), inspect.unwrap(function).__globals__, names)
    monkeypatch.setattr(place, function.__name__, names[function.__name__])


def holds(case, dtype, monkeypatch):
    """The comparison of that name."""
    if case == "Adam":
        adam_in_blocks_is_adam_in_one(monkeypatch)
    elif case == "cache":
        caches_hold_the_same()
    else:
        name = next(name for name in CASES if name.startswith(case))
        with np.errstate(all="ignore"):  # a bug may read memory that nobody wrote
            is_within_the_bounds(name, dtype)


@pytest.mark.parametrize("bug", BUGS)
@both_dtypes
def test_each_planted_bug_breaks_the_comparison(monkeypatch, bug, dtype):
    case, function, line, planted = BUGS[bug]
    plant(monkeypatch, function, line, planted)
    with pytest.raises(AssertionError):
        holds(case, dtype, monkeypatch)


@pytest.mark.parametrize("bug", BUGS)
def test_the_right_line_planted_the_same_way_survives(monkeypatch, bug):
    case, function, line, _ = BUGS[bug]
    plant(monkeypatch, function, line, line)
    holds(case, "float32", monkeypatch)
