"""What to admit next: decisions over waiting requests, resident weights and the time, without any input or output.

Requests are grouped by residency, the set of weights that must be resident to answer them (adapters by their base, a
composed expert by all its members), because a switch costs a load while a batch costs little more than one request.
The engine batches within a residency; this file chooses between residencies:

  1. requests of resident residencies fill free places, oldest first, unless their weights give up their room;
  2. an absent residency loads in room that no request uses or waits for;
  3. without such room, certain busy weights give up theirs, if that pays: they take no more requests (drain), and it
     loads when their answers have ended;
  4. past the aging bound, the oldest request of an absent residency goes before 2 and 3. It takes the room of any
     weights for which no older request waits; all other weights go on meanwhile.

One load and one drain at a time on each copy engine: the drain for the next load overlaps the load before it.

What pays, in 2 and 3, is counted in seconds. Requests whose weights load later wait for one more load, so each request
counts as many seconds as its load is expected to take, beside the seconds that the oldest has waited: of two absent
residencies, the one with the larger sum loads first. Busy weights give up their room if no request waits for them, or
if the sum of those that do is smaller; these count both loads, since their weights must come back. So where loads take
no time the oldest request goes first, and where they take long the most wanted residency.

The waiting bound: once a request has waited `aging_s` for absent weights, it waits only for requests submitted before
it, a load that is under way, the answers in flight on the weights that give up their room, and its own load. Requests
submitted later neither start a load on its copy engine nor use the weights whose room it takes. One that needs places
on several weights in memory at once keeps later requests from these, too.

Priorities: within a residency, requests of higher priority go first; of two absent residencies, the one with a request
of higher priority loads first, and busy weights give up their room to it. That holds until the bound: past it, a
request waits for none that was submitted later, whatever the priorities.

The source for grouping is CoServe and Samba-CoE (arXiv 2405.07518); drains of single weights and the bound are ours.
"""

from __future__ import annotations

import itertools
import sys
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping, Set
from dataclasses import dataclass
from heapq import nsmallest
from typing import Final, Protocol

from coe.memory.demand import Demand, RecentMix
from coe.request_queue import NORMAL_LEVEL, RequestQueue

Residency = tuple[str, ...]
"""Names of the weights that must be resident together: distinct, and in the same order for the same set."""

_NONE: Final[frozenset[Hashable]] = frozenset()
_TRIED: Final = 8
"""Most absent residencies that are tried at a time; each needs a plan of the memory."""


class Memory(Protocol):
    """The weights in memory as the scheduler sees them: `coe.memory.ExpertCache`, or a simulated device."""

    @property
    def resident(self) -> Collection[str]:
        """Names of the weights in memory."""
        ...

    def room(self, names: Residency, keep: Collection[str], *, drain: bool) -> frozenset[str] | None:
        """Resident weights that leave if `names` load now, none of `keep` among them; None if they cannot load.

        Args:
            drain: weights in use may leave too, once their answers have ended.
        """
        ...

    def load_s(self, name: str) -> float:
        """Expected seconds to load these weights; also of those in memory, should they have to come back."""
        ...


@dataclass(slots=True, eq=False)
class _Claim:
    """Room promised to a residency: the `leaving` weights take no more requests until it is resident."""

    residency: Residency
    leaving: frozenset[str]
    loading: bool


