"""What to admit next: a pure function of the waiting requests, the resident weights and the time.

Requests are grouped by residency, the set of weights that must be resident to answer them (adapters by their base, a
composed expert by all its members), because a switch costs a load while a batch costs little more than one request.
The engine batches within a residency; this file chooses between residencies:

  1. a request past the aging bound goes first, and while its residency cannot load, nothing else is admitted (drain);
  2. requests of resident residencies fill free places, oldest first;
  3. a residency that loads without waiting for a busy expert starts loading, one at a time, oldest first;
  4. a residency that must wait for a busy expert only when no resident residency has requests left: no thrashing.

The source for grouping is CoServe and Samba-CoE (arXiv 2405.07518); the aging bound is ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

Residency = tuple[str, ...]
"""Names of the weights that must be resident together: distinct, and in the same order for the same set."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request that is not admitted yet, and what its expert needs in memory."""

    id: int
    residency: Residency
    submitted_s: float


def admit(
    waiting: Sequence[Waiting],
    *,
    resident: Collection[str],
    loading: Collection[str] = (),
    in_flight: Mapping[str, int],
    capacity: Callable[[str], int],
    loads_now: Callable[[Residency, Collection[str]], bool],
    now_s: float,
    aging_s: float,
) -> list[int]:
    """Ids to admit now, in order.

    Args:
        waiting: in order of submission.
        resident, loading: names of weights in memory, or on their way.
        in_flight: admitted and unfinished requests on each of the weights.
        capacity: requests worth having in flight on them.
        loads_now: `(residency, keep)`: whether what is absent could be loaded now, without evicting any of `keep`.
        now_s, aging_s: the clock, and how long a request may be passed over for others.

    Guarantees: no weights exceed their capacity; a call admits at most one residency that is not in memory or on its
    way; a call with nothing in flight and nothing loading admits at least one request if any waits.

    Stateless by design: all state is in the arguments, so a simulator drives the same function.
    """
    queues: dict[Residency, list[Waiting]] = {}
    for request in waiting:
        queues.setdefault(request.residency, []).append(request)
    present = {residency for residency in queues if {*resident, *loading}.issuperset(residency)}
    places = _Places(in_flight, capacity)

    overdue = next((w for w in waiting if now_s - w.submitted_s > aging_s and places.free(w.residency)), None)
    if overdue is not None and overdue.residency not in present:
        # A load on its way is finished first: two at once could evict each other's room.
        return [] if loading else places.take(queues[overdue.residency])

    admitted: list[int] = []
    for residency in sorted(present, key=lambda r: queues[r][0].submitted_s):
        admitted += places.take(queues[residency])
    if loading:
        return admitted

    absent = sorted((q for r, q in queues.items() if r not in present), key=lambda q: q[0].submitted_s)
    busy = {name for residency in present for name in residency} | {n for n, count in in_flight.items() if count}
    for queue in absent:
        if loads_now(queue[0].residency, busy):
            return admitted + places.take(queue)
    if absent and not present:
        return admitted + places.take(absent[0])
    return admitted


class _Places:
    """Free places on weights; a request takes one on each that it needs."""

    def __init__(self, in_flight: Mapping[str, int], capacity: Callable[[str], int]) -> None:
        self._taken, self._capacity = Counter(in_flight), capacity

    def free(self, residency: Residency) -> int:
        return max(0, min(self._capacity(name) - self._taken[name] for name in residency))

    def take(self, queue: Sequence[Waiting]) -> list[int]:
        """Ids of the oldest requests of one residency, as many as there are places."""
        residency = queue[0].residency
        admitted = queue[: self.free(residency)]
        self._taken.update(dict.fromkeys(residency, len(admitted)))
        return [request.id for request in admitted]
