"""What admin calls state of experts beside their specs: drained, with a reason, and pinned.

A drained expert gets no new requests; its requests in progress end. A pinned one stays in memory. Both hold for all
versions of an expert that are served, on all gateways, and until they are undone or the expert is removed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import delete, insert, select, update
from sqlalchemy.engine import Connection

from registry.errors import RegistryError, UnknownExpert
from registry.tables import expert_states as _states

MOST_REASON_CHARACTERS: Final = 200
"""Most characters of the reason of a drain."""


@dataclass(frozen=True, slots=True)
class ExpertState:
    """What admin calls have stated of an expert, with author and time (seconds since the epoch). `drained`: the reason,
    None if it is not."""

    drained: str | None
    pinned: bool
    changed_at: float
    changed_by: str


def read(connection: Connection) -> dict[str, ExpertState]:
    """The states of the experts of which anything is stated, by name."""
    columns = (_states.c.name, _states.c.drained, _states.c.pinned, _states.c.changed_at, _states.c.changed_by)
    rows = connection.execute(select(*columns).order_by(_states.c.name)).all()
    return {row[0]: ExpertState(row[1], bool(row[2]), row[3], row[4]) for row in rows}


def state(
    connection: Connection,
    names: Sequence[str],
    current: Mapping[str, Any],
    stated: Mapping[str, Any],
    by: str,
    now: float,
) -> bool:
    """State something of experts; whether that changed anything.

    Args:
        current: the registered experts.
        stated: values of the columns `drained` and `pinned`.

    Raises:
        UnknownExpert: an expert is not registered.
        RegistryError: the reason is too long or not one line of text.
    """
    if unknown := [name for name in names if name not in current]:
        raise UnknownExpert(unknown[0][:128], current)
    reason = stated.get("drained")
    if reason is not None and (len(reason) > MOST_REASON_CHARACTERS or not reason.isprintable()):
        raise RegistryError(f"a reason is one line of at most {MOST_REASON_CHARACTERS} printable characters")
    before, changed = read(connection), False
    for name in dict.fromkeys(names):
        old = before.get(name)
        values = {"drained": old and old.drained, "pinned": bool(old and old.pinned), **stated}
        if old is not None and (old.drained, old.pinned) == (values["drained"], values["pinned"]):
            continue
        if old is None and values == {"drained": None, "pinned": False}:
            continue
        changed, signed = True, {**values, "changed_at": now, "changed_by": by}
        if old is None:
            connection.execute(insert(_states).values(name=name, **signed))
        elif values == {"drained": None, "pinned": False}:
            forget(connection, [name])
        else:
            connection.execute(update(_states).where(_states.c.name == name).values(**signed))
    return changed


def forget(connection: Connection, names: Sequence[str]) -> None:
    """Forget what is stated of experts that are removed."""
    for name in names:
        connection.execute(delete(_states).where(_states.c.name == name))
