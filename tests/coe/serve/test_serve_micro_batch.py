"""Routing in micro-batches: waiting queries are routed together, and an error affects only its own query."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence

import pytest

from coe.compose import Single
from coe.errors import CoeError, InvalidRequest, UnknownModel
from coe.routing import Routed
from coe.serve.http.micro_batch import MicroBatch
from routers.base import Query, RoutingDecision
from routers.errors import NoEligibleExpert, RouterError


class Gate:
    """Routes each query to the expert that its text names, once the gate is open; records every batch."""

    def __init__(self, *, open: bool = True) -> None:  # noqa: A002
        self.batches: list[tuple[str, list[str]]] = []
        self.threads: set[threading.Thread] = set()
        self.gate, self.entered = threading.Event(), threading.Event()
        if open:
            self.gate.set()

    def route_each(self, queries: Sequence[Query], model: str) -> list[Routed | RouterError | CoeError]:
        self.entered.set()
        assert self.gate.wait(5)
        self.threads.add(threading.current_thread())
        self.batches.append((model, [query.text for query in queries]))
        if model == "nobody":
            raise UnknownModel("'nobody' is not there")
        if any(query.text == "poison" for query in queries):
            raise ZeroDivisionError("the router breaks")
        return [self.outcome(query) for query in queries]

    def outcome(self, query: Query) -> Routed | RouterError | CoeError:
        if query.text.startswith("refuse"):
            return (
                NoEligibleExpert(query.text) if "cost weight" not in query.text else RouterError("no costs are known")
            )
        return Routed(query, RoutingDecision((query.text,), (1.0,), (1.0,), 1.0), None, None, Single())


@pytest.fixture(autouse=True)
def no_router_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Routing takes no time in these tests, but they are about routers that take some."""
    monkeypatch.setattr("coe.serve.http.micro_batch.QUICK_S", 0.0)


async def route(batch: MicroBatch, gate: Gate, text: str, model: str = "auto", cost_weight: float | None = None) -> str:
    return (await batch.route(gate, Query.of(text, cost_weight=cost_weight), model)).decision.experts[0]


async def held(gate: Gate, batch: MicroBatch) -> asyncio.Task[str]:
    """A query that keeps the thread busy."""
    task = asyncio.create_task(route(batch, gate, "first"))
    await asyncio.to_thread(gate.entered.wait, 5)
    return task


async def test_what_comes_while_the_thread_works_is_routed_together_by_model() -> None:
    gate, batch = Gate(open=False), MicroBatch()
    first = await held(gate, batch)
    names = [("a", "auto"), ("b", "coe/x"), ("c", "auto"), ("d", "coe/x"), ("e", "auto")]
    tasks = [asyncio.create_task(route(batch, gate, *name)) for name in names]
    await asyncio.sleep(0.01)
    gate.gate.set()
    assert await asyncio.gather(first, *tasks) == ["first", "a", "b", "c", "d", "e"]
    assert gate.batches == [("auto", ["first"]), ("auto", ["a", "c", "e"]), ("coe/x", ["b", "d"])]
    assert len(gate.threads) == 1 and threading.current_thread() not in gate.threads
    batch.close()


async def test_each_query_is_routed_by_the_policies_it_came_with() -> None:
    old, new, batch = Gate(open=False), Gate(), MicroBatch()
    first = await held(old, batch)
    tasks = [asyncio.create_task(route(batch, gate, name)) for gate, name in ((old, "a"), (new, "b"))]
    await asyncio.sleep(0.01)
    old.gate.set()
    await asyncio.gather(first, *tasks)
    assert old.batches == [("auto", ["first"]), ("auto", ["a"])] and new.batches == [("auto", ["b"])]
    batch.close()


async def test_an_error_reaches_its_own_caller_only() -> None:
    gate, batch = Gate(open=False), MicroBatch()
    first = await held(gate, batch)
    tasks = [
        asyncio.create_task(route(batch, gate, *name))
        for name in (("a",), ("refuse",), ("poison",), ("b",), ("c", "nobody"))
    ]
    await asyncio.sleep(0.01)
    gate.gate.set()
    await first
    a, refused, poison, b, unknown = await asyncio.gather(*tasks, return_exceptions=True)
    assert (a, b) == ("a", "b")
    assert isinstance(refused, NoEligibleExpert) and isinstance(poison, ZeroDivisionError)
    assert isinstance(unknown, UnknownModel)
    assert await route(batch, gate, "after") == "after"
    batch.close()


async def test_a_cost_weight_that_the_router_cannot_take_is_the_callers_error() -> None:
    gate, batch = Gate(), MicroBatch()
    with pytest.raises(InvalidRequest, match=r"coe.cost_weight: no costs are known"):
        await route(batch, gate, "refuse cost weight", cost_weight=2.0)
    with pytest.raises(RouterError, match="no costs are known"):
        await route(batch, gate, "refuse cost weight")
    with pytest.raises(NoEligibleExpert):
        await route(batch, gate, "refuse", cost_weight=2.0)
    batch.close()


