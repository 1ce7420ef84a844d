"""The API over engines that are a table of bigrams in this process: what an engine says is known in advance."""

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import CHATML, GATED, write_checkpoint
from safetensors import safe_open
from safetensors.numpy import save_file
from starlette.testclient import TestClient

from server.api.serving import variants
from server.hub import engines
from server.settings import Settings
from server.single import create_server
from server.wire.exchange import EngineError, Exchange
from server.wire.messages import (
    EngineConfig,
    FinishReason,
    Generate,
    Ready,
    SaveState,
    Score,
    Scored,
    Token,
    pack_top,
)

VOCAB = 257
CONTEXT = 512
FIRST_AT = 1000.0
"""When engines make the first token of each request, by their own clock."""
STEP_S = 0.25
"""Seconds between the tokens of a request."""
D_K = {"dense": 32, "reduced": 16}
KV_NAMES = ("layers.1.keys", "layers.1.values")
KV_SHAPE = (2, 8)
"""Key and value heads of the softmax attention layer that scripted hybrids have, and channels of each."""
CONV_BYTES = 96
"""Bytes of a scripted hybrid's recurrent state that count as those of convolutions."""
PAGE_BYTES = 64 * 2 * 2 * 8 * 4
"""Bytes of a page of scripted hybrids: keys and values of 64 tokens in float32."""


class Script:
    """What one engine does: log-probabilities of the next token by the last one `[vocab, vocab]`, and its faults."""

    hybrid = False
    """Whether the models have a layer of softmax attention beside the linear one (`scripted_api`)."""

    def __init__(self, seed: int) -> None:
        generator = np.random.default_rng(seed)
        logits = generator.normal(size=(VOCAB, VOCAB)) * 2
        logits[:, [0, *range(128, VOCAB)]] -= 8  # mostly ASCII, seldom an end of text
        self.logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        self.queue: list[list[int]] = []
        """Tokens to give instead of the usual ones: a list for each request to come."""
        self.fail_after: int | None = None
        self.seen: list[Any] = []
        self.cached_tokens = 0
        self.together = 1
        """How many tokens come at once."""
        self.pages: int | None = None
        """Pages that requests hold at their end; None for what their tokens need."""

    def top(self, last: int, count: int) -> list[tuple[int, float]]:
        order = np.argsort(-self.logprobs[last], kind="stable")[:count]
        return [(int(i), float(self.logprobs[last, i])) for i in order]


SCRIPTS: dict[str, Script] = {}


class ScriptedExchange(Exchange):
    """Its tokens come `Script.together` at a time, when those before have been taken."""

    def __init__(
        self,
        client: "ScriptedClient",
        message: Generate,
        wake: Callable[[], None],
        most_unread: float,
        on_sampled: Callable[[], None],
    ) -> None:
        super().__init__(
            message.request_id,
            client.variant,
            wake,
            most_unread,
            tell=lambda _: None,
            on_finish=on_sampled,
            on_close=lambda _: None,
        )
        self._client = client
        script = client.script
        self._coming = made(script, message, script.queue.pop(0) if script.queue else None)
        asyncio.get_running_loop().call_soon(self._bring)

    def _bring(self) -> None:
        if self.closed:
            return
        try:
            for token in itertools.islice(self._coming, self._client.script.together):
                self.put(token)
        except EngineError as e:
            self.fail(e)
        self.wake()

    def has(self, count: int) -> bool:
        enough = super().has(count)
        if not enough:
            asyncio.get_running_loop().call_soon(self._bring)
        return enough

    def take(self) -> list[Token]:
        tokens = super().take()
        if tokens and not self.finished:
            asyncio.get_running_loop().call_soon(self._bring)
        return tokens

    def close(self) -> None:
        self._client.aborted += not (self.finished or self.closed)
        super().close()


