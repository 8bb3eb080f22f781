"""A gateway under new catalogs, without Ray."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from coe.config import Config, DecisionLogConfig, HostPoolConfig, PolicyConfig, ServeConfig
from coe.serve.cluster.catalog import Catalog
from coe.serve.cluster.gateway import Gateway
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot
from routers.errors import RouterError

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
    with pytest.raises(RouterError, match="gone"):
        await gateway.reconfigure(gone)
    await gateway.reconfigure(catalog(1, default=PolicyConfig(expert="echo")).to_json())
    before = gateway._service.orchestrator
    await gateway.reconfigure(gone)
    assert gateway._service.orchestrator is before
    assert await gateway.state() == {"generation": 1}  # reports to the service that it kept the old catalog
