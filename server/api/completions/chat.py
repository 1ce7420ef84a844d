"""POST /v1/chat/completions."""

import secrets
import time
from contextlib import ExitStack
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from server.api.completions import logprobs
from server.api.completions.answer import answer
from server.api.completions.answer_schemas import STREAMED, ChatCompletion
from server.api.completions.chat_schemas import ChatRequest
from server.api.completions.choices import Choices
from server.api.completions.conversation import conversation
from server.api.completions.format import Format
from server.api.completions.generation import Chunk
from server.api.completions.message import delta, message
from server.api.completions.prepare import Prompts, generate_messages, per_choice, with_defaults
from server.api.completions.tools import grammar_for, reader_for
from server.api.http.bodies import JSONRoute
from server.api.serving.prompts import encode_prompt
from server.api.serving.service import origin_of, service_of, sticky_identity

router = APIRouter(route_class=JSONRoute)


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=STREAMED)
async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation, streaming or not."""
    service = service_of(request)
    variant = service.find(body.model, "model", sticky_identity(request, body.user))

    def listed(chunk: Chunk) -> dict[str, Any] | None:
        return logprobs.chat(variant.text.token_texts, chunk.entries) if body.logprobs else None

    def whole(index: int, chunk: Chunk, reason: str | None) -> dict[str, Any]:
        return {"index": index, "message": message(chunk), "logprobs": listed(chunk), "finish_reason": reason}

    def part(index: int, chunk: Chunk, reason: str | None) -> dict[str, Any]:
        new = delta(chunk) if chunk.text or reason is None else {}
        return {"index": index, "delta": new, "logprobs": listed(chunk), "finish_reason": reason}

    head = {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "object": "chat.completion.chunk" if body.stream else "chat.completion",
        "created": int(time.time()),
        "model": variant.name,
    }
    role = {"role": "assistant", "content": ""}
    first = [
        {"index": index, "delta": role, "logprobs": None, "finish_reason": None}
        for index in range(body.choices_each)
    ]
    with ExitStack() as stack:
        places = stack.enter_context(await service.admit(variant, body.choices_each))
        origin = origin_of(request, "chat", priority=body.priority, salt=body.cache_salt)
        prompt = await conversation(variant, body.messages, body)
        reader = reader_for(variant, body, prompt)
        ids = await encode_prompt(
            variant,
            prompt.text,
            body.given_limit or 1,
            param="messages",
            special=bool(body.add_special_tokens),  # by default the template has written those that it wants
            last=body.truncate_prompt_tokens,
        )
        limit = body.given_limit or variant.info.context_length - len(ids)
        if body.given_limit is None and body.logprobs:
            limit = min(limit, per_choice(service.settings, body))
        fields = with_defaults(body, variant).model_copy(update={"max_tokens": limit})
        prompts = Prompts([ids])
        grammar = await grammar_for(variant, body, prompt)
        messages = generate_messages(service.settings, fields, variant, prompts, origin, grammar=grammar)
        observers = request.app.state.observers
        choices = Choices(places, fields, prompts, messages, origin, observers, service.settings, reader)
        return await answer(request, body, choices, Format(head, whole, part, first), stack)
