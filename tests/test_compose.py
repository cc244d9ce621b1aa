"""Sums of adapters, exact; compressed ones, with an error that no other of their rank beats; and adapters extracted.

Knows no GPT and no files: what is saved, and what PEFT makes of it, is in tests/disk/test_peft.py and tests/peers.
"""

import math
from collections import namedtuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    SCALINGS,
    TinyMLP,
    contents,
    float_dtypes,
    hunt,
    integer_arrays,
    learned,
    new_adapter,
    rngs,
    sides,
    small_gpt,
    small_llama,
    tiny_mlp,
    trained_adapter,
)

from minilora import compose
from minilora.backend import to_device
from minilora.compose import combine, compress, extract, spectrum
from minilora.dora import init_dora
from minilora.lora import Adapter, LoRAPair, attach, merge
from minilora.lora_config import LoRAConfig
from minilora.low_rank import Distance
from minilora.nn import Linear, table_rows
from minilora.quant import quantize
from minilora.stack import stack
from minilora.tensor import Tensor

Sum = namedtuple("Sum", "base adapters weights")


def deltas(adapter):
    return {name: pair.delta() for name, pair in adapter.pairs.items()}


def exact_deltas(adapter):
    """ΔW of each pair in float64, of what is stored."""
    return {name: pair.delta() for name, pair in adapter.astype("float64").pairs.items()}


def adapter_of(base, pairs, dropout=0.0):
    r = max(pair.r for pair in pairs.values())
    return Adapter(LoRAConfig(r, r, tuple(pairs), dropout), pairs, base.fingerprint())


# --- combine: the algebra, to the last bit ---------------------------------------------------------------------------


@st.composite
def lattice_sums(draw):
    """A base of two linears of whole numbers, adapters for one or both of them, and weights."""
    dtype, n, m, k = draw(float_dtypes), draw(sides), draw(sides), draw(sides)
    array = lambda *shape: draw(integer_arrays(shape, dtype=dtype))
    tensor = lambda *shape: Tensor(array(*shape), requires_grad=True)
    base = TinyMLP([Linear(Tensor(array(m, n)), Tensor(array(m))), Linear(Tensor(array(k, m)))])
    sizes = {"layers.0": (m, n), "layers.1": (k, m)}

    def adapter():
        names = draw(st.sampled_from([["layers.0"], ["layers.1"], ["layers.1", "layers.0"]]))
        r = {name: draw(sides) for name in names}
        pairs = {
            name: LoRAPair(
                tensor(r[name], sizes[name][1]), tensor(sizes[name][0], r[name]), draw(st.sampled_from(SCALINGS))
            )
            for name in names
        }
        return adapter_of(base, pairs)

    adapters = [adapter() for _ in range(draw(st.integers(1, 3)))]
    weights = [draw(st.sampled_from([-3, -1.0, -0.5, 0, 1, 2.0])) for _ in adapters]
    return Sum(base, adapters, weights)


def is_the_sum(case):
    """Update for update, and merged into the base, a sum is what whole numbers add up to."""
    base, adapters, weights = case
    combined = combine(adapters, weights)
    expected = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, delta in deltas(adapter).items():
            expected[name] = expected.get(name, 0) + weight * delta
    assert combined.pairs.keys() == expected.keys()
    merged = dict(merge(attach(base, combined)).named_parameters())
    for name, W in base.named_parameters():
        update = expected.get(name.removesuffix(".weight"), 0)
        assert np.array_equal(merged[name].data, W.data + update) and merged[name].dtype == W.dtype
    for name, pair in combined.pairs.items():
        assert np.array_equal(pair.delta(), expected[name])
        assert pair.r == sum(a.pairs[name].r for a in adapters if name in a.pairs)


@given(lattice_sums())
def test_a_combined_adapter_is_the_weighted_sum_to_the_bit(case):
    is_the_sum(case)


def with_coefficient(change):
    """`combine` with another number in the place of weight · scaling."""
    times = compose._times
    return "_times", lambda array, number: times(array, change(number))


def with_terms(change):
    return "_side_by_side", lambda name, terms, joined: TRUE_SIDE_BY_SIDE(name, change(terms), joined)


TRUE_SIDE_BY_SIDE = compose._side_by_side


def rows_of_A_in_reverse(name, terms, joined):
    A = np.concatenate([pair.lora_A.data for _, pair in terms])
    joined[tuple(id(pair.lora_A) for _, pair in terms)] = Tensor(A[::-1].copy())
    return TRUE_SIDE_BY_SIDE(name, terms, joined)


