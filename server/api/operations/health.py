"""Probes and metrics: /health, /ready, /version, /metrics."""

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from lowkey import __version__
from server.api.http.errors import unavailable
from server.api.serving.service import Service, service_of
from server.wire.hub import HubSilentError, Ping, RenderMetrics

router = APIRouter()


@router.get("/health")
async def health(request: Request) -> dict[str, str]:
    """Say that the server is up: this process, and the hub behind it."""
    try:
        await service_of(request).link.ask(Ping())
    except HubSilentError as e:
        raise unavailable(str(e)) from e
    return {"status": "ok"}


@router.get("/ready")
async def ready(request: Request, variant: str | None = None) -> dict[str, str]:
    """Whether to send requests here: every variant has loaded once, one answers, and the server has not been asked
    to stop. With `?variant=` that one must answer."""
    service = service_of(request)
    if variant is not None and not service.leaving:
        if not service.named(variant, "variant").client.up:
            raise unavailable(f"variant {variant!r} is not up")
        return {"status": "ready"}
    reason = why_not_ready(service)
    if reason is not None:
        raise unavailable(reason)
    return {"status": "ready"}


def why_not_ready(service: Service) -> str | None:
    """The reason why no requests should be sent to this server now; None if they should."""
    if service.leaving:
        return "the server is shutting down"
    loading = [v.name for v in service.variants if not v.loaded]
    if loading:
        return f"still loading: {', '.join(loading)}"
    if not any(v.client.up for v in service.variants):
        return "no variant is up"
    return None


@router.get("/version")
async def get_version() -> dict[str, str]:
    return {"version": __version__}


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """All metrics in Prometheus' text format."""
    text = await service_of(request).link.ask(RenderMetrics())
    return Response(text, media_type=CONTENT_TYPE_LATEST)
