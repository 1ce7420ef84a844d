"""What a user sees who starts the server: where models are looked for, the address to open, and what went wrong."""

import json
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from live_server import DEADLINE_S, LiveServer, poll

from benchmarks.server_process import ServerProcess
from server.listening import url_of

BIN = Path(sys.executable).parent


def serve(*arguments, cwd=None, **environment):
    """`lowkey-serve` run to its end: exit code and all that it said, lines and boxes undone."""
    done = subprocess.run(
        [BIN / "lowkey-serve", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=DEADLINE_S,
        env={"PATH": "/usr/bin:/bin", "COLUMNS": "4000", **environment},
    )
    return done.returncode, done.stdout, " ".join(done.stderr.replace("│", " ").split())


@pytest.fixture
def place(tmp_path, checkpoints):
    """A directory with a checkpoint in demo/model, and what else may lie around."""
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "model").symlink_to(checkpoints["dense"])
    for name, files in {
        "demo/empty": [],
        "demo/no-weights": ["config.json", "tokenizer.json"],
        "demo/no-tokenizer": ["config.json", "model.safetensors"],
        "demo/llama": ["config.json", "llama.Q4_K_M.gguf"],
    }.items():
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).touch()
    return tmp_path


BAD = {
    "demo/modell": "demo/modell: no such directory; did you mean demo/model? "
    "From the hub it is taken as demo/modell@main",
    "./demo/modell": "did you mean demo/model?",
    "dmeo/model": "did you mean demo/model?",
    "/no/such/place": "/no/such/place: no such directory",
    "nowhere": "nowhere: no such directory",
    "demo/empty": "demo/empty has no config.json",
    "demo/no-weights": "demo/no-weights has no model.safetensors or model.safetensors.index.json",
    "demo/no-tokenizer": "demo/no-tokenizer has no tokenizer.json",
    "demo/llama": "llama.Q4_K_M.gguf: GGUF is not supported: give the safetensors checkpoint",
    "demo/llama/llama.Q4_K_M.gguf": "GGUF is not supported: give the safetensors checkpoint",
    "org/model.gguf": "GGUF is not supported: give the safetensors checkpoint",
    "demo/model/config.json": "demo/model/config.json is a file; give the directory",
}


def test_every_local_model_that_is_not_there_is_named_before_anything_is_loaded(place):
    variants = "".join(f"v{number} = '{source}'\n" for number, source in enumerate(BAD))
    (place / "lowkey.toml").write_text(f"[variants]\ngood = 'demo/model'\n{variants}")
    for more in (["--check-config"], []):
        code, out, err = serve("--config", "lowkey.toml", *more, cwd=place)
        assert (code, out) == (2, ""), err
        said = dict(re.findall(r"variants\.(\w+): (.*?)(?=; variants\.|$)", err))
        assert list(said) == [f"v{number}" for number in range(len(BAD))]
        for number, (source, message) in enumerate(BAD.items()):
            assert message in said[f"v{number}"], source
        assert "loading" not in err


def test_models_that_are_there_and_hub_ids_pass(place):
    arguments = ("a=demo/model", "b=some-org/some-name", "c=demo/modell@main", "--check-config")
    code, out, err = serve(*arguments, cwd=place)
    assert code == 0, err
    assert set(json.loads(out)["variants"]) == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("host", "port", "url"),
    [
        ("127.0.0.1", 8000, "http://127.0.0.1:8000"),
        ("0.0.0.0", 8010, "http://127.0.0.1:8010"),
        ("::", 8000, "http://[::1]:8000"),
        ("::1", 8000, "http://[::1]:8000"),
        ("gpu-box", 80, "http://gpu-box:80"),
    ],
)
def test_the_address_to_open(host, port, url):
    assert url_of(host, port) == url


def test_the_last_line_before_the_first_request_is_the_address_to_open(arguments, tmp_path):
    server = LiveServer(tmp_path / "log", *arguments, LOWKEY_HOST="0.0.0.0")
    try:
        poll(lambda: "; open " in server.log.read_text(), "ready")
        port = server.url.rpartition(":")[2]
        last = server.log.read_text().splitlines()[-1]
        assert last.endswith(f"ready: dense, reduced; open http://127.0.0.1:{port}")
        page = httpx.get(last.rpartition(" ")[2], timeout=DEADLINE_S)
        assert page.status_code == 200 and "<html" in page.text
    finally:
        server.stop()


