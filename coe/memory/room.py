"""Where absent experts go: a pure function over open slots, so that a simulation plans with the same rules.

Experts of one shape share slots. An expert that is to be resident takes, in this order:

  1. an empty slot of its shape;
  2. a new slot, if its shape may have another one and the budget has room without an eviction;
  3. the slot of an evictable expert of its shape, the next victim of the policy first: its process goes on;
  4. a new slot in the room of slots that are closed: empty ones, then those of the policy's victims.

Weights that a switch replaces by smaller ones free memory only afterwards. If experts fit without them alone, slots of
their shapes are closed instead, and new ones opened.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from coe.memory.eviction import EvictionPolicy, Resident, victims


@dataclass(frozen=True, slots=True)
class Need:
    """What an expert takes while it is resident.

    Attributes:
        shape: experts with equal shapes can take turns in a slot.
        weight_bytes, slot_bytes: bytes of its weights, and of an open slot beside them.
        slots: most slots of that shape at a time.
    """

    shape: Hashable
    weight_bytes: int
    slot_bytes: int = 0
    slots: int = 1

    @property
    def size_bytes(self) -> int:
        """Bytes of a slot with these weights."""
        return self.weight_bytes + self.slot_bytes


@dataclass(frozen=True, slots=True)
class OpenSlot:
    """An open slot that may be taken or closed. `need`: of its last expert. `resident`: None if it is empty."""

    key: int
    need: Need
    resident: Resident | None = None


@dataclass(frozen=True, slots=True)
class Room:
    """A plan. `taken`: name -> slot whose place an expert takes; None: a new slot. `closed`: slots to close first."""

    taken: Mapping[str, OpenSlot | None] = field(default_factory=dict)
    closed: tuple[OpenSlot, ...] = ()


def make_room(
    missing: Mapping[str, Need],
    free: Sequence[OpenSlot],
    *,
    opened: Mapping[Hashable, int],
    free_bytes: int,
    policy: EvictionPolicy,
) -> Room | None:
    """A plan for all of `missing`; None if a lease must end first.

    Args:
        free: open slots that are empty, or whose expert may be evicted.
        opened: number of slots that are open, open or close now, by shape.
        free_bytes: the budget's, negative if it was lowered.
    """
    if not free and sum(need.size_bytes for need in missing.values()) > free_bytes:
        return None  # a plan of nothing: the common case while all experts are at work
    order = _in_order(free, policy)
    for share in (False, True):
        taken = _taken(missing, order, opened, share=share)
        if taken is None:
            return None
        left = [slot for slot in order if slot not in taken.values()]
        closed = _closed(left, _growth(missing, taken) - free_bytes, policy if share else _nobody)
        if closed is not None:
            return Room(taken, closed)
    return _new_slots(missing, order, free_bytes, policy)


def _in_order(free: Sequence[OpenSlot], policy: EvictionPolicy) -> list[OpenSlot]:
    """Empty slots, then those of the next victims."""
    by_name = {slot.resident.name: slot for slot in free if slot.resident is not None}
    evictable = [slot.resident for slot in by_name.values() if slot.resident is not None]
    return [slot for slot in free if slot.resident is None] + [by_name[each.name] for each in policy(evictable)]


def _taken(
    missing: Mapping[str, Need], order: Sequence[OpenSlot], opened: Mapping[Hashable, int], *, share: bool
) -> dict[str, OpenSlot | None] | None:
    """The slot that each expert takes. share: also one that serves an expert, though its shape may have another."""
    count, taken = dict(opened), dict[str, OpenSlot | None]()
    for name, need in sorted(missing.items()):
        same = [slot for slot in order if slot.need.shape == need.shape and slot not in taken.values()]
        full = count.get(need.shape, 0) >= need.slots
        if same and (full or share or same[0].resident is None):
            taken[name] = same[0]
        elif full:
            return None
        else:
            taken[name] = None
            count[need.shape] = count.get(need.shape, 0) + 1
    return taken


def _new_slots(
    missing: Mapping[str, Need], order: Sequence[OpenSlot], free_bytes: int, policy: EvictionPolicy
) -> Room | None:
    """All in new slots, once the free ones of their shapes are closed; each shape has enough of them in use or free."""
    shapes = {need.shape for need in missing.values()}
    first = [slot for slot in order if slot.need.shape in shapes]
    over_bytes = sum(need.size_bytes for need in missing.values()) - free_bytes
    over_bytes -= sum(slot.need.size_bytes for slot in first)
    closed = _closed([slot for slot in order if slot not in first], over_bytes, policy)
    return None if closed is None else Room(dict.fromkeys(sorted(missing)), (*first, *closed))


def _growth(missing: Mapping[str, Need], taken: Mapping[str, OpenSlot | None]) -> int:
    """Bytes beyond those of the slots that are taken; weights that shrink count as before until they are replaced."""
    return sum(
        missing[name].size_bytes if slot is None else max(0, missing[name].weight_bytes - slot.need.weight_bytes)
        for name, slot in taken.items()
    )


def _closed(left: Sequence[OpenSlot], over_bytes: int, policy: EvictionPolicy) -> tuple[OpenSlot, ...] | None:
    """Slots to close so that `over_bytes` are free, empty ones first; None if that frees too little."""
    closed: list[OpenSlot] = []
    if over_bytes <= 0:
        return ()
    for slot in (slot for slot in left if slot.resident is None):
        if over_bytes <= 0:
            break
        closed.append(slot)
        over_bytes -= slot.need.size_bytes
    by_name = {slot.resident.name: slot for slot in left if slot.resident is not None}
    evicted = victims([slot.resident for slot in by_name.values() if slot.resident], over_bytes, policy)
    return None if evicted is None else (*closed, *(by_name[victim.name] for victim in evicted))


def _nobody(evictable: Sequence[Resident]) -> Sequence[Resident]:
    """A policy without victims."""
    return ()
