"""What the tests draw, shapes, arrays from a drawn seed, small models, adapters, and how they compare and watch them.

Arrays are drawn as a seed, so that hypothesis shrinks the shape and the seed and never searches float bit patterns:
values lie well inside the float range, and a failure prints in one line.
"""

import contextlib
import json
import re
import weakref
from collections import namedtuple
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import threadpoolctl
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from minilora import functional as F
from minilora.backend import get_array_module, to_numpy
from minilora.gpt import GPT, GPTConfig
from minilora.graph import no_grad
from minilora.llama import Llama, LlamaConfig
from minilora.lora import Adapter, LoRALinear, LoRAPair, init_adapter
from minilora.lora_config import LoRAConfig
from minilora.nn import Linear, Module
from minilora.tensor import Tensor

seeds = st.integers(0, 2**32 - 1)
rngs = seeds.map(np.random.default_rng)
sides = st.integers(1, 4)


def shapes(min_dims=0, max_dims=3):
    """A shape of a few small axes."""
    return st.lists(sides, min_size=min_dims, max_size=max_dims).map(tuple)


@st.composite
def broadcastable_shapes(draw, max_dims=3):
    """Two shapes that broadcast: each is one result shape with some axes stretched from 1 and some leading ones cut."""
    result = draw(shapes(0, max_dims))

    def narrowed():
        kept = draw(st.integers(0, len(result)))
        return tuple(1 if draw(st.booleans()) else n for n in result[len(result) - kept :])

    return narrowed(), narrowed()


@st.composite
def matmul_shapes(draw):
    """Two shapes that `@` takes: vectors, matrices, and stacks of matrices whose leading axes broadcast."""
    n, k, m = draw(sides), draw(sides), draw(sides)
    left, right = draw(broadcastable_shapes(max_dims=2))
    return (
        draw(st.sampled_from([(k,), (n, k), (*left, n, k)])),
        draw(st.sampled_from([(k,), (k, m), (*right, k, m)])),
    )


@st.composite
def arrays(draw, shape, low=-2.0, high=2.0, dtype=np.float64):
    """A float array, uniform in [low, high); `shape` is a shape or a strategy for one."""
    shape = draw(shape) if isinstance(shape, st.SearchStrategy) else shape
    return draw(rngs).uniform(low, high, shape).astype(dtype)


@st.composite
def integer_arrays(draw, shape, bound=3, dtype=np.float64):
    """A float array of whole numbers in -bound .. bound: sums and products of these are exact in any order."""
    shape = draw(shape) if isinstance(shape, st.SearchStrategy) else shape
    return draw(rngs).integers(-bound, bound, shape, endpoint=True).astype(dtype)


# ---------------------------------------------------------------------------------------------------------------
# LoRA: a small model of plain Linears, and layers and adapters of whole numbers, whose sums are never rounded.

SCALINGS = (0.25, 0.5, 1.0, 2.0, 4.0)  # multiplying by a power of two moves no bit of the mantissa
float_dtypes = st.sampled_from(["float32", "float64"])

LayerCase = namedtuple("LayerCase", "layer x")
StackCase = namedtuple("StackCase", "base adapters x dy")


class TinyMLP(Module):
    """Plain Linear layers with a gelu between them, x (..., in) -> (..., out): all the model that LoRA needs."""

    def __init__(self, linears):
        self.layers = list(linears)

    def __call__(self, x, rng=None):
        for layer in self.layers[:-1]:
            x = F.gelu(layer(x, rng))
        return self.layers[-1](x, rng)


def tiny_mlp(*sizes, seed=0, dtype="float32"):
    """A TinyMLP with random weights: tiny_mlp(5, 7, 3) has layers.0 (5 -> 7) and layers.1 (7 -> 3)."""
    rng = np.random.default_rng(seed)
    return TinyMLP(Linear.init(n, m, rng, dtype) for n, m in pairwise(sizes))


def new_adapter(base, r=2, alpha=4, targets="all-linear", seed=0, **options):
    """A new adapter, whose B is zero."""
    return init_adapter(base, LoRAConfig(r, alpha, targets, **options), np.random.default_rng(seed))


def learned(adapter, seed=1, size=0.5):
    """`adapter`, with random numbers written into every lora_B, as if it had learned something."""
    rng = np.random.default_rng(seed)
    for pair in adapter.pairs.values():
        B = pair.lora_B.data
        B += get_array_module(B).asarray((size * rng.standard_normal(B.shape)).astype(B.dtype))
    return adapter


