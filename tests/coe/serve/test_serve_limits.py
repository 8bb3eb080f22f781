"""Limits of API keys over HTTP: what is refused, what is charged, and what three gateways allow together."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import servers
from api_server import EXPERTS, Gateway, gateway
from raw_endpoint import DONE, answering, event, raw_endpoint

from coe.cli import serve as serve_command
from coe.config import ServeConfig
from coe.engines.remote.engine import RemoteEngine
from coe.serve.http import ledger as ledger_module
from coe.serve.http.keyring import Keyring, StoredKeys
from coe.serve.http.ledger import Ledger, open_accounts
from coe.serve.http.refusals import KeysUnavailable, LimitReached
from registry.endpoints import RemoteEndpoint
from registry.errors import StoreError
from registry.keys import ApiKey, KeySpec, Limit
from registry.spec import ExpertSpec, Kind
from registry.store import Registry
from registry.usage import Reserve, Settle, Spent
from registry.usage_redis import RedisUsage

WORDS = "one two three four five six seven"


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'registry.db'}"


def limits(*said: tuple[Any, Any, float]) -> tuple[Limit, ...]:
    return tuple(Limit(what=what, per=per, most=most) for what, per, most in said)


def create(url: str, *said: tuple[Any, Any, float], **fields: Any) -> tuple[ApiKey, dict[str, str]]:
    with Registry(url) as registry:
        key, text = registry.create_api_key(KeySpec(name="ada", limits=limits(*said), **fields), time.time())
    return key, {"authorization": f"Bearer {text}"}


def used(url: str, key: ApiKey) -> list[float]:
    with Registry(url) as registry:
        return [*registry.used(key, time.time())]


def keyed(url: str, **options: Any) -> Any:
    return gateway(keyring=Keyring(StoredKeys(url)), ledger=Ledger(lambda: Registry(url)), **options)


async def post(there: Gateway, headers: dict[str, str], **body: Any) -> Any:
    said = {"model": "upper", "messages": [{"role": "user", "content": WORDS}], "max_tokens": 20, **body}
    return await there.http.post("/v1/chat/completions", json=said, headers=headers)


async def charged(url: str, key: ApiKey, wanted: list[float]) -> None:
    """Wait until so much is charged: it is written after the answer."""
    async with asyncio.timeout(20):
        while used(url, key) != pytest.approx(wanted):  # another process's file  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_beyond_its_requests_a_key_gets_429_with_what_is_left_and_when(url: str) -> None:
    key, ada = create(url, ("requests", "month", 2))
    async with keyed(url) as there:
        assert [(await post(there, ada)).status_code for _ in range(3)] == [200, 200, 429]
        refused = await post(there, ada)
        error = refused.json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        assert "2 requests a month are the limit of this key, 0 are left until 20" in error["message"]
        assert 1 <= int(refused.headers["retry-after"]) <= 3600
        assert [line.error for line in await there.log.ended(4)] == [None, None, *["rate_limit_exceeded"] * 2]
    assert used(url, key) == [2]


async def test_tokens_and_usd_are_charged_as_measured(url: str) -> None:
    """`upper` costs 1 USD per million tokens read, 2 per million written."""
    key, ada = create(url, ("tokens", "month", 100_000), ("usd", "month", 1.0))
    async with keyed(url) as there:
        usage = (await post(there, ada)).json()["usage"]
        first = [usage["total_tokens"], (usage["prompt_tokens"] + 2 * usage["completion_tokens"]) / 1e6]
        await charged(url, key, first)
        async with there.http.stream(
            "POST",
            "/v1/chat/completions",
            json={"model": "upper", "messages": [{"role": "user", "content": WORDS}], "stream": True},
            headers=ada,
        ) as response:
            assert response.status_code == 200
            await response.aread()
        await charged(url, key, [2 * each for each in first])


async def test_answers_of_one_request_count_each(url: str) -> None:
    key, ada = create(url, ("requests", "month", 5))
    async with keyed(url) as there:
        body = {"model": "upper", "prompt": ["a", "b"], "n": 2, "temperature": 1.0, "max_tokens": 2}
        assert (await there.http.post("/v1/completions", json=body, headers=ada)).status_code == 200
        assert used(url, key) == [4]
        assert (await there.http.post("/v1/completions", json=body, headers=ada)).status_code == 429
        route = {"model": "auto", "messages": [{"role": "user", "content": "hi"}]}
        assert (await there.http.post("/v1/route", json=route, headers=ada)).status_code == 200
        assert used(url, key) == [5]


async def test_a_client_that_leaves_pays_for_what_it_reserved(url: str) -> None:
    key, ada = create(url, ("tokens", "month", 100_000))
    async with keyed(url, token_delay_s=0.2) as there:
        async with there.http.stream(
            "POST",
            "/v1/chat/completions",
            json={
                "model": "upper",
                "messages": [{"role": "user", "content": WORDS}],
                "stream": True,
                "max_tokens": 500,
            },
            headers=ada,
        ) as response:
            async for _ in response.aiter_lines():
                break  # the first token, and away
        async with asyncio.timeout(20):
            while not (found := used(url, key)[0]):  # it is written to a file  # noqa: ASYNC110
                await asyncio.sleep(0.02)
    assert 500 < found < 600


async def test_a_request_that_fails_before_any_text_costs_no_tokens(url: str) -> None:
    key, ada = create(url, ("tokens", "month", 1000), ("requests", "month", 10))
    async with keyed(url) as there:
        assert (await post(there, ada, model="broken")).status_code == 500
        assert (await post(there, ada, max_tokens=900)).status_code == 200  # nothing is reserved any more
    assert used(url, key)[1] == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_tokens_that_failed_attempts_used_are_charged_once(url: str, stream: bool) -> None:
    """The endpoint counts 7 and 5 tokens, and fails before any text; another endpoint answers 3 and 1."""
    failing = answering(counted(7, 5) + 'data: {"error": {"message": "crashed", "code": 500}}\n\n')
    well = answering(event("Hi", "stop") + counted(3, 1) + DONE)
    key, ada = create(url, ("tokens", "month", 100_000))
    async with raw_endpoint(failing) as a, raw_endpoint(well) as b:
        places = [RemoteEndpoint(url=f"http://127.0.0.1:{each.port}/v1") for each in (a, b)]
        kind = {"kind": Kind.REMOTE, "context_length": 1000}
        both = ExpertSpec(name="both", endpoints=places, **kind)  # type: ignore[arg-type]
        alone = ExpertSpec(name="alone", endpoints=places[:1], **kind)  # type: ignore[arg-type]
        async with keyed(url, experts=(*EXPERTS, both, alone), engines={"remote": RemoteEngine(retries=0)}) as there:
            answered = await post(there, ada, model="both", stream=stream)
            assert answered.status_code == 200 and ("12 tokens" in answered.headers.get("x-coe-notes", "")) != stream
            await charged(url, key, [16])
            assert (await post(there, ada, model="alone", stream=stream)).status_code == 502
            await charged(url, key, [28])
            assert (len(a.requests), len(b.requests)) == (2, 1)


def counted(prompt: int, completion: int) -> str:
    counts = {"prompt_tokens": prompt, "completion_tokens": completion}
    return f"data: {json.dumps({'choices': [], 'usage': counts})}\n\n"


async def test_three_gateways_and_64_clients_never_pass_a_limit_by_more_than_one_request(url: str) -> None:
    """Each reserves some 30 tokens, and uses 14."""
    key, ada = create(url, ("tokens", "month", 600))
    async with AsyncExitStack() as stack:
        gateways = [await stack.enter_async_context(keyed(url)) for _ in range(3)]

        async def client(number: int) -> list[int]:
            return [(await post(gateways[number % 3], ada)).status_code for _ in range(3)]

        codes = [code for found in await asyncio.gather(*map(client, range(64))) for code in found]
        assert set(codes) == {200, 429}
        await charged(url, key, [14.0 * codes.count(200)])
        assert used(url, key)[0] <= 600 + 40
        count = codes.count(200)
        while (await post(gateways[0], ada)).status_code == 200:  # what other requests' reservations had refused
            count += 1
            await charged(url, key, [14.0 * count])
        assert 600 <= used(url, key)[0] <= 600 + 14
        refused = await post(gateways[1], ada)
        assert "0 are left until" in refused.text


async def test_gateways_share_a_limit_in_redis(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    key, ada = create(url, ("requests", "month", 5))
    settings = ServeConfig(usage_url_env="USAGE")
    with servers.redis() as there, RedisUsage(there) as accounts:
        monkeypatch.setenv("USAGE", there)

        def opened() -> Any:
            return gateway(keyring=Keyring(StoredKeys(url)), ledger=Ledger(lambda: open_accounts(settings, url)))

        async with opened() as one, opened() as other:
            codes = [(await post(each, ada)).status_code for each in (one, other, one, other, one, other)]
            assert codes == [*[200] * 5, 429]
        assert accounts.used(key, time.time()) == [5] and used(url, key) == [0]


def test_usage_without_its_url_is_a_clear_error(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("USAGE", raising=False)
    with pytest.raises(StoreError, match="the environment variable USAGE is not set"):
        open_accounts(ServeConfig(usage_url_env="USAGE"), url)
    monkeypatch.setenv("USAGE", "redis://127.0.0.1:1")
    with pytest.raises(StoreError, match=r"Redis at 127\.0\.0\.1:1 cannot be used"):
        serve_command._check_usage(ServeConfig(usage_url_env="USAGE"))


async def test_keys_without_limits_write_nothing(url: str) -> None:
    _, ada = create(url)

    def no() -> Registry:
        raise AssertionError("the ledger opens a database")

    async with gateway(keyring=Keyring(StoredKeys(url)), ledger=Ledger(no)) as there:
        assert (await post(there, ada)).status_code == 200


KEY, _ = ApiKey.made(KeySpec(name="ada", limits=limits(("tokens", "day", 100))), 0.0)


class Accounts:
    """A database that works, or not, slowly or fast; each entry that it wrote."""

    def __init__(self) -> None:
        self.works, self.hangs_s = True, 0.0
        self.written: list[Sequence[Reserve | Settle]] = []

    def account(self, entries: Sequence[Reserve | Settle], now: float) -> list[Spent | None]:
        time.sleep(self.hangs_s)
        if not self.works:
            raise StoreError("the registry is gone")
        self.written.append(entries)
        return [None] * len(entries)


async def test_requests_that_come_during_a_transaction_share_the_next_one() -> None:
    accounts = Accounts()
    accounts.hangs_s = 0.05
    ledger = Ledger(lambda: accounts)
    held = await asyncio.gather(*(ledger.reserve(KEY, str(i), {"tokens": 1}, 1e12) for i in range(200)))
    assert [each.id for each in held if each] == [str(i) for i in range(200)] and len(accounts.written) <= 3
    for each in held:
        assert each is not None
        ledger.settle(each, {"tokens": 1})
    await ledger.close()
    assert sum(isinstance(entry, Settle) for entries in accounts.written for entry in entries) == 200
    assert len(accounts.written) <= 5


async def test_without_the_database_requests_are_refused_and_what_was_used_is_written_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ledger_module, "RETRY_S", 0.05)
    accounts = Accounts()
    ledger = Ledger(lambda: accounts)
    held = await ledger.reserve(KEY, "a", {"tokens": 1}, 1e12)
    assert held is not None
    accounts.works = False
    with pytest.raises(KeysUnavailable):
        await ledger.reserve(KEY, "b", {"tokens": 1}, 1e12)
    ledger.settle(held, {"tokens": 7})
    await asyncio.sleep(0.2)
    accounts.works = True
    await ledger.close()
    settled = [entry for entries in accounts.written for entry in entries if isinstance(entry, Settle)]
    assert [entry.amounts for entry in settled if entry.id == "a"] == [{"tokens": 7}]


async def test_a_database_that_hangs_refuses_in_bounded_time_and_leaves_no_reservation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ledger_module, "WAIT_S", 0.1)
    accounts = Accounts()
    accounts.hangs_s = 0.5
    ledger = Ledger(lambda: accounts)
    with pytest.raises(KeysUnavailable):
        await ledger.reserve(KEY, "a", {"tokens": 1}, 1e12)
    monkeypatch.setattr(ledger_module, "WAIT_S", 5.0)
    accounts.hangs_s = 0.0
    await ledger.close()
    kinds = [(type(entry), entry.id) for entries in accounts.written for entry in entries]
    assert kinds == [(Reserve, "a"), (Settle, "a")]


def test_the_refusal_survives_pickling() -> None:
    import pickle

    again = pickle.loads(pickle.dumps(LimitReached("no", 12.0)))
    assert (str(again), again.retry_after_s, again.status) == ("no", 12.0, 429)
