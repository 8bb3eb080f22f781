"""A gateway under new catalogs, without Ray."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coe.config import Config, DecisionLogConfig, HostPoolConfig, PolicyConfig, ServeConfig
from coe.errors import PolicyUnavailable
from coe.protocol.errors import error_body
from coe.protocol.requests import parse_chat
from coe.serve.cluster.catalog import Catalog
from coe.serve.cluster.gateway import Gateway
from coe.serve.cluster.last_good import LastGood
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot
from routers.artifacts import ARRAYS, META, save
from routers.base import Query
from routers.encoders.build import build_encoder
from routers.factory import build
from routers.outcomes.table import OutcomeTable

POOL = HostPoolConfig(experts=("echo",))
CONFIG = Config(serve=ServeConfig(pools=(POOL,), log=DecisionLogConfig(folder=None)))
SNAPSHOT = Snapshot(3, {"echo": ExpertSpec(name="echo", kind=Kind.MODEL, source="fake://echo")})


def catalog(generation: int, **policies: PolicyConfig) -> Catalog:
    return Catalog(generation, SNAPSHOT, policies, "default")


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    gateway = Gateway(CONFIG, {})
    yield gateway
    gateway._service.close()


async def test_a_new_catalog_is_used_from_then_on(gateway: Gateway) -> None:
    assert not gateway._service.orchestrator.snapshot.experts
    await gateway.reconfigure(catalog(1, default=PolicyConfig(expert="echo")).to_json())
    assert set(gateway._service.orchestrator.policies) == {"default"}
    await gateway.reconfigure(
        catalog(2, default=PolicyConfig(expert="echo"), more=PolicyConfig(expert="echo")).to_json()
    )
    assert set(gateway._service.orchestrator.policies) == {"default", "more"}
    assert await gateway.state() == {"generation": 2}


async def test_a_router_that_has_gone_since_it_was_checked_changes_nothing(gateway: Gateway, tmp_path: Path) -> None:
    """Serve would end a replica that raises, even the only one."""
    gone = catalog(2, default=PolicyConfig(router=tmp_path / "gone")).to_json()
    await gateway.reconfigure(catalog(1, default=PolicyConfig(expert="echo")).to_json())
    before = gateway._service.orchestrator
    await gateway.reconfigure(gone)
    assert gateway._service.orchestrator is before
    assert await gateway.state() == {"generation": 1}  # reports to the service that it kept the old catalog


def saved(folder: Path) -> Path:
    """A trained router for `echo`."""
    names = tuple(f"q{i}" for i in range(40))
    table = OutcomeTable(query_ids=names, prompts=names, experts=("echo",), scores=np.ones((40, 1)))
    encoder = build_encoder("hashing:64")
    save(build("knn", encoder, {}).fit(table), folder, table=table, encoder=encoder)
    return folder


async def warnings_of(gateway: Gateway) -> list[str]:
    _, about = await gateway._service.health()
    return list(about.get("warnings", ()))


async def restarted(document: dict[str, Any]) -> Gateway:
    """The gateway that Serve starts in place of a dead one."""
    gateway = Gateway(CONFIG, {})
    await gateway.reconfigure(document)
    return gateway


@pytest.mark.parametrize("damage", ["removed", "truncated", "another"])
async def test_a_gateway_that_restarts_after_its_router_has_gone_routes_by_the_kept_copy(
    gateway: Gateway, tmp_path: Path, coe_home: Path, damage: str
) -> None:
    folder = saved(tmp_path / "router")
    document = catalog(1, default=PolicyConfig(router=folder)).to_json()
    await gateway.reconfigure(document)
    digest = gateway._service.orchestrator.policies["default"].router_digest
    assert digest and await warnings_of(gateway) == []
    if damage == "removed":
        shutil.rmtree(folder)
    else:
        (folder / META).write_text("{" if damage == "truncated" else "[]")
    after = await restarted(document)
    policy = after._service.orchestrator.policies["default"]
    assert policy.router_digest == digest
    assert after._service.orchestrator.route([Query.of("hi")])[0].decision.experts == ("echo",)
    [warning] = await warnings_of(after)
    assert "policy 'default' uses a kept copy of its router" in warning and str(folder) in warning
    after._service.close()


@pytest.mark.parametrize("copy", ["none", "damaged"])
async def test_without_a_copy_the_policy_refuses_at_once_and_everything_else_answers(
    tmp_path: Path, coe_home: Path, copy: str
) -> None:
    folder = saved(tmp_path / "router")
    if copy == "damaged":
        LastGood().keep(folder)
        kept = LastGood().copy_of(folder)
        assert kept is not None
        (kept / ARRAYS).write_bytes(b"damaged")
    shutil.rmtree(folder)
    safe = PolicyConfig(router=folder, fallback="echo")
    policies = {"default": PolicyConfig(router=folder), "fixed": PolicyConfig(expert="echo"), "safe": safe}
    gateway = await restarted(catalog(1, **policies).to_json())
    service = gateway._service
    with pytest.raises(PolicyUnavailable) as caught:
        async with service.call("/v1/chat/completions") as call:
            await service.route(call, parse_chat({"model": "auto", "messages": [{"role": "user", "content": "hi"}]}))
    status, body = error_body(caught.value, logged_as="id")
    assert (status, body["error"]["code"]) == (503, "policy_unavailable")
    assert "its router cannot be loaded" in body["error"]["message"] and str(folder) not in body["error"]["message"]
    assert str(folder) in str(caught.value), "the log has the whole reason"
    for model in ("coe/fixed", "echo", "coe/safe"):
        assert service.orchestrator.route([Query.of("hi")], model)[0].decision.experts == ("echo",)
    _, about = await service.health()
    assert "policy 'default' is unavailable: " in about["warnings"][0]
    assert "policy 'safe' is unavailable; its fallback 'echo' answers: " in about["warnings"][1]
    saved(folder)  # it is back, and `coe serve` pushes it
    await gateway.reconfigure(catalog(2, **policies).to_json())
    assert service.orchestrator.route([Query.of("hi")])[0].decision.experts == ("echo",)
    assert await warnings_of(gateway) == []
    service.close()


async def test_what_coe_serve_found_is_in_health_until_it_is_over(gateway: Gateway) -> None:
    await gateway.reconfigure(catalog(1, default=PolicyConfig(expert="echo")).to_json())
    await gateway.show_warnings(["not reloaded: the registry cannot be read"])
    assert await warnings_of(gateway) == ["not reloaded: the registry cannot be read"]
    await gateway.show_warnings([])
    assert await warnings_of(gateway) == []


class Replicas:
    """All gateways of a service, as Serve's handle calls them. `late`: they do not answer in time."""

    def __init__(self, *gateways: Gateway) -> None:
        self.gateways, self.late = gateways, False

    def broadcast(self, method: str, *arguments: Any) -> Any:
        self._asked = (method, arguments)
        return self

    async def results_async(self, *, timeout_s: float, return_exceptions: bool) -> list[Any]:
        if self.late:
            raise TimeoutError
        method, arguments = self._asked
        return [await getattr(gateway, method)(*arguments) for gateway in self.gateways] + [OSError("it has died")]


