"""Admin calls and residence over HTTP: what is in memory, loads and unloads, and who may ask for them."""

import asyncio
from typing import Any

import pytest
from api_server import expert, gateway
from starlette.datastructures import Headers

from coe.config import ServeConfig
from coe.errors import CoeError
from coe.protocol.residence import residence_body
from coe.serve.http.admin import check_allowed
from coe.serve.http.refusals import AdminNotAllowed
from registry.spec import Kind

MIB = 2**20
EXPERTS = (
    expert("echo"),  # of the policies
    expert("a", size_bytes=4 * MIB, ttl_s=60),
    expert("org/b", size_bytes=4 * MIB, priority=3),
    expert("c", size_bytes=4 * MIB),
    expert("x", kind=Kind.ADAPTER, base="a"),
    expert("bad", "fake://fail?at=load", size_bytes=1),
)


def served(**options: Any) -> Any:
    return gateway(**{"experts": EXPERTS, "budget_bytes": 10 * MIB, **options})


async def residences(g: Any) -> dict[str, Any]:
    listed = await g.client.models.list()
    return {model.id: model.coe.get("residence") for model in listed.data}


async def test_models_state_where_each_expert_is_and_for_how_long() -> None:
    async with served() as g:
        before = await residences(g)
        assert before["a"] == {
            "state": "absent",
            "size_bytes": None,
            "unload_in_s": None,
            "hosts": {"all": 1, "resident": 0, "loading": 0},
        }
        assert before["auto"] is None, "a policy is not loaded"
        await g.client.chat.completions.create(model="x", messages=[{"role": "user", "content": "hi"}])
        after = await residences(g)
        assert after["x"]["state"] == after["a"]["state"] == "resident" and after["c"]["state"] == "absent"
        assert after["x"]["size_bytes"] == 4 * MIB and 50 < after["x"]["unload_in_s"] <= 60
        one = await g.client.models.retrieve("x")
        assert one.coe["residence"]["hosts"] == {"all": 1, "resident": 1, "loading": 0}


async def test_experts_are_loaded_together_listed_and_unloaded() -> None:
    async with served() as g:
        answer = await g.http.post("/admin/load?expert=x&expert=org/b")
        assert (answer.status_code, answer.json()) == (
            200,
            {
                "object": "coe.load",
                "experts": ["x", "org/b"],
                "hosts": [{"pool": "hosts", "loaded": ["a", "org/b"]}],
            },
        )
        [host] = (await g.http.get("/admin/residency")).json()["hosts"]
        assert (host["used_bytes"], host["budget_bytes"]) == (8 * MIB, 10 * MIB)
        assert [(each["name"], each["state"], each["priority"], each["ttl_s"]) for each in host["weights"]] == [
            ("a", "resident", 0, 60),
            ("org/b", "resident", 3, None),
        ]
        answer = await g.http.post("/admin/unload", params={"expert": "org/b"})
        assert answer.json()["hosts"] == [{"pool": "hosts", "unloaded": ["org/b"]}]
        assert g.host.resident == {"a"} and g.engine.tally.unloads == {"org/b": 1}
        assert not g.log.lines, "admin calls are no requests of the decision log"


async def test_errors_say_what_is_wrong() -> None:
    async with served(pins=("c",)) as g:
        for path, status, words in (
            ("load?expert=aa", 404, "did you mean 'a'"),
            ("load?expert=a&expert=org/b&expert=c", 503, "'a', 'c', 'org/b' need 12 MiB, the budget is 10 MiB"),
            ("load", 400, "name 1 to 256 experts, as ?expert=NAME"),
            ("unload?expert=c", 409, "c: pinned"),
            ("unload?expert=a&wait_s=1e9", 400, "wait_s is a number of seconds from 0 to 600"),
            ("unload?expert=a&wait_s=nan", 400, "wait_s is a number"),
            ("load?expert=bad", 500, "bad"),
        ):
            answer = await g.http.post(f"/admin/{path}")
            assert (answer.status_code, words in answer.json()["error"]["message"]) == (status, True), answer.text
        assert (await g.http.get("/admin/load?expert=a")).status_code == 405


