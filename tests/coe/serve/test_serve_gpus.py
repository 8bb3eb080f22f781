"""The GPUs that expert hosts ask Ray for, as shares of those there are: the figures, without Ray.

tests/coe/serve/test_serve_gpus_ray.py has services whose hosts get them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray
from pydantic import ValidationError

from coe.config import Config, PlacementConfig
from coe.errors import ConfigError
from coe.hosting import gpu_share
from coe.serve.cluster.application import build_application
from coe.serve.cluster.catalog import Catalog
from coe.serve.cluster.gpus import check_gpus, gpus_by_pool, with_gpus
from coe.serve.cluster.server import Server
from coe.serve.cluster.source import Source
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot

SNAPSHOT = Snapshot(
    1,
    {
        "fake": ExpertSpec(name="fake", kind=Kind.MODEL, source="fake://echo"),
        "large": ExpertSpec(name="large", kind=Kind.MODEL, source="/models/large"),
        "tuned": ExpertSpec(name="tuned", kind=Kind.ADAPTER, base="large", source="/models/tuned"),
    },
)


def config(*pools: dict[str, Any], device: str = "auto") -> Config:
    return Config.model_validate({"engines": {"hf": {"device": device}}, "serve": {"pools": pools}})


@pytest.mark.parametrize(
    ("processes", "gpus", "share"),
    [(1, 1, 1), (2, 1, 0.5), (3, 1, 0.3333), (3, 2, 0.5), (2, 4, 1), (1, 0, 0), (0, 2, 0), (5, 2, 0.3333)],
)
def test_processes_get_a_gpu_or_an_equal_share_such_that_all_find_a_place(
    processes: int, gpus: int, share: float
) -> None:
    assert gpu_share(processes, gpus) == share
    assert not share or int(1 / share) * gpus >= processes


def shares(available: float, *pools: dict[str, Any], device: str = "auto") -> dict[str, float]:
    return gpus_by_pool(config(*pools, device=device), SNAPSHOT, available)


def test_computed_pools_share_the_gpus_since_any_of_them_may_get_a_model_later() -> None:
    placed = config({"name": "a", "experts": ["fake"]}, {"name": "b", "experts": []})
    assert gpus_by_pool(placed, SNAPSHOT, 2) == {"a": 0, "b": 0}
    serve = placed.serve.model_copy(update={"placement": PlacementConfig(hosts=2)})
    assert gpus_by_pool(placed.model_copy(update={"serve": serve}), SNAPSHOT, 2) == {"a": 1, "b": 1}


def test_pools_whose_engines_compute_on_a_gpu_share_those_that_others_leave() -> None:
    everything, light = {"name": "all", "replicas": 2}, {"name": "light", "experts": ["fake"]}
    adapters, stated = {"name": "adapters", "experts": ["tuned"]}, {"name": "stated", "num_gpus": 2}
    assert shares(4, everything, light) == {"all": 1, "light": 0}
    assert shares(1, everything, light) == {"all": 0.5, "light": 0}
    assert shares(1, everything, adapters) == {"all": 0.3333, "adapters": 0.3333}
    assert shares(3, everything, stated) == {"all": 0.5, "stated": 2}
    assert shares(0, everything, stated) == {"all": 0, "stated": 2}
    scaling = {"name": "all", "replicas": {"min": 1, "max": 4}}
    assert shares(2, scaling) == {"all": 0.5}, "the most processes find a place"


@pytest.mark.parametrize(("device", "share"), [("auto", 1), ("cuda", 1), ("cpu", 0), ("cuda:1", 0), ("mps", 0)])
def test_an_engine_on_another_device_asks_for_none(device: str, share: float) -> None:
    assert shares(1, {"name": "all"}, device=device) == {"all": share}


def on_vllm(parallel: int, *pools: dict[str, Any]) -> tuple[Config, Snapshot]:
    """A configuration whose vLLM engine splits each model over so many GPUs; the expert `f` needs none."""
    sections = {"engines": {"vllm": {"tensor_parallel_size": parallel}}, "serve": {"pools": pools or ({},)}}
    vllm = ExpertSpec(name="v", kind=Kind.MODEL, source="/models/v", engine="vllm")
    fake = ExpertSpec(name="f", kind=Kind.MODEL, source="fake://echo")
    return Config.model_validate(sections), Snapshot(1, {"v": vllm, "f": fake})


@pytest.mark.parametrize(("parallel", "available", "gpus"), [(1, 1, 1), (2, 2, 2), (2, 1, 2), (2, 0, 0)])
def test_a_host_asks_for_the_gpus_that_share_a_model(parallel: int, available: float, gpus: float) -> None:
    assert gpus_by_pool(*on_vllm(parallel), available) == {"hosts": gpus}


def test_models_on_several_gpus_leave_the_rest_to_other_pools() -> None:
    pools = {"name": "a", "experts": ["v"], "replicas": 2}, {"name": "b", "experts": ["f"]}
    settings, snapshot = on_vllm(2, *pools)
    assert gpus_by_pool(settings, snapshot, 4) == {"a": 2, "b": 0}
    with pytest.raises(ConfigError, match="2 processes of the pool 'a' ask for 2 GPUs each, and Ray has 3"):
        check_gpus(settings, gpus_by_pool(settings, snapshot, 3), 3)


def options_of(settings: Config, snapshot: Snapshot, available: float) -> dict[str, Any]:
    """Pool -> its deployment, with the GPUs chosen."""
    chosen = with_gpus(settings, gpus_by_pool(settings, snapshot, available))
    hosts = build_application(chosen, Catalog.of(chosen, snapshot, 1))._bound_deployment.init_args[1]
    return {name: host._bound_deployment for name, host in hosts.items()}


def test_each_gpu_of_a_model_is_a_bundle_of_the_group_of_its_host() -> None:
    settings, snapshot = on_vllm(2, {"name": "a", "num_cpus": 0.5}, {"name": "b", "experts": ["f"]})
    found = options_of(settings, snapshot, 2)
    replica = found["a"]._replica_config
    assert replica.placement_group_bundles == [{"CPU": 0.5}, {"GPU": 1}, {"GPU": 1}]
    assert replica.ray_actor_options["num_gpus"] == 0  # the bundle of the host has none
    assert found["b"]._replica_config.placement_group_bundles is None
    whole = on_vllm(2, {"name": "a", "num_gpus": 4, "num_cpus": 0})
    assert len(options_of(*whole, 4)["a"]._replica_config.placement_group_bundles) == 5
    itself = on_vllm(2, {"name": "a", "num_gpus": 0})  # vLLM makes a group of its own
    assert options_of(*itself, 4)["a"]._replica_config.placement_group_bundles is None


def test_the_group_of_a_pool_stays_without_its_model_and_a_first_model_that_needs_one_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Serve restarts the replicas of a deployment whose group or actor options change."""
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0, "GPU": 4.0})

    def edit(one: str, two: str) -> None:
        (tmp_path / "service.yaml").write_text(
            "experts: [experts.yaml]\nengines: {'parallel_engine:ParallelEngine': {tensor_parallel_size: 2}}\n"
            f"serve: {{pools: [{{name: one, experts: [{one}]}}, {{name: two, experts: [{two}], num_gpus: 2}}]}}\n"
        )

    def deployed() -> dict[str, Any]:
        settings = server._with_gpus()
        built = build_application(settings, server._source.catalog, server._with_groups(settings))._bound_deployment
        hosts = {name: host._bound_deployment for name, host in built.init_args[1].items()}
        groups = {name: host._replica_config.placement_group_bundles for name, host in hosts.items()}
        return {name: (group, hosts[name].ray_actor_options["num_gpus"]) for name, group in groups.items()}

    (tmp_path / "experts.yaml").write_text(
        "experts:\n"
        "  - {name: echo, kind: model, source: 'fake://echo'}\n"
        "  - {name: upper, kind: model, source: 'fake://upper'}\n"
        "  - {name: large, kind: model, source: 'large://x', engine: 'parallel_engine:ParallelEngine', size_bytes: 9}\n"
    )
    said: list[str] = []
    edit("large", "echo, upper")
    with Source(tmp_path / "service.yaml") as source:
        server = Server(source, lambda part, what: said.append(f"{part}: {what}"))
        first = deployed()
        assert first["one"] == ([{"CPU": 0.25}, {"GPU": 1}, {"GPU": 1}], 0) and first["two"] == (None, 2)
        edit("echo", "upper")
        source.reread()
        assert deployed() == first and said == [], "nothing that would restart a host"
        edit("echo", "large")
        source.reread()
        moved = deployed()
        assert moved["one"] == first["one"] and moved["two"] == first["one"]
        assert len(said) == 1 and said[0].startswith("restarts: the hosts of the pools two:")
        assert deployed() == moved and len(said) == 1


