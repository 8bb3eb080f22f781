"""The Ray Serve application of a configuration: bounds, resources, and what a reload leaves unchanged."""

from types import SimpleNamespace
from typing import Any

import pytest

from coe.config import Config
from coe.serve.cluster.application import build_application
from coe.serve.cluster.catalog import Catalog
from coe.serve.cluster.expert_host import ExpertHost
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot

CONFIG = Config.model_validate(
    {
        "host": {"max_waiting": 50},
        "serve": {
            "gateway": {"replicas": {"min": 2, "max": 8, "target": 32}, "num_cpus": 1, "threads": 2},
            "pools": [{"name": "big", "num_gpus": 1}, {"name": "small", "replicas": 3, "num_cpus": 0.1}],
            "max_in_flight": 10,
        },
    }
)
SNAPSHOT = Snapshot(1, {"a": ExpertSpec(name="a", kind=Kind.MODEL, source="fake://echo")})


def deployments(generation: int = 1) -> dict[str, Any]:
    """Name -> deployment, of the whole application."""
    gateway = build_application(CONFIG, Catalog.of(CONFIG, SNAPSHOT, generation))._bound_deployment
    hosts = gateway.init_args[1]
    return {"gateway": gateway, **{name: host._bound_deployment for name, host in hosts.items()}}


def test_there_is_a_deployment_of_gateways_and_one_for_each_pool() -> None:
    built = deployments()
    assert built.keys() == {"gateway", "big", "small"}
    assert {name: deployment.name for name, deployment in built.items()} == {name: name for name in built}
    assert built["big"].func_or_class is ExpertHost and built["small"].init_args[1].name == "small"


def test_replicas_are_fixed_or_scale_within_their_bounds() -> None:
    built = deployments()
    scaling = built["gateway"]._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (2, 8, 32)
    assert [built[name]._deployment_config.autoscaling_config for name in ("big", "small")] == [None, None]
    assert (built["big"].num_replicas, built["small"].num_replicas) == (1, 3)


@pytest.mark.parametrize("http", ["direct", "haproxy", "proxy"])
def test_processes_scale_by_the_requests_that_they_count_unless_all_pass_through_serve(http: str) -> None:
    """Serve sees neither the connections of clients to gateways nor the calls over links."""
    scaled = {"replicas": {"min": 1, "max": 4}}
    config = Config.model_validate({"serve": {"http": http, "gateway": scaled, "pools": [{"name": "hosts", **scaled}]}})
    gateway = build_application(config, Catalog.of(config, SNAPSHOT, 1))._bound_deployment
    host = gateway.init_args[1]["hosts"]._bound_deployment
    policies = [each._deployment_config.autoscaling_config.policy for each in (gateway, host)]
    counted = [not policy.is_default_policy_function() for policy in policies]
    assert counted == [http == "direct", True]
    context = SimpleNamespace(
        aggregated_metrics={"in_flight": {"a": 20.0, "b": 30.0}}, config=SimpleNamespace(target_ongoing_requests=16)
    )
    assert policies[1].get_policy()(context)[0] == 50 / 16, "as the controller loads it"
    assert hasattr(gateway.func_or_class, "record_autoscaling_stats") == (http == "direct")


def test_processes_get_their_share_of_the_machine_and_their_threads() -> None:
    built = deployments()
    options = {name: deployment.ray_actor_options for name, deployment in built.items()}
    assert {name: each["num_cpus"] for name, each in options.items()} == {"gateway": 1, "big": 0.25, "small": 0.1}
    assert {name: each["num_gpus"] for name, each in options.items()} == {"gateway": 0, "big": 1, "small": 0}
    threads = {name: each["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] for name, each in options.items()}
    assert threads == {"gateway": "2", "big": "1", "small": "1"}


def test_serve_s_own_limits_come_after_those_that_speak_openai() -> None:
    built = deployments()
    assert built["gateway"].max_ongoing_requests > 10 and built["big"].max_ongoing_requests > 50


def test_another_catalog_changes_what_is_pushed_and_nothing_that_would_restart_a_process() -> None:
    for before, after in zip(deployments(1).values(), deployments(2).values(), strict=True):
        assert before.user_config["generation"] == 1 and after.user_config["generation"] == 2
        assert before.version == after.version is not None
        assert before.ray_actor_options == after.ray_actor_options
