"""The registry: specs under versioned names, in any SQL database, safe under concurrent writers.

    with Registry() as registry:                  # SQLite at $COE_HOME/registry.db
        spec = registry.add(describe(draft))      # a new version if its content changed, else the current one
        snapshot = registry.snapshot()            # immutable, picklable; a running service holds one

Every change is one transaction that first locks the counter of changes: writers queue there, and readers see the
registry before or after a change, never in between. A database file that is replaced by another one while a registry is
open is noticed at the next use, and opened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TypeVar

from sqlalchemy import func, insert, select, update
from sqlalchemy.engine import Connection

from registry import aliases as aliases_of
from registry import expert_states as states_of
from registry import keys as keys_of
from registry import usage_sql
from registry.aliases import Move, check_aliases
from registry.database import (
    FileIdentity,
    file_identity,
    open_engine,
    reading,
    settle,
    translate_errors,
    with_retries,
    writing,
)
from registry.digest import identity
from registry.errors import RegistryError, StaleChange, StoreError, UnknownExpert
from registry.expert_states import ExpertState
from registry.keys import ApiKey, KeySpec
from registry.profiles import AGGREGATION, ProfileRow, Profiles, read, record
from registry.references import check_all_references, check_servable
from registry.schema import is_current, prepare
from registry.snapshot import Alias
from registry.snapshot import Snapshot as Snapshot
from registry.spec import ExpertSpec
from registry.stored_spec import read_spec
from registry.tables import experts as _experts
from registry.tables import state as _state
from registry.usage import Reserve, Settle, Spent

T = TypeVar("T")


class Registry:
    """A database of experts; a context manager. Each process opens its own.

    Args:
        url: an SQLAlchemy URL; `None` is SQLite at `$COE_HOME/registry.db`.

    Raises:
        StoreError: the database cannot be opened, or has an unknown format.
    """

    def __init__(self, url: str | None = None) -> None:
        self._engine, self.url = open_engine(url)
        self._file: FileIdentity | None = None
        try:
            self._prepare()
        except RegistryError:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._engine.dispose()

    def add(self, spec: ExpertSpec) -> ExpertSpec:
        """Register a described spec; see `change`."""
        return self.change([spec])[0]

    def change(
        self, add: Sequence[ExpertSpec] = (), remove: Iterable[str] = (), *, since: int | None = None
    ) -> list[ExpertSpec]:
        """Add and remove experts in one transaction; return the added ones with their versions.

        Adding an unchanged expert does nothing: the same content keeps its version.

        Args:
            since: version of the registry that the change was planned with; None plans for any.

        Raises:
            UnknownExpert: a base, a member or a name to remove is not registered.
            StaleChange: the registry is not at the version `since` any more.
            RegistryError: an expert to remove is needed by others or by an alias, which are named; the name of one to
                add is an alias; or no engine serves it.
        """
        removed = list(remove)
        return self._write(lambda connection: _change(connection, add, removed, since))

    def remove(self, name: str) -> None:
        """Remove an expert; its versions stay readable as `name@version`. Raises like `change`."""
        self.change(remove=[name])

    def get(self, name: str) -> ExpertSpec:
        """The current version of an expert, or any registered `name@version`. Raises UnknownExpert."""
        bare, _, version = name.partition("@")
        if not version:
            return self.snapshot().get(bare)
        with self._read() as connection:
            rows = connection.execute(select(_experts.c.version, _experts.c.spec).where(_experts.c.name == bare)).all()
        found = {f"{bare}@{number}": text for number, text in rows}
        if name not in found:
            raise UnknownExpert(name, found or self.snapshot())
        return read_spec(found[name])

    def list(self) -> list[ExpertSpec]:
        """The current experts, sorted by name."""
        return [*self.snapshot().experts.values()]

    def snapshot(self) -> Snapshot:
        """The current state of the registry."""
        with self._read() as connection:
            version = connection.execute(select(_state.c.version)).scalar_one()
            current, rows = _current(connection), read(connection)
            aliases, states = aliases_of.read(connection), states_of.read(connection)
            versions = aliases_of.versions(connection, aliases, current)
            ever = connection.execute(select(_experts.c.name).distinct()).scalars().all()
        return Snapshot(
            version,
            current,
            _of_now(current, rows).tokens_per_s(),
            aliases,
            versions,
            {name: each.drained for name, each in states.items() if each.drained is not None},
            frozenset(name for name, each in states.items() if each.pinned),
            frozenset({*ever} - current.keys()),
        )

    def revision(self) -> tuple[object, int]:
        """A value that differs after every change of the experts: the identity of the database, and its version.

        Raises:
            StoreError: the database cannot be read now.
        """
        with self._read() as connection:
            return self._file, connection.execute(select(_state.c.version)).scalar_one()

    def point_alias(self, name: str, target: str, *, by: str, now: float, exists: bool | None = None) -> Alias:
        """Move an alias, or create it; see `registry.aliases.point`."""

        def move(connection: Connection, current: Mapping[str, ExpertSpec]) -> tuple[Alias, bool]:
            before = aliases_of.read(connection).get(name)
            alias = aliases_of.point(connection, name, target, current, by=by, now=now, exists=exists)
            return alias, alias != before

        return self._move(move)

    def roll_back_alias(self, name: str, *, by: str, now: float) -> Alias:
        """Undo the last move of an alias; see `registry.aliases.roll_back`."""
        return self._move(lambda c, current: (aliases_of.roll_back(c, name, current, by=by, now=now), True))

    def delete_alias(self, name: str) -> Alias:
        """Delete an alias and its moves. Raises RegistryError if there is no such alias."""
        return self._move(lambda c, _: (aliases_of.remove(c, name), True))

    def alias_moves(self, name: str) -> Sequence[Move]:
        """The moves of an alias, the oldest first. Raises RegistryError if there is no such alias."""
        with self._read() as connection:
            return aliases_of.history(connection, name)

    def state_experts(self, names: Sequence[str], *, by: str, now: float, **stated: Any) -> Snapshot:
        """State `drained` (a reason or None) or `pinned` of experts; see `registry.expert_states.state`.

        Returns:
            The registry after that.
        """
        self._move(lambda c, current: (None, states_of.state(c, names, current, stated, by, now)))
        return self.snapshot()

    def expert_states(self) -> Mapping[str, ExpertState]:
        """What admin calls have stated of experts, with author and time, by name."""
        with self._read() as connection:
            return states_of.read(connection)

    def record(self, rows: Sequence[ProfileRow]) -> None:
        """Store measurements in one transaction; earlier rows of the same sources and experts are replaced.

        The version of the registry does not change, because the experts do not.

        Raises:
            UnknownExpert: a name was never registered.
            RegistryError: a row cannot be stored; the message says which and why.
        """
        self._write(lambda connection: record(connection, rows))

    def recorded(self, expert: str | None = None) -> Sequence[ProfileRow]:
        """All stored rows, of current and earlier contents of experts, or the rows of one expert."""
        with self._read() as connection:
            return read(connection, expert)

    def profiles(self, *, aggregating: bool = False) -> Profiles:
        """Measurements of the current contents of the experts, all sources added up.

        Args:
            aggregating: measurements as aggregators of other experts' answers, instead of own answers.
        """
        with self._read() as connection:
            current, rows = _current(connection), read(connection)
        return _of_now(current, rows, aggregating=aggregating)

    def create_api_key(self, spec: KeySpec, now: float) -> tuple[ApiKey, str]:
        """Create an API key; return it, and its text, which is not stored.

        Raises:
            RegistryError: a key in use has that name, or there are too many keys.
        """
        key, text = ApiKey.made(spec, now)
        self._write(lambda connection: keys_of.create(connection, key))
        return key, text

    def revoke_api_key(self, name: str, now: float) -> ApiKey:
        """Revoke the API key in use with that id or name. Raises RegistryError if there is none."""
        return self._write(lambda connection: keys_of.revoke(connection, name, now))

    def api_keys(self) -> Sequence[ApiKey]:
        """All API keys, expired and revoked ones included, in the order of their creation."""
        with self._read() as connection:
            return keys_of.read(connection)

    def api_keys_revision(self) -> tuple[object, int]:
        """A value that differs after every change of the keys; the number is 0 if there never was a key.

        Raises:
            StoreError: the database cannot be read now.
        """
        with self._read() as connection:
            return self._file, keys_of.revision(connection)

    def account(self, entries: Sequence[Reserve | Settle], now: float) -> Sequence[Spent | None]:
        """Reserve and settle what requests of API keys use, in one transaction; see `registry.usage`."""
        return self._write(lambda connection: usage_sql.work(connection, entries, now), settled=False)

    def used(self, key: ApiKey, now: float) -> Sequence[float]:
        """What a key has used of each of its limits."""
        with self._read() as connection:
            return usage_sql.used(connection, key.id, key.spec.limits, now)

    def _move(self, work: Callable[[Connection, Mapping[str, ExpertSpec]], tuple[T, bool]]) -> T:
        """A transaction on the experts as they are; `work` returns its result, and whether it changed anything."""

        def moved(connection: Connection) -> T:
            version = _locked_version(connection)
            result, changed = work(connection, _current(connection))
            if changed:
                connection.execute(update(_state).values(version=version + 1))
            return result

        return self._write(moved)

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        self._follow()
        with self._fresh_after_errors(), reading(self._engine) as connection:
            yield connection

    def _write(self, work: Callable[[Connection], T], *, settled: bool = True) -> T:
        """Run a transaction. settled: move it into the file of the database, which costs more than the transaction."""

        def attempt() -> T:
            with writing(self._engine) as connection:
                return work(connection)

        self._follow()
        with self._fresh_after_errors():
            result = with_retries(attempt)
            if self._file is not None and settled:
                settle(self._engine)
            return result

    def _follow(self) -> None:
        """Open the database again if another file is at its place. Raises StoreError if none is."""
        if self._file is not None and file_identity(self._engine) != self._file:
            self._engine.dispose()
            self._prepare()

    def _prepare(self) -> None:
        """Create or upgrade the tables; a current database is only read, so its file may be read-only."""

        def attempt() -> bool:
            with reading(self._engine) as connection:
                if is_current(connection):
                    return False
            with writing(self._engine) as connection:
                prepare(connection, self.url)
            return True

        with self._fresh_after_errors():
            wrote = with_retries(attempt)
            self._file = file_identity(self._engine)
            if wrote and self._file is not None:
                settle(self._engine)

    @contextmanager
    def _fresh_after_errors(self) -> Iterator[None]:
        """Translate errors, and use new connections after one: the file may have been overwritten."""
        try:
            with translate_errors(self.url):
                yield
        except StoreError:
            if self._file is not None:  # a database in memory lives in its connection
                self._engine.dispose()
            raise


def _locked_version(connection: Connection) -> int:
    """The version of the registry, which no other writer changes before the end of the transaction."""
    return int(connection.execute(select(_state.c.version).with_for_update()).scalar_one())


def _change(
    connection: Connection, add: Sequence[ExpertSpec], remove: Sequence[str], since: int | None
) -> list[ExpertSpec]:
    version = _locked_version(connection)
    if since is not None and version != since:
        raise StaleChange(f"the registry changed meanwhile (version {version}, planned with {since}); try again")
    current = _current(connection)
    if unknown := [name for name in remove if name not in current]:
        raise UnknownExpert(unknown[0], current)
    after = {name: spec for name, spec in current.items() if name not in remove}
    changed = [spec for spec in add if spec.name not in after or not same_content(after[spec.name], spec)]
    aliases = aliases_of.read(connection)
    check_aliases(aliases, add, remove, after)
    then = after | {spec.name: spec for spec in add}
    check_all_references(then | aliases_of.versions(connection, aliases, then), remove)
    for spec in add:
        check_servable(spec)
    for name in remove:
        connection.execute(update(_experts).where(_experts.c.name == name).values(current=False))
    states_of.forget(connection, [name for name in remove if name not in {spec.name for spec in add}])
    after |= {spec.name: _insert(connection, spec) for spec in changed}
    if remove or changed:
        connection.execute(update(_state).values(version=version + 1))
    return [after[spec.name] for spec in add]


def same_content(one: ExpertSpec, other: ExpertSpec) -> bool:
    """Whether two specs are equal except for their versions."""
    return one.model_copy(update={"version": None}) == other.model_copy(update={"version": None})


def _insert(connection: Connection, spec: ExpertSpec) -> ExpertSpec:
    latest = connection.execute(select(func.max(_experts.c.version)).where(_experts.c.name == spec.name)).scalar()
    stored = spec.model_copy(update={"version": (latest or 0) + 1})
    connection.execute(update(_experts).where(_experts.c.name == spec.name).values(current=False))
    connection.execute(
        insert(_experts).values(name=spec.name, version=stored.version, current=True, spec=stored.model_dump_json())
    )
    return stored


def _of_now(current: Mapping[str, ExpertSpec], rows: Iterable[ProfileRow], *, aggregating: bool = False) -> Profiles:
    """The measurements of the current contents of the experts."""
    kept = [row for row in rows if row.expert in current and row.source.startswith(AGGREGATION) == aggregating]
    now = {name: identity(current[name], current) for name in {row.expert for row in kept}}
    return Profiles.of_rows(row for row in kept if now[row.expert] == row.identity)


def _current(connection: Connection) -> dict[str, ExpertSpec]:
    rows = connection.execute(select(_experts.c.spec).where(_experts.c.current).order_by(_experts.c.name)).scalars()
    return {spec.name: spec for spec in map(read_spec, rows)}
