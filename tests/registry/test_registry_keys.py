"""API keys: their secrets are not stored, and a revoked key is never valid again."""

from __future__ import annotations

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from pydantic import ValidationError

from registry.errors import RegistryError
from registry.keys import ApiKey, KeySpec, matches, read_key
from registry.store import Registry

NOW = 1_800_000_000.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "registry.db"


def open_(path: Path) -> Registry:
    return Registry(f"sqlite:///{path}")


def secret_of(text: str) -> str:
    found = read_key(text)
    assert found is not None
    return found[1]


def test_a_key_is_found_by_its_id_and_its_secret_is_nowhere_in_the_database(path: Path) -> None:
    with open_(path) as registry:
        key, text = registry.create_api_key(KeySpec(name="ada", experts=("sql-*",), admin=True), NOW)
        [stored] = registry.api_keys()
    assert stored == key and stored.spec.experts == ("sql-*",)
    assert read_key(text) == (key.id, secret_of(text)) and len(secret_of(text)) == 43  # 256 bits in base64
    assert stored.why_invalid(secret_of(text), NOW) is None
    assert secret_of(text).encode() not in b"".join(each.read_bytes() for each in path.parent.iterdir())
    assert key.digest not in repr(key)


def test_another_secret_is_refused(path: Path) -> None:
    key, text = ApiKey.made(KeySpec(name="ada"), NOW)
    _, other = ApiKey.made(KeySpec(name="ada"), NOW)
    secret = secret_of(text)
    for wrong in (secret_of(other), secret[:-1], secret + "A", "", secret.swapcase()):
        assert key.why_invalid(wrong, NOW) == "it is not a key of this service"


def test_it_ends_when_it_expires_or_is_revoked(path: Path) -> None:
    with open_(path) as registry:
        ends, ends_text = registry.create_api_key(KeySpec(name="ends", expires_at=NOW + 60), NOW)
        stays, stays_text = registry.create_api_key(KeySpec(name="stays"), NOW)
        assert ends.why_invalid(secret_of(ends_text), NOW + 59.9) is None
        assert ends.why_invalid(secret_of(ends_text), NOW + 60) == "the key expired at 2027-01-15 08:01:00Z"
        before = registry.api_keys_revision()
        gone = registry.revoke_api_key("stays", NOW + 5)
        assert registry.api_keys_revision() != before
        assert registry.api_keys() == [ends, gone] or registry.api_keys() == [gone, ends]
    assert gone.id == stays.id and gone.revoked_at == NOW + 5
    assert gone.why_invalid(secret_of(stays_text), NOW + 5) == "the key was revoked"
    assert (ends.state(NOW), ends.state(NOW + 60), gone.state(NOW)) == ("active", "expired", "revoked")


def test_names_are_those_of_one_key_in_use(path: Path) -> None:
    with open_(path) as registry:
        first, _ = registry.create_api_key(KeySpec(name="ada"), NOW)
        with pytest.raises(RegistryError, match=rf"the key {first.id} has the name 'ada'"):
            registry.create_api_key(KeySpec(name="ada"), NOW)
        registry.revoke_api_key(first.id, NOW)
        second, _ = registry.create_api_key(KeySpec(name="ada"), NOW)
        assert registry.revoke_api_key("ada", NOW).id == second.id
        for gone in ("ada", first.id, "nobody"):
            with pytest.raises(RegistryError, match="no key in use has the id or the name"):
                registry.revoke_api_key(gone, NOW)


def test_the_experts_of_a_registry_and_its_version_are_unchanged(path: Path) -> None:
    with open_(path) as registry:
        before = registry.revision()
        registry.create_api_key(KeySpec(name="ada"), NOW)
        assert registry.revision() == before  # a service does not read its experts again


def test_keys_are_created_side_by_side(path: Path) -> None:
    open_(path).close()

    def create(number: int) -> str:
        with open_(path) as registry:
            return registry.create_api_key(KeySpec(name=f"k{number}"), NOW)[0].id

    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(create, range(24)))
    with open_(path) as registry:
        assert {key.id for key in registry.api_keys()} == set(ids) and len(set(ids)) == 24
        assert registry.api_keys_revision()[1] == 24
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(DISTINCT change) FROM api_keys").fetchone() == (24,)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("coe-0123456789ab-" + "A" * 43, True),
        ("coe-0123456789ab-" + "-_" * 21 + "x", True),
        ("coe-0123456789ab-" + "A" * 42, False),
        ("coe-0123456789ab-" + "A" * 43 + "\n", False),
        ("coe-0123456789AB-" + "A" * 43, False),
        ("sk-0123456789ab-" + "A" * 43, False),
        ("coe-0123456789ab-" + "é" * 43, False),
        ("none", False),
        ("", False),
        ("A" * 100_000, False),
    ],
)
def test_the_form_of_a_key(text: str, found: bool) -> None:
    assert (read_key(text) is not None) is found


@pytest.mark.parametrize(
    ("name", "patterns", "found"),
    [
        ("sql", None, True),
        ("sql", (), False),
        ("sql", ("sql",), True),
        ("sql-2", ("sql",), False),
        ("sql-2", ("sql-*",), True),
        ("team/sql", ("team/*", "x"), True),
        ("SQL", ("sql",), False),
    ],
)
def test_patterns(name: str, patterns: tuple[str, ...] | None, found: bool) -> None:
    assert matches(name, patterns) is found


@pytest.mark.parametrize(
    "fields",
    [
        {"name": ""},
        {"name": "a b"},
        {"name": "x" * 129},
        {"name": "a", "experts": ("",)},
        {"name": "a", "experts": ("[abc]",)},
        {"name": "a", "experts": ("x",) * 257},
        {"name": "a", "nonsense": 1},
    ],
)
def test_a_key_that_says_nonsense_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        KeySpec.model_validate(fields)


def test_keys_of_the_format_before_priorities_have_normal_priority(path: Path) -> None:
    url = f"sqlite:///{path}"
    with Registry(url) as registry:
        key, _ = registry.create_api_key(KeySpec(name="ada"), NOW)
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(
            "ALTER TABLE api_keys DROP COLUMN priority; UPDATE registry_state SET schema = 5; "
            "UPDATE alembic_version SET version_num = '0005'"
        )
    with Registry(url) as registry:
        assert registry.api_keys() == [key] and key.spec.priority == "normal"
        registry.create_api_key(KeySpec(name="bob", priority="low"), NOW + 1)
        assert [each.spec.priority for each in registry.api_keys()] == ["normal", "low"]
