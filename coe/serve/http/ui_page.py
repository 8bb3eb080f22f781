"""The page `/ui`: the files of `coe/serve/ui`, as they are, with a policy that lets the page load and run those only.

    GET /ui           the page
    GET /ui/NAME      its style sheet, scripts and icon

The files have no data and no secrets: what the page shows it gets from the endpoints, with the key of whoever uses it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Final

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

PAGE: Final = "index.html"
_TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
CONTENT_POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",  # text that is assigned as HTML raises an error
        "trusted-types 'none'",
    )
)
_HEADERS: Final = {
    "content-security-policy": CONTENT_POLICY,
    "cache-control": "no-cache",  # the ETag is compared at each load: files change together
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


@dataclass(frozen=True, slots=True)
class PageFile:
    """A file of the page, and the strong ETag of its content."""

    content: bytes
    media_type: str
    etag: str


def ui_routes() -> list[Route]:
    """The routes of the page."""
    return [Route("/ui", page), Route("/ui/{name:path}", file)]


@cache
def page_files() -> Mapping[str, PageFile]:
    """Every file of the page by its name; only these are served, so a path cannot lead elsewhere."""
    found: dict[str, PageFile] = {}
    for entry in files("coe.serve.ui").iterdir():
        media_type = _TYPES.get(f".{entry.name.rpartition('.')[2]}")
        if media_type is not None:
            content = entry.read_bytes()
            found[entry.name] = PageFile(content, media_type, f'"{hashlib.sha256(content).hexdigest()[:32]}"')
    return found


async def page(request: Request) -> Response:
    """The page."""
    return _response(request, PAGE)


async def file(request: Request) -> Response:
    """One of its files; `/ui/` leads to the page."""
    name = request.path_params["name"]
    if not name:
        return RedirectResponse("../ui", headers=_HEADERS)
    if name == PAGE or name not in page_files():
        raise HTTPException(404)
    return _response(request, name)


def _response(request: Request, name: str) -> Response:
    found = page_files()[name]
    headers = {**_HEADERS, "etag": found.etag}
    sent = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    if found.etag in sent or sent == ["*"]:
        return Response(status_code=304, headers=headers)
    return Response(found.content, headers={**headers, "content-type": found.media_type})
