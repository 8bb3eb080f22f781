"""Placement: a request goes to the expert host where its answer is predicted to end first.

    finish = seconds to load the expert there (0 if resident) + seconds of the requests queued before it
             + seconds that its answers take there in excess of the fastest host's

The last term tells a GPU from a CPU. Answers of equal hosts differ by their batches: less than half more is no excess.
So the requests of an expert gather on the host that has it, and spread once waiting costs more than loading it on
another host. A gateway counts its own calls exactly, from the choice of a host to the end of the answer; of the calls
of other gateways it knows the latest report of the host. Pure: the status of each host is an argument.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final
from uuid import uuid4

ROUNDING_S: Final = 0.01
"""Starts that differ by less are equal; the less busy host wins."""
SLOWER: Final = 1.5
"""A host is slower if its answers take this many times those of the fastest one."""
HEARD_S: Final = 1.0
"""Seconds after which a host's report covers the loads of requests sent to it; hosts report twice as often."""


@dataclass(frozen=True, slots=True)
class HostStatus:
    """The latest report of a host. A residency is named by the expert that must be resident: an adapter's base.

    Attributes:
        load_s: residency -> expected seconds to load it; 0 if it is resident or loading.
        queue_s: residency -> expected seconds of the requests waiting for it.
        tight: residencies that fit only by evicting another one.
        busy: requests waiting or in progress.
        places: residency -> requests that its weights answer at once; only of those in memory.
        answer_s: residency -> mean seconds of its recent answers.
        calls: gateway -> residency -> its calls at the host, waiting or in progress.
        address: where it accepts links (`coe.serve.cluster.link`); empty if nowhere.
        weights: `name@version` of weights in memory or loading -> their `state`, `size_bytes` and `unload_in_s`.
    """

    id: str
    load_s: Mapping[str, float] = field(default_factory=dict)
    queue_s: Mapping[str, float] = field(default_factory=dict)
    tight: frozenset[str] = frozenset()
    busy: int = 0
    places: Mapping[str, int] = field(default_factory=dict)
    answer_s: Mapping[str, float] = field(default_factory=dict)
    calls: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    address: str = ""
    weights: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, host_id: str, state: Mapping[str, Any]) -> HostStatus:
        """The status in a state published by `ExpertHost`; empty for a host that has not reported yet."""
        return cls(host_id, **{**state, "tight": frozenset(state["tight"])}) if state else cls(host_id)


def rank(residency: str, hosts: Iterable[HostStatus]) -> list[str]:
    """Ids of the hosts, best first: soonest finish, then room without eviction, then fewest requests."""
    hosts = list(hosts)
    unknown_s = max((host.load_s[residency] for host in hosts if residency in host.load_s), default=0.0)
    fastest_s = min((host.answer_s[residency] for host in hosts if host.answer_s.get(residency)), default=0.0)

    def key(host: HostStatus) -> tuple[int, bool, int, str]:
        start_s = host.load_s.get(residency, unknown_s) + host.queue_s.get(residency, 0.0)
        finish_s = start_s + _excess_s(host.answer_s.get(residency, 0.0), fastest_s)
        return (round(finish_s / ROUNDING_S), residency in host.tight, host.busy, host.id)

    return [host.id for host in sorted(hosts, key=key)]


def _excess_s(answer_s: float, fastest_s: float) -> float:
    """Seconds that answers take beyond those of the fastest host; 0 before the first answer: it is tried."""
    return answer_s - fastest_s if answer_s >= SLOWER * fastest_s else 0.0


def second_copy(residency: str, hosts: Sequence[HostStatus], waited_s: float) -> str | None:
    """The host that should load a residency beside the one that has it, because waiting has cost as much by now.

    Args:
        waited_s: seconds that requests have waited at the best host since it last had a free place.
    """
    free = [host for host in hosts if not host.queue_s.get(residency) and residency not in host.tight]
    costs = {host.id: host.load_s[residency] for host in free if host.load_s.get(residency)}
    cheapest = min(costs, key=lambda name: (costs[name], name), default=None)
    return cheapest if cheapest is not None and waited_s >= costs[cheapest] else None


