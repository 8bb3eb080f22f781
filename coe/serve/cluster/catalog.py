"""Catalog: experts, policies, and the experts and pins of pools of a running service, as JSON pushed to all replicas.

A new catalog is pushed whenever the registry, the configuration or a router on disk changes. The other sections of a
configuration (engines, host and serve, but for pins and the experts of pools) are fixed at the start. A replica that
restarts gets the latest catalog; a host that receives it later than the gateway makes the request wait for it. A
request ends on the catalog it started with. An expert with new content is `name@version` to the cache, so old weights
finish their requests and are never mistaken for the new ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from coe.config import Config, HostPoolConfig, PolicyConfig
from coe.errors import ConfigError
from registry.errors import UnknownExpert
from registry.snapshot import Alias, as_version, expert_of, of_version
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot


@dataclass(frozen=True, slots=True)
class Catalog:
    """Experts and policies at one moment.

    generation: number of the catalog since the service started; replicas compare it to find who is ahead.
    pools: name of a pool -> `HostPoolConfig.experts` now. Processes have those that they started with.
    pins: name of a pool -> the pinned experts of its hosts now (`pins_of`).
    """

    generation: int
    snapshot: Snapshot
    policies: Mapping[str, PolicyConfig]
    default_policy: str
    pools: Mapping[str, tuple[str, ...] | None] = field(default_factory=dict)
    pins: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Config, snapshot: Snapshot, generation: int = 1) -> Self:
        """The catalog of a configuration: the experts that at least one pool serves.

        Raises:
            ConfigError: a pool names an expert that is not registered.
        """
        snapshot = snapshot.with_versions()
        served = [serving(snapshot, pool).experts for pool in config.serve.pools]
        experts = {name: spec for name, spec in snapshot.experts.items() if any(name in pool for pool in served)}
        aliases = {name: alias for name, alias in snapshot.aliases.items() if snapshot.resolve(name) in experts}
        known = replace(
            snapshot,
            experts=experts,
            aliases=aliases,
            drained={name: why for name, why in snapshot.drained.items() if name in experts},
            pinned=frozenset(snapshot.pinned & experts.keys()),
        )
        pools = {pool.name: pool.experts for pool in config.serve.pools}
        pins = {pool.name: pins_of(config, pool, known) for pool in config.serve.pools}
        return cls(generation, known, dict(config.policies), config.default_policy, pools, pins)

    def pool(self, pool: HostPoolConfig) -> HostPoolConfig:
        """A pool as it is now."""
        experts, pins = self.pools.get(pool.name, pool.experts), self.pins.get(pool.name, pool.pins)
        return pool.model_copy(update={"experts": experts, "pins": pins})

    def config(self, config: Config) -> Config:
        """A configuration whose pools are as they are now."""
        return config.with_pools(map(self.pool, config.serve.pools))

    def to_json(self) -> dict[str, Any]:
        """The catalog as JSON values, for Serve's `user_config`."""
        return {
            "generation": self.generation,
            "version": self.snapshot.version,
            "experts": [
                {"as": name, **json.loads(of_version(spec).model_dump_json(exclude_defaults=True))}
                for name, spec in self.snapshot.experts.items()
            ],
            "tokens_per_s": dict(self.snapshot.tokens_per_s),
            "aliases": [asdict(alias) for alias in self.snapshot.aliases.values()],
            "drained": dict(self.snapshot.drained),
            "pinned": sorted(self.snapshot.pinned),
            "removed": sorted(self.snapshot.removed),
            "policies": {name: json.loads(policy.model_dump_json()) for name, policy in self.policies.items()},
            "default_policy": self.default_policy,
            "pools": {name: None if experts is None else list(experts) for name, experts in self.pools.items()},
            "pins": {name: list(pins) for name, pins in self.pins.items()},
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """The catalog that `to_json` wrote."""
        experts = {}
        for value in document["experts"]:
            spec = ExpertSpec.model_validate({field: value[field] for field in value if field != "as"})
            experts[value["as"]] = spec if spec.name == value["as"] else as_version(spec)
        return cls(
            document["generation"],
            Snapshot(
                document["version"],
                experts,
                document.get("tokens_per_s", {}),
                {each["name"]: Alias(**each) for each in document["aliases"]},
                drained=document["drained"],
                pinned=frozenset(document["pinned"]),
                removed=frozenset(document["removed"]),
            ),
            {name: PolicyConfig.model_validate(value) for name, value in document["policies"].items()},
            document["default_policy"],
            {name: None if experts is None else tuple(experts) for name, experts in document["pools"].items()},
            {name: tuple(pins) for name, pins in document["pins"].items()},
        )


def serving(snapshot: Snapshot, pool: HostPoolConfig) -> Snapshot:
    """The experts that the hosts of a pool know: those that it names, and all that they refer to (bases, members).

    A pool that names an expert serves the versions of it that aliases name, too.

    Raises:
        ConfigError: one of them is not registered.
    """
    if pool.experts is None:
        return snapshot
    try:
        wanted = _reached(snapshot, _with_versions(snapshot, pool.experts), _all_references)
    except UnknownExpert as error:
        raise ConfigError(f"experts of serve.pools {pool.name!r}: {error}") from error
    return Snapshot(snapshot.version, {name: spec for name, spec in snapshot.experts.items() if name in wanted})


def _with_versions(snapshot: Snapshot, names: Iterable[str]) -> list[str]:
    named = [*names]
    return [*named, *(name for name in snapshot.experts if name not in named and expert_of(name) in named)]


def called_in(snapshot: Snapshot, pool: HostPoolConfig, pools: Iterable[HostPoolConfig]) -> frozenset[str]:
    """The experts whose calls go to the hosts of a pool: those that it names, and what is in memory with them.

    The peers of a composed expert that leave notes (`ExpertSpec.is_staged`) may do so on any host. They are called in
    the pools that name them, and, if none does, in those of the composed expert.

    Args:
        snapshot: all experts of the service.
        pools: all pools of the service.
    """
    known = frozenset(serving(snapshot, pool).experts)
    own = _named(snapshot, pool)
    elsewhere = frozenset[str]().union(*(_named(snapshot, each) for each in pools if each.name != pool.name))
    return known - (elsewhere - own)


def pins_of(config: Config, pool: HostPoolConfig, snapshot: Snapshot) -> tuple[str, ...]:
    """The pinned experts of the hosts of a pool: its own, else those of the `host` section that it is called for; and
    those of them that an admin call has pinned.

    snapshot: all experts of the service.
    """
    if pool.pins is not None and not snapshot.pinned:
        return pool.pins
    called = called_in(snapshot, pool, config.serve.pools)
    own = pool.pins if pool.pins is not None else [name for name in config.host.pins if name in called]
    return tuple(dict.fromkeys((*own, *sorted(snapshot.pinned & called))))


def pools_by_expert(catalog: Catalog, pools: Iterable[HostPoolConfig]) -> dict[str, list[str]]:
    """Expert -> names of the pools that its calls go to, for each expert of a catalog.

    Args:
        pools: the configured pools of the service.
    """
    now = [catalog.pool(pool) for pool in pools]
    called = {pool.name: called_in(catalog.snapshot, pool, now) for pool in now}
    return {
        expert: [name for name, experts in called.items() if expert in experts] for expert in catalog.snapshot.experts
    }


def _named(snapshot: Snapshot, pool: HostPoolConfig) -> frozenset[str]:
    """The experts that a pool names, and what is in memory with them."""
    if pool.experts is None:
        return frozenset(snapshot.experts)
    named = (name for name in _with_versions(snapshot, pool.experts) if name in snapshot)
    return _reached(snapshot, named, _references_in_memory)


def _all_references(spec: ExpertSpec) -> tuple[str, ...]:
    return spec.references


def _references_in_memory(spec: ExpertSpec) -> tuple[str, ...]:
    return spec.resident_members if spec.kind is Kind.COMPOSED else (spec.base,) if spec.base else ()


def _reached(
    snapshot: Snapshot, names: Iterable[str], references: Callable[[ExpertSpec], Iterable[str]]
) -> frozenset[str]:
    """These experts, and all that they refer to. Raises UnknownExpert."""
    found: set[str] = set()
    left = [*names]
    while left:
        if (name := left.pop()) not in found:
            found.add(name)
            left += references(snapshot.get(name))
    return frozenset(found)
