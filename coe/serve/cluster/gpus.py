"""The GPUs that pools of expert hosts ask Ray for: stated in the configuration, or what their engines use.

An engine that splits a model over several GPUs starts a process for each, which Ray places into the placement group of
the host: each of its bundles has one GPU. So the GPUs are reserved with the host, and free when it ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from coe.config import Config, HostPoolConfig
from coe.errors import ConfigError
from coe.hosting import engine_kinds, gpu_share, gpus_per_model, uses_gpu
from coe.serve.cluster.catalog import serving
from registry.store import Snapshot

_LEAST_CPUS: Final = 0.001
"""CPUs of the bundle of a host: Ray refuses empty bundles."""


def gpus_by_pool(config: Config, snapshot: Snapshot, available: float) -> dict[str, float]:
    """Pool -> GPUs of each of its processes. What other pools state, or need for one model, is theirs.

    The rest is shared equally.

    available: GPUs of the Ray cluster.
    """
    pools = config.serve.pools
    parallel = {pool.name: _gpus_per_model(config, snapshot, pool) for pool in pools} if available else {}
    stated = {name: float(gpus) for name, gpus in parallel.items() if gpus > 1}
    stated |= {pool.name: pool.num_gpus for pool in pools if pool.num_gpus is not None}
    using = [pool for pool in pools if pool.name not in stated and _uses_gpu(config, snapshot, pool)]
    rest = available - sum(stated.get(pool.name, 0.0) * pool.replicas.max for pool in pools)
    share = gpu_share(sum(pool.replicas.max for pool in using), rest)
    return {pool.name: 0.0 for pool in pools} | {pool.name: share for pool in using} | stated


def _uses_gpu(config: Config, snapshot: Snapshot, pool: HostPoolConfig) -> bool:
    return uses_gpu(config, engine_kinds(config, _may_serve(config, snapshot, pool)))


def _gpus_per_model(config: Config, snapshot: Snapshot, pool: HostPoolConfig) -> int:
    return gpus_per_model(config, engine_kinds(config, _may_serve(config, snapshot, pool)))


def _may_serve(config: Config, snapshot: Snapshot, pool: HostPoolConfig) -> Snapshot:
    """The experts of a pool; of pools that are computed all, since any of them may get any expert at a reload."""
    return snapshot if config.serve.placement is not None else serving(snapshot, pool)


def groups_by_pool(
    config: Config, snapshot: Snapshot, running: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Mapping[str, Any]]:
    """Pool -> `group_options` of its hosts. A group that runs stays, since Serve restarts hosts that get another one.

    Without the model that it was for, its GPUs wait for the next such model.

    Args:
        running: the result at the last deployment, if any.

    Raises:
        ConfigError: as `group_options`.
    """
    before = running or {}
    return {pool.name: before.get(pool.name) or group_options(config, snapshot, pool) for pool in config.serve.pools}


def group_options(config: Config, snapshot: Snapshot, pool: HostPoolConfig) -> dict[str, Any]:
    """Options of a deployment whose engines split models over GPUs; empty for others.

    Raises:
        ConfigError: the pool states fewer GPUs than such a model takes.
    """
    needed, gpus = _gpus_per_model(config, snapshot, pool), pool.num_gpus or 0.0
    if needed == 1 or not gpus:
        return {}
    if gpus < needed:
        raise ConfigError(
            f"the pool {pool.name!r} states {gpus:g} GPUs, and its engines split each model over {needed} "
            "(`tensor_parallel_size`): raise its `num_gpus`, or leave it out"
        )
    host = {"CPU": max(pool.num_cpus, _LEAST_CPUS)}
    return {
        "placement_group_bundles": [host, *({"GPU": 1.0} for _ in range(int(gpus)))],
        "placement_group_strategy": "PACK",
    }


def check_gpus(config: Config, gpus: Mapping[str, float], available: float) -> None:
    """Raises ConfigError if the fewest processes of all pools need more than there is: Ray would wait without end."""
    pools = config.serve.pools
    wanted = {pool.name: pool.replicas.min * gpus[pool.name] for pool in pools}
    for pool in pools:
        if wanted[pool.name] > available or _places(gpus[pool.name], available) < pool.replicas.min:
            raise ConfigError(
                f"the service cannot start: {pool.replicas.min} processes of the pool {pool.name!r} ask for "
                f"{gpus[pool.name]:g} GPUs each, and Ray has {available:g}: lower its `num_gpus` or `replicas`, or "
                "join a cluster that has them (`--ray`)"
            )
    if sum(wanted.values()) > available:
        parts = ", ".join(f"{needed:g} for {pool!r}" for pool, needed in wanted.items() if needed)
        raise ConfigError(
            f"the service cannot start: its pools ask for {sum(wanted.values()):g} GPUs ({parts}), and Ray has "
            f"{available:g}: lower their `num_gpus` or `replicas`, or join a cluster that has them (`--ray`)"
        )


def _places(gpus: float, available: float) -> float:
    """Processes that fit; a fraction is of one GPU."""
    if not gpus:
        return float("inf")
    return int(available) * int(1 / gpus + 1e-6) if gpus <= 1 else available // gpus


def with_gpus(config: Config, gpus: Mapping[str, float]) -> Config:
    """The configuration with these GPUs stated."""
    return config.with_pools(p.model_copy(update={"num_gpus": gpus[p.name]}) for p in config.serve.pools)
