"""Catalog: the experts and policies of a running service, as JSON that Serve pushes to all replicas.

A new catalog is pushed whenever the registry, the configuration or a router on disk changes. The other sections of a
configuration (engines, host, serve) are fixed at the start. A replica that restarts gets the latest catalog; a host
that receives it later than the gateway makes the request wait for it. A request ends on the catalog it started with. An
expert with new content is `name@version` to the cache, so old weights finish their requests and are never mistaken for
the new ones.
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

    generation: number of the catalog since the service started; replicas compare it to find who is ahead.
    """

    generation: int
    snapshot: Snapshot
    policies: Mapping[str, PolicyConfig]
    default_policy: str

    @classmethod
    def of(cls, config: Config, snapshot: Snapshot, generation: int = 1) -> Self:
        """The catalog of a configuration: the experts that at least one pool serves.

        Raises:
            ConfigError: a pool names an expert that is not registered.
        """
        served = [serving(snapshot, pool).experts for pool in config.serve.pools]
        experts = {name: spec for name, spec in snapshot.experts.items() if any(name in pool for pool in served)}
        known = Snapshot(snapshot.version, experts, snapshot.tokens_per_s)
        return cls(generation, known, dict(config.policies), config.default_policy)

    def to_json(self) -> dict[str, Any]:
        """The catalog as JSON values, for Serve's `user_config`."""
        return {
            "generation": self.generation,
            "version": self.snapshot.version,
            "experts": [
                json.loads(spec.model_dump_json(exclude_defaults=True)) for spec in self.snapshot.experts.values()
            ],
            "tokens_per_s": dict(self.snapshot.tokens_per_s),
            "policies": {name: json.loads(policy.model_dump_json()) for name, policy in self.policies.items()},
            "default_policy": self.default_policy,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """The catalog that `to_json` wrote."""
        specs = [ExpertSpec.model_validate(value) for value in document["experts"]]
        return cls(
            document["generation"],
            Snapshot(document["version"], {spec.name: spec for spec in specs}, document.get("tokens_per_s", {})),
            {name: PolicyConfig.model_validate(value) for name, value in document["policies"].items()},
            document["default_policy"],
        )


def serving(snapshot: Snapshot, pool: HostPoolConfig) -> Snapshot:
    """The experts that a pool serves, and those they refer to (bases, members).

    Raises:
        ConfigError: one of them is not registered.
    """
    if pool.experts is None:
        return snapshot
    try:
        specs = [snapshot.get(expert) for expert in pool.experts]
        wanted = {
            name for spec in specs for name in (spec.name, *spec.references, *spec.residency_keys(snapshot.experts))
        }
    except UnknownExpert as error:
        raise ConfigError(f"experts of serve.pools {pool.name!r}: {error}") from error
    return Snapshot(snapshot.version, {name: spec for name, spec in snapshot.experts.items() if name in wanted})
