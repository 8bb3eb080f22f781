"""The Serve application of a configuration: one deployment of gateways, and one per pool of expert hosts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from ray import serve
from ray.serve import Application, Deployment
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.schema import LoggingConfig

from coe.config import Config, HostPoolConfig, ProcessConfig
from coe.serve.cluster.catalog import Catalog
from coe.serve.cluster.direct_gateway import DirectGateway
from coe.serve.cluster.expert_host import ExpertHost
from coe.serve.cluster.gateway import GATEWAY, Gateway
from coe.serve.cluster.gpus import groups_by_pool
from coe.serve.cluster.request_router import SoonestStart
from coe.serve.cluster.scaling import by_requests_in_flight

ROUTER: Final[dict[str, Any]] = {"request_router_class": SoonestStart, "request_routing_stats_period_s": 0.5}
"""Serve's request router for expert hosts; hosts report their state twice a second."""
HEALTH_PERIOD_S: Final = 2.0
GATEWAY_HEALTH_S: Final = 5.0
"""Seconds a gateway has for a health check. Serve replaces it after three late ones, and clients wait until then."""
GRACE_S: Final = 5.0
"""Seconds a stopping replica has to finish its requests."""
VERSION: Final = "1"
"""Version of every deployment. While it is constant, a new catalog reconfigures replicas instead of restarting them."""


def build_application(
    config: Config, catalog: Catalog, groups: Mapping[str, Mapping[str, Any]] | None = None
) -> Application:
    """The application for `serve.run`. Deploying it again with another catalog pushes that to the running replicas.

    Args:
        groups: `groups_by_pool`; None: without any that runs.

    Raises:
        ConfigError: a pool states fewer GPUs than a model of it takes.
    """
    pushed = catalog.to_json()
    groups = groups_by_pool(config, catalog.snapshot) if groups is None else groups
    hosts = {pool.name: _hosts(config, pool, pushed, groups[pool.name]) for pool in config.serve.pools}
    direct = config.serve.http_path == "direct"
    kind = DirectGateway if direct else Gateway
    gateway = _deployment(
        serve.ingress()(kind), GATEWAY, config.serve.gateway, pushed, encoding_of(config), counts_itself=direct
    )
    # The gateway refuses excess requests with OpenAI's error body; Serve's own limit must not apply first.
    most = 4 * (config.serve.max_in_flight + config.serve.max_uploads)
    return gateway.options(max_ongoing_requests=most, health_check_timeout_s=GATEWAY_HEALTH_S).bind(config, hosts)


def encoding_of(config: Config) -> str:
    """Serve's name of the format of the logs. With JSON its filters give records the ids of request and replica."""
    return config.serve.log_format.upper()


def _hosts(config: Config, pool: HostPoolConfig, pushed: dict[str, Any], group: Mapping[str, Any]) -> Application:
    """group: options of the placement group of each host (`group_options`)."""
    reserved = pool.model_copy(update={"num_gpus": 0.0}) if group else pool  # its engines have the GPUs
    deployment = _deployment(ExpertHost, pool.name, reserved, pushed, encoding_of(config), counts_itself=True)
    return deployment.options(
        max_ongoing_requests=2 * config.host.max_waiting,  # the host's scheduler queues and refuses
        request_router_config=RequestRouterConfig(**ROUTER),
        **group,
    ).bind(config, pool)


def _deployment(
    target: type,
    name: str,
    process: ProcessConfig,
    pushed: dict[str, Any],
    encoding: str,
    *,
    counts_itself: bool = False,
) -> Deployment:
    replicas = process.replicas
    options: dict[str, Any] = {"num_replicas": replicas.min}
    policy: Any = AutoscalingPolicy
    if replicas.min < replicas.max:
        options = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=replicas.min,
                max_replicas=replicas.max,
                target_ongoing_requests=replicas.target,
                policy=policy(policy_function=by_requests_in_flight) if counts_itself else policy(),
            )
        }
    deployment: Any = serve.deployment(target)
    deployment = deployment.options(
        name=name,
        user_config=pushed,
        ray_actor_options={
            "num_cpus": process.num_cpus,
            "num_gpus": process.num_gpus or 0.0,
            "runtime_env": {"env_vars": process.environment},
        },
        health_check_period_s=HEALTH_PERIOD_S,
        graceful_shutdown_timeout_s=GRACE_S,
        graceful_shutdown_wait_loop_s=0.2,
        logging_config=LoggingConfig(enable_access_log=False, encoding=encoding),
        **options,
    )
    # Replicas are reconfigured, not replaced: Serve restarts the replicas of a deployment whose version changes, and
    # gives each deploy a random version unless this private option states one. Its public alternative, a broadcast,
    # does not reach replicas that start later. Without the option a reload becomes a rolling restart: slower, still
    # correct.
    versioned: Deployment = deployment.options(version=VERSION, _internal=True)
    return versioned
