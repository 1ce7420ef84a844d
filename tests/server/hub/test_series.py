"""The A/B figures over time against numpy on the same numbers."""

import numpy as np
import pytest
from ab_news import pair_of, request
from scipy import stats

from server.hub import window as ab
from server.hub.series import series
from server.hub.window import ABWindow
from server.wire.hub import Shadowed


@pytest.fixture
def at(monkeypatch):
    """Sets the time."""
    now = [0.0]
    monkeypatch.setattr("time.time", lambda: now[0])

    def set_it(seconds):
        now[0] = seconds

    return set_it


def test_parts_begin_at_whole_multiples_and_the_last_one_goes_on(at):
    window = ABWindow(samples=1000)
    for seconds in (599, 600, 659.9, 660, 719, 720, 725):
        at(seconds)
        window.add_request(request(failed=seconds == 660))
    at(730)
    seen = series(window, ["dense", "reduced"], 180, 3)
    assert seen["step_s"] == 60 and seen["starts"] == [600, 660, 720]
    assert seen["variants"]["dense"]["requests"] == [2, 2, 2], "599 is before all of them"
    assert seen["variants"]["dense"]["errors"] == [0, 1, 0]
    assert seen["variants"]["reduced"]["requests"] == [0, 0, 0]
    assert seen["variants"]["reduced"]["ttft_s"] == [None] * 3
    at(779.9)
    assert series(window, ["dense"], 180, 3)["starts"] == [600, 660, 720], "nothing moves within a part"
    at(780)
    assert series(window, ["dense"], 180, 3)["starts"] == [660, 720, 780]


def test_traffic_of_each_part(at):
    window, rng = ABWindow(samples=1000), np.random.default_rng(0)
    ended = rng.uniform(0, 100, 300)
    tokens = rng.integers(1, 40, 300)
    decode, ttft = rng.uniform(0.1, 1, 300), rng.uniform(0, 1, 300)
    for i in range(300):
        at(float(ended[i]))
        first = i % 7 > 0  # others failed before their first token
        window.add_request(
            request(
                tokens=int(tokens[i]) * first,
                decode=float(decode[i]) if first else None,
                ttft=float(ttft[i]) if first else None,
                failed=not first,
            )
        )
    at(99.99)
    seen = series(window, ["dense"], 100, 5)["variants"]["dense"]
    answered = np.arange(300) % 7 > 0
    for part in range(5):
        inside = (ended >= 20 * part) & (ended < 20 * part + 20)
        assert seen["requests"][part] == inside.sum()
        assert seen["errors"][part] == (inside & ~answered).sum()
        both = inside & answered
        assert seen["ttft_s"][part] == pytest.approx(ttft[both].mean())
        speed = (tokens[both] - 1).sum() / decode[both].sum()
        assert seen["tokens_per_second"][part] == pytest.approx(speed)


def fill(window, at, moments, *, seed=0):
    """Pairs at these moments, from both sources; (kl, ratio) of each, in their order."""
    rng = np.random.default_rng(seed)
    kl, ratio = rng.gamma(2.0, 0.02, len(moments)), np.exp(rng.normal(0.1, 0.3, len(moments)))
    for i in range(len(moments)):
        at(float(moments[i]))
        window.add_pair(
            pair_of(
                "reduced",
                "dense",
                ("compare", "shadow")[i % 2],
                tokens=i,
                kl=float(kl[i]),
                top1_agreement=0.9,
                prompt_nll_difference=float(kl[i]) - 0.03,
                speed_ratio=float(ratio[i]),
            )
        )
    return kl, ratio


def test_what_was_known_at_the_end_of_each_part(at):
    window = ABWindow(samples=10)
    moments = np.linspace(1, 99, 200)
    kl, ratio = fill(window, at, moments)
    (seen,) = series(window, ["dense", "reduced"], 100, 4)["pairs"]
    assert (seen["variant"], seen["baseline"]) == ("reduced", "dense")
    for part in range(4):
        by_then, inside = moments < 25 * part + 25, (moments >= 25 * part) & (moments < 25 * part + 25)
        assert seen["parts"]["kl"][part] == pytest.approx(kl[inside].mean())
        assert seen["parts"]["speed_ratio"][part] == pytest.approx(stats.gmean(ratio[inside]))
        found = seen["so_far"]["kl"][part]
        assert found["pairs"] == by_then.sum()
        low, high = stats.norm.interval(0.95, kl[by_then].mean(), stats.sem(kl[by_then]))
        assert (found["mean"], found["low"], found["high"]) == pytest.approx((kl[by_then].mean(), low, high))
        logs = np.log(ratio[by_then])
        ends = np.exp(stats.norm.interval(0.95, logs.mean(), stats.sem(logs)))
        found = seen["so_far"]["speed_ratio"][part]
        assert (found["low"], found["high"]) == pytest.approx(tuple(ends))
    # The last of them is of the same pairs as the summary's, whose interval is a bootstrap's.
    (pair,) = window.pairs(100)
    for name in ("kl", "prompt_nll_difference", "speed_ratio"):
        last = seen["so_far"][name][-1]
        assert last["pairs"] == pair[name]["pairs"] == 200
        assert last["mean"] == pytest.approx(pair[name]["mean"])
        width = pair[name]["high"] - pair[name]["low"]
        assert last["low"] == pytest.approx(pair[name]["low"], abs=0.15 * width)
        assert last["high"] == pytest.approx(pair[name]["high"], abs=0.15 * width)


def test_few_pairs_have_no_interval_and_repeated_ones_count_once(at):
    window = ABWindow(samples=10)
    for _ in range(2):
        fill(window, at, np.linspace(1, 49, ab.MIN_PAIRS - 1))
    at(60)
    (seen,) = series(window, ["dense"], 100, 2)["pairs"]
    for found in seen["so_far"]["kl"]:
        assert found["pairs"] == ab.MIN_PAIRS - 1 and found["low"] is None
    assert seen["so_far"]["speed_ratio"][0]["pairs"] == 2 * (ab.MIN_PAIRS - 1)
    assert seen["so_far"]["speed_ratio"][0]["low"] is not None
    assert seen["parts"]["kl"][1] is None and seen["so_far"]["ttft_difference_s"] == [None, None]
    assert series(ABWindow(samples=10), ["dense"], 100, 2)["pairs"] == []


def test_what_became_of_shadow_traffic_is_counted_in_the_window(at):
    window = ABWindow(samples=5)
    assert window.shadow(60) == []
    for seconds, outcome in ((0, "failed"), (50, "scored"), (60, "dropped"), (70, "scored")):
        at(seconds)
        window.add_shadow(Shadowed(variant="reduced", baseline="dense", outcome=outcome))
    window.add_shadow(Shadowed(variant="other", baseline="dense", outcome="failed"))
    first, second = window.shadow(60)
    assert first == {"variant": "reduced", "baseline": "dense", "scored": 2, "dropped": 1, "failed": 0}
    assert (second["variant"], second["failed"]) == ("other", 1)
