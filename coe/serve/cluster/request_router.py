"""Ray Serve's choice of a replica: the host where the expert can start soonest.

This is a "request router" in Serve's terms; the routers that choose *experts* are in `routers/`.
"""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import FIFOMixin, MultiplexMixin, PendingRequest, RequestRouter, RunningReplica

from coe.serve.cluster import placement  # the module, not its names: Serve pickles this class by value
from coe.serve.cluster.placement import HostStatus, rank


class SoonestStart(FIFOMixin, MultiplexMixin, RequestRouter):
    """Ranks the hosts by expected start. The call's `multiplexed_model_id` is the residency it needs.

    The mixins matter: without them Serve hands a free replica to whichever call of the same HTTP request waits.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """One rank per host, best first; Serve takes the first host that accepts another request."""
        deployment = self._deployment_id.name
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        placement.BOARD.publish(
            deployment, [HostStatus.of(name, replica.routing_stats) for name, replica in by_id.items()]
        )
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # otherwise the loop spins while all hosts are full
        residency = pending_request.metadata.multiplexed_model_id
        return [[by_id[name]] for name in rank(residency, placement.BOARD.hosts(deployment))]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: Any, result: Any) -> None:
        """Record a request sent since the host's last report."""
        placement.BOARD.sent(replica_id.unique_id, pending_request.metadata.multiplexed_model_id)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Receive new states even without traffic."""
        super().update_replicas(replicas)
        views = [HostStatus.of(r.replica_id.unique_id, r.routing_stats) for r in replicas]
        placement.BOARD.publish(self._deployment_id.name, views)
