"""DirectGateway: a gateway that accepts the connections of clients itself (`serve.http: direct`)."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from coe.config import Config
from coe.errors import ConfigError
from coe.serve.cluster.gateway import Gateway
from coe.serve.cluster.ingress import bound
from coe.serve.cluster.scaling import IN_FLIGHT
from coe.serve.http.api import build_api
from coe.serve.http.listener import Listener
from coe.serve.http.request_ids import RequestIds

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

CLOSE_S: Final = 3.5
"""Seconds that requests in progress have when a gateway stops; Serve kills it after `application.GRACE_S`."""


class DirectGateway(Gateway):
    """Listens on the service's port, beside other gateways, from its first catalog on. Arguments as Gateway."""

    def __init__(self, config: Config, handles: Mapping[str, DeploymentHandle[Any]]) -> None:
        super().__init__(config, handles)
        self._address = (config.serve.host, config.serve.port)
        self._listener: Listener | None = None

    async def reconfigure(self, document: Mapping[str, Any]) -> None:
        """As Gateway. Raises ConfigError if the address cannot be listened on."""
        await super().reconfigure(document)
        if self._listener is None:
            self._listener = await self._listening()

    async def _listening(self) -> Listener:
        host, port = self._address
        try:
            sock = bound(host, port, socket.SO_REUSEPORT, socket.SO_REUSEADDR)
            listener = Listener(RequestIds(build_api(self._service)), sock, grace_s=CLOSE_S)
            await listener.start()
        except OSError as error:
            raise ConfigError(f"{host}:{port} cannot be listened on by a gateway: {error}") from error
        return listener

    def check_health(self) -> None:
        """Serve's health check. Raises RuntimeError when this process no longer accepts connections."""
        if self._listener is not None and not self._listener.is_up:
            raise RuntimeError("the gateway does not listen any more")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """The requests in flight, for `coe.serve.cluster.scaling`."""
        return {IN_FLIGHT: float(self._service.in_flight)}

    async def __del__(self) -> None:  # type: ignore[override]
        """Serve awaits it before it ends this process."""
        if self._listener is not None:
            await self._listener.close()
        if self._batches is not None:
            await self._batches.close()
        super().__del__()
