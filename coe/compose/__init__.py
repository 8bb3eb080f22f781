"""Compositions: how the chosen experts answer. To add one: one file, one line here, one YAML, one test.

Other packages add compositions by entry points in the group `coe.compositions`; `module:Class` names any class
(docs/plugins.md).
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from coe.compose.aggregate import Aggregate
from coe.compose.base import Composition, Done, ExpertCall, ExpertCalls, Final, named_experts, next_step
from coe.compose.cascade import Cascade
from coe.compose.chain import Chain
from coe.compose.fallback import FALLBACK, WithFallback
from coe.compose.fallback_only import FallbackOnly
from coe.compose.latent import Latent
from coe.compose.ruled_out import Without, ruled_out, without
from coe.compose.self_consistency import SelfConsistency
from coe.compose.single import Single
from coe.compose.vote import Vote
from coe.compose.weighted_vote import WeightedVote
from coe.errors import ConfigError
from registry.errors import PluginError
from registry.plugins import Plugins

COMPOSITIONS: dict[str, Callable[..., Composition]] = {
    "single": Single,
    "vote": Vote,
    "weighted-vote": WeightedVote,
    "cascade": Cascade,
    "aggregate": Aggregate,
    "chain": Chain,
    "self-consistency": SelfConsistency,
    "latent": Latent,
}
"""kind -> class."""

_PLUGINS = Plugins("coe.compositions", "composition", COMPOSITIONS, needs=("step",))


def composition_class(kind: str) -> Callable[..., Composition]:
    """The class of a kind: a built-in name, an installed entry point, or `module:Class`.

    Raises:
        ConfigError: unknown, with the known kinds; or its class cannot be imported or is not a composition.
    """
    try:
        found: Callable[..., Composition] = _PLUGINS.load(kind)
    except PluginError as error:
        raise ConfigError(str(error)) from error
    return found


def build_composition(kind: str, settings: Mapping[str, Any] | None = None) -> Composition:
    """A composition of that kind with these settings.

    Raises:
        ConfigError: no such kind (see `composition_class`); or a setting that is unknown, missing or invalid.
    """
    made = composition_class(kind)
    given, known = dict(settings or {}), inspect.signature(made).parameters
    if unknown := [name for name in given if name not in known]:
        has = ", ".join(known) or "none"
        raise ConfigError(f"composition {kind!r} has no setting {', '.join(unknown)}; it has: {has}")
    if missing := [name for name, has in known.items() if has.default is has.empty and name not in given]:
        raise ConfigError(f"composition {kind!r} needs the setting {', '.join(missing)}")
    try:
        return made(**given)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"composition {kind!r} cannot be made with {given}: {error}") from error


__all__ = [
    "COMPOSITIONS",
    "FALLBACK",
    "Aggregate",
    "Cascade",
    "Chain",
    "Composition",
    "Done",
    "ExpertCall",
    "ExpertCalls",
    "FallbackOnly",
    "Final",
    "Latent",
    "SelfConsistency",
    "Single",
    "Vote",
    "WeightedVote",
    "WithFallback",
    "Without",
    "build_composition",
    "composition_class",
    "named_experts",
    "next_step",
    "ruled_out",
    "without",
]
