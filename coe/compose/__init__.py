"""Compositions: what is done with the chosen experts. To add one: one file, one line here, one YAML, one test."""

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from coe.compose.base import Ask, Asks, Composition, Done, Final
from coe.compose.cascade import Cascade
from coe.compose.fallback import WithFallback
from coe.compose.single import Single
from coe.compose.vote import Vote
from coe.compose.weighted_vote import WeightedVote
from coe.errors import ConfigError

COMPOSITIONS: dict[str, Callable[..., Composition]] = {
    "single": Single,
    "vote": Vote,
    "weighted-vote": WeightedVote,
    "cascade": Cascade,
}


def build_composition(kind: str, settings: Mapping[str, Any] | None = None) -> Composition:
    """The composition of that name, with its own settings.

    Raises:
        ConfigError: there is none, with those that exist; or a setting that it does not have or cannot use.
    """
    if kind not in COMPOSITIONS:
        close = get_close_matches(kind, COMPOSITIONS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"there is no composition {kind!r}{hint} Known: {', '.join(COMPOSITIONS)}")
    given, known = dict(settings or {}), list(inspect.signature(COMPOSITIONS[kind]).parameters)
    if strangers := [name for name in given if name not in known]:
        has = ", ".join(known) or "none"
        raise ConfigError(f"composition {kind!r} has no setting {', '.join(strangers)}; it has: {has}")
    return COMPOSITIONS[kind](**given)


__all__ = [
    "COMPOSITIONS",
    "Ask",
    "Asks",
    "Cascade",
    "Composition",
    "Done",
    "Final",
    "Single",
    "Vote",
    "WeightedVote",
    "WithFallback",
    "build_composition",
]