def scaled_once_more(name, terms, joined):
    pair = TRUE_SIDE_BY_SIDE(name, terms, joined)
    return LoRAPair(pair.lora_A, pair.lora_B, terms[0][1].scaling)


PLANTED = {
    "signs dropped": with_coefficient(abs),
    "weights left out": with_coefficient(lambda number: 1.0),
    "weights squared": with_coefficient(lambda number: number * number),
    "the last adapter left out": with_terms(lambda terms: terms[:-1] or terms),
    "weights in the wrong order": with_terms(
        lambda terms: [(w, pair) for (w, _), (_, pair) in zip(terms[::-1], terms, strict=True)]
    ),
    "rows of A in the wrong order": ("_side_by_side", rows_of_A_in_reverse),
    "the scaling once more": ("_side_by_side", scaled_once_more),
}


@pytest.mark.parametrize("name, bug", PLANTED.values(), ids=PLANTED)
def test_each_planted_bug_in_the_sum_is_killed(monkeypatch, name, bug):
    monkeypatch.setattr(compose, name, bug)
    with pytest.raises(AssertionError):
        hunt(lattice_sums(), is_the_sum)


# No power of two, so that they round, and not so small that a product is no normal number.
rounding_weights = st.integers(-99, 99).map(lambda n: n / 13)


@given(float_dtypes, rounding_weights, rounding_weights)
def test_on_real_numbers_a_sum_is_off_by_one_rounding_of_each_entry_of_B(dtype, one, two):
    base = tiny_mlp(5, 4, dtype=dtype)
    adapters = [learned(new_adapter(base, r, alpha, seed=seed), seed) for r, alpha, seed in ((2, 3, 1), (3, 0.7, 2))]
    combined = combine(adapters, [one, two])
    exact = one * exact_deltas(adapters[0])["layers.0"] + two * exact_deltas(adapters[1])["layers.0"]
    # |B'| |A|, entry by entry, times the unit of the dtype; and what float64 adds to that while it is computed here.
    pair = combined.astype("float64").pairs["layers.0"]
    size = np.abs(pair.lora_B.data) @ np.abs(pair.lora_A.data)
    unit = np.finfo(dtype).eps / 2
    computed = 16 * np.finfo(np.float64).eps * size
    assert np.all(np.abs(pair.delta() - exact) <= 1.01 * unit * size + computed)


def test_a_sum_is_independent_of_what_it_was_made_of_and_can_be_trained():
    base = tiny_mlp(6, 5, 4)
    adapters = [learned(new_adapter(base, r, seed=r, dropout=0.5), r) for r in (2, 3)]
    before = [contents(adapter) for adapter in adapters]
    combined = combine(adapters, (np.float32(0.5), np.int64(-2)))
    assert combined.config.dropout == 0 and combined.base_fingerprint == base.fingerprint()
    attach(base, combined)(Tensor(np.ones((2, 6), np.float32))).sum().backward()
    for p in combined.parameters():
        assert p.grad is not None
        p.data += 1
    assert [contents(adapter) for adapter in adapters] == before


def shared_A(base, names, r, seed):
    """An adapter whose pairs for `names` have one lora_A, as those of PEFT's c_attn."""
    adapter = learned(new_adapter(base, r, targets=names, seed=seed), seed)
    first = adapter.pairs[names[0]].lora_A
    pairs = {name: LoRAPair(first, p.lora_B, p.scaling * (i + 1)) for i, (name, p) in enumerate(adapter.pairs.items())}
    return Adapter(adapter.config, pairs, adapter.base_fingerprint)


QKV = [f"h.0.attn.{part}_proj" for part in "qkv"]


def test_pairs_that_share_an_A_in_every_adapter_share_one_in_the_sum_and_others_do_not():
    base = small_gpt(dtype="float64")
    one, two = shared_A(base, QKV, 2, 1), shared_A(base, QKV, 3, 2)
    both = combine([one, two], [2, -1])
    assert len({id(pair.lora_A) for pair in both.pairs.values()}) == 1 and len(both.parameters()) == 4
    apart = combine([one, learned(new_adapter(base, 1, targets=QKV[:1]))], [2, -1])
    q, k, v = (apart.pairs[name] for name in QKV)
    assert k.lora_A is v.lora_A and q.lora_A is not k.lora_A and (q.r, k.r) == (3, 2)
    for name in QKV:
        assert np.allclose(both.pairs[name].delta(), 2 * one.pairs[name].delta() - two.pairs[name].delta(), atol=1e-12)


