"""POST /v1/compare: one prompt through two or more variants, side by side.

Each variant completes the prompt. Then each scores the baseline's completion, teacher forced, in one pass over the
full vocabulary: KL, agreement of the most likely token, and the perplexity of the prompt.
"""

import asyncio
import contextlib
import math
import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request

from server.api.errors import APIError, from_engine, unavailable
from server.api.generation import (
    Generation,
    ServerState,
    admitted,
    encode_prompt,
    find_variant,
    server_state,
    unless_disconnected,
)
from server.api.schemas import CompareRequest
from server.engine.client import BrokenOutputError, EngineError
from server.engine.messages import KLReference, Score, Scored
from server.variants import Variant

router = APIRouter()

FLOAT_BYTES = 4


@router.post("/v1/compare")
async def compare(body: CompareRequest, request: Request) -> dict[str, Any]:
    """Complete the prompt with each variant and measure the others against the baseline."""
    state = server_state(request)
    baseline, others = _chosen(state, body)
    with contextlib.ExitStack() as stack:
        for variant in (baseline, *others):
            stack.enter_context(admitted(state, variant))
        _check_comparable(state, body, baseline, others)
        try:
            return await unless_disconnected(
                request, _compare(state, body, baseline, others, request.scope["lowkey.arrived"])
            )
        except EngineError as e:
            raise from_engine(e) from e


def _chosen(state: ServerState, body: CompareRequest) -> tuple[Variant, list[Variant]]:
    """The baseline and the variants to compare with it. 400 if they can't be compared."""
    names = body.variants or state.variants.names
    if len(set(names)) < 2:
        raise APIError(400, f"variants: two different ones are needed, got {names}", param="variants")
    if len(set(names)) != len(names):
        raise APIError(400, f"variants: each may appear once, got {names}", param="variants")
    chosen = [find_variant(state, name, "variants") for name in names]
    baseline = chosen[0] if body.baseline is None else find_variant(state, body.baseline, "baseline")
    if baseline not in chosen:
        raise APIError(
            400, f"baseline: {baseline.name!r} is not among the variants {names}", param="baseline"
        )
    return baseline, [variant for variant in chosen if variant is not baseline]


def _check_comparable(
    state: ServerState, body: CompareRequest, baseline: Variant, others: list[Variant]
) -> None:
    """400 unless all have one tokenizer, and the log-probabilities fit. The variants have loaded."""
    for variant in others:
        sizes = variant.info.vocab_size, baseline.info.vocab_size
        if variant.tokenizer_sha256 != baseline.tokenizer_sha256 or sizes[0] != sizes[1]:
            raise APIError(
                400,
                f"variants: {variant.name!r} has another tokenizer or vocabulary size than {baseline.name!r}",
                param="variants",
            )
    needed = body.token_limit * baseline.info.vocab_size * FLOAT_BYTES
    if needed > state.settings.compare_bytes:
        most = state.settings.compare_bytes // (baseline.info.vocab_size * FLOAT_BYTES)
        raise APIError(
            400,
            f"max_tokens: at most {most} in a comparison of these variants, got {body.token_limit}",
            param="max_tokens",
        )


async def _compare(
    state: ServerState, body: CompareRequest, baseline: Variant, others: list[Variant], arrived: float
) -> dict[str, Any]:
    # With one seed for all, sampled answers differ only where the distributions do.
    body = body.model_copy(update={"seed": secrets.randbits(63) if body.seed is None else body.seed})
    state.comparisons += 1
    order = [baseline, *others]
    if state.comparisons % 2 == 0:
        order.reverse()  # whoever goes first finds cold caches
    prompt_ids = {
        variant.name: await encode_prompt(state, variant, body.prompt, body.token_limit) for variant in order
    }
    generations: dict[str, Generation] = {}
    for variant in order:
        begins = arrived if variant is order[0] or body.parallel else time.monotonic()
        ids = prompt_ids[variant.name]
        generation = Generation(state, variant, body, ids, endpoint="compare", arrived=begins)
        generations[variant.name] = generation
        if not body.parallel:
            await generation.run()
    if body.parallel:
        tasks = [asyncio.create_task(generation.run()) for generation in generations.values()]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:  # of those that go on when one has failed
                task.cancel()

    base = generations[baseline.name]
    async with state.scoring:
        scores = await _score(state, baseline, others, base)
    results = [_result(base, scores[baseline.name], None)]
    for variant in others:
        difference = _difference(base, generations[variant.name], scores[variant.name], bool(body.parallel))
        results.append(_result(generations[variant.name], scores[variant.name], difference))
        labels = (variant.name, baseline.name, "compare")
        state.metrics.compare_kl.labels(*labels).observe(difference["mean_kl"])
        state.metrics.compare_agreement.labels(*labels).observe(difference["top1_agreement"])
    return {
        "id": f"cmp-{secrets.token_hex(12)}",
        "object": "compare",
        "created": int(time.time()),
        "baseline": baseline.name,
        "parallel": bool(body.parallel),
        "results": results,
    }