async def test_a_drain_reaches_all_gateways_and_their_requests_are_counted(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Gateway(CONFIG, {})
    replicas = Replicas(gateway, other)
    monkeypatch.setattr("ray.serve.get_deployment_handle", lambda name, app: replicas)
    for each in replicas.gateways:
        await each.reconfigure(catalog(1, default=PolicyConfig(expert="echo")).to_json())
    async with other._service.call("/v1/chat/completions"):  # what it will call is not known yet
        assert await gateway.uses(["echo"]) == [{"version": 3, "requests": 0}, {"version": 3, "requests": 1}]
        await gateway.rule_out(4, {"echo": "why"})
        assert [each._service.orchestrator.snapshot.drained for each in replicas.gateways] == [{"echo": "why"}] * 2
        assert (await gateway.uses(["echo"]))[1]["requests"] == 1, "it began before"
    async with other._service.call("/v1/chat/completions"):
        assert (await gateway.uses(["echo"]))[1]["requests"] == 0
    await other.reconfigure(catalog(2, default=PolicyConfig(expert="echo")).to_json())
    assert other._service.orchestrator.snapshot.drained == {"echo": "why"}, "that catalog is of the registry before"
    await gateway.rule_out(3, {})
    assert gateway._service.orchestrator.snapshot.drained == {"echo": "why"}, "a message that was overtaken"
    await gateway.rule_out(5, {})
    assert not gateway._service.orchestrator.snapshot.drained
    replicas.late = True
    silent = {"version": -1, "requests": 1}
    assert await gateway.uses(["echo"]) == [{"version": 3, "requests": 0}, silent], "what it does is not known"
    other._service.close()


async def test_a_gateway_has_its_last_decisions_for_the_one_that_merges_them(gateway: Gateway) -> None:
    await gateway.reconfigure(catalog(1, default=PolicyConfig(expert="echo")).to_json())
    async with gateway._service.call("/v1/route") as call:
        await gateway._service.route(
            call, parse_chat({"model": "auto", "messages": [{"role": "user", "content": "hi"}]})
        )
    [record] = await gateway.decisions(5)
    assert (record["policy"], record["chosen"], record["endpoint"]) == ("default", ["echo"], "/v1/route")
    assert await gateway.decisions(0) == []