def test_the_record_says_r_and_alpha_of_every_pair():
    base = small_gpt()
    one = trained_adapter(base, r=2, target_modules=["q_proj", "mlp.up_proj"])
    two = trained_adapter(base, r=3, alpha=5, target_modules=["h.1.mlp.up_proj"], use_rslora=True)
    for adapter in (combine([one, two], [1, -0.5]), compress(one, 1).adapter, combine([two], [1])):
        assert all(adapter.config.r_of(name) == pair.r for name, pair in adapter.pairs.items())
        assert {adapter.config.scaling_of(name) for name in adapter.pairs} == {1.0}
        assert {pair.scaling for pair in adapter.pairs.values()} == {1.0}
    assert combine([one, two], [1, 1]).config.rank_pattern == {"h.1.mlp.up_proj": 5}


def test_a_name_that_ends_another_one_has_a_pattern_of_its_own():
    base = TinyMLP([])
    tensor = lambda *shape: Tensor(np.ones(shape), requires_grad=True)
    ranks = {"proj": 1, "mlp.proj": 2, "o": 3, "x": 3}
    adapter = combine([adapter_of(base, {name: LoRAPair(tensor(r, 2), tensor(2, r), 1) for name, r in ranks.items()})],
                      [1])  # fmt: skip
    assert {name: adapter.config.r_of(name) for name in ranks} == ranks


# --- which adapters can be added -------------------------------------------------------------------------------------


BASE = tiny_mlp(6, 5, 4)
ONE = learned(new_adapter(BASE))


def changed(adapter, pairs=None, base_fingerprint=None):
    return Adapter(adapter.config, pairs or adapter.pairs, base_fingerprint)


def with_dora():
    pairs = init_dora(BASE, LoRAConfig(2, 4, ["layers.1"]), np.random.default_rng(0)).pairs
    return changed(ONE, ONE.pairs | pairs)


def broken(number):
    adapter = learned(new_adapter(BASE))
    adapter.pairs["layers.1"].lora_A.data[0, 0] = number
    return adapter


def outgrowing():
    """Whole in float32, but for lora_B with its scaling of 16."""
    pair = learned(new_adapter(BASE)).pairs["layers.1"]
    pair.lora_B.data[0, 0] = 1e38
    return changed(ONE, ONE.pairs | {"layers.1": LoRAPair(pair.lora_A, pair.lora_B, 16.0)})


@pytest.mark.parametrize("adapters, weights, error, says", [
    ([], [], ValueError, ["no adapters", "at least one"]),
    ([ONE], [], ValueError, ["1 adapters and 0 weights", "one for each"]),
    ([ONE], [1, 2], ValueError, ["1 adapters and 2 weights"]),
    ([ONE], [math.nan], ValueError, ["finite numbers", "nan"]),
    ([ONE, ONE], [1, -math.inf], ValueError, ["finite numbers", "-inf"]),
    ([ONE], ["1"], ValueError, ["finite numbers", "'1'"]),
    ([ONE], [True], ValueError, ["finite numbers", "True"]),
    ([ONE], [10**400], ValueError, ["finite numbers"]),
    ([ONE], [1e39], ValueError, ["layers.0", "outgrows float32", "1e+39", "smaller"]),
    ([stack([ONE, None])], [1], TypeError, ["BatchAdapter", "of a stack give the adapters in it"]),
    ([ONE, None], [1, 1], TypeError, ["NoneType"]),
    ([BASE], [1], TypeError, ["TinyMLP"]),
    ([ONE, with_dora()], [1, 1], ValueError, ["layers.1 has a DoRAPair", "only plain LoRA", "merge it"]),
    ([broken(math.inf)], [1], ValueError, ["layers.1.lora_A holds inf or nan"]),
    ([ONE, learned(new_adapter(tiny_mlp(6, 5, 4, seed=1)))], [1, 1], ValueError,
     ["adapters 1 and 2 belong to different bases", "2 of 4 tensors differ", "layers.0.weight first",
      "check_base=False"]),
    ([learned(new_adapter(tiny_mlp(6, 5))), ONE], [1, 1], ValueError, ["2 of 4 tensors differ, layers.1.weight first"]),
    ([changed(ONE), changed(learned(new_adapter(tiny_mlp(6, 7, 4))))], [1, 1], ValueError,
     ["layers.0 is (5, 6)", "(7, 6) for another"]),
    ([changed(ONE), changed(learned(new_adapter(tiny_mlp(6, 5, 4, dtype="float64"))))], [1, 1], TypeError,
     ["layers.0 mixes float32 and float64"]),
])  # fmt: skip
def test_what_cannot_be_added_is_refused_with_both_sides(adapters, weights, error, says):
    with pytest.raises(error) as caught:
        combine(adapters, weights)
    assert str(caught.value).startswith("combine: ") and all(part in str(caught.value) for part in says)


