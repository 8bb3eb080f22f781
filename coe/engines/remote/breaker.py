"""The circuit breaker of an endpoint: whether requests may go there now. Pure: the time is an argument of every call.

    closed      requests go there. After a failure it cools down: others are preferred for `cooldown_s`
    open        none goes there: after `failures` failures in a row, or until the time that its Retry-After states
    half-open   that time has passed: one request, the probe, shows whether it answers again. If not, it is open for
                twice as long as before, up to `most_open_s`

The pattern is that of Nygard, Release It! (2007).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """State of a circuit breaker."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


@dataclass(frozen=True, slots=True)
class BreakerSettings:
    """When an endpoint is avoided.

    Attributes:
        failures: in a row, each of another request, after which it opens; 0: it never opens.
        open_s: seconds until the first probe; most_open_s: most seconds until a later one.
        cooldown_s: seconds after a failure during which others are preferred.
    """

    failures: int = 5
    open_s: float = 5.0
    most_open_s: float = 60.0
    cooldown_s: float = 1.0


class Breaker:
    """The breaker of one endpoint.

    Attributes:
        n_failures: failures in a row. n_opened: how often it has opened in all.
    """

    def __init__(self, settings: BreakerSettings) -> None:
        self.n_failures = self.n_opened = 0
        self._settings = settings
        self._in_a_row = 0  # openings without a success between them
        self._open_until: float | None = None  # None while it is closed
        self._cool_until = float("-inf")
        self._probing = False

    def state(self, now_s: float) -> State:
        """The state at that time."""
        if self._open_until is None:
            return State.CLOSED
        return State.OPEN if now_s < self._open_until else State.HALF_OPEN

    def admits(self, now_s: float) -> bool:
        """Whether a request may go there now; half-open, one at a time."""
        state = self.state(now_s)
        return state is State.CLOSED or (state is State.HALF_OPEN and not self._probing)

    def is_cooling(self, now_s: float) -> bool:
        """Whether it is closed and has failed shortly before."""
        return now_s < self._cool_until

    def opens_in_s(self, now_s: float) -> float:
        """Seconds until a probe may go there; 0 unless it is open."""
        return 0.0 if self._open_until is None else max(0.0, self._open_until - now_s)

    def begin(self, now_s: float) -> bool:
        """A request goes there; returns whether it is the probe."""
        self._probing = self._probing or self.state(now_s) is State.HALF_OPEN
        return self._probing

    def succeeded(self, *, probe: bool) -> None:
        """It has answered. While it is open, only the probe counts."""
        if probe or self._open_until is None:
            self.n_failures = self._in_a_row = 0
            self._open_until = None
            self._cool_until = float("-inf")
        self._probing = self._probing and not probe

    def failed(self, now_s: float, *, probe: bool, stated_s: float | None = None) -> None:
        """It has failed. stated_s: its Retry-After, during which it stays open whatever its count of failures."""
        self._probing = self._probing and not probe
        if not self._settings.failures:
            return
        self.n_failures += 1
        self._cool_until = now_s + self._settings.cooldown_s
        if stated_s:
            self._open(max(now_s + stated_s, self._open_until or 0.0))
        elif probe or (self._open_until is None and self.n_failures >= self._settings.failures):
            open_s = min(self._settings.open_s * 2 ** min(self._in_a_row, 30), self._settings.most_open_s)
            self._in_a_row += 1
            self._open(now_s + open_s)

    def abandoned(self, *, probe: bool) -> None:
        """The request has ended without showing whether the endpoint answers, such as by its client."""
        self._probing = self._probing and not probe

    def _open(self, until_s: float) -> None:
        self.n_opened += 1
        self._open_until = until_s
