"""Compositions: what is done with the chosen experts. To add one: one file, one line here, one YAML, one test."""

from collections.abc import Callable
from difflib import get_close_matches

from coe.compose.base import Ask, Asks, Composition, Done, Final
from coe.compose.fallback import WithFallback
from coe.compose.single import Single
from coe.errors import ConfigError

COMPOSITIONS: dict[str, Callable[[], Composition]] = {
    "single": Single,
}


def build_composition(name: str) -> Composition:
    """The composition of that name. Raises ConfigError, listing those that exist."""
    if name not in COMPOSITIONS:
        close = get_close_matches(name, COMPOSITIONS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"there is no composition {name!r}{hint} Known: {', '.join(COMPOSITIONS)}")
    return COMPOSITIONS[name]()


__all__ = ["COMPOSITIONS", "Ask", "Asks", "Composition", "Done", "Final", "Single", "WithFallback", "build_composition"]