@dataclass(slots=True, eq=False)
class Call:
    """A call of this gateway, from the choice of its host to its end.

    Attributes:
        id: unique in the service; begins with the gateway's `Board.origin`.
        host: the host it is sent to; None while no host has reported.
        pools: all pools that could answer it.
        shown: a client has text of its answer.
        lost: the host does not respond (`coe.serve.cluster.liveness`), and the call ends.
        on_lost: called once when that is found, in any thread.
    """

    id: str
    residency: str
    pool: str
    started_s: float
    host: str | None = None
    pools: Sequence[str] = ()
    shown: bool = False
    lost: bool = False
    on_lost: Callable[[], None] | None = None


class Board:
    """The latest status of every host, corrected by this gateway's own calls; and which hosts do not respond.

    Written by the thread in which Serve chooses replicas and by the gateway's event loop; read by both.

    Attributes:
        origin: name of this gateway in the ids of its calls.
        silent_s: seconds without a response to a ping after which a host is avoided.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, silent_s: float = 10.0) -> None:
        self.origin, self.silent_s = uuid4().hex[:12], silent_s
        self._clock = clock
        self._lock = threading.RLock()
        self._numbers = itertools.count()
        self._views: dict[str, dict[str, HostStatus]] = {}
        self._calls: dict[str, Call] = {}
        self._at: dict[str, dict[str, dict[str, Call]]] = {}  # host -> residency -> this gateway's calls, oldest first
        self._recent: dict[str, dict[str, float]] = {}  # host -> residency -> when a call for it was last sent there
        self._silent: set[str] = set()
        self._waited_s: dict[str, float] = {}

    def publish(self, deployment: str, views: Sequence[HostStatus]) -> None:
        """Replace the hosts of a deployment; hosts that are not listed are gone."""
        with self._lock:
            for gone in self._views.get(deployment, {}).keys() - {view.id for view in views}:
                self._recent.pop(gone, None)
                self._silent.discard(gone)
            self._views[deployment] = {view.id: view for view in views}

    def hosts(self, deployment: str, residency: str | None = None) -> list[HostStatus]:
        """The current status of the hosts of a deployment that respond; of all of them if none does.

        Args:
            residency: the only one of interest; the status has the seconds of no other.
        """
        with self._lock:
            views = self._views.get(deployment, {})
            heard = [view for name, view in views.items() if name not in self._silent]
            return [self._corrected(_only(view, residency)) for view in heard or views.values()]

    def open(self, residency: str, pools: Sequence[str], avoid: Collection[str] = ()) -> Call:
        """Choose the host of a call among those of the pools, and count the call there until `close`.

        Args:
            avoid: hosts that have refused the call.
        """
        with self._lock:
            number = next(self._numbers)
            hosts = [(host, pool) for pool in pools for host in self.hosts(pool, residency) if host.id not in avoid]
            call = Call(f"{self.origin}/{number}", residency, pools[0], self._clock(), pools=pools)
            self._calls[call.id] = call
            if hosts:
                best = self._best(residency, [host for host, _ in hosts])
                self.sent(call.id, best)
                call.pool = next(pool for host, pool in hosts if host.id == best)
            return call

    def sent(self, call_id: str, host_id: str) -> None:
        """Record the host of a call: as chosen, or the one that Serve sent it to in place of that."""
        with self._lock:
            if (call := self._calls.get(call_id)) is not None:
                self._leave(call)
                call.host = host_id
                self._at.setdefault(host_id, {}).setdefault(call.residency, {})[call.id] = call
                self._recent.setdefault(host_id, {})[call.residency] = self._clock()

    def target(self, call_id: str) -> str | None:
        """The host of a call; None if none was chosen, or the call has ended."""
        call = self._calls.get(call_id)
        return None if call is None else call.host

    def address(self, call: Call) -> str:
        """Where the host of a call accepts links; empty if no host is chosen, or it accepts none."""
        view = self._views.get(call.pool, {}).get(call.host or "")
        return "" if view is None else view.address

    def close(self, call: Call) -> None:
        """The call has ended."""
        with self._lock:
            self._calls.pop(call.id, None)
            self._leave(call)

    def knows_another(self, pools: Sequence[str], avoid: Collection[str]) -> bool:
        """Whether a host of the pools that responds is not among those to avoid."""
        with self._lock:
            return any(set(self._views.get(pool, ())) - self._silent - set(avoid) for pool in pools)

    def weights(self, deployment: str) -> list[Mapping[str, Mapping[str, Any]]]:
        """What each host of a deployment had in memory at its latest report (`HostStatus.weights`)."""
        with self._lock:
            return [view.weights for view in self._views.get(deployment, {}).values()]

    def in_use(self, deployment: str) -> set[str]:
        """The hosts whose response matters now: those with calls of this gateway, and those that do not respond."""
        with self._lock:
            return {name for name in self._views.get(deployment, {}) if name in self._at or name in self._silent}

    def lose(self, host_id: str) -> bool:
        """Avoid a host that does not respond. Returns whether that is new.

        Its calls end if another host could take them, or a client has seen text; others wait until it responds again,
        or Serve replaces it.
        """
        with self._lock:
            new = host_id not in self._silent
            self._silent.add(host_id)
            here = [call for calls in self._at.get(host_id, {}).values() for call in calls.values() if not call.lost]
            lost = [call for call in here if call.shown or self.knows_another(call.pools, {host_id})]
            for call in lost:
                call.lost = True
        for call in lost:
            if call.on_lost is not None:
                call.on_lost()
        return new

    def heard(self, host_id: str) -> bool:
        """The host has responded. Returns whether it was avoided until now."""
        with self._lock:
            silent = host_id in self._silent
            self._silent.discard(host_id)
            return silent

    def ids(self, deployment: str) -> list[str]:
        """All hosts of a deployment, those that do not respond included."""
        with self._lock:
            return sorted(self._views.get(deployment, ()))

    def silent(self, deployment: str) -> list[str]:
        """The hosts of a deployment that do not respond."""
        with self._lock:
            return sorted(self._silent.intersection(self._views.get(deployment, ())))

    def _leave(self, call: Call) -> None:
        """Count a call no longer at its host."""
        at = self._at.get(call.host or "", {})
        calls = at.get(call.residency, {})
        calls.pop(call.id, None)
        if not calls:
            at.pop(call.residency, None)
        if not at:
            self._at.pop(call.host or "", None)

    def _best(self, residency: str, hosts: Sequence[HostStatus]) -> str:
        """The host of the soonest finish; another one without the residency if a queue has lasted too long."""
        first = rank(residency, hosts)[0]
        best = next(host for host in hosts if host.id == first)
        wait_s = best.queue_s.get(residency, 0.0)
        waited_s = self._waited_s.get(residency, 0.0) + wait_s
        other = second_copy(residency, hosts, waited_s) if wait_s else None
        if wait_s and other is None:
            self._waited_s[residency] = waited_s
        else:
            self._waited_s.pop(residency, None)
        return best.id if other is None else other

    def _corrected(self, view: HostStatus) -> HostStatus:
        """The status with this gateway's calls as they are now, in place of those in the report."""
        own, reported = self._at.get(view.id, {}), view.calls.get(self.origin, {})
        since = self._clock() - HEARD_S
        recent = self._recent.get(view.id, {})
        loading = {name: 0.0 for name, load_s in view.load_s.items() if load_s and recent.get(name, since) > since}
        active = {*own, *(name for calls in view.calls.values() for name in calls)}
        queue_s = {name: self._queue_s(view, name, own) for name in view.places if name in active}
        return replace(
            view,
            load_s={**view.load_s, **loading} if loading else view.load_s,
            queue_s={**view.queue_s, **queue_s} if queue_s else view.queue_s,
            tight=view.tight.difference(loading) if loading else view.tight,
            busy=max(view.busy - sum(reported.values()), 0) + sum(map(len, own.values())),
        )

    def _queue_s(self, view: HostStatus, residency: str, own: Mapping[str, Mapping[str, Call]]) -> float:
        """Expected seconds until a new call finds a place: one of the calls in progress ends, and those before it.

        Before the first answer, the age of this gateway's oldest call stands for its seconds.
        """
        mine, places = own.get(residency, {}), view.places[residency]
        others = sum(calls.get(residency, 0) for gateway, calls in view.calls.items() if gateway != self.origin)
        ahead = len(mine) + others - places
        if ahead < 0:
            return 0.0
        now = self._clock()
        oldest = next((call.started_s for call in mine.values()), now)
        return (ahead + 1) * (view.answer_s.get(residency) or now - oldest) / places


def _only(view: HostStatus, residency: str | None) -> HostStatus:
    """The status with the seconds of one residency: there may be thousands."""
    if residency is None:
        return view
    load_s, queue_s = ({residency: of[residency]} if residency in of else {} for of in (view.load_s, view.queue_s))
    places = {residency: view.places[residency]} if residency in view.places else {}
    return replace(view, load_s=load_s, queue_s=queue_s, places=places)


BOARD: Final = Board()
"""The board of this process. A module global, since Serve constructs its writer (`SoonestStart`)."""
