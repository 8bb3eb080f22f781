"""The weights in memory of a host: what is there, unloaded on demand, and when it is idle."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from coe.engines.base import Expert
from coe.engines.checked import bytes_of
from coe.errors import InUse
from coe.memory import ExpertCache, InMemory
from registry.spec import ExpertSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WeightsInMemory:
    """Weights in memory, or on their way.

    Attributes:
        name, version: of the expert whose weights they are; adapters and composed experts have none of their own.
        state: `resident` or `loading`; `failing` if their loads failed in a row, and no request loads them now.
        size_bytes: bytes that the budget counts.
        requests: requests that use them now.
        idle_s: seconds since the last of them.
        ttl_s: idle seconds after which they are unloaded; None: never.
        pinned, priority: as configured.
        reason: the last error of those that are failing.
    """

    name: str
    version: int | None
    state: str
    size_bytes: int
    requests: int
    idle_s: float
    ttl_s: float | None
    pinned: bool
    priority: int
    reason: str | None = None

    @property
    def ref(self) -> str:
        """`name@version`, or the bare name before registration."""
        return self.name if self.version is None else f"{self.name}@{self.version}"

    def document(self) -> dict[str, Any]:
        """All of it as JSON values, with `unload_in_s`; seconds to the millisecond."""
        left = self.unload_in_s
        return {
            **asdict(self),
            "idle_s": round(self.idle_s, 3),
            "unload_in_s": None if left is None else round(left, 3),
        }

    @property
    def unload_in_s(self) -> float | None:
        """Seconds until they are unloaded if no request comes; None: no time is set."""
        return None if self.ttl_s is None else max(0.0, self.ttl_s - self.idle_s)


class Residents:
    """The weights in memory of one host. Use inside one event loop.

    Args:
        specs: of all weights that the cache knows, by `name@version`; may grow.
        wanted: `name@version` of the weights that requests wait for or use.
        ttl_s: idle seconds after which weights are unloaded whose spec states none; None and 0: never.
    """

    def __init__(
        self,
        cache: ExpertCache[Expert],
        specs: Mapping[str, ExpertSpec],
        *,
        wanted: Callable[[], Collection[str]],
        ttl_s: float | None,
    ) -> None:
        self._cache, self._specs, self._wanted, self._ttl_s = cache, specs, wanted, ttl_s

    def weights(self) -> list[WeightsInMemory]:
        """All of them, by name and version; then those whose loads fail."""
        failing = [
            replace(
                self._described(InMemory(ref, 0, 0, 0.0, is_loading=False)),
                state="failing",
                ttl_s=None,
                reason=str(each.error(ref)),
            )
            for ref, each in self._cache.failing.items()
            if ref not in self._cache.loading
        ]
        return [self._described(each) for each in self._cache.in_memory()] + failing

    def unload_idle(self) -> tuple[str, ...]:
        """See `coe.host.Host.unload_idle`."""
        self._measure()
        wanted = self._wanted()
        due = [
            each.name
            for each in self._cache.in_memory()
            if not (each.is_loading or each.leases or each.name in wanted)
            and (left := self._described(each).unload_in_s) is not None
            and left <= 0
        ]
        if due:
            self._cache.unload(*due)
            logger.info("unloaded %s: no request for its ttl_s", ", ".join(due))
        return tuple(self._specs[ref].name for ref in due)

    async def unload(self, names: Collection[str], wait_s: float) -> tuple[str, ...]:
        """See `coe.host.Host.unload`. names: of weights, of which every version is unloaded."""
        if pinned := sorted({self._specs[ref].name for ref in self._cache.pins} & {*names}):
            raise InUse(f"{', '.join(pinned)}: pinned, so it stays in memory; take it out of `pins` to unload it")
        try:
            async with asyncio.timeout(wait_s):
                while self._used(names):
                    await self._cache.changed()
        except TimeoutError:
            if used := self._used(names):
                raise InUse(
                    f"{_in_use(used)}: not unloaded after {wait_s:g} s; wait for longer (`wait_s`), or try again later"
                ) from None
        refs = [each.name for each in self._of(names)]
        await asyncio.shield(self._cache.unload(*refs))
        return tuple(sorted({self._specs[ref].name for ref in refs}))

    def _of(self, names: Collection[str]) -> list[InMemory]:
        return [each for each in self._cache.in_memory() if self._specs[each.name].name in names]

    def _used(self, names: Collection[str]) -> list[InMemory]:
        return [each for each in self._of(names) if each.leases or each.is_loading]

    def _measure(self) -> None:
        for ref in self._cache.resident:
            if (measured := bytes_of(self._cache.peek(ref))) is not None:
                self._cache.measured(ref, measured)

    def _described(self, each: InMemory) -> WeightsInMemory:
        spec = self._specs[each.name]
        pinned = each.name in self._cache.pins
        ttl_s = self._ttl_s if spec.ttl_s is None else spec.ttl_s
        return WeightsInMemory(
            spec.name,
            spec.version,
            "loading" if each.is_loading else "resident",
            each.size_bytes,
            each.leases,
            each.idle_s,
            None if pinned or not ttl_s else ttl_s,
            pinned,
            self._cache.priorities.get(each.name, 0),
        )


def _in_use(used: Collection[InMemory]) -> str:
    return "; ".join(
        f"{each.name} is loading" if each.is_loading else f"{each.name} is used by {each.leases} request(s)"
        for each in used
    )
