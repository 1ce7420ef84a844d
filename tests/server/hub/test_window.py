"""The A/B figures against numpy and scipy on the same numbers."""

import itertools

import numpy as np
import pytest
from ab_news import pair_of, request
from scipy import stats

from server.hub import window as ab
from server.hub.window import ABWindow, Ring, bootstrap_mean


@pytest.fixture
def clock(monkeypatch):
    """Sets the time."""
    now = [1000.0]
    monkeypatch.setattr("server.hub.window.time.time", lambda: now[0])

    def at(seconds):
        now[0] = seconds

    return at


def test_a_ring_keeps_the_last_rows_and_knows_what_it_gave_up():
    ring = Ring(4, 1)
    assert ring.since(0).shape == (0, 1) and ring.covers(0)
    for i in range(4):
        ring.add(float(i), [(float(i),)])
    assert ring.covers(0)
    ring.add(4.0, [(4.0,), (5.0,)])
    assert sorted(ring.since(0)[:, 0]) == [2, 3, 4, 5] and sorted(ring.since(3)[:, 0]) == [3, 4, 5]
    assert ring.covers(3) and not ring.covers(1)
    ring.add(5.0, [(float(i),) for i in range(10, 21)])  # more at once than there is room for
    assert sorted(ring.since(0)[:, 0]) == [17, 18, 19, 20] and not ring.covers(5)
    ring.add(6.0, [(1.0,)])
    assert sorted(ring.since(0)[:, 0]) == [1, 18, 19, 20]


def test_traffic_of_a_window(clock):
    window, rng = ABWindow(samples=1000), np.random.default_rng(1)
    clock(100)
    window.add_request(request(tokens=999))
    clock(200)
    speeds, ttfts, gaps = rng.uniform(10, 500, 57), rng.uniform(0, 1, 57), rng.uniform(0, 0.1, (57, 9))
    for speed, ttft, own in zip(speeds, ttfts, gaps, strict=True):
        window.add_request(request(decode=19 / speed, ttft=ttft, gaps=own))
    window.add_request(request(tokens=0, decode=None, ttft=None, failed=True))
    clock(250)
    seen = window.traffic("dense", 60)
    assert (seen["requests"], seen["errors"], seen["completion_tokens"]) == (58, 1, 1140)
    for name, values, mean in (
        ("tokens_per_second", speeds, stats.hmean(speeds)),  # all tokens over all of their time
        ("ttft_s", ttfts, ttfts.mean()),
        ("itl_s", gaps.ravel(), gaps.mean()),
    ):
        expected = dict(zip(("p50", "p95", "p99"), np.percentile(values, [50, 95, 99]), strict=True))
        assert seen[name] == pytest.approx({"mean": mean, **expected})
    assert seen["complete"] and window.traffic("dense", 200)["requests"] == 59
    nothing = window.traffic("reduced", 60)
    assert nothing["requests"] == 0 and nothing["ttft_s"] is None and nothing["complete"]


def test_short_requests_weigh_little_in_the_speed_and_have_no_part_in_its_percentiles(clock):
    window = ABWindow(samples=1000)
    for _ in range(10):
        window.add_request(request(tokens=2, decode=0.00005))  # two tokens in one burst: 20,000 tokens/s
    assert window.traffic("dense", 60)["tokens_per_second"] == {
        "mean": pytest.approx(20_000),
        "p50": None,
        "p95": None,
        "p99": None,
    }
    for decode in (0.9, 1.0, 1.1):
        window.add_request(request(tokens=101, decode=decode))
    window.add_request(request(tokens=1, decode=0.0))
    speeds = window.traffic("dense", 60)["tokens_per_second"]
    assert speeds["mean"] == pytest.approx(310 / 3.0005)
    assert speeds["p50"] == pytest.approx(100) and speeds["p95"] < 112


def test_a_window_that_is_longer_than_the_memory_says_so(clock):
    window = ABWindow(samples=100)
    for i in range(150):
        clock(float(i))
        window.add_request(request())
    assert not window.traffic("dense", 140)["complete"] and window.traffic("dense", 50)["complete"]


def test_the_bootstrap_agrees_with_scipy_and_covers_the_mean():
    values = np.random.default_rng(3).lognormal(size=200)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=5000, rng=0)
    low, high = theirs.confidence_interval
    assert bootstrap_mean(values) == pytest.approx((low, high), rel=0.03)
    assert bootstrap_mean(values) == bootstrap_mean(values)
    hits = 0
    for seed in range(60):
        low, high = bootstrap_mean(np.random.default_rng(seed).normal(2.0, 1.0, 60))
        hits += low <= 2.0 <= high
    assert stats.binomtest(hits, 60, 0.94).pvalue > 1e-4


