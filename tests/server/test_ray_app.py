"""What `server.ray_app` does without a cluster: calls, homes of prompts, the front, settings, metrics."""

import asyncio
import contextlib
import json
from pathlib import Path

import httpx
import psutil
import pytest
import yaml
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from server.ray_app import Args, Call, Front, Replica, _Together, answer_of, home_of, labelled, settings_of
from server.settings import ConfigurationError, Settings, load_settings

ROOT = Path(__file__).parents[2]


def call(path="/v1/completions", body=b"", method="POST"):
    return Call(method, path, b"", [(b"content-type", b"application/json")], body)


async def parts_of(app, request):
    return [part async for part in answer_of(app, request)]


def test_an_answer_is_its_head_and_then_its_body_in_order():
    async def app(scope, receive, send):
        message = await receive()
        await send({"type": "http.response.start", "status": 201, "headers": [(b"a", b"b")]})
        for part in (message["body"], b"1", b"2"):
            await send({"type": "http.response.body", "body": part, "more_body": True})
            await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b"3"})

    head, *parts = asyncio.run(parts_of(app, call(body=b"body ")))
    assert head == (201, [(b"a", b"b")])
    assert b"".join(parts) == b"body 123"


def test_the_first_part_of_a_stream_comes_at_once_and_the_end_does_not_wait():
    seen = asyncio.Event()

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"1", "more_body": True})
        await seen.wait()
        for part in (b"2", b"3"):
            await send({"type": "http.response.body", "body": part, "more_body": True})
            await asyncio.sleep(0.01)

    async def read():
        parts = []
        async with asyncio.timeout(60):
            async for part in answer_of(app, call(), interval_s=3600):
                parts.append(part)
                if part == b"1":
                    seen.set()
        return parts[1:]

    assert asyncio.run(read()) == [b"1", b"23"]


def test_an_error_of_the_app_comes_through():
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        asyncio.run(parts_of(app, call()))


def test_closing_an_answer_cancels_the_request():
    ended = []

    async def app(scope, receive, send):
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            await receive()
        finally:
            ended.append("cancelled")

    async def leave():
        async with contextlib.aclosing(answer_of(app, call())) as parts:
            await anext(parts)

    asyncio.run(leave())
    assert ended == ["cancelled"]


SYSTEM = {"role": "system", "content": "You are terse."}


def home(**fields):
    return home_of(json.dumps(fields).encode())


def test_prompts_that_begin_alike_have_one_home_for_each_model():
    long = "x" * 2000
    assert home(model="dense", prompt=long + "a") == home(model="dense", prompt=long + "b")
    assert home(model="dense", prompt="a" + long) != home(model="dense", prompt="b" + long)
    assert home(model="dense", prompt=long)[1] != home(model="reduced", prompt=long)[1]
    assert home(model="dense", prompt=[1, 2, 3])[1]