def test_adapters_of_two_backends_are_refused(device_xp):
    other = changed(learned(new_adapter(BASE.to_device(device_xp))))
    with pytest.raises(TypeError, match="in one operation"):
        combine([changed(ONE), other], [1, 1])


def test_a_sum_knows_its_base_only_if_all_of_it_does():
    unknown, other = changed(ONE), learned(new_adapter(tiny_mlp(6, 5, 4, seed=1)))
    assert combine([ONE, ONE], [1, 1]).base_fingerprint == BASE.fingerprint()
    for adapters in ([ONE, unknown], [unknown, ONE], [unknown]):
        assert combine(adapters, [1] * len(adapters)).base_fingerprint is None
    assert combine([ONE, other], [1, 1], check_base=False).base_fingerprint is None
    # The second says nothing: the third is compared with the first.
    with pytest.raises(ValueError, match="adapters 1 and 3 belong to different bases"):
        combine([ONE, unknown, other], [1, 1, 1])


def test_a_sum_says_how_its_base_was_stored():
    base = quantize(small_gpt(), "nf4")
    one = trained_adapter(base)
    assert one.base_stored and combine([one, one], [1, 1]).base_stored == one.base_stored
    assert one.base_rows and combine([one, one], [1, 1]).base_rows == one.base_rows
    unpacked = Adapter(one.config, one.pairs, one.base_fingerprint)
    assert combine([unpacked, one], [1, 1]).base_stored == one.base_stored
    assert combine([unpacked, one], [1, 1]).base_rows == one.base_rows
    # Of several bases, or of none that is known, nothing is said.
    assert combine([one, changed(one)], [1, 1], check_base=False).base_rows == {}


# --- compress --------------------------------------------------------------------------------------------------------


UNIT = {"float32": np.finfo(np.float32).eps / 2, "float64": np.finfo(np.float64).eps / 2}


def margins(adapter, full):
    """What rounding to the adapter's dtype may move ‖ΔW - ΔW'‖ by, and what float64 may, for each module.

    |B'| |A'| bounds the first entry by entry; the second is a multiple of the unit times ‖ΔW‖ here, where no factor is
    badly scaled.
    """
    margins = {}
    for name, pair in adapter.astype("float64").pairs.items():
        u = UNIT[adapter.pairs[name].lora_A.dtype.name]
        stored = (2 * u + u**2) * np.linalg.norm(np.abs(pair.lora_B.data) @ np.abs(pair.lora_A.data))
        margins[name] = stored, 1e-13 * np.linalg.norm(full[name])
    return margins


def tail(matrix, r):
    return math.sqrt((np.linalg.svd(matrix, compute_uv=False)[r:] ** 2).sum())


def check_compressed(adapter, r):
    full = exact_deltas(adapter)
    small, errors, left_out = compress(adapter, r)
    assert small.pairs.keys() == errors.keys() == adapter.pairs.keys() and left_out == {}
    assert list(small.pairs) == list(adapter.pairs) == list(errors)
    for name, (stored, computed) in margins(small, full).items():
        assert small.pairs[name].r <= r and small.pairs[name].lora_A.dtype == adapter.pairs[name].lora_A.dtype
        true_error = np.linalg.norm(full[name] - exact_deltas(small)[name])
        assert abs(errors[name].absolute - true_error) <= computed
        least = tail(full[name], r)
        assert least - computed <= errors[name].absolute <= least + stored + computed
        assert math.isclose(errors[name].relative, true_error / np.linalg.norm(full[name]), rel_tol=1e-9, abs_tol=1e-13)
    assert small.base_fingerprint == adapter.base_fingerprint and small.base_stored == adapter.base_stored
    return small


@st.composite
def real_adapters(draw):
    """An adapter of real numbers for two linears, also with ranks above min(in, out)."""
    dtype, seed = draw(float_dtypes), draw(st.integers(0, 99))
    base = tiny_mlp(6, 5, 4, dtype=dtype)
    ranks = draw(st.lists(st.integers(1, 4), min_size=1, max_size=2))
    adapters = [learned(new_adapter(base, r, 3, seed=seed + r), seed) for r in ranks]
    return combine(adapters, [1, -0.7][: len(ranks)])


@given(real_adapters(), st.integers(1, 7))
def test_the_error_of_compressing_is_the_tail_of_the_spectrum_and_is_what_it_says(adapter, r):
    check_compressed(adapter, r)


TRUE_BEST = compose.best_of_product
TRUE_FACTORS = compose._joint_factors


