"""POST /v1/completions."""

import contextlib
import secrets
import time
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from server.api.errors import from_engine
from server.api.generation import (
    Generation,
    admitted,
    encode_prompt,
    find_variant,
    server_state,
    sticky_identity,
    unless_disconnected,
)
from server.api.schemas import CompletionRequest, StreamOptions
from server.api.streaming import DONE, EventStream, sse
from server.engine.client import EngineError

router = APIRouter()


@router.post("/v1/completions")
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Complete a prompt, streaming or not."""
    state = server_state(request)
    variant = find_variant(state, body.model, "model", sticky_identity(request, body.user))
    with contextlib.ExitStack() as stack:
        stack.enter_context(admitted(state, variant))
        prompt_ids = await encode_prompt(state, variant, body)
        arrived = request.scope["lowkey.arrived"]
        generation = Generation(state, variant, body, prompt_ids, endpoint="completions", arrived=arrived)
        head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": variant.name,
        }
        if body.stream:
            options = body.stream_options or StreamOptions()
            return EventStream(_stream(head, generation, options), on_end=stack.pop_all().close)
        try:
            await unless_disconnected(request, generation.run())
        except EngineError as e:
            raise from_engine(e) from e
    speed = generation.tokens_per_second
    return JSONResponse(
        {
            **head,
            "choices": [_choice(generation.text, generation.finish_reason)],
            "usage": generation.usage,
            "lowkey": generation.lowkey,
        },
        headers={
            "x-lowkey-state-bytes": str(variant.info.state_bytes_per_request),
            "x-lowkey-tokens-per-second": "null" if speed is None else f"{speed:.3f}",
        },
    )


def _choice(text: str, finish_reason: str | None) -> dict[str, Any]:
    return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}


async def _stream(
    head: dict[str, Any], generation: Generation, options: StreamOptions
) -> AsyncGenerator[str]:
    """Text chunks, a chunk with the finish reason, the usage if asked for, [DONE]."""

    def chunk(choices: list[dict[str, Any]], **extra: Any) -> str:
        if options.continuous_usage_stats:
            extra = {"usage": generation.usage, **extra}
        elif options.include_usage:
            extra = {"usage": None, **extra}
        return sse({**head, "choices": choices, **extra})

    try:
        async with contextlib.aclosing(generation.pieces()) as pieces:
            async for piece in pieces:
                yield chunk([_choice(piece, None)])
    except EngineError as e:
        yield sse(from_engine(e).body())
        yield DONE
        return
    finish = [_choice("", generation.finish_reason)]
    if options.include_usage:
        yield chunk(finish)
        yield chunk([], usage=generation.usage, lowkey=generation.lowkey)
    else:
        yield chunk(finish, lowkey=generation.lowkey)
    yield DONE