@contextlib.contextmanager
def two_blas_threads():
    """As on a machine of two cores, whatever the environment says, and no thread of Python owns the number."""
    with threadpoolctl.threadpool_limits(2, "blas"):
        threadpoolctl.OpenBLASController.clear_controlling_thread()
        yield


def blas_now():
    """How many threads each library of BLAS has."""
    return [pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]


def blas_threads_in_a_loss(patch):
    """A set of all numbers of threads of BLAS with which a loss is computed from now on."""
    found = set()
    true_loss = GPT.loss

    def look(self, ids, targets, rng=None):
        found.update(blas_now())
        return true_loss(self, ids, targets, rng)

    patch.setattr(GPT, "loss", look)
    return found


def contents(module):
    """{name: bytes} of every tensor: modules of equal contents are equal to the last bit."""
    return {name: to_numpy(p.data).tobytes() for name, p in module.named_parameters()}


@st.composite
def lattice_layers(draw, square=False):
    """A LoRALinear of whole numbers, square or of any shape, with a bias or without, and an input x (T, in) for it."""
    dtype, n, r, T = draw(float_dtypes), draw(st.integers(1, 5)), draw(sides), draw(sides)
    m = n if square else draw(st.integers(1, 5))
    tensor = lambda *shape: Tensor(draw(integer_arrays(shape, dtype=dtype)), requires_grad=True)
    linear = Linear(tensor(m, n), tensor(m) if draw(st.booleans()) else None)
    pair = LoRAPair(tensor(r, n), tensor(m, r), draw(st.sampled_from(SCALINGS)))
    return LayerCase(LoRALinear(linear, pair), tensor(T, n))


@st.composite
def lattice_stacks(draw):
    """A one-layer base of whole numbers, an adapter or None for each row, x (rows, T, in) and dy (rows, T, out)."""
    dtype, n, m, T = draw(float_dtypes), draw(sides), draw(sides), draw(sides)
    array = lambda *shape: draw(integer_arrays(shape, dtype=dtype))
    base = TinyMLP([Linear(Tensor(array(m, n)), Tensor(array(m)))])

    def adapter():
        r, scaling = draw(sides), draw(st.sampled_from(SCALINGS))
        A, B = Tensor(array(r, n), requires_grad=True), Tensor(array(m, r), requires_grad=True)
        pair = LoRAPair(A, B, scaling)
        return Adapter(LoRAConfig(r, scaling * r, "all-linear"), {"layers.0": pair}, base.fingerprint())

    rows = draw(st.lists(st.booleans(), min_size=1, max_size=4).filter(any))
    adapters = [adapter() if adapted else None for adapted in rows]
    return StackCase(base, adapters, array(len(rows), T, n), array(len(rows), T, m))


@st.composite
def real_layers(draw, dtype, square=False):
    """A LoRALinear and an input x (T, in) of normal numbers, each matrix at its own size within 10^±3."""
    n, m, r, T = (draw(st.integers(1, most)) for most in (24, 12, 6, 3))
    m, rng = n if square else m, draw(rngs)
    tensor = lambda *shape: Tensor((rng.standard_normal(shape) * 10.0 ** draw(st.integers(-3, 3))).astype(dtype))
    linear = Linear(tensor(m, n), tensor(m) if draw(st.booleans()) else None)
    pair = LoRAPair(tensor(r, n), tensor(m, r), draw(st.floats(0.01, 100)))
    return LayerCase(LoRALinear(linear, pair), tensor(T, n))


gpt_shapes = st.fixed_dictionaries(
    {
        "n_layer": st.integers(1, 2),
        "n_head": st.integers(1, 2),
        "n_embd": st.sampled_from([4, 8, 12]),
        "vocab_size": st.integers(3, 9),
        "block_size": st.integers(6, 9),
        "positions": st.sampled_from(["learned", "rope"]),
    }
)


def tiny_gpt(positions="learned", seed=0, dtype="float64", **changes):
    """A GPT of two layers over 7 tokens and 8 positions, as it is drawn."""
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 8, "vocab_size": 7, "block_size": 8}
    shape |= {"positions": positions, **changes}
    return GPT(GPTConfig(**shape), np.random.default_rng(seed), dtype)


def gpt_logits(model, ids, cache=None):
    """The logits of ids (B, T), as an array."""
    with no_grad():
        return model.head(model.hidden(np.asarray(ids), cache)).data


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
# A small model of Llama's family: grouped queries, and heads that are not hidden_size / n_head wide.
SHAPE = {"num_hidden_layers": 2, "hidden_size": 12, "intermediate_size": 10, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 6, "vocab_size": 9, "max_position_embeddings": 40,
         "rope_theta": 50.0}  # fmt: skip