def first_rows_kept(r, A, B, dtype):
    return A[:r].astype(dtype), B[:, :r].astype(dtype), A[r:], B[:, r:]


def smallest_directions_kept(r, A, B, dtype):
    *_, lost_A, lost_B = TRUE_BEST(r, A, B, dtype)
    return lost_A[-r:].astype(dtype), lost_B[:, -r:].astype(dtype), lost_A, lost_B


def too_low_a_rank(r, A, B, dtype):
    return TRUE_BEST(max(1, r - 1), A, B, dtype)


def rounding_untold(r, A, B, dtype):
    new_A, new_B, *_ = TRUE_BEST(r, A, B, "float16")
    *_, lost_A, lost_B = TRUE_BEST(r, A, B, "float64")
    return new_A.astype(dtype), new_B.astype(dtype), lost_A, lost_B


def nothing_told(r, A, B, dtype):
    new_A, new_B, lost_A, lost_B = TRUE_BEST(r, A, B, dtype)
    return new_A, new_B, 0 * lost_A, lost_B


def without_scaling(pairs):
    return TRUE_FACTORS([LoRAPair(pair.lora_A, pair.lora_B, 1.0) for pair in pairs])


WORSE = [first_rows_kept, smallest_directions_kept, too_low_a_rank, rounding_untold, nothing_told]


@pytest.mark.parametrize("bug", [*WORSE, without_scaling], ids=lambda bug: bug.__name__)
def test_each_planted_bug_in_compressing_is_killed(monkeypatch, bug):
    adapter = learned(new_adapter(tiny_mlp(6, 5, 4), 4, 3), 3)
    check_compressed(adapter, 2)
    monkeypatch.setattr(compose, "_joint_factors" if bug is without_scaling else "best_of_product", bug)
    with pytest.raises(AssertionError):
        check_compressed(adapter, 2)


def test_a_pair_of_that_rank_or_less_stays_as_it_is():
    base = tiny_mlp(6, 5, 4)
    adapter = learned(new_adapter(base, 2, 4, rank_pattern={"layers.0": 3}))
    small, errors, _ = compress(adapter, 2)
    assert np.array_equal(small.pairs["layers.1"].delta(), adapter.pairs["layers.1"].delta())
    assert errors["layers.1"] == Distance(0, 0) and errors["layers.0"].relative > 0.01
    assert small.pairs["layers.1"].lora_A is not adapter.pairs["layers.1"].lora_A
    same, errors, _ = compress(adapter, 64)
    assert [pair.r for pair in same.pairs.values()] == [3, 2] and max(e.absolute for e in errors.values()) < 1e-6


def test_a_sum_that_has_a_low_rank_is_compressed_to_it_without_a_loss():
    adapter = learned(new_adapter(tiny_mlp(6, 5, 4, dtype="float64")))
    twice = combine([adapter, adapter], [0.7, -0.2])
    assert twice.pairs["layers.0"].r == 4
    small, errors, _ = compress(twice, 2)
    assert max(error.relative for error in errors.values()) < 1e-14
    for name, delta in deltas(small).items():
        assert np.allclose(delta, 0.5 * adapter.pairs[name].delta(), atol=1e-14)


@given(rngs, float_dtypes)
def test_which_factors_an_update_comes_in_makes_no_difference(rng, dtype):
    """A -> M A, B -> B M⁻¹ is the same update: the spectrum and the compressed one are the same to rounding."""
    base = tiny_mlp(6, 5, 4, dtype=dtype)
    adapter = learned(new_adapter(base, 3, 3), 3)
    M = np.linalg.qr(rng.standard_normal((3, 3)))[0] * np.exp(rng.uniform(-2, 2, 3))
    pairs = {}
    for name, pair in adapter.pairs.items():
        A, B = (M @ pair.lora_A.data).astype(dtype), (pair.lora_B.data @ np.linalg.inv(M)).astype(dtype)
        pairs[name] = LoRAPair(Tensor(A), Tensor(B), pair.scaling)
    other = adapter_of(base, pairs)
    small, small_errors, _ = compress(adapter, 2)
    other_small, other_errors, _ = compress(other, 2)
    for name, pair in adapter.pairs.items():
        S = spectrum(pair)
        # The factors were rounded once, by whoever changed them: eˣ for x in ±2 is at most 55 apart.
        margin = 1000 * UNIT[dtype] * S[0]
        assert np.allclose(spectrum(pairs[name]), S, rtol=0, atol=margin)
        # Near a tie of two singular values the direction that is kept may turn, and the matrix with it.
        gap = (S[1] - S[2]) / S[0]
        assert np.allclose(other_small.pairs[name].delta(), small.pairs[name].delta(), rtol=0, atol=margin / gap)
        assert abs(other_errors[name].absolute - small_errors[name].absolute) <= margin


