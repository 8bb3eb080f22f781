"""Placement: a request goes to the expert host where its expert can start soonest.

    start = seconds to load the expert there (0 if resident) + seconds of the requests queued before it

So the requests of an expert gather on the host that has it, and spread once waiting costs more than loading it on
another host. Pure: the status of each host is an argument.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

ROUNDING_S: Final = 0.01
"""Starts that differ by less are equal; the less busy host wins."""
HEARD_S: Final = 1.0
"""Seconds after which a host's report covers the requests sent to it; hosts report twice as often."""


@dataclass(frozen=True, slots=True)
class HostStatus:
    """The latest report of a host. A residency is named by the expert that must be resident: an adapter's base.

    Attributes:
        load_s: residency -> expected seconds to load it; 0 if it is resident or loading.
        queue_s: residency -> expected seconds of the requests waiting for it.
        tight: residencies that fit only by evicting another one.
        busy: requests waiting or in progress.
    """

    id: str
    load_s: Mapping[str, float] = field(default_factory=dict)
    queue_s: Mapping[str, float] = field(default_factory=dict)
    tight: frozenset[str] = frozenset()
    busy: int = 0

    @classmethod
    def of(cls, host_id: str, state: Mapping[str, Any]) -> HostStatus:
        """The status in a state published by `ExpertHost`; empty for a host that has not reported yet."""
        if not state:
            return cls(host_id)
        return cls(host_id, state["load_s"], state["queue_s"], frozenset(state["tight"]), state["busy"])


def rank(residency: str, hosts: Iterable[HostStatus]) -> list[str]:
    """Ids of the hosts, best first: soonest start, then room without eviction, then fewest requests."""
    hosts = list(hosts)
    unknown_s = max((host.load_s[residency] for host in hosts if residency in host.load_s), default=0.0)

    def key(host: HostStatus) -> tuple[int, bool, int, str]:
        start_s = host.load_s.get(residency, unknown_s) + host.queue_s.get(residency, 0.0)
        return (round(start_s / ROUNDING_S), residency in host.tight, host.busy, host.id)

    return [host.id for host in sorted(hosts, key=key)]


class Board:
    """The latest status of every host, corrected by the requests sent since.

    A request just sent marks its expert as loading there and the host as busier, until the host's next report. Written
    by the thread in which Serve chooses replicas, read by other threads.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._views: dict[str, dict[str, HostStatus]] = {}
        self._sent: dict[str, list[tuple[float, str]]] = {}

    def publish(self, deployment: str, views: Sequence[HostStatus]) -> None:
        """Replace the hosts of a deployment; hosts that are not listed are gone."""
        with self._lock:
            for gone in self._views.get(deployment, {}).keys() - {view.id for view in views}:
                self._sent.pop(gone, None)
            self._views[deployment] = {view.id: view for view in views}

    def sent(self, host_id: str, residency: str) -> None:
        """Record that a request for `residency` is sent to that host."""
        with self._lock:
            since = self._clock() - HEARD_S
            recent = [entry for entry in self._sent.get(host_id, ()) if entry[0] > since]
            self._sent[host_id] = [*recent, (self._clock(), residency)]

    def hosts(self, deployment: str) -> list[HostStatus]:
        """The current status of the hosts of a deployment."""
        with self._lock:
            return [self._corrected(view) for view in self._views.get(deployment, {}).values()]

    def _corrected(self, view: HostStatus) -> HostStatus:
        since = self._clock() - HEARD_S
        residencies = [residency for at, residency in self._sent.get(view.id, ()) if at > since]
        if not residencies:
            return view
        load_s = {**view.load_s, **dict.fromkeys(residencies, 0.0)}
        return replace(view, load_s=load_s, tight=view.tight.difference(residencies), busy=view.busy + len(residencies))


BOARD: Final = Board()
"""The board of this process. A module global, since Serve constructs its writer (`SoonestStart`)."""
