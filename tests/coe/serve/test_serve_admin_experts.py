"""Admin calls that change experts: gateways over one registry, without Ray, and a push of each new catalog to them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from api_server import Gateway, connected, expert, gateway

from coe.config import Config
from coe.local import build_policies
from coe.orchestrator import Orchestrator
from coe.policy import Always, Policy
from coe.serve.cluster import expert_changes
from coe.serve.cluster.catalog import Catalog
from coe.serve.cluster.expert_changes import RegistryChanges
from coe.serve.cluster.source import Source
from coe.serve.http.keyring import Keyring, StoredKeys
from registry.keys import KeySpec
from registry.reconcile import plan as really_plan
from registry.spec import ExpertSpec, Kind
from registry.store import Registry
from routers.artifacts import save
from routers.encoders.build import build_encoder
from routers.factory import build
from routers.outcomes.table import OutcomeTable

CONFIG = """
registry: {registry}
serve: {{admin_sources: [{allowed}], deadline_s: 30, log: {{folder: null}}}}
host: {{pins: [{pins}]}}
policies:
  default: {{router: router, fallback: general}}
  vote: {{expert: general, composition: {{kind: chain, experts: [general, voter]}}}}
{more}
"""
NAMES = ("general", "sql", "legal", "voter")


class Fleet:
    """Gateways over one registry. `pushing` is what `coe serve` does, without Ray."""

    def __init__(self, source: Source) -> None:
        self.source, self.catalog, self.gateways = source, source.catalog, list[Gateway]()
        self.warnings: tuple[str, ...] = ()
        self.ready = asyncio.Event()
        self.ready.set()

    @property
    def config(self) -> Config:
        return self.source.config

    def changes(self) -> RegistryChanges:
        return RegistryChanges(self.config, lambda: self.catalog, self, self, lambda: self.warnings, wall=lambda: 1e9)

    async def pushing(self) -> None:
        while True:
            await self.ready.wait()
            if self.source.changed():
                try:
                    self.use(self.source.reread()[0])
                    self.warnings = ()
                except Exception as error:
                    self.warnings = (f"not reloaded: {error}",)
            await asyncio.sleep(0.005)

    def use(self, catalog: Catalog) -> None:
        self.catalog = Catalog.from_json(catalog.to_json())
        for one in self.gateways:
            self.give(one)

    def give(self, one: Gateway) -> None:
        snapshot = self.catalog.snapshot
        policies = build_policies(self.catalog.policies, snapshot)
        one.host.update(snapshot, self.catalog.pins["hosts"])
        one.service.update(Orchestrator(snapshot, policies, ask=one.host.ask))

    async def rule_out(self, version: int, drained: Mapping[str, str]) -> None:
        for one in self.gateways:
            one.service.rule_out(version, drained)

    async def uses(self, experts: Collection[str]) -> Sequence[Mapping[str, int]]:
        version = self.catalog.snapshot.version
        return [{"version": version, "requests": one.service.requests_with(experts)} for one in self.gateways]

    async def load(self, *names: str) -> Sequence[Mapping[str, Any]]:
        return [{"pool": "hosts", "loaded": await one.host.load(*names)} for one in self.gateways]


@asynccontextmanager
async def fleet(
    folder: Path, *, count: int = 1, allowed: str = "", pins: str = "", more: str = "", **options: Any
) -> AsyncIterator[Fleet]:
    url = f"sqlite:///{folder / 'registry.db'}"
    with Registry(url) as registry:
        registry.change([expert(name, size_bytes=4) for name in NAMES])
    text = CONFIG.format(registry=url, allowed=allowed, pins=pins, more=more)
    (folder / "service.yaml").write_text(text)
    save_router(folder / "router")
    async with AsyncExitStack() as stack:
        made = Fleet(stack.enter_context(Source(folder / "service.yaml")))
        for _ in range(count):
            one = await stack.enter_async_context(
                gateway(
                    experts=[*made.catalog.snapshot.experts.values()],
                    settings={"deadline_s": 30},
                    changes=made.changes(),
                    policies={"default": Policy("default", Always("general"))},
                    **options,
                )
            )
            made.gateways.append(one)
            made.give(one)
        pushing = asyncio.ensure_future(made.pushing())
        try:
            yield made
        finally:
            pushing.cancel()


def save_router(folder: Path) -> None:
    """A router that chooses the expert whose name is in the query."""
    names = tuple(f"{name} {i}" for name in NAMES[:3] for i in range(14))
    scores = np.array([[float(text.startswith(name)) for name in NAMES[:3]] for text in names])
    table = OutcomeTable(query_ids=names, prompts=names, experts=NAMES[:3], scores=scores)
    encoder = build_encoder("hashing:64")
    save(build("knn", encoder, {"k": 1}).fit(table), folder, table=table, encoder=encoder)


async def ask(one: Gateway, model: str, text: str = "sql 1", **options: Any) -> Any:
    return await one.client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": text}], **options
    )


async def code_of(one: Gateway, model: str) -> str | None:
    try:
        await ask(one, model)
    except openai.APIStatusError as error:
        return f"{error.status_code} {error.code}"
    return None


async def post(one: Gateway, path: str, **params: Any) -> Any:
    return await one.http.post(f"/admin/{path}", params=params)


async def put(one: Gateway, text: str, query: str = "", kind: str = "application/yaml") -> Any:
    return await one.http.post(f"/admin/experts{query}", content=text, headers={"content-type": kind})


def message(answer: Any) -> str:
    return f"{answer.status_code} {answer.json()['error']['message']}"


async def test_a_drained_expert_gets_no_new_requests_on_any_gateway_and_ends_those_it_has(tmp_path: Path) -> None:
    async with fleet(tmp_path, count=2, token_delay_s=0.2) as f:
        first, second = f.gateways
        f.ready.clear()  # no catalog is pushed: the drain holds at once
        answering = asyncio.create_task(ask(second, "auto", "sql 1 and many more words to answer it with"))
        while not second.service.requests_with(["sql"]) or not second.engine.tally.in_flight["sql"]:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        done = (await post(first, "drain", expert="sql", reason="new GPU", wait_s=0)).json()
        assert (done["drained"], done["requests"]) == (True, 1)
        for one in f.gateways:
            routed = (
                await one.http.post(
                    "/v1/route", json={"model": "auto", "messages": [{"role": "user", "content": "sql 1"}]}
                )
            ).json()
            assert routed["removed"] == {"sql": "drained: new GPU"} and "sql" not in routed["allowed"]
            assert (await ask(one, "auto")).model in ("general", "legal")
            assert await code_of(one, "sql") == "503 expert_drained"
            assert (await one.client.models.retrieve("sql")).coe["drained"] == "new GPU"
        waited = await post(first, "drain", expert="sql", reason="new GPU", wait_s=20)
        assert waited.json()["requests"] == 0 and answering.done() and (await answering).model == "sql"
        f.ready.set()
        undone = await post(second, "undrain", expert="sql")
        assert undone.json()["drained"] is False
        assert [(await ask(one, "auto")).model for one in f.gateways] == ["sql", "sql"]


async def test_a_request_that_only_a_drained_expert_may_answer_says_so(tmp_path: Path) -> None:
    async with fleet(tmp_path) as f:
        [one] = f.gateways
        await post(one, "drain", expert="general", reason="x")
        assert await code_of(one, "coe/vote") == "503 expert_drained"
        assert (await ask(one, "auto", "general 1")).model in ("sql", "legal")
        with pytest.raises(openai.InternalServerError, match="drained: x"):
            await ask(one, "auto", extra_body={"coe": {"experts": ["general"]}})


async def test_an_added_expert_is_checked_served_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="coe.audit")
    async with fleet(tmp_path, count=2) as f:
        first, second = f.gateways
        text = '{name: new, kind: model, source: "fake://upper", description: one}'
        dry = await put(first, text, "?dry_run=true")
        assert [step["action"] for step in dry.json()["steps"]] == ["add"] and await code_of(first, "new") is not None
        done = (await put(first, text)).json()
        assert (done["served"], [(s["action"], s["name"], s["version"]) for s in done["steps"]]) == (
            True,
            [("add", "new", 1)],
        )
        assert (await ask(second, "new")).choices[0].message.content == "SQL 1"
        changed = await put(
            second,
            '{"experts": [{"name": "new", "kind": "model", "source": "fake://echo"}]}',
            kind="text/json; charset=utf-8",
        )
        assert [(s["action"], s["version"]) for s in changed.json()["steps"]] == [("update", 2)]
        same = (await put(second, "{name: new, kind: model, source: 'fake://echo'}")).json()
        assert (
            same["steps"][0]["action"] == "unchanged" and same["registry_version"] == changed.json()["registry_version"]
        )
        assert (await ask(first, "new")).choices[0].message.content == "sql 1"
    lines = [record.getMessage() for record in caplog.records if record.name == "coe.audit"]
    assert lines[0] == "admin at=2001-09-09T01:46:40Z by='this machine' action='add' what='new@1' registry=2"


WRONG = (
    ("{name: x, kind: model, source: /etc}", "403 the expert 'x' reads files"),
    ("{name: x, kind: model, source: ' /etc'}", "403 the expert 'x' reads files"),
    ("{name: x, kind: model, source: 'home://models/x'}", "403 the expert 'x' reads files"),
    ("{name: x, kind: model, source: models/x.gguf}", "403 the expert 'x' reads files"),
    ("{name: x, kind: remote, context_length: 9, source: {command: [sh, -c, id]}}", "403 the expert 'x' starts a"),
    (
        "{name: x, kind: remote, context_length: 9, source: 'command://x', server: {command: [sh]}}",
        "403 the expert",
    ),
    ("{name: x, kind: model, source: 'fake://echo', engine: 'os:system'}", "403 the expert 'x' needs an engine"),
    ("{name: x, kind: model, source: 'other://echo', engine: hf}", "403 the expert 'x' needs an engine"),
    (
        "{name: x, kind: remote, context_length: 9, source: 'http://evil.example/v1', api_key_env: HF_TOKEN}",
        "403 the expert 'x' sends the value of an environment variable",
    ),
    (
        "experts: [{name: ok, kind: model, source: 'fake://echo'}, &a {name: x, kind: model, source: /etc}, *a]",
        "403",
    ),
    ("{name: x, kind: model, source: 'fake://echo', <<: {engine: 'os:system'}}", "403 the expert 'x' needs"),
    ("{name: x, kind: model}", "400 /request:1: experts[0]: `source` is required"),
    ("{name: auto, kind: model, source: 'fake://echo'}", "400 /request:1: experts[0].name: 'auto' is reserved"),
    ("{name: x@1, kind: model, source: 'fake://echo'}", "400 /request:1: experts[0].name: 'x@1' is not a name"),
    ("{name: x, kind: adapter, base: none, source: 'fake://echo'}", "400 /request:1: experts[0].base"),
    (
        "{name: x, kind: model, source: 'fake://echo', version: 7}",
        "400 /request:1: experts[0].version: is assigned",
    ),
    ("- 1", "400"),
    ("", "400"),
    ("[[[[", "400 /request:1: is not YAML"),
    ("experts: 7", "400"),
    ("x" * 300_000, "400 the text has more than 262,144 characters"),
    ("\x00", "400"),
    ("{name: voter, kind: embedding, source: 'fake://echo'}", "409 the service could not answer with this change"),
)


async def test_a_wrong_or_dangerous_expert_changes_nothing(tmp_path: Path) -> None:
    async with fleet(tmp_path) as f:
        [one] = f.gateways
        for text, words in WRONG:
            answer = await put(one, text)
            assert message(answer).startswith(words), (text[:99], answer.text[:500])
        with Registry(f.config.registry) as registry:
            assert registry.snapshot().version == 1


async def test_what_a_setting_allows_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "prices.json").write_text("{}")
    async with fleet(tmp_path, allowed="files, secrets") as f:
        [one] = f.gateways
        relative = await put(one, "{name: x, kind: model, source: models/x}")
        assert message(relative).startswith("400 the source 'models/x' is relative to no file")
        missing = await put(one, f"{{name: x, kind: model, source: {tmp_path}/none}}")
        assert missing.status_code == 400 and "none" in missing.json()["error"]["message"]
        far = "{name: far, kind: remote, context_length: 99, source: 'http://127.0.0.1:9/v1', api_key_env: KEY}"
        assert (await put(one, far)).json()["served"] is True
        half = b"{name: half, kind: model, source: 'fake://echo'}"
        head = "POST /admin/experts HTTP/1.1\r\nhost: localhost\r\ncontent-type: text/yaml\r\n"
        head += f"content-length: {len(half) + 9}"
        async with connected(one.port) as (_, writer):
            writer.write(head.encode() + b"\r\n\r\n" + half)
            await writer.drain()
            await asyncio.sleep(0.1)
        refused = await put(one, "name: x", kind="text/plain")
        assert refused.status_code == 415 and "application/yaml" in refused.json()["error"]["message"]
        binary = await one.http.post("/admin/experts", content=b"\xff", headers={"content-type": "text/yaml"})
        assert message(binary) == "400 the body is not UTF-8 (byte 0)"
        await asyncio.sleep(0.3)
        with Registry(f.config.registry) as registry:
            assert "half" not in registry.snapshot(), "its client left before the end of the body"


async def test_a_removed_expert_is_drained_first_and_routers_that_know_it_go_on(tmp_path: Path) -> None:
    async with fleet(tmp_path, count=2, token_delay_s=0.2) as f:
        first, second = f.gateways
        answering = asyncio.create_task(ask(second, "sql", "one two three four five six seven"))
        while not second.engine.tally.in_flight["sql"]:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        early = await first.http.delete("/admin/experts/sql?wait_s=0")
        assert message(early).startswith("409 1 requests use 'sql' after 0 s, and it takes no new ones")
        assert await code_of(second, "sql") == "503 expert_drained"
        done = (await first.http.delete("/admin/experts/sql?wait_s=20")).json()
        assert (done["object"], done["expert"], done["served"]) == ("coe.removed", "sql", True)
        assert (await answering).model == "sql"
        for one in f.gateways:
            assert await code_of(one, "sql") == "404 model_not_found"
            assert (await ask(one, "auto")).model in ("general", "legal"), "the router's first choice has gone"
        with Registry(f.config.registry) as registry:
            assert registry.get("sql@1").name == "sql" and not registry.expert_states()


NEEDED = (
    ("general", "the policy 'vote' answers with it"),
    ("general", "it is the fallback of the policy 'default'"),
    ("voter", "the composition of the policy 'vote' names it"),
    ("legal", "the configuration pins it"),
    ("sql", "x need it (base or member)"),
    ("sql", "the alias prod points to it"),
)


async def test_what_is_needed_is_not_removed_and_goes_on(tmp_path: Path) -> None:
    async with fleet(tmp_path, pins="legal") as f:
        [one] = f.gateways
        with Registry(f.config.registry) as registry:
            registry.add(ExpertSpec(name="x", kind=Kind.ADAPTER, source="fake://echo", base="sql"))
            registry.point_alias("prod", "sql", by="", now=0.0)
        for name, words in NEEDED:
            answer = await one.http.delete(f"/admin/experts/{name}")
            assert answer.json()["error"]["code"] == "change_refused" and words in message(answer), answer.text
            assert await code_of(one, name) is None
        missing = await one.http.delete("/admin/experts/sq")
        assert message(missing).startswith("404 'sq' is not in the registry; did you mean 'sql'")


async def test_pins_are_loaded_first_kept_and_undone(tmp_path: Path) -> None:
    async with fleet(tmp_path, pins="legal", budget_bytes=9) as f:
        [one] = f.gateways
        assert (await post(one, "pin", expert="sql")).json()["served"] is True
        assert one.host.resident == {"sql", "legal"} and one.host.cache.pins == {"sql@1", "legal@1"}
        full = await post(one, "pin", expert="voter")
        assert full.status_code == 503 and "budget" in message(full)
        refused = await post(one, "unpin", expert="legal")
        assert message(refused) == "409 the configuration pins legal: change `pins` there"
        listed = (await one.http.get("/admin/experts")).json()["experts"]
        assert {each["name"]: (each["pinned"], each["changed_by"]) for each in listed} == {
            "general": (False, None),
            "legal": (True, None),
            "sql": (True, "this machine"),
            "voter": (False, None),
        }
        assert (await post(one, "unpin", expert="sql")).json()["pinned"] is False
        assert one.host.cache.pins == {"legal@1"}
        assert (await post(one, "pin", expert="none")).status_code == 404


async def test_an_alias_serves_its_version_beside_the_newer_one_and_goes_back(tmp_path: Path) -> None:
    async with fleet(tmp_path, count=2) as f:
        first, second = f.gateways
        assert (await post(first, "aliases", alias="prod", to="sql")).json()["version"] == 1
        await put(first, "{name: sql, kind: model, source: 'fake://upper', size_bytes: 4}")
        old, new = await ask(second, "prod", "Hi"), await ask(second, "sql", "Hi")
        assert (old.model, old.choices[0].message.content) == ("sql@1", "Hi")
        assert (new.model, new.choices[0].message.content) == ("sql", "HI")
        entry = second.log.lines[0]
        assert (entry.model, entry.expert) == ("prod", "sql@1")
        listed = {model.id: model.coe for model in (await second.client.models.list()).data}
        assert listed["prod"]["alias"] == "sql@1" and listed["prod"]["version"] == listed["sql@1"]["version"] == 1
        assert (await first.client.models.retrieve("prod")).coe["alias"] == "sql@1"
        assert (await ask(first, "auto", "sql 1")).model == "sql", "routers choose among the current experts"
        moved = (await post(second, "promote", alias="prod", to="2")).json()
        assert (moved["expert"], moved["version"], moved["served"]) == ("sql", 2, True)
        assert (await ask(first, "prod", "Hi")).choices[0].message.content == "HI"
        assert await code_of(first, "sql@1") is None, "gateways that are behind still call it, until the next change"
        assert (await post(first, "rollback", alias="prod")).json()["version"] == 1
        assert (await ask(first, "prod", "Hi")).model == "sql@1"
        await post(first, "promote", alias="prod", to="2")
        await put(first, "{name: other, kind: model, source: 'fake://echo'}")
        assert await code_of(first, "sql@1") == "404 model_not_found"
        await post(first, "rollback", alias="prod")
        await post(first, "drain", expert="sql")
        assert await code_of(second, "prod") == "503 expert_drained", "a drain is of all versions"
        assert message(await post(first, "promote", alias="pro", to="2")).startswith("409 there is no alias 'pro'")
        assert message(await post(first, "promote", to="2")) == "400 name one alias, as ?alias=...; got 0"
        assert (await first.http.delete("/admin/aliases/prod")).json()["name"] == "prod"
        assert await code_of(first, "prod") == "404 model_not_found"


async def test_an_alias_gives_a_key_no_more_than_the_expert_behind_it(tmp_path: Path) -> None:
    keyring = Keyring(StoredKeys(f"sqlite:///{tmp_path / 'registry.db'}"))
    async with fleet(tmp_path, keyring=keyring) as f:
        [one] = f.gateways
        with Registry(f.config.registry) as registry:
            registry.point_alias("prod", "sql", by="", now=0.0)
            registry.add(expert("sql", "fake://upper"))
            keys = {
                name: registry.create_api_key(KeySpec(name=name, experts=patterns, admin=name == "admin"), 0.0)
                for name, patterns in {"sql": ("sql",), "alias": ("prod", "legal"), "admin": None}.items()
            }
            version = registry.snapshot().version
        async with asyncio.timeout(20):
            while f.catalog.snapshot.version < version:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        told = {}
        for name, (_, text) in keys.items():
            client = one.client.with_options(api_key=text)
            told[name] = sorted(model.id for model in (await client.models.list()).data)
            answer = client.chat.completions.create(model="prod", messages=[{"role": "user", "content": "Hi"}])
            if name == "alias":
                with pytest.raises(openai.NotFoundError) as refused:
                    await answer
                assert "sql" not in str(refused.value), "what is behind it stays unknown"
            else:
                assert (await answer).model == "sql@1"
        assert {"prod", "sql", "sql@1"} <= {*told["sql"]} and "legal" in told["alias"]
        assert not {"prod", "sql", "sql@1"} & {*told["alias"]}
        by_user = await one.http.post("/admin/drain?expert=sql", headers={"authorization": f"Bearer {keys['sql'][1]}"})
        assert by_user.json()["error"]["code"] == "key_not_allowed"
        operator = {"authorization": f"Bearer {keys['admin'][1]}"}
        assert (await one.http.post("/admin/drain?expert=sql&reason=x", headers=operator)).status_code == 200
        listed = (await one.http.get("/admin/experts", headers=operator)).json()["experts"]
        assert [each["changed_by"] for each in listed if each["drained"]] == [f"key {keys['admin'][0].id}"]


async def test_changes_at_once_are_all_made_or_refused_whole(tmp_path: Path) -> None:
    async with fleet(tmp_path, count=2) as f:
        adds = [put(f.gateways[i % 2], f"{{name: new{i}, kind: model, source: 'fake://echo'}}") for i in range(6)]
        same = [
            put(one, f"{{name: same, kind: model, source: 'fake://{kind}'}}")
            for one, kind in zip(f.gateways, ("echo", "upper"), strict=True)
        ]
        answers = await asyncio.gather(*adds, *same, post(f.gateways[0], "drain", expert="sql", reason="a"))
        assert [answer.status_code for answer in answers] == [200] * 9
        with Registry(f.config.registry) as registry:
            snapshot = registry.snapshot()
        assert {f"new{i}" for i in range(6)} <= {*snapshot} and snapshot.drained == {"sql": "a"}
        assert snapshot.get("same").version == 2, "the second change is of the first"
        both = await asyncio.gather(
            f.gateways[0].http.delete("/admin/experts/new0"),
            put(f.gateways[1], "{name: x, kind: adapter, base: new0, source: 'fake://echo'}"),
        )
        statuses = [answer.status_code for answer in both]
        assert sorted(statuses)[0] == 200 and sorted(statuses)[1] in (400, 409), "one of them comes first"
        removes = await asyncio.gather(*(one.http.delete("/admin/experts/new1") for one in f.gateways))
        assert sorted(answer.status_code for answer in removes)[0] == 200
        assert all(answer.status_code in (200, 404) for answer in removes)


async def test_a_change_while_another_is_planned_is_planned_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with fleet(tmp_path) as f:
        [one] = f.gateways
        plans = list[int]()

        def plan(document: Any, registry: Registry) -> Any:
            planned = really_plan(document, registry)
            plans.append(1)
            if len(plans) < 3:
                registry.add(expert("sql", f"fake://{'upper' if len(plans) % 2 else 'echo'}"))
            return planned

        monkeypatch.setattr(expert_changes, "plan", plan)
        assert (await put(one, "{name: new, kind: model, source: 'fake://echo'}")).status_code == 200
        assert len(plans) == 3
        monkeypatch.setattr(expert_changes, "ATTEMPTS", 1)
        plans.clear()
        busy = await put(one, "{name: newer, kind: model, source: 'fake://echo'}")
        assert message(busy) == "409 the registry changes all the time: try again later"


async def test_a_change_that_cannot_be_served_yet_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For example, the configuration was made invalid meanwhile: the service goes on as before."""
    monkeypatch.setattr(expert_changes, "SERVED_S", 0.3)
    async with fleet(tmp_path) as f:
        [one] = f.gateways
        (tmp_path / "service.yaml").write_text("nonsense: 1")
        done = (await put(one, "{name: new, kind: model, source: 'fake://echo'}")).json()
        assert done["served"] is False and done["warnings_of_service"][0].startswith("not reloaded: ")
        assert await code_of(one, "new") == "404 model_not_found" and await code_of(one, "sql") is None
        await post(one, "drain", expert="sql", reason="now")
        assert await code_of(one, "sql") == "503 expert_drained", "a drain does not wait for a catalog"


async def test_experts_of_files_are_changed_in_the_files(tmp_path: Path) -> None:
    (tmp_path / "experts.yaml").write_text("experts: [{name: a, kind: model, source: 'fake://echo'}]")
    (tmp_path / "files.yaml").write_text("experts: [experts.yaml]\npolicies: {default: {expert: a}}")
    with Source(tmp_path / "files.yaml") as source:
        async with gateway(changes=Fleet(source).changes()) as one:
            answer = await post(one, "drain", expert="echo")
            assert answer.status_code == 501 and "are those of experts.yaml: change that file" in message(answer)
    async with gateway() as one:
        assert (await one.http.get("/admin/experts")).status_code == 501
        assert (await one.http.put("/admin/experts")).status_code == 405
