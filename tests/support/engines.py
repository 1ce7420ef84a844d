"""Engines in this process, and the plain loop over `modeling` that they are held against."""

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from checkpoints import write_checkpoint
from hybrids import Case, write_hybrid
from torch import Tensor

from modeling.checkpoint import open_checkpoint
from modeling.model import Model
from modeling.runtime import Runtime, TorchRuntime
from modeling.spec import StateDType, StateTypes
from modeling.state import StatePool
from server.engine.cache import StateCache
from server.engine.engine import Engine
from server.engine.grammars import Grammars
from server.engine.output import StepOutput
from server.engine.runner import Runner
from server.engine.sampler import stream_key, uniform
from server.engine.scheduler import Scheduler
from server.wire.messages import Abort, Generate, Sampling, Score

TOLERANCE = 1e-4
"""Relative difference of logits across batch sizes and prefill splits; tokens may differ only where this decides."""

GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, seed=0)

_ids = itertools.count()


def generate(token_ids: list[int], max_tokens: int = 8, **fields: Any) -> Generate:
    """A greedy request that stops at no token, unless `fields` say otherwise."""
    defaults: dict[str, Any] = {"request_id": f"g{next(_ids)}", "sampling": GREEDY, "stop_token_ids": []}
    return Generate(token_ids=token_ids, max_tokens=max_tokens, **{**defaults, **fields})


def score(token_ids: list[int], from_position: int = 1, **fields: Any) -> Score:
    fields = {"request_id": f"s{next(_ids)}", **fields}
    return Score(token_ids=token_ids, from_position=from_position, **fields)


def sampling(seed: int, temperature: float = 1.0, **fields: Any) -> Sampling:
    return Sampling(
        **{"temperature": temperature, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": seed, **fields}
    )


def prompt(length: int, seed: int = 0, vocab: int = 257) -> list[int]:
    """Random token ids without 0, the end of text."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, vocab, (length,), generator=generator).tolist()


class Bench:
    """A model, and engines on it.

    Args:
        config: that of an fla checkpoint, or a case of a hybrid's.
    """

    def __init__(self, directory: Path, config: dict[str, Any] | Case, seed: int = 0) -> None:
        write = write_hybrid if isinstance(config, Case) else write_checkpoint
        self.checkpoint = open_checkpoint(write(directory, config, seed=seed))
        self.model: Model = self.checkpoint.load()

    def engine(
        self,
        *,
        slots: int = 8,
        prefill_tokens: int = 128,
        depth: int = 0,
        prefix_cache: bool = False,
        batch_invariant: bool = False,
        state_dtype: StateDType = "float32",
        max_running: int | None = None,
        pages: int | None = None,
        runtime: Callable[[Model], Runtime] = TorchRuntime,
        grammars: Grammars | None = None,
    ) -> Engine:
        types = StateTypes.named(state_dtype, torch.float32)
        pool = StatePool(self.model.spec, slots, pages=pages or 8 * slots, types=types)
        cache = StateCache(pool, prefix_cache=prefix_cache, aligned=batch_invariant)
        runner = Runner(runtime(self.model), pool, batch_invariant=batch_invariant)
        return Engine(Scheduler(cache, prefill_tokens, max_running), runner, depth, grammars)

    @torch.inference_mode()
    def check_tokens(self, message: Generate, tokens: list[int]) -> int:
        """Hold an engine's tokens against a plain loop at batch 1. At the first difference the loop's own choice must
        be a close one; what follows differs rightly. Returns how many tokens agreed."""
        ids = torch.tensor(message.token_ids)
        pool = StatePool.with_room(self.model.spec, 1, len(ids) + len(tokens))
        slot = torch.tensor([pool.allocate()])
        hidden, state = self.model(ids, [0, len(ids)])
        pool.scatter(slot, state)
        pool.advance(slot, [0, len(ids)])
        hidden = hidden[-1:]
        for position, token in enumerate(tokens):
            expected, gap = _choice(self.model.logits(hidden)[0], message.sampling, position, token)
            if token != expected:
                assert gap < TOLERANCE, f"token {position} is {token}, not {expected}, by a margin of {gap}"
                return position
            hidden = TorchRuntime(self.model).decode(torch.tensor([token]), pool, slot)
        return len(tokens)


def _choice(logits: Tensor, how: Sampling, position: int, other: int) -> tuple[int, float]:
    """The plain loop's token, and how far it is from choosing `other`."""
    if how.temperature == 0:
        best = int(logits.argmax())
        return best, float((logits[best] - logits[other]) / logits.abs().max())
    assert how.top_k == 0 and how.top_p == 1 and how.min_p == 0
    edges = (logits.double() / how.temperature).softmax(0).cumsum(0)
    key = stream_key(torch.tensor([how.seed]), torch.tensor([how.choice]))
    u = float(uniform(key, torch.tensor([position])))
    drawn = int((edges <= u).sum())
    below = float(edges[other - 1]) if other else 0.0
    return drawn, max(below - u, u - float(edges[other]), 0.0)


def run(
    engine: Engine, arrivals: dict[int, list[Generate | Score | Abort]], limit: int = 10_000
) -> list[StepOutput]:
    """Step until idle, taking in messages before the steps that they are listed under."""
    outputs: list[StepOutput] = []
    last = max(arrivals)
    for step in range(limit):
        for message in arrivals.get(step, []):
            engine.handle(message)
        if step >= last and engine.idle:
            return outputs
        while (output := engine.step()) is None and engine.blocked and engine.in_threads:
            time.sleep(0.001)
        if output is not None:
            outputs.append(output)
    raise AssertionError(f"not idle after {limit} steps")


def tokens_of(outputs: list[StepOutput]) -> dict[str, list[int]]:
    """Token ids of each request. Each must end exactly once, at its last token."""
    tokens: dict[str, list[int]] = {}
    ended: set[str] = set()
    for output in outputs:
        for token in output.tokens:
            assert token.request_id not in ended, f"{token} after the end"
            tokens.setdefault(token.request_id, []).append(token.token_id)
            if token.finish_reason is not None:
                ended.add(token.request_id)
    assert ended == set(tokens)
    return tokens
