"""Close matches for a mistyped name, worded the same in every error message."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def close_matches(name: str, known: Iterable[str], *, most: int = 1) -> tuple[str, ...]:
    """Up to `most` known names that resemble `name`, the closest first."""
    return tuple(get_close_matches(name, list(known), n=most))


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
