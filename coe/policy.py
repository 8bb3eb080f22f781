"""Policies: named combinations of router, composition and weights, addressed by the `model` field of a request."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from coe.compose import Composition, Single
from coe.errors import UnknownModel
from registry.errors import UnknownExpert
from registry.spec import RESERVED_PREFIX
from routers.base import Estimate, Query, Router
from routers.conversation import Reads
from routers.decision import Utility
from routers.selectors import Selector, TopK

if TYPE_CHECKING:
    from routers.artifacts import ArtifactMeta

AUTO = "auto"
"""The `model` that addresses the default policy."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How experts are chosen (`router`, `reads`, `utility`, `select`) and how they answer (`composition`).

    reads: what the router reads of a conversation. fallback: expert that answers if all others fail. router_digest:
    digest of the router's artifact; None if the router was not loaded from one. folder, trained: that of the artifact,
    and its metadata. least_cost_weight: the cost weight of a decision is at least this, where all costs are known.
    degraded: what the policy gives up while the service is overloaded; "": nothing.
    """

    name: str
    router: Router
    composition: Composition = field(default_factory=Single)
    utility: Utility = Utility()
    select: Selector = field(default_factory=TopK)
    fallback: str | None = None
    router_digest: str | None = None
    reads: Reads = "conversation"
    least_cost_weight: float = 0.0
    degraded: str = ""
    folder: Path | None = field(default=None, compare=False, repr=False)
    trained: ArtifactMeta | None = field(default=None, compare=False, repr=False)

    @property
    def experts(self) -> tuple[str, ...]:
        """The experts that its router chooses among; empty for a router of another package that does not say."""
        return tuple(getattr(self.router, "experts", ()))

    @property
    def best_single(self) -> str | None:
        """The expert with the best mean score on the training table of the router; None if that is not known."""
        reference = None if self.trained is None else self.trained.reference
        return reference.experts[int(reference.mean_scores.argmax())] if reference and reference.experts else None


@dataclass(slots=True)
class Always:
    """The router of a policy that names one expert: it estimates quality 1 for that expert."""

    expert: str
    requires: frozenset[str] = frozenset()

    @property
    def experts(self) -> tuple[str, ...]:
        """That one."""
        return (self.expert,)

    def estimate(self, queries: Sequence[Query]) -> Estimate:
        """The same expert for each of the n queries."""
        reasons = ("the policy names this expert",) * len(queries)
        return Estimate((self.expert,), np.ones((len(queries), 1)), reasons=reasons)


def address(model: str, policies: Mapping[str, Policy], default: str, experts: Collection[str]) -> Policy | None:
    """The policy that `model` addresses (`auto`, `coe/<policy>`); None if it names an expert.

    Raises:
        UnknownModel: neither a policy nor an expert; with close matches.
    """
    if model == AUTO or model.startswith(RESERVED_PREFIX):
        name = default if model == AUTO else model.removeprefix(RESERVED_PREFIX)
        if name not in policies:
            raise UnknownModel(str(UnknownExpert(name, policies, where="the configured policies")))
        return policies[name]
    if model not in experts:
        names = [*experts, AUTO, *(RESERVED_PREFIX + policy for policy in policies)]
        raise UnknownModel(str(UnknownExpert(model, names)))
    return None
