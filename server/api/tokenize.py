"""/tokenize, /detokenize and /tokenizer_info, as vLLM has them."""

import asyncio
from typing import Any

from fastapi import APIRouter, Request

from server.api.answers import Detokenized, Tokenized
from server.api.bodies import JSONRoute
from server.api.chat import conversation
from server.api.errors import APIError, unavailable
from server.api.prompts import tokenize
from server.api.schemas import DetokenizeRequest, TokenizeRequest
from server.api.serving import find_variant, server_state
from server.variants import Variant

router = APIRouter(route_class=JSONRoute)


def _variant(request: Request, model: str | None) -> Variant:
    """The one that is named, or the first. 503 while it is still loading."""
    state = server_state(request)
    variant = find_variant(state, model or state.variants.names[0], "model")
    if not variant.loaded:
        raise unavailable(f"variant {variant.name!r} is still loading")
    return variant


@router.post("/tokenize", response_model=Tokenized, response_model_exclude_unset=True)
async def create_tokens(body: TokenizeRequest, request: Request) -> dict[str, Any]:
    """Token ids of a prompt, or of messages through the chat template."""
    variant = _variant(request, body.model)
    special = body.add_special_tokens
    if body.messages is not None:
        generation = body.add_generation_prompt is not False
        text = await conversation(variant, body.messages, add_generation_prompt=generation)
        ids = await tokenize(variant, text, special=bool(special))
    else:
        ids = await tokenize(variant, body.prompt or "", special=special is not False)
    answer: dict[str, Any] = {"count": len(ids), "max_model_len": variant.info.context_length, "tokens": ids}
    if body.return_token_strs:
        answer["token_strs"] = [variant.tokenizer.id_to_token(token_id) for token_id in ids]
    return answer


@router.post("/detokenize", response_model=Detokenized)
async def create_text(body: DetokenizeRequest, request: Request) -> dict[str, Any]:
    """The text of token ids, special tokens included."""
    variant = _variant(request, body.model)
    size = variant.tokenizer.get_vocab_size(with_added_tokens=True)
    if body.tokens and max(body.tokens) >= size:
        raise APIError(400, f"tokens: token id {max(body.tokens)} is not below {size}", param="tokens")
    texts = await asyncio.to_thread(variant.tokenizer.decode_batch, [body.tokens], skip_special_tokens=False)
    return {"prompt": texts[0]}


@router.get("/tokenizer_info")
async def get_tokenizer_info(request: Request, model: str | None = None) -> dict[str, Any]:
    """The tokenizer's configuration, its chat template included."""
    variant = _variant(request, model)
    return {"tokenizer_class": "PreTrainedTokenizerFast", **variant.tokenizer_config}
