"""Priorities of requests: which of those that wait for a host go first.

They are not the `priority` of an expert (`registry.spec`), which decides whose weights are evicted.
"""

from __future__ import annotations

from typing import Final, Literal, get_args

RequestPriority = Literal["low", "normal", "high"]
PRIORITIES: Final[tuple[RequestPriority, ...]] = get_args(RequestPriority)
"""From the lowest to the highest."""
NORMAL: Final[RequestPriority] = "normal"


def level_of(priority: RequestPriority) -> int:
    """The position of a priority: 0 is the lowest."""
    return PRIORITIES.index(priority)
