"""Names in error messages, worded the same everywhere: close matches of a mistyped name, and long lists cut short."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterable
from difflib import get_close_matches
from itertools import islice
from typing import Final

MOST_CHARACTERS: Final = 100
"""Longer names have no close matches: the time of a comparison grows with their length."""
MOST_KNOWN: Final = 100
"""Most known names to compare; of more, the nearest ones in alphabetical order."""


def close_matches(name: str, known: Iterable[str], *, most: int = 1) -> tuple[str, ...]:
    """Up to `most` known names that resemble `name`, the closest first. Its time is bounded: names may be hostile."""
    if len(name) > MOST_CHARACTERS:
        return ()
    names = list(known)
    if len(names) > MOST_KNOWN:
        names.sort()
        start = max(0, bisect(names, name) - MOST_KNOWN // 2)
        names = names[start : start + MOST_KNOWN]
    return tuple(get_close_matches(name, names, n=most))


def question(name: str, known: Iterable[str], *, most: int = 1) -> str:
    """`did you mean 'knn'?`, with up to `most` suggestions; empty without a close match."""
    close = close_matches(name, known, most=most)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else ""


def did_you_mean(name: str, known: Iterable[str], *, most: int = 1, listed: bool = False) -> str:
    """The end of an error message about an unknown name: `; did you mean 'knn'?`, or nothing without a close match.

    Args:
        most: suggestions to show.
        listed: append all known names: `; did you mean 'knn'? there are: knn, category`.
    """
    names = list(known)
    hint = question(name, names, most=most)
    parts = [hint] if hint else []
    if listed:
        parts.append(f"there are: {', '.join(names) or 'none'}")
    return f"; {' '.join(parts)}" if parts else ""


def mistyped(wanted: Iterable[str], found: Iterable[str]) -> str:
    """The end of an error message about names that are missing: `; 'anwser': did you mean 'answer'?`.

    Args:
        wanted: the missing names. found: what is there and has no meaning, of which the first ones are compared.
    """
    names = list(wanted)
    hints = ((name, question(name, names)) for name in islice(found, MOST_KNOWN))
    return next((f"; {name!r}: {hint}" for name, hint in hints if hint), "")


def listing(names: Iterable[str], *, most: int = 10, separator: str = ", ") -> str:
    """`a, b and 3 more`: the first `most` names, and how many others there are; empty without names."""
    names = iter(names)
    shown, more = list(islice(names, most)), sum(1 for _ in names)
    return separator.join(shown) + (f" and {more} more" if more else "")
