"""A live server over tokenizers as people leave them: what stock transformers makes of them, and said once."""

import json

import pytest
from checkpoints import GATED, random_tensors, write_checkpoint
from live_server import LiveServer, poll
from tokenizers import Tokenizer
from transformers import AutoTokenizer

PROMPT = "x" * 800
"""A prompt of as many tokens as characters."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """`used`: saved after a call with truncation and padding. `bare`: its tokenizer_config.json leads nowhere, no token
    of the model ends a text, and its record of a reduction is not ours."""
    folder = tmp_path_factory.mktemp("sources")
    used = write_checkpoint(folder / "used", GATED)
    tokenizer = Tokenizer.from_file(str(used / "tokenizer.json"))
    tokenizer.enable_truncation(128)
    tokenizer.enable_padding(length=128, pad_token="<|endoftext|>")
    tokenizer.save(str(used / "tokenizer.json"))
    config = {**GATED, "max_position_embeddings": 2048}
    (used / "config.json").write_text(json.dumps(config))
    bare = write_checkpoint(folder / "bare", {**config, "eos_token_id": 300}, random_tensors(GATED))
    (bare / "tokenizer_config.json").unlink()
    (bare / "tokenizer_config.json").symlink_to("nowhere")
    (bare / "state_reduction.json").write_text('{"method": "\\ud800"}')
    return {"used": used, "bare": bare}


@pytest.fixture(scope="module")
def server(sources, tmp_path_factory):
    arguments = [f"{name}={path}" for name, path in sources.items()]
    server = LiveServer(tmp_path_factory.mktemp("server") / "log", *arguments, "--max-requests", "2")
    try:
        yield server.wait_ready()
    finally:
        server.stop()


def test_a_prompt_is_as_long_as_in_stock_transformers(server, sources):
    stock = AutoTokenizer.from_pretrained(sources["used"])
    for prompt in (PROMPT, "x"):
        body = server.complete(model="used", prompt=prompt, max_tokens=1)
        assert body["usage"]["prompt_tokens"] == len(stock(prompt)["input_ids"]) == len(prompt)
        tokens = server.http.post("/tokenize", json={"model": "used", "prompt": prompt}).json()
        assert tokens["tokens"] == stock(prompt)["input_ids"]


def test_what_is_ignored_is_said_once_a_variant_and_not_at_each_restart(server):
    def said(text):
        return server.log.read_text().count(text)

    note = "stores truncation to 128 tokens and padding to 128 tokens; this is ignored, text is read whole"
    assert said(note) == said(f"used: {server_path(server)}/tokenizer.json {note}") == 1
    server.engines()["used"].kill()
    poll(lambda: said("used: ready on") == 2, "the engine is there again")
    body = {"model": "used", "prompt": PROMPT, "max_tokens": 1}
    poll(lambda: server.http.post("/v1/completions", json=body).status_code == 200, "it is heard")
    assert server.complete(**body)["usage"]["prompt_tokens"] == 800
    assert said(note) == 1


def server_path(server):
    """Where the variant `used` lies."""
    return next(arg for arg in server.process.args if arg.startswith("used=")).removeprefix("used=")


def test_a_tokenizer_config_that_cannot_be_read_costs_the_chat_only(server, sources):
    assert server.complete(model="bare", prompt="x", max_tokens=3)["usage"]["completion_tokens"] == 3
    log = server.log.read_text()
    assert (
        f"bare: no chat: [Errno 2] No such file or directory: '{sources['bare']}/tokenizer_config.json'"
        in log
    )
    body = {"model": "bare", "messages": [{"role": "user", "content": "x"}]}
    answer = server.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400 and "no chat template" in answer.text
    assert "Traceback" not in log
