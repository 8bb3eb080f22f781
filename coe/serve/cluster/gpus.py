"""The GPUs that pools of expert hosts ask Ray for: stated in the configuration, or what their engines use."""

from __future__ import annotations

from collections.abc import Mapping

from coe.config import Config, HostPoolConfig
from coe.errors import ConfigError
from coe.hosting import engine_kinds, gpu_share, uses_gpu
from coe.serve.cluster.catalog import serving
from registry.store import Snapshot


def gpus_by_pool(config: Config, snapshot: Snapshot, available: float) -> dict[str, float]:
    """Pool -> GPUs of each of its processes. What other pools state is theirs; the rest is shared equally.

    available: GPUs of the Ray cluster.
    """
    pools = config.serve.pools
    stated = {pool.name: pool.num_gpus for pool in pools if pool.num_gpus is not None}
    using = [pool for pool in pools if pool.name not in stated and _uses_gpu(config, snapshot, pool)]
    rest = available - sum(stated.get(pool.name, 0.0) * pool.replicas.max for pool in pools)
    share = gpu_share(sum(pool.replicas.max for pool in using), rest)
    return {pool.name: 0.0 for pool in pools} | {pool.name: share for pool in using} | stated


def _uses_gpu(config: Config, snapshot: Snapshot, pool: HostPoolConfig) -> bool:
    return uses_gpu(config, engine_kinds(config, serving(snapshot, pool)))


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
    pools = tuple(pool.model_copy(update={"num_gpus": gpus[pool.name]}) for pool in config.serve.pools)
    return config.model_copy(update={"serve": config.serve.model_copy(update={"pools": pools})})
