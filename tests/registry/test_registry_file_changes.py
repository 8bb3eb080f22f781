"""A registry whose database file changes while it is open: replaced, removed, overwritten, locked, read-only."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from registry import store
from registry.errors import StoreError
from registry.spec import ExpertSpec, Kind
from registry.store import Registry

OLD = Path(__file__).parent / "data" / "schema_1.sql"


def url(path: Path) -> str:
    return f"sqlite:///{path}"


def written(path: Path, *names: str) -> Path:
    """A database with these experts, in one file."""
    with Registry(url(path)) as made:
        made.change([ExpertSpec(name=name, kind=Kind.MODEL, source="fake://echo") for name in names])
    assert not path.with_name(f"{path.name}-wal").exists(), "the last connection wrote everything to the file"
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return written(tmp_path / "registry.db", "a")


@pytest.fixture
def registry(path: Path) -> Iterator[Registry]:
    with Registry(url(path)) as opened:
        yield opened


def test_a_file_in_its_place_is_opened_even_if_its_version_is_the_same(
    registry: Registry, path: Path, tmp_path: Path
) -> None:
    before = registry.revision()
    assert set(registry.snapshot()) == {"a"} and registry.revision() == before
    other = written(tmp_path / "other.db", "b")
    with Registry(url(other)) as same:
        assert same.revision()[1] == before[1]
    other.replace(path)
    assert registry.revision() != before and set(registry.snapshot()) == {"b"}
    registry.add(ExpertSpec(name="c", kind=Kind.MODEL, source="fake://echo"))
    with Registry(url(path)) as again:
        assert set(again.snapshot()) == {"b", "c"}, "written to the file that is there now"


def test_a_file_that_is_removed_is_said_and_not_made_again_and_used_when_it_is_back(
    registry: Registry, path: Path, tmp_path: Path
) -> None:
    path.rename(tmp_path / "aside.db")
    for use in (registry.snapshot, registry.revision, lambda: registry.remove("a")):
        with pytest.raises(StoreError, match=r"registry\.db cannot be used: its file no such file.*registry apply"):
            use()
    assert not path.exists()
    (tmp_path / "aside.db").rename(path)
    assert set(registry.snapshot()) == {"a"}


@pytest.mark.parametrize("in_place", [True, False], ids=["overwritten", "replaced"])
def test_garbage_is_an_error_until_a_database_is_back(
    registry: Registry, path: Path, tmp_path: Path, in_place: bool
) -> None:
    whole = Path(shutil.copy(path, tmp_path / "whole.db"))
    junk = tmp_path / "junk.db"
    junk.write_text("this is not a database, it is a letter " * 500)
    assert set(registry.snapshot()) == {"a"}
    if in_place:
        shutil.copy(junk, path)
    else:
        junk.replace(path)
    for _ in range(2):
        with pytest.raises(StoreError, match=r"registry\.db cannot be used"):
            registry.snapshot()
    whole.replace(path)
    assert set(registry.snapshot()) == {"a"}


def test_an_older_format_in_its_place_is_upgraded_and_a_newer_one_refused(
    registry: Registry, path: Path, tmp_path: Path
) -> None:
    old = tmp_path / "old.db"
    with sqlite3.connect(old) as connection:
        connection.executescript(OLD.read_text())
    connection.close()
    old.replace(path)
    assert registry.snapshot().version > 0
    newer = written(tmp_path / "newer.db", "a")
    with sqlite3.connect(newer) as connection:
        connection.execute("UPDATE registry_state SET schema = 99")
    connection.close()
    newer.replace(path)
    with pytest.raises(StoreError, match="format 99"):
        registry.snapshot()


def test_a_locked_database_is_an_error_of_this_use_only(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("registry.database._BUSY_TIMEOUT_S", 0.05)
    monkeypatch.setattr(store, "with_retries", lambda work: work())
    with Registry(url(path)) as registry:
        holder = sqlite3.connect(path, isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="locked"):
            registry.remove("a")
        assert set(registry.snapshot()) == {"a"}, "readers do not wait for a writer"
        holder.close()
        registry.remove("a")
        assert set(registry.snapshot()) == set()


def test_a_current_database_is_opened_without_a_write(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file or disk that is read-only can be served from."""

    def writing(engine: object) -> None:
        raise AssertionError("a write")

    monkeypatch.setattr(store, "writing", writing)
    with Registry(url(path)) as registry:
        assert set(registry.snapshot()) == {"a"}
    with Registry(f"sqlite:///file:{path}?mode=ro&uri=true") as registry:
        assert set(registry.snapshot()) == {"a"}


def test_a_read_only_database_says_so_when_it_is_written(path: Path) -> None:
    with Registry(f"sqlite:///file:{path}?mode=ro&uri=true") as registry:
        with pytest.raises(StoreError, match="readonly"):
            registry.remove("a")
        assert set(registry.snapshot()) == {"a"}


def test_a_database_in_memory_survives_an_error() -> None:
    with Registry("sqlite://") as registry:
        registry.add(ExpertSpec(name="a", kind=Kind.MODEL, source="fake://echo"))
        with pytest.raises(StoreError), registry._read() as connection:
            connection.exec_driver_sql("SELECT nothing FROM nowhere")
        assert set(registry.snapshot()) == {"a"} and registry.revision() == registry.revision()


def test_after_a_change_the_file_alone_is_the_whole_registry(registry: Registry, path: Path, tmp_path: Path) -> None:
    """Otherwise a copy lacks the change, and a file put in its place is mixed with the log of the old one."""
    assert set(registry.snapshot()) == {"a"}  # a reader's connection stays open, so closing the writer's is not enough
    with Registry(url(path)) as writer:
        writer.add(ExpertSpec(name="b", kind=Kind.MODEL, source="fake://echo"))
        with Registry(url(Path(shutil.copy(path, tmp_path / "copy.db")))) as copy:
            assert set(copy.snapshot()) == {"a", "b"}
        written(tmp_path / "other.db", "c").replace(path)
        assert set(writer.snapshot()) == set(registry.snapshot()) == {"c"}
