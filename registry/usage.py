"""What API keys use: amounts are reserved before a request runs, and replaced by what it has used when it ends.

A limit holds in a window of the calendar (UTC). Requests count when they begin. Tokens and USD count when a request
ends: it is admitted if what is used and reserved in the window leaves room for what it reserves, or if nothing is
reserved and the window is not used up. So all gateways together pass a limit by at most one request. What was reserved
by a process that died is free again when the request would have ended.

`Books` decides; it is kept in the registry's database (`usage_sql.py`) or in Redis (`usage_redis.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final

from registry.keys import Limit, Per, What, shown_time

Amounts = Mapping[What, float]
"""Requests, tokens and USD."""
Place = tuple[str, What, Per]
"""What is counted: of a key, in its window of now."""
PERS: Final[tuple[Per, ...]] = ("minute", "day", "month")
_ROUNDING: Final = 1e-9


@dataclass(frozen=True, slots=True)
class Reserve:
    """A request before it runs.

    Attributes:
        id: of the request. key: id of its key.
        amounts: the most that it is expected to use.
        ends_at: seconds since the epoch by which it has ended, or its process died.
    """

    id: str
    key: str
    limits: Sequence[Limit]
    amounts: Amounts
    ends_at: float

    @property
    def reserves(self) -> dict[What, float]:
        """What is held for it until it ends: of requests nothing, since they count when they begin."""
        kinds: list[What] = sorted({limit.what for limit in self.limits} - {"requests"})
        return {what: self.amounts.get(what, 0.0) for what in kinds}


@dataclass(frozen=True, slots=True)
class Settle:
    """A request that has ended, with what it has used."""

    id: str
    key: str
    limits: Sequence[Limit]
    amounts: Amounts


@dataclass(frozen=True, slots=True)
class Spent:
    """Why a request is refused.

    Attributes:
        left: of the limit, what is neither used nor reserved.
        held: what requests in progress reserve: with it there would be room.
        resets_at: seconds since the epoch at which the window ends.
    """

    limit: Limit
    left: float
    held: float
    resets_at: float

    def __str__(self) -> str:
        unit = {"requests": "requests", "tokens": "tokens", "usd": "USD"}[self.limit.what]
        said = (
            f"{self.limit.most:,.10g} {unit} a {self.limit.per} are the limit of this key, {self.left:,.10g} are left"
        )
        if self.held:
            return f"{said} while requests in progress reserve {self.held:,.10g}: try again when they have ended"
        return f"{said} until {shown_time(self.resets_at)}"


def window(per: Per, now: float) -> tuple[int, float]:
    """Begin and end of the window that holds a time, in seconds since the epoch."""
    at = datetime.fromtimestamp(now, UTC)
    if per == "minute":
        begins = at.replace(second=0, microsecond=0)
        ends = begins + timedelta(minutes=1)
    elif per == "day":
        begins = at.replace(hour=0, minute=0, second=0, microsecond=0)
        ends = begins + timedelta(days=1)
    else:
        begins = at.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
        ends = (begins + timedelta(days=32)).replace(day=1)
    return int(begins.timestamp()), ends.timestamp()


def begins_of(now: float) -> dict[Per, int]:
    """Begin of each window that holds a time, in seconds since the epoch."""
    return {per: window(per, now)[0] for per in PERS}


@dataclass(slots=True)
class Books:
    """What keys have used in their windows of now, and what they have reserved: read once, changed, written once.

    Attributes:
        used: by key, what and window. held: what requests in progress reserve, by key and what.
        changed: what was added to `used`. reserved: the requests that were admitted.
    """

    now: float
    used: dict[Place, float]
    held: dict[tuple[str, What], float]
    changed: dict[Place, float] = field(default_factory=dict)
    reserved: list[Reserve] = field(default_factory=list)

    def work(self, entries: Sequence[Reserve | Settle]) -> list[Spent | None]:
        """Charge what has ended, whose reservations are in `held` no more, then reserve in order.

        Returns:
            For each entry why it is refused; None if it is not.
        """
        for entry in entries:
            if isinstance(entry, Settle):
                self._use(entry, "tokens", "usd")
        return [self._reserve(entry) if isinstance(entry, Reserve) else None for entry in entries]

    def _use(self, entry: Reserve | Settle, *kinds: What) -> None:
        """Charge the amounts of these kinds."""
        for what, per in {(limit.what, limit.per): None for limit in entry.limits if limit.what in kinds}:
            if amount := entry.amounts.get(what, 0.0):
                place = (entry.key, what, per)
                self.used[place] = self.used.get(place, 0.0) + amount
                self.changed[place] = self.changed.get(place, 0.0) + amount

    def _reserve(self, entry: Reserve) -> Spent | None:
        """Reserve the amounts of a request, if every limit leaves room; else why not."""
        for limit in entry.limits:
            amount, taken = entry.amounts.get(limit.what, 0.0), self.used.get((entry.key, limit.what, limit.per), 0.0)
            held = self.held.get((entry.key, limit.what), 0.0)  # of requests: none
            over = amount > limit.most * (1 + _ROUNDING) - taken - held
            if over and (limit.what == "requests" or held > 0 or taken >= limit.most):
                waits = held if taken < limit.most else 0.0
                return Spent(limit, max(0.0, limit.most - taken - held), waits, window(limit.per, self.now)[1])
        self._use(entry, "requests")
        for what, amount in entry.reserves.items():
            self.held[entry.key, what] = self.held.get((entry.key, what), 0.0) + amount
        self.reserved.append(entry)
        return None
