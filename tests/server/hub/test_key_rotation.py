"""API keys that change while a real server runs: SIGHUP reads them again, and no request is lost over it."""

import contextlib
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import MagicMock

import httpx
import psutil
import pytest
from live_server import DEADLINE_S, LiveServer, poll, suspended

from server.api.http.auth import Clients
from server.api.http.errors import APIError
from server.hub import limits
from server.hub.conductor import Conductor
from server.hub.limits import AllLimits
from server.settings import load_settings

OLD, NEW, OTHER = (f"{name}-0123456789abcdef" for name in ("old", "new", "other"))
BOB = f'\n[bob]\nkey = "{OTHER}"\nrequests_per_minute = 3\n'
RELOADED = "SIGHUP: read aliases"
METRIC = "lowkey_config_last_reload_successful"


def alice(*keys):
    """A file of keys in which alice has these, and bob always the same one."""
    return f"alice = {list(keys)}".replace("'", '"') + BOB


@pytest.fixture(scope="module", params=[1, 3], ids=["one process", "three processes"])
def server(request, checkpoints, tmp_path_factory):
    directory = tmp_path_factory.mktemp("rotating")
    (directory / "keys.toml").write_text(alice(OLD))
    server = LiveServer(
        directory / "log",
        f"dense={checkpoints['dense']}",
        *("--api-processes", str(request.param)),
        LOWKEY_API_KEYS_FILE="keys.toml",
    )
    try:
        yield server.wait_ready()
    finally:
        server.stop()


def bearer(key):
    return {"authorization": f"Bearer {key}"}


def ask(server, key, **fields):
    """The status of one short completion, on a connection of its own."""
    body = {"model": "dense", "prompt": "Once upon", "max_tokens": 2, "ignore_eos": True, **fields}
    with httpx.Client(base_url=server.url, timeout=DEADLINE_S, headers=bearer(key)) as client:
        return client.post("/v1/completions", json=body).status_code


def seen(server, key):
    """The statuses that a dozen connections give to a key: the kernel deals them out to all API processes."""
    headers, statuses = bearer(key) if key else {}, set()
    for _ in range(12):
        with httpx.Client(base_url=server.url, timeout=DEADLINE_S, headers=headers) as client:
            statuses.add(client.get("/v1/models").status_code)
    return statuses


def rotate(server, text, says=RELOADED):
    """Put the text in the place of the file of keys at once, tell the server, and return what it logs."""
    already = len(server.log.read_text())
    file = server.log.with_name("keys.toml")
    file.with_suffix(".new").write_text(text)
    file.with_suffix(".new").rename(file)
    server.process.send_signal(signal.SIGHUP)
    poll(lambda: says in server.log.read_text()[already:], f"the log says {says!r}")
    return server.log.read_text()[already:]


def test_keys_are_rotated_under_traffic_and_no_request_is_lost(server):
    rotate(server, alice(OLD))
    key, over, statuses = OLD, threading.Event(), []

    def client():
        while not over.is_set():
            statuses.append(ask(server, key))

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(client) for _ in range(4)]
        try:
            poll(lambda: len(statuses) > 10, "traffic")
            assert "changed: alice" in rotate(server, alice(NEW, OLD))
            poll(lambda: seen(server, NEW) == {200}, "the new key is known")
            key, asked = NEW, len(statuses)
            poll(lambda: len(statuses) > asked + 10, "all clients have the new key")
            rotate(server, alice(NEW))
            asked = len(statuses)
            poll(lambda: len(statuses) > asked + 10, "traffic afterwards")
        finally:
            over.set()
        for each in clients:
            each.result(DEADLINE_S)
    assert set(statuses) == {200}
    poll(lambda: seen(server, OLD) == {401}, "the old key is known no more")
    assert ask(server, OLD) == 401
    assert "Traceback" not in server.log.read_text()


