"""GET /: the compare page. Its files are served under a path that changes with them, so that browsers may keep them."""

import hashlib
import re
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import RedirectResponse, Response

from server.api.http.errors import APIError

router = APIRouter(include_in_schema=False)

_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    # Browsers show text, and go to the words that a link's text fragment names; Markdown they would save as a file.
    ".md": "text/plain",
}


def read_docs(checkout: Path) -> dict[str, bytes]:
    """The pages of `docs/` by name. None outside of a checkout: an installed package comes without them, and what lies
    beside it under that name is somebody else's."""
    if not (checkout / "pyproject.toml").is_file():
        return {}
    return {path.name: path.read_bytes() for path in sorted((checkout / "docs").glob("*.md"))}


def versioned(page: bytes, names: set[str], version: str) -> bytes:
    """The page with the path of each of its files, and without links to pages of the docs that are not there."""
    text = page.decode()
    for name in names:
        text = re.sub(f'"{re.escape(name)}(?=["#])', f'"ui/{version}/{name}', text)
    return re.sub(r' ?<a class="doc" href="(?!ui/)[^>]*>[^<]*</a>', "", text).encode()


_FILES = {
    path.name: path.read_bytes()
    for path in sorted((Path(__file__).parent / "page").iterdir())
    if path.suffix in _TYPES
} | read_docs(Path(__file__).parents[3])
VERSION = hashlib.sha256(b"".join(_FILES.values())).hexdigest()[:12]
_PAGE = versioned(_FILES.pop("index.html"), set(_FILES), VERSION)

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
    """One of the page's files, or a page of the docs as it is written."""
    data = _FILES.get(name) if version == VERSION else None
    if data is None:
        raise APIError(404, "the page has no such file; reload it")
    headers = {"cache-control": "public, max-age=31536000, immutable"}
    return Response(data, media_type=_TYPES[Path(name).suffix], headers=headers)


@router.get("/docs")
async def docs() -> RedirectResponse:
    """Send the reader to the OpenAPI document: FastAPI's own page would load its scripts from elsewhere."""
    return RedirectResponse("openapi.json")