async def test_unload_says_that_an_expert_is_in_use_or_waits_for_it() -> None:
    async with served(token_delay_s=0.02) as g:
        message = [{"role": "user", "content": "one two three four five six"}]
        answering = asyncio.create_task(g.client.chat.completions.create(model="a", messages=message))
        while not g.engine.tally.in_flight["a"]:  # it has no event  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        refused = await g.http.post("/admin/unload?expert=a")
        assert refused.status_code == 409 and refused.json()["error"]["code"] == "in_use"
        done = await g.http.post("/admin/unload?expert=a&wait_s=60")
        assert done.json()["hosts"] == [{"pool": "hosts", "unloaded": ["a"]}]
        assert (await answering).choices[0].message.content == message[0]["content"]


async def test_a_call_over_http_needs_the_key_where_one_is_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADMIN_KEY", "hunter22")
    async with served(settings={"admin_key_env": "ADMIN_KEY"}) as g:
        assert (await g.http.post("/admin/load?expert=a")).json()["error"]["code"] == "admin_not_allowed"
        wrong = await g.http.get("/admin/residency", headers={"authorization": "Bearer hunter2"})
        assert wrong.status_code == 403 and not g.host.resident
        right = await g.http.post("/admin/load?expert=a", headers={"authorization": "Bearer hunter22"})
        assert right.status_code == 200 and g.host.resident == {"a"}


OPEN = {"host": "0.0.0.0"}


@pytest.mark.parametrize(
    ("settings", "client", "headers", "allowed"),
    [
        ({}, "127.0.0.1", {}, True),
        (OPEN, "127.0.0.1", {}, True),
        (OPEN, "::1", {"host": "[::1]:8000"}, True),
        (OPEN, "::ffff:127.0.0.1", {}, True),
        (OPEN, "10.0.0.7", {}, False),
        (OPEN, "::ffff:10.0.0.7", {}, False),
        (OPEN, None, {}, False),
        (OPEN, "", {}, False),
        (OPEN, "127.0.0.1", {"x-forwarded-for": "10.0.0.7"}, False),
        (OPEN, "127.0.0.1", {"forwarded": "for=10.0.0.7"}, False),
        (OPEN, "127.0.0.1", {"via": "1.1 proxy"}, False),
        ({"http": "haproxy"}, "127.0.0.1", {}, False),
        ({}, "127.0.0.1", {"origin": "http://127.0.0.1:8000"}, False),
        (OPEN, "127.0.0.1", {"host": "rebound.example.com"}, False),
        ({}, "127.0.0.1", {"host": "localhost:8000"}, True),
        ({"admin_key_env": "ADMIN_KEY"}, "10.0.0.7", {"authorization": "bearer  key-of-admin "}, True),
        ({"admin_key_env": "ADMIN_KEY", "http": "haproxy"}, None, {"authorization": "Bearer key-of-admin"}, True),
        ({"admin_key_env": "ADMIN_KEY"}, "127.0.0.1", {}, False),
        ({"admin_key_env": "ADMIN_KEY"}, "127.0.0.1", {"authorization": "key-of-admin"}, False),
        ({"admin_key_env": "NOT_SET"}, "127.0.0.1", {"authorization": "Bearer "}, False),
    ],
)
def test_admin_calls_come_from_this_machine_or_with_the_key(
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    client: str | None,
    headers: dict[str, str],
    allowed: bool,
) -> None:
    monkeypatch.setenv("ADMIN_KEY", "key-of-admin")
    monkeypatch.delenv("NOT_SET", raising=False)
    sent = Headers({"host": "127.0.0.1:8000", **headers})
    try:
        check_allowed(ServeConfig(**settings), client, sent)
    except CoeError as error:
        assert isinstance(error, AdminNotAllowed) and error.status == 403 and not allowed
        assert "key-of-admin" not in str(error)
    else:
        assert allowed


def test_an_expert_is_resident_where_one_host_has_all_of_its_weights() -> None:
    def weights(state: str, left: float | None = None) -> dict[str, Any]:
        return {"state": state, "size_bytes": 4, "unload_in_s": left}

    both = {"a": weights("resident", 7), "b": weights("resident", 5)}
    body = residence_body(["a", "b"], [{"a": weights("resident")}, both, {**both, "b": weights("loading")}])
    assert body == {
        "state": "resident",
        "size_bytes": 8,
        "unload_in_s": 5,
        "hosts": {"all": 3, "resident": 1, "loading": 1},
    }
    assert residence_body(["a"], [{"a": weights("loading")}, {}])["state"] == "loading"
    assert residence_body(["a"], [])["hosts"] == {"all": 0, "resident": 0, "loading": 0}
    assert residence_body(["a"], [{"a": weights("resident", 9)}, {"a": weights("resident")}])["unload_in_s"] is None