def test_a_pool_with_fewer_gpus_than_a_model_takes_is_refused() -> None:
    with pytest.raises(ConfigError, match="states 1 GPUs, and its engines split each model over 2"):
        options_of(*on_vllm(2, {"name": "a", "num_gpus": 1}), 4)


def test_the_hosts_of_a_pool_ask_for_its_share() -> None:
    settings = with_gpus(config({"name": "a", "experts": ["large"]}, {"name": "b"}), {"a": 0.5, "b": 0.0})
    hosts = build_application(settings, Catalog.of(settings, SNAPSHOT, 1))._bound_deployment.init_args[1]
    assert {name: host._bound_deployment.ray_actor_options["num_gpus"] for name, host in hosts.items()} == {
        "a": 0.5,
        "b": 0,
    }


@pytest.mark.parametrize("gpus", [-1, 1.5, float("inf"), float("nan")])
def test_a_number_of_gpus_that_ray_cannot_reserve_is_refused(gpus: float) -> None:
    with pytest.raises(ValidationError, match="num_gpus"):
        config({"num_gpus": gpus})


@pytest.mark.parametrize(
    ("available", "pools", "message"),
    [
        (
            0,
            [{"name": "a", "num_gpus": 1}],
            "1 processes of the pool 'a' ask for 1 GPUs each, and Ray has 0: lower its",
        ),
        (2, [{"name": "a", "num_gpus": 0.6, "replicas": 3}], "3 processes of the pool 'a' ask for 0.6 GPUs each"),
        (2, [{"name": "a", "num_gpus": 2}, {"name": "b", "num_gpus": 0.5}], r"2.5 GPUs \(2 for 'a', 0.5 for 'b'\)"),
        (1, [{"name": "a", "num_gpus": 2}], "ask for 2 GPUs each, and Ray has 1"),
    ],
)
def test_more_than_there_are_is_refused(available: float, pools: list[dict[str, Any]], message: str) -> None:
    settings = config(*pools)
    with pytest.raises(ConfigError, match=message):
        check_gpus(settings, gpus_by_pool(settings, SNAPSHOT, available), available)


