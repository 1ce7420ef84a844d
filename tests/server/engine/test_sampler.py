"""Draws depend on (seed, choice, position) alone, follow the softmax, and never pick what is filtered out."""

import math

import numpy as np
import pytest
import torch
from engines import generate
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from server.engine import sampler
from server.engine.cache import Allocation
from server.engine.request import Request
from server.engine.sampler import Sampler, draw, filter_logits, stream_key, uniform
from server.wire.messages import Sampling

SEEDS = st.integers(-(2**63), 2**64 - 1)


def row(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, seed=0, choice=0, **fields):
    return Sampling(
        temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed, choice=choice, **fields
    )


class Rows:
    """Requests in slots of their own, in a mixed-up order, that sample from given logits."""

    def __init__(self, rows, vocab, positions=None, **fields):
        order = np.random.default_rng(len(rows)).permutation(len(rows) + 3)
        self.requests = []
        for slot, how in zip(order.tolist(), rows, strict=False):
            request = Request(generate([1], 10**6, sampling=how, **fields), arrived=0.0)
            request.allocation = Allocation(slot)
            self.requests.append(request)
        self.sampler = Sampler(len(rows) + 3, vocab, torch.device("cpu"))
        self.sampler.start(self.requests)
        if positions is not None:
            slots = torch.tensor([request.slot for request in self.requests])
            self.sampler._positions[slots] = torch.tensor(positions)
        self.plan = self.sampler.plan(self.requests)

    def sample(self, logits):
        return self.sampler.sample(logits, self.plan)


def sample(logits, rows, positions):
    """Tokens of rows that are at these positions."""
    return Rows(rows, logits.shape[1], positions).sample(logits).tokens


def draws(logits, n, **sampling):
    """n draws from one row of logits, at positions 0 to n - 1."""
    logits = torch.as_tensor(logits, dtype=torch.float32)
    return sample(logits.expand(n, -1), [row(**sampling)] * n, list(range(n)))


def uniforms(seeds, choices, positions):
    seeds = torch.tensor([(s + 2**63) % 2**64 - 2**63 for s in seeds])
    return uniform(stream_key(seeds, torch.tensor(choices)), torch.tensor(positions)).numpy()


