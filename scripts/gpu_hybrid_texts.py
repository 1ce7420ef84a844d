"""The server's engine on hybrids: texts, saved states, and requests that wait for pages in the middle of their text."""

from collections.abc import Iterator

import torch
from gpu_common import Run
from gpu_engine import TIES, compare_texts, make_engine, references
from gpu_hybrids import small_checkpoint
from gpu_loads import random_prompts, request
from gpu_models import free, same_text
from msgspec.structs import replace

from modeling.checkpoint import Checkpoint
from modeling.spec import StateTypes
from modeling.state import PAGE_TOKENS, page_bytes
from server.engine.engine import Engine
from server.engine.memory import Room

Answer = list[tuple[int, float | None]]
"""Tokens of a request, each with its log-probability where it was asked for."""


def check_hybrid_texts(run: Run) -> Iterator[list[str]]:
    """By recorded steps, launched ones and on a CPU, from saved states too."""
    lengths = [1, 9, 66] if run.small else [1, 63, 64, 65, 150, 7, 300, 31]
    for family, d_k in (("qwen3_5_text", 64), ("qwen3_5_moe_text", 128), ("olmo_hybrid", 48))[run.small :]:
        run.need(8)
        checkpoint = small_checkpoint(run, family, d_k)
        prompts = random_prompts(lengths, checkpoint.spec.vocab_size)
        yield from compare_texts(run, checkpoint, prompts, f"{family} d_k {d_k} state float32", "float32")
        if run.small:
            break


def answers(engine: Engine, prompts: dict[str, list[int]], new_tokens: int) -> tuple[dict[str, Answer], int]:
    """The answer to each prompt, all asked at once, and how often a request had to give its pages away."""
    for name, ids in prompts.items():
        engine.handle(replace(request(name, ids, new_tokens), logprobs=0))
    made: dict[str, Answer] = {name: [] for name in prompts}
    preempted = 0
    while not engine.idle:
        output = engine.step()
        if output is None:
            continue
        preempted += output.preemptions
        for token in output.tokens:
            made[token.request_id].append((token.token_id, token.logprob))
    return made, preempted


def unlike_alone(engine: Engine, prompts: dict[str, list[int]], new_tokens: int) -> tuple[list[str], int]:
    """The prompts whose answer is another beside the others than alone, and how often a request had to give its pages
    away."""
    alone = {name: answers(engine, {name: ids}, new_tokens)[0][name] for name, ids in prompts.items()}
    together, preempted = answers(engine, prompts, new_tokens)
    return [name for name in prompts if together[name] != alone[name]], preempted


def told_bits(different: list[str], count: int) -> str:
    return f"{count - len(different)} of {count} the same bits as alone"


def check_experts_alone(run: Run) -> Iterator[list[str]]:
    """Experts in bfloat16, with fixed sizes of products: which experts the others take changes no bit."""
    run.need(8)
    checkpoint = small_checkpoint(run, "qwen3_5_moe_text", 128)
    lengths = [5, 3] if run.small else [1, 63, 64, 67, 150, 7, 300, 31] * 4
    named = {str(i): ids for i, ids in enumerate(random_prompts(lengths, checkpoint.spec.vocab_size))}
    engine, _ = make_engine(
        run, checkpoint, "bfloat16", state_dtype="float32", requests=len(lengths), batch_invariant=True
    )
    different, _ = unlike_alone(engine, named, 2 if run.small else 20)
    run.report.setdefault("hybrid_texts", {})["experts"] = {"different": different}
    good = run.check(not different, "experts, same bits")
    yield ["experts, products of fixed sizes", good, told_bits(different, len(named))]
    del engine
    free(run)


def tight(checkpoint: Checkpoint, requests: int) -> int:
    """Bytes of a pool in which each of `requests` requests has a slot, and the pages of a prompt of up to 64 tokens and
    the one behind, which it is started with; and in which one page is left."""
    types = StateTypes()
    room = Room(checkpoint.spec.state_bytes(0, types), page_bytes(checkpoint.spec, types), 2 * PAGE_TOKENS)
    return room.size(requests, 2 * requests + 1)


def check_preemption(run: Run) -> Iterator[list[str]]:
    """Requests that get to their third page when there are none left give theirs away and go on later: with fixed
    sizes of products the same bits as alone, by recorded steps the text of a CPU."""
    new = 80
    lengths = [60, 62, 58] if run.small else [60, 50, 64, 44, 58, 63]
    checkpoint = small_checkpoint(run, "qwen3_5_text", 64)
    prompts = random_prompts(lengths, checkpoint.spec.vocab_size)
    named = {str(i): ids for i, ids in enumerate(prompts)}
    memory = {"state_memory": tight(checkpoint, len(prompts)), "context_tokens": 2 * PAGE_TOKENS}
    shared = {"state_dtype": "float32", "requests": len(prompts)}

    def made(*, batch_invariant: bool) -> Engine:
        how = {**shared, **memory, "batch_invariant": batch_invariant}
        return make_engine(run, checkpoint, "float32", **how)[0]  # type: ignore[arg-type]

    run.need(8)
    different, preempted = unlike_alone(made(batch_invariant=True), named, new)
    free(run)
    good = not different and preempted > 0
    run.report.setdefault("hybrid_texts", {})["invariant"] = {
        "different": different,
        "preempted": preempted,
    }
    details = f"{told_bits(different, len(prompts))}, preempted {preempted} times"
    yield ["preemption, products of fixed sizes", run.check(good, "preemption, same bits"), details]

    run.need(8)
    found, preempted = answers(made(batch_invariant=False), named, new)
    expected = references(checkpoint.load(), [[ids] for ids in prompts], new, "float32")
    texts = [
        same_text(tokens[None], logits[None], torch.tensor([[t for t, _ in found[name]]]), TIES["float32"])
        for name, (tokens, logits) in zip(named, expected, strict=True)
    ]
    run.report["hybrid_texts"]["graphs"] = {"texts": texts, "preempted": preempted}
    good = all(text.startswith("equal") for text in texts) and preempted > 0
    details = f"against the CPU: {', '.join(sorted({*texts}))}, preempted {preempted} times"
    yield ["preemption, recorded steps", run.check(good, "preemption, graphs"), details]
    free(run)