class Scheduler:
    """Waiting requests in queues by residency, and which of them to admit. The clock is an argument of every call.

    Args:
        memory: the weights in memory.
        capacity: requests that certain weights are given at once.
        aging_s: how long a request may be passed over for others.
        copy_engine: what loads certain weights; those of different ones load at the same time.

    Attributes:
        in_flight: admitted and unfinished requests on each of the weights; no zeros.
    """

    def __init__(
        self,
        memory: Memory,
        *,
        capacity: Callable[[str], int],
        aging_s: float,
        copy_engine: Callable[[str], Hashable] = lambda name: None,
    ) -> None:
        self.in_flight: Counter[str] = Counter()
        self._memory, self._capacity, self._aging_s, self._copy_engine = memory, capacity, aging_s, copy_engine
        self._queues: dict[Residency, RequestQueue] = {}  # none is empty
        self._residency: dict[int, Residency] = {}  # of each waiting request
        self._heads: list[int] = []  # the oldest request of each queue, in order; ids grow with time
        self._by_name: dict[str, dict[Residency, None]] = {}  # residencies with waiting requests
        self._load_s: dict[str, float] = {}  # expected, of weights that requests wait for
        self._turns: dict[Residency, tuple[int, float, int]] = {}  # of queues that have not changed since
        self._aged_s = float("-inf")  # requests from before that time are past the bound
        self._claims: list[_Claim] = []
        self._engines: set[Hashable] = set()  # all copy engines so far
        self._ids = itertools.count()
        self._kept: set[str] = set()  # busy weights whose requests would lose more by a switch than others gain
        self._mix = RecentMix()
        self._changed = True  # whether an absent residency may have got room since the last decision

    def __len__(self) -> int:
        """Requests that wait."""
        return len(self._residency)

    @property
    def waiting(self) -> dict[Residency, int]:
        """Requests that wait, by residency."""
        return {residency: len(queue) for residency, queue in self._queues.items()}

    @property
    def wanted(self) -> set[str]:
        """Weights that requests wait for or use."""
        return {*self._by_name, *self.in_flight}

    def demand(self, name: str, now_s: float) -> Demand:
        """When weights are needed next, and how often of late.

        With waiting requests, the next use is the time at which the oldest was submitted: a time before now, so that
        weights are needed in the order of submission. Weights in use are needed now: of these, a policy that goes by
        the next use evicts the one that was given a request longest ago, whose answers are expected to end first. Else
        the next use is expected after the mean time between recent requests.
        """
        per_s = self._mix.per_s(name, now_s)
        if (waiting := self._by_name.get(name)) is not None:
            return Demand(min(map(self._oldest_s, waiting)), per_s)
        if name in self.in_flight:
            return Demand(now_s, per_s)
        return Demand(now_s + 1 / per_s, per_s) if per_s > 0 else Demand()

    def submit(self, residency: Residency, now_s: float, level: int = NORMAL_LEVEL) -> int:
        """Let a request wait; returns its id. level: of its priority (`registry.priorities`)."""
        number = next(self._ids)
        self._mix.note(residency, now_s)
        self._residency[number] = residency
        if (queue := self._queues.get(residency)) is None:
            queue = self._queues[residency] = RequestQueue()
            self._heads.append(number)
            for name in residency:
                self._engines.add(self._copy_engine(name))
                self._by_name.setdefault(name, {})[residency] = None
        queue.add(number, now_s, level)
        self._turns.pop(residency, None)
        resident = self._memory.resident
        self._changed |= any(name not in resident and name not in self.in_flight for name in residency)
        return number

    def cancel(self, number: int) -> None:
        """The request does not wait any more; nothing happens if it did not."""
        if (residency := self._residency.get(number)) is not None:
            self._remove(residency, [number])

    def leave(self, residency: Residency) -> None:
        """An admitted request has ended: its places are free."""
        for name in residency:
            self.in_flight[name] -= 1
            if not self.in_flight[name]:
                del self.in_flight[name]
                self._changed = True

    def loaded(self) -> None:
        """Weights have been loaded: memory has changed."""
        self._changed = True

    def admit(self, now_s: float) -> list[int]:
        """Ids to admit now, in order. They hold places on their weights until `leave`.

        Guarantees: no weights exceed their capacity; a copy engine loads one residency at a time; a call with nothing
        in flight admits at least one request if any waits; the waiting bound (see the module).
        """
        if not self._residency:
            return []
        now = _State(self._memory.resident, self.in_flight, self._copy_engine)
        self._aged_s = now_s - self._aging_s
        self._claims = [claim for claim in self._claims if self._is_needed(claim, now)]
        urgent = self._overdue(now)
        self._drop_younger_drains(urgent, now)
        admitted: list[int] = []
        for residency in urgent:
            drains = any(claim.residency == residency for claim in self._claims)
            if drains and not self._changed and len(residency) == 1:
                continue  # nothing has become idle; another may have waited for a place on what is in memory
            admitted += self._bring_in(residency, now, self._wanted_before(residency, now))
        admitted += self._fill(now)
        if self._changed:
            self._changed = False
            self._kept = set()
            admitted += self._bring_in_others(now, {engine for each in urgent for engine in now.engines(each)})
        if not admitted and not self.in_flight:
            # It cannot load; once admitted, its lease waits for memory or ends with the error.
            admitted = self._take(self._residency[self._heads[0]])
        return admitted

    def _is_needed(self, claim: _Claim, now: _State) -> bool:
        if claim.loading:
            return now.lacks(claim.residency) and all(name in self.in_flight for name in claim.residency)
        return claim.residency in self._queues and not now.present(claim.residency)

    def _overdue(self, now: _State) -> list[Residency]:
        """The oldest absent residency on each copy engine, if it is past the bound."""
        found: list[Residency] = []
        seen: set[Hashable] = set()
        for number in self._heads:
            residency = self._residency[number]
            if self._queues[residency].oldest_s >= self._aged_s or seen.issuperset(self._engines):
                break
            engines = now.engines(residency)
            if engines and seen.isdisjoint(engines):
                found.append(residency)
            seen |= engines
        return found

    def _drop_younger_drains(self, urgent: list[Residency], now: _State) -> None:
        """Give up drains that hold up older overdue requests: of the weights that drain, or on their copy engine."""
        if all(claim.loading for claim in self._claims):
            return
        kept = []
        for claim in self._claims:
            held = {each for name in claim.leaving for each in self._by_name.get(name, ())}
            rivals = [each for each in held if self._oldest_s(each) < self._aged_s]
            rivals += [each for each in urgent if not now.engines(each).isdisjoint(now.engines(claim.residency))]
            if claim.loading or all(self._head(claim.residency) <= self._head(each) for each in rivals):
                kept.append(claim)
        self._claims = kept

    def _wanted_before(self, residency: Residency, now: _State) -> set[str]:
        """Weights in memory that requests submitted before wait for."""
        before = (each for each in self._ready(now) if self._head(each) < self._head(residency))
        return {name for each in before for name in each}

    def _bring_in_others(self, now: _State, reserved: Set[Hashable]) -> list[int]:
        """Loads and drains for residencies that are not overdue. reserved: copy engines that an overdue one needs."""
        admitted: list[int] = []
        wanted = {name for name in now.resident if name in self._by_name or name in self.in_flight}
        for claim in [claim for claim in self._claims if not claim.loading]:
            if reserved.isdisjoint(now.engines(claim.residency)):
                admitted += self._bring_in(claim.residency, now, wanted - claim.leaving)
        if self._are_taken(reserved, now):
            return admitted
        absent = [(self._turn(each, now), each) for each in self._queues if not now.present(each) and self._free(each)]
        for _, residency in nsmallest(_TRIED, absent):
            if reserved.isdisjoint(now.engines(residency)):
                admitted += self._bring_in(residency, now, wanted, pays=True)
                if self._are_taken(reserved, now):
                    break
        return admitted

    def _are_taken(self, reserved: Set[Hashable], now: _State) -> bool:
        """Whether no copy engine can start a load or a drain: each is reserved, or has one of both under way."""
        left = self._engines - reserved
        if not left:
            return True
        if len(self._claims) < 2 or not left.issubset(now.loading()):
            return False
        draining = {e for claim in self._claims if not claim.loading for e in now.engines(claim.residency)}
        return left.issubset(draining)

    def _bring_in(self, residency: Residency, now: _State, keep: Collection[str], *, pays: bool = False) -> list[int]:
        """Admit an absent residency, if it can load now without `keep`; else drain for it.

        Args:
            pays: drain whatever is needed next last, `keep` too, but only if that pays.
        """
        engines = now.engines(residency)
        claims = [claim for claim in self._claims if claim.residency != residency]
        promised = frozenset[str]().union(*(claim.leaving for claim in claims))
        if engines.isdisjoint(now.loading()) and self._free(residency):
            leaving = self._memory.room(residency, promised.union(keep), drain=False)
            if leaving is not None:
                self._claims = [*claims, _Claim(residency, leaving, loading=True)]
                return self._take(residency)
        if len(claims) == len(self._claims) and not any(
            not claim.loading and not engines.isdisjoint(now.engines(claim.residency)) for claim in claims
        ):
            leaving = self._memory.room(residency, promised if pays else promised.union(keep), drain=True)
            if leaving is not None and (not pays or self._gains(residency, leaving, now)):
                self._claims.append(_Claim(residency, leaving, loading=False))
        return []

    def _turn(self, residency: Residency, now: _State) -> tuple[int, float, int]:
        """Of two absent residencies, the one with the lower turn loads first; the older one of equals.

        That is the one with a request of higher priority; else it is the time of the oldest request, as if that had
        come sooner by a load for each request.
        """
        if (known := self._turns.get(residency)) is not None:
            return known
        queue = self._queues[residency]
        turn = -queue.level, queue.oldest_s - len(queue) * self._expected_load_s(residency, now), queue.oldest
        if len(residency) == 1:  # else it depends on which of them are in memory
            self._turns[residency] = turn
        return turn

    def _gains(self, residency: Residency, leaving: frozenset[str], now: _State) -> bool:
        """Whether requests for an absent residency gain more by a switch than those for busy weights lose.

        Those of higher priority do, whatever the loads.
        """
        held = {each for name in leaving for each in self._by_name.get(name, ())}
        if not held:
            return True
        level, held_level = self._queues[residency].level, max(self._queues[each].level for each in held)
        n_held = sum(len(self._queues[each]) for each in held)
        both_s = self._expected_load_s(residency, now) + sum(map(self._memory.load_s, leaving))
        gains = level > held_level or (
            level == held_level and self._turn(residency, now)[1] < min(map(self._oldest_s, held)) - n_held * both_s
        )
        if not gains:
            self._kept |= leaving
        return gains

    def _expected_load_s(self, residency: Residency, now: _State) -> float:
        """Seconds of its load, as they were expected when this was first asked for its requests."""
        seconds = 0.0
        for name in residency:
            if name not in now.resident:
                if name not in self._load_s:
                    self._load_s[name] = self._memory.load_s(name)
                seconds += self._load_s[name]
        return seconds

    def _ready(self, now: _State) -> list[Residency]:
        """Residencies with waiting requests whose weights are in memory or on their way."""
        names = [*now.resident, *now.coming]
        near = (
            self._queues
            if len(self._queues) < len(names)
            else dict.fromkeys(each for name in names for each in self._by_name.get(name, ()))
        )
        return [residency for residency in near if now.present(residency)]

    def _fill(self, now: _State) -> list[int]:
        """Requests of ready residencies, as places are free: those past the bound first, then by priority.

        Past the bound, one that needs places on several weights at once keeps younger requests from them.
        """
        held = frozenset[str]().union(*(claim.leaving for claim in self._claims))
        ready = [each for each in self._ready(now) if held.isdisjoint(each) and (len(each) > 1 or self._free(each))]
        admitted: list[int] = []
        kept: set[str] = set()
        for residency in sorted(ready, key=self._place_in_line):
            if kept.isdisjoint(residency):
                taken = self._take(residency)
                admitted += taken
                if not taken and self._oldest_s(residency) < self._aged_s:
                    kept.update(residency)
        return admitted

    def _free(self, residency: Residency) -> int:
        """Free places: a request takes one on each of its weights."""
        if len(residency) == 1:  # the common case
            return max(0, self._capacity(residency[0]) - self.in_flight.get(residency[0], 0))
        return max(0, min([self._capacity(name) - self.in_flight.get(name, 0) for name in residency]))

    def _take(self, residency: Residency) -> list[int]:
        """Admit the first requests of one residency, as many as there are places."""
        admitted = self._queues[residency].first(self._free(residency), self._aged_s)
        if admitted:
            for name in residency:
                self.in_flight[name] += len(admitted)
            self._remove(residency, admitted)
        return admitted

    def _remove(self, residency: Residency, numbers: list[int]) -> None:
        """Requests that do not wait any more."""
        queue = self._queues[residency]
        self._turns.pop(residency, None)
        if (head := self._head(residency)) in numbers:
            del self._heads[bisect_left(self._heads, head)]
        for number in numbers:
            queue.remove(number)
            del self._residency[number]
        if queue and self._head(residency) != head:
            insort(self._heads, self._head(residency))
        if queue:
            self._changed |= not self._kept.isdisjoint(residency)
        else:
            del self._queues[residency]
            for name in residency:
                del self._by_name[name][residency]
                if not self._by_name[name]:
                    del self._by_name[name]
                    self._load_s.pop(name, None)
            self._changed = True

    def _head(self, residency: Residency) -> int:
        """Its oldest request: the lower, the older."""
        return self._queues[residency].oldest

    def _oldest_s(self, residency: Residency) -> float:
        return self._queues[residency].oldest_s

    def _place_in_line(self, residency: Residency) -> tuple[int, int]:
        """Of ready residencies that share weights, the one with the lower place takes free places first."""
        queue = self._queues[residency]
        return (-sys.maxsize if queue.oldest_s < self._aged_s else -queue.level), queue.oldest


