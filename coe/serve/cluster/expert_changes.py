"""ExpertChanges: admin calls that change the experts of a running service, by way of its registry.

A change is first checked with the catalog that it would give, then made in one transaction of the registry, and then
reaches all gateways as any other change of the registry does: as the next catalog, which `coe serve` pushes. The
transaction decides between changes at once, of other gateways and of commands. A drain is also stated to every gateway
directly, so that it holds at once.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any, Final, Protocol, TypeVar

from coe.compose import build_composition, named_experts
from coe.config import Config
from coe.errors import CoeError, InvalidRequest, Unsupported
from coe.serve.cluster.catalog import Catalog
from coe.serve.cluster.source import check
from coe.serve.cluster.stated_experts import read_experts
from coe.serve.http.changes import ChangeRefused
from registry.errors import InvalidSpec, RegistryError, StaleChange, StoreError, UnknownExpert
from registry.reconcile import PlannedChange, plan
from registry.references import dependents
from registry.snapshot import Alias, as_version
from registry.spec import ExpertSpec
from registry.store import Registry, Snapshot
from routers.errors import RouterError

T = TypeVar("T")
ATTEMPTS: Final = 10
"""Times that a change is planned: another one may be made while its files are read."""
SERVED_S: Final = 20.0
"""Most seconds that a call waits until every gateway serves what it has changed."""
POLL_S: Final = 0.1
audit = logging.getLogger("coe.audit")


class Gateways(Protocol):
    """All gateways of the service, this one included."""

    async def rule_out(self, version: int, drained: Mapping[str, str]) -> None:
        """See `Service.rule_out`."""
        ...

    async def uses(self, experts: Collection[str]) -> Sequence[Mapping[str, int]]:
        """Of each gateway that responds: `version` of its registry, and its `requests` that may call the experts."""
        ...


class Loads(Protocol):
    """The hosts of the service."""

    async def load(self, *names: str) -> Sequence[Mapping[str, Any]]:
        """See `coe.serve.http.service.Weights.load`."""
        ...


class RegistryChanges:
    """`coe.serve.http.changes.ExpertChanges` on a registry.

    Args:
        config: of the service.
        catalog: the one that this gateway uses now.
        gateways: of the service.
        weights: those of its hosts.
        warnings: what is wrong with the service now, such as a change that cannot be served.
        wall: seconds since the epoch.
    """

    def __init__(
        self,
        config: Config,
        catalog: Callable[[], Catalog],
        gateways: Gateways,
        weights: Loads,
        warnings: Callable[[], Sequence[str]] = tuple,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._config, self._catalog, self._gateways, self._weights = config, catalog, gateways, weights
        self._warnings, self._wall = warnings, wall
        self._one = asyncio.Lock()  # plans and their checks take memory; the registry decides between gateways

    async def listing(self) -> Mapping[str, Any]:
        """Every expert with what is stated of it, and the aliases."""
        snapshot, states = await self._registry(lambda r: (r.snapshot(), r.expert_states()))
        experts = []
        for name, spec in snapshot.experts.items():
            state = states.get(name)
            by_config = name in self._pinned_by_config()
            experts.append(
                {
                    "name": name,
                    "version": spec.version,
                    "kind": spec.kind.value,
                    "drained": state and state.drained,
                    "pinned": bool(state and state.pinned) or by_config,
                    "changed_at": state and state.changed_at,
                    "changed_by": state and state.changed_by,
                    "aliases": sorted(a.name for a in snapshot.aliases.values() if a.expert == name),
                }
            )
        aliases = [asdict(alias) for _, alias in sorted(snapshot.aliases.items())]
        return {
            "object": "coe.experts", "registry_version": snapshot.version, "experts": experts, "aliases": aliases
        }  # fmt: skip

    async def add(self, text: str, by: str, *, dry_run: bool) -> Mapping[str, Any]:
        """Add or change the experts of a YAML or JSON text, once the catalog with them is checked."""
        async with self._one:
            for attempt in range(ATTEMPTS):
                planned = await self._registry(lambda r: self._planned(r, text))
                if dry_run:
                    return self._added(*planned)
                try:
                    version, steps, warnings = await self._registry(lambda r: _applied(r, *planned))  # noqa: B023
                    break
                except StaleChange:
                    if attempt == ATTEMPTS - 1:
                        raise ChangeRefused("the registry changes all the time: try again later") from None
        self._say(by, "add", ", ".join(step.spec.ref for step in steps if step.spec is not None), version)
        return self._added(version, steps, warnings) | await self._served(version)

    async def remove(self, name: str, by: str, *, wait_s: float) -> Mapping[str, Any]:
        """Drain an expert, wait for its requests, and remove it."""
        before = await self._registry(lambda r: self._removable(r, name))
        stated = await self._drained([name], "it is being removed", by)
        if left := await self._unused([name], stated.version, wait_s):
            raise ChangeRefused(
                f"{left} requests use {name!r} after {wait_s:g} s, and it takes no new ones: remove it again later, or "
                f"undo that with POST /admin/undrain?expert={name}"
            )
        try:
            version = await self._registry(lambda r: _removed(r, name))
        except (CoeError, RegistryError):
            await self._drained([name], before.drained.get(name), by)
            raise
        self._say(by, "remove", name, version)
        done = {"object": "coe.removed", "expert": name, "registry_version": version}
        return done | await self._served(version)

    async def drain(self, names: Sequence[str], reason: str | None, by: str, *, wait_s: float) -> Mapping[str, Any]:
        """Let experts take no new requests, for a reason; None undoes it."""
        snapshot = await self._drained(names, reason, by)
        left = await self._unused(names, snapshot.version, wait_s)
        return {
            "object": "coe.drain", "experts": list(names), "drained": reason is not None, "reason": reason,
            "requests": left, "registry_version": snapshot.version,
        }  # fmt: skip

    async def pin(self, names: Sequence[str], pinned: bool, by: str) -> Mapping[str, Any]:
        """Keep experts in memory, once they are loaded together; or no longer."""
        if not pinned and (fixed := [name for name in names if name in self._pinned_by_config()]):
            raise ChangeRefused(f"the configuration pins {', '.join(fixed)}: change `pins` there")
        if pinned:
            await self._load_with_pins(names)
        stated = lambda r: r.state_experts(names, by=by, now=self._wall(), pinned=pinned)  # noqa: E731
        snapshot: Snapshot = await self._registry(stated)
        self._say(by, "pin" if pinned else "unpin", ", ".join(names), snapshot.version)
        done = {"object": "coe.pin", "experts": list(names), "pinned": pinned, "registry_version": snapshot.version}
        return done | await self._served(snapshot.version)

    async def point(self, alias: str, target: str, by: str, *, exists: bool | None) -> Mapping[str, Any]:
        """Move an alias, or create it."""
        moved = lambda r: r.point_alias(alias, target, by=by, now=self._wall(), exists=exists)  # noqa: E731
        return await self._alias(by, "alias", moved)

    async def roll_back(self, alias: str, by: str) -> Mapping[str, Any]:
        """Undo the last move of an alias."""
        return await self._alias(by, "rollback", lambda r: r.roll_back_alias(alias, by=by, now=self._wall()))

    async def delete(self, alias: str, by: str) -> Mapping[str, Any]:
        """Delete an alias."""
        return await self._alias(by, "delete alias", lambda r: r.delete_alias(alias))

    async def _alias(self, by: str, action: str, work: Callable[[Registry], Alias]) -> Mapping[str, Any]:
        alias, version = await self._registry(lambda r: (work(r), r.snapshot().version))
        self._say(by, action, f"{alias.name} -> {alias.ref}", version)
        return {"object": "coe.alias", **asdict(alias), "registry_version": version} | await self._served(version)

    def _planned(self, registry: Registry, text: str) -> tuple[int, Sequence[PlannedChange], Sequence[str]]:
        """The changes that a text makes, checked with the rest of the service. Blocks."""
        document = read_experts(text, self._config.serve.admin_sources)
        before = registry.snapshot()
        planned = plan(document, registry)
        changed = {step.name: step.spec for step in planned.steps if step.action != "unchanged" and step.spec}
        if changed:
            self._checked(_after(before, changed))
        return before.version, planned.steps, planned.warnings

    def _removable(self, registry: Registry, name: str) -> Snapshot:
        """The registry, if nothing needs the expert. Blocks. Raises ChangeRefused."""
        snapshot = registry.snapshot()
        if name not in snapshot:
            raise UnknownExpert(name[:128], snapshot)
        if needed := list(self._needs(name, snapshot)):
            raise ChangeRefused(f"{name!r} cannot be removed: {'; '.join(needed)}")
        experts = {other: spec for other, spec in snapshot.experts.items() if other != name}
        self._checked(replace(snapshot, experts=experts, removed=snapshot.removed | {name}))
        return snapshot

    def _needs(self, name: str, snapshot: Snapshot) -> Iterator[str]:
        """What needs an expert, each as a clause."""
        known = {**snapshot.experts, **snapshot.versions}
        if others := dependents(known, name):
            yield f"{', '.join(others)} need it (base or member)"
        if aliases := sorted(alias.name for alias in snapshot.aliases.values() if alias.expert == name):
            yield f"the alias {', '.join(aliases)} points to it"
        for policy, config in self._catalog().policies.items():
            if config.expert == name:
                yield f"the policy {policy!r} answers with it"
            if config.fallback == name:
                yield f"it is the fallback of the policy {policy!r}"
            if name in named_experts(build_composition(config.composition.kind, config.composition.settings)):
                yield f"the composition of the policy {policy!r} names it"
        if name in self._pinned_by_config():
            yield "the configuration pins it"
        for pool in self._config.serve.pools:
            if self._config.serve.placement is None and name in (pool.experts or ()):
                yield f"the pool {pool.name!r} of the configuration names it"

    def _pinned_by_config(self) -> frozenset[str]:
        return frozenset(self._config.host.pins).union(*(pool.pins or () for pool in self._config.serve.pools))

    def _checked(self, snapshot: Snapshot) -> None:
        """Check the catalog that a snapshot gives, as `coe serve` will. Blocks. Raises ChangeRefused."""
        now = self._catalog()
        pools = [
            pool.model_copy(update={"experts": self._experts_of(now.pools.get(pool.name, pool.experts), snapshot)})
            for pool in self._config.serve.pools
        ]
        config = self._config.with_pools(pools).model_copy(
            update={"policies": dict(now.policies), "default_policy": now.default_policy}
        )
        try:
            check(config, Catalog.of(config, snapshot))
        except (CoeError, RegistryError, RouterError) as error:
            raise ChangeRefused(f"the service could not answer with this change: {error}") from error

    def _experts_of(self, experts: tuple[str, ...] | None, snapshot: Snapshot) -> tuple[str, ...] | None:
        """The experts of a pool; a placement follows what is registered."""
        if experts is None or self._config.serve.placement is None:
            return experts
        return tuple(name for name in experts if name in snapshot)

    async def _load_with_pins(self, names: Sequence[str]) -> None:
        """Load experts together with those that are pinned already. Raises as `Weights.load`."""
        known, pinned = self._catalog().snapshot, await self._registry(lambda r: r.snapshot().pinned)
        if missing := [name for name in names if name not in known]:
            raise UnknownExpert(missing[0][:128], known, where="what the service serves")
        others = sorted((pinned | {*self._config.host.pins}) & known.experts.keys() - {*names})
        await self._weights.load(*names, *others)

    async def _drained(self, names: Sequence[str], reason: str | None, by: str) -> Snapshot:
        stated = lambda r: r.state_experts(names, by=by, now=self._wall(), drained=reason)  # noqa: E731
        snapshot: Snapshot = await self._registry(stated)
        self._say(by, "undrain" if reason is None else "drain", ", ".join(names), snapshot.version, reason)
        await self._gateways.rule_out(snapshot.version, snapshot.drained)
        return snapshot

    async def _unused(self, names: Collection[str], version: int, wait_s: float) -> int:
        """Wait until no gateway has a request that may call the experts; how many there are then."""
        ends = time.monotonic() + wait_s
        while True:
            uses = await self._gateways.uses(names)
            left = sum(each["requests"] for each in uses)
            if not left or time.monotonic() >= ends:
                return left
            await asyncio.sleep(POLL_S)

    async def _served(self, version: int) -> dict[str, Any]:
        """Wait until every gateway has a catalog of that version of the registry; whether it came to that."""
        ends = time.monotonic() + SERVED_S
        while any(each["version"] < version for each in await self._gateways.uses(())):
            if time.monotonic() >= ends:
                return {"served": False, "warnings_of_service": list(self._warnings())}
            await asyncio.sleep(POLL_S)
        return {"served": True}

    async def _registry(self, work: Callable[[Registry], T]) -> T:
        """Run `work` on the registry in a thread. Raises what the caller can mend as InvalidRequest."""
        if self._config.experts:
            raise Unsupported(
                f"the experts of this service are those of {', '.join(path.name for path in self._config.experts)}: "
                "change that file, or serve a registry (`coe registry apply FILE`, no `experts` in the configuration)"
            )

        def run() -> T:
            with Registry(self._config.registry) as registry:
                return work(registry)

        with _as_requests():
            return await asyncio.to_thread(run)

    @staticmethod
    def _added(version: int, steps: Sequence[PlannedChange], warnings: Sequence[str]) -> dict[str, Any]:
        rows = [
            {
                "action": step.action,
                "name": step.name,
                "version": step.spec and step.spec.version,
                "digest": step.spec and step.spec.digest,
                "changes": [field for field in step.changes if field != "files"],
            }
            for step in steps
        ]
        return {"object": "coe.changes", "registry_version": version, "steps": rows, "warnings": list(warnings)}

    def _say(self, by: str, action: str, what: str, version: int, reason: str | None = None) -> None:
        """One line for each change, with its author and time."""
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._wall()))
        why = "" if reason is None else f" reason={reason!r}"
        audit.info("admin at=%s by=%r action=%r what=%r registry=%d%s", at, by, action, what, version, why)


def _applied(
    registry: Registry, version: int, steps: Sequence[PlannedChange], warnings: Sequence[str]
) -> tuple[int, Sequence[PlannedChange], Sequence[str]]:
    """Register what is planned, if the registry is still at that version. Blocks. Raises StaleChange."""
    stored = registry.change([step.spec for step in steps if step.spec is not None], since=version)
    steps = [replace(step, spec=spec) for step, spec in zip(steps, stored, strict=True)]
    return registry.snapshot().version, steps, warnings


def _removed(registry: Registry, name: str) -> int:
    registry.remove(name)
    return registry.snapshot().version


def _after(snapshot: Snapshot, changed: Mapping[str, ExpertSpec]) -> Snapshot:
    """The registry after a change: aliases keep the versions that they name."""
    named = {alias.ref for alias in snapshot.aliases.values() if alias.expert in changed}
    before = [snapshot.experts[name] for name in changed if name in snapshot]
    versions = {spec.ref: as_version(spec) for spec in before if spec.ref in named}
    return replace(snapshot, experts={**snapshot.experts, **changed}, versions={**snapshot.versions, **versions})


@contextmanager
def _as_requests() -> Iterator[None]:
    """Translate errors of the registry that the caller can mend."""
    try:
        yield
    except (UnknownExpert, StoreError, StaleChange):
        raise
    except InvalidSpec as error:
        raise InvalidRequest(str(error)) from error
    except RegistryError as error:
        raise ChangeRefused(str(error)) from error
