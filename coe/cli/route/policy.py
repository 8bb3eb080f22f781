"""The decision of a policy: what `coe ask` and `coe serve` would decide, without calling an expert."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
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
    from routers.base import Query, Router
    from routers.selectors import Selector


def decide_by_policy(
    path: Path, name: str | None, query: Query, select: Selector | None
) -> tuple[Routed, DecisionInputs, Router, Query]:
    """The decision, what it was made from, the policy's router, and the query with the features that it requires.

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
        if not isinstance(policy.router, Filled):
            return routed, routed.inputs, policy.router, query
        (filled,) = signals.fill([query], policy.router.router.requires)
        return routed, routed.inputs, policy.router.router, filled


def _policy_name(path: Path, config: Config, name: str | None) -> str:
    if not config.policies:
        raise ConfigError(f"{path} has no policy: add `policies`, or name a trained router with --router")
    chosen = name or config.default_policy
    if chosen not in config.policies:
        raise UnknownExpert(chosen, config.policies, where=f"the policies of {path}")
    return chosen