def test_a_stream_of_a_key_that_goes_is_finished(server):
    rotate(server, alice(OLD))
    poll(lambda: seen(server, OLD) == {200}, "the key is known")
    body = {"model": "dense", "prompt": "Hi", "max_tokens": 50, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    with httpx.Client(base_url=server.url, timeout=DEADLINE_S, headers=bearer(OLD)) as client:
        with contextlib.ExitStack() as stack:
            with suspended(server.engines()["dense"]):  # the request does not end meanwhile
                response = stack.enter_context(client.stream("POST", "/v1/completions", json=body))
                assert "changed: alice" in rotate(server, alice(NEW))
                poll(lambda: seen(server, OLD) == {401}, "the old key is known no more")
            *_, usage, done = (line for line in response.iter_lines() if line)
        assert '"completion_tokens":50' in usage and done == "data: [DONE]"
        assert client.get("/v1/models").status_code == 401, "on the same connection"


BAD = {
    "no TOML": "alice = ",
    "half of it": alice(NEW)[:-20],
    "a short key": 'alice = "short-secret"',
    "a list of nothing": "alice = []",
    "a wrong name": f'"a b" = "{NEW}"',
    "a wrong field": f'[alice]\nkey = "{NEW}"\nrequests = 3',
    "nobody": "",
}


@pytest.mark.parametrize("what", BAD)
def test_a_file_that_is_no_good_leaves_the_old_keys(server, what):
    rotate(server, alice(OLD))
    poll(lambda: seen(server, OLD) == {200}, "the key is known")
    since = server.sample("lowkey_config_last_reload_success_timestamp_seconds")
    log = rotate(server, BAD[what], "the old configuration stays")
    assert "Traceback" not in log and NEW not in log and "short-secret" not in log
    assert seen(server, OLD) == {200} and seen(server, NEW) == seen(server, "") == {401}
    assert server.sample(METRIC) == 0 and server.sample("lowkey_api_keys") == 2
    assert server.sample("lowkey_config_last_reload_success_timestamp_seconds") == since
    log = rotate(server, f'alice = "{NEW}"\n')
    assert "keys of 1 clients; changed: alice; gone: bob" in log
    assert server.sample(METRIC) == 1 and server.sample("lowkey_api_keys") == 1
    assert server.sample("lowkey_config_last_reload_success_timestamp_seconds") > since


def test_a_file_that_is_gone_leaves_the_old_keys(server):
    rotate(server, alice(OLD))
    server.log.with_name("keys.toml").unlink()
    already = len(server.log.read_text())
    server.process.send_signal(signal.SIGHUP)
    poll(lambda: "keys.toml: No such file" in server.log.read_text()[already:], "it says so")
    poll(lambda: seen(server, OLD) == {200}, "the key is known")


def test_what_a_client_has_used_up_stays_used_up(server):
    rotate(server, alice(OLD))
    poll(lambda: seen(server, OLD) == {200}, "the key is known")
    began = time.monotonic()
    statuses = [ask(server, OTHER) for _ in range(4)]
    log = rotate(server, alice(NEW))
    assert "bob" not in log
    statuses += [ask(server, OTHER) for _ in range(4)]
    # One more each twenty seconds.
    assert statuses.count(429) >= 5 - (time.monotonic() - began) / 20
    rotate(server, alice(NEW).replace("= 3", "= 60000"))
    time.sleep(0.1)  # a hundred more
    assert [ask(server, OTHER) for _ in range(10)] == [200] * 10, "a higher limit counts at once"


def test_a_front_end_that_starts_afterwards_knows_the_new_keys(server):
    rotate(server, alice(NEW))
    children = [p for p in psutil.Process(server.process.pid).children() if "server.front_end" in p.cmdline()]
    if not children:
        pytest.skip("has no front ends in processes of their own")
    restarts = server.sample("lowkey_api_process_restarts_total")
    children[0].kill()

    def shown(name):
        try:
            return server.sample(name)
        except httpx.TransportError:  # the connection waited at the one that was killed
            return None

    poll(lambda: shown("lowkey_api_process_restarts_total") == restarts + 1, "it is started again")
    poll(lambda: shown("lowkey_api_processes") == len(children), "it is back")
    assert seen(server, NEW) == {200} and seen(server, OLD) == {401}


def settings(**keys):
    return load_settings(variants={"dense": "org/dense"}, api_keys=keys)


def test_each_key_of_a_client_is_that_client():
    clients = Clients(settings(alice=[NEW, OLD], bob=OTHER), link=None)
    assert [clients.identify(f"Bearer {key}").name for key in (NEW, OLD, OTHER)] == ["alice", "alice", "bob"]
    clients.replace(settings(bob=OTHER))
    with pytest.raises(APIError):
        clients.identify(f"Bearer {NEW}")


def test_a_server_that_asks_for_keys_is_not_opened_where_settings_name_none_any_more(caplog):
    hub = MagicMock(settings=settings(alice=OLD))
    Conductor(hub, lambda: settings(), "http://127.0.0.1").hang_up()
    assert "no API key is left" in caplog.text
    hub.reload.assert_not_called()
    hub.metrics.on_reload_failed.assert_called_once_with()


def test_limits_change_and_debts_stay(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(limits.time, "monotonic", lambda: now[0])
    bob = {"key": OTHER, "requests_per_minute": 60}
    counted = AllLimits(settings(alice=OLD, bob=bob))
    assert [counted.take_request("bob") for _ in range(60)] == [0.0] * 60
    assert counted.take_request("bob") == pytest.approx(1)
    counted.replace(settings(alice=OLD, bob={**bob, "key": NEW}))
    assert counted.take_request("bob") == pytest.approx(1), "another key is the same client"
    counted.replace(settings(bob={**bob, "requests_per_minute": 6}))
    assert counted.take_request("bob") == pytest.approx(10)
    # Of a request that was let in before its key went.
    assert counted.take_request("alice") == 0
    counted.take_tokens("alice", 5)
    counted.replace(settings(bob=OTHER))
    assert [counted.take_request("bob") for _ in range(100)] == [0.0] * 100
