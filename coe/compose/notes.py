"""Notes: what the caller should know of an answer, in the order in which things were asked."""

from __future__ import annotations

from collections.abc import Iterator

from coe.compose.base import Done
from coe.errors import CoeError, WeightsError
from coe.types import Answer, Failure


def failures(done: Done) -> tuple[str, ...]:
    """`b failed: DeadlineExceeded: ...` of everybody who failed; what is the same is said once."""
    told = (f"{o.expert} failed: {said(o.error)}" for _, o in in_order(done) if isinstance(o, Failure))
    return tuple(dict.fromkeys(told))


def said(error: Exception) -> str:
    """An error as a caller may read it: of weights and of bugs, whose messages tell of the inside, only the kind."""
    kind = type(error).__name__
    inside = isinstance(error, WeightsError) or not isinstance(error, CoeError)
    return kind if inside else f"{kind}: {error}"


def in_order(done: Done) -> Iterator[tuple[str, Answer | Failure]]:
    """The outcomes by round and position, however they came: online and in a batch they come differently."""
    return iter(sorted(done.items(), key=lambda named: _place(named[0])))


def _place(call: str) -> list[tuple[bool, int, str]]:
    """Numbers by their value, before words."""
    return [(False, int(part), "") if part.isdecimal() else (True, 0, part) for part in call.split(".")]
