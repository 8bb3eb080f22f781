"""Catalog: what may change while a service runs - its experts and its policies - as JSON that Serve pushes.

A service starts with one and is given another whenever the registry, the configuration or a router on disk changes.
Whatever else a configuration says (engines, hosts, the endpoint) is fixed at the start.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from coe.config import Config, HostPoolConfig, PolicyConfig
from coe.errors import ConfigError
from registry.errors import UnknownExpert
from registry.spec import ExpertSpec
from registry.store import Snapshot


@dataclass(frozen=True, slots=True)
class Catalog:
    """Experts and policies at one moment.

    generation: counts the changes since the service started; a replica that has heard of a later one is ahead.
    """

    generation: int
    snapshot: Snapshot
    policies: Mapping[str, PolicyConfig]
    default_policy: str

    @classmethod
    def of(cls, config: Config, snapshot: Snapshot, generation: int = 1) -> Self:
        """The catalog of a configuration: the experts that some pool of hosts serves.

        Raises:
            ConfigError: a pool serves an expert that is not registered.
        """
        served = [serving(snapshot, pool).experts for pool in config.serve.pools]
        experts = {name: spec for name, spec in snapshot.experts.items() if any(name in pool for pool in served)}
        return cls(generation, Snapshot(snapshot.version, experts), dict(config.policies), config.default_policy)

    def to_json(self) -> dict[str, Any]:
        """JSON values, as Serve's `user_config` wants them."""
        return {
            "generation": self.generation,
            "version": self.snapshot.version,
            "experts": [
                json.loads(spec.model_dump_json(exclude_defaults=True)) for spec in self.snapshot.experts.values()
            ],
            "policies": {name: json.loads(policy.model_dump_json()) for name, policy in self.policies.items()},
            "default_policy": self.default_policy,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """Exactly what `to_json` was given."""
        specs = [ExpertSpec.model_validate(value) for value in document["experts"]]
        return cls(
            document["generation"],
            Snapshot(document["version"], {spec.name: spec for spec in specs}),
            {name: PolicyConfig.model_validate(value) for name, value in document["policies"].items()},
            document["default_policy"],
        )


def serving(snapshot: Snapshot, pool: HostPoolConfig) -> Snapshot:
    """The experts that a pool of hosts serves, with what they are made of.

    Raises:
        ConfigError: one of them is not registered.
    """
    if pool.experts is None:
        return snapshot
    try:
        wanted = {name for expert in pool.experts for name in (expert, *snapshot.get(expert).references)}
    except UnknownExpert as error:
        raise ConfigError(f"experts of serve.pools {pool.name!r}: {error}") from error
    return Snapshot(snapshot.version, {name: spec for name, spec in snapshot.experts.items() if name in wanted})