@dataclass(frozen=True)
class _Scores:
    """One variant on the baseline's tokens."""

    prompt_perplexity: float | None
    """Over the prompt's tokens after the first; None for a prompt of one token."""
    kl: list[float]
    agree: list[bool]


async def _score(
    state: ServerState, baseline: Variant, others: list[Variant], base: Generation
) -> dict[str, _Scores]:
    """One pass per variant over the prompt and the baseline's completion. The baseline leaves its log-probabilities
    in a file in shared memory, where the others' engines read them; only scalars come back here."""
    token_ids = base.prompt_ids + base.token_ids
    prompt = len(base.prompt_ids)
    path = state.variants.runtime_dir / f"{secrets.token_hex(8)}.logprobs"

    async def score(variant: Variant, mode: Any) -> _Scores:
        message = Score(
            request_id=secrets.token_hex(8),
            token_ids=token_ids,
            from_position=1,
            kl_reference=KLReference(path=str(path), mode=mode, from_position=prompt),
        )
        scored: Scored = await variant.client.score(message)
        logprobs = scored.logprobs[: prompt - 1]
        figures = [*scored.logprobs, *scored.kl]
        if not all(map(math.isfinite, figures)):
            raise BrokenOutputError(f"variant {variant.name!r} gave NaN or Inf for these tokens")
        # No more than e^700: a broken model's perplexity must still be a number.
        perplexity = math.exp(min(-sum(logprobs) / len(logprobs), 700.0)) if logprobs else None
        return _Scores(perplexity, scored.kl, scored.agree)

    try:
        await asyncio.to_thread(_allocate, path, len(base.token_ids) * baseline.info.vocab_size * FLOAT_BYTES)
        scores = {baseline.name: await score(baseline, "write")}
        for variant in others:
            scores[variant.name] = await score(variant, "compare")
        return scores
    finally:
        path.unlink(missing_ok=True)


def _allocate(path: Path, size: int) -> None:
    """A file of `size` bytes that really has its memory: writing past what is left would kill the engine (SIGBUS)."""
    with path.open("xb") as f:
        try:
            os.posix_fallocate(f.fileno(), 0, size)
        except OSError as e:
            raise unavailable(f"no room for {size} bytes of log-probabilities in {path.parent}: {e}") from e


def _result(
    generation: Generation, scores: _Scores, against_baseline: dict[str, Any] | None
) -> dict[str, Any]:
    return {
        "variant": generation.variant.name,
        "text": generation.text,
        "finish_reason": generation.finish_reason,
        "usage": generation.usage,
        "lowkey": generation.lowkey,
        "prompt_perplexity": scores.prompt_perplexity,
        "against_baseline": against_baseline,
    }


def _difference(base: Generation, other: Generation, scores: _Scores, parallel: bool) -> dict[str, Any]:
    """What changed from the baseline to another variant."""
    pairs = zip(base.token_ids, other.token_ids, strict=False)
    divergence = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if divergence is None and len(base.token_ids) != len(other.token_ids):
        divergence = min(len(base.token_ids), len(other.token_ids))
    speeds = base.tokens_per_second, other.tokens_per_second
    return {
        "mean_kl": sum(scores.kl) / len(scores.kl),
        "top1_agreement": sum(scores.agree) / len(scores.agree),
        "first_divergence": divergence,
        "state_bytes_ratio": (
            other.variant.info.state_bytes_per_request / base.variant.info.state_bytes_per_request
        ),
        "tokens_per_second_ratio": (
            None if parallel or speeds[0] is None or speeds[1] is None else speeds[1] / speeds[0]
        ),
    }
