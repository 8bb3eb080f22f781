"""Whether experts can ever be in memory together, whatever is evicted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

from coe.errors import BudgetExceeded
from coe.memory.room import Need


class Pinned(NamedTuple):
    """What pinned experts hold: bytes, and slots by shape."""

    size_bytes: int
    slots: Mapping[Hashable, int]

    @classmethod
    def of(cls, held: Sequence[Need]) -> Pinned:
        """What experts hold together once they are loaded."""
        return cls(sum(need.size_bytes for need in held), Counter(need.shape for need in held))


def check_fit(needs: Mapping[str, Need], budget_bytes: int, pinned: Pinned, needed_by: str | None = None) -> None:
    """Raises BudgetExceeded if these experts cannot fit in addition to the pinned ones.

    Args:
        needed_by: the expert that needs them in memory together, if it is another one.
    """
    whose = f"{needed_by!r} needs its members in memory together: " if needed_by and len(needs) > 1 else ""
    _check_bytes(needs, budget_bytes, pinned.size_bytes, whose)
    _check_slots(needs, pinned.slots, whose)


def _check_bytes(needs: Mapping[str, Need], budget_bytes: int, pinned: int, whose: str) -> None:
    need = sum(each.size_bytes for each in needs.values())
    if need > budget_bytes - pinned:
        held = f" of which pinned experts hold {_mib(pinned)}" if pinned else ""
        raise BudgetExceeded(
            f"{whose}{_names(needs)} need {_mib(need)}, the budget is {_mib(budget_bytes)}{held}: "
            "raise `host.budget`, or the `budget` of its pool; choose smaller experts, or unpin one"
        )


def _check_slots(needs: Mapping[str, Need], pinned: Mapping[Hashable, int], whose: str) -> None:
    for shape, count in Counter(need.shape for need in needs.values()).items():
        same = {name: need for name, need in needs.items() if need.shape == shape}
        most = min(need.slots for need in same.values())
        if count + pinned.get(shape, 0) > most:
            held = f", of which pinned experts hold {pinned[shape]}" if pinned.get(shape) else ""
            raise BudgetExceeded(
                f"{whose}{_names(same)} need {count} slots of one shape at a time, and their engine opens "
                f"{most}{held}: raise its `slots_per_shape`, or unpin an expert"
            )


def _names(names: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted(names)))


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:,.0f} MiB"
