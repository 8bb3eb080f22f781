"""/openapi.json and /docs of a running endpoint."""

from __future__ import annotations

from api_server import gateway
from starlette.applications import Starlette
from starlette.routing import Route

from coe.protocol.openapi import openapi_document
from coe.serve.http.api import build_api


async def test_the_document_and_the_page_are_served() -> None:
    async with gateway() as g:
        answer = await g.http.get("/openapi.json")
        assert answer.json() == openapi_document()
        page = await g.http.get("/docs")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert page.headers["content-security-policy"].startswith("default-src 'none'")
        assert "/v1/chat/completions" in page.text


async def test_every_endpoint_with_its_method_is_in_the_document() -> None:
    async with gateway() as g:
        api = build_api(g.service)
        assert isinstance(api, Starlette)
        routes = [route for route in api.routes if isinstance(route, Route)]
        served = {
            (route.path.replace(":path", ""), m) for route in routes for m in (route.methods or {"GET"}) - {"HEAD"}
        }
    stated = {(path, method.upper()) for path, about in openapi_document()["paths"].items() for method in about}
    assert served == stated
