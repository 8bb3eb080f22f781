"""The policies of a gateway.

At a restart, a router that has gone is replaced by its kept copy, and a policy whose router cannot be loaded at all
refuses requests at once, unless its fallback can answer: the gateway starts, and the other policies and the experts
answer.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coe.config import PolicyConfig
from coe.errors import PolicyUnavailable
from coe.local import build_policies
from coe.policy import Policy
from coe.serve.cluster.catalog import Catalog
from coe.serve.cluster.last_good import LastGood
from coe.signals.features import Signals
from routers.base import Estimate, Query

log = logging.getLogger("ray.serve")


@dataclass(frozen=True, slots=True)
class Loaded:
    """Policies that are ready to route. `warnings`: what operators should know about them."""

    policies: Mapping[str, Policy]
    warnings: tuple[str, ...] = ()


class Unavailable:
    """The router of a policy whose own one cannot be loaded."""

    requires: frozenset[str] = frozenset()

    def __init__(self, policy: str, reason: str) -> None:
        self._policy, self._reason = policy, reason

    def estimate(self, queries: Sequence[Query]) -> Estimate:
        """Raises PolicyUnavailable."""
        raise PolicyUnavailable(self._policy, self._reason)


def load_policies(catalog: Catalog, signals: Signals, kept: LastGood) -> Loaded:
    """All policies of a catalog, each checked by routing one query, so that encoders load before the first request.

    Raises:
        ConfigError, RouterError: a policy cannot be used.
    """
    policies = build_policies(catalog.policies, catalog.snapshot, signals)
    for policy in policies.values():
        warm(policy)
    for config in catalog.policies.values():
        if config.router is not None:
            kept.keep(config.router)
    return Loaded(policies)


def load_what_loads(catalog: Catalog, signals: Signals, kept: LastGood) -> Loaded:
    """The policies of the first catalog of a process: each as it is, else with the kept copy of its router, else one
    that refuses. Never raises for a policy."""
    policies: dict[str, Policy] = {}
    warnings: list[str] = []
    for name, config in catalog.policies.items():
        policies[name], warning = _one(name, config, catalog, signals, kept)
        warnings += [warning] if warning else []
    return Loaded(policies, tuple(warnings))


def warm(policy: Policy) -> None:
    """Route one query."""
    policy.router.estimate([Query.of("Which expert answers this?")])


def _one(
    name: str, config: PolicyConfig, catalog: Catalog, signals: Signals, kept: LastGood
) -> tuple[Policy, str | None]:
    """A policy, and the warning that it is not the configured one."""
    try:
        return _built(name, config, catalog, signals, kept), None
    except Exception as error:  # an encoder is third-party code
        reason = error
    copy = None if config.router is None else kept.copy_of(config.router)
    if copy is not None:
        try:
            policy = _built(name, config.model_copy(update={"router": copy}), catalog, signals, None)
        except Exception as error:
            log.warning("the kept copy of %s cannot be used either: %s", config.router, error)
        else:
            return policy, f"policy {name!r} uses a kept copy of its router, since its own cannot be loaded: {reason}"
    log.error("policy %r cannot be loaded", name, exc_info=reason)
    refuses = Policy(name, router=Unavailable(name, str(reason)), fallback=_fallback(config, catalog))
    answers = f"; its fallback {refuses.fallback!r} answers" if refuses.fallback else ""
    return refuses, f"policy {name!r} is unavailable{answers}: {reason}"


def _fallback(config: PolicyConfig, catalog: Catalog) -> str | None:
    return config.fallback if config.fallback in catalog.snapshot.experts else None


def _built(name: str, config: PolicyConfig, catalog: Catalog, signals: Signals, keep: LastGood | None) -> Policy:
    policy = build_policies({name: config}, catalog.snapshot, signals)[name]
    warm(policy)
    if keep is not None and config.router is not None:
        keep.keep(config.router)
    return policy
