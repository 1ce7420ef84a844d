"""The hub: what is one for all front ends of a server, however many there are."""

import asyncio
import contextlib
import functools
import itertools
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client import Metric

from server.handover import to_json
from server.hub.engines import Engine, RuntimeDir, engine_configs
from server.hub.limits import AllLimits
from server.hub.metrics import EngineMetrics, HubMetrics, as_metrics, render, summed
from server.hub.series import series
from server.hub.window import CONFIDENCE, ABWindow
from server.settings import Settings
from server.wire.hub import (
    Admit,
    AskTotals,
    BeginScoring,
    BeginShadow,
    Charge,
    EndAnswer,
    EndedRequest,
    EndScoring,
    EndShadow,
    EngineUp,
    Family,
    LeavePlace,
    Leaving,
    News,
    NextOrder,
    Pair,
    Ping,
    Question,
    Refusal,
    Reload,
    RenderMetrics,
    Shadowed,
    Stop,
    Summarise,
    TakeRequest,
    Totals,
    Update,
    Waiting,
)

TOTALS_S = 2.0
"""How long front ends and engines may take to say what they have counted. One that takes longer counts as when it last
said."""


@dataclass
class _Places:
    """Places in an engine's queue that one answer has."""

    engine: Engine
    held: int


@dataclass
class _FrontEnd:
    """One front end, and what it has of what is shared."""

    receive: Callable[[Update], None]
    places: dict[int, _Places] = field(default_factory=dict)
    totals: list[Family] = field(default_factory=list)
    """All that it has counted, as it last said."""
    steps: dict[str, float] = field(default_factory=dict)
    """By variant: `made_at` of the last step that it had an answer of then."""
    answered: int = 0
    """The `AskTotals` that it last answered."""


