"""POST /v1/completions."""

import asyncio
import secrets
import time
from contextlib import ExitStack
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from server.api.completions import logprobs
from server.api.completions.answering import answer
from server.api.completions.answers import STREAMED, Completion
from server.api.completions.choices import Choices
from server.api.completions.generation import Chunk, Saved
from server.api.completions.schemas import CompletionRequest
from server.api.http.auth import capped_priority
from server.api.http.bodies import JSONRoute
from server.api.http.streaming import together
from server.api.serving.prompts import encode_prompt
from server.api.serving.service import (
    Places,
    ServerState,
    admitted,
    cache_salt,
    find_variant,
    server_state,
    sticky_identity,
)
from server.api.states.routes import saved_state

router = APIRouter(route_class=JSONRoute)


@router.post("/v1/completions", response_model=Completion, responses=STREAMED)
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Complete prompts, streaming or not."""
    state = server_state(request)
    variant = find_variant(state, body.model, "model", sticky_identity(request, body.user))
    with ExitStack() as stack:
        places = stack.enter_context(admitted(state, variant, len(body.prompts) * body.choices_each))
        saved = await saved_state(request, variant, body.state_id)
        choices = await _choices(state, places, body, saved, request)
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
    state: ServerState, places: Places, body: CompletionRequest, saved: Saved | None, request: Request
) -> Choices:
    variant = places.variant
    before = 0 if saved is None else saved.tokens
    prompts = await together(
        [
            encode_prompt(
                state,
                variant,
                prompt,
                body.token_limit,
                before=before,
                special=body.add_special_tokens is not False,
                last=body.truncate_prompt_tokens,
            )
            for prompt in body.prompts
        ]
    )
    echo: list[str] | None = None
    if body.echo:
        decoded = await asyncio.to_thread(
            variant.tokenizer.decode_batch, prompts, skip_special_tokens=body.skip_special_tokens is not False
        )
        whole = body.truncate_prompt_tokens is None
        echo = [
            given if isinstance(given, str) and whole else text
            for given, text in zip(body.prompts, decoded, strict=True)
        ]
    return Choices(
        state,
        places,
        body,
        prompts,
        endpoint="completions",
        arrived=request.scope["lowkey.arrived"],
        priority=capped_priority(request, body.priority or 0),
        salt=cache_salt(request, body.cache_salt),
        saved=saved,
        echo=echo,
    )