@pytest.mark.parametrize(
    ("available", "pools"),
    [
        (0, [{"name": "a"}]),
        (1, [{"name": "a", "num_gpus": 0.3333, "replicas": 3}]),
        (1, [{"name": "a", "num_gpus": 0.1, "replicas": {"min": 1, "max": 99}}]),
        (3, [{"name": "a", "num_gpus": 2}, {"name": "b", "num_gpus": 0.5, "replicas": 2}]),
    ],
)
def test_what_fits_is_accepted(available: float, pools: list[dict[str, Any]]) -> None:
    settings = config(*pools)
    check_gpus(settings, gpus_by_pool(settings, SNAPSHOT, available), available)


def test_the_server_chooses_once_and_refuses_what_its_own_ray_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another choice at a reload would restart the hosts; a cluster that is joined may get more nodes."""
    gpus = {"CPU": 2.0, "GPU": 2.0}
    monkeypatch.setattr(ray, "cluster_resources", lambda: gpus)

    def server(pool: str, joined: str = "null") -> Server:
        (tmp_path / "experts.yaml").write_text('experts: [{name: echo, kind: model, source: "fake://echo"}]')
        (tmp_path / "service.yaml").write_text(
            f"experts: [experts.yaml]\nserve: {{ray: {joined}, pools: [{{name: a, {pool}}}]}}\n"
        )
        return Server(Source(tmp_path / "service.yaml"), lambda part, what: None)

    def asked(of: Server) -> list[float | None]:
        return [pool.num_gpus for pool in of._with_gpus().serve.pools]

    chosen = server("num_gpus: 0.5")
    assert asked(chosen) == [0.5] and asked(server("replicas: 2")) == [0.0]
    gpus.clear()
    assert asked(chosen) == [0.5]
    with pytest.raises(ConfigError, match="ask for 0.5 GPUs each, and Ray has 0"):
        asked(server("num_gpus: 0.5"))
    assert asked(server("num_gpus: 0.5", joined="auto")) == [0.5]
