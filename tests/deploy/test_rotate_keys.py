"""rotate-keys.sh on real servers under traffic. A stand-in for kubectl has them as pods; their Secret comes late."""

import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from live_server import DEADLINE_S, LiveServer, poll, write_variants

SCRIPT = Path(__file__).parents[2] / "deploy" / "helm" / "rotate-keys.sh"
RELEASE, SECRET = "blue", "blue-keys"
OLD, NEW = (f"{name}-0123456789abcdef" for name in ("old", "new"))
PODS = ("one", "two")

KUBECTL = '''
"""What the script asks of kubectl, for pods that are folders: `keys`, which the server reads, `pid` and `url`."""
import os, signal, subprocess, sys
from pathlib import Path

pods = Path({folder!r})
arguments = sys.argv[1:]
assert arguments[:2] == ["--namespace", "serving"], arguments
match arguments[2:]:
    case ["create", "secret", "generic", {secret!r}, file, "--dry-run=client", "--output=yaml"]:
        print(Path(file.removeprefix("--from-file=keys=")).read_text(), end="")
    case ["apply", "--filename=-"]:
        (pods / "secret").write_text(sys.stdin.read())
    case ["get", "pods", "--output=name", "--field-selector=status.phase=Running", selector]:
        assert selector == "--selector=app.kubernetes.io/name=lowkey,app.kubernetes.io/instance={release}"
        print("\\n".join(["pod/about-to-go", *("pod/" + pid.parent.name for pid in sorted(pods.glob("*/pid")))]))
    case ["get", pod, "--ignore-not-found", "--output=name"]:
        if (pods / pod.removeprefix("pod/")).exists():
            print(pod)
    case ["exec", pod, "--container=lowkey", "--", *command]:
        pod = pods / pod.removeprefix("pod/")
        if not pod.exists():
            sys.exit(f"pods {{pod.name}} not found")
        match command:
            case ["sha256sum", "/etc/lowkey-keys/keys"]:
                subprocess.run(["sha256sum", pod / "keys"], check=True)
                # What it is asked for the next time is there.
                (pod / "new").write_bytes((pods / "secret").read_bytes())
                (pod / "new").rename(pod / "keys")
            case ["sh", "-c", "kill -HUP 1"]:
                os.kill(int((pod / "pid").read_text()), signal.SIGHUP)
            case ["python", "-c", code]:
                exec(code.replace("http://127.0.0.1:8000", (pod / "url").read_text()))
            case _:
                raise AssertionError(command)
    case _:
        raise AssertionError(arguments)
'''


@pytest.fixture(scope="module")
def pods(tmp_path_factory):
    """Name -> server."""
    folder = tmp_path_factory.mktemp("pods")
    dense = write_variants(folder)["dense"]
    servers = {}
    try:
        for name in PODS:
            (folder / name).mkdir()
            (folder / name / "keys").write_text(f'alice = "{OLD}"\n')
            environment = {"LOWKEY_API_KEYS_FILE": str(folder / name / "keys")}
            servers[name] = LiveServer(folder / name / "log", f"dense={dense}", **environment)
        for name, server in servers.items():
            server.wait_ready()
            (folder / name / "pid").write_text(str(server.process.pid))
            (folder / name / "url").write_text(server.url)
        yield servers
    finally:
        for server in servers.values():
            server.stop()


@pytest.fixture
def rotate(pods, tmp_path):
    """rotate(keys) runs the script: what it exits with, and what it says."""
    folder = pods[PODS[0]].log.parent.parent
    commands = tmp_path / "bin"
    commands.mkdir()
    kubectl = commands / "kubectl"
    kubectl.write_text(
        f"#!{sys.executable}\n{KUBECTL.format(folder=str(folder), secret=SECRET, release=RELEASE)}"
    )
    kubectl.chmod(0o755)
    sleep = commands / "sleep"  # five seconds are for a kubelet
    sleep.write_text(f"#!/bin/sh\nexec {shutil.which('sleep')} 0.5\n")
    sleep.chmod(0o755)

    def run(keys):
        (tmp_path / "keys.toml").write_text(keys)
        done = subprocess.run(
            [SCRIPT, RELEASE, SECRET, tmp_path / "keys.toml", "--namespace", "serving"],
            env={**os.environ, "PATH": f"{commands}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
        )
        return done.returncode, done.stdout + done.stderr

    return run


def ask(server, key):
    body = {"model": "dense", "prompt": "Once upon", "max_tokens": 2, "ignore_eos": True}
    headers = {"authorization": f"Bearer {key}"}
    return httpx.post(
        f"{server.url}/v1/completions", json=body, headers=headers, timeout=DEADLINE_S
    ).status_code


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_all_pods_take_the_keys_and_no_request_is_lost(pods, rotate):
    key, over, statuses = OLD, threading.Event(), []

    def client(server):
        while not over.is_set():
            statuses.append(ask(server, key))

    with ThreadPoolExecutor(2) as pool:
        clients = [pool.submit(client, server) for server in pods.values()]
        try:
            code, said = rotate(f'alice = ["{NEW}", "{OLD}"]\n')
            assert code == 0, said
            assert "pod/about-to-go: is gone; what comes in its place has the new Secret" in said
            for name in PODS:
                assert f"pod/{name}: waiting for the new Secret" in said
                assert f"pod/{name}: took the keys of 1 clients" in said
            key, asked = NEW, len(statuses)
            poll(lambda: len(statuses) > asked + 10, "all clients have the new key")
            code, said = rotate(f'alice = "{NEW}"\n')
            assert code == 0, said
            asked = len(statuses)
            poll(lambda: len(statuses) > asked + 10, "traffic afterwards")
        finally:
            over.set()
        for each in clients:
            each.result(DEADLINE_S)
    assert set(statuses) == {200}
    assert [ask(server, OLD) for server in pods.values()] == [401, 401]
    code, said = rotate("alice = \n")
    assert code == 1
    assert all(f"pod/{name}: did NOT take the keys; kubectl logs pod/{name}" in said for name in PODS)
    assert [ask(server, NEW) for server in pods.values()] == [200, 200]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_pod_that_does_not_answer_does_not_keep_the_others_from_their_keys(pods, rotate):
    first, second = (pods[name] for name in PODS)
    url = first.log.with_name("url")
    address = url.read_text()
    url.write_text("http://127.0.0.1:9")
    code, said = rotate(f'alice = "{OLD}"\n')
    url.write_text(address)
    assert code == 1 and "pod/one: waiting for its server" in said
    assert "pod/one: did NOT take the keys" in said and "pod/two: took the keys of 1 clients" in said
    assert ask(second, OLD) == 200


@pytest.mark.parametrize("arguments", [[], ["blue", "keys"], ["blue", "keys", "/no/such/file"]])
def test_how_it_is_called(arguments):
    done = subprocess.run([SCRIPT, *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("usage: rotate-keys.sh RELEASE SECRET KEYS.toml")


@pytest.mark.slow
def test_shellcheck_finds_nothing(tools):
    done = subprocess.run([tools / "shellcheck", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
