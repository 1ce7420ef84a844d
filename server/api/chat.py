"""POST /v1/chat/completions."""

import asyncio
import secrets
import time
from contextlib import ExitStack
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from server.api import logprobs
from server.api.answering import answer
from server.api.answers import STREAMED, ChatCompletion
from server.api.auth import capped_priority
from server.api.choices import Choices, Chunk
from server.api.errors import APIError
from server.api.prompts import encode_prompt
from server.api.schemas import ChatRequest, Message
from server.api.serving import admitted, cache_salt, find_variant, server_state, sticky_identity
from server.chat_template import TemplateRefusedError
from server.variants import Variant

router = APIRouter()


async def conversation(
    variant: Variant, messages: list[Message], *, add_generation_prompt: bool = True
) -> str:
    """The text of messages by the model's chat template. 400 if it has none, or refuses them."""
    template = variant.chat_template
    if template is None:
        raise APIError(
            400,
            f"messages: model {variant.name!r} has no chat template; use /v1/completions",
            param="messages",
        )
    plain = [_plain(message) for message in messages]
    try:
        return await asyncio.to_thread(template.render, plain, add_generation_prompt=add_generation_prompt)
    except TemplateRefusedError as e:
        raise APIError(400, f"messages: {str(e)[:1000]}", param="messages") from e


def _plain(message: Message) -> dict[str, Any]:
    fields = message.model_dump()
    if isinstance(message.content, list):  # templates of text models take text
        fields["content"] = "\n".join(part.text for part in message.content)
    return fields


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=STREAMED)
async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation, streaming or not."""
    state = server_state(request)
    variant = find_variant(state, body.model, "model", sticky_identity(request, body.user))
    with ExitStack() as stack:
        stack.enter_context(admitted(state, variant, body.choices_each))
        text = await conversation(variant, body.messages)
        # The template has written the special tokens that it wants.
        least = body.given_limit or 1
        ids = await encode_prompt(state, variant, text, least, param="messages", special=False)
        limit = body.given_limit or variant.info.context_length - len(ids)
        choices = Choices(
            state,
            variant,
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
