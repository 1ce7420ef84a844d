"""Draws depend on (seed, choice, position) alone, follow the softmax, and never pick what is filtered out."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from server.engine.messages import Sampling
from server.engine.sampler import SamplingBatch, filter_logits, sample, uniform

SEEDS = st.integers(-(2**63), 2**64 - 1)


def row(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, seed=0, choice=0):
    return Sampling(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed, choice=choice)


def draws(logits, n, **sampling):
    """n draws from one row of logits, at positions 0 to n - 1."""
    logits = torch.as_tensor(logits, dtype=torch.float32)
    return sample(logits.expand(n, -1), SamplingBatch([row(**sampling)] * n, list(range(n))))


@given(st.lists(st.tuples(SEEDS, st.integers(0, 127), st.integers(0, 2**31)), min_size=1, max_size=20))
def test_uniform_is_a_function_of_seed_choice_and_position(keys):
    together = uniform(*(list(column) for column in zip(*keys, strict=True)))
    assert all(0 <= u < 1 for u in together)
    assert together.tolist() == [uniform([s], [c], [p])[0] for s, c, p in keys]


def test_each_of_seed_choice_and_position_matters():
    keys = [(s, c, p) for s in range(-3, 8) for c in range(8) for p in range(64)]
    values = uniform(*(list(column) for column in zip(*keys, strict=True)))
    assert len(set(values.tolist())) == len(keys)


@pytest.mark.parametrize("axis", ["seed", "choice", "position"])
def test_uniform_is_uniform_and_uncorrelated_along_each_axis(axis):
    n = 20_000
    columns = [[7] * n, [0] * n, [3] * n]
    columns[["seed", "choice", "position"].index(axis)] = list(range(n))
    u = uniform(*columns)
    assert chisquare(np.bincount((u * 50).astype(int), minlength=50)).pvalue > 1e-3
    for lag in (1, 2, 64):
        # Each is about normal with deviation 1 / sqrt(n).
        assert abs(np.corrcoef(u[:-lag], u[lag:])[0, 1]) < 4 / math.sqrt(n)
    pairs = (u[:-1:2] * 10).astype(int) * 10 + (u[1::2] * 10).astype(int)
    assert chisquare(np.bincount(pairs, minlength=100)).pvalue > 1e-3


def test_seeds_of_64_bits_are_told_apart():
    seeds = [0, 1, -1, 2**31, 2**32, 2**63 - 1, -(2**63), 2**63 + 1]
    assert len(set(uniform(seeds, [0] * len(seeds), [0] * len(seeds)).tolist())) == len(seeds)


def test_greedy_is_the_argmax_whatever_the_other_rows_do():
    logits = torch.randn(40, 301, generator=torch.Generator().manual_seed(0))
    rows = [row(temperature=0.0 if i % 2 else 1.0, seed=i) for i in range(40)]
    tokens = sample(logits, SamplingBatch(rows, [5] * 40))
    assert torch.equal(tokens[1::2], logits[1::2].argmax(-1))
    assert not torch.equal(tokens[::2], logits[::2].argmax(-1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax(temperature):
    logits = torch.tensor([2.0, 1.0, 0.0, 0.5, -1.0, 1.5, -2.0])
    n = 20_000
    counts = torch.bincount(draws(logits, n, temperature=temperature, seed=11), minlength=7)
    expected = (logits.double() / temperature).softmax(-1) * n
    assert chisquare(counts.numpy(), expected.numpy()).pvalue > 1e-3


def test_filtered_frequencies_are_the_renormalised_softmax():
    logits = torch.tensor([2.0, 1.0, 0.0, 0.5, -1.0, 1.5, -2.0])
    n = 20_000
    counts = torch.bincount(draws(logits, n, top_k=3, seed=5), minlength=7)
    kept = torch.tensor([0, 1, 5])
    expected = logits[kept].double().softmax(-1) * n
    assert counts.sum() == counts[kept].sum()
    assert chisquare(counts[kept].numpy(), expected.numpy()).pvalue > 1e-3


@given(st.integers(0, 2**32), st.integers(1, 12), st.integers(2, 80), st.randoms(use_true_random=False))
def test_a_row_draws_the_same_alone_and_in_any_batch(seed, n, vocab, random):
    logits = torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed)) * 3
    rows = [
        row(
            temperature=random.choice([0.0, 0.3, 1.0, 1.7]),
            top_p=random.choice([1.0, 0.9, 0.3]),
            top_k=random.choice([0, 1, 5, 1000]),
            min_p=random.choice([0.0, 0.05, 1.0]),
            seed=random.randrange(-(2**63), 2**63),
            choice=random.randrange(4),
        )
        for _ in range(n)
    ]
    positions = [random.randrange(1000) for _ in range(n)]
    together = sample(logits, SamplingBatch(rows, positions)).tolist()
    for i in range(n):
        assert together[i] == sample(logits[i : i + 1], SamplingBatch([rows[i]], [positions[i]])).item()


def naive_kept(logits, top_k, top_p, min_p):
    """Token ids that top-k, then top-p, then min-p leave, in plain Python; ties go to the lower id."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if top_k > 0:
        order = order[:top_k]
    weights = [math.exp(logits[i] - logits[order[0]]) for i in order]
    probs = [w / math.fsum(weights) for w in weights]
    kept, borderline = set(), set()
    before = 0.0
    for rank, (i, p) in enumerate(zip(order, probs, strict=True)):
        if rank == 0 or (before < top_p and p >= min_p * probs[0]):
            kept.add(i)
        if rank and (abs(before - top_p) < 1e-12 or abs(p - min_p * probs[0]) < 1e-15):
            borderline.add(i)
        before += p
    return kept, borderline


