"""Ray Serve's choice of a replica, made by where an expert can start soonest.

This is Serve's own "request router"; the routers that choose *experts* are in `routers/`.
"""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import FIFOMixin, MultiplexMixin, PendingRequest, RequestRouter, RunningReplica

from coe.serve.cluster import placement  # the module, not its names: Serve pickles this class by value
from coe.serve.cluster.placement import HostView, rank


class SoonestStart(FIFOMixin, MultiplexMixin, RequestRouter):
    """Ranks the hosts by expected start. The call's `multiplexed_model_id` is what must be resident.

    The mixins matter: without them Serve hands a free replica to whichever call of the same HTTP request waits.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """One rank a host, best first; Serve takes the first that accepts another request."""
        deployment = self._deployment_id.name
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        placement.BOARD.publish(
            deployment, [HostView.of(name, replica.routing_stats) for name, replica in by_id.items()]
        )
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # or the loop spins while all are full
        residency = pending_request.metadata.multiplexed_model_id
        return [[by_id[name]] for name in rank(residency, placement.BOARD.hosts(deployment))]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: Any, result: Any) -> None:
        """Count what was sent since the host last spoke."""
        placement.BOARD.sent(replica_id.unique_id, pending_request.metadata.multiplexed_model_id)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Hear of new states also while nothing is asked."""
        super().update_replicas(replicas)
        views = [HostView.of(r.replica_id.unique_id, r.routing_stats) for r in replicas]
        placement.BOARD.publish(self._deployment_id.name, views)