def tiny_llama(seed=0, dtype="float64", **changes):
    """A small model whose norms and biases are random too: as drawn, they are ones and zeros."""
    rng = np.random.default_rng(seed)
    model = Llama(LlamaConfig(**{**SHAPE, **changes}), rng, dtype)
    jitter = lambda t: Tensor((t.data + 0.2 * rng.standard_normal(t.shape)).astype(dtype), requires_grad=True)
    return model.map_tensors(jitter)


@st.composite
def gpts_and_ids(draw, dtype="float64"):
    """A small GPT in one of many shapes, and token ids (B, T) for it, T at least 2."""
    config = GPTConfig(**draw(gpt_shapes))
    T = draw(st.integers(2, config.block_size))
    ids = draw(rngs).integers(0, config.vocab_size, (draw(st.integers(1, 3)), T))
    return GPT(config, draw(rngs), dtype), ids


def hunt(cases, holds, examples=200):
    """Run the property `holds` on drawn `cases`, the same ones every time: for code that is meant to fail it."""

    @settings(max_examples=examples, phases=[Phase.generate], database=None, derandomize=True)
    @given(cases)
    def search(case):
        holds(case)

    search()


def agree(xp, ours, numpys):
    """Is an array of `xp` what NumPy computed? To the bit, except on a GPU, which sums in an order of its own."""
    if xp.__name__ == "cupy":
        return nearly(ours, numpys)
    ours = to_numpy(ours)
    return ours.dtype == numpys.dtype and np.array_equal(ours, numpys)


def nearly(ours, numpys):
    """Is an array of any backend what NumPy computed, but for the order of float32 sums in a whole model?"""
    return np.allclose(to_numpy(ours), numpys, rtol=1e-3, atol=1e-4)


def close(a, b, margin=1e-11):
    """Equal to within `margin` of the largest logit: a margin, not a bound, some 500 times the error measured on GPTs
    (a layer's bound does not pass through layer norm and softmax without their condition numbers)."""
    return np.abs(a - b).max() <= margin * np.abs(b).max()


class Watch:
    """What every `linear` of a model is given, seen through a patched `F.linear` and held by weak references only.

    After `model(x)`: `alive(name)` says whether the input of the Linear `name` is still in memory, and `traced(name)`
    whether it carried a graph.
    """

    def __init__(self, model, monkeypatch):
        self.names = {id(p.data): name.removesuffix(".weight") for name, p in model.named_parameters()}
        self.inputs = {}
        true_linear = F.linear

        def linear(x, weight, bias=None):
            owner = x.data if x.data.base is None else x.data.base  # who owns the memory; a view may die early
            self.inputs[self.names[id(weight.data)]] = weakref.ref(owner), x.requires_grad
            return true_linear(x, weight, bias)

        monkeypatch.setattr(F, "linear", linear)

    def alive(self, name):
        return self.inputs[name][0]() is not None

    def traced(self, name):
        return self.inputs[name][1]


# ---------------------------------------------------------------------------------------------------------------
# Files: a small GPT, an adapter that has learned something, how they are compared, and tensors written by hand.

SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 8, "vocab_size": 11, "block_size": 16}
ODD_NUMBERS = np.array([-0.0, 5e-324, 1e-45, 1e-38, -1e38, 1 / 3, 1e300])  # signed zero, subnormals, the far ends
TYPE_CODES = {"float16": "F16", "float32": "F32", "float64": "F64", "int32": "I32", "int64": "I64"}


def small_gpt(seed=0, dtype="float32", **changes):
    """A GPT of two layers in which no number is 0 or 1 by default: biases and LayerNorms are drawn too."""
    rng = np.random.default_rng(seed)
    model = GPT(GPTConfig(**{**SMALL, **changes}), rng, dtype)
    for p in model.parameters():
        if p.ndim == 1:
            p.data += (0.3 * rng.standard_normal(p.shape)).astype(dtype)
    return model


SMALL_LLAMA = {"num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 4,
               "num_key_value_heads": 2, "head_dim": 2, "vocab_size": 11, "max_position_embeddings": 16}  # fmt: skip


def small_llama(seed=0, dtype="float32", **changes):
    """A Llama of two layers in which no norm is one and no bias is zero."""
    rng = np.random.default_rng(seed)
    model = Llama(LlamaConfig(**{**SMALL_LLAMA, **changes}), rng, dtype)
    for p in model.parameters():
        if p.ndim == 1:
            p.data += (0.3 * rng.standard_normal(p.shape)).astype(dtype)
    return model


