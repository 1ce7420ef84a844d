"""POST /v1/completions."""

import secrets
import time
from contextlib import ExitStack
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from server.api import logprobs
from server.api.answering import answer
from server.api.answers import STREAMED, Completion
from server.api.auth import capped_priority
from server.api.choices import Choices, Chunk
from server.api.generation import Saved
from server.api.prompts import encode_prompt
from server.api.schemas import CompletionRequest
from server.api.serving import (
    ServerState,
    admitted,
    cache_salt,
    find_variant,
    server_state,
    sticky_identity,
)
from server.api.states import saved_state
from server.api.streaming import together
from server.variants import Variant

router = APIRouter()


@router.post("/v1/completions", response_model=Completion, responses=STREAMED)
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Complete prompts, streaming or not."""
    state = server_state(request)
    variant = find_variant(state, body.model, "model", sticky_identity(request, body.user))
    with ExitStack() as stack:
        stack.enter_context(admitted(state, variant, len(body.prompts) * body.choices_each))
        saved = await saved_state(request, variant, body.state_id)
        choices = await _choices(state, variant, body, saved, request)
        head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": variant.name,
        }

        def choice(index: int, chunk: Chunk, reason: str | None) -> dict[str, Any]:
            listed = body.logprobs is not None
            return {
                "index": index,
                "text": chunk.text,
                "logprobs": logprobs.legacy(variant.token_texts, chunk.entries) if listed else None,
                "finish_reason": reason,
            }

        return await answer(request, body, choices, head, (choice, choice), stack)


async def _choices(
    state: ServerState, variant: Variant, body: CompletionRequest, saved: Saved | None, request: Request
) -> Choices:
    before = 0 if saved is None else saved.tokens
    prompts = await together(
        [encode_prompt(state, variant, p, body.token_limit, before=before) for p in body.prompts]
    )
    echo: list[str] | None = None
    if body.echo:
        skip = body.skip_special_tokens is not False
        echo = [
            given if isinstance(given, str) else variant.tokenizer.decode(ids, skip_special_tokens=skip)
            for given, ids in zip(body.prompts, prompts, strict=True)
        ]
    return Choices(
        state,
        variant,
        body,
        prompts,
        endpoint="completions",
        arrived=request.scope["lowkey.arrived"],
        priority=capped_priority(request, body.priority or 0),
        salt=cache_salt(request, body.cache_salt),
        saved=saved,
        echo=echo,
    )
