"""GET /v1/ab/summary."""

from typing import Annotated, Any, get_args

from fastapi import APIRouter, Query, Request

from server.api.serving.service import service_of
from server.api.serving.sizes import kv_bytes_per_token
from server.wire.hub import ShadowOutcome, Summarise

router = APIRouter()


@router.get("/v1/ab/summary")
async def summary(
    request: Request,
    window: Annotated[float, Query(ge=1, le=7 * 86400, description="Seconds to look back.")] = 3600.0,
    points: Annotated[
        int,
        Query(
            ge=0, le=200, description="In how many parts of the window figures are wanted as `series`, too."
        ),
    ] = 0,
) -> dict[str, Any]:
    """What each variant did in the last `window` seconds, and how they differed on the same prompts."""
    service = service_of(request)
    known = await service.link.ask(Summarise(window_s=window, points=points))
    variants = {
        variant.name: {
            **known["variants"][variant.name],
            "state_bytes": variant.info.state_bytes_per_request if variant.loaded else None,
            "kv_bytes_per_token": kv_bytes_per_token(variant.info) if variant.loaded else None,
            "slots": variant.info.slots if variant.loaded else None,
            "pages": variant.info.pages if variant.loaded else None,
            "state_dtype": variant.info.state_dtype if variant.loaded else None,
        }
        for variant in service.variants
    }
    pairs = known["pairs"]
    drawn = {(each["variant"], each["baseline"]): each for each in known["shadow"]}
    none = dict.fromkeys(get_args(ShadowOutcome), 0)
    return {
        "object": "ab.summary",
        "window_s": window,
        "confidence": known["confidence"],
        "aliases": {name: service.routing.shares(name) for name in service.routing.aliases},
        "shadow": [
            {
                "variant": rule.target,
                "baseline": rule.source,
                "fraction": rule.fraction,
                **{outcome: drawn.get((rule.target, rule.source), none)[outcome] for outcome in none},
            }
            for rule in service.routing.shadow
        ],
        "variants": variants,
        "pairs": pairs,
        "series": known["series"],
        "verdict": "; ".join(pair["verdict"] for pair in pairs)
        or "too little data: no pair of variants was compared; use /v1/compare or shadow traffic",
    }
