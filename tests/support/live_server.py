"""A real `lowkey-serve` process on a free port, and readable checkpoints for it."""

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from checkpoints import CHATML, GATED, byte_tokenizer, random_tensors, write_checkpoint
from hybrid_cases import BYTES, FULL, LINEAR, Case
from hybrid_tensors import hybrid_tensors
from hybrids import config_of
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.server_process import ServerProcess
from modeling.checkpoint import open_checkpoint
from pruning.surgery import Cut, write_reduced

DEADLINE_S = 240.0
"""How long anything may take on a busy machine."""

E_ID = byte_tokenizer().token_to_id("e")
CONTEXT = 2**16
ENDLESS = CONTEXT - 500
"""Tokens that no engine gets through while a test does a few other things; who must be sure holds the engine."""
OVERRIDES = {"max_position_embeddings": CONTEXT, "eos_token_id": [0, E_ID]}
"""The letter e ends a text, as the end-of-text token does: random models then have a reason to stop."""

MODEL = os.environ.get("LOWKEY_TEST_MODEL", "fla")
"""Which models `write_variants` makes: "fla", of linear attention alone, or "qwen", hybrids with softmax attention."""
HYBRID = MODEL == "qwen"
FAMILY = "qwen3_5_text" if HYBRID else "gated_deltanet"
QWEN = Case("qwen3_5_text", 2, 4, 32, 24, layer_types=(LINEAR, LINEAR, LINEAR, FULL), hidden=64, kv_heads=1)

PATIENT = {
    f"LOWKEY_{name}_S": str(DEADLINE_S)
    for name in ("HANG", "HEADER_TIMEOUT", "BODY_TIMEOUT", "WRITE_TIMEOUT", "DRAIN")
}
"""Time limits of the server."""
ROOMY = {"LOWKEY_CONTEXT_TOKENS": str(CONTEXT)}
"""Pages for requests of any length, or else hybrids would have a shorter context than the other models. They take
memory only once they are used."""


def write_variants(directory: Path, model: str = MODEL) -> dict[str, Path]:
    """A dense checkpoint that writes mostly printable ASCII, and the same with 16 of 32 key channels.

    Args:
        model: "fla" or "qwen", as `MODEL`.
    """
    if model == "qwen":
        config, tensors = {**config_of(QWEN), "vocab_size": BYTES}, hybrid_tensors(QWEN, seed=2)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:BYTES].clone()
    elif model == "fla":
        config, tensors = GATED, random_tensors(GATED)
    else:
        raise ValueError(f"LOWKEY_TEST_MODEL={model!r}: it is fla or qwen")
    tokenizer = byte_tokenizer()
    scale = torch.full((config["vocab_size"], 1), 0.05)
    scale[[tokenizer.token_to_id(chr(c)) for c in range(ord("!"), ord("~") + 1)]] = 4.0
    scale[0] = 2.0
    tensors["lm_head.weight"] *= scale
    dense = write_checkpoint(directory / "dense", {**config, **OVERRIDES}, tensors)
    (dense / "chat_template.jinja").write_text(CHATML)
    checkpoint = open_checkpoint(dense)
    reduced = directory / "reduced"
    reduced.mkdir()
    cuts = [
        Cut(i, torch.arange(0, 32, 2).expand(mixer.num_k_heads, -1).contiguous())
        for i, mixer in checkpoint.spec.deltas.items()
    ]
    write_reduced(checkpoint, cuts, reduced)
    return {"dense": dense, "reduced": reduced}


def poll(condition: Callable[[], Any], what: str, seconds: float = DEADLINE_S) -> Any:
    """The first truthy value of the condition. Raises AssertionError at the deadline."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.05)


@contextlib.contextmanager
def suspended(engine: psutil.Process) -> Iterator[None]:
    """The engine does nothing in this block, or until somebody resumes it in there."""
    engine.suspend()
    try:
        yield
    finally:
        engine.resume()


@contextlib.contextmanager
def withheld(file: Path) -> Iterator[None]:
    """Whoever opens the file in this block waits for its content until the block ends."""
    content = file.rename(file.with_name(f"{file.name}.withheld"))
    os.mkfifo(file)
    pipe = os.open(file, os.O_RDWR)
    try:
        yield
    finally:
        content.rename(file)
        os.write(pipe, file.read_bytes())
        os.close(pipe)


class LiveServer(ServerProcess):
    """A server whose own time limits are the tests': a busy machine is no failure."""

    def __init__(self, log: Path, *arguments: str, **environment: str) -> None:
        super().__init__(
            arguments, log, environment={**PATIENT, **ROOMY, **environment}, timeout_s=DEADLINE_S
        )

    def wait_ready(self, *variants: str) -> "LiveServer":
        super().wait_ready(*variants)
        return self

    def runtime_dir(self) -> Path:
        """The server's directory of sockets and shared log-probabilities."""
        (engine, *_) = self.engines().values()
        address = re.search(r'"request_address":"ipc://([^"]+)"', " ".join(engine.cmdline()))
        assert address is not None
        return Path(address[1]).parent

    def complete(self, **fields: Any) -> dict[str, Any]:
        """A completion that ends at no end of text unless `fields` say otherwise; the body of its 200."""
        body = {"model": "dense", "prompt": "Once upon", "ignore_eos": True, **fields}
        response = self.http.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        return response.json()

    def events(self, **fields: Any) -> list[str]:
        """The data of each event of a streamed completion."""
        body = {"model": "dense", "prompt": "Once upon", "ignore_eos": True, "stream": True, **fields}
        with self.http.stream("POST", "/v1/completions", json=body) as response:
            text = response.read().decode()
            assert response.status_code == 200, text
        blocks = text.split("\n\n")
        assert blocks.pop() == ""
        assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
        return [block.removeprefix("data: ") for block in blocks]

    def samples(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        """All samples of /metrics by name and labels."""
        text = self.http.get("/metrics").text
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def sample(self, name: str, **labels: str) -> float:
        """One sample, 0 if it does not exist."""
        return self.samples().get((name, frozenset(labels.items())), 0.0)

    def wait_idle(self, variant: str = "dense") -> None:
        labels = {"variant": variant, "engine": "0"}
        poll(
            lambda: (
                self.sample("lowkey_state_slots", **labels, state="used") == 0
                and self.sample("lowkey_requests_waiting", **labels) == 0
            ),
            "no slot is used",
        )

    def stop(self, patience_s: float = 60.0) -> None:
        """SIGTERM, then kill what is left."""
        children = [] if self.process.poll() is not None else psutil.Process(self.process.pid).children()
        super().stop(patience_s)
        for child in children:
            if child.is_running():
                child.kill()