def character_gpt(seed=0, n_embd=16, dtype="float32"):
    """A GPT of one layer over the 96 characters, as it is drawn: for what is trained on a text."""
    config = GPTConfig(n_layer=1, n_head=2, n_embd=n_embd, vocab_size=96, block_size=32, positions="rope")
    return GPT(config, np.random.default_rng(seed), dtype)


def grown(base, n=3, tables=("wte.weight", "embed_tokens.weight", "lm_head.weight"), **config):
    """`base` with n more tokens after those it had, or with more rows in other `tables`; their numbers are drawn."""
    rng = np.random.default_rng(n)
    longer = lambda p: Tensor(np.concatenate([p.data, rng.standard_normal((n, p.shape[1])).astype(p.dtype)]))
    model = base.rebuild(lambda name, x: longer(x) if name in tables else None)
    model.config = replace(base.config, **config or {"vocab_size": base.config.vocab_size + n})
    return model


def trained_adapter(base, seed=1, r=2, alpha=4, target_modules=("q_proj", "mlp.up_proj"), **more):
    """An adapter whose B is not zero, as if it had been trained; its names are those of this library."""
    adapter = init_adapter(base, LoRAConfig(r, alpha, target_modules, **more), np.random.default_rng(seed))
    return learned(adapter, seed, 1.0)


def receipt_fields(date="2026-11-27T09:48:37.120Z", steps=4, **changes):
    """The fields of a receipt but for its tensors, as a run of so many steps would write them."""
    run = {
        "data": {"path": "d/notes.txt", "sha256": "ab" * 32, "trained_on": "100 tokens", "held_out": "20 tokens"},
        "settings": {"seed": 7}, "arrays": "numpy", "parts": 2, "steps": steps, "tokens": 80, "seconds": 0.25,
        "losses": {"first": 4.5, "last": 3.25, "held_out_before": 4.75, "held_out_after": 3.5, "best_step": 2},
    }  # fmt: skip
    return {
        "date": date, "command": "minilora finetune --base b --data d.txt", "parents": [],
        "base": {"name": "b", "fingerprint": "0123456789abcdef"}, "run": run,
        "versions": {"minilora": "0.6.0", "python": "3.11.1", "numpy": "2.4.6"},
        "machine": {"processor": "a processor", "blas": "a BLAS"},
        "updates": {"h.0.q_proj": {"norm": 0.5, "share": None}}, **changes,
    }  # fmt: skip


def bits(module):
    """{name: (dtype, shape, bytes)} of every tensor: equal only if equal to the bit, and to the sign of a zero."""
    arrays = {name: to_numpy(p.data) for name, p in module.named_parameters()}
    return {name: (a.dtype.name, a.shape, a.tobytes()) for name, a in arrays.items()}


def same_adapter(a, b):
    """Equal to the bit, also in their scalings, of equal configuration, and with the same tensors shared."""
    sharing = lambda adapter: [list(map(id, adapter.parameters())).index(id(p.lora_A)) for p in adapter.pairs.values()]
    scalings = lambda adapter: {name: pair.scaling for name, pair in adapter.pairs.items()}
    same_pairs = list(a.pairs) == list(b.pairs) and scalings(a) == scalings(b) and sharing(a) == sharing(b)
    return bits(a) == bits(b) and a.config == b.config and same_pairs


def write_tensors(path, arrays, metadata=None, bfloat16=()):
    """A safetensors file put together by hand; arrays named in `bfloat16` are cut to the upper half of a float32."""
    header, data = {} if metadata is None else {"__metadata__": metadata}, b""
    for name, array in arrays.items():
        code, array = TYPE_CODES[array.dtype.name], np.ascontiguousarray(array)
        if name in bfloat16:
            code, array = "BF16", (array.astype("<f4").view("<u4") >> 16).astype("<u2")
        span = [len(data), len(data) + array.nbytes]
        header[name], data = {"dtype": code, "shape": list(array.shape), "data_offsets": span}, data + array.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def resident_file_pages():
    """How many bytes of mapped files are in this process's memory."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssFile:\s+(\d+)", status)[1])


def put(**fields):
    """A change to a folder: these fields of its configuration."""
    return lambda config, tensors: config.update(fields)


def drop(*keys):
    """A change to a folder: without these fields of its configuration."""
    return lambda config, tensors: [config.pop(key) for key in keys]


def tensor(name, value):
    """A change to a folder: a tensor is an array, or what a function makes of it; None takes it out."""

    def change(config, tensors):
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value(tensors[name]) if callable(value) else value

    return change
