"""Source: reads configuration, experts and routers of a service, at the start and whenever they change."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

from coe.config import Config, load_config
from coe.errors import ConfigError
from coe.experts import fill, how_to_register, open_registry
from coe.local import build_policies
from coe.orchestrator import Orchestrator
from coe.serve.cluster.catalog import Catalog, pins_of, serving
from coe.serve.cluster.pool_placement import Compute, PlacedPools, Placer, PoolPlacement, in_thread
from registry.errors import RegistryError, UnknownExpert
from registry.snapshot import expert_of
from registry.store import Snapshot
from routers.artifacts import ARRAYS, META

FIXED = ("engines", "host", "registry", "experts")
"""Sections that are fixed while a service runs, as `serve` is, but for pins and the experts of pools; others may
change."""


class Source:
    """Reads and validates; a context manager, since it keeps the registry open.

    Args:
        path: the configuration.
        overrides: fields of its `serve` section that the command line sets.
        placer: makes the pools of `serve.placement`.
        clock, start: as for `PoolPlacement`.

    Attributes:
        replaced: at the last read, the registry was in another database file than before.

    Raises:
        ConfigError, RegistryError, RouterError: from the constructor and `read`, so that a service never starts or
            changes on invalid input.
    """

    def __init__(
        self,
        path: Path,
        placer: Placer | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        start: Callable[[Compute], Future[PlacedPools]] = in_thread,
        **overrides: Any,
    ) -> None:
        self.path, self._placement = path, PoolPlacement(placer, clock, start)
        self._overrides = {name: value for name, value in overrides.items() if value is not None}
        self.config = self._placement.first(self._load())
        self._registry = open_registry(self.config)
        self._seen: object = None
        self._looked = self.config  # whose files `_seen` is of
        self._database: object = None
        self.replaced = False
        self._before: Catalog | None = None
        self.catalog = self._before = self.read(self.config, 1)

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self._placement.close()
        self._registry.close()

    def changed(self) -> bool:
        """Whether a file or the registry changed since the last read, or another placement of the experts is there."""
        return self._files_changed() or self._placement.moves(self.config)

    def _files_changed(self) -> bool:
        return self._seen != self._stamps(self._looked)

    def reread(self) -> tuple[Catalog, list[str]]:
        """The next catalog, and the changed sections that need a restart. On an error nothing changes."""
        moved = self._placement.take()
        if self._files_changed():
            moved = None  # it is of the experts before
        kept, fixed = self._changes() if moved is None else (self.config.with_pools(moved.pools), [])
        catalog = self.read(kept, self.catalog.generation + 1)
        before, self.config, self.catalog = self.config, kept, catalog
        self._before = catalog
        if moved is None:
            self._placement.reloaded()
        else:
            self._placement.moved(moved, before)
        return catalog, fixed

    def _changes(self) -> tuple[Config, list[str]]:
        """What the files say now, as far as a running service can take it, and the sections that need a restart."""
        self._look(self.config)  # an error is reported once per change
        config = self._load()
        running = self.config.model_copy(
            update={"host": self.config.host.model_copy(update={"pins": config.host.pins})}
        )
        fixed = [name for name in FIXED if getattr(config, name) != getattr(running, name)]
        kept = config.model_copy(update={name: getattr(running, name) for name in FIXED})
        other = kept.serve.placement != self.config.serve.placement
        if other:  # until the restart the running one is computed
            kept = kept.model_copy(update={"serve": self.config.serve})
        kept, serve_is_fixed = _with_running_processes(self._placement.kept(kept, self.config), self.config)
        return kept, [*fixed, *(["serve"] if other or serve_is_fixed else [])]

    def read(self, config: Config, generation: int) -> Catalog:
        """The catalog of the current files and registry, checked as a whole."""
        self._look(config)
        fill(self._registry, config.experts)
        snapshot = self._registry.snapshot()
        if config.experts:  # what has left a file is not known to have been there at the next start
            snapshot = replace(snapshot, removed=frozenset())
        catalog = self._with_former(Catalog.of(config, snapshot, generation))
        check(config, catalog)
        database, _ = self._registry.revision()
        self.replaced = self._database not in (None, database)
        self._database = database
        return catalog

    def _with_former(self, catalog: Catalog) -> Catalog:
        """The catalog with the versions that aliases have just left, until the next one.

        A process that has it must still know them: gateways that have not, and requests in progress, call them.
        """
        if self._before is None:
            return catalog
        before, now = self._before.snapshot, catalog.snapshot
        left = {alias.ref for alias in before.aliases.values()} & before.experts.keys() - now.experts.keys()
        kept = {name: before.experts[name] for name in left if expert_of(name) in now}
        kept = {name: spec for name, spec in kept.items() if now.experts.keys() >= {*spec.references}}
        drained = {name: now.drained[expert_of(name)] for name in kept if expert_of(name) in now.drained}
        snapshot = replace(now, experts={**now.experts, **kept}, drained={**now.drained, **drained})
        return replace(catalog, snapshot=snapshot)

    def _load(self) -> Config:
        config = load_config(self.path)
        serve = config.serve.model_copy(update=self._overrides)
        return config.model_copy(update={"serve": serve})

    def _look(self, config: Config) -> None:
        self._seen, self._looked = self._stamps(config), config

    def _stamps(self, config: Config) -> object:
        """A fingerprint of the inputs: identity, times and sizes of the files, revision of the registry."""
        folders = [policy.router for policy in config.policies.values() if policy.router is not None]
        routers = [folder / name for folder in folders for name in (META, ARRAYS)]
        priors = [path for policy in config.policies.values() for path in policy.composition.files]
        files = [_stamp(path) for path in (self.path, *config.experts, *routers, *priors)]
        return files, None if config.experts else self._revision()

    def _revision(self) -> object:
        """The revision of the registry, or why it cannot be read: then `reread` raises that, once."""
        try:
            return self._registry.revision()
        except RegistryError as error:
            return str(error)


def _with_running_processes(config: Config, running: Config) -> tuple[Config, bool]:
    """A configuration with the running `serve` section, and whether that differs in more than what pools hold.

    Pools have the new experts and pins if they are the same pools: one that is new has no process yet that could serve
    them.
    """
    new = {pool.name: {"experts": pool.experts, "pins": pool.pins} for pool in config.serve.pools}
    pools = running.serve.pools
    if [pool.name for pool in pools] == [*new]:
        pools = tuple(pool.model_copy(update=new[pool.name]) for pool in pools)
    kept = config.model_copy(update={"serve": running.with_pools(pools).serve})
    return kept, config.serve != kept.serve


def check(config: Config, catalog: Catalog) -> None:
    """Refuse a catalog that a service could not answer with.

    Raises:
        ConfigError: a policy, fallback or pin names an expert that is not served, or no expert is registered.
        RouterError: a router cannot be loaded.
    """
    snapshot = catalog.snapshot
    if not len(snapshot):
        raise ConfigError(f"no expert is registered: {how_to_register(config)}")
    _check_names(snapshot, config.host.pins, "host.pins")
    for pool in config.serve.pools:
        served = serving(snapshot, pool)
        _check_names(served, pins_of(config, pool, snapshot), f"pins of serve.pools {pool.name!r}")
    policies = build_policies(catalog.policies, snapshot)
    Orchestrator(snapshot, policies, ask=_nobody, default_policy=catalog.default_policy)  # checks the fallbacks


def _check_names(snapshot: Snapshot, names: tuple[str, ...], what: str) -> None:
    for name in names:
        if name not in snapshot:
            raise ConfigError(f"{what}: {UnknownExpert(name, snapshot)}")


def _nobody(expert: str, request: object) -> Any:
    raise AssertionError("no expert is called while a configuration is checked")


def _stamp(path: Path) -> tuple[str, int, int, int]:
    """Identity, time and size of a file; zeros and the reason of one that cannot be looked at."""
    try:
        stat = path.stat()
    except OSError as error:
        return str(path), 0, 0, -(error.errno or 1)
    return str(path), stat.st_ino, stat.st_mtime_ns, stat.st_size