@given(
    # Few distinct values: ties are common.
    st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.25, 0.5, 1.0, 3.0]), min_size=1, max_size=67),
    st.integers(0, 70),
    st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.999, 1.0]),
    st.sampled_from([0.0, 0.01, 0.2, 0.9, 1.0]),
)
def test_filters_match_a_naive_implementation(logits, top_k, top_p, min_p):
    filtered = filter_logits(
        torch.tensor([logits], dtype=torch.float64),
        torch.tensor([top_k]),
        torch.tensor([top_p], dtype=torch.float64),
        torch.tensor([min_p], dtype=torch.float64),
    )[0]
    kept, borderline = naive_kept(logits, top_k, top_p, min_p)
    ours = {i for i, value in enumerate(filtered.tolist()) if value != -math.inf}
    assert kept ^ ours <= borderline
    assert all(filtered[i] == logits[i] for i in ours)


def test_filters_differ_by_row():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]]).double().expand(4, -1)
    filtered = filter_logits(
        logits,
        torch.tensor([0, 2, 0, 0]),
        torch.tensor([1.0, 1.0, 0.7, 1.0]).double(),
        torch.tensor([0.0, 0.0, 0.0, 0.2]).double(),
    )
    # Probabilities are 0.644, 0.237, 0.087, 0.032.
    assert filtered.isfinite().tolist() == [
        [True, True, True, True],
        [True, True, False, False],
        [True, True, False, False],
        [True, True, False, False],
    ]


def test_a_token_of_zero_probability_is_never_drawn():
    vocab = 33
    logits = torch.full((vocab,), -math.inf)
    logits[[4, 17]] = torch.tensor([0.0, 1.0])
    assert set(draws(logits, 5_000).tolist()) == {4, 17}
    # Neither the first nor the last token at the very ends of the range.
    for u in (0.0, 1 - 2.0**-53):
        assert sample_with(u, logits) in (4, 17)
    # exp underflows in float64: the mass is exactly 0.
    assert set(draws([0.0, 1000.0, 0.0], 200).tolist()) == {1}


def sample_with(u, logits):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("server.engine.sampler.uniform", lambda *_: np.array([u]))
        return sample(logits[None], SamplingBatch([row()], [0])).item()


def test_the_whole_range_of_the_draw_is_in_the_vocabulary():
    for vocab in (1, 2, 7, 257):
        logits = torch.randn(vocab, generator=torch.Generator().manual_seed(vocab))
        assert sample_with(0.0, logits) == 0
        assert sample_with(1 - 2.0**-53, logits) == vocab - 1


@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-300, 1e-30])
def test_a_tiny_temperature_is_greedy(temperature):
    logits = torch.randn(50, 301, generator=torch.Generator().manual_seed(0)) * 10
    rows = [row(temperature=temperature, seed=i) for i in range(50)]
    assert torch.equal(sample(logits, SamplingBatch(rows, [0] * 50)), logits.argmax(-1))


def test_top_p_one_filters_nothing_beside_a_row_that_filters():
    # The mass before the last tokens rounds to 1; they must still be what they are alone.
    logits = torch.cat([torch.tensor([50.0]), torch.zeros(9)]).double()[None].expand(2, -1)
    filtered = filter_logits(
        logits, torch.tensor([0, 1]), torch.ones(2).double(), torch.zeros(2, dtype=torch.float64)
    )
    assert filtered[0].isfinite().all() and filtered[1].isfinite().sum() == 1


def test_logits_that_are_not_numbers_give_an_id_of_the_vocabulary():
    logits = torch.full((2, 9), math.nan)
    assert all(0 <= t < 9 for t in sample(logits, SamplingBatch([row(), row(temperature=0.0)], [0, 0])))
