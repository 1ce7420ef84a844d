"""The search for the highest rate, and what is sent, without a server."""

import asyncio
import math

import pytest

from loadtest import run
from loadtest.client import Result
from loadtest.figures import Objectives
from loadtest.run import Search, Target, sweep
from loadtest.workload import Lengths, Workload

WORKLOAD = Workload(Lengths("8-80"), Lengths("4-40"), 250, seed=3, salt="a")


def quick(sent):
    return Result(sent, ended=sent + 0.1, token_times=[sent + 0.1], tokens=1)


def search(monkeypatch, keeps, **options):
    """Sweep with a server that holds the rates that `keeps(variant, rate, nth probe)` says; searches and probes."""
    seen, prompts = {}, []

    async def send(target, variant, load, requests, arrivals, on_result):
        if len(requests) == 4:
            return [quick(0.0)] * 4, 1.0
        number = seen[variant] = seen.get(variant, -1) + 1
        prompts.append((variant, [r.prompt for r in requests]))
        ok = keeps(variant, load.rate, number)
        return [quick(t) if ok else Result(t, error="late") for t in arrivals], 1.0

    monkeypatch.setattr(run, "send", send)
    limits = dict(start=2.0, seconds=1.0, attain=0.9, precision=0.1, steps=20, max_requests=50) | options
    searches, probes = asyncio.run(
        sweep(
            Target("http://x", ("dense", "reduced")),
            WORKLOAD,
            Objectives(0.5, 0.05),
            **limits,
            until=math.inf,
            on_probe=lambda _: None,
        )
    )
    return searches, probes, prompts


def test_the_search_closes_in_on_the_limit(monkeypatch):
    limit = {"dense": 5.0, "reduced": 11.0}
    searches, _, _ = search(monkeypatch, lambda variant, rate, _: rate <= limit[variant])
    for name, found in searches.items():
        assert found.low <= limit[name] < found.high <= 1.1 * found.low


def test_a_rate_that_fails_once_and_is_then_held_is_held(monkeypatch):
    searches, probes, _ = search(monkeypatch, lambda _v, rate, number: rate <= 5.0 and number != 0)
    assert [p.held for p in probes if p.variant == "dense"][:2] == [False, True]
    assert all(found.low <= 5.0 < found.high <= 1.1 * found.low for found in searches.values())


def test_nothing_is_sent_twice_to_a_variant_and_the_same_to_all(monkeypatch):
    _, _, prompts = search(monkeypatch, lambda _v, rate, _n: rate <= 5.0)
    dense, reduced = ([p for v, p in prompts if v == name] for name in ("dense", "reduced"))
    assert dense == reduced
    flat = [tuple(ids) for block in dense for ids in block if len(ids) > 12]
    assert len(flat) == len(set(flat)) > 50


def test_another_salt_changes_ids_only():
    one, other = (Workload(WORKLOAD.prompt, WORKLOAD.output, 250, 3, salt=salt) for salt in "ab")
    pairs = list(zip(one.requests(0, 20), other.requests(0, 20), strict=True))
    assert all(len(a.prompt) == len(b.prompt) and a.max_tokens == b.max_tokens for a, b in pairs)
    assert all(a.prompt != b.prompt for a, b in pairs)
    assert one.arrivals(0, 5, 2.0) == other.arrivals(0, 5, 2.0) == pytest.approx([
        t / 2 for t in one.arrivals(0, 5, 1.0)
    ])  # fmt: skip


def test_search_halves_until_something_is_held():
    found = Search(8.0)
    for held in (False, False, True):
        found.add(held)
    assert (found.low, found.high) == (2.0, 4.0) and 2.0 < found.rate < 4.0
