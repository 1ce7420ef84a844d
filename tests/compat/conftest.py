"""A server for other people's clients, and where those that are too large for our own environment live."""

import json
from pathlib import Path

import pytest
from live_server import LiveServer, write_variants
from templates import TEMPLATES

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
def chat_server(tmp_path_factory):
    """A server of models that think and call tools, by templates of the shape of Qwen3.5's, Qwen3's and Olmo 3's. Their
    weights are random: what they are not held to is noise."""
    directory = tmp_path_factory.mktemp("chat")
    dense = write_variants(directory)["dense"]
    arguments = []
    for name, template in TEMPLATES.items():
        path = directory / name
        path.mkdir()
        for file in dense.iterdir():
            (path / file.name).symlink_to(file)
        (path / "chat_template.jinja").unlink()
        (path / "chat_template.jinja").write_text(template)
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").unlink()
        (path / "config.json").write_text(json.dumps({**config, "eos_token_id": 0}))  # tools' names have an e
        arguments.append(f"{name}={path}")
    server = LiveServer(directory / "log", *arguments, "--max-requests", "8")
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
