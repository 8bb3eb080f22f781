"""PoolPlacement: the pools of `serve.placement`, computed again while a service runs, beside its reloads.

The solver may take half a minute. A reload does not wait for it: experts stay where they are, those that are new get a
host at once, and the placement is then computed beside. It is used if the configuration that it was computed for
is still served; otherwise it is computed again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Final, Protocol

from coe.config import Config, HostPoolConfig
from coe.errors import CoeError, ConfigError
from registry.errors import RegistryError

RETRY_S: Final = 60.0
"""Most seconds after which a placement is computed again that failed, or that could not be read with the registry."""


@dataclass(frozen=True, slots=True)
class PlacedPools:
    """Pools, and status lines on how they were chosen."""

    pools: tuple[HostPoolConfig, ...]
    lines: tuple[str, ...]


class Placer(Protocol):
    """Computes the pools of `serve.placement`."""

    def compute(self, config: Config, running: Config | None) -> PlacedPools:
        """The pools of a configuration. May take half a minute, and runs in any thread.

        Args:
            running: the configuration whose pools run, if any.
        """

    def keep(self, config: Config, running: Config) -> PlacedPools:
        """At once: the pools with every expert where it runs, and each new one on some host."""

    def chosen(self, placed: PlacedPools) -> None:
        """Called when pools that were computed are served from now on."""

    def close(self) -> None:
        """End what is being computed."""


Compute = Callable[[], PlacedPools]


def in_thread(compute: Compute) -> Future[PlacedPools]:
    """Compute in a thread, which must not hold up the end of this process (`Placer.close`)."""
    future: Future[PlacedPools] = Future()

    def run() -> None:
        try:
            future.set_result(compute())
        except BaseException as error:  # raised where the result is read
            future.set_exception(error)

    threading.Thread(target=run, name="placement", daemon=True).start()
    return future


class PoolPlacement:
    """The placement of a service. All methods are called in one thread.

    Args:
        placer: None leaves every configuration as it is.
        clock: monotonic seconds.
        start: starts a computation.
    """

    def __init__(
        self,
        placer: Placer | None,
        clock: Callable[[], float] = time.monotonic,
        start: Callable[[Compute], Future[PlacedPools]] = in_thread,
    ) -> None:
        self._placer, self._clock, self._start = placer, clock, start
        self._started_at, self._due, self._failed = clock(), False, False
        self._running: tuple[Config, Future[PlacedPools]] | None = None
        self._found: PlacedPools | None = None

    def first(self, config: Config) -> Config:
        """The configuration with the pools that a service starts with; waits for the solver."""
        if self._placer is None or config.serve.placement is None:
            return config
        self._started_at = self._clock()
        placed = self._placer.compute(config, None)
        self._placer.chosen(placed)
        return config.with_pools(placed.pools)

    def kept(self, config: Config, running: Config) -> Config:
        """A changed configuration with the pools that run, and its new experts on them."""
        if self._placer is None or config.serve.placement is None:
            return config
        return config.with_pools(self._placer.keep(config, running).pools)

    def reloaded(self) -> None:
        """Another configuration is served: its placement is to be computed."""
        self._due, self._failed = True, False

    def moves(self, config: Config) -> bool:
        """Whether a placement of the served configuration is there that moves an expert. Starts one that is due.

        Raises:
            ConfigError, RegistryError, OSError: it cannot be computed; it is tried again later.
        """
        if self._placer is None or config.serve.placement is None:
            return False
        if self._running is None and self._is_due(config):
            self._started_at, self._due = self._clock(), False
            placer = self._placer
            self._running = config, self._start(lambda: placer.compute(config, config))
        if self._running is None or not self._running[1].done():
            return False
        (of, computed), self._running = self._running, None
        if of is not config:
            return False
        failed, self._failed = self._failed, True  # until it is served, or moves nothing
        placed = _result(computed)
        # After a failure equal pools count too: `coe serve` reports the failure until it has reloaded.
        self._found = placed if failed or placed.pools != config.serve.pools else None
        self._failed = self._found is not None
        return self._failed

    def take(self) -> PlacedPools | None:
        """The placement that `moves` has found, once."""
        found, self._found = self._found, None
        return found

    def moved(self, placed: PlacedPools, before: Config) -> None:
        """These pools are served from now on, in place of those before."""
        self._failed = False
        if self._placer is not None and placed.pools != before.serve.pools:
            self._placer.chosen(placed)

    def close(self) -> None:
        """End what is being computed."""
        if self._placer is not None:
            self._placer.close()

    def _is_due(self, config: Config) -> bool:
        placement = config.serve.placement
        every_s = placement.every_s if placement and placement.every_s is not None else float("inf")
        if self._failed:
            every_s = min(every_s, RETRY_S)
        return self._due or self._clock() >= self._started_at + every_s


def _result(computed: Future[PlacedPools]) -> PlacedPools:
    try:
        return computed.result()
    except (CoeError, RegistryError, OSError):
        raise
    except Exception as error:  # of the solver, for example; the service must go on
        raise ConfigError(f"serve.placement cannot be computed: {type(error).__name__}: {error}") from error
