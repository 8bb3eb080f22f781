"""Time limits of the patterns of vLLM's parsers, some of which take cubic time in the length of an answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

_PARTS: Final = ("_tool_parser", "_reasoning_parser")
"""Attributes of vLLM's parsers that hold parsers with patterns."""
_SEARCHES: Final = frozenset(
    {"search", "match", "fullmatch", "findall", "finditer", "split", "splititer", "sub", "subn"}
)
_LEAST_S: Final = 0.01


class TimedPattern:
    """A compiled pattern of the package regex, whose searches end after some time with a TimeoutError.

    Args:
        left_s: seconds that a search may take now.
    """

    def __init__(self, pattern: Any, left_s: Callable[[], float]) -> None:
        self._pattern, self._left_s = pattern, left_s

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._pattern, name)
        return partial(self._timed, found) if name in _SEARCHES else found

    def _timed(self, search: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return search(*args, **{"timeout": max(self._left_s(), _LEAST_S)} | kwargs)


def limit_patterns(parser: Any, left_s: Callable[[], float]) -> None:
    """Give the patterns of a parser of one answer a time limit. Patterns outside of its attributes keep none.

    Args:
        parser: vLLM's.
        left_s: seconds that a search may take now.
    """
    for part in (parser, *(getattr(parser, name, None) for name in _PARTS)):
        for name, pattern in list(_patterns(part)):
            setattr(part, name, TimedPattern(pattern, left_s))


def _patterns(part: Any) -> Iterator[tuple[str, Any]]:
    """Names and values of the attributes that are patterns, those of the classes included."""
    import regex  # type: ignore[import-untyped]

    places = [*reversed(type(part).__mro__), part]
    found = {name: value for place in places for name, value in getattr(place, "__dict__", {}).items()}
    return ((name, value) for name, value in found.items() if isinstance(value, regex.Pattern))
