"""The format of the registry's database: new ones are created, old ones upgraded in place, newer ones refused."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import insert, inspect, select
from sqlalchemy.engine import Connection

from registry.errors import StoreError
from registry.tables import SCHEMA, alembic_version, metadata, state

_STEPS = Path(__file__).parent / "migrations"


def is_current(connection: Connection) -> bool:
    """Whether a database has the format of this program, so that nothing needs to be written to open it."""
    return _format(connection) == SCHEMA


def prepare(connection: Connection, shown_url: str) -> None:
    """Bring a database to the format of this program, inside the write transaction.

    Raises:
        StoreError: the database has a format that this program does not know.
    """
    found = _format(connection)
    if found is None:
        _make(connection)
        return
    if found < SCHEMA:
        found = _format(connection, waiting=True)  # waits for a concurrent upgrade
        assert found is not None
    if not 1 <= found <= SCHEMA:
        raise StoreError(
            f"{shown_url} was written by another version of this program (format {found}, here {SCHEMA}): "
            f"upgrade the program, or use another registry"
        )
    if found < SCHEMA:
        _upgrade(connection, found)


def _format(connection: Connection, *, waiting: bool = False) -> int | None:
    """The format of the database; None if it holds no registry yet."""
    if not inspect(connection).has_table(state.name):
        return None
    query = select(state.c.schema)
    return connection.execute(query.with_for_update() if waiting else query).scalar_one_or_none()


def _make(connection: Connection) -> None:
    """Create an empty registry without Alembic, since every `coe ask` creates one in memory; a test compares both."""
    metadata.create_all(connection)
    alembic_version.create(connection, checkfirst=True)
    connection.execute(insert(state).values(id=1, schema=SCHEMA, version=0))
    connection.execute(insert(alembic_version).values(version_num=f"{SCHEMA:04d}"))


def _upgrade(connection: Connection, found: int) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(_STEPS).replace("%", "%%"))
    command.stamp(config, f"{found:04d}", purge=True)  # databases of the first format have no Alembic version
    command.upgrade(config, "head")
