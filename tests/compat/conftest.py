"""A server for other people's clients, and where those that are too large for our own environment live."""

from pathlib import Path

import pytest
from live_server import LiveServer, write_variants

CLIENTS = Path(__file__).parents[2] / ".cache" / "compat-venv" / "bin"


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Checkpoint directories by variant name."""
    return write_variants(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session")
def server(checkpoints, tmp_path_factory):
    directory = tmp_path_factory.mktemp("server")
    arguments = [f"{name}={path}" for name, path in checkpoints.items()]
    states = str(directory / "states")
    server = LiveServer(directory / "log", *arguments, "--max-requests", "8", LOWKEY_STATE_DIR=states)
    try:
        yield server.wait_ready()
        assert "Traceback" not in server.log.read_text()
    finally:
        server.stop()


@pytest.fixture(scope="session")
def clients():
    """Folder of the clients' commands."""
    if not (CLIENTS.parent / ".installed").exists():
        pytest.fail("the clients are not installed; run `make compat`")
    return CLIENTS