def test_the_spectrum_is_that_of_the_update():
    adapter = learned(new_adapter(tiny_mlp(6, 5, 4, dtype="float64"), 3, 6))
    both = combine([adapter, adapter], [1, 2])
    for name, delta in deltas(adapter).items():
        assert np.allclose(spectrum(adapter.pairs[name]), np.linalg.svd(delta, compute_uv=False)[:3], rtol=1e-12)
        assert spectrum(both.pairs[name]).shape == (min(delta.shape),)
        assert np.allclose(spectrum(both.pairs[name])[:3], 3 * spectrum(adapter.pairs[name]), rtol=1e-12)


def test_pairs_that_share_an_A_are_compressed_as_one_matrix_and_share_one_again():
    base = small_gpt(dtype="float64")
    adapter = shared_A(base, QKV, 4, 1)
    whole = np.concatenate(list(deltas(adapter).values()))
    small, errors, _ = compress(adapter, 2)
    assert len(small.parameters()) == 4 and small.pairs[QKV[0]].lora_A is small.pairs[QKV[2]].lora_A
    assert math.isclose(math.hypot(*(e.absolute for e in errors.values())), tail(whole, 2), rel_tol=1e-12)
    for name, delta in deltas(adapter).items():
        assert math.isclose(errors[name].absolute, np.linalg.norm(delta - small.pairs[name].delta()), rel_tol=1e-12)


def test_pairs_and_errors_keep_the_order_of_the_adapter():
    base = small_gpt()
    adapter = learned(new_adapter(base, 3))
    names = list(adapter.pairs)
    last = adapter.pairs[names[-3]]
    shared = LoRAPair(adapter.pairs[names[0]].lora_A, last.lora_B, last.scaling)
    adapter.pairs[names[-3]] = shared
    small, errors, _ = compress(adapter, 2)
    assert list(small.pairs) == list(errors) == list(small.config.target_modules) == names
    assert small.pairs[names[0]].lora_A is small.pairs[names[-3]].lora_A


def test_the_matrix_of_a_large_pair_is_never_formed():
    n = 200_000  # it would take 160 GB
    rng = np.random.default_rng(0)
    array = lambda *shape: Tensor(rng.standard_normal(shape).astype(np.float32))
    adapter = changed(ONE, {"layers.0": LoRAPair(array(2, n), array(n, 2), 1)})
    _, errors, _ = compress(adapter, 1)
    S = spectrum(adapter.pairs["layers.0"])
    assert math.isclose(errors["layers.0"].relative, S[1] / np.hypot(*S), rel_tol=1e-5)


def test_an_update_of_nothing_is_compressed_to_nothing():
    small, errors, _ = compress(new_adapter(BASE, 3), 1)
    assert set(errors.values()) == {Distance(0, 0)} and not any(delta.any() for delta in deltas(small).values())


@pytest.mark.parametrize("adapter, r, error, says", [
    (ONE, 0, ValueError, ["r must be a whole number of at least 1", "0"]),
    (ONE, 1.5, ValueError, ["whole number", "1.5"]),
    (ONE, True, ValueError, ["whole number", "True"]),
    (stack([ONE]), 1, TypeError, ["BatchAdapter", "of a stack give the adapters in it"]),
    (with_dora(), 1, ValueError, ["layers.1 has a DoRAPair", "only plain LoRA"]),
    (broken(math.nan), 1, ValueError, ["layers.1.lora_A holds inf or nan"]),
    (outgrowing(), 8, ValueError, ["layers.1 outgrow float32", "astype('float64')"]),
])  # fmt: skip
def test_what_cannot_be_compressed_is_refused(adapter, r, error, says):
    with pytest.raises(error) as caught:
        compress(adapter, r)
    assert str(caught.value).startswith("compress: ") and all(part in str(caught.value) for part in says)


@pytest.mark.parametrize("pair", [ONE, with_dora().pairs["layers.1"], None], ids=lambda pair: type(pair).__name__)
def test_only_a_plain_pair_has_a_spectrum(pair):
    with pytest.raises(TypeError, match=f"spectrum: expected a LoRAPair, got {type(pair).__name__}"):
        spectrum(pair)


# --- extract ---------------------------------------------------------------------------------------------------------


def moved_by(base, changes):
    """`base`, with {tensor: array} added to its tensors."""
    state = {name: p.data + changes.get(name, 0) for name, p in base.named_parameters()}
    return base.rebuild(lambda name, x: Tensor(state[name].astype(x.dtype)) if isinstance(x, Tensor) else None)