TOKENS = itertools.count(1000)


def fill(window, n, *, source="shadow", shift=0.02, speed=None):
    rng = np.random.default_rng(0)
    for _ in range(n):
        pair = pair_of(
            "reduced",
            "dense",
            source,
            tokens=next(TOKENS),
            kl=float(rng.uniform(0.01, 0.05)),
            top1_agreement=0.9,
            prompt_nll_difference=float(rng.normal(shift, 0.01)),
            speed_ratio=None if speed is None else float(rng.normal(speed, 0.05)),
        )
        window.add_pair(pair)


def verdict(window):
    (pair,) = window.pairs(60)
    return pair["verdict"]


def test_too_little_data_is_said(clock):
    window = ABWindow(samples=100)
    assert window.pairs(60) == []
    fill(window, ab.MIN_PAIRS - 1)
    (pair,) = window.pairs(60)
    assert pair["verdict"].startswith("too little data: 29 different pairs of reduced and dense, at least 30")
    assert pair["kl"]["low"] is None and pair["kl"]["pairs"] == 29 and pair["speed_ratio"] is None
    clock(2000)
    assert window.pairs(60) == []


def test_verdicts(clock):
    for shift, words in (
        (0.02, "less likely than dense"),
        (-0.02, "more likely than"),
        (0, "can't be told apart"),
    ):
        window = ABWindow(samples=100)
        fill(window, 200, shift=shift)
        assert words in verdict(window)
        assert "too little data on speed: 0 timed pairs" in verdict(window)
    window = ABWindow(samples=100)
    fill(window, 40, source="compare", speed=1.3)
    fill(window, 100)
    (pair,) = window.pairs(60)
    assert pair["pairs"] == {"compare": 40, "shadow": 100}
    assert pair["kl"]["pairs"] == 140 and pair["speed_ratio"]["pairs"] == 40
    speed = pair["speed_ratio"]
    assert speed["low"] < speed["mean"] < speed["high"] and speed["mean"] == pytest.approx(1.3, rel=0.02)
    assert "1.3" in pair["verdict"] and "90.0%" in pair["verdict"]


def test_equal_speeds_have_a_ratio_of_one_whichever_is_divided_by_the_other():
    window = ABWindow(samples=100)
    rng = np.random.default_rng(5)
    for a, b in np.exp(rng.normal(0, 0.5, (400, 2))):
        for names, ratio in ((("b", "a"), b / a), (("a", "b"), a / b)):
            pair = pair_of(
                *names,
                "compare",
                tokens=1,
                kl=0.1,
                top1_agreement=1.0,
                prompt_nll_difference=0.0,
                speed_ratio=float(ratio),
            )
            window.add_pair(pair)
    one, other = (pair["speed_ratio"] for pair in window.pairs(60))
    assert one["mean"] * other["mean"] == pytest.approx(1)
    assert one["low"] * other["high"] == pytest.approx(1, rel=0.02)
    assert one["low"] < 1 < one["high"] and other["low"] < 1 < other["high"]


def test_pairs_without_prompt_perplexity():
    window = ABWindow(samples=100)
    for i in range(40):
        pair = pair_of("b", "a", "shadow", tokens=i, kl=0.1, top1_agreement=1.0, prompt_nll_difference=None)
        window.add_pair(pair)
    assert "too little data on the likelihood" in verdict(window) and "KL 0.1" in verdict(window)


def test_the_same_tokens_again_are_no_further_evidence_of_quality():
    window = ABWindow(samples=100)
    rng = np.random.default_rng(2)
    for tokens in range(-20, 20):
        kl, ratio = float(rng.uniform(0, 1)), float(rng.uniform(1, 2))
        for source, speed in (("compare", None), ("compare", ratio), ("shadow", None)):
            pair = pair_of(
                "reduced",
                "dense",
                source,
                tokens=tokens,
                kl=kl,
                top1_agreement=0.5,
                prompt_nll_difference=kl,
                speed_ratio=speed,
            )
            window.add_pair(pair)
    (pairs,) = window.pairs(60)
    assert pairs["pairs"] == {"compare": 80, "shadow": 40}
    assert [pairs[name]["pairs"] for name in ab.QUALITY_FIELDS] == [40] * 3
    assert pairs["speed_ratio"]["pairs"] == 40 and "too little data:" not in pairs["verdict"]
    few = ABWindow(samples=100)
    for i in range(40):
        pair = pair_of(
            "reduced",
            "dense",
            "compare",
            tokens=i % 20,
            kl=0.1,
            top1_agreement=1.0,
            prompt_nll_difference=0.1,
        )
        few.add_pair(pair)
    assert "too little data: 20 different pairs" in verdict(few)