class _State:
    """The weights in memory and on their way during one decision."""

    def __init__(
        self, resident: Collection[str], in_flight: Mapping[str, int], copy_engine: Callable[[str], Hashable]
    ) -> None:
        self.resident, self._in_flight, self._copy_engine = resident, in_flight, copy_engine
        self.coming = [name for name in in_flight if name not in resident]

    def lacks(self, residency: Residency) -> bool:
        """Whether any of its weights is not in memory."""
        return any(name not in self.resident for name in residency)

    def present(self, residency: Residency) -> bool:
        """Whether all of its weights are in memory or on their way."""
        for name in residency:  # noqa: SIM110 (called for each queue; a generator takes twice the time)
            if name not in self.resident and name not in self._in_flight:
                return False
        return True

    def engines(self, residency: Residency) -> frozenset[Hashable]:
        """Copy engines that a load needs; none for what is in memory or on its way."""
        if self.present(residency):
            return _NONE
        if len(residency) == 1:  # the common case
            return frozenset((self._copy_engine(residency[0]),))
        return frozenset([self._copy_engine(name) for name in residency if name not in self.resident])

    def loading(self) -> frozenset[Hashable]:
        """Copy engines at work."""
        return frozenset([self._copy_engine(name) for name in self._in_flight if name not in self.resident])
