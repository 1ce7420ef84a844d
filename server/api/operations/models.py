"""GET /v1/models: the variants and what each one costs."""

from typing import Any

import msgspec
from fastapi import APIRouter, Request

from server.api.serving.service import Service, service_of
from server.api.serving.sizes import kv_bytes_per_token
from server.api.serving.variants import Variant

router = APIRouter()


def _describe(variant: Variant) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "id": variant.name,
        "object": "model",
        "created": variant.created,
        "owned_by": "lowkey",
        "root": variant.source,
    }
    if not variant.loaded:
        return {**answer, "lowkey": {"status": "loading"}}
    info = variant.info
    return {
        **answer,
        "max_model_len": info.context_length,
        "lowkey": {
            "status": "up" if variant.client.up else "down",
            "source": variant.source,
            "family": info.family,
            "method": info.method,
            "chat_template": variant.text.chat_template is not None,
            "tool_call_parser": variant.text.call_format,
            "reasoning_parser": variant.text.reasoning_format,
            "default_sampling": variant.text.sampling,
            "d_k": variant.d_k,
            "state_bytes": info.state_bytes_per_request,
            "conv_bytes": info.conv_bytes_per_request,
            "kv_bytes_per_token": kv_bytes_per_token(info),
            "kv_bytes_per_page": info.bytes_per_page,
            "state_dtype": info.state_dtype,
            "context_length": info.context_length,
            "device": info.device,
            "backend": info.backend,
            "slots": info.slots,
            "pages": info.pages,
            "memory": info.memory,
            "planning": msgspec.to_builtins(info.planning),
        },
    }


def _describe_alias(service: Service, name: str) -> dict[str, Any]:
    shares = service.routing.shares(name)
    return {
        "id": name,
        "object": "model",
        "created": max(v.created for v in service.variants if v.name in shares),
        "owned_by": "lowkey",
        "lowkey": {"alias": shares},
    }


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """All variants, then all aliases with the shares of their variants."""
    service = service_of(request)
    aliases = [_describe_alias(service, name) for name in service.routing.aliases]
    return {"object": "list", "data": [_describe(v) for v in service.variants] + aliases}


@router.get("/v1/models/{model_id}")
async def get_model(model_id: str, request: Request) -> dict[str, Any]:
    """One variant or alias."""
    service = service_of(request)
    if model_id in service.routing.aliases:
        return _describe_alias(service, model_id)
    return _describe(service.find(model_id, "model"))
