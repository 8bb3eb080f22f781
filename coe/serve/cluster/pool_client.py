"""PoolClient: a gateway's connection to the pools of expert hosts, with retries when a host dies.

A call whose answer has not started is retried on another host, or on the replacement if there is no other. After the
first text it ends with an error, since text a client has received cannot be taken back. With `GenerateRequest.stream`
False the answer starts only when it is whole. If a gateway or the proxy dies, its client connections break; the
official client retries those, as it does 5xx.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from typing import TYPE_CHECKING, Any, Final

from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from coe.errors import EngineError, HostLost, Overloaded, UnknownModel
from coe.serve.cluster.catalog import Catalog, serving
from coe.serve.cluster.placement import Board, rank
from coe.types import Chunk, GenerateRequest
from registry.errors import UnknownExpert

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

    from coe.config import HostPoolConfig

ATTEMPTS: Final = 5
"""PoolClient that may die under one call before it fails: by then the request itself is the likely cause."""


class PoolClient:
    """`ask` for an orchestrator, over handles to pools of expert hosts.

    Args:
        handles: name of a pool -> handle of its deployment.
        pools: name of a pool -> its configuration.
        board: the latest status of every host.
    """

    def __init__(
        self,
        handles: Mapping[str, DeploymentHandle[Any]],
        pools: Mapping[str, HostPoolConfig],
        board: Board,
        catalog: Catalog,
    ) -> None:
        self._handles, self._pools, self._board = dict(handles), dict(pools), board
        self._ready: dict[tuple[str, str, str], DeploymentHandle[Any]] = {}
        self._catalog = catalog
        self._serving: dict[str, list[str]] = {}
        if len(catalog.snapshot):  # a gateway starts with an empty catalog, without the experts that pools name
            self.update(catalog)

    def update(self, catalog: Catalog) -> None:
        """Use a new catalog: which pools serve which expert."""
        served = {name: serving(catalog.snapshot, pool) for name, pool in self._pools.items()}
        self._serving = {
            expert: [name for name, snapshot in served.items() if expert in snapshot]
            for expert in catalog.snapshot.experts
        }
        self._catalog = catalog

    async def ask(self, expert: str, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        """Generate with the expert on the host where it can start soonest; see `coe.host.Host.ask`.

        Raises:
            HostLost: the host died after the first text.
            EngineError: ATTEMPTS hosts died under this call.
            CoeError: as raised by the host.
        """
        catalog = self._catalog
        try:
            residency = catalog.snapshot.residency(expert)
        except UnknownExpert as error:
            raise UnknownModel(str(error)) from error
        for _ in range(ATTEMPTS):
            shown = False
            pieces = self._pieces(expert, residency, request, catalog.generation)
            try:
                async for piece in pieces:
                    if not isinstance(piece, Chunk):
                        raise piece
                    shown = True
                    yield piece
                return
            except RayTaskError as error:  # a bug in the host's code; the traceback is in the host's log
                raise EngineError(f"the host of {expert!r} failed: {error.cause}") from error
            except (BackPressureError, DeploymentUnavailableError) as error:
                raise Overloaded(f"the hosts of {expert!r} accept no more requests now: {error}") from error
            except RayActorError as error:
                if shown:
                    raise HostLost(f"the process that answered with {expert!r} died; retry the request") from error
            except RayError as error:
                raise EngineError(f"the host of {expert!r} cannot be reached: {error}") from error
            finally:
                await pieces.aclose()
        raise EngineError(f"{ATTEMPTS} processes died while answering with {expert!r}; see their logs")

    async def _pieces(
        self, expert: str, residency: str, request: GenerateRequest, generation: int
    ) -> AsyncGenerator[Chunk | Exception, None]:
        """The pieces that the host sends; closing the iterator cancels the call."""
        if not request.stream:
            yield await self._handle(residency, expert, "whole").remote(expert, request, generation)
            return
        stream: Any = self._handle(residency, expert, "stream").remote(expert, request, generation)
        try:
            async for piece in stream:
                yield piece
        finally:
            stream.cancel()

    def _handle(self, residency: str, expert: str, method: str) -> DeploymentHandle[Any]:
        """The handle's method for a residency. Serve chooses the host by `multiplexed_model_id`."""
        names = self._serving[expert]
        key = (names[0] if len(names) == 1 else self._soonest(residency, names), residency, method)
        if key not in self._ready:
            deployment = self._handles[key[0]].options(multiplexed_model_id=residency, stream=method == "stream")
            self._ready[key] = getattr(deployment, method)
        return self._ready[key]

    def _soonest(self, residency: str, names: list[str]) -> str:
        """The deployment whose best host can start soonest."""
        hosts = {host.id: (name, host) for name in names for host in self._board.hosts(name)}
        order = rank(residency, [host for _, host in hosts.values()])
        return hosts[order[0]][0] if order else names[0]

    def load_s(self) -> dict[str, float]:
        """Expected seconds until each expert could be ready on any host, for policies with a latency weight."""
        seconds: dict[str, float] = {}
        for expert, names in self._serving.items():
            residency = self._catalog.snapshot.residency(expert)
            known = [
                host.load_s[residency] for name in names for host in self._board.hosts(name) if residency in host.load_s
            ]
            seconds[expert] = min(known, default=0.0)
        return seconds

    async def states(self) -> list[dict[str, Any]]:
        """The state of every host, for `/health`."""
        answers = await asyncio.gather(*(self._all(handle) for handle in self._handles.values()))
        return [state for states in answers for state in states]

    async def _all(self, handle: DeploymentHandle[Any]) -> list[dict[str, Any]]:
        states = await handle.broadcast("state").results_async(return_exceptions=True)
        return [state for state in states if isinstance(state, dict)]  # a host that just died reports nothing