async def test_a_caller_that_leaves_is_not_routed_and_disturbs_no_other() -> None:
    gate, batch = Gate(open=False), MicroBatch()
    first = await held(gate, batch)
    leaving, staying = (asyncio.create_task(route(batch, gate, name)) for name in ("leaving", "staying"))
    await asyncio.sleep(0.01)
    leaving.cancel()
    first.cancel()  # while the thread works on it
    await asyncio.sleep(0)
    gate.gate.set()
    assert await staying == "staying"
    assert gate.batches == [("auto", ["first"]), ("auto", ["staying"])]
    assert (await asyncio.gather(first, leaving, return_exceptions=True))[0].__class__ is asyncio.CancelledError
    batch.close()


async def test_closing_ends_the_thread_after_its_work_and_leaves_no_caller_waiting() -> None:
    gate, batch = Gate(open=False), MicroBatch()
    first = await held(gate, batch)
    waiting = asyncio.create_task(route(batch, gate, "waiting"))
    await asyncio.sleep(0.01)
    batch.close()
    gate.gate.set()
    assert await first == "first"
    with pytest.raises(CoeError, match="routing is closed"):
        await waiting
    with pytest.raises(CoeError, match="routing is closed"):
        await route(batch, gate, "late")
    batch.close()
    [thread] = gate.threads
    await asyncio.to_thread(thread.join, 5)
    assert not thread.is_alive()


async def test_a_router_that_takes_no_time_stays_on_its_caller_s_thread_once_that_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("coe.serve.http.micro_batch.QUICK_S", 10.0)
    gate, batch = Gate(), MicroBatch()
    assert [await route(batch, gate, text) for text in "abc"] == ["a", "b", "c"]
    assert threading.current_thread() in gate.threads and len(gate.threads) == 2  # the first one was measured
    with pytest.raises(NoEligibleExpert, match="refuse"):
        await route(batch, gate, "refuse")
    assert gate.batches == [("auto", [text]) for text in ("a", "b", "c", "refuse")]
    batch.close()


async def test_a_router_that_becomes_slow_goes_back_to_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coe.serve.http.micro_batch.QUICK_S", 0.02)

    class Slow(Gate):
        busy = False

        def route_each(self, queries: Sequence[Query], model: str) -> list[Routed | RouterError | CoeError]:
            if self.busy:
                sum(range(8_000_000))
            return super().route_each(queries, model)

    gate, batch = Slow(), MicroBatch()
    await route(batch, gate, "a")
    gate.busy = True
    await route(batch, gate, "b")  # on this thread, and too long
    gate.threads.clear()
    await route(batch, gate, "c")
    assert threading.current_thread() not in gate.threads
    batch.close()


async def test_names_that_come_and_go_are_not_kept_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coe.serve.http.micro_batch._MOST_KEYS", 3)
    gate, batch = Gate(), MicroBatch()
    for i in range(10):
        await route(batch, gate, "a", model=f"m{i}")
    assert len(batch._query_s) <= 4
    batch.close()


async def test_a_router_that_once_waited_stays_on_its_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting takes no CPU time, but the event loop must not wait."""
    monkeypatch.setattr("coe.serve.http.micro_batch.QUICK_S", 0.02)

    class Waits(Gate):
        def route_each(self, queries: Sequence[Query], model: str) -> list[Routed | RouterError | CoeError]:
            if queries[0].text == "unknown":
                time.sleep(0.15)
            return super().route_each(queries, model)

    gate, batch = Waits(), MicroBatch()
    for text in ["unknown", *["known"] * 30, "unknown"]:
        await route(batch, gate, text)
    assert threading.current_thread() not in gate.threads
    batch.close()
    gate, batch = Waits(), MicroBatch()
    for text in ["known", "known", "unknown"]:
        await route(batch, gate, text)
    assert threading.current_thread() in gate.threads, "until it waited"
    gate.threads.clear()
    for text in ["known"] * 30:
        await route(batch, gate, text)
    assert threading.current_thread() not in gate.threads
    batch.close()


async def test_a_pause_of_the_event_loop_costs_its_router_one_measurement_on_the_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Elapsed time can be long although the router is quick: the process did not run."""
    monkeypatch.setattr("coe.serve.http.micro_batch.QUICK_S", 0.02)

    class Paused(Gate):
        def route_each(self, queries: Sequence[Query], model: str) -> list[Routed | RouterError | CoeError]:
            if queries[0].text == "paused":
                time.sleep(0.03)
            return super().route_each(queries, model)

    gate, batch = Paused(), MicroBatch()
    for text in ["a", "paused"]:
        await route(batch, gate, text)
    gate.threads.clear()
    await route(batch, gate, "b")
    assert threading.current_thread() not in gate.threads
    for text in "cd":
        await route(batch, gate, text)
    assert threading.current_thread() in gate.threads
    batch.close()
