"""c_attn as one LoRA pair and as three: exactly as strong, and taken apart again to the bit."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import hunt, rngs

from minilora.disk import c_attn
from minilora.disk.c_attn import join, take_apart
from minilora.lora import LoRAPair
from minilora.tensor import Tensor

FILE = "transformer.h.0.attn.c_attn"
NAMES = [f"h.0.attn.{part}" for part in ("q_proj", "k_proj", "v_proj")]
SUBSETS = [list(names) for n in (1, 2, 3) for names in combinations(NAMES, n)]


def number(rng, *shape):
    """A Tensor of whole numbers, none of them zero."""
    sizes, signs = rng.integers(1, 5, shape), rng.choice([-1, 1], shape)
    return Tensor((sizes * signs).astype("f4"), requires_grad=True)


@st.composite
def lattice_pairs(draw):
    """{module: pair of whole numbers} for some of q, k and v: several ranks, one scaling, any of the A's shared."""
    rng, names, scaling = draw(rngs), draw(st.sampled_from(SUBSETS)), draw(st.sampled_from([0.5, 1.0, 2.0]))
    groups = draw(st.lists(st.integers(0, 2), min_size=len(names), max_size=len(names)))
    ranks = draw(st.lists(st.integers(1, 4), min_size=3, max_size=3))
    shared = [number(rng, r, 6) for r in ranks]
    return {name: LoRAPair(shared[g], number(rng, 6, ranks[g]), scaling) for name, g in zip(names, groups, strict=True)}


def is_the_same_update(pairs):
    """One pair computes what the parts do, q's rows first, then k's, then v's; parts that are not there get nothing."""
    A, B, columns = join(FILE, NAMES, pairs)
    scaling = next(iter(pairs.values())).scaling
    nothing = np.zeros((6, 6))
    expected = np.concatenate([pairs[name].delta() if name in pairs else nothing for name in NAMES])
    assert A.dtype == B.dtype == np.float32
    assert np.array_equal(scaling * (B @ A), expected)
    distinct = {id(pair.lora_A): pair.r for pair in pairs.values()}
    assert len(A) == sum(distinct.values()), "no A is written twice"
    assert bool(columns) == (len(distinct) > 1 or len(pairs) < 3)


def comes_apart_again(pairs):
    """With the columns, what was joined comes back to the bit, with the same A's shared."""
    A, B, columns = join(FILE, NAMES, pairs)
    pieces = take_apart(FILE, A, B, NAMES, columns)
    assert list(pieces) == list(pairs)
    spans = {}
    for name, ((start, stop), rows) in pieces.items():
        pair = pairs[name]
        assert A[start:stop].tobytes() == pair.lora_A.data.tobytes() and rows.tobytes() == pair.lora_B.data.tobytes()
        spans.setdefault((start, stop), set()).add(id(pair.lora_A))
    assert all(len(owners) == 1 for owners in spans.values())


def is_right_without_columns(pairs):
    """Another program drops the columns: then one A serves all, and the update is still the same."""
    A, B, _ = join(FILE, NAMES, pairs)
    scaling = next(iter(pairs.values())).scaling
    for name, (span, rows) in take_apart(FILE, A, B, NAMES, {}).items():
        assert span == (0, len(A))
        assert np.array_equal(scaling * (rows @ A), pairs[name].delta() if name in pairs else np.zeros((6, 6)))


PROPERTIES = [is_the_same_update, comes_apart_again, is_right_without_columns]


@pytest.mark.parametrize("holds", PROPERTIES)
def test_joined_and_taken_apart_nothing_is_lost(holds):
    given(lattice_pairs())(holds)()


def dropping_a_rank(real):
    def bug(*arguments):
        A, B, columns = real(*arguments)
        return A, np.where(np.arange(B.shape[1]) == B.shape[1] - 1, 0, B).astype("f4"), columns

    return bug


def mixing_the_rows(real):
    def bug(*arguments):
        A, B, columns = real(*arguments)
        return A, np.concatenate([B[6:12], B[:6], B[12:]]), columns

    return bug


def dense_blocks(real):
    """The zeros beside the blocks filled with what is in them."""

    def bug(*arguments):
        A, B, columns = real(*arguments)
        return A, B + (B == 0) * B.max(), columns

    return bug


