"""POST /v1/completions."""

import asyncio
import secrets
import time
from contextlib import ExitStack
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from server.api.completions import logprobs
from server.api.completions.answer import answer
from server.api.completions.answer_schemas import STREAMED, Completion
from server.api.completions.choices import Choices
from server.api.completions.format import Format
from server.api.completions.generation import Chunk
from server.api.completions.prepare import Prompts, generate_messages, with_defaults
from server.api.completions.schemas import CompletionRequest
from server.api.completions.structured import constraint
from server.api.http.auth import owner_of
from server.api.http.bodies import JSONRoute
from server.api.http.tasks import together
from server.api.serving.prompts import encode_prompt
from server.api.serving.service import origin_of, service_of, sticky_identity
from server.api.serving.variants import Variant
from server.api.states.saved import saved_states

router = APIRouter(route_class=JSONRoute)


@router.post("/v1/completions", response_model=Completion, responses=STREAMED)
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Complete prompts, streaming or not."""
    service = service_of(request)
    variant = service.find(body.model, "model", sticky_identity(request, body.user))

    def shape(index: int, chunk: Chunk, reason: str | None) -> dict[str, Any]:
        listed = body.logprobs is not None
        return {
            "index": index,
            "text": chunk.text,
            "logprobs": logprobs.legacy(variant.text.token_texts, chunk.entries) if listed else None,
            "finish_reason": reason,
        }

    head = {
        "id": f"cmpl-{secrets.token_hex(12)}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": variant.name,
    }
    with ExitStack() as stack:
        places = stack.enter_context(await service.admit(variant, len(body.prompts) * body.choices_each))
        origin = origin_of(request, "completions", priority=body.priority, salt=body.cache_salt)
        saved = None
        if body.state_id is not None:
            saved = await saved_states(request).to_continue(variant, body.state_id, owner_of(request))
        ids = await together(
            [
                encode_prompt(
                    variant,
                    prompt,
                    body.token_limit,
                    before=0 if saved is None else saved.header.tokens,
                    special=body.add_special_tokens is not False,
                    last=body.truncate_prompt_tokens,
                )
                for prompt in body.prompts
            ]
        )
        # The penalty looks at all tokens before, and a saved state does not have its own.
        fields = with_defaults(body, variant, but=() if saved is None else ("repetition_penalty",))
        prompts = Prompts(ids, await _echo(body, variant, ids) if body.echo else None, saved)
        grammar = await constraint(body)
        messages = generate_messages(service.settings, fields, variant, prompts, origin, grammar=grammar)
        observers = request.app.state.observers
        choices = Choices(places, fields, prompts, messages, origin, observers, service.settings)
        return await answer(request, body, choices, Format(head, shape, shape), stack)


async def _echo(body: CompletionRequest, variant: Variant, ids: list[list[int]]) -> list[str]:
    """The text to give back of each prompt: what was given, unless that was token ids or has been cut."""
    decoded: list[str] = await asyncio.to_thread(
        variant.text.tokenizer.decode_batch, ids, skip_special_tokens=body.skip_special_tokens is not False
    )
    whole = body.truncate_prompt_tokens is None
    return [
        given if isinstance(given, str) and whole else text
        for given, text in zip(body.prompts, decoded, strict=True)
    ]
