"""A time limit for a command whose runs go on where they stopped."""

from __future__ import annotations

import math
import time
from collections.abc import Callable


class OutOfTime(Exception):
    """The time of the command is over; what is done is kept."""


class Clock:
    """Seconds left of a command.

    Args:
        limit_s: `math.inf` for none.
    """

    def __init__(self, limit_s: float = math.inf, *, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._end = now, now() + limit_s

    @property
    def left_s(self) -> float:
        """Seconds left, not below 0."""
        return max(0.0, self._end - self._now())

    def check(self) -> None:
        """Raises OutOfTime if nothing is left."""
        if not self.left_s:
            raise OutOfTime
