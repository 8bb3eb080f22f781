"""What to do so that experts come into memory: one pure function over slots on the device and copies in host memory.

    plan(state, wanted) -> (Drop(..), Park(..), Forget(..), Prefetch("sql", ..), Switch("sql", ..))

The room of slots is planned by `coe.memory.room`. A copy in host memory is read before the switch that uses it, and for
experts that must wait (`ahead`), in the room of the copies that the same policy evicts. Copies are read-only, and
nothing goes from the device to the host: what is evicted is just forgotten.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

from coe.memory.eviction import EvictionPolicy, Resident, victims
from coe.memory.room import Need, OpenSlot, Room, make_room


@dataclass(frozen=True, slots=True)
class Open:
    """Load an expert into a new slot."""

    name: str


@dataclass(frozen=True, slots=True)
class Switch:
    """Load an expert into a slot that is open, in place of the expert there."""

    name: str
    slot: OpenSlot


@dataclass(frozen=True, slots=True)
class Drop:
    """Close a slot; the expert in it leaves."""

    slot: OpenSlot


@dataclass(frozen=True, slots=True)
class Park:
    """Free the weights of a slot; its process stays."""

    slot: OpenSlot


@dataclass(frozen=True, slots=True)
class Prefetch:
    """Read the weights of an expert into a copy in host memory, which counts `size_bytes`; 0: there is no room for one,
    and they come only as close as its engine can bring them, such as into the system's page cache."""

    name: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Forget:
    """Free a copy in host memory."""

    name: str


Action = Open | Switch | Drop | Park | Prefetch | Forget


@dataclass(frozen=True, slots=True)
class Device:
    """The slots, as `make_room` takes them."""

    free: Sequence[OpenSlot] = ()
    opened: Mapping[Hashable, int] | None = None
    free_bytes: int = 0
    most_parked: int = 0


@dataclass(frozen=True, slots=True)
class Copies:
    """The copies in host memory.

    Attributes:
        held: names with a copy, or one that is being read.
        evictable: copies that no read and no load uses.
        free_bytes: the budget's.
        budget_bytes: of all copies.
    """

    held: Set[str] = frozenset()
    evictable: Sequence[Resident] = ()
    free_bytes: int = 0
    budget_bytes: int = 0


@dataclass(frozen=True, slots=True)
class State:
    """Both tiers at one moment. The demand for experts is in the residents, as of now."""

    device: Device = Device()
    copies: Copies = Copies()


def plan(
    state: State, wanted: Mapping[str, Need], *, ahead: Mapping[str, Need] | None = None, policy: EvictionPolicy
) -> tuple[Action, ...] | None:
    """What brings all of `wanted` onto the device; None if a lease must end first.

    Args:
        wanted: absent experts. ahead: experts that are to come closer, without room on the device.
        policy: orders the victims of both tiers.
    """
    device = state.device
    room: Room | None = Room()
    if wanted or device.free_bytes < 0:
        room = make_room(
            wanted,
            device.free,
            opened=device.opened or {},
            free_bytes=device.free_bytes,
            policy=policy,
            most_parked=device.most_parked,
        )
    if room is None:
        return None
    # An engine copies into a model that is there; one that is built reads the files itself.
    switched = {name: wanted[name] for name, slot in room.taken.items() if slot is not None and slot.serves}
    return (
        *map(Drop, room.closed),
        *map(Park, room.parked),
        *_copied(state.copies, switched, ahead or {}, policy),
        *(Open(name) if slot is None else Switch(name, slot) for name, slot in room.taken.items()),
    )


def _copied(
    copies: Copies, loading: Mapping[str, Need], ahead: Mapping[str, Need], policy: EvictionPolicy
) -> Iterator[Action]:
    """Copies that are read, and those that leave for them; a load without room for a copy reads its files."""
    free_bytes = copies.free_bytes
    evictable = [each for each in copies.evictable if each.name not in loading and each.name not in ahead]
    for name, need in (*loading.items(), *ahead.items()):
        if name in copies.held:
            continue
        leaving = None
        if 0 < need.copy_bytes <= copies.budget_bytes:
            leaving = victims(evictable, max(0, need.copy_bytes - free_bytes), policy)
        if leaving is not None:
            for each in leaving:
                evictable.remove(each)
                free_bytes += each.size_bytes
                yield Forget(each.name)
            free_bytes -= need.copy_bytes
            yield Prefetch(name, need.copy_bytes)
        elif name in ahead:
            yield Prefetch(name, 0)
