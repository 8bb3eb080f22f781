"""Where a request goes among the processes that hold weights: where its expert can start soonest.

    start = seconds to load it there (none where it is resident) + seconds that the requests before it take

so an expert that is resident draws its requests together, and a crowd of them spreads once waiting costs more than
loading it again elsewhere. Pure: what each host says of itself comes in as data.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

ROUNDING_S: Final = 0.01
"""Starts that differ by less are equal: then the less busy host is taken."""
HEARD_S: Final = 1.0
"""Seconds after which a host's own word covers what was sent to it: hosts speak twice as often."""


@dataclass(frozen=True, slots=True)
class HostView:
    """What a host last said of itself. Groups are names of experts that must be resident: an adapter's base.

    Attributes:
        load_s: residency -> expected seconds to load it; zero where it is resident or on its way.
        queue_s: residency -> expected seconds of the requests that wait for it.
        tight: residencies that could come in only by evicting another one.
        busy: requests that wait or are being answered.
    """

    id: str
    load_s: Mapping[str, float] = field(default_factory=dict)
    queue_s: Mapping[str, float] = field(default_factory=dict)
    tight: frozenset[str] = frozenset()
    busy: int = 0

    @classmethod
    def of(cls, host_id: str, state: Mapping[str, Any]) -> HostView:
        """The view in a state as `ExpertHost` publishes it; empty for a host that has said nothing yet."""
        if not state:
            return cls(host_id)
        return cls(host_id, state["load_s"], state["queue_s"], frozenset(state["tight"]), state["busy"])


def rank(residency: str, hosts: Iterable[HostView]) -> list[str]:
    """Ids of the hosts, best first: the soonest start, then room without evicting, then the fewest requests."""
    hosts = list(hosts)
    unknown_s = max((host.load_s[residency] for host in hosts if residency in host.load_s), default=0.0)

    def key(host: HostView) -> tuple[int, bool, int, str]:
        start_s = host.load_s.get(residency, unknown_s) + host.queue_s.get(residency, 0.0)
        return (round(start_s / ROUNDING_S), residency in host.tight, host.busy, host.id)

    return [host.id for host in sorted(hosts, key=key)]


class Board:
    """The latest word of every host, corrected by what was sent there since.

    A request that has just been sent makes its expert as good as loading there, and the host busier, until the host
    has spoken again. Written by the thread in which Serve chooses replicas, read by others too.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._views: dict[str, dict[str, HostView]] = {}
        self._sent: dict[str, list[tuple[float, str]]] = {}

    def publish(self, deployment: str, views: Sequence[HostView]) -> None:
        """The hosts of a deployment, all of them: one that is not named is gone."""
        with self._lock:
            for gone in self._views.get(deployment, {}).keys() - {view.id for view in views}:
                self._sent.pop(gone, None)
            self._views[deployment] = {view.id: view for view in views}

    def sent(self, host_id: str, residency: str) -> None:
        """A request for `residency` goes to that host now."""
        with self._lock:
            since = self._clock() - HEARD_S
            recent = [entry for entry in self._sent.get(host_id, ()) if entry[0] > since]
            self._sent[host_id] = [*recent, (self._clock(), residency)]

    def hosts(self, deployment: str) -> list[HostView]:
        """The hosts of a deployment as far as is known now."""
        with self._lock:
            return [self._corrected(view) for view in self._views.get(deployment, {}).values()]

    def _corrected(self, view: HostView) -> HostView:
        since = self._clock() - HEARD_S
        residencies = [residency for at, residency in self._sent.get(view.id, ()) if at > since]
        if not residencies:
            return view
        load_s = {**view.load_s, **dict.fromkeys(residencies, 0.0)}
        return replace(view, load_s=load_s, tight=view.tight.difference(residencies), busy=view.busy + len(residencies))


BOARD: Final = Board()
"""What this process knows of the hosts: one for the process, since Serve constructs what writes it (`SoonestStart`)."""
