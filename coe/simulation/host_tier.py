"""Copies of weights in host memory, under a byte budget: what is not there comes from the disk first.

The device loads from host memory. A copy stays there when the device evicts the weights, and leaves by the policy of
the device; a copy that is being read or loaded does not. Weights that find no room pass through without a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from coe.memory.demand import Demand
from coe.memory.eviction import EvictionPolicy, Resident
from coe.memory.plan import Copies, Forget, Prefetch, State, plan
from coe.memory.room import Need


@dataclass(slots=True)
class _Copy:
    """Weights in host memory, or on their way. `busy_until_s`: they are read or loaded until then."""

    ready_s: float
    busy_until_s: float
    read_s: float
    last_used_s: float
    uses: int = 0


class HostTier:
    """Host memory and the disk below it. Reads from the disk take turns.

    Args:
        demand: how much weights are wanted, at a time.

    Attributes:
        reads, bytes_read: from the disk.
    """

    def __init__(
        self,
        budget_bytes: int,
        bytes_of: Mapping[str, int],
        *,
        disk_bytes_per_s: float,
        policy: EvictionPolicy,
        demand: Callable[[str, float], Demand],
    ) -> None:
        self.reads = self.bytes_read = 0
        self._budget_bytes = self._free_bytes = budget_bytes
        self._bytes_of, self._disk_bytes_per_s = bytes_of, disk_bytes_per_s
        self._policy, self._demand = policy, demand
        self._copies: dict[str, _Copy] = {}
        self._disk_until_s = self._ahead_until_s = 0.0

    def fetch(self, name: str, now_s: float) -> float:
        """When the weights are in host memory: now, or after the read that this starts or joins."""
        if (copy := self._copies.get(name)) is None:
            return self._read(name, now_s, keeps=self._make_room(name, now_s))
        copy.uses += 1
        copy.last_used_s = now_s
        return max(now_s, copy.ready_s)

    def hold(self, name: str, until_s: float) -> None:
        """The device loads these weights until then: their copy stays."""
        if (copy := self._copies.get(name)) is not None:
            copy.busy_until_s = max(copy.busy_until_s, until_s)

    def read_ahead(self, names: tuple[str, ...], now_s: float) -> None:
        """Read the first of `names` that is not in host memory, as a host does; nothing while another is read ahead."""
        if self._ahead_until_s > now_s:
            return
        for name in names:
            if name not in self._copies:
                if self._make_room(name, now_s):
                    self._ahead_until_s = self._read(name, now_s, keeps=True)
                return

    def _read(self, name: str, now_s: float, *, keeps: bool) -> float:
        size_bytes = self._bytes_of[name]
        read_s = size_bytes / self._disk_bytes_per_s
        self._disk_until_s = ready_s = max(self._disk_until_s, now_s) + read_s
        self.reads += 1
        self.bytes_read += size_bytes
        if keeps:
            self._free_bytes -= size_bytes
            self._copies[name] = _Copy(ready_s, ready_s, read_s, now_s)
        return ready_s

    def _make_room(self, name: str, now_s: float) -> bool:
        """Evict until the weights fit, as a host plans it; False, and nothing is evicted, if they cannot."""
        size_bytes, evictable = self._bytes_of[name], list[Resident]()
        if size_bytes > self._free_bytes:
            evictable = [self._seen(each, c, now_s) for each, c in self._copies.items() if c.busy_until_s <= now_s]
        copies = Copies(self._copies.keys(), evictable, self._free_bytes, self._budget_bytes)
        need = Need(name, size_bytes, copy_bytes=size_bytes)
        fits = False
        for action in plan(State(copies=copies), {}, ahead={name: need}, policy=self._policy) or ():
            if isinstance(action, Forget):
                del self._copies[action.name]
                self._free_bytes += self._bytes_of[action.name]
            elif isinstance(action, Prefetch):
                fits = action.size_bytes > 0
        return fits

    def _seen(self, name: str, copy: _Copy, now_s: float) -> Resident:
        demand = self._demand(name, now_s)
        return Resident(name, self._bytes_of[name], copy.last_used_s, copy.uses, copy.read_s, demand)