def made(script: Script, message: Generate, scripted: list[int] | None) -> Iterator[Token]:
    """The tokens that the script makes for a request, or those that are given. Raises EngineError where it says so."""
    last, how = message.token_ids[-1], message.sampling
    before = message.state_tokens + len(message.token_ids)
    for position in range(message.max_tokens):
        if script.fail_after == position:
            raise EngineError("the engine broke")
        logprobs = script.logprobs[last]
        if scripted is not None:
            token = scripted[position]
        elif how.temperature == 0:
            token = int(logprobs.argmax())
        else:
            seed = [abs(how.seed), how.choice, position]
            token = int(np.random.default_rng(seed).choice(VOCAB, p=np.exp(logprobs)))
        reason: FinishReason | None = "stop" if token in message.stop_token_ids else None
        if reason is None and position == message.max_tokens - 1:
            reason = "length"
        wanted = message.logprobs
        pages = 0
        if reason is not None and script.hybrid:
            pages = -(-(before + position) // 64) if script.pages is None else script.pages
        yield Token(
            message.request_id,
            token,
            FIRST_AT + position * STEP_S,
            reason,
            *((0.001, 0.002, script.cached_tokens) if position == 0 else (None, None, 0)),
            logprob=None if wanted is None else float(logprobs[token]),
            top=None if wanted is None else pack_top(script.top(last, wanted)),
            pages=pages,
        )
        last = token
        if reason is not None:
            return


class ScriptedEngine:
    """In the place of Supervisor: an engine that is up from the start."""

    def __init__(self, config: EngineConfig, runtime_dir: Path, *, on_ready: Any, **_: Any) -> None:
        self.config = config
        self.ready: Ready | None = None
        self.up = False
        self._on_ready = on_ready

    def start(self) -> None:
        d_k = D_K[self.config.variant]
        ready = Ready(
            family="gated_deltanet",
            d_k=[d_k] * 3,
            d_v=[24] * 3,
            vocab_size=VOCAB,
            context_length=CONTEXT,
            eos_token_ids=[0],
            checkpoint_path=self.config.source,
            method=None,
            state_bytes_per_request=d_k * 24 * 4,
            conv_bytes_per_request=CONV_BYTES if Script.hybrid else 0,
            bytes_per_page=PAGE_BYTES if Script.hybrid else 0,
            state_layout={
                "recurrent.0": ("F32", [1, d_k, 24]),
                **({name: ("F32", [0, *KV_SHAPE]) for name in KV_NAMES} if Script.hybrid else {}),
            },
            state_dtype="float32",
            device="cpu",
            backend="script",
            weights_bytes=1,
            memory={"weights": 1, "states": 5},
            load_s=0.0,
            slots=4,
            pages=CONTEXT // 64 if Script.hybrid else 0,
            max_running=4,
        )
        self._on_ready(ready, "nowhere")
        self.ready, self.up = ready, True

    def catch_up(self) -> None:
        pass

    async def close(self) -> None:
        self.up = False


class ScriptedClient:
    """In the place of EngineClient."""

    def __init__(self, variant: str, front_end: str) -> None:
        self.variant = variant
        self.ready: Ready | None = None
        self.up = False
        self.aborted = 0
        self.last_step = 0.0
        self.script = SCRIPTS.setdefault(variant, Script(len(SCRIPTS)))

    def engine_up(self, ready: Ready, address: str) -> None:
        self.ready, self.up = ready, True

    def engine_down(self) -> None:
        self.up = False

    def generate(
        self,
        message: Generate,
        wake: Callable[[], None],
        *,
        most_unread: float,
        on_sampled: Callable[[], None],
    ) -> Exchange:
        self.script.seen.append(message)
        return ScriptedExchange(self, message, wake, most_unread, on_sampled)

    async def score(self, message: Score) -> Scored:
        self.script.seen.append(message)
        ids = message.token_ids
        pairs = list(zip(ids[message.from_position - 1 :], ids[message.from_position :], strict=False))
        reference = message.kl_reference
        compared = 0 if reference is None or reference.mode == "write" else len(ids) - reference.from_position
        return Scored(
            request_id=message.request_id,
            logprobs=[float(self.script.logprobs[a, b]) for a, b in pairs],
            kl=[0.5] * compared,
            agree=[True] * compared,
            top=[pack_top(self.script.top(a, message.top_logprobs)) for a, _ in pairs],
        )

    async def save_state(self, message: SaveState) -> None:
        self.script.seen.append(message)
        state = np.zeros((1, D_K[self.variant], 24), dtype=np.float32)
        state[0, 0, 0] = message.token_ids[-1]
        tensors = {"recurrent.0": state}
        if Script.hybrid:
            tensors |= {
                name: np.full((len(message.token_ids), *KV_SHAPE), 0.5, np.float32) for name in KV_NAMES
            }
        save_file(tensors, message.path, metadata=message.fingerprint)


def state_in(path: str) -> int:
    """The last token of the text that a file's state stands for."""
    with safe_open(path, framework="numpy") as f:
        return int(f.get_tensor("recurrent.0")[0, 0, 0])


@contextlib.contextmanager
def scripted_api(
    directory: Path, monkeypatch: Any, *, hybrid: bool = False, **settings: Any
) -> Iterator[TestClient]:
    """A client of the API over two scripted variants; hybrids also keep keys and values."""
    monkeypatch.setattr(Script, "hybrid", hybrid)
    sources = {}
    for number, name in enumerate(D_K):
        path = directory / name
        if not path.exists():
            write_checkpoint(path, GATED, seed=number)
            (path / "chat_template.jinja").write_text(CHATML)
        sources[name] = str(path)
    monkeypatch.setattr(variants, "EngineClient", ScriptedClient)
    monkeypatch.setattr(engines, "Supervisor", ScriptedEngine)
    app, hub = create_server(Settings(variants=sources, **settings), print)
    app.state.hub = hub
    with TestClient(app) as client:
        yield client
