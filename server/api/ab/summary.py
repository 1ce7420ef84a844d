"""GET /v1/ab/summary."""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from server.api.ab.record import record_of
from server.api.ab.window import CONFIDENCE
from server.api.serving.service import service_of

router = APIRouter()


@router.get("/v1/ab/summary")
def summary(
    request: Request,
    window: Annotated[float, Query(ge=1, le=7 * 86400, description="Seconds to look back.")] = 3600.0,
) -> dict[str, Any]:
    """What each variant did in the last `window` seconds, and how they differed on the same prompts."""
    # Not async, so in a thread: over full rings it takes a fraction of a second.
    known = record_of(request).window
    variants = {
        variant.name: {
            **known.traffic(variant.name, window),
            "state_bytes": variant.info.state_bytes_per_request if variant.loaded else None,
        }
        for variant in service_of(request).variants
    }
    pairs = known.pairs(window)
    return {
        "object": "ab.summary",
        "window_s": window,
        "confidence": CONFIDENCE,
        "variants": variants,
        "pairs": pairs,
        "verdict": "; ".join(pair["verdict"] for pair in pairs)
        or "too little data: no pair of variants was compared; use /v1/compare or shadow traffic",
    }
