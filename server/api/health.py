"""Probes and metrics: /health, /ready, /version, /metrics."""

from importlib.metadata import version

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from server.api.errors import unavailable
from server.api.serving import named_variant, server_state

router = APIRouter()


@router.get("/health")
async def health() -> dict[str, str]:
    """The process is up."""
    return {"status": "ok"}


@router.get("/ready")
async def ready(request: Request, variant: str | None = None) -> dict[str, str]:
    """Whether to send requests here: every variant has loaded once, one answers, and the server has not been asked
    to stop. With `?variant=` that one must answer."""
    state = server_state(request)
    if state.leaving:
        raise unavailable("the server is shutting down")
    if variant is not None:
        if not named_variant(state, variant, "variant").client.up:
            raise unavailable(f"variant {variant!r} is not up")
        return {"status": "ready"}
    loading = [v.name for v in state.variants if not v.loaded]
    if loading:
        raise unavailable(f"still loading: {', '.join(loading)}")
    if not any(v.client.up for v in state.variants):
        raise unavailable("no variant is up")
    return {"status": "ready"}


@router.get("/version")
async def get_version() -> dict[str, str]:
    return {"version": version("lowkey")}


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Prometheus text exposition."""
    return Response(server_state(request).metrics.render(), media_type=CONTENT_TYPE_LATEST)
