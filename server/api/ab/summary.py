"""GET /v1/ab/summary, and what is recorded for it."""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from server.api.ab import window as ab
from server.api.completions.generation import Generation
from server.api.serving.service import server_state

router = APIRouter()


@router.get("/v1/ab/summary")
def summary(
    request: Request,
    window: Annotated[float, Query(ge=1, le=7 * 86400, description="Seconds to look back.")] = 3600.0,
) -> dict[str, Any]:
    """What each variant did in the last `window` seconds, and how they differed on the same prompts."""
    # Not async, so in a thread: over full rings it takes a fraction of a second.
    state = server_state(request)
    variants = {
        variant.name: {
            **state.ab.traffic(variant.name, window),
            "state_bytes": variant.info.state_bytes_per_request if variant.loaded else None,
        }
        for variant in state.variants
    }
    pairs = state.ab.pairs(window)
    return {
        "object": "ab.summary",
        "window_s": window,
        "confidence": ab.CONFIDENCE,
        "variants": variants,
        "pairs": pairs,
        "verdict": "; ".join(pair["verdict"] for pair in pairs)
        or "too little data: no pair of variants was compared; use /v1/compare or shadow traffic",
    }


def record(generation: Generation, window: ab.ABWindow) -> None:
    """A generation that has ended, if it belongs to the variant's traffic: a comparison does not."""
    if generation.endpoint == "compare":
        return
    request = ab.Request(
        completion_tokens=len(generation.token_ids),
        decode_s=generation.decode_s,
        ttft_s=generation.ttft_s,
        gaps_s=generation.gaps_s,
        failed=generation.finish_reason == "error",
    )
    window.add_request(generation.variant.name, request)
