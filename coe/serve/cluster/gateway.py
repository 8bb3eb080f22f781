"""Gateway: API, router and orchestrator as a Ray Serve replica. Clients talk to it; it holds no weights."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from ray import serve

from coe.config import Config
from coe.orchestrator import Orchestrator
from coe.serve.cluster.catalog import Catalog
from coe.serve.cluster.expert_changes import RegistryChanges, audit
from coe.serve.cluster.last_good import LastGood
from coe.serve.cluster.link import Links
from coe.serve.cluster.observing import log_to_serve, observe, process_name
from coe.serve.cluster.placement import BOARD
from coe.serve.cluster.policies import Loaded, load_policies, load_what_loads
from coe.serve.cluster.pool_client import PoolClient
from coe.serve.decisions.log import DecisionLog
from coe.serve.http.api import build_api
from coe.serve.http.keyring import Keyring, StoredKeys
from coe.serve.http.ledger import Ledger, open_accounts
from coe.serve.http.metrics import Metrics
from coe.serve.http.recent import RecentDecisions, Record
from coe.serve.http.service import Service
from coe.signals.features import Signals
from coe.tokens import Tokenizers
from registry.store import Snapshot

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle
    from starlette.types import ASGIApp

    from coe.serve.batches.service import Batches

APP: Final = "coe"
GATEWAY: Final = "gateway"
PAGES_S: Final = 5.0
COLLECT_AFTER: Final = (10_000, 50, 50)
"""Thresholds of Python's garbage collector: with the default, 700, it takes a tenth of the CPU time of a request."""
EMPTY: Final = Catalog(0, Snapshot(0, {}), {}, "default")
log = logging.getLogger("ray.serve")


