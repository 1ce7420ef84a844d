"""GET /: the compare page. Its files are served under a path that changes with them, so that browsers may keep them."""

import hashlib
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import RedirectResponse, Response

from server.api.http.errors import APIError

router = APIRouter(include_in_schema=False)

_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_FILES = {
    path.name: path.read_bytes()
    for path in sorted((Path(__file__).parent / "page").iterdir())
    if path.suffix in _TYPES
}
VERSION = hashlib.sha256(b"".join(_FILES.values())).hexdigest()[:12]
_PAGE = _FILES.pop("index.html")
for _name in _FILES:
    _PAGE = _PAGE.replace(f'"{_name}"'.encode(), f'"ui/{VERSION}/{_name}"'.encode())

# Nothing but the page's own files, and no script or style within it.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@router.get("/")
async def page() -> Response:
    """The compare page. It needs no key itself; what it asks of the API does."""
    headers = {
        "content-security-policy": POLICY,
        "cache-control": "no-cache",
        "referrer-policy": "no-referrer",
    }
    return Response(_PAGE, media_type="text/html", headers=headers)


@router.get("/ui/{version}/{name}")
async def file(version: str, name: str) -> Response:
    """One of the page's files."""
    data = _FILES.get(name) if version == VERSION else None
    if data is None:
        raise APIError(404, "the page has no such file; reload it")
    headers = {"cache-control": "public, max-age=31536000, immutable"}
    return Response(data, media_type=_TYPES[Path(name).suffix], headers=headers)


@router.get("/docs")
async def docs() -> RedirectResponse:
    """Send the reader to the OpenAPI document: FastAPI's own page would load its scripts from elsewhere."""
    return RedirectResponse("openapi.json")
