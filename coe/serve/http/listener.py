"""Listener: accepts connections for an ASGI application, on the running event loop. Gateways share their port."""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Final

import uvicorn
from starlette.types import ASGIApp

from coe.serve.http.connection import BoundedConnection

KEEP_ALIVE_S: Final = 90
"""Seconds that a connection may be idle between two requests."""
log = logging.getLogger("ray.serve")


class Listener:
    """An HTTP server. Its connections have the limits of `BoundedConnection`.

    Args:
        bound: a bound socket; the listener closes it.
        grace_s: seconds that requests in progress have when it closes.
    """

    def __init__(self, app: ASGIApp, bound: socket.socket, *, grace_s: float) -> None:
        config = uvicorn.Config(
            app,
            http=BoundedConnection,
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            log_level=logging.CRITICAL,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=None,  # `close` bounds it, in fractions of a second
            server_header=False,
            proxy_headers=False,  # no header of a client states the client's address
        )
        self._server, self._socket, self._grace_s = uvicorn.Server(config), bound, grace_s
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Return once connections are accepted. Raises OSError if the address cannot be listened on."""
        self._serving = asyncio.ensure_future(
            self._server._serve(sockets=[self._socket])
        )  # without its signal handlers
        while not self._server.started:
            if self._serving.done():
                raise OSError(f"the HTTP server has ended: {self._serving.exception()}")
            await asyncio.sleep(0.005)

    @property
    def is_up(self) -> bool:
        """Whether it accepts connections."""
        return self._serving is not None and not self._serving.done()

    async def close(self) -> None:
        """Accept no more connections, and end those there are: idle ones at once, others after their request.

        Requests that are not finished within the grace are cancelled, and their connections closed.
        """
        if self._serving is None:
            return
        self._server.should_exit = True
        done, _ = await asyncio.wait({self._serving}, timeout=self._grace_s)
        if not done:
            log.warning("requests were not finished within %g s and are cancelled", self._grace_s)
            for task in self._server.server_state.tasks:
                task.cancel()
            for connection in list(self._server.server_state.connections):
                connection.transport.abort()
            self._server.force_exit = True
            await asyncio.wait({self._serving}, timeout=1.0)