def check_extracted(base, tuned, r, **how):
    weights = dict(tuned.named_parameters())
    updates = {}
    for name, p in base.named_parameters():
        updates[name.removesuffix(".weight")] = weights[name].data.astype(np.float64) - p.data
    adapter, errors, _ = extract(base, tuned, r, **how)
    assert list(errors) == list(adapter.pairs) and adapter.base_fingerprint == base.fingerprint()
    assert all(p.requires_grad for p in adapter.parameters())
    for name, (stored, computed) in margins(adapter, updates).items():
        least = tail(updates[name], r)
        assert least - computed <= errors[name].absolute <= least + stored + computed
        lost = np.linalg.norm(updates[name] - exact_deltas(adapter)[name])
        assert abs(errors[name].absolute - lost) <= computed
        assert math.isclose(errors[name].relative * np.linalg.norm(updates[name]), errors[name].absolute, abs_tol=1e-15)
        assert adapter.pairs[name].r == min(r, *updates[name].shape)
    return adapter


@given(rngs, float_dtypes, st.integers(1, 5))
def test_an_extracted_adapter_is_as_near_as_any_of_its_rank(rng, dtype, r):
    base = tiny_mlp(6, 5, 4, dtype=dtype)
    change = {f"layers.{i}.weight": rng.standard_normal(layer.weight.shape) for i, layer in enumerate(base.layers)}
    check_extracted(base, moved_by(base, change), r)


@given(float_dtypes, st.integers(0, 99))
def test_an_update_of_rank_r_comes_back_whole(dtype, seed):
    """What full fine-tuning did is what the adapter does, to the rounding of its factors, if it had rank r.

    An update of rank 2 is merged, which rounds products of 2 terms, their scaling and a sum: 4 units of |B| |A| and one
    of the weight. This rounding has any rank, and bounds the tail. The factors found are rounded (2 units of their
    product), and are merged as the first ones were.
    """
    base = tiny_mlp(6, 5, 4, dtype=dtype)
    adapter = learned(new_adapter(base, 2, seed=seed), seed)
    tuned = merge(attach(base, adapter))
    extracted = check_extracted(base, tuned, 2)
    again = merge(attach(base, extracted))
    size = lambda pair: np.linalg.norm(pair.scaling * np.abs(pair.lora_B.data) @ np.abs(pair.lora_A.data))
    for name, layer in tuned.named_modules():
        if isinstance(layer, Linear):
            W, found = (dict(model.named_modules())[name].weight.data.astype(np.float64) for model in (tuned, again))
            units = 2 * np.linalg.norm(W) + 4 * size(adapter.pairs[name]) + 6 * size(extracted.pairs[name])
            bound = 1.01 * units * UNIT[dtype] + 1e-13 * np.linalg.norm(W)
            assert np.linalg.norm(found - W) <= bound


def test_the_adapter_leads_from_the_base_to_the_tuned_model_and_not_back():
    base = tiny_mlp(6, 5, dtype="float64")
    tuned = moved_by(base, {"layers.0.weight": np.ones((5, 6))})
    assert np.allclose(extract(base, tuned, 1).adapter.pairs["layers.0"].delta(), 1)


def test_what_lora_cannot_hold_is_named_with_how_far_it_moved():
    base = small_gpt(tie_word_embeddings=False)
    rng = np.random.default_rng(0)
    names = ["wte.weight", "lm_head.weight", "h.0.ln_1.bias", "h.1.attn.q_proj.bias", "h.1.attn.k_proj.weight",
             "h.0.attn.q_proj.weight"]  # fmt: skip
    shapes = {name: p.shape for name, p in base.named_parameters()}
    tuned = moved_by(base, {name: rng.standard_normal(shapes[name]) for name in names})
    adapter, errors, left_out = extract(base, tuned, 2, ["q_proj", "v_proj"])
    assert list(adapter.pairs) == ["h.0.attn.q_proj"] and errors.keys() == adapter.pairs.keys()
    assert set(left_out) == set(names) - {"h.0.attn.q_proj.weight"}
    before, after = (dict(model.named_parameters()) for model in (base, tuned))
    for name, moved in left_out.items():
        a, b = before[name].data.astype(np.float64), after[name].data.astype(np.float64)
        assert math.isclose(moved.absolute, np.linalg.norm(b - a), rel_tol=1e-12)
        assert math.isclose(moved.relative, np.linalg.norm(b - a) / np.linalg.norm(a), rel_tol=1e-12)
    # As much as is targeted is held.
    assert set(extract(base, tuned, 2).left_out) == set(left_out) - {"h.1.attn.k_proj.weight"}


