"""From the gateway to the hosts, over substitutes for Serve's handles: which pool is called, and what a death means."""

import asyncio
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ObjectLostError, RayTaskError
from ray.serve.exceptions import BackPressureError

from coe.config import HostPoolConfig
from coe.errors import (
    BudgetExceeded,
    CoeError,
    EngineError,
    HostLost,
    InvalidRequest,
    NotServedHere,
    Overloaded,
    UnknownModel,
)
from coe.serve.cluster.catalog import Catalog
from coe.serve.cluster.link import Broken, LinkLost
from coe.serve.cluster.placement import HEARD_S, Board, HostStatus
from coe.serve.cluster.pool_client import ATTEMPTS, PoolClient
from coe.types import Chunk, GenerateRequest, Usage
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot
from routers.base import Message

SPECS = [
    ExpertSpec(name="base", kind=Kind.MODEL, source="fake://echo"),
    ExpertSpec(name="sql", kind=Kind.ADAPTER, base="base", source="fake://echo"),
    ExpertSpec(name="solo", kind=Kind.MODEL, source="fake://echo"),
]
CATALOG = Catalog(4, Snapshot(1, {spec.name: spec for spec in SPECS}), {}, "default")
WHOLE = GenerateRequest(messages=(Message("user", "hi"),), stream=False)
STREAM = GenerateRequest(messages=(Message("user", "hi"),))
END = Chunk("", "stop", Usage(1, 1))


class Stream:
    """A substitute for a DeploymentResponseGenerator: pieces, or an exception to raise."""

    def __init__(self, pieces: list[Any]) -> None:
        self.pieces, self.cancelled = pieces, False

    async def __aiter__(self) -> AsyncIterator[Any]:
        for piece in self.pieces:
            if isinstance(piece, Exception) and not isinstance(piece, CoeError):
                raise piece
            yield piece

    def cancel(self) -> None:
        self.cancelled = True


class Whole:
    """A substitute for a DeploymentResponse: an answer, or an exception to raise."""

    def __init__(self, answer: Any) -> None:
        self.answer, self.cancelled = answer, False

    def __await__(self) -> Generator[Any, None, Any]:
        yield from asyncio.sleep(0).__await__()
        if isinstance(self.answer, ActorDiedError):
            raise self.answer
        return self.answer

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """A substitute for a DeploymentHandle: returns `answers`, call by call, and records the calls."""

    def __init__(self, *answers: Any) -> None:
        self.answers, self.calls, self.streams = list(answers), [], []  # type: ignore[var-annotated]

    def options(self, *, multiplexed_model_id: str, stream: bool) -> Any:
        def bound(method: str) -> Callable[..., Any]:
            def remote(expert: str, request: GenerateRequest, generation: int, call: str) -> Any:
                self.calls.append((method, multiplexed_model_id, expert, generation))
                answer = self.answers.pop(0)
                if stream:
                    self.streams.append(Stream(answer))
                    return self.streams[-1]
                return Whole(answer)

            return remote

        names = ("stream", "whole")
        return type("Bound", (), {name: type("Method", (), {"remote": staticmethod(bound(name))}) for name in names})

    def broadcast(self, method: str, *arguments: Any) -> Any:
        async def results(*, return_exceptions: bool) -> list[Any]:
            if arguments:
                self.calls.append((method, *arguments))
                return list(self.answers)
            return [{"method": method}, ActorDiedError()]

        return type("Broadcast", (), {"results_async": staticmethod(results)})


def hosts(board: Board | None = None, **handles: Handle) -> PoolClient:
    pools = {name: HostPoolConfig(name=name) for name in handles}
    if "small" in pools:
        pools["small"] = HostPoolConfig(name="small", experts=("solo",))
    return PoolClient(handles, pools, board or Board(), CATALOG)  # type: ignore[arg-type]


async def ask(system: PoolClient, expert: str, request: GenerateRequest) -> str:
    return "".join([chunk.text async for chunk in system.ask(expert, request)])


