"""What the cache shows of an expert in memory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class InMemory:
    """An expert in memory, or on its way.

    Attributes:
        size_bytes: bytes of its slot that the budget counts.
        leases: leases that hold it.
        idle_s: seconds since its last use; 0 while it is leased or loading.
    """

    name: str
    size_bytes: int
    leases: int
    idle_s: float
    is_loading: bool
