"""The best approximation of low rank: its error is the tail of the spectrum, and no other matrix comes nearer."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import rngs

from minilora.low_rank import best_of_product, best_of_rank, core_of, distance, product_norm, singular_values

U64 = np.finfo(np.float64).eps / 2
UNIT = {"float32": np.finfo(np.float32).eps / 2, "float64": U64}
# LAPACK's constant is modest: errors of 2 units times a dimension were seen, and 64 are allowed.
SLACK = 64


@st.composite
def factors(draw):
    """A (k, in) and B (out, k) of normal numbers, each of them at its own size, and a rank r."""
    n, m, k = (draw(st.integers(1, most)) for most in (9, 8, 6))
    rng = draw(rngs)
    A, B = (rng.standard_normal(shape) * 10.0 ** draw(st.integers(-3, 3)) for shape in ((k, n), (m, k)))
    return A, B, draw(st.integers(1, 7))


def rounding(A, B, unit):
    """How far the norm of what is lost may be from the exact one.

    Both stored factors are rounded entry by entry, which moves their product by at most (2u + u²) |B'| |A'|: in norm,
    by that of the product of the absolute values. The decompositions are backward stable: in float64 they err by a
    multiple of the norms of what they are given.
    """
    stored = (2 * unit + unit**2) * np.linalg.norm(np.abs(B) @ np.abs(A))
    return stored, SLACK * U64 * max(A.shape + B.shape) * np.linalg.norm(B) * np.linalg.norm(A)


@given(factors())
def test_the_spectrum_of_a_product_is_that_of_the_matrix(case):
    A, B, _ = case
    expected = np.linalg.svd(B @ A, compute_uv=False)[: len(A)]
    values = singular_values(A, B)
    assert values.shape == expected.shape == (min(len(A), len(B), A.shape[1]),)
    assert np.all(np.diff(values) <= 0) and np.abs(values - expected).max() <= rounding(A, B, U64)[1]
    assert abs(product_norm(A, B) - np.linalg.norm(B @ A)) <= rounding(A, B, U64)[1]


@given(factors())
def test_the_core_stands_between_two_orthonormal_bases(case):
    A, B, _ = case
    Q_A, core, Q_B = core_of(A, B)
    assert np.abs(Q_B @ core @ Q_A.T - B @ A).max() <= rounding(A, B, U64)[1]
    for Q in (Q_A, Q_B):
        assert np.allclose(Q.T @ Q, np.eye(Q.shape[1]), atol=1e-13)


def check_tail(case, dtype):
    A, B, r = case
    new_A, new_B, lost_A, lost_B = best_of_product(r, A, B, dtype)
    assert new_A.dtype == new_B.dtype == dtype and len(new_A) == new_B.shape[1] <= r
    wide_A, wide_B = new_A.astype(np.float64), new_B.astype(np.float64)
    S = np.linalg.svd(B @ A, compute_uv=False)
    tail = math.sqrt((S[r:] ** 2).sum())
    stored, computed = rounding(wide_A, wide_B, UNIT[dtype])
    computed += rounding(A, B, U64)[1]
    error = product_norm(lost_A, lost_B)
    assert abs(error - np.linalg.norm(B @ A - wide_B @ wide_A)) <= computed
    assert tail - computed <= error <= tail + stored + computed


@pytest.mark.parametrize("dtype", UNIT)
def test_what_is_lost_is_the_tail_of_the_spectrum_and_the_rounding(dtype):
    given(factors())(lambda case: check_tail(case, dtype))()


@given(factors())
def test_a_product_and_its_matrix_have_the_same_best_approximation_and_nothing_is_nearer(case):
    A, B, r = case
    best_A, best_B = best_of_rank(r, B @ A, "float64")
    new_A, new_B, lost_A, lost_B = best_of_product(r, A, B, "float64")
    computed = rounding(A, B, U64)[1]
    error = product_norm(lost_A, lost_B)
    assert abs(np.linalg.norm(B @ A - best_B @ best_A) - error) <= computed
    # Eckart and Young: whatever is near it is further away.
    rng = np.random.default_rng(0)
    for size in (1e-3, 0.1, 1):
        other_A = new_A + size * np.abs(new_A).max() * rng.standard_normal(new_A.shape)
        other_B = new_B + size * np.abs(new_B).max() * rng.standard_normal(new_B.shape)
        assert np.linalg.norm(B @ A - other_B @ other_A) >= error - computed


def test_what_has_the_rank_already_stays_as_it_is():
    rng = np.random.default_rng(0)
    A, B = rng.standard_normal((3, 5)), rng.standard_normal((4, 3))
    new_A, new_B, lost_A, lost_B = best_of_product(3, A, B, "float64")
    assert np.array_equal(new_A, A) and np.array_equal(new_B, B) and product_norm(lost_A, lost_B) == 0
    assert not np.shares_memory(new_A, A) and not np.shares_memory(new_B, B)


def test_the_two_factors_share_the_size_of_each_direction():
    rng = np.random.default_rng(0)
    A, B = rng.standard_normal((4, 6)), 1e5 * rng.standard_normal((5, 4))
    new_A, new_B, *_ = best_of_product(3, A, B, "float64")
    for factors in ((new_A, new_B), best_of_rank(3, B @ A, "float64")):
        sizes = [np.linalg.norm(factors[0], axis=1), np.linalg.norm(factors[1], axis=0)]
        assert np.allclose(*sizes) and np.allclose(sizes[0] ** 2, singular_values(A, B)[:3])


def test_columns_of_one_factor_may_be_huge_if_the_rows_of_the_other_make_up_for_it():
    rng = np.random.default_rng(1)
    A, B = rng.standard_normal((3, 6)), rng.standard_normal((5, 3))
    M = np.array([1e9, 1, 1e-9])
    S = np.linalg.svd(B @ A, compute_uv=False)[:3]
    assert np.allclose(singular_values(M[:, None] * A, B / M), S, rtol=1e-13)
    *_, lost_A, lost_B = best_of_product(2, M[:, None] * A, B / M, "float64")
    assert math.isclose(product_norm(lost_A, lost_B), S[2], rel_tol=1e-13)


def test_a_product_that_does_not_fit_in_memory_is_never_formed():
    n = 200_000  # the matrix would take 320 GB
    rng = np.random.default_rng(0)
    A, B = rng.standard_normal((2, n)), rng.standard_normal((n, 2))
    S = singular_values(A, B)
    *_, lost_A, lost_B = best_of_product(1, A, B, "float32")
    assert math.isclose(product_norm(lost_A, lost_B), S[1], rel_tol=1e-6)


@pytest.mark.parametrize("difference, size, expected", [
    (3.0, 4.0, (3, 0.75)), (0.0, 0.0, (0, 0)), (0.0, 2.0, (0, 0)), (1.5, 0.0, (1.5, math.inf)),
])  # fmt: skip
def test_a_distance_is_relative_to_what_there_was_and_divides_by_no_zero(difference, size, expected):
    with np.errstate(all="raise"):
        assert distance(np.float64(difference), np.float64(size)) == expected