def splitmix64(x):
    """As Steele, Lea and Flood print it (2014, figure 17), on Python's integers."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


@given(st.lists(st.tuples(SEEDS, st.integers(0, 127), st.integers(0, 2**31)), min_size=1, max_size=20))
def test_uniform_is_a_function_of_seed_choice_and_position(keys):
    together = uniforms(*(list(column) for column in zip(*keys, strict=True)))
    assert all(0 <= u < 1 for u in together)
    assert together.tolist() == [
        (splitmix64(splitmix64(splitmix64(s % 2**64) ^ c) ^ p) >> 11) * 2.0**-53 for s, c, p in keys
    ]


def test_each_of_seed_choice_and_position_matters():
    keys = [(s, c, p) for s in range(-3, 8) for c in range(8) for p in range(64)]
    values = uniforms(*(list(column) for column in zip(*keys, strict=True)))
    assert len(set(values.tolist())) == len(keys)


@pytest.mark.parametrize("axis", ["seed", "choice", "position"])
def test_uniform_is_uniform_and_uncorrelated_along_each_axis(axis):
    n = 20_000
    columns = [[7] * n, [0] * n, [3] * n]
    columns[["seed", "choice", "position"].index(axis)] = list(range(n))
    u = uniforms(*columns)
    assert chisquare(np.bincount((u * 50).astype(int), minlength=50)).pvalue > 1e-3
    for lag in (1, 2, 64):
        # Each is about normal with deviation 1 / sqrt(n).
        assert abs(np.corrcoef(u[:-lag], u[lag:])[0, 1]) < 4 / math.sqrt(n)
    pairs = (u[:-1:2] * 10).astype(int) * 10 + (u[1::2] * 10).astype(int)
    assert chisquare(np.bincount(pairs, minlength=100)).pvalue > 1e-3


def test_seeds_of_64_bits_are_told_apart():
    seeds = [0, 1, -1, 2**31, 2**32, 2**63 - 1, -(2**63), 2**63 + 1]
    assert len(set(uniforms(seeds, [0] * len(seeds), [0] * len(seeds)).tolist())) == len(seeds)


def test_greedy_is_the_argmax_whatever_the_other_rows_do():
    logits = torch.randn(40, 301, generator=torch.Generator().manual_seed(0))
    rows = [row(temperature=0.0 if i % 2 else 1.0, seed=i) for i in range(40)]
    tokens = sample(logits, rows, [5] * 40)
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
    together = sample(logits, rows, positions).tolist()
    for i in range(n):
        assert together[i] == sample(logits[i : i + 1], [rows[i]], [positions[i]]).item()


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
    return draw(logits[None], torch.ones(1).double(), torch.tensor([u], dtype=torch.float64)).item()


def test_the_whole_range_of_the_draw_is_in_the_vocabulary():
    for vocab in (1, 2, 7, 257):
        logits = torch.randn(vocab, generator=torch.Generator().manual_seed(vocab))
        assert sample_with(0.0, logits) == 0
        assert sample_with(1 - 2.0**-53, logits) == vocab - 1


@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-300, 1e-30])
def test_a_tiny_temperature_is_greedy(temperature):
    logits = torch.randn(50, 301, generator=torch.Generator().manual_seed(0)) * 10
    rows = [row(temperature=temperature, seed=i) for i in range(50)]
    assert torch.equal(sample(logits, rows, [0] * 50), logits.argmax(-1))


def test_top_p_one_filters_nothing_beside_a_row_that_filters():
    # The mass before the last tokens rounds to 1; they must still be what they are alone.
    logits = torch.cat([torch.tensor([50.0]), torch.zeros(9)]).double()[None].expand(2, -1)
    filtered = filter_logits(
        logits, torch.tensor([0, 1]), torch.ones(2).double(), torch.zeros(2, dtype=torch.float64)
    )
    assert filtered[0].isfinite().all() and filtered[1].isfinite().sum() == 1


def test_logits_that_are_not_numbers_give_an_id_of_the_vocabulary():
    logits = torch.full((2, 9), math.nan)
    assert all(0 <= t < 9 for t in sample(logits, [row(), row(temperature=0.0)], [0, 0]))


def adjusted(logits, how, generated, prompt, stops=(), min_tokens=0):
    """One row of logits by the definition of each adjustment, in plain Python."""
    result = []
    for token, x in enumerate(logits):
        x += how.logit_bias.get(token, 0.0)
        if how.allowed_token_ids and token not in how.allowed_token_ids:
            x = -math.inf
        if token in stops and len(generated) < min_tokens:
            x = -math.inf
        if token in prompt or token in generated:
            x = x / how.repetition_penalty if x > 0 else x * how.repetition_penalty
        count = generated.count(token)
        x -= how.frequency_penalty * count + how.presence_penalty * (count > 0)
        result.append(x)
    return result


ADJUSTMENTS = [
    {"presence_penalty": 1.5},
    {"frequency_penalty": 0.7},
    {"presence_penalty": -1.0, "frequency_penalty": -0.3},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.5},
    {"logit_bias": {3: 5.0, 7: -100.0}},
    {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.3, "logit_bias": {0: 2.0}},
    {"allowed_token_ids": [2, 7, 11], "frequency_penalty": 0.7},
    {"allowed_token_ids": [5, 3, 3, 8], "presence_penalty": 1.0, "logit_bias": {3: -2.0, 4: 100.0}},
    {},
]


FILTERED = [{"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 5, "top_p": 0.9}, {}]


def test_draws_are_among_the_allowed_tokens():
    allowed = [1, 4, 6]
    tokens = draws(torch.zeros(9), 3000, allowed_token_ids=allowed, logit_bias={4: math.log(2), 5: 100.0})
    counts = np.bincount(tokens, minlength=9)
    assert counts.sum() == counts[allowed].sum()
    assert chisquare(counts[allowed], [750, 1500, 750]).pvalue > 0.001
    narrow = draws(
        torch.arange(9.0), 200, allowed_token_ids=allowed, top_k=2, temperature=100.0, top_p=0.9, min_p=0.1
    )
    assert set(narrow.tolist()) == {4, 6}


def test_adjusted_greedy_tokens_are_the_definitions_beside_other_rows():
    vocab, steps, prompt, stops = 13, 30, [2, 3, 3, 12], [5, 9]
    generator = torch.Generator().manual_seed(2)
    base = torch.randn(len(ADJUSTMENTS), vocab, generator=generator) * 2
    hows = [row(temperature=0.0, **fields) for fields in ADJUSTMENTS]
    rows = Rows(hows, vocab)
    for request, how in zip(rows.requests, hows, strict=True):
        request.message = generate(
            prompt, 10**6, sampling=how, stop_token_ids=[*stops, 300, -1], min_tokens=10
        )
    rows.sampler.start(rows.requests)
    rows.plan = rows.sampler.plan(rows.requests)
    generated = [[] for _ in hows]
    for step in range(steps):
        logits = base + torch.randn(base.shape, generator=generator) * 0.3
        tokens = rows.sample(logits).tokens.tolist()
        for i, how in enumerate(hows):
            expected = adjusted(logits[i].tolist(), how, generated[i], prompt, stops, 10)
            assert expected[tokens[i]] == pytest.approx(max(expected), abs=1e-5), (step, ADJUSTMENTS[i])
            generated[i].append(tokens[i])
    assert all(not set(stops) & set(tokens[:10]) for tokens in generated)
    assert len({tuple(tokens) for tokens in generated}) == len(ADJUSTMENTS), "each does something"


def test_what_is_adjusted_and_drawn_in_pieces_is_what_it_is_at_once(monkeypatch):
    """A large vocabulary has few rows at a time."""
    vocab, generator = 13, torch.Generator().manual_seed(4)
    how = [
        row(temperature=0.9 * (i % 3), seed=i, **fields) for i, fields in enumerate(ADJUSTMENTS + FILTERED)
    ]
    steps = [torch.randn(len(how), vocab, generator=generator) * 2 for _ in range(8)]
    tokens, pieces = [], []
    for piece in (2**24, 3 * vocab, 1):
        monkeypatch.setattr(sampler, "PIECE", piece)
        rows = Rows(how, vocab)
        pieces.append((len(rows.plan.drawn), len(rows.plan.adjusted)))
        tokens.append([rows.sample(logits).tokens.tolist() for logits in steps])
    drawn, changed = (sum(map(bool, counted)) for counted in ((h.temperature for h in how), ADJUSTMENTS))
    assert pieces == [(1, 1), (-(-drawn // 3), -(-changed // 3)), (drawn, changed)]
    assert tokens[0] == tokens[1] == tokens[2]


def test_a_slots_next_request_inherits_no_counts():
    vocab = 5
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.0]])
    rows = Rows([row(temperature=0.0, presence_penalty=10.0)], vocab)
    for _ in range(2):
        rows.sampler.start(rows.requests)
        rows.plan = rows.sampler.plan(rows.requests)
        assert [rows.sample(logits).tokens.item() for _ in range(5)] == [0, 1, 2, 3, 4]


def test_tables_have_as_many_rows_as_were_needed_at_once():
    vocab = 7
    hows = [row(temperature=0.0, presence_penalty=1.0 if i % 2 else 0.0) for i in range(20)]
    rows = Rows(hows, vocab)
    for _ in range(3):
        rows.sampler.start(rows.requests)
    assert 10 <= len(rows.sampler._tables.counts) <= 20


def test_log_probabilities_are_the_models_own_and_the_tokens_is_the_one_in_the_list():
    vocab, n = 31, 9
    logits = torch.randn(n, vocab, generator=torch.Generator().manual_seed(4)) * 3
    hows = [
        row(temperature=[0.0, 0.3, 2.0][i % 3], top_k=5, seed=i, logit_bias={1: 50.0} if i == 4 else {})
        for i in range(n)
    ]
    rows = Rows(hows, vocab)
    wanted = [None, 0, 3, 31, 40, 1, None, 5, 2]
    for request, how, k in zip(rows.requests, hows, wanted, strict=True):
        request.message = generate([1], 10, sampling=how, logprobs=k)
    plan = rows.plan = rows.sampler.plan(rows.requests)
    sampled = rows.sample(logits)
    expected = logits.double().log_softmax(-1)
    assert plan.reported_rows == [1, 2, 3, 4, 5, 7, 8] and plan.wanted == [0, 3, 31, 40, 1, 5, 2]
    assert sampled.top_ids.shape == (7, vocab)
    for at, i in enumerate(plan.reported_rows):
        token = sampled.tokens[i].item()
        assert sampled.logprobs[at].item() == pytest.approx(expected[i, token].item(), abs=1e-5)
        ids, values = sampled.top_ids[at].tolist(), sampled.top_logprobs[at].tolist()
        assert values == sorted(values, reverse=True) and sorted(ids) == list(range(vocab))
        assert values[ids.index(token)] == sampled.logprobs[at].item()  # the very same float
    assert sampled.tokens[4] == 1, "the bias decides, and the log-probability does not know of it"


def test_logits_in_bfloat16_give_the_bits_of_the_same_logits_in_float32():
    """Greedy rows of which several logits are the largest, drawn ones, changed ones and reported ones."""
    hows = [
        row(temperature=[0.0, 0.9][i % 2], seed=i, top_k=[0, 4][i // 2 % 2], **ADJUSTMENTS[i])
        for i in range(len(ADJUSTMENTS))
    ]
    hows += [row(temperature=0.0), row(temperature=0.7, seed=9)]
    for some in (hows, hows[-2:]):  # with rows that are changed, and without
        logits = torch.randn(len(some), 301, generator=torch.Generator().manual_seed(6)).bfloat16()
        logits[-2, [300, 8, 90]] = 7.0
        found = []
        for given_logits in (logits, logits.float()):
            rows = Rows(some, logits.shape[1])
            for request, how in zip(rows.requests, some, strict=True):
                request.message = generate([1, 2], 99, sampling=how, logprobs=3)
            rows.sampler.start(rows.requests)
            rows.plan = rows.sampler.plan(rows.requests)
            found.append([rows.sample(given_logits) for _ in range(3)])
        for narrow, wide in zip(*found, strict=True):
            assert narrow.logprobs.dtype == torch.float32 and narrow.tokens[-2] == 8
            for name, tensor in vars(wide).items():
                assert torch.equal(getattr(narrow, name), tensor), name
