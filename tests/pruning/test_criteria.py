"""Every criterion by itself, and what all of them promise."""

import itertools

import numpy as np
import pytest

from pruning.criteria import CRITERIA, Head, criterion_named
from pruning.criteria.bilinear import greedy_removal, maximise, squared_cosine
from pruning.errors import PruningError


def rows(seed, tokens=200, d=12):
    """Post-SiLU-like rows: mostly positive, correlated."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, d)) @ rng.standard_normal((d, d)) * np.exp(rng.standard_normal(d) / 2)
    return x / (1 + np.exp(-x))


def normalised(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def head(seed=0, d=12, layer=0, index=0, selection_seed=0):
    q, k = rows(2 * seed, d=d), rows(2 * seed + 1, d=d)
    rng = np.random.default_rng(seed)
    weights = tuple(rng.standard_normal((d, 20)).astype(np.float32) for _ in range(2))
    statistics = {
        "q": q.T @ q,
        "k": k.T @ k,
        "k_sum": k.sum(0),
        "q_normalised": normalised(q).T @ normalised(q),
        "k_normalised": normalised(k).T @ normalised(k),
        "x_squares": rng.random(20),
        "q_gradient": rng.standard_normal((d, 20)),
        "k_gradient": rng.standard_normal((d, 20)),
        "gate_fisher": rng.standard_normal(d) ** 2,
    }
    return Head(
        layer=layer,
        index=index,
        d_k=d,
        seed=selection_seed,
        tokens=len(k),
        statistics=statistics,
        weights=weights,
    )


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("n", [1, 5, 11, 12])
def test_choice_is_n_ascending_channels(name, n):
    for seed in range(5):
        keep = CRITERIA[name].select(head(seed), n).keep
        assert keep.dtype == np.int64
        assert len(keep) == n
        assert (np.diff(keep) > 0).all()
        assert keep[0] >= 0 and keep[-1] < 12
        if n == 12:
            assert keep.tolist() == list(range(12))


@pytest.mark.parametrize("name", CRITERIA)
def test_choice_depends_on_nothing_but_its_inputs(name):
    np.random.seed(0)
    first = CRITERIA[name].select(head(), 6).keep
    np.random.seed(1)
    CRITERIA[name].select(head(3, layer=1), 6)
    assert np.array_equal(first, CRITERIA[name].select(head(), 6).keep)


def test_random_differs_by_seed_layer_and_head_only():
    def draw(**kwargs):
        return tuple(CRITERIA["random"].select(head(d=64, **kwargs), 32).keep)

    draws = {
        draw(layer=layer, index=index, selection_seed=seed)
        for layer, index, seed in itertools.product(range(3), repeat=3)
    }
    assert len(draws) == 27
    assert draw(seed=5, layer=1, index=2) == draw(seed=6, layer=1, index=2)


def test_random_draws_every_channel_alike():
    counts = np.zeros(8)
    for index in range(400):
        counts[CRITERIA["random"].select(head(d=8, index=index), 4).keep] += 1
    assert counts.min() > 150 and counts.max() < 250


def test_l1_keeps_the_heaviest_rows_of_q_and_k_together():
    q, k = np.zeros((4, 3), np.float32), np.zeros((4, 3), np.float32)
    q[0], q[1], k[2], k[3], q[3] = [1, -1, 0], [-3, 0, 0], [0, 2, 2], [1, 1, 1], [0, 0, -1.5]
    h = Head(layer=0, index=0, d_k=4, seed=0, weights=(q, k))
    assert CRITERIA["l1"].select(h, 1).keep.tolist() == [3]
    assert CRITERIA["l1"].select(h, 2).keep.tolist() == [2, 3]
    assert CRITERIA["l1"].select(h, 3).keep.tolist() == [1, 2, 3]


def head_of(statistics, weights=None, d_k=4):
    return Head(layer=0, index=0, d_k=d_k, seed=0, statistics=statistics, weights=weights)


def test_scored_choices_report_the_share_that_is_kept():
    q = np.diag([1, 2, 3, 4]).astype(np.float32)
    assert CRITERIA["l1"].select(head_of({}, (q, q)), 2).report == {"score_share": pytest.approx(0.7)}
    assert CRITERIA["l1"].select(head_of({}, (0 * q, 0 * q)), 2).report == {"score_share": 1.0}


def test_wanda_weighs_every_weight_by_its_input():
    q, k = np.zeros((4, 3), np.float32), np.zeros((4, 3), np.float32)
    q[0], q[1], k[2], k[3], q[3] = [5, 0, 0], [0, -2, 0], [0, 0, 1], [1, 0, 1], [0, 0, -0.5]
    # 5 * 1, 2 * 2, 1 * 6, 1 * 1 + 1.5 * 6: an l1 norm, or mean squares instead of roots, would order otherwise.
    h = head_of({"x_squares": np.array([1.0, 4.0, 36.0])}, (q, k))
    assert [CRITERIA["wanda"].select(h, n).keep.tolist() for n in (1, 2, 3)] == [[3], [2, 3], [0, 2, 3]]
    assert CRITERIA["wanda"].select(h, 1).report == {"score_share": pytest.approx(10 / 25)}


def test_taylor_sums_absolute_products_of_weights_and_gradients():
    ones = np.ones((4, 2), np.float32)
    gradients = {
        "q_gradient": np.array([[3.0, -3.0], [2.5, 2.5], [0, 0], [9, 0]]),
        "k_gradient": np.array([[0, 0], [0, 0], [-4.0, -4.0], [9, 9]]),
    }
    weights = (ones, ones * np.array([1, 1, 1, 0], np.float32)[:, None])
    # 6, 5, 8, 9: signs must not cancel, a gradient on a zero weight counts nothing, q and k both count.
    h = head_of(gradients, weights)
    assert [CRITERIA["taylor"].select(h, n).keep.tolist() for n in (1, 2, 3)] == [[3], [2, 3], [0, 2, 3]]


def test_energy_is_the_product_of_both_mean_squares():
    q, k = np.diag([4.0, 3.0, 0.5, 1.0]), np.diag([0.1, 1.0, 5.0, 1.5])
    q[0, 1] = q[1, 0] = 9.0  # products of different channels don't count
    statistics = {"q_normalised": q, "k_normalised": k}
    # 0.4, 3, 2.5, 1.5: q alone or the sum would keep channel 0 or 2 first.
    assert CRITERIA["energy"].select(head_of(statistics), 1).keep.tolist() == [1]
    assert CRITERIA["energy"].select(head_of(statistics), 3).keep.tolist() == [1, 2, 3]


def test_loss_aware_is_bilinear_of_rows_scaled_by_the_eighth_root_of_the_fisher_information():
    differ = 0
    for seed in range(8):
        h = head(seed, d=16)
        fisher = h.statistics["gate_fisher"]
        scale = (fisher / fisher.mean()) ** 0.125
        scaled = {
            name: scale[:, None] * scale * h.statistics[name] for name in ("q_normalised", "k_normalised")
        }
        choice = CRITERIA["loss-aware"].select(h, 5)
        expected = CRITERIA["bilinear"].select(head_of(scaled, d_k=16), 5)
        assert choice.keep.tolist() == expected.keep.tolist()
        assert choice.report["squared_cosine"] == pytest.approx(expected.report["squared_cosine"])
        differ += choice.keep.tolist() != CRITERIA["bilinear"].select(h, 5).keep.tolist()
    assert differ >= 4, "the weights must matter"


def test_loss_aware_without_any_gradient_is_bilinear():
    h = head(2)
    h.statistics["gate_fisher"][:] = 0
    assert np.array_equal(CRITERIA["loss-aware"].select(h, 5).keep, CRITERIA["bilinear"].select(h, 5).keep)


def test_read_write_keeps_the_products_of_both_reads_of_the_state():
    """The objective is the squared cosine between all products, of queries and of keys with keys, and the kept ones."""
    for seed in range(3):
        q, k = (normalised(rows(2 * seed + i)) for i in range(2))
        h = head_of({"q_normalised": q.T @ q, "k_normalised": k.T @ k, "gate_fisher": np.ones(12)}, d_k=12)
        choice = CRITERIA["read-write"].select(h, 5)

        def products(keep, q=q, k=k):
            parts = [(left[:, keep] @ k[:, keep].T, np.linalg.norm(left @ k.T)) for left in (q, k)]
            return np.concatenate([(part / norm).ravel() for part, norm in parts])

        whole, kept = products(np.arange(12)), products(choice.keep)
        expected = (whole @ kept) ** 2 / (whole @ whole * (kept @ kept))
        assert choice.report["squared_cosine"] == pytest.approx(expected, rel=1e-10)


def test_read_write_keeps_a_channel_that_only_keys_use():
    """Most keys lie on one channel, which no query reads; without it, normalised, they would lie on the others."""
    q, k = rows(0), rows(1)
    q[:, 7] = 0
    k[: len(k) * 3 // 4, 7] = 100
    q, k = normalised(q), normalised(k)
    h = head_of({"q_normalised": q.T @ q, "k_normalised": k.T @ k, "gate_fisher": np.ones(12)}, d_k=12)
    assert 7 in CRITERIA["read-write"].select(h, 2).keep
    assert 7 not in CRITERIA["loss-aware"].select(h, 11).keep


def test_pca_turns_to_the_directions_of_most_variance_of_the_keys():
    k = rows(5) + 3.0  # a large mean, which is no variance
    statistics = {"k": k.T @ k, "k_sum": k.sum(0)}
    choice = CRITERIA["pca"].select(
        Head(layer=0, index=0, d_k=12, seed=0, tokens=len(k), statistics=statistics), 5
    )
    assert choice.keep.tolist() == list(range(5)), "of the rotated channels"
    rotation = choice.rotation
    assert np.allclose(rotation @ rotation.T, np.eye(12), atol=1e-12)
    _, s, vt = np.linalg.svd(k - k.mean(0), full_matrices=False)
    assert np.allclose(np.abs(np.sum(rotation * vt, axis=1)), 1, atol=1e-8)
    assert (rotation @ k.mean(0) >= 0).all(), "SiLU is not odd, so the sign is part of the choice"
    assert choice.report["variance_share"] == pytest.approx(float((s[:5] ** 2).sum() / (s**2).sum()))


def test_pca_of_all_channels_changes_nothing():
    assert CRITERIA["pca"].select(head(), 12).rotation is None


@pytest.mark.parametrize("name", [name for name in CRITERIA if name != "pca"])
def test_every_other_criterion_chooses_channels_as_they_are(name):
    assert CRITERIA[name].select(head(), 5).rotation is None


def test_drrqr_reads_the_sum_of_the_raw_grams():
    def gram(*diagonal):
        return np.diag(np.array(diagonal, dtype=float))

    # Each alone, or the normalised ones, would choose otherwise.
    statistics = {
        "q": gram(5, 0, 3, 1),
        "k": gram(0, 5.5, 3, 1),
        "q_normalised": gram(0, 0, 0, 9),
        "k_normalised": gram(0, 0, 0, 9),
    }
    choice = CRITERIA["drrqr"].select(Head(layer=0, index=0, d_k=4, seed=0, statistics=statistics), 2)
    assert choice.keep.tolist() == [1, 2]
    assert choice.report["rank"] == 4
    assert choice.report["retained_energy"] == pytest.approx(11.5 / 18.5)


def test_what_bilinear_sums_is_the_lost_product_matrix():
    q, k = rows(0), rows(1)
    m = (q.T @ q) * (k.T @ k)
    for dropped in ([0], [3, 7], [1, 2, 5, 9, 11]):
        lost = np.linalg.norm(q[:, dropped] @ k[:, dropped].T) ** 2
        assert m[np.ix_(dropped, dropped)].sum() == pytest.approx(lost, rel=1e-12)


def test_bilinear_objective_is_the_squared_cosine_of_the_products():
    q, k = normalised(rows(4)), normalised(rows(5))
    m = (q.T @ q) * (k.T @ k)
    keep = np.array([0, 2, 3, 8])
    full, kept = q @ k.T, q[:, keep] @ k[:, keep].T
    expected = (full * kept).sum() ** 2 / ((full**2).sum() * (kept**2).sum())
    assert squared_cosine(m, keep) == pytest.approx(expected, rel=1e-10)


def test_bilinear_finds_the_best_set():
    best_found = 0
    for seed in range(60):
        h = head(seed, d=10)
        m = h.statistics["q_normalised"] * h.statistics["k_normalised"]
        n = 1 + seed % 9
        choice = CRITERIA["bilinear"].select(h, n)
        found = squared_cosine(m, choice.keep)
        assert choice.report["squared_cosine"] == found
        best = max(squared_cosine(m, np.array(c)) for c in itertools.combinations(range(10), n))
        assert found >= 0.995 * best, (seed, n)
        best_found += found >= best * (1 - 1e-9)
    assert best_found >= 57


def test_greedy_removal_leaves_the_most_at_each_step():
    for seed in range(10):
        h = head(seed)
        m = h.statistics["q_normalised"] * h.statistics["k_normalised"]
        left = list(range(12))
        for n in range(11, 0, -1):
            left = max(
                ([c for c in left if c != out] for out in left), key=lambda s: squared_cosine(m, np.array(s))
            )
            assert np.flatnonzero(greedy_removal(m, n)).tolist() == left


def test_no_single_exchange_improves_bilinear():
    exchanged = 0
    for seed in range(40):
        h = head(seed, d=24)
        m = h.statistics["q_normalised"] * h.statistics["k_normalised"]
        keep, exchanges = maximise(m, 6)
        exchanged += exchanges
        found = squared_cosine(m, keep)
        for i, j in itertools.product(range(6), sorted(set(range(24)) - set(keep.tolist()))):
            other = keep.copy()
            other[i] = j
            assert squared_cosine(m, other) <= found * (1 + 1e-8)
    assert exchanged >= 2, "greedy removal alone would have passed"


def test_bilinear_drops_unused_channels_first_and_survives_a_dead_head():
    h = head(1)
    for name in ("q_normalised", "k_normalised"):
        h.statistics[name][[2, 5]] = 0
        h.statistics[name][:, [2, 5]] = 0
    assert CRITERIA["bilinear"].select(h, 10).keep.tolist() == [0, 1, 3, 4, 6, 7, 8, 9, 10, 11]
    dead = Head(
        layer=0,
        index=0,
        d_k=4,
        seed=0,
        statistics={"q_normalised": np.zeros((4, 4)), "k_normalised": np.zeros((4, 4))},
    )
    choice = CRITERIA["bilinear"].select(dead, 2)
    assert len(choice.keep) == 2
    assert choice.report["squared_cosine"] == 1.0


def test_unknown_method_is_named_with_the_known_ones():
    with pytest.raises(
        PruningError,
        match=r"method='svd'.*bilinear, drrqr, energy, l1, loss-aware, pca, random, read-write, taylor",
    ):
        criterion_named("svd")


def test_registry_names_are_the_criteria_own():
    assert all(CRITERIA[name].name == name for name in CRITERIA)
    assert set(CRITERIA) == {
        "random",
        "l1",
        "wanda",
        "taylor",
        "energy",
        "pca",
        "drrqr",
        "bilinear",
        "loss-aware",
        "read-write",
    }
