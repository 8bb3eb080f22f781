"""`coe keys`: the key is printed once, on stdout alone, and lists show what each may be used for."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import servers
from typer.testing import CliRunner, Result

from coe.cli.keys import app
from registry.errors import RegistryError
from registry.keys import read_key
from registry.spec import ExpertSpec, Kind
from registry.store import Registry
from registry.usage import Settle
from registry.usage_redis import RedisUsage


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'keys.db'}"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def test_the_key_alone_is_on_stdout_and_works(url: str) -> None:
    made = run("create", "ada", "--registry", url)
    assert made.exit_code == 0 and "this is the first key" in made.stderr and "shown only now" in made.stderr
    found = read_key(made.stdout.removesuffix("\n"))
    assert found is not None
    with Registry(url) as registry:
        [key] = registry.api_keys()
    assert key.id == found[0] and key.why_invalid(found[1], time.time()) is None
    assert found[1] not in made.stderr
    assert "first key" not in run("create", "bob", "--registry", url).stderr


def test_what_it_may_be_used_for_is_stored_and_listed(url: str) -> None:
    with Registry(url) as registry:
        registry.add(ExpertSpec(name="sql", kind=Kind.MODEL, source="fake://echo"))
    options = (
        "--priority",
        "high",
        "--expert",
        "sql",
        "--expert",
        "law-*",
        "--policy",
        "default",
        "--admin",
        "--metrics",
        "--days",
        "30",
    )
    made = run("create", "team", *options, "--registry", url, "--json", "-")
    document = json.loads(made.stdout)
    assert "no registered expert is law-* yet" in made.stderr
    listed = json.loads(run("list", "--registry", url, "--json", "-").stdout)["keys"]
    assert listed == [{name: value for name, value in document.items() if name != "key"} | {"used": []}]
    assert read_key(document["key"])[0] == document["id"]  # type: ignore[index]
    assert document["experts"] == ["sql", "law-*"] and document["policies"] == ["default"]
    assert document["priority"] == "high"
    assert document["admin"] and document["metrics"] and document["state"] == "active"
    assert document["expires_at"] == pytest.approx(time.time() + 30 * 86_400, abs=60)


def test_a_revoked_key_stays_in_the_list(url: str) -> None:
    run("create", "ada", "--registry", url)
    gone = run("revoke", "ada", "--registry", url)
    assert gone.exit_code == 0 and "no key is valid now" in gone.stderr
    [key] = json.loads(run("list", "--registry", url, "--json", "-").stdout)["keys"]
    assert key["state"] == "revoked" and key["revoked_at"] == pytest.approx(time.time(), abs=60)
    assert "revoked" in run("list", "--registry", url).stdout
    again = run("revoke", "ada", "--registry", url)
    assert isinstance(again.exception, RegistryError)


def test_limits_are_stored_and_listed_with_what_is_used(url: str) -> None:
    limits = ("--limit", "requests=60/minute", "--limit", "tokens=2_000_000/day", "--limit", "usd=0.5/month")
    assert run("create", "app", *limits, "--registry", url).exit_code == 0
    with Registry(url) as registry:
        [key] = registry.api_keys()
        used = {"tokens": 1234.0, "usd": 0.25}
        registry.account([Settle("r", key.id, key.spec.limits, used)], time.time())
    assert [str(limit) for limit in key.spec.limits] == ["requests=60/minute", "tokens=2,000,000/day", "usd=0.5/month"]
    [listed] = json.loads(run("list", "--registry", url, "--json", "-").stdout)["keys"]
    assert listed["used"] == [0, 1234, 0.25]
    assert listed["limits"][0] == {"what": "requests", "per": "minute", "most": 60}
    shown = " ".join(run("list", "--registry", url).stdout.split())
    assert "1,234" in shown


def test_usage_is_read_from_redis_where_it_is_kept_there(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("create", "app", "--limit", "tokens=2_000_000/day", "--registry", url).exit_code == 0
    with Registry(url) as registry, servers.redis() as there, RedisUsage(there) as accounts:
        [key] = registry.api_keys()
        accounts.account([Settle("r", key.id, key.spec.limits, {"tokens": 77})], time.time())
        monkeypatch.setenv("USAGE", there)
        command = ("list", "--usage-url-env", "USAGE", "--registry", url, "--json", "-")
        [listed] = json.loads(run(*command).stdout)["keys"]
        assert listed["used"] == [77]
    monkeypatch.delenv("USAGE")
    assert "the environment variable USAGE is not set" in str(run(*command).exception)


@pytest.mark.parametrize(
    "limit", ["60", "requests=60", "requests=0/minute", "money=1/day", "usd=nan/day", "usd=1/year"]
)
def test_a_limit_that_says_nonsense_is_refused(url: str, limit: str) -> None:
    refused = run("create", "a", "--limit", limit, "--registry", url)
    assert refused.exit_code == 2 and "is no limit" in refused.output


@pytest.mark.parametrize("arguments", [("a b",), ("a", "--expert", "[x]"), ("a", "--days", "-1"), ("",)])
def test_nonsense_is_refused_before_anything_is_stored(url: str, arguments: tuple[str, ...]) -> None:
    assert run("create", *arguments, "--registry", url).exit_code == 2
    assert "there are no keys" in run("list", "--registry", url).stderr
