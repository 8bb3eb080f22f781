"""What to admit next: a pure function of what waits, what is resident and the time.

Requests are grouped by what must be resident to answer them (adapters by their base), because a switch costs a load
and a batch costs little more than one request. The engine batches within a residency; this file chooses between
residencies:

  1. a request past the aging bound goes first, and while its residency cannot load, nothing else is admitted (drain);
  2. requests of resident residencies fill free places, oldest first;
  3. a residency that loads without waiting for a busy expert starts loading, one at a time, oldest first;
  4. a residency that must wait for a busy expert only when no resident residency has requests left: no thrashing.

The source for grouping is CoServe and Samba-CoE (arXiv 2405.07518); the aging bound is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request that is not admitted yet. `residency` is the residency key of its expert."""

    id: int
    residency: str
    submitted_s: float


def admit(
    waiting: Sequence[Waiting],
    *,
    resident: Collection[str],
    loading: Collection[str] = (),
    in_flight: Mapping[str, int],
    capacity: Callable[[str], int],
    loads_now: Callable[[str, Collection[str]], bool],
    now_s: float,
    aging_s: float,
) -> list[int]:
    """Ids to admit now, in order.

    Args:
        waiting: in order of submission.
        resident, loading: residencies whose weights are in memory, or on their way.
        in_flight: admitted and unfinished requests of each residency.
        capacity: requests worth having in flight on a residency.
        loads_now: `(residency, keep)`: whether its weights could come in now, without evicting any of `keep`.
        now_s, aging_s: the clock, and how long a request may be passed over for others.

    Guarantees: no residency exceeds its capacity; at most one residency that is not resident is admitted a call; a call
    with nothing in flight and nothing loading admits at least one request if any waits.
    """
    queues: dict[str, list[Waiting]] = {}
    for request in waiting:
        queues.setdefault(request.residency, []).append(request)
    present = set(resident) | set(loading)

    overdue = next(
        (w for w in waiting if now_s - w.submitted_s > aging_s and _free(w.residency, in_flight, capacity)), None
    )
    if overdue is not None and overdue.residency not in present:
        # A load on its way is finished first: two at once could evict each other's room.
        return [] if loading else _take(queues[overdue.residency], in_flight, capacity)

    admitted: list[int] = []
    for residency in sorted(present & queues.keys(), key=lambda g: queues[g][0].submitted_s):
        admitted += _take(queues[residency], in_flight, capacity)
    if loading:
        return admitted

    absent = sorted((q for g, q in queues.items() if g not in present), key=lambda q: q[0].submitted_s)
    wanted = present & queues.keys()
    busy = wanted | {residency for residency, count in in_flight.items() if count}
    for queue in absent:
        if loads_now(queue[0].residency, busy):
            return admitted + _take(queue, in_flight, capacity)
    if absent and not wanted:
        return admitted + _take(absent[0], in_flight, capacity)
    return admitted


def _free(residency: str, in_flight: Mapping[str, int], capacity: Callable[[str], int]) -> int:
    return max(0, capacity(residency) - in_flight.get(residency, 0))


def _take(queue: Sequence[Waiting], in_flight: Mapping[str, int], capacity: Callable[[str], int]) -> list[int]:
    return [request.id for request in queue[: _free(queue[0].residency, in_flight, capacity)]]
