"""`coe alias`, `coe promote` and `coe rollback`: the registry changes, the output says to what, errors are one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from coe.cli.app import app
from registry.errors import RegistryError
from registry.spec import ExpertSpec, Kind
from registry.store import Registry


@pytest.fixture
def url(tmp_path: Path) -> str:
    url = f"sqlite:///{tmp_path / 'registry.db'}"
    with Registry(url) as registry:
        for source in ("fake://echo", "fake://upper"):
            registry.add(ExpertSpec(name="sql", kind=Kind.MODEL, source=source))
    return url


def run(url: str, *arguments: str) -> Any:
    return CliRunner().invoke(app, [*arguments, "--registry", url], env={"COLUMNS": "200"})


def test_an_alias_is_set_moved_rolled_back_listed_and_deleted(url: str) -> None:
    assert "there are no aliases" in run(url, "alias", "list").stdout
    assert run(url, "alias", "set", "prod", "sql@1").stderr == "prod points to sql@1\n"
    assert run(url, "promote", "prod", "2").stderr == "prod points to sql@2\n"
    assert json.loads(run(url, "rollback", "prod", "--json", "-").stdout)["version"] == 1
    [alias] = json.loads(run(url, "alias", "list", "--json", "-").stdout)["aliases"]
    assert (alias["name"], alias["expert"], alias["version"]) == ("prod", "sql", 1)
    assert alias["moved_by"].startswith("user ")
    assert "sql@1" in run(url, "alias", "list").stdout and "user" in run(url, "alias", "history", "prod").stdout
    moves = json.loads(run(url, "alias", "history", "prod", "--json", "-").stdout)["moves"]
    assert [(move["alias"]["version"], move["undone_at"] is None) for move in moves] == [(1, True), (2, False)]
    assert run(url, "alias", "delete", "prod").stderr == "deleted prod, which pointed to sql@1\n"
    with Registry(url) as registry:
        assert not registry.snapshot().aliases


def test_what_is_not_there_is_named(url: str) -> None:
    run(url, "alias", "set", "prod", "sql")
    for words, arguments in (
        ("'sql@9' is not in the registry", ("promote", "prod", "9")),
        ("there is no alias 'pro'; did you mean 'prod'", ("promote", "pro", "1")),
        ("has no earlier target than sql@2", ("rollback", "prod")),
        ("'sql' is an expert", ("alias", "set", "sql", "sql@1")),
    ):
        result = run(url, *arguments)
        assert isinstance(result.exception, RegistryError) and words in str(result.exception)
