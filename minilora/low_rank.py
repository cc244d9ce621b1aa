"""The best approximation of a matrix by one of low rank, also of a product that is never formed.

A matrix of rank r is B A, with A (r, in) and B (out, r). Of all of them the nearest to U Σ Vᵀ has
its r largest singular values and their directions. Its distance is √ Σ_{i>r} σᵢ², in Frobenius's
norm.
Everything is float64, on the host, by LAPACK: thin factors move for nothing, and GPUs are slow in
float64. Knows arrays, neither LoRA nor models.

Source: Eckart and Young 1936.
"""

import math
from typing import NamedTuple

import numpy as np


class Distance(NamedTuple):
    """How far x is from y in Frobenius's norm: ‖x - y‖, and ‖x - y‖ / ‖y‖.

    `relative` is 0 where nothing differs, and inf where y alone is zero.
    """

    absolute: float
    relative: float


def distance(difference, size):
    """The Distance of something from what has the norm `size`; `difference` is the norm of that."""
    if difference == 0:
        return Distance(0.0, 0.0)
    if size == 0:
        return Distance(float(difference), math.inf)
    return Distance(float(difference), float(difference / size))


def core_of(A, B):
    """(Q_A, core, Q_B) with B A = Q_B core Q_Aᵀ: what is left between two orthonormal bases.

    The core has the singular values of B A, and is as small as the rank.
    Shapes: A (r, in), B (out, r) -> Q_A (in, r), core (r, r), Q_B (out, r). Where in or out is less
    than r, it stands in the place of r there.
    """
    Q_A, R_A = np.linalg.qr(A.T)
    Q_B, R_B = np.linalg.qr(B)
    return Q_A, R_B @ R_A.T, Q_B


def singular_values(A, B):
    """Those of B A, the largest first: (min(r, in, out),)."""
    _, core, _ = core_of(A, B)
    return np.linalg.svd(core, compute_uv=False)


def product_norm(A, B):
    """‖B A‖ in Frobenius's norm: that of the core."""
    _, core, _ = core_of(A, B)
    return np.linalg.norm(core)


def best_of_rank(r, matrix, dtype):
    """(A, B), stored as `dtype`: the best rank r, or less where `matrix` (out, in) has less."""
    A, B = _balanced(*np.linalg.svd(matrix, full_matrices=False))
    return A[:r].astype(dtype), B[:, :r].astype(dtype)


def best_of_product(r, A, B, dtype):
    """(A', B', lost_A, lost_B): the best rank r of B A, stored as `dtype`, and what that loses.

    B A - B' A' = lost_B lost_A, in which the rounding to `dtype` is contained. What has rank r or
    less is rounded and otherwise stays as it is.
    """
    if len(A) <= r:
        return _rounded(A, B, dtype)
    Q_A, core, Q_B = core_of(A, B)
    U, S, Vt = np.linalg.svd(core, full_matrices=False)
    full_A, full_B = _balanced(Q_B @ U, S, Vt @ Q_A.T)
    new_A, new_B, lost_A, lost_B = _rounded(full_A[:r], full_B[:, :r], dtype)
    lost_A = np.concatenate([lost_A, full_A[r:]])
    lost_B = np.concatenate([lost_B, full_B[:, r:]], axis=1)
    return new_A, new_B, lost_A, lost_B


def _rounded(A, B, dtype):
    """(A', B', lost_A, lost_B): A and B stored as `dtype`, and factors of what that loses.

    B A - B' A' = (B - B') A + B' (A - A'): small numbers are taken from their likes, and what is
    not rounded loses exactly nothing.
    """
    # What outgrows the dtype becomes inf, which the caller refuses.
    with np.errstate(over="ignore", invalid="ignore"):
        new_A = A.astype(dtype)
        new_B = B.astype(dtype)
    lost_A = np.concatenate([A, A - new_A])
    lost_B = np.concatenate([B - new_B, new_B], axis=1)
    return new_A, new_B, lost_A, lost_B


def _balanced(U, S, Vt):
    """(A, B) with B A = U diag(S) Vt. Each gets the square root of S, so that neither factor is
    much larger than the other, and both go on learning where they are trained."""
    root = np.sqrt(S)
    return root[:, None] * Vt, U * root
