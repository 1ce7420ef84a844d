"""What front ends share, and that it is given back whatever becomes of them."""

import asyncio
import contextlib

import pytest
from engine_process import until
from prometheus_client import CollectorRegistry, Counter, Histogram
from ready import ready

from server.api.serving.metrics import Metrics
from server.handover import from_json
from server.hub import hub as hub_module
from server.hub.hub import Hub, LocalLink
from server.hub.metrics import as_metrics, render, summed
from server.settings import Settings
from server.wire.hub import (
    Admit,
    AskTotals,
    BeginScoring,
    BeginShadow,
    Charge,
    EndAnswer,
    EndScoring,
    EndShadow,
    Family,
    HubSilentError,
    LeavePlace,
    Leaving,
    NextOrder,
    Ping,
    RenderMetrics,
    Stop,
    TakeRequest,
    Totals,
)
from server.wire.link import LinkServer, RemoteLink
from server.wire.messages import Occupancy, Step


@pytest.fixture
def hub():
    hub = Hub(Settings(variants={"a": "x/a", "b": "x/b"}, max_queue=3, tokens_per_minute=60), print)
    for engine in hub.engines.values():
        engine.process.ready, engine.process.up = ready(slots=2, max_running=2), True
    yield hub
    hub._runtime_dir.remove()


@contextlib.asynccontextmanager
async def remote(hub, *names):
    """Links of front ends as in processes of their own."""
    address = f"ipc://{hub.runtime_dir}/hub"
    server = LinkServer(address, hub.join, hub.ask, hub.tell)
    links = [RemoteLink(address, name, hub.started, hub.runtime_dir, pytest.fail) for name in names]
    try:
        for link in links:
            link.listen(lambda _: None)
        await until(lambda: len(hub._front_ends) == len(names))
        yield server, links
    finally:
        for link in links:
            link.close()
        server.close()


def local(hub, name, receive=lambda _: None):
    link = LocalLink(hub, name)
    link.listen(receive)
    return link


def test_places_are_one_count_for_all_front_ends(hub):
    one, two = local(hub, "1"), local(hub, "2")

    async def work():
        assert await one.ask(Admit(place=1, variant="a", count=3)) is None
        refusal = await two.ask(Admit(place=1, variant="a", count=3))
        assert refusal.reason == "queue_full" and "'a' has 3 requests" in refusal.message
        assert await two.ask(Admit(place=2, variant="a", count=2)) is None
        assert (await two.ask(Admit(place=3, variant="a", count=6))).reason == "too_many"
        assert await two.ask(Admit(place=4, variant="b", count=5)) is None, "each variant has its own"

    asyncio.run(work())
    assert hub.engines["a"].admitted == 5 and hub.answers == 3
    one.tell(LeavePlace(place=1))
    one.tell(LeavePlace(place=7))  # nothing that it has
    assert hub.engines["a"].admitted == 4 and hub.answers == 3
    one.tell(EndAnswer(place=1))
    one.tell(EndAnswer(place=1))
    assert hub.engines["a"].admitted == 2 and hub.answers == 2
    hub.gone("2")
    two.tell(LeavePlace(place=2))  # it was on its way
    assert hub.engines["a"].admitted == hub.engines["b"].admitted == hub.answers == 0


@pytest.mark.parametrize(
    ("spoil", "reason", "mention"),
    [
        (lambda hub: setattr(hub.engines["a"].process, "up", False), "engine_down", "'a' is down"),
        (lambda hub: setattr(hub.engines["a"].process, "ready", None), "engine_down", "'a' is still loading"),
        (lambda hub: setattr(hub, "draining", True), "draining", "shutting down"),
    ],
)
def test_nobody_is_let_in_who_would_not_be_answered(hub, spoil, reason, mention):
    spoil(hub)
    refusal = asyncio.run(local(hub, "1").ask(Admit(place=1, variant="a", count=1)))
    assert refusal.reason == reason and mention in refusal.message and hub.answers == 0


