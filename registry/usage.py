"""What API keys use: amounts are reserved before a request runs, and replaced by what it has used when it ends.

A limit holds in a window of the calendar (UTC). Requests count when they begin. Tokens and USD count when a request
ends: it is admitted if what is used and reserved in the window leaves room for what it reserves, or if nothing is
reserved and the window is not used up. So all gateways together pass a limit by at most one request. What was reserved
by a process that died is free again when the request would have ended.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from sqlalchemy import and_, delete, func, insert, select, update
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


def work(connection: Connection, entries: Iterable[Reserve | Settle], now: float) -> list[Spent | None]:
    """Reserve and settle in order, in one transaction.

    Returns:
        For each entry why it is refused; None if it is not.
    """
    connection.execute(select(_state.c.version).with_for_update())  # serializes writers
    connection.execute(delete(_reserved).where(_reserved.c.expires_at <= now))
    found: list[Spent | None] = []
    for entry in entries:
        if isinstance(entry, Reserve):
            found.append(_reserve(connection, entry, now))
        else:
            _settle(connection, entry, now)
            found.append(None)
    return found


def used(connection: Connection, key: str, limits: Iterable[Limit], now: float) -> list[float]:
    """What a key has used of each limit in its window of now, without what is reserved."""
    return [_used(connection, key, limit, now) for limit in limits]


def _reserve(connection: Connection, entry: Reserve, now: float) -> Spent | None:
    for limit in entry.limits:
        amount, taken = entry.amounts.get(limit.what, 0.0), _used(connection, entry.key, limit, now)
        held = _held(connection, entry.key, limit.what)  # of requests: none
        over = amount > limit.most * (1 + _ROUNDING) - taken - held
        if over and (limit.what == "requests" or held > 0 or taken >= limit.most):
            waits = held if taken < limit.most else 0.0
            return Spent(limit, max(0.0, limit.most - taken - held), waits, window(limit.per, now)[1])
    _use(connection, entry.key, [each for each in entry.limits if each.what == "requests"], entry.amounts, now)
    rows = [
        {"id": entry.id, "key": entry.key, "what": what, "amount": entry.amounts.get(what, 0.0)}
        for what in sorted({limit.what for limit in entry.limits} - {"requests"})
    ]
    if rows:
        connection.execute(insert(_reserved), [row | {"expires_at": entry.ends_at} for row in rows])
    return None


def _settle(connection: Connection, entry: Settle, now: float) -> None:
    connection.execute(delete(_reserved).where(_reserved.c.id == entry.id))
    _use(connection, entry.key, [each for each in entry.limits if each.what != "requests"], entry.amounts, now)


def _use(connection: Connection, key: str, limits: Iterable[Limit], amounts: Amounts, now: float) -> None:
    for what, per in sorted({(limit.what, limit.per) for limit in limits}):
        amount = amounts.get(what, 0.0)
        if not amount:
            continue
        begins, _ = window(per, now)
        here = and_(_usage.c.key == key, _usage.c.what == what, _usage.c.per == per)
        changed = connection.execute(
            update(_usage).where(here, _usage.c.begins == begins).values(used=_usage.c.used + amount)
        )
        if not changed.rowcount:
            connection.execute(delete(_usage).where(here, _usage.c.begins < now - KEEP_S))
            values = {"key": key, "what": what, "per": per, "begins": begins, "used": amount}
            connection.execute(insert(_usage).values(**values))


def _used(connection: Connection, key: str, limit: Limit, now: float) -> float:
    begins, _ = window(limit.per, now)
    here = and_(_usage.c.key == key, _usage.c.what == limit.what, _usage.c.per == limit.per, _usage.c.begins == begins)
    return float(connection.execute(select(_usage.c.used).where(here)).scalar_one_or_none() or 0.0)


def _held(connection: Connection, key: str, what: What) -> float:
    held = select(func.coalesce(func.sum(_reserved.c.amount), 0.0)).where(
        _reserved.c.key == key, _reserved.c.what == what
    )
    return float(connection.execute(held).scalar_one())
