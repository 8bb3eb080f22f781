"""LogPlacer: what computes the pools of `serve.placement` for `coe serve`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from coe.cli.placed_pools import keep_pools, place_pools
from coe.cli.placement_process import PlacementProcess

if TYPE_CHECKING:
    from coe.config import Config
    from coe.serve.cluster.pool_placement import PlacedPools


class LogPlacer:
    """Computes the pools of `serve.placement` (`coe.serve.cluster.pool_placement.Placer`).

    Args:
        say: called with the status lines of a placement that is served from then on.
        again: computes those of a running service; None: `place_pools` in a process of its own.
    """

    def __init__(
        self, say: Callable[[str], None], again: Callable[[Config, Config], PlacedPools] | None = None
    ) -> None:
        self._say, self._process = say, PlacementProcess()
        self._again = again or self._process.compute

    def compute(self, config: Config, running: Config | None) -> PlacedPools:
        """`place_pools`; Ctrl-C ends it at the start of a service."""
        return place_pools(config) if running is None else self._again(config, running)

    def keep(self, config: Config, running: Config) -> PlacedPools:
        """`keep_pools`."""
        return keep_pools(config, running)

    def chosen(self, placed: PlacedPools) -> None:
        """Print how it was chosen."""
        for line in placed.lines:
            self._say(line)

    def close(self) -> None:
        """End what is being computed."""
        self._process.close()