def test_tokens_are_charged_to_one_account(hub):
    one, two = local(hub, "1"), local(hub, "2")
    one.tell(Charge(client="", tokens=40))
    assert asyncio.run(two.ask(TakeRequest(client=""))) == 0
    two.tell(Charge(client="", tokens=40))
    assert 20 < asyncio.run(one.ask(TakeRequest(client=""))) < 22, "at a token a second"


def test_one_comparison_scores_at_a_time_and_a_front_end_that_goes_ends_its_turn(hub):
    async def work():
        async with remote(hub, "1", "2", "3") as (server, (one, two, three)):
            await one.ask(BeginScoring())
            waiting = [asyncio.create_task(link.ask(BeginScoring())) for link in (two, three)]
            await until(lambda: len(server._questions) == 2)
            two.tell(EndScoring())  # not its turn: nothing happens
            assert await three.ask(NextOrder()) == 1 and not any(task.done() for task in waiting)
            waiting[0].cancel()  # its client has left
            await until(lambda: len(server._questions) == 1)
            server.gone("1")
            hub.gone("1")
            await waiting[1]
            server.gone("3")
            hub.gone("3")
            assert await two.ask(BeginScoring()) is None

    asyncio.run(work())


def test_one_shadow_at_a_time(hub):
    one, two = local(hub, "1"), local(hub, "2")
    begin = BeginShadow(variants=["a", "b"])

    async def work():
        assert await one.ask(begin)
        assert not await two.ask(begin)
        two.tell(EndShadow())  # it has none
        assert not await two.ask(begin)
        one.tell(EndShadow())
        assert await two.ask(begin)
        hub.gone("2")
        assert await one.ask(begin)

    asyncio.run(work())


def test_a_question_that_fails_is_an_error_and_the_next_one_is_answered(hub, caplog):
    async def work():
        async with remote(hub, "1") as (_, (link,)):
            with pytest.raises(RuntimeError, match="could not answer"):
                await link.ask(Admit(place=1, variant="nobody", count=1))
            assert await link.ask(Admit(place=1, variant="a", count=9)) is not None
            assert await link.ask(Admit(place=2, variant="a", count=1)) is None

    asyncio.run(work())
    assert "KeyError" in caplog.text


def test_a_front_end_that_comes_late_is_told_how_things_are(hub):
    told = []
    hub.leave()
    local(hub, "1", told.append)
    assert [type(update).__name__ for update in told] == ["EngineUp", "EngineUp", "Leaving"]
    assert isinstance(told[-1], Leaving)


def test_it_is_told_of_settings_that_were_read_again_and_that_all_is_over(hub):
    told = []
    hub.reload(hub.settings.model_copy(update={"aliases": {"both": {"a": 1.0}}}))
    hub.stop_front_ends()
    local(hub, "1", told.append)
    *_, again, stop = told
    assert from_json(again.settings).aliases == {"both": {"a": 1.0}} and isinstance(stop, Stop)


def test_an_update_that_can_not_be_taken_in_ends_the_front_end_and_no_other_message_is_lost(hub, caplog):
    failed, told = [], []

    def receive(update):
        if isinstance(update, Leaving):
            raise OSError("the tokenizer has just been deleted")
        told.append(update)

    async def work():
        async with remote(hub) as (_, _none):
            link = RemoteLink(
                f"ipc://{hub.runtime_dir}/hub", "1", 0, hub.runtime_dir, lambda: failed.append(None)
            )
            link.listen(receive)
            await until(lambda: hub.answers == 0 and len(told) == 2)
            hub.leave()
            hub.stop_front_ends()
            await until(lambda: len(told) == 3)
            link.close()
            link.tell(EndShadow())  # nobody hears it

    asyncio.run(work())
    assert len(failed) == 1 and "Leaving" in caplog.text and "deleted" in caplog.text


def test_a_hub_that_is_silent_is_an_error_for_who_waits_for_a_prompt_answer(hub, monkeypatch):
    monkeypatch.setattr("server.wire.link.PROMPT_S", 0.05)

    async def work():
        link = RemoteLink(f"ipc://{hub.runtime_dir}/nobody", "1", 0, hub.runtime_dir, pytest.fail)
        for question in (Ping(), TakeRequest(client=""), Admit(place=1, variant="a", count=1)):
            with pytest.raises(HubSilentError):
                await link.ask(question)
        link.close()

    asyncio.run(work())


