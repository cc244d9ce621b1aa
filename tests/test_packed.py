"""Weights that stay in few bits: what they are widened to, and that a model computes as if they were those numbers."""

import contextlib
import copy
import gc
import os
import pickle
import subprocess
import sys
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ops import refuses
from strategies import contents, learned, new_adapter, rngs, tiny_llama

from minilora import packed
from minilora.count import activation_bytes, parameter_report
from minilora.graph import no_grad
from minilora.lora import attach, merge
from minilora.nn import Embedding, Linear
from minilora.packed import BLOCKS, NF4, Packed, PackedTensor, StoredTensor, float8_table, packed_linear
from minilora.quant import KINDS, quantize, stored_as, widen
from minilora.tensor import Tensor
from minilora.training.parts import PartWorkers

every_kind = pytest.mark.parametrize("kind", [*BLOCKS, "F16", "BF16", "NF4"])


def random_packed(kind, rng, rows=3, columns=64):
    """A PackedTensor of random bytes: every code occurs, and scales are finite."""
    shape = (rows, columns)
    if kind in ("F16", "BF16"):
        values = rng.standard_normal(shape).astype(np.float16 if kind == "F16" else np.float32)
        bits = values.view(np.uint16) if kind == "F16" else (values.view(np.uint32) >> 16).astype(np.uint16)
        return PackedTensor(kind, shape, bits)
    if kind == "NF4":
        n = -(-rows * columns // 64)
        codes, scales = rng.integers(0, 256, (n, 32), np.uint8), rng.integers(0, 256, n, np.uint8)
        return PackedTensor(kind, shape, codes, scales, np.full(-(-n // 256), 0.5, np.float32), np.float32([2.0]))
    n_weights, n_bytes = BLOCKS[kind]
    blocks = rng.integers(0, 256, (rows * columns // n_weights, n_bytes), np.uint8)
    numbers = {"Q8_0": 1, "Q4_0": 1, "Q4_1": 2}[kind]
    blocks[:, : 2 * numbers] = rng.standard_normal((len(blocks), numbers)).astype(np.float16).view(np.uint8)
    return PackedTensor(kind, shape, blocks.reshape(rows, -1))


def by_the_definition(tensor):
    """Each weight on its own, from the bytes, as the table at the top of packed.py has it."""
    values = np.empty(tensor.size, np.float32)
    arrays = [np.asarray(a) for a in tensor.packed.arrays]
    for i in range(tensor.size):
        if tensor.kind == "F16":
            values[i] = arrays[0].view(np.float16).ravel()[i]
        elif tensor.kind == "BF16":
            values[i] = np.array([int(arrays[0].ravel()[i]) << 16], np.uint32).view(np.float32)[0]
        elif tensor.kind == "NF4":
            codes, scales, of_scales, mean = arrays
            byte = codes.ravel()[i // 2]
            scale = float8_table()[scales[i // 64]] * of_scales[i // 64 // 256] + mean[0]
            values[i] = np.float32(NF4[byte >> 4 if i % 2 == 0 else byte & 15]) * scale
        else:
            block = arrays[0].reshape(-1, BLOCKS[tensor.kind][1])[i // 32]
            d, m = block[:2].view(np.float16)[0], block[2:4].view(np.float16)[0]
            if tensor.kind == "Q8_0":
                values[i] = np.float32(block[2:].view(np.int8)[i % 32]) * np.float32(d)
                continue
            byte = block[2 if tensor.kind == "Q4_0" else 4 :][i % 16]
            q = np.float32(byte & 15 if i % 32 < 16 else byte >> 4)
            offset = np.float32(m)
            values[i] = (q - 8) * np.float32(d) if tensor.kind == "Q4_0" else q * np.float32(d) + offset
    return values.reshape(tensor.shape)


@every_kind
@given(rngs, st.integers(1, 5), st.integers(1, 3))
def test_it_is_widened_to_what_its_bytes_say(kind, rng, rows, blocks):
    tensor = random_packed(kind, rng, rows, 32 * blocks)
    assert tensor.data.dtype == np.float32 and np.array_equal(tensor.data, by_the_definition(tensor))


@every_kind
def test_in_steps_of_any_size_it_is_widened_to_the_same(monkeypatch, kind):
    tensor = random_packed(kind, np.random.default_rng(0), 7, 96)
    whole = tensor.data
    monkeypatch.setattr(packed, "STRIDE", 128)
    assert np.array_equal(tensor.data, whole)


@every_kind
def test_rows_are_widened_alone(kind):
    tensor, ids = random_packed(kind, np.random.default_rng(0), 9), np.array([[8, 0], [3, 3]])
    assert np.array_equal(tensor.packed.rows(ids), tensor.data[ids])
    assert np.array_equal(Embedding(tensor)(ids).data, tensor.data[ids])
    with pytest.raises(ValueError, match="token ids lie in 9"):
        Embedding(tensor)([9])


@pytest.mark.parametrize("kind", [*BLOCKS, "F16"])
def test_the_library_gguf_widens_it_to_the_same_numbers(kind):
    gguf = pytest.importorskip("gguf")
    tensor = random_packed(kind, np.random.default_rng(1), 16, 256)
    stored = tensor.packed.arrays[0]
    stored = stored.view(np.float16) if kind == "F16" else stored
    theirs = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(tensor.data, theirs)


@every_kind
def test_on_another_backend_it_is_the_same(kind, device_xp):
    tensor = random_packed(kind, np.random.default_rng(2))
    moved = tensor.to_device(device_xp)
    x = np.random.default_rng(3).standard_normal((2, 64)).astype(np.float32)
    assert moved.xp is device_xp and moved.kind == kind and moved.nbytes == tensor.nbytes
    assert np.array_equal(device_xp.asnumpy(moved.data), tensor.data)
    y = packed_linear(Tensor(device_xp.asarray(x)), moved).data
    assert np.allclose(device_xp.asnumpy(y), packed_linear(Tensor(x), tensor).data, rtol=1e-5, atol=1e-4)
    back = moved.to_device(np)
    assert all(np.array_equal(a, b) for a, b in zip(back.packed.arrays, tensor.packed.arrays, strict=True))


# --- in a model -------------------------------------------------------------------------------------------------------


def packed_model(kind):
    """A small Llama whose every matrix is packed, the embedding too where its rows have whole blocks."""
    base = tiny_llama(dtype="float32", hidden_size=64, intermediate_size=96, head_dim=16, tie_word_embeddings=True)
    rng = np.random.default_rng(4)
    return base.rebuild(lambda name, t: random_packed(kind, rng, *t.shape) if getattr(t, "ndim", 0) == 2 else None)


IDS = np.array([[1, 2, 3, 4, 5], [8, 0, 7, 7, 1]])


def logits(model):
    with no_grad():
        return model(IDS).data


def loss_and_gradients(model, adapter):
    loss = model.loss(IDS[:, :-1], IDS[:, 1:])
    loss.backward()
    return [loss.data, *(p.grad for p in adapter.parameters())]


def computes_as_widened(kind):
    """To the bit: the same numbers go through the same products."""
    base = packed_model(kind)
    wide = widen(base)
    assert np.array_equal(logits(base), logits(wide)) and stored_as(wide) == {}
    both = []
    for model in (base, wide):
        adapter = learned(new_adapter(model))
        both.append([logits(attach(model, adapter)), *loss_and_gradients(attach(model, adapter), adapter)])
    assert all(np.array_equal(a, b) for a, b in zip(*both, strict=True))


@every_kind
def test_logits_and_gradients_are_those_of_the_widened_model_to_the_bit(kind):
    computes_as_widened(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_on_another_backend_is_the_same(kind, device_xp):
    """The weights are as large as those of a model that was trained: random bytes would saturate attention."""
    base = quantize(tiny_llama(dtype="float32", hidden_size=64, intermediate_size=96, head_dim=16), kind)
    adapter = learned(new_adapter(base))
    host = loss_and_gradients(attach(base, adapter), adapter)
    base, adapter = base.to_device(device_xp), adapter.to_device(device_xp)
    assert set(stored_as(base).values()) == {kind}
    for ours, theirs in zip(loss_and_gradients(attach(base, adapter), adapter), host, strict=True):
        assert np.allclose(device_xp.asnumpy(ours), theirs, rtol=1e-3, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.parametrize("wrong", [
    lambda self: np.sort(Packed.right(self), axis=0),
    lambda self: Packed.right(self) * np.float32(1.0001),
], ids=["rows", "scale"])
def test_planted_a_product_with_other_numbers_is_noticed(monkeypatch, wrong):
    """Where the layer widens, and nowhere else."""
    monkeypatch.setattr(Packed, "right", Packed.widened, raising=False)
    product = packed.packed_linear

    def planted(x, weight, bias=None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Packed, "widened", wrong)
            return product(x, weight, bias)

    monkeypatch.setattr("minilora.nn.packed_linear", planted)
    with pytest.raises(AssertionError):
        computes_as_widened("Q4_1")


def test_who_asks_while_another_holds_the_values_is_given_the_same_array():
    for kind in (*BLOCKS, "NF4"):
        tensor = random_packed(kind, np.random.default_rng(0))
        held = tensor.data
        assert np.shares_memory(tensor.data, held) and not held.flags.writeable
        address = held.ctypes.data
        turned = held.T
        del held
        assert tensor.data.ctypes.data == address
        del turned
        assert tensor.packed.held_values() is None


def widened_on_two_threads(monkeypatch, tensor):
    """How often the values are made when two threads ask for them at once and hold them."""
    made, both_ask = [], threading.Barrier(2)
    values = Packed._values

    def slow(self):
        made.append(1)
        time.sleep(0.05)
        return values(self)

    def ask():
        both_ask.wait(timeout=10)
        return tensor.data

    monkeypatch.setattr(Packed, "_values", slow)
    with ThreadPoolExecutor(2) as pool:
        held = [job.result() for job in [pool.submit(ask) for _ in range(2)]]
    assert np.array_equal(*held)
    return len(made)


def test_two_threads_that_ask_at_once_are_given_one_array(monkeypatch):
    tensor = random_packed("Q4_1", np.random.default_rng(0))
    assert widened_on_two_threads(monkeypatch, tensor) == 1
    tensor.packed.lock = contextlib.nullcontext()  # planted: no lock
    assert widened_on_two_threads(monkeypatch, tensor) == 2


@every_kind
def test_a_model_with_packed_weights_can_be_copied_and_pickled(kind):
    base = packed_model(kind)
    for other in (copy.deepcopy(base), pickle.loads(pickle.dumps(base))):
        assert stored_as(other) == stored_as(base) and contents(other) == contents(base)


UNDER_A_KERNEL = """
import numpy, threadpoolctl
from test_packed import BLOCKS, computes_as_widened
a = numpy.ones((9, 9))
a @ a
for kind in [*BLOCKS, "F16", "BF16", "NF4"]:
    computes_as_widened(kind)
print(*{pool.get("architecture") for pool in threadpoolctl.threadpool_info()})
"""


@pytest.mark.parametrize("kernel", ["Haswell", "Sandybridge", "Nehalem", "Prescott"])
def test_so_they_are_under_the_matrix_products_of_other_processors(kernel):
    """In a Python of its own: OpenBLAS chooses its kernels as it is loaded."""
    folder = Path(__file__).parent
    environment = {**os.environ, "OPENBLAS_CORETYPE": kernel, "PYTHONPATH": f"{folder.parent}{os.pathsep}{folder}"}
    done = subprocess.run([sys.executable, "-c", UNDER_A_KERNEL], env=environment, capture_output=True, text=True)
    if done.returncode < 0:
        pytest.skip(f"this processor cannot run the kernels of {kernel}")
    assert done.returncode == 0, done.stderr
    if kernel not in done.stdout:
        pytest.skip(f"asked for {kernel}, this BLAS ran {done.stdout.strip()}")


def test_parts_on_threads_compute_with_it():
    base = packed_model("Q4_0")
    adapters = [learned(new_adapter(base)) for _ in range(2)]
    for adapter, threads in zip(adapters, (1, 2), strict=True):
        with PartWorkers(attach(base, adapter), parts=2, threads=threads) as workers:
            workers.backward([(IDS[:, :-1], IDS[:, 1:])])
    for a, b in zip(*(a.parameters() for a in adapters), strict=True):
        assert np.array_equal(a.grad, b.grad)


def test_it_is_merged_by_widening_the_adapted_weights_alone():
    base = packed_model("Q8_0")
    adapter = learned(new_adapter(base, targets=["q_proj"]))
    before = contents(base)
    merged = merge(attach(base, adapter))
    kinds = stored_as(merged)
    assert not any("q_proj" in name for name in kinds) and len(kinds) == len(stored_as(base)) - len(adapter.pairs)
    weight = dict(merged.named_parameters())["layers.0.self_attn.q_proj.weight"].data
    pair = adapter.pairs["layers.0.self_attn.q_proj"]
    assert np.array_equal(weight, dict(base.named_parameters())["layers.0.self_attn.q_proj.weight"].data + pair.delta())
    assert contents(base) == before


def peak_of_a_step(base):
    """The most bytes that a step takes beside what is there before it."""
    adapter = learned(new_adapter(base))
    model = attach(base, adapter)
    step = lambda: model.loss(IDS[:, :-1], IDS[:, 1:]).backward()
    step()
    gc.collect()
    tracemalloc.start()
    step()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def test_training_holds_no_second_copy_of_the_model():
    """One weight at a time is wide: a step takes that much more than with wide weights, however many there are."""
    base = tiny_llama(dtype="float32", hidden_size=64, intermediate_size=2048, head_dim=16, num_hidden_layers=8)
    one_weight = 4 * 64 * 2048
    assert peak_of_a_step(quantize(base, "q4_0")) - peak_of_a_step(base.frozen()) < 3 * one_weight
    wide_bytes = 4 * sum(t.size for t in quantize(base, "q4_0").parameters() if isinstance(t, PackedTensor))
    assert wide_bytes > 20 * one_weight


def test_what_is_counted_is_what_is_stored():
    base = packed_model("Q4_1")
    report = parameter_report(base)
    packed_bytes = sum(t.nbytes for t in base.parameters() if isinstance(t, PackedTensor))
    n = sum(t.size for t in base.parameters() if isinstance(t, PackedTensor))
    assert packed_bytes == n * 20 // 32 and report.total_bytes == packed_bytes + 4 * (report.total - n)
    adapter = new_adapter(base)
    wide = attach(widen(base), adapter)
    held = [activation_bytes(m.loss(IDS[:, :-1], IDS[:, 1:]), m) for m in (attach(base, adapter), wide)]
    assert held[0] == held[1]


def test_it_takes_x_in_float64_to_be_checked():
    tensor = random_packed("BF16", np.random.default_rng(5))
    x = Tensor(np.ones((2, 64)))
    assert packed_linear(x, tensor).dtype == np.float64
    model = packed_model("Q4_1").astype("float64")
    assert stored_as(model) == {} and {p.dtype.name for p in model.parameters()} == {"float64"}
    copy = packed_model("Q4_1").trainable_copy()
    assert all(p.requires_grad and p.data.flags.writeable for p in copy.parameters())


# --- frozen and read-only ---------------------------------------------------------------------------------------------


def test_nobody_writes_what_a_file_holds():
    array = np.ones((2, 3), np.float32)
    stored = StoredTensor(array)
    with pytest.raises(ValueError, match="read-only"):
        stored.data[0] = 2
    array[0] = 2  # who made the array may: a file's map belongs to nobody
    assert not stored.requires_grad
    with pytest.raises(ValueError, match="read-only"):
        random_packed("Q8_0", np.random.default_rng(0)).packed.arrays[0][0] = 1
    with pytest.raises(AttributeError):
        random_packed("Q8_0", np.random.default_rng(0)).data = array


def test_what_is_asked_of_its_values_is_computed_once():
    calls = []
    question = lambda data: calls.append(data.sum()) or len(calls)
    for i, tensor in enumerate((StoredTensor(np.ones(3, np.float32)), random_packed("Q4_0", np.random.default_rng(0)))):
        assert [tensor.once(question) for _ in range(3)] == [i + 1] * 3


def test_a_base_and_its_widened_twin_have_one_fingerprint():
    base = packed_model("Q4_1")
    other = packed_model("Q4_0")
    assert base.fingerprint() == widen(base).fingerprint() != other.fingerprint()
    assert base.frozen().embed_tokens.weight is base.embed_tokens.weight


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, shape, array, shown", [
    ("Q5_K", (2, 32), np.zeros((2, 34), np.uint8), ["'Q5_K'", "Q8_0, Q4_0, Q4_1, F16, BF16, NF4"]),
    ("Q8_0", (2, 33), np.zeros((2, 34), np.uint8), ["blocks of 32", "rows of 33"]),
    ("Q8_0", (64,), np.zeros(68, np.uint8), ["(64,)", "blocks fill matrices"]),
    ("Q8_0", (2, 32), np.zeros((2, 33), np.uint8), ["(2, 34)", "(2, 33)"]),
    ("Q8_0", (2, 32), np.zeros((2, 34), np.int8), ["uint8", "int8"]),
    ("BF16", (2, 3), np.zeros((2, 3), np.float16), ["uint16", "float16"]),
    ("NF4", (2, 32), np.zeros((1, 32), np.uint8), ["(1, 32)", "float32"]),
])  # fmt: skip
def test_bytes_that_do_not_hold_such_a_weight_are_refused(kind, shape, array, shown):
    refuses(lambda: PackedTensor(kind, shape, array), ValueError, shown)


def test_a_product_that_does_not_fit_is_refused():
    weight = random_packed("Q8_0", np.random.default_rng(0))
    refuses(lambda: packed_linear(Tensor(np.ones((2, 63), np.float32)), weight), ValueError, ["(2, 63)", "(3, 64)"])
    x, bias = Tensor(np.ones((2, 64), np.float32)), Tensor(np.ones(3))
    refuses(lambda: packed_linear(x, weight, bias), TypeError, ["float32", "float64"])
    with pytest.raises(ValueError, match="bias"):
        Linear(weight, Tensor(np.ones(4, np.float32)))


def test_every_kind_that_is_made_can_be_stored():
    assert set(KINDS) == {"NF4", *BLOCKS}
