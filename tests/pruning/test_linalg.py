"""Gram-based selection against QR of the samples themselves."""

import math

import numpy as np
import pytest
import scipy.linalg

from pruning.linalg import pivoted_cholesky, rank_tolerance, strong_rrqr, sweep, unsweep


def spread(rng, rows, d):
    """Independent channels of very different sizes."""
    return rng.standard_normal((rows, d)) * np.exp(rng.standard_normal(d))


def correlated(rng, rows, d):
    """A decaying spectrum in a random basis, as trained keys have."""
    return rng.standard_normal((rows, d)) * np.exp(-np.arange(d) / 4) @ rng.standard_normal((d, d))


def low_rank(rng, rows, d):
    """Exactly half the rank."""
    return rng.standard_normal((rows, d // 2)) @ rng.standard_normal((d // 2, d))


def kahan(rng, rows, d):
    """Kahan's matrix behind random rotations: column pivoting leaves it as it is, far from the best columns."""
    c = rng.uniform(0.2, 0.4)
    upper = np.triu(np.full((d, d), -c), 1) + np.eye(d)
    scaled = np.sqrt(1 - c * c) ** np.arange(d)[:, None] * upper
    # Slightly falling column norms: in the plain matrix all pivots are tied.
    return np.linalg.qr(rng.standard_normal((rows, d)))[0] @ scaled * (1 - 1e-5 * np.arange(d))


KINDS = (spread, correlated, low_rank, kahan)


def by_definition(samples, n, f):
    """Strong RRQR on the samples: scipy's pivoted QR, then exchanges by Gu and Eisenstat's rho, QR anew after each."""
    d = samples.shape[1]
    r, order = scipy.linalg.qr(samples, pivoting=True, mode="r")
    r = r[:d]
    squares = np.diag(r) ** 2
    rank = int((squares > rank_tolerance(samples.T @ samples)).sum())
    k, swaps = min(n, rank), 0
    while 0 < k < d:
        r = np.linalg.qr(samples[:, order], mode="r")
        inverse = scipy.linalg.solve_triangular(r[:k, :k], np.eye(k))
        omega = np.linalg.norm(inverse, axis=1)
        gamma = np.linalg.norm(r[k:, k:], axis=0)
        rho = np.sqrt((inverse @ r[:k, k:]) ** 2 + np.outer(omega, gamma) ** 2)
        if rho.max() <= f:
            break
        i, j = np.unravel_index(rho.argmax(), rho.shape)
        order[[i, k + j]] = order[[k + j, i]]
        swaps += 1
    energy = (samples**2).sum(0)
    rest = sorted(order[k:], key=lambda c: -energy[c])
    return sorted([*order[:k], *rest[: n - k]]), swaps, rank


@pytest.mark.parametrize("f", [1.5, 1.1])
def test_selection_is_that_of_qr_on_the_samples_for_100_heads(f):
    swapped = deficient = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        d = int(rng.integers(4, 33))
        samples = KINDS[seed % len(KINDS)](rng, 4 * d, d)
        n = d - 1 if KINDS[seed % len(KINDS)] is kahan else int(rng.integers(1, d))
        expected, swaps, rank = by_definition(samples, n, f)
        result = strong_rrqr(samples.T @ samples, n, f=f)
        assert result.keep.tolist() == expected, (seed, d, n)
        assert (result.swaps, result.rank) == (swaps, rank), seed
        swapped += swaps > 0
        deficient += rank < n
    assert swapped >= 10, "no exchange was put to the test"
    assert deficient >= 5, "no rank-deficient head was put to the test"


@pytest.mark.parametrize("kind", KINDS)
def test_pivots_are_those_of_pivoted_qr(kind):
    samples = kind(np.random.default_rng(7), 60, 16)
    order = scipy.linalg.qr(samples, pivoting=True, mode="r")[1]
    pivots = pivoted_cholesky(samples.T @ samples)
    assert len(pivots) == np.linalg.matrix_rank(samples)
    assert pivots == order[: len(pivots)].tolist()


def test_sweep_tableau_is_inverse_regression_and_schur_complement():
    rng = np.random.default_rng(1)
    a = rng.standard_normal((40, 9))
    gram = a.T @ a
    tableau = gram.copy()
    picked = [7, 2, 5, 0]
    for j in picked:
        sweep(tableau, j)
    s, r = sorted(picked), [1, 3, 4, 6, 8]
    inverse = np.linalg.inv(gram[np.ix_(s, s)])
    regression = inverse @ gram[np.ix_(s, r)]
    np.testing.assert_allclose(tableau[np.ix_(s, s)], -inverse, atol=1e-10)
    np.testing.assert_allclose(tableau[np.ix_(s, r)], regression, atol=1e-10)
    np.testing.assert_allclose(tableau, tableau.T, atol=1e-10)
    schur = gram[np.ix_(r, r)] - gram[np.ix_(r, s)] @ regression
    np.testing.assert_allclose(tableau[np.ix_(r, r)], schur, atol=1e-10)

    def det(indices):
        return np.linalg.det(gram[np.ix_(indices, indices)])

    for i in s:
        for j in r:
            exchanged = [j if x == i else x for x in s]
            rho2 = tableau[i, j] ** 2 - tableau[i, i] * tableau[j, j]
            assert rho2 == pytest.approx(det(exchanged) / det(s), rel=1e-9)

    for j in picked:
        unsweep(tableau, j)
    np.testing.assert_allclose(tableau, gram, atol=1e-9)


def test_exchanges_end_with_no_rho_above_f():
    samples = kahan(np.random.default_rng(3), 100, 24)
    gram = samples.T @ samples
    result = strong_rrqr(gram, 23)
    assert result.swaps > 0
    tableau = gram.copy()
    for j in result.keep:
        sweep(tableau, j)
    (out,) = set(range(24)) - set(result.keep.tolist())
    rho2 = tableau[result.keep, out] ** 2 - tableau.diagonal()[result.keep] * tableau[out, out]
    assert rho2.max() <= 1.5**2 * (1 + 1e-6)


def test_figures_of_the_choice():
    gram = np.diag([4.0, 1.0, 3.0, 2.0])
    result = strong_rrqr(gram, 2)
    assert result.keep.tolist() == [0, 2]
    assert (result.rank, result.swaps) == (4, 0)
    assert result.energy == pytest.approx(0.7)
    assert result.condition == pytest.approx(4 / 3)


def test_rank_counts_what_float64_can_tell_from_zero():
    # 3 * machine epsilon * 1 is 6.7e-16.
    assert strong_rrqr(np.diag([1.0, 1e-12, 1e-15]), 1).rank == 3
    assert strong_rrqr(np.diag([1.0, 1e-12, 5e-16]), 1).rank == 2


def test_channels_past_the_rank_are_those_of_most_energy():
    # Channel 1 is twice channel 0 and channel 4 three times channel 3; channel 2 is never used.
    a = np.random.default_rng(0).standard_normal((50, 2))
    samples = np.stack([a[:, 0], 2 * a[:, 0], 0 * a[:, 0], a[:, 1], 3 * a[:, 1]], axis=1)
    result = strong_rrqr(samples.T @ samples, 4)
    assert result.rank == 2
    assert result.keep.tolist() == [0, 1, 3, 4]
    assert strong_rrqr(samples.T @ samples, 3).keep.tolist() in ([0, 1, 4], [1, 3, 4])


def test_a_head_that_is_never_used_keeps_its_first_channels():
    result = strong_rrqr(np.zeros((5, 5)), 3)
    assert result.keep.tolist() == [0, 1, 2]
    assert (result.rank, result.swaps, result.energy, result.condition) == (0, 0, 0.0, math.inf)
