"""What API keys use, in the registry's database."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from typing import Final

from sqlalchemy import and_, bindparam, delete, func, insert, or_, select, update
from sqlalchemy.engine import Connection

from registry.keys import Limit
from registry.tables import key_reservations as _reserved
from registry.tables import key_usage as _usage
from registry.tables import state as _state
from registry.usage import Books, Place, Reserve, Settle, Spent, begins_of, window

KEEP_S: Final = 400 * 86_400
"""Seconds for which used amounts of past windows are kept."""

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


def work(connection: Connection, entries: Sequence[Reserve | Settle], now: float) -> list[Spent | None]:
    """Settle, then reserve in order, in one transaction of a few statements, however many entries there are.

    Returns:
        For each entry why it is refused; None if it is not.
    """
    connection.execute(_LOCK)
    settled = [entry.id for entry in entries if isinstance(entry, Settle)]
    connection.execute(_DELETE_RESERVED, {"ids": settled, "now": now})
    keys, begins = sorted({entry.key for entry in entries}), begins_of(now)
    rows = connection.execute(_SELECT_USED, {"keys": keys, "begins": [*begins.values()]})
    stored = {(key, what, per): float(used) for key, what, per, at, used in rows if at == begins[per]}
    sums = connection.execute(_SELECT_HELD, {"keys": keys})
    books = Books(now, dict(stored), {(key, what): float(amount) for key, what, amount in sums})
    found = books.work(entries)
    _write(connection, books, stored)
    return found


def used(connection: Connection, key: str, limits: Iterable[Limit], now: float) -> list[float]:
    """What a key has used of each limit in its window of now, without what is reserved."""
    columns = (_usage.c.what, _usage.c.per, _usage.c.begins, _usage.c.used)
    rows = connection.execute(select(*columns).where(_usage.c.key == key)).all()
    found = {(what, per, begins): float(amount) for what, per, begins, amount in rows}
    return [found.get((limit.what, limit.per, window(limit.per, now)[0]), 0.0) for limit in limits]


def _write(connection: Connection, books: Books, stored: Container[Place]) -> None:
    held = [
        {"id": entry.id, "key": entry.key, "what": what, "amount": amount, "expires_at": entry.ends_at}
        for entry in books.reserved
        for what, amount in entry.reserves.items()
    ]
    if held:
        connection.execute(insert(_reserved), held)
    begins = begins_of(books.now)
    rows = {
        (key, what, per): {"of": key, "of_what": what, "of_per": per, "of_begins": begins[per], "amount": amount}
        for (key, what, per), amount in books.changed.items()
    }
    if old := [row for place, row in rows.items() if place in stored]:
        connection.execute(_ADD_USED, old)
    if new := [row for place, row in rows.items() if place not in stored]:
        connection.execute(_DELETE_PAST, [{**row, "past": books.now - KEEP_S} for row in new])
        connection.execute(_INSERT_USED, new)
