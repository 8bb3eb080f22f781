"""Limits of API keys: windows of the calendar, reservations, and what several writers may use together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import servers

from registry.errors import StoreError
from registry.keys import ApiKey, KeySpec, Limit
from registry.store import Registry
from registry.usage import Reserve, Settle, window
from registry.usage_redis import RedisUsage

NOW = datetime(2028, 2, 29, 23, 59, 30, tzinfo=UTC).timestamp()
LATER = NOW + 600


Accounts = Registry | RedisUsage
Open = Callable[[], Accounts]


@pytest.fixture(scope="module")
def started() -> Iterator[Callable[[str], str]]:
    """Starts a server at its first use, and returns its URL."""
    urls: dict[str, str] = {}
    with ExitStack() as stack:

        def start(name: str) -> str:
            if name not in urls:
                urls[name] = stack.enter_context(getattr(servers, name)())
            return urls[name]

        yield start


@pytest.fixture(params=["sqlite", "postgres", "redis"])
def opens(request: pytest.FixtureRequest, tmp_path: Path, started: Callable[[str], str]) -> Open:
    """Opens one more connection to where usage is kept."""
    if request.param == "redis":
        return lambda: RedisUsage(started("redis"))
    if request.param == "postgres":
        return lambda: Registry(started("postgres"))
    return lambda: Registry(f"sqlite:///{tmp_path / 'usage.db'}")


@pytest.fixture
def accounts(opens: Open) -> Iterator[Accounts]:
    with opens() as opened:
        yield opened
        if isinstance(opened, Registry):  # tests share a server, and ids of requests
            opened.account([Settle(each, "", (), {}) for each in "abc"], LATER)


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    """Where the keys are."""
    with Registry(f"sqlite:///{tmp_path / 'keys.db'}") as opened:
        yield opened


def key(registry: Registry, *limits: tuple[Any, Any, float]) -> ApiKey:
    said = tuple(Limit(what=what, per=per, most=most) for what, per, most in limits)
    return registry.create_api_key(KeySpec(name="ada", limits=said), NOW)[0]


def reserve(of: ApiKey, id: str, ends_at: float = LATER, **amounts: float) -> Reserve:  # noqa: A002
    return Reserve(id, of.id, of.spec.limits, amounts, ends_at)  # type: ignore[arg-type]


def settle(of: ApiKey, id: str, **amounts: float) -> Settle:  # noqa: A002
    return Settle(id, of.id, of.spec.limits, amounts)  # type: ignore[arg-type]


def why(accounts: Accounts, entries: Sequence[Reserve | Settle], now: float = NOW) -> list[str | None]:
    return [None if spent is None else str(spent) for spent in accounts.account(entries, now)]


@pytest.mark.parametrize(
    ("per", "begins", "ends"),
    [
        ("minute", "2028-02-29 23:59:00", "2028-03-01 00:00:00"),
        ("day", "2028-02-29 00:00:00", "2028-03-01 00:00:00"),
        ("month", "2028-02-01 00:00:00", "2028-03-01 00:00:00"),
    ],
)
def test_windows_are_those_of_the_calendar_in_utc(per: Any, begins: str, ends: str) -> None:
    found = window(per, NOW)
    assert [datetime.fromtimestamp(each, UTC).strftime("%Y-%m-%d %H:%M:%S") for each in found] == [begins, ends]
    assert window(per, found[1])[0] == found[1], "the next one begins where it ends"


def test_requests_count_when_they_begin(registry: Registry, accounts: Accounts) -> None:
    ada = key(registry, ("requests", "minute", 2))
    refused = "2 requests a minute are the limit of this key, 0 are left until 2028-03-01 00:00:00Z"
    asked = [reserve(ada, str(i), requests=1) for i in range(3)]
    assert why(accounts, asked) == [None, None, refused]
    assert why(accounts, [settle(ada, "0"), settle(ada, "1")]) == [None, None]
    assert why(accounts, [reserve(ada, "3", requests=1)]) == [refused], "an ended request counts too"
    assert why(accounts, [reserve(ada, "4", requests=1)], NOW + 30) == [None], "the next minute"
    assert why(accounts, [reserve(ada, "5", requests=2)], NOW + 30) == [
        "2 requests a minute are the limit of this key, 1 are left until 2028-03-01 00:01:00Z"
    ]


def test_tokens_are_reserved_and_then_charged_as_measured(registry: Registry, accounts: Accounts) -> None:
    ada = key(registry, ("tokens", "day", 1000))
    assert why(accounts, [reserve(ada, "a", tokens=700)]) == [None]
    assert why(accounts, [reserve(ada, "b", tokens=400)]) == [
        "1,000 tokens a day are the limit of this key, 300 are left while requests in progress reserve 700: try again "
        "when they have ended"
    ]
    assert accounts.used(ada, NOW) == [0]
    assert why(accounts, [settle(ada, "a", tokens=150), reserve(ada, "b", tokens=400)]) == [None, None]
    assert accounts.used(ada, NOW) == [150]
    assert why(accounts, [settle(ada, "b", tokens=0)]) == [None]
    assert accounts.used(ada, NOW) == [150]


def test_a_request_larger_than_the_rest_runs_alone(registry: Registry, accounts: Accounts) -> None:
    """Its reservation is an estimate: with 512 new tokens allowed, most answers are shorter."""
    ada = key(registry, ("tokens", "day", 1000))
    assert why(accounts, [reserve(ada, "a", tokens=5000)]) == [None]
    assert why(accounts, [reserve(ada, "b", tokens=1)])[0] is not None
    why(accounts, [settle(ada, "a", tokens=999)])
    assert why(accounts, [reserve(ada, "c", tokens=5000)]) == [None]
    why(accounts, [settle(ada, "c", tokens=10)])
    assert accounts.used(ada, NOW) == [1009]
    assert why(accounts, [reserve(ada, "d", tokens=1)])[0] is not None


def test_every_limit_of_a_key_holds(registry: Registry, accounts: Accounts) -> None:
    ada = key(registry, ("usd", "month", 1.0), ("tokens", "minute", 100))
    assert why(accounts, [reserve(ada, "a", usd=0.9, tokens=90)]) == [None]
    assert "tokens a minute" in str(why(accounts, [reserve(ada, "b", usd=0.05, tokens=20)])[0])
    why(accounts, [settle(ada, "a", usd=0.9, tokens=90)])
    assert accounts.used(ada, NOW) == [0.9, 90]
    next_minute = NOW + 31
    assert why(accounts, [reserve(ada, "b", usd=0.05, tokens=20)], next_minute) == [None], "also the next month"
    assert accounts.used(ada, next_minute) == [0, 0]


def test_a_refused_request_reserves_nothing_of_any_limit(registry: Registry, accounts: Accounts) -> None:
    ada = key(registry, ("requests", "day", 10), ("tokens", "day", 10))
    why(accounts, [reserve(ada, "a", requests=1, tokens=10)])
    assert why(accounts, [reserve(ada, "b", requests=1, tokens=10)])[0] is not None
    assert accounts.used(ada, NOW) == [1, 0]


def test_what_a_process_that_died_has_reserved_is_free_when_the_request_would_have_ended(
    registry: Registry, accounts: Accounts
) -> None:
    ada = key(registry, ("tokens", "month", 10))
    why(accounts, [reserve(ada, "a", NOW + 5, tokens=10)])
    assert why(accounts, [reserve(ada, "b", tokens=10)], NOW + 4.9)[0] is not None
    assert why(accounts, [reserve(ada, "b", tokens=10)], NOW + 5) == [None]


def test_keys_do_not_share_limits(registry: Registry, accounts: Accounts) -> None:
    ada = key(registry, ("requests", "day", 1))
    bob, _ = registry.create_api_key(KeySpec(name="bob", limits=ada.spec.limits), NOW)
    assert why(accounts, [reserve(ada, "a", requests=1), reserve(bob, "b", requests=1)]) == [None, None]


def test_many_writers_never_pass_a_limit_by_more_than_one_request(registry: Registry, opens: Open) -> None:
    """64 clients of three gateways: each reserves 60 tokens and uses 50."""
    ada = key(registry, ("tokens", "day", 1000), ("requests", "day", 1000))
    gateways = [opens() for _ in range(3)]

    def client(number: int) -> int:
        gateway, done = gateways[number % 3], 0
        for i in range(3):
            id_ = f"{number}-{i}"
            if gateway.account([reserve(ada, id_, requests=1, tokens=60)], NOW)[0] is None:
                gateway.account([settle(ada, id_, tokens=50)], NOW)
                done += 1
        return done

    with ThreadPoolExecutor(64) as pool:
        admitted = sum(pool.map(client, range(64)))
    tokens, requests = gateways[0].used(ada, NOW)
    for gateway in gateways:
        gateway.close()
    assert tokens == 50 * admitted and requests == admitted
    assert 1000 - 60 < tokens <= 1000 + 60


def test_redis_keeps_what_is_held_and_used_now_and_nothing_else(
    registry: Registry, started: Callable[[str], str]
) -> None:
    import redis

    ada, server = key(registry, ("tokens", "day", 1000), ("requests", "minute", 9)), started("redis")
    with RedisUsage(server) as accounts, redis.Redis.from_url(server, decode_responses=True) as there:
        accounts.account([reserve(ada, "a", requests=1, tokens=10), reserve(ada, "b", NOW + 5, tokens=10)], NOW)
        accounts.account([settle(ada, "a", tokens=7)], NOW)
        used, held = f"coe:{{{ada.id}}}:used", f"coe:{{{ada.id}}}:held"
        day, minute = window("day", NOW)[0], window("minute", NOW)[0]
        assert there.hgetall(used) == {f"tokens/day/{day}": "7", f"requests/minute/{minute}": "1"}
        assert there.hkeys(held) == ["b"]
        tomorrow = NOW + 86_400
        accounts.account([reserve(ada, "c", tomorrow + 60, requests=1)], tomorrow)
        assert there.hgetall(used) == {f"requests/minute/{window('minute', tomorrow)[0]}": "1"}, "past windows are gone"
        assert there.hkeys(held) == ["c"], "what was to end is free"
        assert 0 < there.ttl(used) <= 40 * 86_400 and there.ttl(held) > 0


def test_redis_that_is_gone_is_said_without_its_password(registry: Registry) -> None:
    ada = key(registry, ("tokens", "day", 1000))
    with RedisUsage("redis://user:secret@127.0.0.1:1/0") as accounts:
        for act in (lambda: accounts.account([reserve(ada, "a", tokens=1)], NOW), lambda: accounts.used(ada, NOW)):
            with pytest.raises(StoreError, match=r"Redis at 127\.0\.0\.1:1 cannot be used: ") as said:
                act()
            assert "secret" not in str(said.value)
    with pytest.raises(StoreError, match="at a URL such as redis://"):
        RedisUsage("http://user:secret@here")
