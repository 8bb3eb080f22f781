"""The decision of a policy: what `coe ask` and `coe serve` would decide, without calling an expert."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from coe.config import Config, load_config
from coe.errors import ConfigError
from coe.experts import open_snapshot
from coe.local import build_policies
from coe.routing import DecisionInputs, Routed, route
from coe.signals.features import Filled, Signals
from coe.tokens import TokenCounter, Tokenizers
from registry.errors import UnknownExpert

if TYPE_CHECKING:
    from coe.policy import Policy
    from registry.spec import ExpertSpec
    from routers.base import Query, Router
    from routers.selectors import Selector


@dataclass(frozen=True, slots=True)
class PolicyDecision:
    """A decision of a policy.

    Attributes:
        inputs: what it was made from. router: of the policy. query: with the features that the router requires.
        composition: kind of the policy's composition. experts: all that are registered, by name.
    """

    routed: Routed
    inputs: DecisionInputs
    policy: Policy
    router: Router
    query: Query
    composition: str
    experts: Mapping[str, ExpertSpec]


def decide_by_policy(path: Path, name: str | None, query: Query, select: Selector | None) -> PolicyDecision:
    """What a policy decides for a query.

    Args:
        path: the configuration. name: of the policy; None takes the default one.
        select: in place of the policy's.

    Raises:
        ConfigError: the configuration is wrong or has no policy.
        UnknownExpert: it has no policy of that name, or the previous expert of the query is not registered.
        NoEligibleExpert: no expert may answer.
    """
    config = load_config(path)
    chosen = _policy_name(path, config, name)
    snapshot = open_snapshot(config)
    if query.previous is not None and query.previous not in snapshot.experts:
        raise UnknownExpert(query.previous, snapshot.experts)
    with closing(Signals(snapshot, config.engines)) as signals:
        policy = build_policies({chosen: config.policies[chosen]}, snapshot, signals)[chosen]
        if select is not None:
            policy = replace(policy, select=select)
        (routed,) = route([query], policy, snapshot, {}, TokenCounter(snapshot, Tokenizers()))
        if not isinstance(routed, Routed):
            raise routed
        assert routed.inputs is not None  # a policy decided
        router, filled = policy.router, query
        if isinstance(router, Filled):
            router = router.router
            (filled,) = signals.fill([query], router.requires)
        kind = config.policies[chosen].composition.kind
        return PolicyDecision(routed, routed.inputs, policy, router, filled, kind, snapshot.experts)


def _policy_name(path: Path, config: Config, name: str | None) -> str:
    if not config.policies:
        raise ConfigError(f"{path} has no policy: add `policies`, or name a trained router with --router")
    chosen = name or config.default_policy
    if chosen not in config.policies:
        raise UnknownExpert(chosen, config.policies, where=f"the policies of {path}")
    return chosen
