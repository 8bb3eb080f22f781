"""API keys over HTTP: who is answered, what a key may see, and how soon a revoked one stops."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openai
import pytest
from api_server import EXPERTS, Gateway, Words, expert, gateway

from coe.policy import Policy
from coe.serve.http.keyring import REFRESH_S, STALE_S, WAIT_S, Keyring, StoredKeys
from coe.serve.http.refusals import KeysUnavailable, Unauthorized
from registry.errors import StoreError
from registry.keys import ApiKey, KeySpec
from registry.spec import Kind
from registry.store import Registry

HI: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'registry.db'}"


def create(url: str, name: str = "ada", **fields: Any) -> str:
    with Registry(url) as registry:
        return registry.create_api_key(KeySpec(name=name, **fields), time.time())[1]


def bearer(text: str) -> dict[str, str]:
    return {"authorization": f"Bearer {text}"}


async def post(there: Gateway, headers: dict[str, str], **body: Any) -> Any:
    return await there.http.post("/v1/chat/completions", json={"model": "echo", **HI, **body}, headers=headers)


def code(response: Any) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


async def test_without_any_key_all_requests_are_answered_and_from_the_first_one_on_none_without(url: str) -> None:
    clock = Clock()
    async with gateway(keyring=Keyring(StoredKeys(url), clock=clock)) as there:
        assert (await post(there, {})).status_code == 200
        assert (await post(there, bearer("none"))).status_code == 200  # clients must send something
        text = create(url)
        clock.now += REFRESH_S
        refused = await post(there, {})
        assert code(refused) == (401, "invalid_api_key") and refused.headers["www-authenticate"] == "Bearer"
        assert code(await post(there, bearer("none"))) == (401, "invalid_api_key")
        assert code(await post(there, bearer(text[:-2] + "zz"))) == (401, "invalid_api_key")
        answered = await post(there, bearer(text))
        assert answered.status_code == 200 and answered.json()["choices"][0]["message"]["content"] == "hi"
        lines = await there.log.ended(6)
        assert [line.key for line in lines] == [None] * 5 + [text.split("-")[1]]
        assert [line.error for line in lines] == [None, None, *["invalid_api_key"] * 3, None]


async def test_every_endpoint_but_those_that_say_nothing_needs_a_key(url: str) -> None:
    text = create(url)
    async with gateway(keyring=Keyring(StoredKeys(url))) as there:
        paths = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/route")
        for path in (*paths, "/v1/responses/resp_1/cancel"):
            assert code(await there.http.post(path, json={})) == (401, "invalid_api_key")
        for path in ("/v1/models", "/v1/models/echo", "/admin/residency"):
            assert code(await there.http.get(path)) == (401, "invalid_api_key")
        assert (await there.http.get("/health")).json() == {"status": "ok", "problem": None}
        assert (await there.http.get("/docs")).status_code == 200
        # a key for answers alone
        assert (await there.http.get("/health", headers=bearer(text))).json() == {"status": "ok", "problem": None}
        assert code(await there.http.get("/admin/residency", headers=bearer(text))) == (403, "key_not_allowed")
        assert code(await there.http.post("/admin/load?expert=echo", headers=bearer(text))) == (403, "key_not_allowed")


async def test_the_openapi_document_says_that_a_key_may_be_needed_and_what_comes_without(url: str) -> None:
    create(url)
    async with gateway(keyring=Keyring(StoredKeys(url)), metrics=Page()) as there:
        document = (await there.http.get("/openapi.json")).json()
        assert document["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}
        assert document["security"] == [{"key": []}, {}]
        open_to_all = {"/health", "/openapi.json", "/docs", "/ui", "/ui/{name}"}
        said_of = {(path, method): said for path, of in document["paths"].items() for method, said in of.items()}
        for (path, method), said in said_of.items():
            if path in open_to_all:
                continue
            status = (await there.http.request(method, path.replace("{id}", "echo"), json={})).status_code
            assert status == 401 and "401" in said["responses"], path


async def test_an_admin_key_makes_admin_calls_and_one_for_metrics_reads_them(url: str) -> None:
    admin, watcher = create(url, "root", admin=True), create(url, "watch", metrics=True)
    async with gateway(keyring=Keyring(StoredKeys(url)), metrics=Page()) as there:
        loaded = await there.http.post("/admin/load?expert=echo", headers=bearer(admin))
        assert loaded.status_code == 200 and loaded.json()["hosts"][0]["loaded"] == ["echo"]
        assert code(await there.http.get("/admin/residency", headers=bearer(watcher))) == (403, "key_not_allowed")
        for text in (admin, watcher):
            assert (await there.http.get("/metrics", headers=bearer(text))).text == "page"
            assert (await there.http.get("/health", headers=bearer(text))).json()["experts"] == 6
        other = create(url, "plain")
        await asyncio.sleep(REFRESH_S)
        assert code(await there.http.get("/metrics", headers=bearer(other))) == (403, "key_not_allowed")


async def test_the_key_of_the_environment_still_makes_admin_calls(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    create(url)
    monkeypatch.setenv("ADMIN", "s3cret")
    async with gateway(keyring=Keyring(StoredKeys(url)), settings={"admin_key_env": "ADMIN"}) as there:
        assert (await there.http.get("/admin/residency", headers=bearer("s3cret"))).status_code == 200
        assert (await there.http.get("/admin/residency", headers=bearer("other"))).status_code == 401
        assert code(await post(there, bearer("s3cret"))) == (401, "invalid_api_key")  # it is no key for answers


async def test_a_key_sees_its_experts_and_policies_only(url: str) -> None:
    """The router of the default policy prefers `echo`, which this key may not use."""
    text = create(url, experts=("upper", "sh*"), policies=("default",))
    async with gateway(keyring=Keyring(StoredKeys(url))) as there:
        listed = (await there.http.get("/v1/models", headers=bearer(text))).json()
        assert [each["id"] for each in listed["data"]] == ["auto", "coe/default", "upper", "short"]
        client = there.client.with_options(api_key=text)
        assert (await client.models.retrieve("upper")).id == "upper"
        for hidden in ("echo", "coe/safe"):
            with pytest.raises(openai.NotFoundError):
                await client.models.retrieve(hidden)
            refused = await post(there, bearer(text), model=hidden)
            assert code(refused) == (404, "model_not_found") and "half" not in refused.text
        routed = await post(there, bearer(text), model="auto")
        assert routed.status_code == 200 and routed.headers["x-coe-expert"] == "upper"
        decision = (await there.http.post("/v1/route", json={"model": "auto", **HI}, headers=bearer(text))).json()
        assert list(decision["estimate"]) == ["upper", "short"] == sorted(decision["allowed"], reverse=True)
        assert "echo" not in str(decision)
        named = await post(there, bearer(text), model="auto", coe={"experts": ["echo", "upper"]})
        assert code(named) == (400, "unknown_expert")
        excluded = await post(there, bearer(text), model="auto", coe={"exclude": ["upper"]})
        assert excluded.headers["x-coe-expert"] == "short"


async def test_a_policy_whose_router_knows_none_of_its_experts_tells_no_names(url: str) -> None:
    """Without a key the error lists what the router knows."""
    text = create(url, experts=("upper",))
    policies = {"default": Policy("default", Words(("echo", "short")))}
    async with gateway(keyring=Keyring(StoredKeys(url)), policies=policies) as there:
        refused = await post(there, bearer(text), model="auto")
        assert code(refused) == (400, "no_eligible_expert")
        assert "echo" not in refused.text and "short" not in refused.text


async def test_the_default_policy_is_no_way_around(url: str) -> None:
    text = create(url, policies=("safe",))
    async with gateway(keyring=Keyring(StoredKeys(url))) as there:
        listed = (await there.http.get("/v1/models", headers=bearer(text))).json()
        assert [each["id"] for each in listed["data"]][:2] == ["coe/safe", "echo"]
        assert code(await post(there, bearer(text), model="auto")) == (404, "model_not_found")
        assert (await post(there, bearer(text), model="coe/safe")).status_code == 200


async def test_a_fallback_that_a_key_may_not_use_does_not_answer_it(url: str) -> None:
    """The fallback of the policy `safe` is `echo`."""
    text = create(url, experts=("broken",))
    async with gateway(keyring=Keyring(StoredKeys(url))) as there:
        assert (await post(there, bearer(text), model="coe/safe")).status_code == 500
        assert [line.expert for line in await there.log.ended(1)] != ["echo"]


async def test_a_key_whose_experts_are_gone_is_told_so_and_sees_no_other(url: str) -> None:
    text = create(url, experts=("removed-*",))
    async with gateway(keyring=Keyring(StoredKeys(url))) as there:
        refused = await post(there, bearer(text), model="auto")
        assert code(refused) == (403, "key_not_allowed") and "echo" not in refused.text


async def test_the_priority_of_a_key_is_the_default_and_the_highest_of_its_requests(url: str) -> None:
    keys = {level: create(url, level, priority=level) for level in ("low", "normal", "high")}
    vectors = expert("vectors", kind=Kind.EMBEDDING, capabilities=frozenset({"embedding"}))
    async with gateway(experts=(*EXPERTS, vectors), keyring=Keyring(StoredKeys(url))) as there:
        asked = there.service.orchestrator._ask
        seen: list[Any] = []

        def ask(expert: str, request: Any) -> Any:
            seen.append(request.priority)
            return asked(expert, request)

        there.service.orchestrator._ask = ask
        for text in keys.values():
            assert (await post(there, bearer(text))).status_code == 200
        assert seen == ["low", "normal", "high"]
        assert (await post(there, bearer(keys["high"]), coe={"priority": "low"})).status_code == 200
        refused = await post(there, bearer(keys["normal"]), coe={"priority": "high"})
        assert code(refused) == (403, "key_not_allowed") and 'which is "normal"' in refused.json()["error"]["message"]
        embedding = {"model": "vectors", "input": "hi", "coe": {"priority": "high"}}
        assert code(await there.http.post("/v1/embeddings", json=embedding, headers=bearer(keys["low"])))[0] == 403
        wrong = await post(there, bearer(keys["high"]), coe={"priority": "urgent"})
        assert code(wrong)[0] == 400 and "'low', 'normal' or 'high'" in wrong.json()["error"]["message"]
        assert seen[3:] == ["low"] and there.service.in_flight == 0


async def test_without_keys_a_request_states_its_priority() -> None:
    async with gateway() as there:
        asked = there.service.orchestrator._ask
        seen: list[Any] = []

        def ask(expert: str, request: Any) -> Any:
            seen.append(request.priority)
            return asked(expert, request)

        there.service.orchestrator._ask = ask
        assert (await post(there, {}, coe={"priority": "high"})).status_code == 200
        assert (await post(there, {})).status_code == 200
        assert seen == ["high", "normal"]


async def test_a_revoked_key_stops_within_two_seconds_on_every_gateway(url: str) -> None:
    text = create(url)
    async with gateway(keyring=Keyring(StoredKeys(url))) as one, gateway(keyring=Keyring(StoredKeys(url))) as two:
        for there in (one, two):
            assert (await post(there, bearer(text))).status_code == 200
        with Registry(url) as registry:
            registry.revoke_api_key("ada", time.time())
        await asyncio.sleep(REFRESH_S)
        for there in (one, two):
            refused = await post(there, bearer(text))
            assert code(refused) == (401, "invalid_api_key") and "the key was revoked" in refused.text
            assert code(await post(there, {})) == (401, "invalid_api_key")  # revoking the last one does not open it


async def test_a_body_is_not_read_before_the_key_is_checked(url: str) -> None:
    create(url)
    async with gateway(keyring=Keyring(StoredKeys(url))) as there:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", there.port)
        writer.write(head + b"Content-Length: 1000\r\n\r\n")  # and nothing of it
        assert (await asyncio.wait_for(reader.readline(), 10)).startswith(b"HTTP/1.1 401")
        writer.close()


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Page:
    def observe(self, finished: object) -> None:
        pass

    async def render(self) -> tuple[bytes, str]:
        return b"page", "text/plain"


class Flaky:
    """Keys that can be read, or not, or only after the seconds `hangs_s`."""

    def __init__(self, *keys: ApiKey) -> None:
        self.keys: Sequence[ApiKey] = keys
        self.works, self.hangs_s, self.reads = True, 0.0, 0

    def changed(self) -> Sequence[ApiKey] | None:
        self.reads += 1
        time.sleep(self.hangs_s)
        if not self.works:
            raise StoreError("the registry is gone")
        return self.keys


async def test_while_keys_cannot_be_read_known_ones_go_on_for_a_time() -> None:
    key, text = ApiKey.made(KeySpec(name="ada"), 0.0)
    stored, clock = Flaky(key), Clock()
    keyring = Keyring(stored, clock=clock)
    assert (await keyring.access(bearer(text))).id == key.id
    stored.works = False
    clock.now = STALE_S
    assert (await keyring.access(bearer(text))).id == key.id
    with pytest.raises(Unauthorized):
        await keyring.access({})
    clock.now = 2 * STALE_S
    with pytest.raises(KeysUnavailable):
        await keyring.access(bearer(text))
    stored.works = True
    clock.now += REFRESH_S
    assert (await keyring.access(bearer(text))).id == key.id


async def test_a_database_that_hangs_delays_a_request_once_and_is_asked_once() -> None:
    key, text = ApiKey.made(KeySpec(name="ada"), 0.0)
    stored, clock = Flaky(key), Clock()
    keyring = Keyring(stored, clock=clock)
    await keyring.access(bearer(text))
    stored.hangs_s, stored.reads, clock.now = WAIT_S + 1, 0, REFRESH_S
    found = await asyncio.gather(*(keyring.access(bearer(text)) for _ in range(50)))
    assert {each.id for each in found} == {key.id} and stored.reads == 1
    clock.now += WAIT_S
    started = time.monotonic()
    assert (await keyring.access(bearer(text))).id == key.id and time.monotonic() - started < WAIT_S / 2
    await asyncio.sleep(1.5)  # the thread ends


async def test_a_database_that_is_replaced_by_an_empty_one_does_not_open_the_service() -> None:
    key, text = ApiKey.made(KeySpec(name="ada"), 0.0)
    stored, clock = Flaky(key), Clock()
    keyring = Keyring(stored, clock=clock)
    await keyring.access(bearer(text))
    stored.keys, clock.now = (), REFRESH_S
    for headers in ({}, bearer(text)):
        with pytest.raises(Unauthorized):
            await keyring.access(headers)


async def test_keys_are_looked_at_once_a_second_however_many_requests_there_are() -> None:
    key, text = ApiKey.made(KeySpec(name="ada"), 0.0)
    stored, clock = Flaky(key), Clock()
    keyring = Keyring(stored, clock=clock)
    for i in range(100):
        clock.now = i * REFRESH_S / 50
        await keyring.access(bearer(text))
    assert stored.reads == 2


async def test_required_keys_are_required_before_there_is_one(url: str, coe_home: Path) -> None:
    keyring = Keyring(StoredKeys(None), required=True)
    with pytest.raises(Unauthorized):
        await keyring.access({})
    assert not (coe_home / "registry.db").exists()  # looking for keys makes no database
