"""The copies in host memory that a cache has its slots read: what they take, and when they were used."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Final, Protocol

from coe.memory.eviction import Resident
from coe.memory.places import SlotOf
from coe.memory.plan import Copies


class CopyStore(Protocol):
    """Where slots keep the copies that `SlotOf.prefetch` reads."""

    @property
    def budget_bytes(self) -> int:
        """Most bytes of all copies; 0 keeps none."""
        ...

    def holds(self, name: str) -> bool:
        """Whether there is a copy; a store drops one whose files have changed by itself."""
        ...

    def drop(self, name: str) -> None:
        """Free a copy, at once."""
        ...


class NoCopies:
    """No copies are kept."""

    budget_bytes = 0

    def holds(self, name: str) -> bool:
        """No."""
        return False

    def drop(self, name: str) -> None:
        """Nothing: there is none."""


NO_COPIES: Final = NoCopies()


@dataclass(slots=True)
class _Copy:
    """A copy. `reading`: its bytes are those that were planned, until it has been read."""

    size_bytes: int
    last_used_s: float
    uses: int = 0
    load_s: float = 0.0
    reading: bool = True


class HeldCopies:
    """The tier of host memory as a cache counts it. Use inside one event loop.

    Args:
        as_resident: a copy as a policy sees it: name, bytes, last use, uses, seconds of its read.
    """

    def __init__(self, store: CopyStore, *, clock: Callable[[], float], as_resident: Callable[..., Resident]) -> None:
        self._store, self._clock, self._as_resident = store, clock, as_resident
        self._copies: dict[str, _Copy] = {}

    @property
    def names(self) -> frozenset[str]:
        """Experts with a copy that has been read."""
        return frozenset(name for name, copy in self._copies.items() if not copy.reading)

    @property
    def used_bytes(self) -> int:
        """Bytes of all copies, those that are being read included."""
        return sum(copy.size_bytes for copy in self._copies.values())

    @property
    def budget_bytes(self) -> int:
        """Most bytes of all copies."""
        return self._store.budget_bytes

    def view(self, busy: Collection[str]) -> Copies:
        """For a plan. busy: experts that load, perhaps from their copy."""
        gone = [name for name, copy in self._copies.items() if not copy.reading and not self._store.holds(name)]
        for name in gone:
            del self._copies[name]
        free = {name: copy for name, copy in self._copies.items() if not copy.reading and name not in busy}
        evictable = [
            self._as_resident(name, copy.size_bytes, copy.last_used_s, copy.uses, copy.load_s)
            for name, copy in free.items()
        ]
        budget_bytes = self._store.budget_bytes
        return Copies(self._copies.keys(), evictable, budget_bytes - self.used_bytes, budget_bytes)

    def begin(self, name: str, size_bytes: int) -> None:
        """Count a copy that `read` is going to read."""
        self._copies[name] = _Copy(size_bytes, self._clock())

    async def read(self, slot: SlotOf[Any], name: str) -> None:
        """Have a slot read the copy that `begin` counted; from then on it counts what it takes, if it is kept."""
        started, size_bytes = self._clock(), 0
        try:
            size_bytes = await slot.prefetch(name)
        finally:
            planned = self._copies.pop(name)
            if size_bytes:
                seconds = self._clock() - started
                self._copies[name] = _Copy(size_bytes, planned.last_used_s, planned.uses, seconds, reading=False)

    def use(self, name: str) -> None:
        """An expert is loaded, from its copy if it has one."""
        if (copy := self._copies.get(name)) is not None:
            copy.last_used_s, copy.uses = self._clock(), copy.uses + 1

    def drop(self, name: str) -> None:
        """Free a copy."""
        del self._copies[name]
        self._store.drop(name)
