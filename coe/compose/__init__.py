"""Compositions: what is done with the chosen experts. To add one: one file, one line here, one YAML, one test."""

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from coe.compose.aggregate import Aggregate
from coe.compose.base import Composition, Done, ExpertCall, ExpertCalls, Final, named_experts
from coe.compose.cascade import Cascade
from coe.compose.chain import Chain
from coe.compose.fallback import FALLBACK, WithFallback
from coe.compose.ruled_out import Without, ruled_out, without
from coe.compose.self_consistency import SelfConsistency
from coe.compose.single import Single
from coe.compose.vote import Vote
from coe.compose.weighted_vote import WeightedVote
from coe.errors import ConfigError

COMPOSITIONS: dict[str, Callable[..., Composition]] = {
    "single": Single,
    "vote": Vote,
    "weighted-vote": WeightedVote,
    "cascade": Cascade,
    "aggregate": Aggregate,
    "chain": Chain,
    "self-consistency": SelfConsistency,
}


def build_composition(kind: str, settings: Mapping[str, Any] | None = None) -> Composition:
    """The composition of that name, with its own settings.

    Raises:
        ConfigError: there is none, with those that exist; or a setting that it does not have, lacks or cannot use.
    """
    if kind not in COMPOSITIONS:
        close = get_close_matches(kind, COMPOSITIONS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"there is no composition {kind!r}{hint} Known: {', '.join(COMPOSITIONS)}")
    given, known = dict(settings or {}), inspect.signature(COMPOSITIONS[kind]).parameters
    if strangers := [name for name in given if name not in known]:
        has = ", ".join(known) or "none"
        raise ConfigError(f"composition {kind!r} has no setting {', '.join(strangers)}; it has: {has}")
    if lacking := [name for name, has in known.items() if has.default is has.empty and name not in given]:
        raise ConfigError(f"composition {kind!r} needs the setting {', '.join(lacking)}")
    return COMPOSITIONS[kind](**given)


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
    "Final",
    "SelfConsistency",
    "Single",
    "Vote",
    "WeightedVote",
    "WithFallback",
    "Without",
    "build_composition",
    "named_experts",
    "ruled_out",
    "without",
]
