"""Every feature of openai-python, over a gateway whose expert is a capable remote model (a scripted endpoint).

The other clients have the same features; `make clients` runs them, each in an environment of its own.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import uvicorn
from api_server import EXPERTS, gateway
from scripted_endpoint import MODEL, scripted_app
from scripted_replies import CAPABILITIES, CONTEXT

from coe.engines.remote.engine import RemoteEngine
from registry.spec import ExpertSpec, Kind

sys.path.append(str(Path(__file__).parents[2] / "clients"))
import client_openai  # registers its features  # noqa: F401
import feature


@asynccontextmanager
async def scripted() -> AsyncIterator[ExpertSpec]:
    """The scripted endpoint, and the expert that it is."""
    server = uvicorn.Server(uvicorn.Config(scripted_app(), port=0, log_level="critical", ws="none", lifespan="off"))
    serving = asyncio.create_task(server._serve())  # without `serve`'s signal handlers
    while not server.started:  # it has no event  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    port = server.servers[0].sockets[0].getsockname()[1]
    source = f"http://127.0.0.1:{port}/v1"
    try:
        yield ExpertSpec(
            name=MODEL, kind=Kind.REMOTE, source=source, context_length=CONTEXT, capabilities=frozenset(CAPABILITIES)
        )
    finally:
        server.should_exit = True
        await serving


@pytest.mark.parametrize("name", feature.FEATURES)
async def test_a_feature_of_openai_python_works(name: str) -> None:
    async with (
        scripted() as expert,
        gateway(experts=(*EXPERTS, expert), engines={"remote": RemoteEngine(retries=0)}) as served,
    ):
        endpoint = feature.Endpoint(f"{served.url}/v1", expert.name)
        await asyncio.to_thread(feature.FEATURES[name].run, endpoint)
