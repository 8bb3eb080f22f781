"""What the page `/ui` reads beside residency and metrics: the last decisions, and the routers of the policies.

GET /admin/decisions?last=N    what the gateways decided last, without texts
GET /admin/routers             the router of each policy, its weights and its cost-quality curve
"""

from __future__ import annotations

import asyncio
from typing import Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from coe.errors import InvalidRequest
from coe.serve.http.admin import admitted
from coe.serve.http.recent import KEPT
from coe.serve.http.router_facts import router_document
from coe.serve.http.service import Service

USUAL: Final = 200
"""Decisions that an answer has by default."""


async def decisions(service: Service, request: Request) -> Response:
    """The last decisions: `?last=N` of at most `KEPT`, the newest first."""
    await admitted(service, request)
    gateways, records = await service.recent.of_all(_count(request))
    return JSONResponse({"object": "coe.decisions", "gateways": gateways, "kept": KEPT, "decisions": records})


async def routers(service: Service, request: Request) -> Response:
    """The router of each policy. Curves are read from the folders of the routers, so that a new one is seen at once."""
    await admitted(service, request)
    orchestrator = service.orchestrator
    found = await asyncio.to_thread(lambda: [router_document(policy) for policy in orchestrator.policies.values()])
    return JSONResponse({"object": "coe.routers", "default_policy": orchestrator.default_policy, "policies": found})


def _count(request: Request) -> int:
    text = request.query_params.get("last", str(USUAL))
    if not (text.isascii() and text.isdecimal() and len(text) <= 6 and 1 <= int(text) <= KEPT):
        raise InvalidRequest(f"last is a number of decisions from 1 to {KEPT}, not {text[:40]!r}")
    return int(text)