class Gateway:
    """Answers HTTP requests with an orchestrator whose expert calls go to pools of expert hosts.

    Args:
        config: settings of the endpoint; fixed for the life of the process.
        handles: name of a pool -> handle of its deployment.
    """

    def __init__(self, config: Config, handles: Mapping[str, DeploymentHandle[Any]]) -> None:
        gc.set_threshold(*COLLECT_AFTER)
        settings, self._engines = config.serve, config.engines
        self._end_traces = observe(settings, "gateway")
        BOARD.silent_s = settings.host_silent_s
        self._hosts = PoolClient(handles, {pool.name: pool for pool in settings.pools}, BOARD, EMPTY, Links())
        process = process_name()
        self._log = None if settings.log.folder is None else DecisionLog(settings.log, process=process)
        if not logging.getLogger("coe").handlers:  # with JSON logs it has them, and passes these lines on
            log_to_serve((audit.name,))
        self._metrics = Metrics(
            process,
            dropped=self._dropped,
            in_flight=self._in_flight,
            brownout=self._browned,
            pages=self._pages,
            hosts=self._hosts.states,
        )
        self._catalog, self._tokenizers = EMPTY, Tokenizers()
        self._kept = LastGood()
        self._own_warnings: tuple[str, ...] = ()
        self._service_warnings: tuple[str, ...] = ()
        keyring = Keyring(StoredKeys(config.registry), required=settings.keys == "required")
        ledger = Ledger(lambda: open_accounts(settings, config.registry))
        self._batches = None if settings.batches is None else self._opened(config, keyring, ledger)
        self._service = Service(
            self._orchestrator(EMPTY, {}),
            settings=settings,
            log=self._log,
            metrics=self._metrics,
            health=self._hosts.states,
            weights=self._hosts,
            changes=RegistryChanges(
                config, lambda: self._catalog, self, self._hosts, warnings=lambda: self._service.warnings
            ),
            wait_s=self._hosts.longest_wait_s,
            recent=RecentDecisions(pages=self._decisions),
            ledger=ledger,
            keyring=keyring,
            batches=self._batches,
        )

    def _opened(self, config: Config, keyring: Keyring, ledger: Ledger) -> Batches:
        """Files and batches; a service without them does not import their code."""
        from coe.serve.batches.service import Batches

        return Batches(config.serve, config.engines, ask=self._hosts.ask, keyring=keyring, ledger=ledger)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return build_api(self._service)

    async def reconfigure(self, document: Mapping[str, Any]) -> None:
        """Use a new catalog. Requests in progress keep the one they started with.

        A catalog whose routers fail to load is logged and ignored. From the first one, what can be loaded is used, and
        what cannot is refused request by request: Serve would start a replica that raises again and again, while
        clients wait.
        """
        catalog = Catalog.from_json(document)
        signals = Signals(catalog.snapshot, self._engines)  # unloads after the last request that uses it
        first = not len(self._service.orchestrator.snapshot)
        try:
            load = load_what_loads if first else load_policies
            loaded: Loaded = await asyncio.to_thread(load, catalog, signals, self._kept)
        except Exception:
            # The catalog was checked before the push, so a file disappeared since. Serve kills a replica that raises
            # here.
            log.exception("catalog %d failed to load; keeping the previous one", catalog.generation)
            return
        self._hosts.update(catalog)
        self._service.update(self._orchestrator(catalog, loaded.policies))
        if self._batches is not None:
            self._batches.update(catalog.snapshot, catalog.policies, catalog.default_policy)
            self._batches.start(lambda: self._service.in_flight > 0)
        self._catalog, self._own_warnings = catalog, loaded.warnings
        self._warn()
        for warning in loaded.warnings:
            log.warning("%s", warning)
        names = ", ".join(loaded.policies)
        log.info("catalog %d: %d experts, policies %s", catalog.generation, len(catalog.snapshot), names)

    async def show_warnings(self, warnings: Sequence[str]) -> None:
        """Show what `coe serve` found, in `/health`: files that changed, a registry that cannot be read."""
        self._service_warnings = tuple(warnings)
        self._warn()

    def _warn(self) -> None:
        self._service.warnings = (*self._own_warnings, *self._service_warnings)

    async def state(self) -> dict[str, Any]:
        """The generation of the catalog in use."""
        return {"generation": self._catalog.generation}

    async def ruled_out(self, version: int, drained: Mapping[str, str]) -> None:
        """Rule out these experts for new requests of this process; see `Service.rule_out`."""
        self._service.rule_out(version, drained)

    async def own_uses(self, experts: Sequence[str]) -> dict[str, int]:
        """The version of the registry in use, and the requests of this process that may call these experts."""
        return {"version": self._catalog.snapshot.version, "requests": self._service.requests_with(experts)}

    async def rule_out(self, version: int, drained: Mapping[str, str]) -> None:
        """`ruled_out` of all gateways that respond; the next catalog reaches the others."""
        self._service.rule_out(version, drained)
        await self._of_all("ruled_out", version, dict(drained))

    async def uses(self, experts: Collection[str]) -> list[dict[str, int]]:
        """`own_uses` of all gateways; while one does not respond, as if it had one request and an old registry."""
        names = list(experts)
        return await self._of_all("own_uses", names) or [await self.own_uses(names), {"version": -1, "requests": 1}]

    async def _of_all(self, method: str, *arguments: Any) -> list[Any]:
        """What all gateways return that respond within PAGES_S; empty if one of them is late."""
        asked = serve.get_deployment_handle(GATEWAY, APP).broadcast(method, *arguments)
        try:
            answers = await asked.results_async(timeout_s=PAGES_S, return_exceptions=True)
        except TimeoutError:
            log.warning("a gateway did not answer %s within %g s", method, PAGES_S)
            return []
        return [answer for answer in answers if not isinstance(answer, BaseException)]

    async def page(self) -> bytes:
        """The metrics page of this process, for the gateway that merges them."""
        return await asyncio.to_thread(self._metrics.page)

    async def decisions(self, count: int) -> Sequence[Record]:
        """The last decisions of this process, for the gateway that merges them."""
        return self._service.recent.last(count)

    async def _decisions(self, count: int) -> Sequence[Sequence[Record]]:
        """The last decisions of all gateways that respond in time."""
        asked = serve.get_deployment_handle(GATEWAY, APP).broadcast("decisions", count)
        try:
            pages = await asked.results_async(timeout_s=PAGES_S, return_exceptions=True)
        except TimeoutError:
            log.warning("a gateway did not return its decisions within %g s: they are those of one gateway", PAGES_S)
            return [self._service.recent.last(count)]
        return [page for page in pages if isinstance(page, list)]

    async def _pages(self) -> Sequence[bytes]:
        """The pages of all gateways that respond in time; `coe_gateways` on the merged page counts them."""
        asked = serve.get_deployment_handle(GATEWAY, APP).broadcast("page")
        try:
            pages = await asked.results_async(timeout_s=PAGES_S, return_exceptions=True)
        except TimeoutError:
            log.warning("a gateway did not return its metrics within %g s: this page covers one gateway", PAGES_S)
            pages = [await self.page()]
        return [page for page in pages if isinstance(page, bytes)]

    def _in_flight(self) -> int:
        return self._service.in_flight

    def _browned(self) -> bool:
        return self._service.brownout.active

    def _dropped(self) -> int:
        return 0 if self._log is None else self._log.dropped

    def _orchestrator(self, catalog: Catalog, policies: Mapping[str, Any]) -> Orchestrator:
        return Orchestrator(
            catalog.snapshot,
            policies,
            ask=self._hosts.ask,
            default_policy=catalog.default_policy,
            load_s=self._hosts.load_s,
            tokenizers=self._tokenizers,
        )

    def __del__(self) -> None:
        self._service.close()
        if self._log is not None:
            self._log.close()
        if self._end_traces is not None:
            self._end_traces()
