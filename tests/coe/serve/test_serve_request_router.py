"""Serve's choice of a replica for calls whose host the pool client has chosen, without a Serve."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve.request_router import RequestRouter

from coe.serve.cluster import placement
from coe.serve.cluster.placement import Board, HostStatus
from coe.serve.cluster.request_router import SoonestStart, call_of


class Replica(SimpleNamespace):
    """A substitute for a RunningReplica."""

    def __init__(self, name: str, load_s: float, pings: list[str]) -> None:
        stats = {"load_s": {"m": load_s}, "queue_s": {}, "tight": [], "busy": 0}
        super().__init__(replica_id=SimpleNamespace(unique_id=name), routing_stats=stats)
        self.pings = pings

    async def get_queue_len(self, *, deadline_s: float) -> int:
        self.pings.append(self.replica_id.unique_id)
        return 0


def pending(*args: object) -> Any:
    metadata = SimpleNamespace(multiplexed_model_id="m")
    return SimpleNamespace(args=list(args), metadata=metadata, routing_context=SimpleNamespace(should_backoff=False))


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Board:
    board = Board(clock=lambda: 0.0)
    monkeypatch.setattr(placement, "BOARD", board)
    return board


def router(*replicas: Replica) -> SoonestStart:
    made = object.__new__(SoonestStart)
    made._deployment_id = SimpleNamespace(name="hosts")
    made._replicas = dict(enumerate(replicas))
    return made


def names(ranks: list[list[Any]]) -> list[list[str]]:
    return [[replica.replica_id.unique_id for replica in rank] for rank in ranks]


async def choose(made: SoonestStart, replicas: list[Any], request: Any) -> list[list[str]]:
    try:
        return names(await made.choose_replicas(replicas, request))
    finally:
        assert made._watching is not None  # hosts are pinged from the first call on
        made._watching.cancel()


async def test_a_call_goes_to_its_chosen_host_and_to_others_only_after_that(board: Board) -> None:
    replicas = [Replica(name, 0.0, []) for name in ("a", "b", "c")]
    board.publish("hosts", [HostStatus.of(r.replica_id.unique_id, r.routing_stats) for r in replicas])
    call = board.open("m", ["hosts"])
    board.sent(call.id, "b")
    request = pending("m", "request", 1, call.id)
    assert await choose(router(*replicas), replicas, request) == [["b"], ["a", "c"]]
    assert request.routing_context.should_backoff


async def test_without_a_choice_the_soonest_start_is_taken_and_counted(board: Board) -> None:
    """Before the first call no host is known; Serve tells of them here."""
    call = board.open("m", ["hosts"])
    assert call.host is None
    replicas = [Replica("a", 5.0, []), Replica("b", 1.0, [])]
    assert await choose(router(*replicas), replicas, pending("m", "request", 1, call.id)) == [["b"], ["a"]]
    assert board.target(call.id) == "b"


async def test_the_choice_of_a_host_that_is_gone_is_made_again(board: Board) -> None:
    replicas = [Replica("b", 0.0, [])]
    board.publish("hosts", [HostStatus("a", load_s={"m": 0.0})])
    call = board.open("m", ["hosts"])
    assert call.host == "a"
    assert await choose(router(*replicas), replicas, pending("m", "request", 1, call.id)) == [["b"]]
    assert board.target(call.id) == "b" and board.ids("hosts") == ["b"]


async def test_a_ping_goes_to_the_host_it_is_for(board: Board) -> None:
    pings: list[str] = []
    made = router(Replica("a", 0.0, pings), Replica("b", 0.0, pings))
    await made._ping("b")
    assert pings == ["b"]


def test_other_requests_to_a_host_are_no_calls() -> None:
    assert call_of(pending("m", "request", 1, "g/1")) == "g/1"
    assert call_of(pending()) is None and call_of(pending(["a warning"])) is None


async def test_hosts_are_pinged_as_soon_as_they_are_known_since_calls_over_links_choose_no_replica_here(
    board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RequestRouter, "update_replicas", lambda self, replicas: None)
    replicas = [Replica("a", 0.0, [])]
    made = router(*replicas)
    made.update_replicas(replicas)  # type: ignore[arg-type]
    assert board.ids("hosts") == ["a"] and made._watching is not None
    made._watching.cancel()


def test_without_an_event_loop_hosts_are_known_and_not_pinged(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RequestRouter, "update_replicas", lambda self, replicas: None)
    made = router()
    made.update_replicas([Replica("a", 0.0, [])])  # type: ignore[list-item]
    assert board.ids("hosts") == ["a"] and made._watching is None