async def test_a_whole_answer_is_one_call_a_stream_another_each_addressed_by_what_must_be_resident() -> None:
    handle = Handle(Chunk("all", "stop", Usage(1, 1)), [Chunk("a"), Chunk("b"), END])
    system = hosts(hosts=handle)
    assert [await ask(system, "sql", WHOLE), await ask(system, "solo", STREAM)] == ["all", "ab"]
    assert handle.calls == [("whole", "base", "sql", 4), ("stream", "solo", "solo", 4)]


async def test_a_new_catalog_says_which_pool_serves_an_expert() -> None:
    end = Chunk("all", "stop", Usage(1, 1))
    handles = {"hosts": Handle(end), "small": Handle(end)}
    system = hosts(**handles)
    system.update(replace(CATALOG, pools={"hosts": ("sql",), "small": ("solo",)}))
    await ask(system, "solo", WHOLE)
    assert [len(handle.calls) for handle in handles.values()] == [0, 1]
    system.update(replace(CATALOG, pools={"hosts": ("sql", "solo"), "small": ()}))
    await ask(system, "solo", WHOLE)
    assert [len(handle.calls) for handle in handles.values()] == [1, 1]


async def test_weights_beyond_the_budget_of_one_pool_are_asked_of_another() -> None:
    board = Board()
    board.publish("hosts", [HostStatus("host")])
    board.publish("small", [HostStatus("little", load_s={"solo": 0.0})])
    end = Chunk("all", "stop", Usage(1, 1))
    system = hosts(board, hosts=Handle(end), small=Handle(BudgetExceeded("'solo@1' need 2 MiB, the budget is 1 MiB")))
    assert await ask(system, "solo", WHOLE) == "all"
    refusing = Handle(BudgetExceeded("no room"))
    with pytest.raises(BudgetExceeded, match="no room"):
        await ask(hosts(hosts=refusing), "solo", WHOLE)
    assert len(refusing.calls) == 1, "there is no other host"


async def test_a_death_before_the_first_text_is_retried_invisibly() -> None:
    handle = Handle(ActorDiedError(), Chunk("all", "stop", Usage(1, 1)), [ActorDiedError()], [Chunk("a"), END])
    system = hosts(hosts=handle)
    assert [await ask(system, "sql", WHOLE), await ask(system, "sql", STREAM)] == ["all", "a"]
    assert len(handle.calls) == 4


async def test_an_expert_that_moves_or_goes_while_it_is_called_is_retried_where_it_is_and_keeps_its_error() -> None:
    end = Chunk("all", "stop", Usage(1, 1))

    def after(catalog: Catalog, answer: Any) -> tuple[PoolClient, Handle]:
        class Moves(Handle):
            def options(self, **options: Any) -> Any:
                system.update(catalog)
                return super().options(**options)

        new = Handle(end)
        system = hosts(hosts=Moves(answer), small=new)
        system.update(replace(CATALOG, pools={"hosts": ("sql", "solo"), "small": ()}))
        return system, new

    moved = replace(CATALOG, generation=5, pools={"hosts": ("sql",), "small": ("solo",)})
    system, new = after(moved, ActorDiedError())
    assert await ask(system, "solo", WHOLE) == "all"
    assert new.calls == [("whole", "solo", "solo", 5)], "the new host is asked once it has the catalog of the move"
    only_sql = Snapshot(2, {spec.name: spec for spec in SPECS[:2]})
    gone = Catalog(5, only_sql, {}, "default", {"hosts": ("sql",), "small": ()})
    system, _ = after(gone, EngineError("out of order"))
    with pytest.raises(EngineError, match="out of order"):
        await ask(system, "solo", WHOLE)
    system, _ = after(gone, ActorDiedError())
    with pytest.raises(UnknownModel, match="solo"):
        await ask(system, "solo", WHOLE)