def test_a_port_that_is_taken_is_known_before_anything_is_loaded(arguments):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for how in (["--port", port], []):
            code, _, err = serve(*arguments, *how, **({} if how else {"LOWKEY_PORT": str(port)}))
            assert code == 2, err
            assert f"port {port} of 127.0.0.1 is taken" in err
            assert "--port" in err and "LOWKEY_PORT=" in err and "make demo" in err
            assert "loading" not in err and "Traceback" not in err


def test_an_address_that_is_not_of_this_machine(arguments):
    for host in ("192.0.2.1", "no-such-host.invalid"):
        code, _, err = serve(*arguments, "--host", host)
        assert code == 2 and f"can't listen on {host}" in err and "Traceback" not in err


# SIGHUP

FILE = """
[aliases.gdn]
dense = 1

[[shadow]]
from = "dense"
to = "reduced"
fraction = 0.5
"""


@pytest.fixture
def reloading(arguments, tmp_path):
    (tmp_path / "lowkey.toml").write_text(FILE)
    server = LiveServer(tmp_path / "log", *arguments, "--config", "lowkey.toml")
    try:
        yield server.wait_ready()
    finally:
        server.stop()


def hang_up(server, text, says):
    """The log since the file had this text and the server was told."""
    already = len(server.log.read_text())
    (server.log.parent / "lowkey.toml").write_text(text)
    server.process.send_signal(signal.SIGHUP)
    poll(lambda: says in server.log.read_text()[already:], f"the log says {says!r}")
    return server.log.read_text()[already:]


def test_sighup_drops_nothing_that_a_file_does_not_say_is_gone(reloading):
    def models():
        return [m["id"] for m in reloading.http.get("/v1/models").json()["data"]]

    shadow = FILE[FILE.index("[[shadow]]") :]
    aliases = FILE.removesuffix(shadow)
    for text, missing in (
        ("", "no more aliases, shadow"),
        ("# a comment\n", "no more aliases, shadow"),
        (shadow, "no more aliases"),
        (aliases, "no more shadow"),
    ):
        log = hang_up(reloading, text, "the old configuration stays")
        assert missing in log and ("[aliases]" in log) == ("aliases" in missing)
        assert models() == ["dense", "reduced", "gdn"]
        assert reloading.complete(model="gdn", max_tokens=1)["model"] == "dense"
    log = hang_up(reloading, FILE.replace("gdn", "other"), "SIGHUP: read aliases ['other']")
    poll(lambda: "aliases that are gone, and answered with 404: gdn" in reloading.log.read_text(), "said so")
    assert models() == ["dense", "reduced", "other"]
    # What an empty file was refused for is done where it is said.
    hang_up(reloading, "shadow = []\n[aliases]\n", "SIGHUP: read aliases [], sticky and 0 shadow rules")
    assert models() == ["dense", "reduced"]
    hang_up(reloading, FILE, "SIGHUP: read aliases ['gdn'], sticky and 1 shadow rules")
    hang_up(reloading, "", "no more aliases")
    assert models() == ["dense", "reduced", "gdn"]


TOLD_EARLY = """
import signal, sys
from server import cli, run

listen_together = run.listen_together

def told(*arguments):
    signal.raise_signal(signal.SIGHUP)
    return listen_together(*arguments)

run.listen_together = told
cli.app()
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_a_sighup_that_comes_while_the_server_starts_is_answered_later(checkpoints, tmp_path, processes):
    server = ServerProcess(
        [f"dense={checkpoints['dense']}", "--api-processes", str(processes)],
        tmp_path / "log",
        command=[sys.executable, "-c", TOLD_EARLY],
        timeout_s=DEADLINE_S,
    )
    try:
        poll(lambda: server.log.read_text().count("SIGHUP: read aliases") == 1, "it is answered")
        server.process.send_signal(signal.SIGHUP)
        poll(lambda: server.log.read_text().count("SIGHUP: read aliases") == 2, "so is the next one")
    finally:
        server.stop()