def test_a_tied_head_moves_once_and_a_bias_of_zeros_by_infinitely_much():
    base = small_gpt()
    base.h[0].attn.q_proj.bias.data[:] = 0
    change = {"wte.weight": 0.1, "h.0.attn.q_proj.bias": 0.1, "h.0.attn.q_proj.weight": 0.1}
    left_out = extract(base, moved_by(base, change), 1).left_out
    assert list(left_out) == ["wte.weight", "h.0.attn.q_proj.bias"]
    assert left_out["h.0.attn.q_proj.bias"].relative == math.inf


def test_a_base_in_few_bits_keeps_its_record():
    base = quantize(small_gpt(), "nf4")
    tuned = merge(attach(base, trained_adapter(base)))
    adapter = extract(base, tuned, 2).adapter
    assert adapter.base_stored == trained_adapter(base).base_stored
    assert adapter.base_rows == compress(adapter, 1).adapter.base_rows == table_rows(base) != {}
    attach(base, adapter)


def test_every_layer_is_reported_when_it_is_done():
    done = []
    base = tiny_mlp(6, 5, 4)
    extract(base, moved_by(base, {"layers.1.weight": np.ones((4, 5))}), 1, on_layer=done.append)
    assert done == ["layers.0", "layers.1"]


TUNED = moved_by(BASE, {"layers.0.weight": np.ones((5, 6)), "layers.0.bias": np.ones(5)})


@pytest.mark.parametrize("base, tuned, how, says", [
    (BASE, TUNED, {"r": 0}, ["r must be a whole number", "0"]),
    (BASE, TUNED, {"target_modules": ["q_proj"]}, ["['q_proj'] match no Linear layer", "layers.0"]),
    (BASE, tiny_mlp(6, 7, 4), {}, ["not of the base's shape", "3 arrays", "layers.0.weight is ((7, 6)", "not ((5, 6)"]),
    (BASE, tiny_mlp(6, 5), {}, ["not of the base's shape", "layers.1.weight is absent"]),
    (BASE, BASE.astype("float64"), {}, ["not of the base's shape", "'float64'", "'float32'"]),
    (attach(BASE, ONE), TUNED, {}, ["layers.0 of the base carries an adapter", "merge it first"]),
    (BASE, attach(BASE, ONE), {}, ["layers.0 of the tuned model carries an adapter"]),
    (BASE, BASE, {}, ["none of the 2 targeted linears changed", "elsewhere: nothing"]),
    (BASE, TUNED, {"target_modules": ["layers.1"]}, ["none of the 1 targeted", "elsewhere: layers.0.weight, lay"]),
    (BASE, moved_by(BASE, {"layers.1.weight": np.full((4, 5), np.inf)}), {}, ["layers.1.weight is not finite"]),
    (BASE, moved_by(TUNED, {"layers.1.bias": np.full(4, np.nan)}), {}, ["layers.1.bias is not finite"]),
    (small_llama(), small_llama(1, rope_theta=3e4), {}, ["rope_theta 10000.0 and 30000.0", "no adapter holds"]),
    (small_gpt(), small_llama(), {}, ["not of the base's shape"]),
])  # fmt: skip
def test_what_no_adapter_leads_to_is_refused_with_both_sides(base, tuned, how, says):
    with pytest.raises(ValueError) as caught:
        extract(base, tuned, **{"r": 1, **how})
    assert all(part in str(caught.value) for part in says)


# --- on every backend ------------------------------------------------------------------------------------------------


def test_every_backend_gives_what_numpy_does_and_keeps_its_arrays(xp):
    def results(module):
        base = tiny_mlp(6, 5, 4).to_device(module)
        both = combine([learned(new_adapter(base, r, seed=r), r) for r in (2, 3)], [0.5, -2])
        tuned = merge(attach(base, both))
        return both, compress(both, 2).adapter, extract(base, tuned, 2).adapter

    for ours, numpys in zip(results(xp), results(np), strict=True):
        assert all(isinstance(p.data, xp.ndarray) for p in ours.parameters())
        assert contents(ours).keys() == contents(numpys).keys()
        for name, delta in deltas(ours).items():
            assert np.allclose(to_device(delta, np), numpys.pairs[name].delta(), rtol=1e-4, atol=1e-5)
    spectra = [spectrum(next(iter(adapter.pairs.values()))) for adapter in (results(xp)[0], results(np)[0])]
    assert isinstance(spectra[0], np.ndarray) and np.allclose(*spectra, rtol=1e-6)