async def test_an_expert_is_called_where_a_host_with_a_newer_catalog_says_it_is() -> None:
    """That host has started after the expert left its pool, and this gateway has not got the catalog of that yet."""
    end = Chunk("all", "stop", Usage(1, 1))
    moved = NotServedHere("'solo' has moved", generation=6, pools=("small",))
    board = Board()
    board.publish("hosts", [HostStatus("restarted")])
    board.publish("small", [HostStatus("new")])
    old, new = Handle(moved, [moved]), Handle(end, [end])
    system = hosts(board, hosts=old, small=new)
    system.update(replace(CATALOG, pools={"hosts": ("sql", "solo"), "small": ()}))
    assert [await ask(system, "solo", WHOLE), await ask(system, "solo", STREAM)] == ["all", "all"]
    assert new.calls == [("whole", "solo", "solo", 6), ("stream", "solo", "solo", 6)], "by the newer catalog"
    assert len(old.calls) == 2


async def test_an_expert_that_no_host_is_found_for_is_an_error_to_retry_and_the_search_ends() -> None:
    late = NotServedHere("not yet", generation=3)
    asked = Handle(late)
    with pytest.raises(NotServedHere, match="not yet"):
        await ask(hosts(hosts=asked), "solo", WHOLE)
    assert len(asked.calls) == 1, "there is no other host"
    lost = NotServedHere("elsewhere", generation=6, pools=("hosts",))
    asked = Handle(*[lost] * ATTEMPTS)
    with pytest.raises(NotServedHere, match="elsewhere"):
        await ask(hosts(hosts=asked), "solo", WHOLE)
    assert len(asked.calls) == 2


async def test_a_death_after_the_first_text_ends_the_answer_with_an_error() -> None:
    handle = Handle([Chunk("half"), ActorDiedError()])
    seen = []
    with pytest.raises(HostLost, match="'sql' died"):
        async for chunk in hosts(hosts=handle).ask("sql", STREAM):
            seen.append(chunk.text)  # pieces before the error count  # noqa: PERF401
    assert seen == ["half"] and len(handle.calls) == 1


async def test_a_request_that_kills_every_host_is_given_up() -> None:
    handle = Handle(*[ActorDiedError() for _ in range(ATTEMPTS)])
    with pytest.raises(EngineError, match=f"{ATTEMPTS} processes died"):
        await ask(hosts(hosts=handle), "sql", WHOLE)


@pytest.mark.parametrize("error", [InvalidRequest("no"), EngineError("down")])
async def test_an_expert_s_own_error_is_passed_on_and_not_tried_again(error: Exception) -> None:
    handle = Handle(error, [error])
    system = hosts(hosts=handle)
    for request in (WHOLE, STREAM):
        with pytest.raises(type(error), match=str(error)):
            await ask(system, "solo", request)
    assert len(handle.calls) == 2


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (RayTaskError("f", "trace", ValueError("a bug")), EngineError),
        (BackPressureError(num_queued_requests=1, max_queued_requests=1), Overloaded),
        (ObjectLostError("00", None, ""), EngineError),
    ],
)
async def test_ray_s_own_errors_come_in_our_words(raised: Exception, expected: type[Exception]) -> None:
    with pytest.raises(expected, match="solo"):
        await ask(hosts(hosts=Handle([raised])), "solo", STREAM)


async def test_a_reader_that_stops_cancels_the_host() -> None:
    handle = Handle([Chunk("a"), Chunk("b"), END])
    async with aclosing(hosts(hosts=handle).ask("sql", STREAM)) as chunks:
        await anext(chunks)
    assert handle.streams[0].cancelled


async def test_an_unknown_expert_is_refused_here() -> None:
    with pytest.raises(UnknownModel, match="did you mean 'sql'"):
        await ask(hosts(hosts=Handle()), "sqll", WHOLE)


async def test_of_several_groups_the_one_with_the_best_host_is_asked() -> None:
    answer = Chunk("x", "stop", Usage(1, 1))
    now = 0.0
    board = Board(clock=lambda: now)
    board.publish("small", [HostStatus("s", load_s={"solo": 0.0})])
    board.publish("big", [HostStatus("b", load_s={"solo": 2.0, "base": 5.0})])
    small, big = Handle(answer, answer), Handle(answer)
    system = hosts(board, small=small, big=big)
    await ask(system, "solo", WHOLE)
    await ask(system, "sql", WHOLE)
    assert [call[2] for call in small.calls] == ["solo"] and [call[2] for call in big.calls] == ["sql"]
    assert system.load_s()["base"] == 0.0, "loading, as far as is known until the next report"
    now = HEARD_S + 0.1
    assert system.load_s() == {"base": 5.0, "sql": 5.0, "solo": 0.0}
    assert await system.states() == [{"method": "state"}] * 2