class Hub:
    """Engines, places in their queues, limits, A/B figures and metrics of one server.

    Front ends reach it by a `Link`. What a front end held when it went is given back.

    Args:
        on_fatal: called with a variant's name and the reason when its checkpoint can't be loaded at all.
    """

    def __init__(self, settings: Settings, on_fatal: Callable[[str, str], None]) -> None:
        self.settings = settings
        self.started = int(time.time())
        self.leaving = False
        """Whether the server has been asked to stop: it is not ready any more, whether or not it still takes
        requests."""
        self.draining = False
        """Whether the server takes no new requests."""
        self._reloaded = False
        """Whether settings have been read again since the start."""
        self._stopped = False
        """Whether all front ends have been told to end."""
        self.metrics = HubMetrics()
        self.metrics.on_reload(settings)
        self._runtime_dir = RuntimeDir()
        self._window = ABWindow(settings.ab_samples)
        self._limits = AllLimits(settings)
        self._front_ends: dict[str, _FrontEnd] = {}
        self._gone: list[Family] = []
        """All that front ends had counted that have gone."""
        self._numbers = itertools.count(1)
        self._came = asyncio.Event()
        """Set when something has come that metrics are made of."""
        self._scoring: asyncio.Lock = asyncio.Lock()
        """Held for the one comparison that may take up `compare_bytes` of shared memory now."""
        self._scores = ""
        """The front end whose comparison that is."""
        self._shadows = ""
        """The front end that repeats a request as shadow traffic; empty if none does."""
        self._orders = itertools.count(1)
        self.engines = {
            config.variant: Engine(
                config,
                settings,
                self.runtime_dir,
                EngineMetrics(self.metrics, config.variant),
                self.tell_all,
                self._came.set,
                functools.partial(on_fatal, config.variant),
            )
            for config in engine_configs(settings)
        }

    @property
    def runtime_dir(self) -> Path:
        """Private to this server; gone when it closes."""
        return self._runtime_dir.path

    @property
    def answers(self) -> int:
        """Answers that have not ended: of a stream, for as long as the client has not been sent all of it."""
        return sum(len(front_end.places) for front_end in self._front_ends.values())

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Engines run in this block."""
        for engine in self.engines.values():
            engine.process.start()
        try:
            yield
        finally:
            await self.close_engines()
            self._runtime_dir.remove()

    async def close_engines(self) -> None:
        """End all engines. Requests in them fail."""
        for engine in self.engines.values():
            await engine.process.close()

    # --- front ends

    def join(self, name: str, receive: Callable[[Update], None]) -> None:
        """A front end of a name that none has had before. `receive` is called with all updates, beginning with those
        that lead to what is so now."""
        self._front_ends[name] = _FrontEnd(receive)
        self.metrics.api_processes.set(len(self._front_ends))
        for engine in self.engines.values():
            if engine.ready is not None and engine.up:
                receive(EngineUp(variant=engine.variant, ready=engine.ready, address=engine.address))
        if self._reloaded:
            receive(Reload(settings=to_json(self.settings)))
        if self.leaving:
            receive(Leaving())
        if self._stopped:
            receive(Stop())

    def gone(self, name: str) -> None:
        """A front end has ended, however it came about: give back what it held."""
        front_end = self._front_ends.pop(name, None)
        if front_end is None:
            return
        self.metrics.api_processes.set(len(self._front_ends))
        for places in front_end.places.values():
            places.engine.admitted -= places.held
            self.metrics.lost_answers.labels(places.engine.variant).inc()
        self._came.set()  # nobody waits for it any more
        self._gone = summed([self._gone, front_end.totals])
        self._end_scoring(name)
        self._end_shadow(name)
        for engine in self.engines.values():
            engine.process.front_end_gone(name)

    def tell_all(self, update: Update) -> None:
        """Tell all front ends something."""
        for front_end in list(self._front_ends.values()):
            front_end.receive(update)

    def leave(self) -> None:
        """The server has been asked to stop."""
        self.leaving = True
        self.tell_all(Leaving())

    def reload(self, settings: Settings) -> None:
        """Take over what may change while the server runs. What does not fit the rest has been found before
        (`check_routing`)."""
        self.settings, self._reloaded = settings, True
        self._limits.replace(settings)
        self.metrics.on_reload(settings)
        self.tell_all(Reload(settings=to_json(settings)))

    def stop_front_ends(self) -> None:
        """Have all front ends end, those that are yet to come among them."""
        self._stopped = True
        self.tell_all(Stop())

    # --- questions and news

    async def ask(self, front_end: str, question: Question) -> Any:
        """The answer to a front end's question."""
        match question:
            case Ping():
                return None
            case TakeRequest():
                return self._limits.take_request(question.client)
            case Admit():
                return self._admit(self._front_ends[front_end], question)
            case RenderMetrics():
                return render(await self.collect())
            case Summarise():
                return await asyncio.to_thread(self._summary, question.window_s, question.points)
            case BeginScoring():
                await self._scoring.acquire()
                if front_end not in self._front_ends:  # it went while it waited
                    self._scoring.release()
                else:
                    self._scores = front_end
                return None
            case NextOrder():
                return next(self._orders)
            case BeginShadow():
                return self._begin_shadow(front_end, question.variants)
            case Waiting():
                return any(engine.waiting for engine in self._as_they_are(question.variants))

    def tell(self, front_end: str, news: News) -> None:
        """Take in what a front end tells. One that is gone has nothing to tell any more."""
        teller = self._front_ends.get(front_end)
        if teller is None:
            return
        match news:
            case LeavePlace():
                places = teller.places.get(news.place)
                if places is not None and places.held:
                    places.held -= 1
                    places.engine.admitted -= 1
            case EndAnswer():
                places = teller.places.pop(news.place, None)
                if places is not None:
                    places.engine.admitted -= places.held
            case Charge():
                self._limits.take_tokens(news.client, news.tokens)
            case EndedRequest():
                self._window.add_request(news)
            case Pair():
                self._window.add_pair(news)
            case Shadowed():
                self._window.add_shadow(news)
            case EndScoring():
                self._end_scoring(front_end)
            case EndShadow():
                self._end_shadow(front_end)
            case Totals():
                teller.totals, teller.answered = news.families, max(teller.answered, news.answers)
                teller.steps = news.steps
                self._came.set()

    def _admit(self, front_end: _FrontEnd, question: Admit) -> Refusal | None:
        if self.draining:
            return Refusal("draining", "the server is shutting down")
        engine = self.engines[question.variant]
        refusal = engine.refusal(question.count)
        if refusal is None:
            front_end.places[question.place] = _Places(engine, question.count)
            engine.admitted += question.count
        return refusal

    def _begin_shadow(self, front_end: str, variants: list[str]) -> bool:
        free = not self._shadows and not self.draining
        if free and all(engine.up and not engine.waiting for engine in self._as_they_are(variants)):
            self._shadows = front_end
            return True
        return False

    def _as_they_are(self, variants: list[str]) -> list[Engine]:
        """The engines of these variants, what they have said until now taken in: it may have come by another way than
        the answer that a front end has already."""
        engines = [self.engines[variant] for variant in variants]
        for engine in engines:
            engine.process.catch_up()
        return engines

    def _end_shadow(self, front_end: str) -> None:
        if self._shadows == front_end:
            self._shadows = ""

    def _end_scoring(self, front_end: str) -> None:
        if self._scores == front_end:
            self._scores = ""
            self._scoring.release()

    # --- figures

    async def collect(self) -> list[Metric]:
        """All metrics of the server: those of the engines, and the sums over all front ends that there are and were.

        Whoever has an answer finds it in them, and the engine's steps until then.
        """
        number = next(self._numbers)
        asked = list(self._front_ends.items())
        for _, front_end in asked:
            front_end.receive(AskTotals(number=number))

        def awaited(name: str, front_end: _FrontEnd) -> bool:
            """Whether there is more to come: its own figures, or those of a step that it has answers of already. What
            an engine says of a step comes by another way than the step's answers."""
            return name in self._front_ends and (
                front_end.answered < number
                or any(
                    engine.up and engine.last_step < front_end.steps.get(variant, 0.0)
                    for variant, engine in self.engines.items()
                )
            )

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TOTALS_S):
                while any(awaited(name, front_end) for name, front_end in asked):
                    self._came.clear()
                    await self._came.wait()
        counted = [self._gone, *(front_end.totals for front_end in self._front_ends.values())]
        return [*as_metrics(summed(counted)), *self.metrics.registry.collect()]

    def _summary(self, window_s: float, points: int) -> dict[str, Any]:
        """Takes a fraction of a second over full rings."""
        return {
            "confidence": CONFIDENCE,
            "variants": {variant: self._window.traffic(variant, window_s) for variant in self.engines},
            "pairs": self._window.pairs(window_s),
            "shadow": self._window.shadow(window_s),
            "series": series(self._window, list(self.engines), window_s, points) if points else None,
        }


class LocalLink:
    """The way to a hub in the same process."""

    def __init__(self, hub: Hub, front_end: str = "0") -> None:
        self.front_end = front_end
        self.started = hub.started
        self.runtime_dir = hub.runtime_dir
        self._hub = hub

    def listen(self, receive: Callable[[Update], None]) -> None:
        self._hub.join(self.front_end, receive)

    async def ask(self, question: Question) -> Any:
        return await self._hub.ask(self.front_end, question)

    def tell(self, news: News) -> None:
        self._hub.tell(self.front_end, news)
