"""The tests themselves: rounds in which variants take turns, and the search for the highest rate."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from loadtest.client import Completion, Result, closed_loop, open_loop
from loadtest.figures import Objectives, Slice, observe
from loadtest.workload import Workload

WARM_UP = -1
"""Number of the workload's block that is sent to warm up and is not counted."""


@dataclass(frozen=True)
class Target:
    """Where to send requests, and how patiently."""

    url: str
    variants: tuple[str, ...]
    key: str = field(default="", repr=False)
    timeout_s: float = 60.0
    temperature: float = 0.0


@dataclass(frozen=True)
class Load:
    """An open loop with `rate` requests a second, or a closed one with `concurrency` clients."""

    rate: float | None
    concurrency: int | None


async def send(
    target: Target,
    variant: str,
    load: Load,
    requests: list[Completion],
    arrivals: Sequence[float],
    on_result: Callable[[Result], None],
) -> tuple[list[Result], float]:
    """One slice: all requests to one variant, to the last one's end."""
    options = {"timeout_s": target.timeout_s, "key": target.key, "temperature": target.temperature}
    if load.concurrency is not None:
        return await closed_loop(
            target.url,
            variant,
            requests,
            load.concurrency,
            on_result=on_result,
            **options,  # type: ignore[arg-type]
        )
    return await open_loop(target.url, variant, requests, arrivals, on_result=on_result, **options)  # type: ignore[arg-type]


async def paired(
    target: Target,
    load: Load,
    workload: Workload,
    rounds: int,
    count: int,
    warm_up: int,
    until: float,
    on_result: Callable[[str, Result], None],
) -> list[Slice]:
    """`rounds` rounds; in each, every variant gets the same `count` requests at the same times, one after the other, in
    an order that turns from round to round. No round begins after `until` (time.monotonic()).

    Raises:
        ConnectionError: nothing of the warm-up came through.
    """
    await _warm_up(target, load, workload, warm_up)
    slices = []
    for r in range(rounds):
        if time.monotonic() >= until:
            break
        requests = workload.requests(r, count)
        arrivals = workload.arrivals(r, count, load.rate) if load.rate else []
        turn = r % len(target.variants)
        for variant in target.variants[turn:] + target.variants[:turn]:
            results, seconds = await send(
                target,
                variant,
                load,
                requests,
                arrivals,
                lambda result, v=variant: on_result(v, result),  # type: ignore[misc]
            )
            slices.append(Slice(variant, r, seconds, results))
    return slices


async def _warm_up(target: Target, load: Load, workload: Workload, count: int) -> None:
    requests = workload.requests(WARM_UP, max(count, 1))
    arrivals = workload.arrivals(WARM_UP, len(requests), load.rate) if load.rate else []
    for variant in target.variants:
        results, _ = await send(target, variant, load, requests, arrivals, lambda _: None)
        errors = [r.error for r in results if r.error]
        if len(errors) == len(results):
            raise ConnectionError(f"{variant}: no request of the warm-up came through: {errors[0]}")


@dataclass(frozen=True)
class Probe:
    """One rate, tried on one variant."""

    variant: str
    rate: float
    held: bool
    share: float
    """Share of the requests that met the objectives."""
    slice: Slice


@dataclass
class Search:
    """Bisection for the highest rate of one variant."""

    rate: float
    """The rate to try next, in requests per second."""
    low: float = 0.0
    """The highest rate that was held; 0 while there is none."""
    high: float | None = None
    """The lowest rate that was not held; None while there is none."""

    def add(self, held: bool) -> None:
        if held:
            self.low = max(self.low, self.rate)
        else:
            self.high = self.rate if self.high is None else min(self.high, self.rate)
        if self.high is None:
            self.rate = 2 * self.low
        elif self.low == 0.0:
            self.rate = self.high / 2
        else:
            self.rate = (self.low * self.high) ** 0.5

    def done(self, precision: float) -> bool:
        return self.high is not None and self.low > 0 and self.high / self.low <= 1 + precision


async def sweep(
    target: Target,
    workload: Workload,
    objectives: Objectives,
    start: float,
    seconds: float,
    attain: float,
    precision: float,
    steps: int,
    max_requests: int,
    until: float,
    on_probe: Callable[[Probe], None],
) -> tuple[dict[str, Search], list[Probe]]:
    """The highest rate at which a share `attain` of requests meets the objectives, for each variant.

    Variants take turns, one probe each, so that a machine that becomes busy does so for all. A rate counts as not
    held if it fails twice in a row: one bad moment of the machine does not decide. A probe lasts about `seconds` and
    sends at most `max_requests`, of the same lengths each time; each variant gets at most `steps` rates.
    """
    await _warm_up(target, Load(start, None), workload, 4)
    searches = {variant: Search(start) for variant in target.variants}
    probes: list[Probe] = []

    async def holds(variant: str, rate: float, salt: str) -> bool:
        count = min(max(round(rate * seconds), 20), max_requests)
        requests = replace(workload, salt=f"{workload.salt} {salt}").requests(0, count)
        arrivals = workload.arrivals(0, count, rate)
        results, took = await send(target, variant, Load(rate, None), requests, arrivals, lambda _: None)
        part = Slice(variant, len(probes), took, results)
        seen = observe([part], objectives)
        share = seen.good / seen.requests
        probes.append(Probe(variant, rate, share >= attain, share, part))
        on_probe(probes[-1])
        return probes[-1].held

    for step in range(steps):
        turn = step % len(target.variants)
        for variant in target.variants[turn:] + target.variants[:turn]:
            search = searches[variant]
            if search.done(precision) or time.monotonic() >= until:
                continue
            rate = search.rate
            search.add(await holds(variant, rate, f"{step}") or await holds(variant, rate, f"{step} again"))
    return searches, probes
