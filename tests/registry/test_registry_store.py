from __future__ import annotations

import multiprocessing
import os
import pickle
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from registry import database, store
from registry.errors import RegistryError, StoreError, UnknownExpert
from registry.spec import COMPOSED_ARCHITECTURES, ExpertSpec, Kind
from registry.store import Registry, Snapshot
from registry.tables import SCHEMA


def spec(name: str, **fields: Any) -> ExpertSpec:
    return ExpertSpec(**{"name": name, "kind": Kind.MODEL, "source": "fake://echo"} | fields)


def adapter(name: str, base: str) -> ExpertSpec:
    return spec(name, kind=Kind.ADAPTER, base=base)


def composed(name: str, *members: str) -> ExpertSpec:
    return spec(name, kind=Kind.COMPOSED, source="", members=members, architecture="pairs")


@pytest.fixture
def pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that serves composed experts of one architecture."""
    monkeypatch.setitem(COMPOSED_ARCHITECTURES, "pairs", "fake")


@pytest.fixture
def registry() -> Iterator[Registry]:
    with Registry() as opened:
        yield opened


def test_the_default_is_sqlite_in_the_home(registry: Registry, coe_home: Path) -> None:
    assert registry.url == f"sqlite:///{coe_home}/registry.db" and (coe_home / "registry.db").exists()
    assert registry.list() == [] and registry.snapshot().version == 0


def test_the_same_content_keeps_its_version(registry: Registry) -> None:
    first = registry.add(spec("a", description="one"))
    assert first.ref == "a@1" and registry.add(spec("a", description="one")) == first == registry.add(first)
    assert registry.snapshot().version == 1
    second = registry.add(spec("a", description="two"))
    assert second.ref == "a@2" and registry.snapshot().version == 2
    assert registry.get("a") == second and registry.get("a@1") == first
    assert registry.list() == [second]


def test_a_removed_name_comes_back_with_a_new_version(registry: Registry) -> None:
    registry.add(spec("a"))
    registry.remove("a")
    assert registry.list() == [] and registry.get("a@1").name == "a"
    assert registry.add(spec("a")).version == 2
    assert registry.change([spec("a")], remove=["a"])[0].version == 3


def test_it_is_all_still_there_after_reopening(registry: Registry) -> None:
    added = registry.add(spec("a", tags={"x"}))
    registry.close()
    with Registry() as again:
        assert again.get("a") == added


def test_unknown_names_have_suggestions(registry: Registry) -> None:
    registry.add(spec("smol"))
    with pytest.raises(UnknownExpert, match="did you mean 'smol'"):
        registry.get("smoll")
    with pytest.raises(UnknownExpert, match="'smol@7' is not in the registry; did you mean 'smol@1'"):
        registry.get("smol@7")
    with pytest.raises(UnknownExpert, match=r"'smoll@1' .* did you mean 'smol'"):
        registry.get("smoll@1")
    with pytest.raises(UnknownExpert, match="did you mean 'smol'"):
        registry.remove("smo")


def test_a_composed_expert_that_no_engine_serves_is_refused_at_registration(registry: Registry) -> None:
    registry.change([spec("a"), spec("b")])
    with pytest.raises(RegistryError, match=r"no engine serves .*'both'.*called as `coe/both`"):
        registry.add(composed("both", "a", "b"))
    assert "both" not in registry.snapshot()


@pytest.mark.usefixtures("pairs")
def test_references_must_be_there_and_of_the_right_kind(registry: Registry) -> None:
    with pytest.raises(UnknownExpert, match="'base'"):
        registry.add(adapter("a", "base"))
    registry.change([adapter("a", "base"), spec("base")])  # in any order
    with pytest.raises(RegistryError, match="the base of 'b' must be a model, but 'a' is of kind 'adapter'"):
        registry.add(adapter("b", "a"))
    registry.add(composed("both", "a", "base"))
    with pytest.raises(RegistryError, match="'both', a member of 'c', is of kind 'composed'"):
        registry.add(composed("c", "both", "a"))
    with pytest.raises(RegistryError, match="the base of 'a' must be a model"):
        registry.add(spec("base", kind=Kind.EMBEDDING))
    assert registry.snapshot().version == 2


def test_adapters_that_are_mixed_by_token_have_one_base(registry: Registry) -> None:
    registry.change([spec("base"), spec("other"), adapter("a", "base"), adapter("b", "base"), adapter("c", "other")])

    def mix(*members: str) -> ExpertSpec:
        return composed("mix", *members).model_copy(update={"architecture": "lora-mix"})

    registry.add(mix("a", "b"))
    with pytest.raises(RegistryError, match="one base, but 'a' is an adapter of 'base', 'c' is an adapter of 'other'"):
        registry.add(mix("a", "c"))
    with pytest.raises(RegistryError, match="'base' is a model"):
        registry.add(mix("a", "base"))
    with pytest.raises(RegistryError, match="'base' is a model, 'other' is a model"):
        registry.add(mix("base", "other"))


def test_key_value_entries_are_read_on_one_model(registry: Registry) -> None:
    registry.change([spec("base"), spec("other"), adapter("a", "base"), adapter("b", "base"), adapter("c", "other")])

    def cache(*members: str) -> ExpertSpec:
        return composed("it", *members).model_copy(update={"architecture": "cache", "source": "folder"})

    registry.add(cache("base", "a", "b"))
    registry.add(cache("a", "b"))
    with pytest.raises(
        RegistryError, match="one model and adapters of it, but 'a' is an adapter of 'base', 'other' is a m"
    ):
        registry.add(cache("a", "other"))
    with pytest.raises(RegistryError, match="'c' is an adapter of 'other'"):
        registry.add(cache("base", "c"))


@pytest.mark.usefixtures("pairs")
def test_what_others_need_stays(registry: Registry) -> None:
    registry.change([spec("base"), adapter("a", "base"), composed("c", "a", "base")])
    with pytest.raises(RegistryError, match="'base' cannot be removed: a, c need it; remove these first"):
        registry.remove("base")
    with pytest.raises(RegistryError, match="'a' cannot be removed: c need it"):
        registry.remove("a")
    assert len(registry.list()) == 3
    registry.change(remove=["base", "c", "a"])
    assert registry.list() == []


def test_a_change_is_all_or_nothing(registry: Registry) -> None:
    with pytest.raises(UnknownExpert):
        registry.change([spec("a"), adapter("b", "absent")])
    with pytest.raises(UnknownExpert):
        registry.change([spec("a")], remove=["absent"])
    assert registry.list() == [] and registry.snapshot().version == 0


def test_a_snapshot_does_not_change_and_travels(registry: Registry) -> None:
    registry.change([spec("a"), spec("b")])
    snapshot = registry.snapshot()
    registry.remove("b")
    assert list(snapshot) == ["a", "b"] and len(snapshot) == 2 and "b" in snapshot and "c" not in snapshot
    with pytest.raises(TypeError):
        snapshot.experts["c"] = spec("c")  # type: ignore[index]
    copy = pickle.loads(pickle.dumps(snapshot))
    assert copy == snapshot and copy.version == 1 and isinstance(copy, Snapshot)


def test_a_snapshot_resolves_names_with_their_version(registry: Registry) -> None:
    registry.add(spec("a"))
    registry.add(spec("a", description="two"))
    snapshot = registry.snapshot()
    assert snapshot.get("a") == snapshot.get("a@2")
    with pytest.raises(UnknownExpert, match=r"'a@1' .*did you mean 'a@2'"):
        snapshot.get("a@1")
    with pytest.raises(UnknownExpert):
        snapshot.get("b@1")


def _register(home: str, process: int, count: int) -> None:
    os.environ["COE_HOME"] = home
    with Registry() as registry:
        for number in range(count):
            registry.add(spec(f"own-{process}-{number}"))
            registry.add(spec("shared", description=f"{process}-{number}"))
            registry.add(spec("same"))


def test_many_writers_lose_nothing(coe_home: Path) -> None:
    """They also create the database concurrently."""
    processes, count = 4, 5
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_register, args=(str(coe_home), n, count)) for n in range(processes)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    with Registry() as registry:
        snapshot = registry.snapshot()
        assert len(snapshot) == processes * count + 2
        assert snapshot.get("shared").version == processes * count
        assert snapshot.get("same").version == 1
        assert snapshot.version == 2 * processes * count + 1
        said = {registry.get(f"shared@{version}").description for version in range(1, processes * count + 1)}
        assert said == {f"{process}-{number}" for process in range(processes) for number in range(count)}


def test_readers_do_not_wait_for_a_writer(registry: Registry, coe_home: Path) -> None:
    registry.add(spec("a"))
    writer = sqlite3.connect(coe_home / "registry.db", isolation_level=None)
    try:
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("DELETE FROM experts")
        assert [expert.name for expert in registry.list()] == ["a"]
        writer.execute("ROLLBACK")
    finally:
        writer.close()


def test_any_sqlite_file_will_do(tmp_path: Path) -> None:
    with Registry(f"sqlite:///{tmp_path}/x.db") as registry:
        registry.add(spec("a"))
    with Registry(f"sqlite:///{tmp_path}/x.db") as registry:
        assert registry.get("a").version == 1


def test_a_database_in_memory(registry: Registry) -> None:
    with Registry("sqlite://") as memory:
        assert memory.add(spec("a")).version == 1
        assert registry.list() == []


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("registry.db", "'registry.db' is not a database URL, such as sqlite:///"),
        ("postgresql://u:secret@host:port/db", r"'postgresql://\*\*\*@host:port/db' is not a database URL"),
        ("nosuch://u:secret@host/db", r"no driver for nosuch://u:\*\*\*@host/db is installed"),
        ("mssql+pyodbc://u:secret@h/db", r"no driver for mssql\+pyodbc://u:\*\*\*@h/db is installed"),
        ("sqlite:////nowhere/at/all/x.db", "cannot be used: unable to open database file"),
    ],
)
def test_unusable_urls_say_why(url: str, message: str) -> None:
    with pytest.raises(StoreError, match=message) as caught:
        Registry(url)
    assert "secret" not in str(caught.value)


def test_postgres_has_two_spellings() -> None:
    for scheme in ("postgres", "postgresql"):
        engine, shown = database.open_engine(f"{scheme}://coe:secret@host/db")
        assert engine.dialect.driver == "psycopg" and shown == "postgresql://coe:***@host/db"


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "x.db").write_text("this is not a database, it is a letter " * 50)
    with pytest.raises(StoreError, match=r"x\.db cannot be used: file is not a database"):
        Registry(f"sqlite:///{tmp_path}/x.db")


def test_a_home_that_cannot_be_made(coe_home: Path) -> None:
    coe_home.write_text("a file")
    with pytest.raises(StoreError, match=r"cannot be created: .* set COE_HOME to another"):
        Registry()


def test_a_registry_of_another_format(registry: Registry, coe_home: Path) -> None:
    connection = sqlite3.connect(coe_home / "registry.db")
    with connection:
        connection.execute("UPDATE registry_state SET schema = 99")
    connection.close()
    with pytest.raises(StoreError, match=rf"format 99, here {SCHEMA}\): upgrade the program, or use another registry"):
        Registry()


def test_a_full_disk_is_said_clearly(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    def insert(connection: object, new: object) -> None:
        raise OperationalError("INSERT", {}, sqlite3.OperationalError("database or disk is full"))

    monkeypatch.setattr(store, "_insert", insert)
    with pytest.raises(StoreError, match="cannot be written: the disk is full; nothing changed"):
        registry.add(spec("a"))
    assert registry.list() == []


def test_contention_is_tried_again_and_logged_not_printed(
    registry: Registry,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    original, tries = store._insert, []

    def insert(connection: Any, new: ExpertSpec) -> ExpertSpec:
        tries.append(new.name)
        if len(tries) < 3:
            raise OperationalError("INSERT", {}, sqlite3.OperationalError("database is locked"))
        return original(connection, new)

    monkeypatch.setattr(store, "_insert", insert)
    assert registry.add(spec("a")).version == 1
    assert len(tries) == 3 and registry.snapshot().version == 1
    assert capfd.readouterr().out == "", "stdout is for results"
    assert [record.name for record in caplog.records] == ["stamina"] * 2


def test_a_row_that_another_writer_made_first_is_tried_again(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A database that does not queue its writers reports a violated constraint."""
    original, tries = store._insert, []

    def insert(connection: Any, new: ExpertSpec) -> ExpertSpec:
        tries.append(new.name)
        if len(tries) == 1:
            connection.execute(store._experts.insert().values(name="a", version=1, current=True, spec="{}"))
        return original(connection, new)

    registry.add(spec("a"))
    monkeypatch.setattr(store, "_insert", insert)
    assert registry.add(spec("b")).version == 1
    assert tries == ["b", "b"] and [expert.name for expert in registry.list()] == ["a", "b"]


