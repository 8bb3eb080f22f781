"""The registry on a real Postgres server: the same promises as in a file of SQLite."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import servers
from sqlalchemy import create_engine, text

from registry.errors import StoreError
from registry.keys import KeySpec
from registry.spec import ExpertSpec, Kind
from registry.store import Registry
from registry.tables import SCHEMA

NOW = 1_900_000_000.0


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with servers.postgres() as url:
        yield url


@pytest.fixture
def url(server: str) -> Iterator[str]:
    yield server
    engine = create_engine(server)
    with engine.begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    engine.dispose()


def spec(name: str, description: str = "") -> ExpertSpec:
    return ExpertSpec(name=name, kind=Kind.MODEL, source="fake://echo", description=description)


def test_experts_keep_their_versions(url: str) -> None:
    with Registry(url) as registry:
        assert registry.add(spec("a", "one")).ref == "a@1" and registry.add(spec("a", "two")).ref == "a@2"
        registry.remove("a")
    with Registry(url) as registry:
        assert registry.add(spec("a", "three")).ref == "a@3"
        assert registry.get("a@1").description == "one" and [each.ref for each in registry.list()] == ["a@3"]
        assert registry.url == url and registry.snapshot().version == 4


def test_a_database_is_made_once_by_many_that_open_it_together(url: str) -> None:
    def write(number: int) -> int:
        with Registry(url) as registry:
            return registry.add(spec(f"e{number}")).version

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(write, range(8))) == [1] * 8
    with Registry(url) as registry:
        assert registry.snapshot().version == 8 and len(registry.list()) == 8, "no writer lost what another wrote"
    engine = create_engine(url)
    with engine.connect() as connection:
        assert connection.execute(text("SELECT version_num FROM alembic_version")).scalars().all() == [f"{SCHEMA:04d}"]
    engine.dispose()


def test_writers_of_one_expert_get_versions_in_a_row(url: str) -> None:
    registries = [Registry(url) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: registries[i % 4].add(spec("a", str(i))).version, range(16)))
    assert sorted(found) == [*range(1, 17)]
    for registry in registries:
        registry.close()


def test_a_reader_sees_one_moment(url: str) -> None:
    with Registry(url) as registry, Registry(url) as other:
        registry.add(spec("a"))
        with registry._read() as connection:
            before = connection.execute(text("SELECT version FROM registry_state")).scalar_one()
            other.add(spec("b"))
            assert connection.execute(text("SELECT version FROM registry_state")).scalar_one() == before
        assert registry.snapshot().version == before + 1


def test_keys_are_those_of_every_gateway(url: str) -> None:
    with Registry(url) as registry, Registry(url) as other:
        key, _ = registry.create_api_key(KeySpec(name="ada"), NOW)
        assert [each.id for each in other.api_keys()] == [key.id]
        other.revoke_api_key("ada", NOW)
        assert [each.state(NOW) for each in registry.api_keys()] == ["revoked"]


def test_a_server_that_is_gone_is_said_without_its_password() -> None:
    with pytest.raises(StoreError, match=r"postgresql\+psycopg://coe:\*\*\*@127\.0\.0\.1:1/coe cannot be used") as said:
        Registry("postgresql+psycopg://coe:secret@127.0.0.1:1/coe").snapshot()
    assert "secret" not in str(said.value)
