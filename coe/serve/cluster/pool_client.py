"""PoolClient: a gateway's connection to the pools of expert hosts, with retries when a host dies.

A call whose answer has not started is retried on another host, or on the replacement if there is no other, when its
host dies or does not respond for `serve.host_silent_s` (`liveness`). After the first text it ends with an error, since
text a client has received cannot be taken back. With `GenerateRequest.stream` False the answer starts only when it is
whole. An error that is about the host's process (`Scope.PROCESS`) is retried on the other hosts likewise. A host
that has a newer catalog, and does not serve the expert by it, names the pools that do (`NotServedHere`). If a gateway
or the proxy dies, its client connections break; the official client retries those, as it does 5xx.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Final

from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from coe.errors import CoeError, EngineError, HostLost, NotServedHere, Overloaded, Scope, UnknownModel
from coe.protocol.residence import residence_body
from coe.serve.cluster.catalog import Catalog, pools_by_expert
from coe.serve.cluster.link import Broken, LinkLost, Links
from coe.serve.cluster.liveness import HostSilent, unless_lost
from coe.serve.cluster.placement import Board, Call
from coe.types import Chunk, GenerateRequest
from registry.errors import UnknownExpert

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

    from coe.config import HostPoolConfig

ATTEMPTS: Final = 5
"""Hosts that may die or fall silent under one call before it fails: by then the request itself is the likely cause."""
HEALTH_S: Final = 3.0
"""Seconds that all hosts of a pool have to report their state; a pool where one is late reports what is known of it."""


class PoolClient:
    """`ask` for an orchestrator, over handles to pools of expert hosts.

    Args:
        handles: name of a pool -> handle of its deployment.
        pools: name of a pool -> its configuration.
        board: the latest status of every host.
        links: connections to hosts on this machine; None makes every call through a handle.
    """

    def __init__(
        self,
        handles: Mapping[str, DeploymentHandle[Any]],
        pools: Mapping[str, HostPoolConfig],
        board: Board,
        catalog: Catalog,
        links: Links | None = None,
    ) -> None:
        self._links = links
        self._handles, self._pools, self._board = dict(handles), dict(pools), board
        self._ready: dict[tuple[str, str, str], DeploymentHandle[Any]] = {}
        self._catalog = catalog
        self._serving: dict[str, list[str]] = {}
        if len(catalog.snapshot):  # a gateway starts with an empty catalog, without the experts that pools name
            self.update(catalog)

    def update(self, catalog: Catalog) -> None:
        """Use a new catalog: which pools serve which expert."""
        self._serving = pools_by_expert(catalog, self._pools.values())
        self._catalog = catalog

    async def ask(self, expert: str, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        """Generate with the expert on the host where the answer is predicted to end first; see `coe.host.Host.ask`.

        Raises:
            HostLost: the host died, or stopped responding, after the first text.
            EngineError: ATTEMPTS hosts died or stopped responding under this call.
            CoeError: as raised by the host.
        """
        refused: set[str] = set()
        newer: NotServedHere | None = None  # of a host whose catalog is newer
        for _ in range(ATTEMPTS):
            catalog = self._catalog  # a retry goes where the expert is by then
            try:
                residency = catalog.snapshot.residency(expert)
            except UnknownExpert as error:
                raise UnknownModel(str(error)) from error
            pools, generation = self._serving[expert], catalog.generation
            if newer is not None and newer.generation > generation:
                pools, generation = [*newer.pools], newer.generation
            call = self._board.open(residency, pools, avoid=refused)
            pieces = self._pieces(expert, call, request, generation)
            try:
                async for piece in pieces:
                    if not isinstance(piece, Chunk):
                        raise piece
                    call.shown = True
                    yield piece
                return
            except CoeError as error:  # from the host
                refused.add(call.host or "")
                if isinstance(error, NotServedHere) and error.generation > generation and error.pools:
                    newer = error
                    continue
                others = self._board.knows_another(pools, refused)
                if call.shown or error.scope is not Scope.PROCESS or not others:
                    raise
            except RayTaskError as error:  # a bug in the host's code; the traceback is in the host's log
                raise EngineError(f"the host of {expert!r} failed: {error.cause}") from error
            except (BackPressureError, DeploymentUnavailableError) as error:
                raise Overloaded(f"the hosts of {expert!r} accept no more requests now: {error}") from error
            except (RayActorError, LinkLost) as error:
                if call.shown:
                    raise HostLost(f"the process that answered with {expert!r} died; retry the request") from error
            except HostSilent as error:
                if call.shown:
                    raise HostLost(
                        f"the process that answered with {expert!r} does not respond; retry the request"
                    ) from error
            except RayError as error:
                raise EngineError(f"the host of {expert!r} cannot be reached: {error}") from error
            finally:
                self._board.close(call)
                await pieces.aclose()
        raise EngineError(
            f"{ATTEMPTS} processes died or stopped responding while answering with {expert!r}; see their logs"
        )

    async def _pieces(
        self, expert: str, call: Call, request: GenerateRequest, generation: int
    ) -> AsyncGenerator[Chunk | Exception, None]:
        """The pieces that the host sends; closing the iterator cancels the call. Raises HostSilent, LinkLost."""
        link = None if self._links is None else self._links.to(self._board.address(call))
        pieces: AsyncGenerator[Any, None]
        if link is None:
            pieces = self._by_handle(expert, call, request, generation)
        else:
            pieces = link.ask(expert, request, generation, call.id)
        async with aclosing(pieces):
            while (piece := await unless_lost(call, anext(pieces, None))) is not None:
                if isinstance(piece, Broken):
                    raise EngineError(f"the host of {expert!r} failed: {piece.why}")
                yield piece

    async def _by_handle(
        self, expert: str, call: Call, request: GenerateRequest, generation: int
    ) -> AsyncGenerator[Chunk | Exception, None]:
        method = "stream" if request.stream else "whole"
        response: Any = self._handle(call, method).remote(expert, request, generation, call.id)
        ended = False
        try:
            if not request.stream:
                piece, ended = await response, True
                yield piece
                return
            async for piece in response:
                yield piece
            ended = True
        finally:
            if not ended:
                response.cancel()

    def _handle(self, call: Call, method: str) -> DeploymentHandle[Any]:
        """The handle's method for a residency. Serve finds the host by the call's id (`request_router`)."""
        key = (call.pool, call.residency, method)
        if key not in self._ready:
            deployment = self._handles[call.pool].options(
                multiplexed_model_id=call.residency, stream=method == "stream"
            )
            self._ready[key] = getattr(deployment, method)
        return self._ready[key]

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

    def longest_wait_s(self) -> float:
        """The longest expected wait of a new call for any weights that are wanted, each at its best host."""
        waits = [0.0]
        for pool in self._handles:
            hosts = self._board.hosts(pool)
            wanted = {residency for host in hosts for residency in host.queue_s}
            waits += [min(host.queue_s.get(residency, 0.0) for host in hosts) for residency in wanted]
        return max(waits)

    def residence(self) -> dict[str, dict[str, Any]]:
        """Whether each expert is in memory on the hosts that serve it, at their latest reports (`residence_body`)."""
        reports = {name: self._board.weights(name) for name in self._handles}
        experts = self._catalog.snapshot.experts
        return {
            expert: residence_body(
                [experts[name].ref for name in experts[expert].residency_keys(experts)],
                [host for pool in pools for host in reports[pool]],
            )
            for expert, pools in self._serving.items()
        }

    async def load(self, *names: str) -> list[dict[str, Any]]:
        """Load experts on every host of the pools that serve them; those that one pool serves are loaded together.

        Returns:
            What each host returned (`ExpertHost.load`).

        Raises:
            EngineError: no host responds.
            CoeError: the first error of a host; others may have loaded them.
        """
        return await self._on_hosts("load", names)

    async def unload(self, *names: str, wait_s: float) -> list[dict[str, Any]]:
        """Unload experts on every host of the pools that serve them; arguments, results and errors as `Host.unload`."""
        return await self._on_hosts("unload", names, wait_s)

    async def _on_hosts(self, method: str, names: Sequence[str], *arguments: Any) -> list[dict[str, Any]]:
        generation = self._catalog.generation
        asked = []
        for pool, handle in self._handles.items():
            if own := tuple(name for name in names if pool in self._serving[name]):
                responses = handle.broadcast(method, own, *arguments, generation)
                asked.append(responses.results_async(return_exceptions=True))
        answers = [answer for answers in await asyncio.gather(*asked) for answer in answers]
        for answer in answers:
            if isinstance(answer, CoeError):
                raise answer
            if isinstance(answer, RayTaskError):
                raise EngineError(f"a host failed to {method} {', '.join(names)}: {answer.cause}") from answer
        documents = [answer for answer in answers if isinstance(answer, dict)]  # a host that has just died has no part
        if not documents:
            raise EngineError("no expert host responds")
        return documents

    async def states(self) -> list[dict[str, Any]]:
        """The state of every host, for `/health`; of one that does not respond, its pool, its id and `responds: false`.

        Raises:
            EngineError: no host responds.
        """
        answers = await asyncio.gather(*(self._all(name, handle) for name, handle in self._handles.items()))
        states = [state for states in answers for state in states]
        if states and not any(state.get("responds", True) for state in states):
            raise EngineError("no expert host responds")
        return states

    async def _all(self, pool: str, handle: DeploymentHandle[Any]) -> list[dict[str, Any]]:
        try:
            async with asyncio.timeout(HEALTH_S):
                states = await handle.broadcast("state").results_async(return_exceptions=True)
        except TimeoutError:  # a broadcast waits for all of them
            silent = self._board.silent(pool)
            return [{"pool": pool, "id": name, "responds": name not in silent} for name in self._board.ids(pool)]
        return [state for state in states if isinstance(state, dict)]  # a host that just died reports nothing
