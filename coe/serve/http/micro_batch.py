"""Micro-batched routing on one worker thread: while it works, requests queue; then it routes all of them at once.

There is no timer: a lone request is routed at once, and batches grow under load. Queries that route faster than a
thread hand-over (no encoder, or a static one) are routed on the event loop.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final, Protocol

from coe.errors import CoeError
from coe.protocol.errors import FieldProblem, InvalidFields
from coe.routing import Routed
from routers.base import Query
from routers.errors import NoEligibleExpert, RouterError

QUICK_S: Final = 0.001
"""Mean CPU seconds per query below which routing runs on the event loop."""
WAITS_S: Final = 0.1
"""Seconds without CPU time that mark a router as waiting for something, such as the expert of its keywords. Such a
router never runs on the event loop, however quick most queries are."""
_MOST_KEYS: Final = 1000
RECENT: Final = 0.3
"""Weight of the latest batch in the running mean of seconds per query."""


class Routes(Protocol):
    """Routes a batch: `coe.orchestrator.Orchestrator`."""

    def route_each(self, queries: Sequence[Query], model: str) -> list[Routed | RouterError | CoeError]:
        """The decision or the error of each query."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    routes: Routes
    query: Query
    model: str
    routed: asyncio.Future[Routed] = field(repr=False)


class MicroBatch:
    """Routes queries on one worker thread. Use inside one event loop."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="router")
        self._waiting: list[_Waiting] = []
        self._query_s: dict[tuple[int, str], float] = {}
        self._work: asyncio.Task[None] | None = None

    async def route(self, routes: Routes, query: Query, model: str, *, long: bool = False) -> Routed:
        """The decision for one query.

        Args:
            long: routing may have to count the tokens of the query, so it does not run on the event loop.

        Raises:
            CoeError, RouterError: no expert may answer the query. Other queries of the batch are unaffected.
        """
        one = _Waiting(routes, query, model, asyncio.get_running_loop().create_future())
        if not long and self._query_s.get((id(routes), model), QUICK_S) < QUICK_S:
            outcome = self._at_once(one)
            if isinstance(outcome, Routed):
                return outcome
            raise outcome
        self._waiting.append(one)
        if self._work is None or self._work.done():
            self._work = asyncio.create_task(self._route_all())
        return await one.routed

    def close(self) -> None:
        """End the thread after its current batch. Queued and later queries get an error."""
        self._thread.shutdown(wait=False)

    async def _route_all(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch = [one for one in self._waiting if not one.routed.done()]  # skip requests whose client left
            self._waiting = []
            try:
                outcomes = await loop.run_in_executor(self._thread, self._timed, batch)
            except RuntimeError as error:  # closed
                outcomes = [CoeError(f"routing is closed: {error}") for _ in batch]
            for one, outcome in zip(batch, outcomes, strict=True):
                if one.routed.done():
                    continue
                if isinstance(outcome, Routed):
                    one.routed.set_result(outcome)
                else:
                    one.routed.set_exception(outcome)

    def _at_once(self, one: _Waiting) -> Routed | Exception:
        """The outcome of a query on this thread.

        A look at the CPU time costs more than a quick query. Elapsed time bounds it: where that is long, the next query
        is measured on the worker thread, or all are if it may have waited.
        """
        began = time.perf_counter()
        [outcome] = _route_groups([one])
        took_s = time.perf_counter() - began
        if took_s >= QUICK_S:
            self._query_s[id(one.routes), one.model] = math.inf if took_s >= WAITS_S else QUICK_S
        return outcome

    def _timed(self, batch: Sequence[_Waiting]) -> list[Routed | Exception]:
        """The outcomes of a batch. Updates the mean seconds per query if the whole batch has one policy and model."""
        started, began = time.thread_time(), time.perf_counter()
        outcomes = _route_groups(batch)
        keys = {(id(one.routes), one.model) for one in batch}
        if len(keys) == 1:
            [key] = keys
            busy_s = time.thread_time() - started
            waited_s = time.perf_counter() - began - busy_s
            query_s = busy_s / len(batch) if waited_s < WAITS_S else math.inf
            before = self._query_s.get(key, query_s)
            if len(self._query_s) > _MOST_KEYS:  # replaced policies, unknown names
                self._query_s.clear()
            self._query_s[key] = before + RECENT * (query_s - before)
        return outcomes


def _route_groups(batch: Sequence[_Waiting]) -> list[Routed | Exception]:
    """Outcomes in order; queries of the same policies and `model` are routed together."""
    groups: dict[tuple[int, str], list[int]] = {}
    for i, one in enumerate(batch):
        groups.setdefault((id(one.routes), one.model), []).append(i)
    outcomes: dict[int, Routed | Exception] = {}
    for rows in groups.values():
        first = batch[rows[0]]
        outcomes.update(zip(rows, _route(first.routes, [batch[i].query for i in rows], first.model), strict=True))
    return [outcomes[i] for i in range(len(batch))]


def _route(routes: Routes, queries: list[Query], model: str) -> list[Routed | Exception]:
    """The outcome of each query. If a query breaks the batch, each is routed alone, so only that one fails."""
    try:
        outcomes = routes.route_each(queries, model)
    except Exception as error:
        if len(queries) > 1:
            return [outcome for query in queries for outcome in _route(routes, [query], model)]
        return [error]
    return [_blamed(query, outcome) for query, outcome in zip(queries, outcomes, strict=True)]


def _blamed(query: Query, outcome: Routed | Exception) -> Routed | Exception:
    """Report a router's refusal of the request's own `cost_weight` as a client error."""
    if query.cost_weight and isinstance(outcome, RouterError) and not isinstance(outcome, NoEligibleExpert):
        return InvalidFields(FieldProblem("coe.cost_weight", "unsupported_value", str(outcome)))
    return outcome
