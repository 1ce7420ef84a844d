"""One server with a dense and a reduced variant for all tests that don't break it."""

import pytest
from live_server import LiveServer, write_variants


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Checkpoint directories by variant name."""
    return write_variants(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session")
def arguments(checkpoints):
    """Command-line arguments that name both variants."""
    return [f"{name}={path}" for name, path in checkpoints.items()]


@pytest.fixture(scope="session")
def server(arguments, tmp_path_factory):
    server = LiveServer(tmp_path_factory.mktemp("server") / "log", *arguments, "--max-requests", "8")
    try:
        yield server.wait_ready()
    finally:
        server.stop()
