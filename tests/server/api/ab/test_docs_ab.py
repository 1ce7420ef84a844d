"""Every example of docs/ab.md, run as it stands: only the address is that of the test's server."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from live_server import LiveServer

from server.settings import load_settings

TEXT = (Path(__file__).parents[4] / "docs" / "ab.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def blocks(language):
    return [text for kind, text in BLOCKS if kind == language]


@pytest.fixture(scope="module")
def place(checkpoints, tmp_path_factory):
    """A directory with the configuration, and checkpoints where it says they are."""
    directory = tmp_path_factory.mktemp("docs")
    (config,) = blocks("toml")
    (directory / "lowkey.toml").write_text(config)
    for source, name in (("demo/model", "dense"), ("out/demo-64", "reduced")):
        (directory / source).parent.mkdir()
        (directory / source).symlink_to(checkpoints[name])
    return directory


def test_the_commands(place):
    check, serve = (command.split("#")[0].split() for command in blocks("sh"))
    script = Path(sys.executable).parent / check[0]
    done = subprocess.run([script, *check[1:]], cwd=place, capture_output=True, text=True, check=True)
    settings = json.loads(done.stdout)
    assert (
        settings["aliases"]["gdn"] == {"dense": 0.9, "reduced": 0.1}
        and settings["shadow"][0]["fraction"] == 0.05
    )
    assert serve == ["lowkey-serve", "--config", "lowkey.toml"]


def test_the_python_in_order(place, capsys):
    server = LiveServer(place / "log", "--config", "lowkey.toml").wait_ready()
    try:
        names: dict = {}
        for block in blocks("python"):
            exec(compile(block.replace("http://127.0.0.1:8000", server.url), "docs/ab.md", "exec"), names)  # noqa: S102
    finally:
        server.stop()
    assert len(blocks("python")) == 6
    printed = capsys.readouterr().out
    assert "KL " in printed and "too little data" in printed
    assert "reduced length" in printed or "reduced stop" in printed  # a random model may end by itself
    assert names["summary"]["variants"][names["answer"]["baseline"]]["errors"] == 0


def test_the_files_in_serving_md(tmp_path):
    text = (Path(__file__).parents[4] / "docs" / "serving.md").read_text()
    keys, chat, variants = re.findall(r"^```toml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "chat.toml").write_text(chat)
    assert load_settings(tmp_path / "chat.toml").variants["qwen"].tool_call_parser == "qwen3_coder"
    (tmp_path / "keys.toml").write_text(keys)
    (tmp_path / "lowkey.toml").write_text(variants)
    settings = load_settings(tmp_path / "lowkey.toml", api_keys_file=tmp_path / "keys.toml")
    assert {name: v.state_dtype for name, v in settings.variants.items()} == {"full": None, "narrow": "int8"}
    assert settings.api_keys["bob"].max_priority == -1
    assert {name: len(key.sha256) for name, key in settings.api_keys.items()} == {
        "alice": 1,
        "bob": 1,
        "carol": 2,
    }


def test_every_block_is_of_a_kind_that_is_run():
    assert {kind for kind, _ in BLOCKS} == {"toml", "sh", "python"}
