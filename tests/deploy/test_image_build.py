"""What Dockerfile.cpu does, line by line, without a Docker engine: its pip commands in a clean environment, and then
its entry point and health check as another user, on a root file system that is read-only.

Not covered: the base image, apt-get and useradd. torch comes from where pip is set up to find it (and TORCH_INDEX_URL,
as in the Makefile), not from the index that the Dockerfile names.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from dockerfile import ROOT, arguments, environment
from live_server import DEADLINE_S, poll, write_variants

# Inside a mount namespace: all is read-only but the volumes, and nobody is root.
CONTAINED = """
for directory in "$CACHE" "$STATES"; do mount --bind "$directory" "$directory"; done
mount -o remount,bind,ro /
exec unshare --user --map-user=10001 --map-group=10001 "$@"
"""
NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount", "--propagation", "private"]


def contained() -> bool:
    """Whether namespaces can be made here."""
    return (
        shutil.which("unshare") is not None
        and not subprocess.run([*NAMESPACE, "true"], check=False).returncode
    )


pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not contained(), reason="needs user and mount namespaces (unshare, util-linux)"),
]


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    """/opt/lowkey of the image, elsewhere."""
    folder = tmp_path_factory.mktemp("image")
    prefix, source = folder / "lowkey", folder / "src"
    source.mkdir()
    for *sources, target in (
        shlex.split(c) for c in arguments("Dockerfile.cpu", "COPY") if "--from" not in c
    ):
        for name in sources:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, source / target, dirs_exist_ok=True)
            else:
                shutil.copy(ROOT / name, source / target)
    index = os.environ.get("TORCH_INDEX_URL")
    elsewhere = f"--extra-index-url {index} " if index else ""
    for line in arguments("Dockerfile.cpu", "RUN"):
        if "apt-get" in line:
            continue
        command = re.sub(r"--index-url \S+\s+--extra-index-url \S+\s", elsewhere, line)
        command = command.replace("/opt/lowkey", str(prefix)).replace(
            "python -m venv", f"{sys.executable} -m venv"
        )
        done = subprocess.run(
            ["sh", "-euc", command], cwd=source, capture_output=True, text=True, timeout=1200,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    yield prefix
    shutil.rmtree(folder)  # it takes more than a gigabyte


def test_the_image_serves_on_a_read_only_root_as_a_user_without_rights(prefix, tmp_path):
    cache, states, models = (tmp_path / name for name in ("cache", "states", "models"))
    for folder in (cache, states, models):
        folder.mkdir()
    write_variants(models)
    config = tmp_path / "lowkey.toml"
    config.write_text(
        (ROOT / "docker" / "config" / "lowkey.toml").read_text().replace('"/models/', f'"{models}/')
    )

    def here(text):
        """The image's paths, where they are in this test."""
        for path, place in (("/opt/lowkey", prefix), ("/cache", cache), ("/etc/lowkey/lowkey.toml", config)):
            text = text.replace(path, str(place))
        return text.replace("$PATH", os.defpath)

    values = {name: here(value) for name, value in environment("Dockerfile.cpu").items()}
    values |= {"LOWKEY_HOST": "127.0.0.1", "LOWKEY_PORT": "0", "LOWKEY_STATE_DIR": str(states)}
    values |= {"CACHE": str(cache), "STATES": str(states), "TMPDIR": str(cache)}
    entry = json.loads(arguments("Dockerfile.cpu", "ENTRYPOINT")[0])
    entry = entry if Path(entry[0]).exists() else entry[2:]  # without tini
    command = [*entry, *json.loads(here(arguments("Dockerfile.cpu", "CMD")[0]))]
    log = tmp_path / "log"
    with log.open("wb") as f:
        server = subprocess.Popen(
            [*NAMESPACE, "sh", "-euc", CONTAINED, "sh", *command], cwd=models, env=values, stdout=f, stderr=f
        )
    try:
        serving = r"running on (http://127\.0\.0\.1:(\d+))"
        poll(lambda: server.poll() is not None or re.search(serving, log.read_text()), "it listens")
        assert server.poll() is None, log.read_text()
        url, port = re.search(serving, log.read_text()).groups()
        (health,) = arguments("Dockerfile.cpu", "HEALTHCHECK")
        check = json.loads(health[health.index("[") :].replace("8000", port))
        poll(
            lambda: subprocess.run(check, env=values, capture_output=True).returncode == 0,
            "the health check passes",
        )
        with httpx.Client(base_url=url, timeout=DEADLINE_S) as client:
            poll(lambda: client.get("/ready").status_code == 200, "/ready is 200")
            for name in ("dense", "reduced"):
                body = {"model": name, "prompt": "Once", "max_tokens": 4, "ignore_eos": True}
                assert client.post("/v1/completions", json=body).status_code == 200
            saved = client.post("/v1/states", json={"model": "dense", "prompt": "Once upon a time"})
            assert saved.status_code in (200, 201), saved.text
        assert any(states.rglob("*")), "the state is on its volume"
        (status,) = [
            line for line in Path(f"/proc/{server.pid}/status").read_text().splitlines() if "CapEff" in line
        ]
        assert int(status.split()[1], 16) == 0, "no rights"
        server.send_signal(signal.SIGTERM)
        assert server.wait(DEADLINE_S) == 0
        assert subprocess.run(check, env=values, capture_output=True).returncode != 0, (
            "and the check can fail"
        )
    finally:
        server.kill()
        server.wait()
    assert "Traceback" not in log.read_text() and "Read-only" not in log.read_text(), log.read_text()