def test_a_conversation_keeps_its_home_and_another_one_with_the_same_system_prompt_has_its_own():
    first = [SYSTEM, {"role": "user", "content": "Hi"}]
    later = [*first, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Bye"}]
    other = [SYSTEM, {"role": "user", "content": "Ho"}]
    assert home(model="m", messages=first) == home(model="m", messages=later)
    assert home(model="m", messages=first) != home(model="m", messages=other)


@pytest.mark.parametrize(
    ("body", "model"),
    [
        (b"", ""),
        (b'{"prompt": "\xff"}', ""),
        (b'{"prompt": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", ""),
        (b"{", ""),
        (b"[1]", ""),
        (b'{"model": 3}', ""),
        (b'{"model": "m"}', "m"),
        (b'{"model": "m", "messages": []}', "m"),
        (b'{"model": "m", "prompt": ""}', "m"),
    ],
)
def test_requests_without_a_prompt_have_no_home(body, model):
    assert home_of(body) == (model, "")


class GoneError(Exception):
    pass


class Parts:
    """What a handle's call returns: head, parts of a body, and perhaps an error."""

    def __init__(self, *items):
        self.items = list(items)

    def __aiter__(self):
        return self

    async def __anext__(self):
        if not self.items:
            raise StopAsyncIteration
        item = self.items.pop(0)
        if isinstance(item, Exception):
            raise item
        return item

    def cancel(self):
        pass


class Handle:
    """A deployment that answers with the same items each time, and remembers what it was asked."""

    def __init__(self, *items):
        self.items = items
        self.asked = []

    def options(self, **options):
        self.asked.append(options)
        return self

    def remote(self, request):
        self.asked[-1]["call"] = request
        return Parts(*self.items)


HEAD = (200, [(b"content-type", b"application/json"), (b"x-request-id", b"replica's")])
EVENTS = (200, [(b"content-type", b"text/event-stream; charset=utf-8")])
FILE = (200, [(b"content-type", b"application/octet-stream"), (b"content-length", b"9")])


class FrontApp:
    """A front as the ASGI app that Ray makes of it."""

    def __init__(self, handles, models=None, **limits):
        self.front = Front(handles, models or {}, Settings(**limits), (GoneError,))

    async def __call__(self, scope, receive, send):
        from fastapi import Request

        response = await self.front(Request(scope, receive))
        await response(scope, receive, send)


def ask(front, method="POST", path="/v1/completions", **options):
    async def send():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(front), base_url="http://x") as http:
            return await http.request(method, path, **options)

    return asyncio.run(send())


def test_the_front_sends_each_model_to_its_deployment():
    handles = {"a": Handle(HEAD, b'{"of": "a"}'), "b": Handle(HEAD, b'{"of": "b"}')}
    front = FrontApp(handles, {"dense": "a", "reduced": "b"})
    for model, deployment in (("dense", "a"), ("reduced", "b"), ("nobody's", "a")):
        answer = ask(front, json={"model": model, "prompt": "p"})
        assert answer.json() == {"of": deployment}
        assert "x-request-id" not in answer.headers
    assert ask(front, "GET", "/v1/models/reduced").json() == {"of": "b"}
    one = handles["a"].asked[0]
    assert one["session_id"] == home(model="dense", prompt="p")[1]
    assert one["call"].path == "/v1/completions" and json.loads(one["call"].body)["model"] == "dense"


def test_the_front_lists_the_models_of_all_deployments():
    handles = {name: Handle(HEAD, b'{"data": [{"id": "%s"}]}' % name.encode()) for name in "ab"}
    assert ask(FrontApp(handles), "GET", "/v1/models").json() == {
        "object": "list",
        "data": [{"id": "a"}, {"id": "b"}],
    }
    handles["b"] = Handle((401, []), b'{"error": {}}')
    assert ask(FrontApp(handles), "GET", "/v1/models").status_code == 401


def test_a_replica_that_goes_away_is_a_503_until_something_was_sent():
    for items in ((GoneError(),), (HEAD, GoneError()), (HEAD, b'{"half": ', GoneError())):
        answer = ask(FrontApp({"a": Handle(*items)}), json={"model": "m"})
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["code"] == 503


def test_a_stream_that_is_cut_ends_with_an_error_event():
    answer = ask(FrontApp({"a": Handle(EVENTS, b"data: 1\n\n", GoneError())}), json={"model": "m"})
    first, error, done = answer.text.split("\n\n")[:3]
    assert first == "data: 1" and done == "data: [DONE]"
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == 503


def test_a_file_that_is_cut_is_not_passed_off_as_whole():
    with pytest.raises(GoneError):
        ask(FrontApp({"a": Handle(FILE, b"half", GoneError())}), "GET", "/v1/states/x/export")


def test_the_front_bounds_what_it_reads():
    handle = Handle(HEAD, b"{}")
    answer = ask(FrontApp({"a": handle}, max_body_bytes=1024), content=b"x" * 1025)
    assert answer.status_code == 413 and not handle.asked

    async def slow():
        yield b"x"
        await asyncio.sleep(60)

    assert ask(FrontApp({"a": handle}, body_timeout_s=0.05), content=slow()).status_code == 408
    assert not handle.asked


def test_metrics_of_replicas_are_one_exposition():
    replicas = []
    for number in (1, 2):
        registry = CollectorRegistry()
        Counter("lowkey_x", "Text.", ["variant"], registry=registry).labels("dense").inc(number)
        replicas.append(labelled(list(registry.collect()), "Lowkey", f"r{number}"))
    text = generate_latest(_Together(replicas)).decode()
    (family,) = [f for f in text_string_to_metric_families(text) if f.name == "lowkey_x"]
    assert text.count("# TYPE lowkey_x_total counter") == 1
    totals = {s.labels["replica"]: s.value for s in family.samples if s.name == "lowkey_x_total"}
    assert totals == {"r1": 1, "r2": 2}
    assert {s.labels["deployment"] for s in family.samples} == {"Lowkey"}


def write(path, text):
    path.write_text(text)
    return str(path)


def test_settings_come_from_the_files_with_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    file = write(
        tmp_path / "a.toml",
        'max_requests = 8\nstate_dir = "states"\n[variants]\nhub = "org/name"\n'
        'dense = {source = "model", state_dtype = "int8"}',
    )
    (settings,) = settings_of(Args(config=file)).values()
    assert settings.max_requests == 8
    assert settings.state_dir == tmp_path / "states"
    assert settings.variants["dense"].source == str(tmp_path / "model")
    assert settings.variants["dense"].state_dtype == "int8"
    assert settings.variants["hub"].source == "org/name"
    assert type(settings) is Settings  # pickles by its name


def test_settings_that_do_not_fit_together_are_refused(tmp_path):
    one = write(tmp_path / "one.toml", '[variants]\ndense = "org/a"\n[aliases]\nmodel = {dense = 1}')
    two = write(tmp_path / "two.toml", '[variants]\nmodel = "org/b"')
    none = write(tmp_path / "none.toml", "max_requests = 8")
    with pytest.raises(ConfigurationError, match=r"two\.toml: 'model' is in the settings of x too"):
        settings_of(Args(config={"x": one, "y": two}))
    with pytest.raises(ConfigurationError, match="no model to serve"):
        settings_of(Args(config=none))


class Held(Replica):
    """Python would call Ray's `__del__` too, and not await it."""

    def __del__(self):
        pass


async def made(settings):
    """A replica that is made as Ray makes one."""
    replica = Held.__new__(Held)
    await replica.__init__(settings)
    return replica


def test_a_replica_answers_once_it_has_loaded_and_is_ill_without_an_engine(checkpoints):
    async def live():
        replica = await made(Settings(variants={"dense": str(checkpoints["dense"])}, max_requests=4))
        try:
            await replica.check_health()
            body = json.dumps({"model": "dense", "prompt": "Once", "max_tokens": 3, "ignore_eos": True})
            head, *parts = [part async for part in replica.answer(call(body=body.encode()))]
            assert head[0] == 200
            assert json.loads(b"".join(parts))["usage"]["completion_tokens"] == 3
            (engine,) = (p for p in psutil.Process().children() if "server.engine.process" in p.cmdline())
            (variant,) = replica._service.variants
            engine.suspend()  # so that it says nothing that would bring the flag back
            variant.client.engine_down()
            with pytest.raises(RuntimeError, match="no variant is up"):
                await replica.check_health()
            engine.resume()
        finally:
            await replica.close()
        assert not engine.is_running()

    asyncio.run(live())


def test_a_checkpoint_that_cannot_be_loaded_fails_the_constructor(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigurationError, match=r"variant 'dense' can't be loaded: .*config\.json"):
        asyncio.run(made(Settings(variants={"dense": str(tmp_path)})))


def test_the_configs_in_deploy_are_the_same_application_and_name_what_there_is():
    config = yaml.safe_load((ROOT / "deploy/ray/serve.yaml").read_text())
    manifest = yaml.safe_load((ROOT / "deploy/ray/rayservice.yaml").read_text())
    assert yaml.safe_load(manifest["spec"]["serveConfigV2"]) == {"applications": config["applications"]}
    (application,) = config["applications"]
    assert application["import_path"] == "server.ray_app:build"
    args = Args.model_validate(application["args"])
    assert {d["name"] for d in application["deployments"]} == {"Front", *args.config}
    settings = load_settings(ROOT / "deploy/ray/lowkey.toml")
    lowkey = next(d for d in application["deployments"] if d["name"] == "Lowkey")
    assert settings.max_requests is not None
    assert lowkey["max_ongoing_requests"] == settings.max_requests * len(settings.variants)
    assert lowkey["max_queued_requests"] == settings.max_queue
    assert lowkey["graceful_shutdown_timeout_s"] > settings.drain_s
