"""Where absent experts go: a pure function over open slots, so that a simulation plans with the same rules.

Experts of one shape share slots. An expert that is to be resident takes, in this order:

  1. an empty or parked slot of its shape;
  2. a new slot, if its shape may have another one and the budget has room without an eviction;
  3. the slot of an evictable expert of its shape, the next victim of the policy first: its process goes on;
  4. a new slot in the room of others: empty ones are closed, then the policy's victims leave. A victim whose slot can
     be parked leaves its process behind, which the next expert of its shape takes as in 1; a parked slot is closed when
     the policy names it a victim.

Weights that a switch replaces by smaller ones free memory only afterwards. If experts fit without them alone, slots of
their shapes are closed instead, and new ones opened.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from coe.memory.eviction import EvictionPolicy, Resident, victims


@dataclass(frozen=True, slots=True)
class Need:
    """What an expert takes while it is resident.

    Attributes:
        shape: experts with equal shapes can take turns in a slot.
        weight_bytes, slot_bytes: bytes of its weights, and of an open slot beside them.
        slots: most slots of that shape at a time.
        parked_bytes: bytes of a slot that is parked, without weights; None: its engine parks none.
        copy_bytes: bytes of a copy in host memory, as far as known before it is read; 0: its engine keeps none.
    """

    shape: Hashable
    weight_bytes: int
    slot_bytes: int = 0
    slots: int = 1
    parked_bytes: int | None = None
    copy_bytes: int = 0

    @property
    def size_bytes(self) -> int:
        """Bytes of a slot with these weights."""
        return self.weight_bytes + self.slot_bytes


@dataclass(frozen=True, slots=True)
class OpenSlot:
    """An open slot that may be taken, parked or closed.

    Attributes:
        need: of its last expert; of a parked slot, without weights.
        resident: what the policy orders: its expert, or for a parked slot the last one under a name of its own; None if
            it is empty.
    """

    key: int
    need: Need
    resident: Resident | None = None
    is_parked: bool = False

    @property
    def serves(self) -> bool:
        """Whether taking it evicts an expert."""
        return self.resident is not None and not self.is_parked

    def victim(self, *, park: bool) -> Resident:
        """Its resident, with the bytes that are free once that has left; all if the slot is closed."""
        assert self.resident is not None
        if not park or self.is_parked or self.need.parked_bytes is None:
            return self.resident
        return replace(self.resident, size_bytes=max(0, self.resident.size_bytes - self.need.parked_bytes))


@dataclass(frozen=True, slots=True)
class Room:
    """A plan. `taken`: name -> slot whose place an expert takes; None: a new slot.

    `closed`, `parked`: slots that are closed or parked first.
    """

    taken: Mapping[str, OpenSlot | None] = field(default_factory=dict)
    closed: tuple[OpenSlot, ...] = ()
    parked: tuple[OpenSlot, ...] = ()


def make_room(
    missing: Mapping[str, Need],
    free: Sequence[OpenSlot],
    *,
    opened: Mapping[Hashable, int],
    free_bytes: int,
    policy: EvictionPolicy,
    most_parked: int = 0,
) -> Room | None:
    """A plan for all of `missing`; None if a lease must end first.

    Args:
        free: open slots that are empty or parked, or whose expert may be evicted.
        opened: number of slots that are open, open or close now, by shape.
        free_bytes: the budget's, negative if it was lowered.
        most_parked: most parked slots at a time; beyond, the least recently used are closed.
    """
    if not free and sum(need.size_bytes for need in missing.values()) > free_bytes:
        return None  # a plan of nothing: the common case while all experts are at work
    order = _in_order(free, policy)
    for share in (False, True):
        taken = _taken(missing, order, opened, share=share)
        if taken is None:
            return None
        left = [slot for slot in order if slot not in taken.values()]
        leaving = _leaving(left, _growth(missing, taken) - free_bytes, policy if share else _nobody, most_parked)
        if leaving is not None:
            return Room(taken, *leaving)
    return _new_slots(missing, order, free_bytes, policy, most_parked)


def _in_order(free: Sequence[OpenSlot], policy: EvictionPolicy) -> list[OpenSlot]:
    """Slots without an expert, then those of the next victims."""
    by_name = {slot.resident.name: slot for slot in free if slot.resident is not None and slot.serves}
    evictable = [slot.resident for slot in by_name.values() if slot.resident is not None]
    return [slot for slot in free if not slot.serves] + [by_name[each.name] for each in policy(evictable)]


def _taken(
    missing: Mapping[str, Need], order: Sequence[OpenSlot], opened: Mapping[Hashable, int], *, share: bool
) -> dict[str, OpenSlot | None] | None:
    """The slot that each expert takes. share: also one that serves an expert, though its shape may have another."""
    count, taken = dict(opened), dict[str, OpenSlot | None]()
    for name, need in sorted(missing.items()):
        same = [slot for slot in order if slot.need.shape == need.shape and slot not in taken.values()]
        full = count.get(need.shape, 0) >= need.slots
        if same and (full or share or not same[0].serves):
            taken[name] = same[0]
        elif full:
            return None
        else:
            taken[name] = None
            count[need.shape] = count.get(need.shape, 0) + 1
    return taken


def _new_slots(
    missing: Mapping[str, Need], order: Sequence[OpenSlot], free_bytes: int, policy: EvictionPolicy, most_parked: int
) -> Room | None:
    """All in new slots, once the free ones of their shapes are closed; each shape has enough of them in use or free."""
    shapes = {need.shape for need in missing.values()}
    first = [slot for slot in order if slot.need.shape in shapes]
    over_bytes = sum(need.size_bytes for need in missing.values()) - free_bytes
    over_bytes -= sum(slot.need.size_bytes for slot in first)
    leaving = _leaving([slot for slot in order if slot not in first], over_bytes, policy, most_parked)
    return None if leaving is None else Room(dict.fromkeys(sorted(missing)), (*first, *leaving[0]), leaving[1])


def _growth(missing: Mapping[str, Need], taken: Mapping[str, OpenSlot | None]) -> int:
    """Bytes beyond those of the slots that are taken; weights that shrink count as before until they are replaced."""
    return sum(
        missing[name].size_bytes if slot is None else max(0, missing[name].size_bytes - slot.need.size_bytes)
        for name, slot in taken.items()
    )


def _leaving(
    left: Sequence[OpenSlot], over_bytes: int, policy: EvictionPolicy, most_parked: int
) -> tuple[tuple[OpenSlot, ...], tuple[OpenSlot, ...]] | None:
    """Slots to close and to park so that `over_bytes` are free, empty ones first; None if that frees too little."""
    empty: list[OpenSlot] = []
    if over_bytes <= 0:
        return (), ()
    for slot in (slot for slot in left if slot.resident is None):
        if over_bytes <= 0:
            break
        empty.append(slot)
        over_bytes -= slot.need.size_bytes
    others = {slot.resident.name: slot for slot in left if slot.resident is not None}
    for park in (True, False) if most_parked else (False,):
        evicted = victims([slot.victim(park=park) for slot in others.values()], max(0, over_bytes), policy)
        if evicted is not None:
            out = [others[victim.name] for victim in evicted]
            kept = [slot for slot in out if park and slot.serves and slot.need.parked_bytes is not None]
            asleep = [slot for slot in others.values() if slot.is_parked and slot not in out]
            over = sorted((*asleep, *kept), key=_last_used)[: max(0, len(asleep) + len(kept) - most_parked)]
            closed = [slot for slot in out if slot not in kept] + [slot for slot in over if kept]
            return (*empty, *closed), tuple(slot for slot in kept if slot not in over)
    return None


def _last_used(slot: OpenSlot) -> tuple[float, str]:
    assert slot.resident is not None
    return slot.resident.last_used_s, slot.resident.name


def _nobody(evictable: Sequence[Resident]) -> Sequence[Resident]:
    """A policy without victims."""
    return ()
