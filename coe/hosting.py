"""Opens a Host for a configuration: its engines, its memory budget, and later changes of its experts."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final

from coe.config import Config
from coe.engines import create_engine, engine_kind, holds_weights
from coe.engines.base import Engine
from coe.errors import CoeError, ConfigError
from coe.experts import locate, open_snapshot
from coe.host import Host
from coe.memory import POLICIES
from registry.spelling import listing
from registry.store import Snapshot

FREE_SHARE = 0.8
"""Share of the free memory that weights may take if no budget is configured."""
IDLE_PERIOD_S: Final = 1.0
"""Seconds between two looks for weights that are idle for their `ttl_s`."""
logger = logging.getLogger(__name__)


@asynccontextmanager
async def open_host(
    config: Config, snapshot: Snapshot | None = None, *, clock: Callable[[], float] = time.monotonic
) -> AsyncIterator[Host]:
    """A Host over `snapshot`, by default the experts of `config`; unloads everything at exit."""
    if snapshot is None:
        snapshot = await asyncio.to_thread(open_snapshot, config)
    kinds = engine_kinds(config, snapshot)
    engines = _Engines(config)
    for kind in sorted(kinds):
        # Created now, so that a wrong configuration, or a package that is not installed, fails at startup.
        if (check := getattr(engines[kind], "check", None)) is not None:
            check()
    host = Host(
        snapshot,
        engines,
        budget_bytes=await asyncio.to_thread(budget_bytes, config, kinds),
        locate=lambda spec: locate(spec, host.snapshot.experts),
        pins=config.host.pins,
        aging_s=config.host.aging_s,
        max_waiting=config.host.max_waiting,
        eviction=POLICIES[config.host.eviction],
        ttl_s=config.host.ttl_s,
        most_parked=config.host.parked,
        kind_of=partial(engine_kind, on_cpu=config.engines.auto_on_cpu),
        clock=clock,
    )
    _warn_too_large(await asyncio.to_thread(host.too_large))
    unloading = asyncio.ensure_future(_unload_idle(host))
    try:
        yield host
    finally:
        unloading.cancel()
        await asyncio.gather(unloading, return_exceptions=True)
        await host.aclose()


def _warn_too_large(errors: Mapping[str, CoeError]) -> None:
    """One line, however many experts there are."""
    if len(errors) == 1:
        [(name, error)] = errors.items()
        logger.warning("expert %r cannot be loaded here, and requests for it are refused: %s", name, error)
    elif errors:
        logger.warning(
            "%d experts cannot be loaded here, and requests for them are refused: %s. The first: %s",
            len(errors),
            listing(map(repr, errors)),
            next(iter(errors.values())),
        )


async def _unload_idle(host: Host) -> None:
    """Unload idle weights until it is cancelled."""
    while True:
        await asyncio.sleep(IDLE_PERIOD_S)
        try:
            host.unload_idle()
        except Exception:  # the next look may succeed
            logger.exception("idle weights cannot be unloaded")


def engine_kinds(config: Config, snapshot: Snapshot) -> set[str]:
    """The engines that a snapshot needs; an adapter runs on its base's."""
    on_cpu = config.engines.auto_on_cpu
    return {engine_kind(spec, on_cpu=on_cpu) for spec in snapshot.experts.values() if not spec.base}


class _Engines(dict[str, Engine]):
    """The engines of a configuration, created on first use: a later snapshot may need another kind."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self._config = config

    def __missing__(self, kind: str) -> Engine:
        self[kind] = engine = create_engine(kind, **engine_options(self._config, kind))
        return engine


async def update_host(host: Host, config: Config, snapshot: Snapshot) -> None:
    """`host.update` with the pins of `config`; sets the memory budget if this snapshot is the first with weights.

    A host that started without any has a budget of 0, unless the configuration states one.
    """
    if not host.cache.budget_bytes:
        kinds = engine_kinds(config, snapshot)
        host.cache.budget_bytes = await asyncio.to_thread(budget_bytes, config, kinds)
    host.update(snapshot, config.host.pins)


def engine_options(config: Config, kind: str) -> dict[str, Any]:
    """The engine's section of the configuration, as its constructor's arguments."""
    return config.engines.settings(kind)


def budget_bytes(config: Config, kinds: Collection[str]) -> int:
    """The configured budget, else FREE_SHARE of the free memory: the rest is for key-value caches and activations."""
    if config.host.budget is not None or not any(map(holds_weights, kinds)):
        return int(config.host.budget or 0)
    from coe.engines.hf.load import choose_device, free_bytes

    return int(FREE_SHARE * free_bytes(choose_device(config.engines.hf.device)))


def uses_gpu(config: Config, kinds: Collection[str]) -> bool:
    """Whether engines of these kinds compute on whatever GPU their process has.

    An engine without weights does not; one whose `device` is set to a CPU, or to a certain GPU, does not depend on what
    Ray assigns; the processes of one on several GPUs (`gpus_per_model`) ask for theirs. Kinds that are not installed in
    this process do not count.
    """
    return any(_holds_weights(kind) and _takes_any_gpu(engine_options(config, kind)) for kind in kinds)


def gpus_per_model(config: Config, kinds: Collection[str]) -> int:
    """GPUs that share the weights of one model: the most of these engines' `tensor_parallel_size`."""
    sizes = (engine_options(config, kind).get("tensor_parallel_size", 1) for kind in kinds if _holds_weights(kind))
    return max((size for size in sizes if isinstance(size, int)), default=1)


def _takes_any_gpu(options: Mapping[str, Any]) -> bool:
    return options.get("device", "auto") in ("auto", "cuda") and options.get("tensor_parallel_size", 1) == 1


def _holds_weights(kind: str) -> bool:
    try:
        return holds_weights(kind)
    except ConfigError:
        return False


def gpu_share(processes: int, gpus: float) -> float:
    """GPUs for each of so many equal processes: one, or a share such that all find a place; 0 if there is no GPU."""
    if gpus < 1 or not processes:
        return 0.0
    per_gpu = math.ceil(processes / int(gpus))
    return math.floor(1e4 / per_gpu) / 1e4  # Ray counts ten-thousandths
