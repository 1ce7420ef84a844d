"""Prompt tokens that conversations have computed, with our prefix cache and with one that hits at whole blocks only.

    python benchmarks/prefix_blocks.py --json prefix.json

Ours are counted by an engine that really runs them, over a tiny hybrid: which tokens are cached depends on their number
alone. A state is kept at the end of each prompt, and where prompts part, at multiples of 64 tokens. vLLM derives the
block of a hybrid from its state's size (528 tokens for Qwen3.5-4B and 9B, 784 for 27B; with d_k 64, 272 and 400) and
finds a prefix at multiples of it only. Its rule is simulated here, in its favour: memory has no end, and every full
block that was ever computed, prompt or answer, is found. "At most" is what two prompts have in common, token by token.

The conversations are drawn from a fixed seed: some users, who all begin with the same system prompt, take turns in
random order; each turn is the conversation so far, and a new message.
"""

import itertools
import random
import tempfile
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any

import typer
from _serving import GREEDY
from hybrid_models import random_checkpoint
from outputs import FiguresFile, write_figures
from rich.console import Console
from rich.table import Table

from server.engine.engine import Engine
from server.engine.process import build
from server.wire.messages import EngineConfig, Generate

BLOCKS = {"27B": 784, "4B, 9B": 528, "27B, d_k 64": 400, "4B, 9B, d_k 64": 272}
"""Tokens of vLLM's blocks, by model; docs/hybrids.md says where they come from."""


@dataclass(frozen=True)
class Workload:
    """Lengths in tokens; those of messages and answers are drawn between two numbers."""

    users: int
    turns: int
    system: int
    message: tuple[int, int]
    answer: tuple[int, int]


WORKLOADS = {
    "chat": Workload(users=8, turns=8, system=300, message=(20, 200), answer=(60, 300)),
    "agents": Workload(users=4, turns=10, system=2000, message=(100, 900), answer=(30, 120)),
    "tiny": Workload(users=2, turns=3, system=100, message=(20, 40), answer=(5, 10)),
}


def turns(workload: Workload, vocab_size: int, seed: int) -> Iterator[tuple[int, list[int], int]]:
    """The user of each turn, the tokens of the message (of the first, the system prompt before it), and how many tokens
    the answer has."""
    draw = random.Random(seed)

    def tokens(n: int) -> list[int]:
        return [draw.randrange(1, vocab_size) for _ in range(n)]

    system = tokens(workload.system)
    order = [user for user in range(workload.users) for _ in range(workload.turns)]
    draw.shuffle(order)
    begun: set[int] = set()
    for user in order:
        message = tokens(draw.randint(*workload.message))
        yield user, message if user in begun else system + message, draw.randint(*workload.answer)
        begun.add(user)


class Blocks:
    """What a cache of whole blocks of `size` tokens has: a hash of all tokens up to the end of each block."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._seen: set[bytes] = set()

    def cached(self, prompt: list[int]) -> int:
        """Tokens of a prompt that it has; the last one's logits are needed, so that it is computed in any case."""
        known = itertools.takewhile(self._seen.__contains__, self._digests(prompt[:-1]))
        return self._size * sum(1 for _ in known)

    def add(self, tokens: list[int]) -> None:
        self._seen.update(self._digests(tokens))

    def _digests(self, tokens: list[int]) -> Iterator[bytes]:
        whole = blake2b(digest_size=16)
        for end in range(self._size, len(tokens) + 1, self._size):
            whole.update(array("I", tokens[end - self._size : end]).tobytes())
            yield whole.digest()


def answer(engine: Engine, request_id: str, prompt: list[int], tokens: int) -> tuple[list[int], int]:
    """The engine's answer, and how many tokens of the prompt it had."""
    engine.handle(
        Generate(
            request_id=request_id, token_ids=prompt, max_tokens=tokens, sampling=GREEDY, stop_token_ids=[]
        )
    )
    said: list[int] = []
    cached = 0
    while len(said) < tokens:
        output = engine.step()
        for token in output.tokens if output else ():
            said.append(token.token_id)
            cached += token.cached_tokens
    while not engine.idle:
        engine.step()
    return said, cached


def run(engine: Engine, workload: Workload, vocab_size: int, seed: int) -> dict[str, Any]:
    """Prompt tokens in all, and of them those that each way computes."""
    caches = {"at most": Blocks(1), **{f"blocks of {size}": Blocks(size) for size in BLOCKS.values()}}
    computed = dict.fromkeys(("ours", *caches), 0)
    conversations: dict[int, list[int]] = {}
    prompts: list[int] = []
    for n, (user, message, length) in enumerate(turns(workload, vocab_size, seed)):
        prompt = conversations.get(user, []) + message
        prompts.append(len(prompt))
        for name, cache in caches.items():
            computed[name] += len(prompt) - cache.cached(prompt)
        said, cached = answer(engine, str(n), prompt, length)
        computed["ours"] += len(prompt) - cached
        conversations[user] = prompt + said
        for cache in caches.values():
            # The last token of an answer is never fed.
            cache.add(conversations[user][:-1])
    return {"prompts": len(prompts), "longest": max(prompts), "tokens": sum(prompts), "computed": computed}


def main(
    workload: Annotated[list[str], typer.Option(help=f"Of {', '.join(WORKLOADS)}.")] = ["chat", "agents"],  # noqa: B006
    seed: Annotated[int, typer.Option(help="Seed of the conversations.")] = 0,
    json: FiguresFile = None,
) -> None:
    console = Console(width=150)
    table = Table(
        *("workload", "prompt cache", "tokens computed", "of all", "hit rate", "over ours"),
        title="Prompt tokens computed",
    )
    results: dict[str, Any] = {}
    for name in workload:
        with tempfile.TemporaryDirectory() as directory:
            engine, _ = build(
                EngineConfig(
                    variant="tiny",
                    source=str(random_checkpoint(Path(directory), "tiny")),
                    device="cpu",
                    dtype="auto",
                    max_requests=256,
                    threads=1,
                )
            )
        found = run(engine, WORKLOADS[name], 512, seed)
        results[name] = {**asdict(WORKLOADS[name]), "seed": seed, **found}
        console.print(
            f"{name}: {found['prompts']} prompts of up to {found['longest']:,} tokens, {found['tokens']:,} in all"
        )
        for way, computed in sorted(found["computed"].items(), key=lambda item: item[1]):
            table.add_row(
                *(name, way, f"{computed:,}", f"{computed / found['tokens']:.1%}"),
                f"{1 - computed / found['tokens']:.1%}",
                f"{computed / found['computed']['ours']:.2f}",
            )
    console.print(table)
    write_figures(json, results)


if __name__ == "__main__":
    typer.run(main)
