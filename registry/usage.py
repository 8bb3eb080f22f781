"""What API keys use: amounts are reserved before a request runs, and replaced by what it has used when it ends.

A limit holds in a window of the calendar (UTC). Requests count when they begin. Tokens and USD count when a request
ends: it is admitted if what is used and reserved in the window leaves room for what it reserves, or if nothing is
reserved and the window is not used up. So all gateways together pass a limit by at most one request. What was reserved
by a process that died is free again when the request would have ended.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from sqlalchemy import and_, bindparam, delete, func, insert, or_, select, update
from sqlalchemy.engine import Connection

from registry.keys import Limit, Per, What, shown_time
from registry.tables import key_reservations as _reserved
from registry.tables import key_usage as _usage
from registry.tables import state as _state

Amounts = Mapping[What, float]
"""Requests, tokens and USD."""
KEEP_S: Final = 400 * 86_400
"""Seconds for which used amounts of past windows are kept."""
_ROUNDING: Final = 1e-9
_PERS: Final[tuple[Per, ...]] = ("minute", "day", "month")


# Statements are built once: that takes longer than to execute them.
_LOCK: Final = select(_state.c.version).with_for_update()  # serializes writers
_DELETE_RESERVED: Final = delete(_reserved).where(
    or_(_reserved.c.expires_at <= bindparam("now"), _reserved.c.id.in_(bindparam("ids", expanding=True)))
)
_SELECT_USED: Final = select(_usage.c.key, _usage.c.what, _usage.c.per, _usage.c.begins, _usage.c.used).where(
    _usage.c.key.in_(bindparam("keys", expanding=True)), _usage.c.begins.in_(bindparam("begins", expanding=True))
)
_SELECT_HELD: Final = (
    select(_reserved.c.key, _reserved.c.what, func.sum(_reserved.c.amount))
    .where(_reserved.c.key.in_(bindparam("keys", expanding=True)))
    .group_by(_reserved.c.key, _reserved.c.what)
)
_HERE: Final = and_(
    _usage.c.key == bindparam("of"), _usage.c.what == bindparam("of_what"), _usage.c.per == bindparam("of_per")
)
_ADD_USED: Final = (
    update(_usage)
    .where(_HERE, _usage.c.begins == bindparam("of_begins"))
    .values(used=_usage.c.used + bindparam("amount"))
)
_DELETE_PAST: Final = delete(_usage).where(_HERE, _usage.c.begins < bindparam("past"))
_INSERT_USED: Final = insert(_usage).values(
    key=bindparam("of"),
    what=bindparam("of_what"),
    per=bindparam("of_per"),
    begins=bindparam("of_begins"),
    used=bindparam("amount"),
)


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


def work(connection: Connection, entries: Sequence[Reserve | Settle], now: float) -> list[Spent | None]:
    """Settle, then reserve in order, in one transaction of a few statements, however many entries there are.

    Returns:
        For each entry why it is refused; None if it is not.
    """
    connection.execute(_LOCK)
    settled = [entry for entry in entries if isinstance(entry, Settle)]
    connection.execute(_DELETE_RESERVED, {"ids": [entry.id for entry in settled], "now": now})
    windows = _Windows(connection, {entry.key for entry in entries}, now)
    for entry in settled:
        windows.use(entry, "tokens", "usd")
    found = [windows.reserve(entry) if isinstance(entry, Reserve) else None for entry in entries]
    windows.write()
    return found


def used(connection: Connection, key: str, limits: Iterable[Limit], now: float) -> list[float]:
    """What a key has used of each limit in its window of now, without what is reserved."""
    columns = (_usage.c.what, _usage.c.per, _usage.c.begins, _usage.c.used)
    rows = connection.execute(select(*columns).where(_usage.c.key == key)).all()
    found = {(what, per, begins): float(amount) for what, per, begins, amount in rows}
    return [found.get((limit.what, limit.per, window(limit.per, now)[0]), 0.0) for limit in limits]


class _Windows:
    """What keys have used in their windows of now, and what they have reserved: read once, changed, written once."""

    def __init__(self, connection: Connection, keys: Collection[str], now: float) -> None:
        self._connection, self._now = connection, now
        self._begins: dict[Per, int] = {per: window(per, now)[0] for per in _PERS}
        rows = connection.execute(_SELECT_USED, {"keys": [*keys], "begins": [*self._begins.values()]})
        self._used = {(key, what, per): used for key, what, per, begins, used in rows if begins == self._begins[per]}
        self._stored = frozenset(self._used)
        sums = connection.execute(_SELECT_HELD, {"keys": [*keys]})
        self._held = {(key, what): float(amount) for key, what, amount in sums}
        self._changed: dict[tuple[str, What, Per], float] = {}
        self._reservations: list[dict[str, object]] = []

    def use(self, entry: Reserve | Settle, *kinds: What) -> None:
        """Charge the amounts of these kinds."""
        for what, per in {(limit.what, limit.per): None for limit in entry.limits if limit.what in kinds}:
            if amount := entry.amounts.get(what, 0.0):
                place = (entry.key, what, per)
                self._used[place] = self._used.get(place, 0.0) + amount
                self._changed[place] = self._changed.get(place, 0.0) + amount

    def reserve(self, entry: Reserve) -> Spent | None:
        """Reserve the amounts of a request, if every limit leaves room; else why not."""
        for limit in entry.limits:
            amount, taken = entry.amounts.get(limit.what, 0.0), self._used.get((entry.key, limit.what, limit.per), 0.0)
            held = self._held.get((entry.key, limit.what), 0.0)  # of requests: none
            over = amount > limit.most * (1 + _ROUNDING) - taken - held
            if over and (limit.what == "requests" or held > 0 or taken >= limit.most):
                waits = held if taken < limit.most else 0.0
                return Spent(limit, max(0.0, limit.most - taken - held), waits, window(limit.per, self._now)[1])
        self.use(entry, "requests")
        for what in sorted({limit.what for limit in entry.limits} - {"requests"}):
            amount = entry.amounts.get(what, 0.0)
            self._held[entry.key, what] = self._held.get((entry.key, what), 0.0) + amount
            row = {"id": entry.id, "key": entry.key, "what": what, "amount": amount, "expires_at": entry.ends_at}
            self._reservations.append(row)
        return None

    def write(self) -> None:
        """Write what has changed."""
        if self._reservations:
            self._connection.execute(insert(_reserved), self._reservations)
        rows = [
            {"of": key, "of_what": what, "of_per": per, "of_begins": self._begins[per], "amount": amount}
            for (key, what, per), amount in self._changed.items()
        ]
        if old := [row for row, place in zip(rows, self._changed, strict=True) if place in self._stored]:
            self._connection.execute(_ADD_USED, old)
        if new := [row for row, place in zip(rows, self._changed, strict=True) if place not in self._stored]:
            self._connection.execute(_DELETE_PAST, [{**row, "past": self._now - KEEP_S} for row in new])
            self._connection.execute(_INSERT_USED, new)
