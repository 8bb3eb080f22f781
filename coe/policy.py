"""Policies: named ways to answer, and how `model` addresses them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from coe.compose import Composition, Single
from coe.errors import UnknownModel
from registry.errors import UnknownExpert
from registry.spec import RESERVED_PREFIX
from registry.store import Snapshot
from routers.base import Router, Utility

AUTO = "auto"
"""`model` of a request that takes the default policy."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Who is chosen (`router`, `utility`, `k`), what they do (`composition`), and who steps in (`fallback`)."""

    name: str
    router: Router
    composition: Composition = field(default_factory=Single)
    utility: Utility = Utility()
    k: int = 1
    fallback: str | None = None


def address(model: str, policies: Mapping[str, Policy], default: str, snapshot: Snapshot) -> Policy | None:
    """The policy that `model` addresses: `auto`, `coe/<policy>`. None when it names an expert.

    Raises:
        UnknownModel: neither a policy nor an expert; with close matches.
    """
    if model == AUTO or model.startswith(RESERVED_PREFIX):
        name = default if model == AUTO else model.removeprefix(RESERVED_PREFIX)
        if name not in policies:
            raise UnknownModel(str(UnknownExpert(name, policies, where="the configured policies")))
        return policies[name]
    if model not in snapshot.experts:
        names = [*snapshot.experts, AUTO, *(RESERVED_PREFIX + policy for policy in policies)]
        raise UnknownModel(str(UnknownExpert(model, names)))
    return None