def test_any_failure_of_the_database_is_ours() -> None:
    with pytest.raises(StoreError, match="the registry db cannot be used: odd"), database.translate_errors("db"):
        raise SQLAlchemyError("odd")


class FakeSqlite:
    """A connection whose journal cannot be switched."""

    isolation_level: str | None = ""

    def __init__(self, error: str) -> None:
        self.error = error

    def execute(self, statement: str) -> FakeSqlite:
        if "=" in statement:
            raise sqlite3.OperationalError(self.error)
        return self

    def fetchone(self) -> tuple[str]:
        return ("delete",)


@pytest.mark.parametrize("error", ["database is locked", "attempt to write a readonly database"])
def test_a_journal_that_stays_as_it_is(error: str) -> None:
    database._prepare_sqlite(FakeSqlite(error), None)  # type: ignore[arg-type]


def test_other_failures_of_the_journal_are_not_hidden() -> None:
    with pytest.raises(sqlite3.OperationalError, match="disk I/O"):
        database._prepare_sqlite(FakeSqlite("disk I/O error"), None)  # type: ignore[arg-type]


def test_an_expert_stored_with_a_password_is_read_without_it(
    registry: Registry, coe_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fields = {"kind": Kind.REMOTE, "source": "https://host:8000/v1", "context_length": 9}
    registry.add(spec("far", **fields))
    registry.add(spec("near"))
    with sqlite3.connect(coe_home / "registry.db") as connection:
        connection.execute("UPDATE experts SET spec = replace(spec, '//host', '//user:hunter22@host')")
    found = registry.snapshot().get("far")
    assert found.source == "https://host:8000/v1" and registry.get("far@1") == found
    assert "'far' is registered with a user name or password" in caplog.text and "hunter22" not in caplog.text
    registry.remove("far")
    assert [each.name for each in registry.list()] == ["near"]


def test_a_stored_spec_that_this_version_cannot_read_is_a_clear_error(registry: Registry, coe_home: Path) -> None:
    registry.add(spec("new"))
    with sqlite3.connect(coe_home / "registry.db") as connection:
        connection.execute("UPDATE experts SET spec = json_set(spec, '$.kind', 'hologram')")
    with pytest.raises(StoreError, match="the registered expert 'new' cannot be read by this version .kind: Input"):
        registry.snapshot()