def always_apart(real):
    """One A for all three written three times."""

    def bug(their_name, parts, pairs):
        copies = {name: LoRAPair(Tensor(pair.lora_A.data.copy()), pair.lora_B, pair.scaling)
                  for name, pair in pairs.items()}  # fmt: skip
        return real(their_name, parts, copies)

    return bug


@pytest.mark.parametrize("bug, kills", [
    (dropping_a_rank, 0), (mixing_the_rows, 0), (dense_blocks, 0), (always_apart, 0), (dropping_a_rank, 1),
    (mixing_the_rows, 1), (dense_blocks, 1), (dropping_a_rank, 2), (mixing_the_rows, 2),
])  # fmt: skip
def test_each_planted_bug_is_killed(bug, kills, monkeypatch):
    monkeypatch.setitem(globals(), "join", bug(c_attn.join))
    with pytest.raises((AssertionError, ValueError)):
        hunt(lattice_pairs(), PROPERTIES[kills])


def test_pefts_own_form_gives_three_projections_one_a():
    A, B = np.arange(12, dtype="f4").reshape(2, 6), np.arange(36, dtype="f4").reshape(18, 2)
    pieces = take_apart(FILE, A, B, NAMES, {})
    assert [span for span, _ in pieces.values()] == [(0, 2)] * 3
    assert np.array_equal(np.concatenate([rows for _, rows in pieces.values()]), B)


def ones_pair(n_out, scaling):
    return LoRAPair(Tensor(np.ones((2, 6), "f4")), Tensor(np.ones((n_out, 2), "f4")), scaling)


def test_different_scalings_cannot_be_one_module():
    pairs = {name: ones_pair(6, scaling) for name, scaling in zip(NAMES, (2.0, 2.0, 4.0), strict=True)}
    with pytest.raises(ValueError, match="c_attn can have one scaling.*q_proj 2.*v_proj 4.*train them with one"):
        join(FILE, NAMES, pairs)


def test_a_module_that_is_not_joined_goes_through_as_it_is():
    module, ours = "transformer.h.0.attn.c_proj", "h.0.attn.o_proj"
    pair = ones_pair(5, 2.0)
    A, B, columns = join(module, [ours], {ours: pair})
    assert A is pair.lora_A.data and B is pair.lora_B.data and columns == {}
    pieces = take_apart(module, A, B, [ours], {})
    assert pieces[ours][0] == (0, 2) and pieces[ours][1] is B


def test_a_c_attn_of_another_model_is_a_layer_like_any_other():
    A, B = np.ones((2, 5)), np.ones((4, 2))
    assert take_apart("block.attn.c_attn", A, B, ["block.attn.c_attn"], {}) == {"block.attn.c_attn": ((0, 2), B)}


def test_rows_that_are_not_a_multiple_of_three_are_refused():
    with pytest.raises(ValueError, match=r"c_attn: lora_B \(17, 2\) cannot be split into 3 parts"):
        take_apart(FILE, np.ones((2, 6)), np.ones((17, 2)), NAMES, {})


def test_what_lies_outside_the_columns_is_refused_and_not_dropped():
    A, B = np.ones((4, 6), "f4"), np.zeros((18, 4), "f4")
    B[:6, :2] = B[12:, 2:] = 1
    columns = {NAMES[0]: (0, 2), NAMES[2]: (2, 4)}
    assert list(take_apart(FILE, A, B, NAMES, columns)) == [NAMES[0], NAMES[2]]
    for row, column in ((0, 2), (7, 0), (17, 1)):
        spoilt = B.copy()
        spoilt[row, column] = 1e-30
        with pytest.raises(ValueError, match="entries outside the columns.*give to h.0.attn.q_proj, h.0.attn.v_proj"):
            take_apart(FILE, A, spoilt, NAMES, columns)
    assert B[0, 0] == 1, "B itself is not touched"


@pytest.mark.parametrize("columns", [[0, 5], [-1, 2], [2, 2], [3, 2], [0.0, 2.0], [0, True], [None, None], ["0", "2"],
                                     [0, 1, 2], "ab", 7, None])  # fmt: skip
def test_columns_that_are_none_of_the_module_are_refused(columns):
    A, B = np.ones((4, 6), "f4"), np.zeros((18, 4), "f4")
    with pytest.raises((ValueError, TypeError)):
        take_apart(FILE, A, B, NAMES, {NAMES[0]: columns})
