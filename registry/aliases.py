"""Aliases: names for one version of an expert each, which move, and moves that can be undone.

    alias -> expert@version

Every move is kept with its time and author, newest last. A rollback undoes the newest move that is not undone, so that
repeated rollbacks go back step by step; a later move continues from there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from sqlalchemy import delete as delete_rows
from sqlalchemy import insert, select, update
from sqlalchemy.engine import Connection

from registry.errors import RegistryError, UnknownExpert
from registry.references import check_references
from registry.snapshot import Alias, as_version
from registry.spec import ExpertSpec, check_name
from registry.spelling import did_you_mean
from registry.stored_spec import read_spec
from registry.tables import alias_moves as _moves
from registry.tables import experts as _experts

MOST_ALIASES: Final = 1_000
"""Most aliases of a registry: each may be one more expert that is served."""
MOST_MOVES: Final = 1_000
"""Moves that are kept of an alias; the oldest go first."""


@dataclass(frozen=True, slots=True)
class Move:
    """One move of an alias. `undone_at`, `undone_by`: of the rollback that undid it; None if none did."""

    alias: Alias
    undone_at: float | None = None
    undone_by: str | None = None


def read(connection: Connection) -> dict[str, Alias]:
    """The aliases by name, each where it is now."""
    query = select(*_COLUMNS).where(_moves.c.undone_at.is_(None)).order_by(_moves.c.id)
    return {row[0]: Alias(*row) for row in connection.execute(query).all()}  # the newest move of each is the last


def history(connection: Connection, name: str) -> list[Move]:
    """The moves of an alias, the oldest first. Raises RegistryError if there is no such alias."""
    _known(connection, name)
    columns = (*_COLUMNS, _moves.c.undone_at, _moves.c.undone_by)
    rows = connection.execute(select(*columns).where(_moves.c.alias == name).order_by(_moves.c.id)).all()
    return [Move(Alias(*row[:5]), *row[5:]) for row in rows]


def versions(
    connection: Connection, aliases: Mapping[str, Alias], current: Mapping[str, ExpertSpec]
) -> dict[str, ExpertSpec]:
    """`Snapshot.versions`: what aliases name beside the current experts."""
    refs = {alias.ref: alias for alias in aliases.values() if not _is_current(alias, current)}
    return {ref: as_version(_stored(connection, alias.expert, alias.version)) for ref, alias in sorted(refs.items())}


def point(
    connection: Connection,
    name: str,
    target: str,
    current: Mapping[str, ExpertSpec],
    *,
    by: str,
    now: float,
    exists: bool | None = None,
) -> Alias:
    """Move an alias, or create it. One that is there already does not move.

    Args:
        target: `expert` (its current version), `expert@version`, or the version of the expert that it names now.
        exists: whether it must exist (True) or must not (False).

    Raises:
        UnknownExpert: the expert or the version is not registered.
        RegistryError: the name is not one of an alias, or the alias is (not) there; or the version refers to experts
            that are not registered now.
    """
    aliases = read(connection)
    before = aliases.get(name)
    if before is None:
        if exists:
            raise _unknown(name, aliases)
        _check_new(name, aliases, current)
    expert, version = _target(target, before)
    alias = Alias(name, expert, _version(connection, expert, version, current), now, by)
    check_references(_stored(connection, alias.expert, alias.version), current)
    if before is not None and before.ref == alias.ref:
        return before
    connection.execute(
        insert(_moves).values(
            alias=name,
            expert=alias.expert,
            version=alias.version,
            moved_at=now,
            moved_by=by,
            undone_at=None,
            undone_by=None,
        )
    )
    _prune(connection, name)
    return alias


def roll_back(connection: Connection, name: str, current: Mapping[str, ExpertSpec], *, by: str, now: float) -> Alias:
    """Undo the newest move of an alias that is not undone; the alias as it is then.

    Raises:
        RegistryError: there is no such alias or no earlier move, or its expert is not registered any more.
    """
    _known(connection, name)
    query = select(_moves.c.id, *_COLUMNS).where(_moves.c.alias == name, _moves.c.undone_at.is_(None))
    last, *others = connection.execute(query.order_by(_moves.c.id.desc()).limit(2)).all()
    if not others:
        raise RegistryError(f"the alias {name!r} has no earlier target than {last.expert}@{last.version}")
    alias = Alias(*others[0][1:])
    if alias.expert not in current:
        raise RegistryError(
            f"the alias {name!r} cannot go back to {alias.ref}: {alias.expert!r} is not registered any more; "
            f"`coe promote {name} EXPERT` moves it to another one"
        )
    check_references(_stored(connection, alias.expert, alias.version), current)
    connection.execute(update(_moves).where(_moves.c.id == last.id).values(undone_at=now, undone_by=by))
    return alias


def remove(connection: Connection, name: str) -> Alias:
    """Delete an alias and its moves; where it was. Raises RegistryError if there is no such alias."""
    alias = _known(connection, name)
    connection.execute(delete_rows(_moves).where(_moves.c.alias == name))
    return alias


def check_aliases(
    aliases: Mapping[str, Alias], added: Sequence[ExpertSpec], removed: Sequence[str], after: Mapping[str, ExpertSpec]
) -> None:
    """Check that a change of the experts leaves every alias one, and no expert gets the name of an alias.

    Raises:
        RegistryError: it does not; the message says which.
    """
    if taken := [spec.name for spec in added if spec.name in aliases]:
        raise RegistryError(
            f"{taken[0]!r} is an alias: choose another name, or delete it (`coe alias delete {taken[0]}`)"
        )
    for name in removed:
        needed = [alias.name for alias in aliases.values() if alias.expert == name and name not in after]
        if needed:
            raise RegistryError(
                f"{name!r} cannot be removed: the alias {', '.join(sorted(needed))} points to it; move it first "
                f"(`coe promote {needed[0]} EXPERT`), or delete it (`coe alias delete {needed[0]}`)"
            )


_COLUMNS = (_moves.c.alias, _moves.c.expert, _moves.c.version, _moves.c.moved_at, _moves.c.moved_by)


def _known(connection: Connection, name: str) -> Alias:
    aliases = read(connection)
    if name not in aliases:
        raise _unknown(name, aliases)
    return aliases[name]


def _unknown(name: str, aliases: Mapping[str, Alias]) -> RegistryError:
    return RegistryError(
        f"there is no alias {name[:128]!r}{did_you_mean(name[:128], aliases)}: `coe alias list` shows all"
    )


def _check_new(name: str, aliases: Mapping[str, Alias], current: Mapping[str, ExpertSpec]) -> None:
    try:
        check_name(name)
    except ValueError as error:
        raise RegistryError(f"alias {error}") from None
    if name in current:
        raise RegistryError(f"{name!r} is an expert: an alias needs a name of its own")
    if len(aliases) >= MOST_ALIASES:
        raise RegistryError(f"the registry holds {len(aliases):,} aliases, and no more than {MOST_ALIASES:,}")


def _target(target: str, before: Alias | None) -> tuple[str, str]:
    """Expert and version of a target; the version is empty for the current one."""
    if before is not None and target.isascii() and target.isdigit():
        return before.expert, target
    expert, separator, version = target.partition("@")
    if separator and not version:
        raise RegistryError(f"{target[:128]!r} names no version: write EXPERT or EXPERT@VERSION")
    return expert, version


def _version(connection: Connection, expert: str, version: str, current: Mapping[str, ExpertSpec]) -> int:
    if expert not in current:
        raise UnknownExpert(expert[:128], current)
    if not version:
        number = current[expert].version
        assert number is not None  # it is registered
        return number
    known = connection.execute(select(_experts.c.version).where(_experts.c.name == expert)).scalars().all()
    if not (version.isascii() and version.isdigit() and len(version) < 10 and int(version) in known):
        raise UnknownExpert(f"{expert}@{version[:32]}", [f"{expert}@{number}" for number in sorted(known)])
    return int(version)


def _stored(connection: Connection, expert: str, version: int) -> ExpertSpec:
    query = select(_experts.c.spec).where(_experts.c.name == expert, _experts.c.version == version)
    return read_spec(connection.execute(query).scalar_one())


def _is_current(alias: Alias, current: Mapping[str, ExpertSpec]) -> bool:
    spec = current.get(alias.expert)
    return spec is not None and spec.version == alias.version


def _prune(connection: Connection, name: str) -> None:
    old = select(_moves.c.id).where(_moves.c.alias == name).order_by(_moves.c.id.desc()).offset(MOST_MOVES)
    if ids := connection.execute(old).scalars().all():
        connection.execute(delete_rows(_moves).where(_moves.c.id.in_(ids)))
