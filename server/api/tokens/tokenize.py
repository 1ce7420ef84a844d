"""/tokenize, /detokenize and /tokenizer_info, as vLLM has them."""

import asyncio
import json
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from server.api.completions.conversation import conversation
from server.api.http.aside import aside
from server.api.http.bodies import JSONRoute
from server.api.http.encoding import json_list, json_response, json_text
from server.api.http.errors import APIError, unavailable
from server.api.serving.service import service_of
from server.api.serving.variants import Variant
from server.api.tokens.schemas import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest
from server.text.tokenizer import encode

router = APIRouter(route_class=JSONRoute)

MAX_TEXT_BYTES = 2**19
"""Longest text that /tokenize takes. The tokenizer hands over all ids in one call, in which nothing else runs."""
MAX_IDS = 2**19
"""Most token ids that /detokenize takes, for the same reason."""


def _variant(request: Request, model: str | None) -> Variant:
    """The variant that is named, or the first. 503 while it is still loading."""
    service = service_of(request)
    variant = service.find(model or service.variants.names[0], "model")
    if not variant.loaded:
        raise unavailable(f"variant {variant.name!r} is still loading")
    return variant


@router.post("/tokenize", response_model=Tokenized, response_model_exclude_unset=True)
async def create_tokens(body: TokenizeRequest, request: Request) -> Response:
    """Token ids of a prompt, or of messages through the chat template."""
    variant = _variant(request, body.model)
    special = body.add_special_tokens
    if body.messages is not None:
        text = (await conversation(variant, body.messages, body)).text
    else:
        text, special = body.prompt or "", special is not False
    size = len(text.encode())
    if size > MAX_TEXT_BYTES:
        field = "prompt" if body.messages is None else "messages"
        message = f"{field}: a text to tokenise may have {MAX_TEXT_BYTES} bytes, got {size}"
        raise APIError(400, message, param=field)
    ids = await encode(variant.text.tokenizer, text, special=bool(special))
    return await aside(_tokenized, variant, ids, strings=bool(body.return_token_strs))


def _tokenized(variant: Variant, ids: list[int], *, strings: bool) -> Response:
    answer = {
        "count": len(ids),
        "max_model_len": variant.info.context_length,
        "tokens": json_list(ids, lambda token_id: token_id),
    }
    if strings:
        answer["token_strs"] = json_list(ids, variant.text.tokenizer.id_to_token)
    return json_response(answer)


@router.post("/detokenize", response_model=Detokenized)
async def create_text(body: DetokenizeRequest, request: Request) -> Response:
    """The text of token ids, special tokens included."""
    variant = _variant(request, body.model)
    if len(body.tokens) > MAX_IDS:
        message = f"tokens: up to {MAX_IDS} token ids are put into text, got {len(body.tokens)}"
        raise APIError(400, message, param="tokens")
    size = variant.text.tokenizer.get_vocab_size(with_added_tokens=True)
    if body.tokens and max(body.tokens) >= size:
        raise APIError(400, f"tokens: token id {max(body.tokens)} is not below {size}", param="tokens")
    texts = await asyncio.to_thread(
        variant.text.tokenizer.decode_batch, [body.tokens], skip_special_tokens=False
    )
    return await aside(lambda: json_response({"prompt": json_text(texts[0])}))


@router.get("/tokenizer_info", response_model=dict[str, Any])
async def get_tokenizer_info(request: Request, model: str | None = None) -> Response:
    """The tokenizer's configuration, its chat template included."""
    info = {"tokenizer_class": "PreTrainedTokenizerFast", **_variant(request, model).text.tokenizer_config}
    # All in ASCII: a configuration may hold half a surrogate pair, which has no UTF-8.
    return Response(json.dumps(info), media_type="application/json")