async def test_the_longest_wait_is_that_of_the_expert_whose_best_host_has_the_longest_queue() -> None:
    board = Board()
    system = hosts(board, big=Handle())
    assert system.longest_wait_s() == 0.0
    board.publish("big", [HostStatus("a", queue_s={"solo": 9.0, "base": 3.0}), HostStatus("b", queue_s={"base": 2.0})])
    assert system.longest_wait_s() == 2.0, "b has no queue for `solo`"


async def test_before_any_host_status_the_first_pool_is_called() -> None:
    first, second = Handle(Chunk("x", "stop", Usage(1, 1))), Handle()
    assert await ask(hosts(big=first, other=second), "solo", WHOLE) == "x"
    assert hosts(big=first).load_s()["solo"] == 0.0


async def test_an_error_about_the_process_is_retried_on_each_other_host_and_then_passed_on() -> None:
    board = Board(clock=lambda: 0.0)
    board.publish("hosts", [HostStatus(name, load_s={"solo": 0.0}) for name in ("a", "b")])
    full, answer = Overloaded("too many requests are waiting"), Chunk("x", "stop", Usage(1, 1))
    handle = Handle(full, answer, full, full)
    system = hosts(board, hosts=handle)
    assert await ask(system, "solo", WHOLE) == "x" and len(handle.calls) == 2
    with pytest.raises(Overloaded, match="are waiting"):
        await ask(system, "solo", WHOLE)
    assert len(handle.calls) == 4, "each host once"
    begun = Handle([Chunk("half"), full])
    with pytest.raises(Overloaded):
        await ask(hosts(board, hosts=begun), "solo", STREAM)
    assert len(begun.calls) == 1


class LinkedHost:
    """A substitute for a link: pieces, call by call, or an exception to raise."""

    def __init__(self, *answers: Any) -> None:
        self.answers, self.asked, self.closed = list(answers), [], 0  # type: ignore[var-annotated]

    async def ask(self, expert: str, request: GenerateRequest, generation: int, call: str) -> AsyncIterator[Any]:
        self.asked.append((expert, request.stream, generation, call))
        try:
            for piece in self.answers.pop(0):
                if isinstance(piece, Exception) and not isinstance(piece, CoeError):
                    raise piece
                await asyncio.sleep(0)
                yield piece
        finally:
            self.closed += 1


def linked(link: LinkedHost, handle: Handle, address: str = "/run/a.sock") -> tuple[PoolClient, Board]:
    """A client with one host, which has a link under its address."""
    board = Board()
    board.publish("hosts", [HostStatus("a", address=address)])
    pools = {"hosts": HostPoolConfig(name="hosts")}
    links = type("Links", (), {"to": staticmethod(lambda where: link if where == "/run/a.sock" else None)})
    return PoolClient({"hosts": handle}, pools, board, CATALOG, links()), board  # type: ignore[arg-type]


async def test_a_host_with_a_link_is_called_over_it_and_counted_there() -> None:
    link, handle = LinkedHost([Chunk("all", "stop", Usage(1, 1))], [Chunk("a"), Chunk("b"), END]), Handle()
    system, board = linked(link, handle)
    assert [await ask(system, "sql", WHOLE), await ask(system, "solo", STREAM)] == ["all", "ab"]
    assert [asked[:3] for asked in link.asked] == [("sql", False, 4), ("solo", True, 4)] and handle.calls == []
    assert link.asked[0][3].startswith(board.origin) and board.in_use("hosts") == set()


async def test_a_host_without_a_link_is_called_through_its_handle() -> None:
    link, handle = LinkedHost(), Handle(Chunk("all", "stop", Usage(1, 1)))
    system, _ = linked(link, handle, address="/run/of-another-machine.sock")
    assert await ask(system, "sql", WHOLE) == "all" and link.asked == []


