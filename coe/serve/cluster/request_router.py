"""Ray Serve's choice of a replica: the host where the answer is predicted to end first.

This is a "request router" in Serve's terms; the routers that choose *experts* are in `routers/`. The pool client has
chosen the host of each call already (`placement.Board.open`), unless no host had reported by then.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from ray.serve.request_router import FIFOMixin, MultiplexMixin, PendingRequest, RequestRouter, RunningReplica

from coe.serve.cluster import liveness, placement  # the modules, not their names: Serve pickles these by value
from coe.serve.cluster.placement import HostStatus, rank

PING_S = 10.0
"""Argument of Serve's queue length request, which is the ping; Serve itself does not use it."""


class CountedReplica(RunningReplica):
    """A replica that records which calls are sent to it: Serve may send another one than it chose the replica for."""

    def try_send_request(self, pr: PendingRequest, with_rejection: bool) -> Any:
        """Send, and record the host of the call."""
        if (call_id := call_of(pr)) is not None:
            placement.BOARD.sent(call_id, self.replica_id.unique_id)
        return super().try_send_request(pr, with_rejection)


class SoonestStart(FIFOMixin, MultiplexMixin, RequestRouter):
    """Ranks the hosts by expected start. The call's `multiplexed_model_id` is the residency it needs.

    The mixins matter: without them Serve hands a free replica to whichever call of the same HTTP request waits.
    """

    _watching: asyncio.Task[None] | None = None

    def create_replica_wrapper(self, replica_info: Any) -> RunningReplica:
        """Serve's object for a replica."""
        return CountedReplica(replica_info)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """One rank per host, best first; Serve takes the first host that accepts another request."""
        deployment = self._deployment_id.name
        self._watch(deployment)
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        if placement.BOARD.ids(deployment) != sorted(by_id):
            self._publish(candidate_replicas)
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # otherwise the loop spins while all hosts are full
        residency, call_id = pending_request.metadata.multiplexed_model_id, call_of(pending_request)
        chosen = None if call_id is None else placement.BOARD.target(call_id)
        if chosen is not None and chosen in by_id:
            others = [replica for name, replica in by_id.items() if name != chosen]
            return [[by_id[chosen]], *([others] if others else [])]
        ranked = rank(residency, placement.BOARD.hosts(deployment))
        if call_id is not None and ranked:
            placement.BOARD.sent(call_id, ranked[0])
        return [[by_id[name]] for name in ranked]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Receive new states even without traffic, or with traffic over links alone."""
        super().update_replicas(replicas)
        self._publish(replicas)
        with suppress(RuntimeError):  # no event loop runs here
            self._watch(self._deployment_id.name)

    def _publish(self, replicas: list[RunningReplica]) -> None:
        views = [HostStatus.of(r.replica_id.unique_id, r.routing_stats) for r in replicas]
        placement.BOARD.publish(self._deployment_id.name, views)

    def _watch(self, deployment: str) -> None:
        """Ping the hosts from now on. Raises RuntimeError without an event loop."""
        if self._watching is None:
            loop = asyncio.get_running_loop()
            pinging = liveness.Liveness(placement.BOARD, deployment, self._ping)
            self._watching = loop.create_task(pinging.run())

    async def _ping(self, host_id: str) -> None:
        """Return when the event loop of a host has responded."""
        for replica in [*self.curr_replicas.values()]:
            if replica.replica_id.unique_id == host_id:
                await replica.get_queue_len(deadline_s=PING_S)


def call_of(pending: PendingRequest) -> str | None:
    """The id of a call of `PoolClient`, which is the last argument; None for other requests to a host."""
    args = pending.args
    return args[3] if len(args) == 4 and isinstance(args[3], str) else None