def test_what_a_front_end_held_that_died_is_counted(hub):
    one = local(hub, "1")
    asyncio.run(one.ask(Admit(place=1, variant="a", count=2)))
    hub.gone("1")
    hub.gone("1")
    text = render(asyncio.run(hub.collect()))
    assert value_of(text, 'lowkey_answers_lost_total{variant="a"}') == 1
    assert value_of(text, 'lowkey_answers_lost_total{variant="b"}') == 0


def value_of(text, sample):
    return float(next(line for line in text.decode().splitlines() if line.startswith(sample)).split()[-1])


def test_metrics_are_those_of_all_front_ends_that_are_and_were(hub, monkeypatch):
    counted = {name: Metrics() for name in "123"}

    def front_end(name):
        def receive(update):
            if isinstance(update, AskTotals):
                link.tell(Totals(families=counted[name].families(), answers=update.number))

        link = local(hub, name, receive)
        return link

    links = [front_end(name) for name in "123"]

    def tokens():
        return value_of(asyncio.run(links[0].ask(RenderMetrics())), "lowkey_generation_tokens_total")

    for number, metrics in enumerate(counted.values(), 1):
        metrics.generation_tokens.labels("a").inc(number)
    assert tokens() == 6
    hub.gone("2")
    assert tokens() == 6
    counted["1"].generation_tokens.labels("a").inc()
    assert tokens() == 7
    # One that does not answer counts as when it last did.
    monkeypatch.setattr(hub_module, "TOTALS_S", 0.05)
    hub._front_ends["3"].receive = lambda _: None
    counted["3"].generation_tokens.labels("a").inc(100)
    assert tokens() == 7


def test_metrics_have_all_steps_of_which_a_front_end_has_answers(hub):
    engine = hub.engines["a"]

    def receive(update):
        if isinstance(update, AskTotals):
            link.tell(Totals(families=[], steps={"a": 2.0, "b": 0.0}, answers=update.number))

    def told(made_at):
        occupancy = Occupancy(running=0, waiting=0, used_slots=0)
        step = Step(made_at=made_at, phase="decode", step_s=0.1, batch_size=1, occupancy=occupancy)
        return engine.process.on_step, step

    link = local(hub, "1", receive)

    async def steps_in(*events):
        collecting = asyncio.ensure_future(hub.collect())
        for call, *args in events:
            for _ in range(3):
                await asyncio.sleep(0)
            assert not collecting.done(), f"there is a step that it does not have, before {args}"
            call(*args)
        return value_of(render(await collecting), 'lowkey_batch_size_count{engine="0",variant="a"}')

    def gone():
        engine.process.up = False
        engine.process.on_down()

    async def work():
        assert await steps_in(told(1.0), told(2.0)) == 2
        assert await steps_in() == 2
        # Nothing more comes of an engine that is gone, nor from the one after it of the steps of that one.
        engine.last_step = 1.0
        assert await steps_in((gone,)) == 2
        engine.process.on_ready(ready(slots=2, max_running=2), "address")
        engine.process.up = True
        assert await steps_in() == 2

    asyncio.run(work())


def test_sums_are_the_series_of_one_process():
    registries = [CollectorRegistry() for _ in range(3)]
    for registry in registries:
        count = Counter("c", "Counted.", ["x"], registry=registry)
        seconds = Histogram("h", "Timed.", buckets=(0.1, 1.0), registry=registry)
        times = 2 if registry is registries[-1] else 1  # the last one is what the sum of the others must be
        for value in ("a", 'b"\n'):
            count.labels(value).inc(3 * times)
        for _ in range(times):
            seconds.observe(0.5)
    *parts, whole = (
        [
            Family(m.name, m.documentation, m.type, [(s.name, s.labels, s.value) for s in m.samples])
            for m in registry.collect()
        ]
        for registry in registries
    )
    assert summed(parts) == whole
    assert render(as_metrics(whole)) == render(list(registries[-1].collect()))
