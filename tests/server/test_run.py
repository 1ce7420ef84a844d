"""How many processes answer, what they listen on, and the settings that they are handed."""

import os
import socket

import pytest

from server import run
from server.handover import from_json, to_json
from server.listening import listen, listen_together
from server.settings import ConfigurationError, Settings


@pytest.mark.parametrize(
    ("devices", "gpu", "cores", "given", "count"),
    [
        (["auto", "auto"], False, 16, None, 1),
        (["cpu", "cpu"], True, 16, None, 1),
        (["auto", "cpu"], True, 16, None, 4),
        (["cpu", "cuda:1"], True, 9, None, 2),
        (["cuda", "cuda"], True, 2, None, 1),
        (["auto", "auto"], True, 128, None, 4),
        (["cpu", "cpu"], False, 2, 3, 3),
    ],
)
def test_more_processes_answer_where_a_gpu_generates(monkeypatch, devices, gpu, cores, given, count):
    monkeypatch.setattr(run, "has_gpu", lambda: gpu)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    variants = {f"v{i}": {"source": "x/y", "device": device} for i, device in enumerate(devices)}
    assert run.count_processes(Settings(variants=variants, api_processes=given)) == count


def test_all_are_bound_to_one_port_and_nobody_else_is():
    groups = listen_together("127.0.0.1", 0, 3)
    try:
        (port,) = {one.getsockname()[1] for group in groups for one in group}
        assert port and len(groups) == 3
        for count in (1, 2):
            with pytest.raises(ConfigurationError, match=f"port {port} of 127.0.0.1 is taken"):
                listen_together("127.0.0.1", port, count)
        with socket.create_connection(("127.0.0.1", port)):
            pass
    finally:
        for group in groups:
            for one in group:
                one.close()
    listen("127.0.0.1", port)[0].close()


def test_settings_are_handed_over_whole_whatever_the_environment_says(monkeypatch, tmp_path):
    settings = Settings(
        variants={"a": "x/a", "b": {"source": "x/b", "device": "cuda:0", "device_memory": 0.3}},
        aliases={"split": {"a": 1, "b": 0.5}},
        sticky={"by": ["header"], "seed": 3},
        shadow=[{"from": "a", "to": "b", "fraction": 0.1}],
        api_keys={"k": "a-key-of-some-length", "l": {"key": "another-key-of-some", "max_priority": -2}},
        state_memory="2GiB",
        state_dir=tmp_path,
        requests_per_minute=3,
    )
    for memory in (0.5, None):
        assert from_json(to_json(Settings(state_memory=memory))).state_memory == memory
    monkeypatch.setenv("LOWKEY_MAX_QUEUE", "7")
    monkeypatch.setenv("LOWKEY_ALIASES", '{"other": {"a": 1}}')
    assert dict(from_json(to_json(settings))) == dict(settings)
    assert "a-key-of" not in to_json(settings)


def test_one_free_port_is_that_of_every_address_of_the_host(monkeypatch):
    found = socket.getaddrinfo
    hosts = ["127.0.0.1", "127.0.0.2"]

    def both(_, port, **options):
        return [entry for host in hosts for entry in found(host, port, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", both)
    groups = listen_together("localhost", 0, 2)
    try:
        assert [[one.getsockname()[0] for one in group] for group in groups] == [hosts] * 2
        assert len({one.getsockname()[1] for group in groups for one in group}) == 1
    finally:
        for one in (one for group in groups for one in group):
            one.close()
