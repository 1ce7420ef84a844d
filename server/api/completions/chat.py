"""POST /v1/chat/completions."""

import secrets
import time
from contextlib import ExitStack
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from server.api.completions import logprobs
from server.api.completions.answering import answer
from server.api.completions.answers import STREAMED, ChatCompletion
from server.api.completions.choices import Choices, per_choice
from server.api.completions.conversation import conversation
from server.api.completions.generation import Chunk
from server.api.completions.schemas import ChatRequest
from server.api.http.auth import capped_priority
from server.api.http.bodies import JSONRoute
from server.api.serving.prompts import encode_prompt
from server.api.serving.service import admitted, cache_salt, find_variant, server_state, sticky_identity

router = APIRouter(route_class=JSONRoute)


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=STREAMED)
async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation, streaming or not."""
    state = server_state(request)
    variant = find_variant(state, body.model, "model", sticky_identity(request, body.user))
    with ExitStack() as stack:
        places = stack.enter_context(admitted(state, variant, body.choices_each))
        text = await conversation(variant, body.messages, body)
        ids = await encode_prompt(
            state,
            variant,
            text,
            body.given_limit or 1,
            param="messages",
            special=bool(body.add_special_tokens),  # by default the template has written those that it wants
            last=body.truncate_prompt_tokens,
        )
        limit = body.given_limit or variant.info.context_length - len(ids)
        if body.given_limit is None and body.logprobs:
            limit = min(limit, per_choice(state.settings, body))
        choices = Choices(
            state,
            places,
            body.model_copy(update={"max_tokens": limit}),
            [ids],
            endpoint="chat",
            arrived=request.scope["lowkey.arrived"],
            priority=capped_priority(request, body.priority or 0),
            salt=cache_salt(request, body.cache_salt),
        )
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": variant.name,
        }

        def listed(chunk: Chunk) -> dict[str, Any] | None:
            return logprobs.chat(variant.token_texts, chunk.entries) if body.logprobs else None

        def whole(index: int, chunk: Chunk, reason: str | None) -> dict[str, Any]:
            message = {"role": "assistant", "content": chunk.text, "refusal": None}
            return {"index": index, "message": message, "logprobs": listed(chunk), "finish_reason": reason}

        def part(index: int, chunk: Chunk, reason: str | None) -> dict[str, Any]:
            delta = {"content": chunk.text} if chunk.text or reason is None else {}
            return {"index": index, "delta": delta, "logprobs": listed(chunk), "finish_reason": reason}

        first = [
            {
                "index": index,
                "delta": {"role": "assistant", "content": ""},
                "logprobs": None,
                "finish_reason": None,
            }
            for index in range(body.choices_each)
        ]
        return await answer(request, body, choices, head, (whole, part), stack, first)
