"""Format versions of the database: `data/schema_1.sql` is a dump of a database from before profiles existed."""

from __future__ import annotations

import multiprocessing
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, inspect
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateTable

from registry import schema
from registry.database import open_engine, writing
from registry.errors import StoreError
from registry.spec import ExpertSpec, Kind
from registry.store import Registry
from registry.tables import SCHEMA, metadata

OLD = Path(__file__).parent / "data" / "schema_1.sql"
CONTENT = "SELECT id, name, version, current, spec FROM experts ORDER BY id"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "old.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(OLD.read_text())
    return path


def rows(path: Path, query: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(query).fetchall()


def url(path: Path) -> str:
    return f"sqlite:///{path}"


def test_an_old_registry_is_upgraded_in_place_and_loses_nothing(old: Path) -> None:
    before = rows(old, CONTENT)
    assert len(before) == 4 and rows(old, "SELECT * FROM registry_state") == [(1, 1, 4)]
    with Registry(url(old)) as registry:
        assert [spec.ref for spec in registry.list()] == ["base@2", "sql@1"]
        assert registry.get("base@1").description == "the first" and registry.get("gone@1").name == "gone"
        assert registry.snapshot().version == 4
    assert rows(old, CONTENT) == before
    assert rows(old, "SELECT * FROM registry_state") == [(1, SCHEMA, 4)]
    assert rows(old, "SELECT * FROM alembic_version") == [(f"{SCHEMA:04d}",)]
    assert rows(old, "SELECT count(*) FROM profiles") == [(0,)]
    with Registry(url(old)) as again:
        assert again.add(ExpertSpec(name="new", kind=Kind.MODEL, source="fake://echo")).version == 1


def test_an_upgrade_that_fails_leaves_the_old_registry(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For example, a table of that name exists already."""
    before = rows(old, CONTENT)
    with closing(sqlite3.connect(old)) as connection:
        connection.execute("CREATE TABLE alembic_version (other INTEGER)")
    with pytest.raises(StoreError, match=r"old\.db cannot be used"):
        Registry(url(old))
    assert rows(old, CONTENT) == before and rows(old, "SELECT schema FROM registry_state") == [(1,)]
    assert rows(old, "SELECT name FROM sqlite_master WHERE name = 'profiles'") == []


def _open(path: str, barrier: Any, process: int) -> None:
    barrier.wait()
    with Registry(f"sqlite:///{path}") as registry:
        registry.add(ExpertSpec(name=f"own-{process}", kind=Kind.MODEL, source="fake://echo"))


def test_many_openers_upgrade_it_once(old: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(4)
    openers = [context.Process(target=_open, args=(str(old), barrier, number)) for number in range(4)]
    for opener in openers:
        opener.start()
    for opener in openers:
        opener.join()
        assert opener.exitcode == 0
    assert rows(old, "SELECT * FROM registry_state") == [(1, SCHEMA, 8)]
    assert len(rows(old, CONTENT)) == 8


@pytest.mark.parametrize("number", [0, SCHEMA + 1])
def test_a_format_of_another_program_is_refused_untouched(old: Path, number: int) -> None:
    with closing(sqlite3.connect(old)) as connection, connection:
        connection.execute(f"UPDATE registry_state SET schema = {number}")
    with pytest.raises(StoreError, match=rf"format {number}, here {SCHEMA}\): upgrade the program"):
        Registry(url(old))
    assert rows(old, "SELECT schema FROM registry_state") == [(number,)]


def test_a_new_registry_needs_no_alembic(coe_home: Path) -> None:
    script = (
        "import sys\nfrom registry.store import Registry\n"
        "for url in ('sqlite://', None, None):\n    Registry(url).close()\nprint('alembic' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "COE_HOME": str(coe_home)}, capture_output=True, text=True
    )
    assert (done.stdout.strip(), done.stderr) == ("False", "")
    assert rows(coe_home / "registry.db", "SELECT version_num FROM alembic_version") == [(f"{SCHEMA:04d}",)]


def test_all_steps_from_nothing_give_what_the_program_makes(tmp_path: Path) -> None:
    """Finds a change of the tables without a migration, or a migration that differs from it."""
    from alembic import command
    from alembic.autogenerate import compare_metadata
    from alembic.config import Config
    from alembic.migration import MigrationContext

    stepped, _ = open_engine(url(tmp_path / "stepped.db"))
    with writing(stepped) as connection:
        config = Config(attributes={"connection": connection})
        config.set_main_option("script_location", str(schema._STEPS))
        command.upgrade(config, "head")
    with stepped.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    Registry(url(tmp_path / "made.db")).close()
    made = create_engine(url(tmp_path / "made.db"))
    assert described(stepped) == described(made)
    query = "SELECT id, schema, version FROM registry_state"
    assert rows(tmp_path / "stepped.db", query) == rows(tmp_path / "made.db", query) == [(1, SCHEMA, 0)]
    for engine in (stepped, made):
        engine.dispose()


def described(engine: Any) -> dict[str, Any]:
    """The tables as the database describes them."""
    found = inspect(engine)
    return {
        table: [
            [(column["name"], str(column["type"]), column["nullable"]) for column in found.get_columns(table)],
            found.get_pk_constraint(table)["constrained_columns"],
            sorted(map(str, found.get_unique_constraints(table))),
            sorted(map(str, found.get_indexes(table))),
        ]
        for table in sorted(found.get_table_names())
    }


def test_there_is_a_step_for_every_format() -> None:
    from alembic.script import ScriptDirectory

    steps = ScriptDirectory(str(schema._STEPS))
    assert [step.revision for step in steps.walk_revisions()] == [f"{n:04d}" for n in range(SCHEMA, 0, -1)]


def test_the_tables_are_no_dialect_of_sqlite() -> None:
    made = {
        table.name: str(CreateTable(table).compile(dialect=postgresql.dialect())) for table in metadata.sorted_tables
    }
    assert "score DOUBLE PRECISION NOT NULL" in made["profiles"] and "id SERIAL NOT NULL" in made["profiles"]
