"""What a service manager hears from a real server: that it is ready, that it lives, that it is about to end."""

import signal
import socket
import time

import pytest
from live_server import DEADLINE_S, LiveServer, withheld

from server.service_manager import notify


class Manager:
    """The end of systemd's socket."""

    def __init__(self, address):
        self.environment = {"NOTIFY_SOCKET": str(address).replace("\0", "@")}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.settimeout(DEADLINE_S)
        self._socket.bind(str(address))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._socket.close()

    def hears(self):
        """The next message."""
        return self._socket.recv(4096).decode()

    def hears_beginning(self, beginning):
        """All messages up to the first that begins so."""
        heard = []
        while not heard or not heard[-1].startswith(beginning):
            heard.append(self.hears())
        return heard


@pytest.mark.parametrize("processes", [1, 2])
def test_the_manager_hears_of_a_life(checkpoints, tmp_path, processes):
    with Manager(tmp_path / "notify") as manager:
        with withheld(checkpoints["dense"] / "config.json"):
            server = LiveServer(
                tmp_path / "log",
                f"dense={checkpoints['dense']}",
                *("--api-processes", str(processes)),
                **manager.environment,
            )
            assert [manager.hears() for _ in range(2)] == ["WATCHDOG=1"] * 2, "it loads, and is not ready"
        try:
            *before, ready = manager.hears_beginning("READY=1")
            assert set(before) <= {"WATCHDOG=1"} and server.http.get("/ready").status_code == 200
            assert ready == f"READY=1\nSTATUS=Serving dense on {server.url}"
            began = time.monotonic()
            assert [manager.hears() for _ in range(3)] == ["WATCHDOG=1"] * 3
            assert time.monotonic() - began > 1, "not ten times a second"
            server.process.send_signal(signal.SIGTERM)
            *before, stopping = manager.hears_beginning("STOPPING=1")
            assert set(before) <= {"WATCHDOG=1"} and "STATUS=" in stopping
            assert server.process.wait(DEADLINE_S) == 0
        finally:
            server.stop()


def test_a_name_in_the_abstract_namespace(monkeypatch, tmp_path):
    with Manager(f"\0{tmp_path}") as manager:
        monkeypatch.setenv("NOTIFY_SOCKET", manager.environment["NOTIFY_SOCKET"])
        notify("READY=1")
        assert manager.hears() == "READY=1"


@pytest.mark.parametrize("address", ["", "/no/such/socket"])
def test_a_manager_that_is_not_there_is_no_error(monkeypatch, address):
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    notify("READY=1")
