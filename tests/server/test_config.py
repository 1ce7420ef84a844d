"""`lowkey.toml`: what counts before what, `--check-config`, and keys that never show."""

import hashlib
import json

import pytest
from typer.testing import CliRunner

from server import cli
from server.settings import ConfigurationError, load_settings

FILE = """
port = 1
max_requests = 2
max_queue = 3

[variants]
dense = "org/dense"

[variants.reduced]
source = "org/reduced"
device = "cpu"
dtype = "float32"
state_dtype = "bfloat16"

[aliases.gdn]
dense = 0.9
reduced = 0.1

[sticky]
by = ["header", "user"]
seed = 7

[[shadow]]
from = "dense"
to = "reduced"
fraction = 0.05
"""
KEY = "0123456789abcdef-secret"
SHA256 = hashlib.sha256(KEY.encode()).hexdigest()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "lowkey.toml"
    path.write_text(FILE)
    return path


def check(*arguments, **environment):
    return CliRunner().invoke(cli.app, [*map(str, arguments), "--check-config"], env=environment)


def test_command_line_then_environment_then_file_then_defaults(file):
    result = check("--config", file, "--port", "10", LOWKEY_PORT="20", LOWKEY_MAX_REQUESTS="20")
    assert result.exit_code == 0, result.output
    shown = json.loads(result.output)
    assert [shown[x] for x in ("port", "max_requests", "max_queue", "threads")] == [10, 20, 3, 1]
    assert shown["variants"]["dense"] == {
        "source": "org/dense",
        "device": None,
        "dtype": None,
        "state_dtype": None,
        "device_memory": None,
        "tool_call_parser": None,
        "reasoning_parser": None,
        "generation_config": None,
    }
    assert shown["variants"]["reduced"]["device"] == "cpu"
    assert shown["aliases"] == {"gdn": {"dense": 0.9, "reduced": 0.1}}
    assert shown["shadow"] == [{"from": "dense", "to": "reduced", "fraction": 0.05}]
    assert shown["sticky"] == {"by": ["header", "user"], "header": "x-lowkey-user", "seed": 7}


def test_a_variant_of_the_command_line_replaces_that_of_the_file(file):
    shown = json.loads(check("dense=org/other", "more=org/more", "--config", file).output)
    sources = {name: variant["source"] for name, variant in shown["variants"].items()}
    assert sources == {"dense": "org/other", "reduced": "org/reduced", "more": "org/more"}


@pytest.mark.parametrize(
    ("text", "mention"),
    [
        ("port = ", "no TOML"),
        ("prot = 1", "prot"),
        ("port = 99999", "port"),
        ("[variants.a]\nsource = 'x'\ndevise = 'cpu'", "variants.a.devise"),
        ("[variants]\na = 5", "variants.a"),
        ("[variants.a]\nsource = 'x'\nstate_dtype = 'int4'", "variants.a.state_dtype"),
        ("[aliases.b]\nc = 1", "aliases.b.c"),
        ("api_keys_file = '/no/such/file'", "/no/such/file"),
        ("[api_keys]\nme = 'short'", "api_keys.me"),
        ("[api_keys]\nme = 'sha256:12'", "api_keys.me"),
        ("[api_keys.me]\nrequests_per_minute = 5", "api_keys.me"),
        (f"[api_keys.me]\nkey = '{KEY}'\nrequests_per_minute = 0", "api_keys.me.requests_per_minute"),
        (f"[api_keys]\n'm e' = '{KEY}'", "api_keys.m e"),
        (f"[api_keys]\nme = ' {KEY}'", "api_keys.me"),
        (f"[api_keys.me]\nkey = '{KEY}'\nsha256 = ['{SHA256}']", "api_keys.me"),
        (
            f"[api_keys]\nme = '{KEY}'\nyou = ['{KEY}2', 'sha256:{SHA256}']",
            "api_keys.you: has a key that is me's",
        ),
        ("x = " + "[" * 5000, "no TOML"),
        (f"[api_key]\nme = '{KEY}'", "api_key"),
        (f"api_keys_ = '{KEY}'", "api_keys_"),
        ("state_ttl_s = inf", "state_ttl_s"),
    ],
)
def test_a_bad_file_exits_with_2_and_names_the_key(tmp_path, text, mention):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    result = check("z=org/x", "--config", path)
    assert result.exit_code == 2
    output = " ".join(result.output.replace("│", " ").split())
    assert mention in output and KEY not in output and "short" not in output


def test_a_file_that_is_not_there(tmp_path):
    output = check("--config", tmp_path / "x").output
    assert "No such file" in " ".join(output.replace("│", " ").split())  # the box breaks lines anywhere
    (tmp_path / "x").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigurationError, match="no TOML"):
        load_settings(tmp_path / "x")


def test_keys_come_from_file_environment_and_hash_and_never_show(file, tmp_path):
    keys = tmp_path / "keys.toml"
    keys.write_text(
        f'alice = "{KEY}1"\n[bob]\nkey = "sha256:{SHA256}"\ntokens_per_minute = 5\nmax_priority = -1\n'
    )
    result = check(
        "--config", file, LOWKEY_API_KEYS_FILE=str(keys), LOWKEY_API_KEYS=f"carol={KEY}3, dave={KEY}4"
    )
    assert result.exit_code == 0, result.output
    assert KEY not in result.output
    shown = json.loads(result.output)["api_keys"]
    assert set(shown) == {"alice", "bob", "carol", "dave"}
    assert shown["bob"]["sha256"] == [SHA256]
    for name, key in {"alice": f"{KEY}1", "carol": f"{KEY}3", "dave": f"{KEY}4"}.items():
        assert shown[name]["sha256"] == [hashlib.sha256(key.encode()).hexdigest()]
    assert shown["bob"]["tokens_per_minute"] == 5 and shown["bob"]["max_priority"] == -1
    twice = check("--config", file, LOWKEY_API_KEYS_FILE=str(keys), LOWKEY_API_KEYS=f"alice={KEY}")
    assert twice.exit_code == 2 and "alice" in twice.output and KEY not in twice.output
    for bad in (KEY, f"a={KEY},a={KEY}", "a="):
        result = check("--config", file, LOWKEY_API_KEYS=bad)
        assert result.exit_code == 2 and "api_keys" in result.output and KEY not in result.output


@pytest.mark.parametrize("text", ["", "# alice's key is being written\n"])
def test_a_file_without_keys_does_not_open_the_server(file, tmp_path, text):
    keys = tmp_path / "keys.toml"
    keys.write_text(text)
    result = check("--config", file, LOWKEY_API_KEYS_FILE=str(keys))
    assert result.exit_code == 2 and "has no keys" in " ".join(result.output.replace("│", " ").split())
