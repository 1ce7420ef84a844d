"""GET /v1/models: the variants and what each one costs."""

from typing import Any

from fastapi import APIRouter, Request

from server.api.generation import find_variant, server_state
from server.variants import Variant

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
            "d_k": variant.d_k,
            "state_bytes": info.state_bytes_per_request,
            "state_dtype": info.state_dtype,
            "context_length": info.context_length,
            "device": info.device,
            "backend": info.backend,
        },
    }


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """All variants."""
    return {"object": "list", "data": [_describe(v) for v in server_state(request).variants]}


@router.get("/v1/models/{model_id}")
async def get_model(model_id: str, request: Request) -> dict[str, Any]:
    """One variant."""
    return _describe(find_variant(server_state(request), model_id, "model"))