async def test_a_lost_link_is_a_dead_host() -> None:
    link = LinkedHost([LinkLost("gone")], [Chunk("a"), END], [Chunk("half"), LinkLost("gone")])
    system, _ = linked(link, Handle())
    assert await ask(system, "solo", STREAM) == "a", "retried before the first text"
    with pytest.raises(HostLost, match="died; retry the request"):
        await ask(system, "solo", STREAM)
    assert link.closed == 3


async def test_errors_over_a_link_are_those_of_the_host() -> None:
    link = LinkedHost([InvalidRequest("no")], [Broken("ZeroDivisionError: a bug")])
    system, _ = linked(link, Handle())
    with pytest.raises(InvalidRequest, match="no"):
        await ask(system, "solo", STREAM)
    with pytest.raises(EngineError, match="the host of 'solo' failed: ZeroDivisionError: a bug"):
        await ask(system, "solo", STREAM)


async def test_a_host_that_falls_silent_loses_its_calls_over_links_too() -> None:
    link = LinkedHost()

    async def never(*_: Any) -> AsyncIterator[Any]:
        yield Chunk("half")
        await asyncio.Event().wait()

    link.ask = never  # type: ignore[method-assign]
    system, board = linked(link, Handle())
    answer = system.ask("solo", STREAM)
    assert await anext(answer) == Chunk("half")
    asyncio.get_running_loop().call_later(0.01, board.lose, "a")
    with pytest.raises(HostLost, match="does not respond"):
        await asyncio.wait_for(anext(answer), 10)


async def test_a_client_that_leaves_closes_its_call_over_a_link() -> None:
    link = LinkedHost([Chunk("a"), Chunk("b"), END])
    system, board = linked(link, Handle())
    async with aclosing(system.ask("solo", STREAM)) as answer:
        await anext(answer)
    assert link.closed == 1 and board.in_use("hosts") == set()


async def test_loads_and_unloads_reach_every_host_of_the_pools_that_serve_the_experts() -> None:
    large, small = Handle({"pool": "hosts", "loaded": ("base", "solo")}), Handle({"pool": "small", "loaded": ("solo",)})
    system = hosts(hosts=large, small=small)
    assert await system.load("sql", "solo") == [*large.answers, *small.answers]
    assert await system.unload("sql", wait_s=3.0) == large.answers
    assert large.calls == [("load", ("sql", "solo"), 4), ("unload", ("sql",), 3.0, 4)]
    assert small.calls == [("load", ("solo",), 4)]


async def test_the_error_of_a_host_is_raised_and_a_host_that_died_has_no_part() -> None:
    loaded = {"pool": "hosts", "loaded": ("base",)}
    assert await hosts(hosts=Handle(loaded, ActorDiedError())).load("base") == [loaded]
    with pytest.raises(BudgetExceeded, match="no room"):
        await hosts(hosts=Handle(loaded, BudgetExceeded("no room"))).load("base")
    with pytest.raises(EngineError, match="no expert host responds"):
        await hosts(hosts=Handle(ActorDiedError())).load("base")
    with pytest.raises(EngineError, match="a host failed to unload base: boom"):
        await hosts(hosts=Handle(RayTaskError("f", "traceback", ValueError("boom")))).unload("base", wait_s=0.0)


async def test_residence_is_read_from_the_latest_reports_of_the_hosts_that_serve_an_expert() -> None:
    board = Board()
    weights = {"base": {"state": "resident", "size_bytes": 5, "unload_in_s": 8.0}}
    board.publish("hosts", [HostStatus.of("h", {"tight": [], "weights": weights}), HostStatus("new")])
    board.publish(
        "small", [HostStatus("s", weights={"solo": {"state": "loading", "size_bytes": 2, "unload_in_s": None}})]
    )
    residence = hosts(board, hosts=Handle(), small=Handle()).residence()
    counts = {"all": 2, "resident": 1, "loading": 0}
    assert residence["sql"] == {"state": "resident", "size_bytes": 5, "unload_in_s": 8.0, "hosts": counts}
    assert residence["solo"]["state"] == "loading" and residence["solo"]["hosts"]["all"] == 3
