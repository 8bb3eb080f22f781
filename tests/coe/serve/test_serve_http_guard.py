"""Requests that web pages can send: content type, host, origin and CORS."""

from __future__ import annotations

import json
from typing import Any

import pytest
from api_server import Gateway, gateway

from coe.config import ServeConfig
from coe.serve.http.guard import hosts_of, is_allowed, is_loopback

ASK = {"model": "echo", "prompt": "a b"}
BODY = json.dumps(ASK).encode()
JSON = {"content-type": "application/json"}


async def posted(g: Gateway, path: str = "/v1/completions", **headers: str) -> tuple[int, Any]:
    response = await g.http.post(path, content=BODY, headers={name.replace("_", "-"): v for name, v in headers.items()})
    return response.status_code, response.json().get("error")


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json",
        "application/json; charset=utf-8",
        'Application/JSON;charset="UTF-8"',
        "application/json; charset=utf8; x=y",
        "application/vnd.api+json",
    ],
)
async def test_json_is_taken_however_it_is_declared(content_type: str) -> None:
    async with gateway() as g:
        assert (await posted(g, content_type=content_type))[0] == 200


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({}, "the Content-Type must be application/json, and the request has none"),
        ({"content_type": "text/plain"}, "must be application/json, not 'text/plain'"),
        ({"content_type": "application/x-www-form-urlencoded"}, "must be application/json, not"),
        ({"content_type": "multipart/form-data; boundary=x"}, "must be application/json, not"),
        ({"content_type": "text/plain; application/json"}, "must be application/json, not"),
        ({"content_type": "x" * 5000}, "must be application/json, not"),
        ({"content_type": "application/json; charset=latin-1"}, "must be JSON in UTF-8"),
        ({"content_type": "application/json", "content_encoding": "gzip"}, "Content-Encoding 'gzip' is not supported"),
    ],
)
async def test_a_body_that_is_not_declared_as_plain_json_is_refused(headers: dict[str, str], message: str) -> None:
    async with gateway() as g:
        for path in ("/v1/completions", "/v1/chat/completions", "/v1/route"):
            status, error = await posted(g, path, **headers)
            assert (status, error["code"]) == (415, "unsupported_media_type")
            assert message in error["message"] and len(error["message"]) < 200
        assert (await posted(g, content_type="application/json", content_encoding="identity"))[0] == 200


async def test_only_loopback_names_are_served_on_a_loopback_address() -> None:
    async with gateway() as g:
        port = g.url.rpartition(":")[2]
        for host in ("localhost", f"localhost:{port}", "127.0.0.1", f"[::1]:{port}", "LOCALHOST.", "coe.localhost"):
            assert (await posted(g, host=host, content_type="application/json"))[0] == 200, host
        for host in ("evil.example", "localhost.evil.example", f"evil.example:{port}", "", "x" * 5000, "[::1", "a b"):
            status, error = await posted(g, host=host, content_type="application/json")
            assert (status, error["code"]) == (403, "host_not_allowed") and "serve.allowed_hosts" in error["message"]
            assert len(error["message"]) < 500
        response = await g.http.get("/v1/models", headers={"host": "evil.example"})
        assert response.status_code == 403


async def test_configured_hosts_are_the_only_ones() -> None:
    async with gateway(settings={"allowed_hosts": ["api.example.com", "*.example.org"]}) as g:
        for host, status in (
            ("api.example.com", 200),
            ("API.example.com:8000", 200),
            ("a.example.org", 200),
            ("example.org", 403),
            ("127.0.0.1", 403),
            ("localhost", 403),
        ):
            assert (await posted(g, host=host, content_type="application/json"))[0] == status, host


def test_a_public_address_serves_every_host_unless_configured() -> None:
    assert hosts_of(ServeConfig(host="0.0.0.0")) == ("*",)
    assert hosts_of(ServeConfig(host="::")) == ("*",)
    assert hosts_of(ServeConfig(host="0.0.0.0", allowed_hosts=("A.example",))) == ("a.example",)
    assert is_allowed("anything", hosts_of(ServeConfig())) is False
    for host, loopback in {"127.0.0.1": True, "127.1.2.3": True, "::1": True, "[::1]": True, "localhost": True}.items():
        assert is_loopback(host) is loopback
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.com", "::ffff:10.0.0.1", ""):
        assert not is_loopback(host), host


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:1", "file://", "x" * 1000])
async def test_a_page_of_another_origin_is_refused_and_its_preflight_too(origin: str) -> None:
    async with gateway() as g:
        status, error = await posted(g, origin=origin, content_type="application/json")
        assert (status, error["code"]) == (403, "origin_not_allowed") and "serve.cors_origins" in error["message"]
        preflight = {"origin": origin, "access-control-request-method": "POST"}
        response = await g.http.options("/v1/chat/completions", headers=preflight)
        assert response.status_code == 403 and response.json()["error"]["code"] == "origin_not_allowed"
        assert not any(name.startswith("access-control") for name in response.headers)
        response = await g.http.get("/health", headers={"origin": origin})
        assert response.status_code == 200 and "access-control-allow-origin" not in response.headers
        assert len(g.log.lines) == 0, "no request began"


async def test_a_page_of_this_endpoint_may_send_requests() -> None:
    async with gateway() as g:
        assert (await posted(g, origin=g.url, content_type="application/json"))[0] == 200


async def test_configured_origins_get_cors_and_others_do_not() -> None:
    page = "https://app.example.com"
    async with gateway(settings={"cors_origins": [page]}) as g:
        preflight = {
            "access-control-request-method": "POST",
            "access-control-request-headers": "content-type,x-coe-debug",
        }
        response = await g.http.options("/v1/chat/completions", headers={"origin": page, **preflight})
        assert response.status_code == 200 and response.headers["access-control-allow-origin"] == page
        assert "POST" in response.headers["access-control-allow-methods"]
        assert "x-coe-debug" in response.headers["access-control-allow-headers"]
        response = await g.http.post("/v1/completions", content=BODY, headers={"origin": page, **JSON})
        assert response.status_code == 200 and response.headers["access-control-allow-origin"] == page
        assert "x-coe-expert" in response.headers["access-control-expose-headers"].lower()
        error = await g.http.post("/v1/completions", content=b"{", headers={"origin": page, **JSON})
        assert error.status_code == 400 and error.headers["access-control-allow-origin"] == page
        other = {"origin": "https://evil.example", **preflight}
        assert (await g.http.options("/v1/chat/completions", headers=other)).status_code == 403
        assert (await posted(g, origin="https://evil.example", content_type="application/json"))[0] == 403
        assert (await posted(g, content_type="application/json"))[0] == 200, "programs send no origin"


async def test_all_origins_may_be_allowed() -> None:
    async with gateway(settings={"cors_origins": ["*"]}) as g:
        response = await g.http.post("/v1/completions", content=BODY, headers={"origin": "https://any.example", **JSON})
        assert response.status_code == 200 and response.headers["access-control-allow-origin"] == "*"
