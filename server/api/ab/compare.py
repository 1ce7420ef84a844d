"""POST /v1/compare: one prompt through two or more variants, side by side."""

import contextlib
from collections.abc import AsyncGenerator

from fastapi import APIRouter, Request
from fastapi.responses import Response

from server.api.ab.comparison import Comparison
from server.api.ab.scoring import same_vocabulary, score_bytes
from server.api.completions.generation import checked_allowed, checked_bias
from server.api.completions.schemas import CompareRequest
from server.api.http.auth import capped_priority
from server.api.http.bodies import JSONRoute
from server.api.http.encoding import json_response
from server.api.http.errors import APIError, from_engine
from server.api.http.streaming import DONE, EventStream, sse
from server.api.serving.service import (
    ServerState,
    admitted,
    cache_salt,
    named_variant,
    server_state,
    unless_disconnected,
)
from server.api.serving.variants import Variant
from server.wire.exchange import EngineError

router = APIRouter(route_class=JSONRoute)


@router.post("/v1/compare")
async def compare(body: CompareRequest, request: Request) -> Response:
    """Complete the prompt with each variant and measure the others against the baseline, streaming or not."""
    state = server_state(request)
    variants = _chosen(state, body)
    with contextlib.ExitStack() as stack:
        for variant in variants:
            stack.enter_context(admitted(state, variant))
        _check_comparable(state, body, variants)
        comparison = await Comparison.create(
            state,
            body,
            variants,
            arrived=request.scope["lowkey.arrived"],
            priority=capped_priority(request, body.priority or 0),
            salt=cache_salt(request, body.cache_salt),
        )
        if body.stream:
            return EventStream(_stream(comparison), on_end=stack.pop_all().close)
        try:
            return json_response(await unless_disconnected(request, comparison.run()))
        except EngineError as e:
            raise from_engine(e) from e


def _chosen(state: ServerState, body: CompareRequest) -> list[Variant]:
    """The baseline and the variants to compare with it. 400 if they can't be compared."""
    names = body.variants or state.variants.names
    if len(set(names)) < 2:
        raise APIError(400, f"variants: two different ones are needed, got {names}", param="variants")
    if len(set(names)) != len(names):
        raise APIError(400, f"variants: each may appear once, got {names}", param="variants")
    chosen = [named_variant(state, name, "variants") for name in names]
    baseline = chosen[0] if body.baseline is None else named_variant(state, body.baseline, "baseline")
    if baseline not in chosen:
        raise APIError(
            400, f"baseline: {baseline.name!r} is not among the variants {names}", param="baseline"
        )
    return [baseline, *(variant for variant in chosen if variant is not baseline)]


def _check_comparable(state: ServerState, body: CompareRequest, variants: list[Variant]) -> None:
    """400 unless all have one tokenizer and each token that the request names, and the log-probabilities fit. They
    have loaded."""
    baseline, *others = variants
    for variant in others:
        if not same_vocabulary(baseline, variant):
            raise APIError(
                400,
                f"variants: {variant.name!r} has another tokenizer or vocabulary size than {baseline.name!r}",
                param="variants",
            )
    checked_bias(body, baseline)
    checked_allowed(body, baseline)
    if score_bytes(body.token_limit, baseline) > state.settings.compare_bytes:
        most = state.settings.compare_bytes // score_bytes(1, baseline)
        raise APIError(
            400,
            f"max_tokens: at most {most} in a comparison of these variants, got {body.token_limit}",
            param="max_tokens",
        )


async def _stream(comparison: Comparison) -> AsyncGenerator[bytes]:
    """Events of the variants as they come, then the whole answer, [DONE]."""
    try:
        async with contextlib.aclosing(comparison.events()) as events:
            async for event in events:
                yield sse(event)
    except EngineError as e:
        yield sse(from_engine(e).body())
    except APIError as e:
        yield sse(e.body())
    yield DONE
