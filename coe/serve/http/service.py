"""Service: a request's path through a gateway, without HTTP: admission, deadline, routing, answer, log and metrics.

async with service.call("/v1/chat/completions") as call:        # logged at the end
    parsed = await service.accept(call, body, parse_chat)        # counts as in flight from here to the end
    routed = await service.route(call, parsed)
    async with aclosing(service.answer(call, parsed)) as chunks: ...
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol
from uuid import uuid4

from coe.config import ServeConfig
from coe.errors import CoeError, DeadlineExceeded, InvalidRequest, Overloaded
from coe.orchestrator import Orchestrator, Reply
from coe.protocol.errors import error_body, is_internal
from coe.protocol.requests import Parsed
from coe.routing import Routed
from coe.seam import text_of
from coe.serve.http.finished import Finished
from coe.serve.http.large_bodies import LargeBodies
from coe.serve.http.micro_batch import MicroBatch
from coe.serve.http.uploads import Uploads
from coe.types import Chunk

CANCELLED = "cancelled"
CLIENT_GONE = 499
"""Logged status of a request whose client disconnected before any status was sent."""
RECENT = 0.1
"""Weight of the latest request in the running mean of seconds per request."""
HEALTH_S = 5.0
"""Seconds the expert hosts have to report their state."""
logger = logging.getLogger(__name__)


class Log(Protocol):
    """Records decisions."""

    def write(self, finished: Finished) -> None:
        """Record a finished request. Must not block."""
        ...


class Metrics(Protocol):
    """Counts requests."""

    def observe(self, finished: Finished) -> None:
        """Count a finished request."""
        ...

    def render(self) -> Awaitable[tuple[bytes, str]]:
        """The Prometheus page, and its content type."""
        ...


class Full(Overloaded):
    """This process has `max_in_flight` requests; `retry_after_s` is the expected time until one ends."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[type[Full], tuple[str, float]]:
        return Full, (str(self), self.retry_after_s or 0.0)


@dataclass(slots=True)
class Call:
    """A request in progress; it becomes a `Finished`.

    Attributes:
        orchestrator: the one current at arrival; later changes of experts or policies do not affect this request.
        admitted: whether the request counts as in flight.
        status: HTTP status sent; 0 before.
        error: error code, if any.
    """

    id: str
    endpoint: str
    orchestrator: Orchestrator
    started_at: float
    started: float
    clock: Callable[[], float] = field(repr=False)
    ends: asyncio.Timeout = field(repr=False)
    deadline_s: float
    admitted: bool = False
    parsed: Parsed | None = None
    routed: Routed | None = None
    reply: Reply | None = None
    status: int = 0
    error: str | None = None
    route_s: float | None = None
    first_s: float | None = None

    @property
    def elapsed_s(self) -> float:
        """Seconds since arrival."""
        return self.clock() - self.started

    def failed(self, error: BaseException) -> tuple[int, dict[str, Any]]:
        """Record an error. Returns its HTTP status and OpenAI's body."""
        status, body = error_response(error, self.id, self.endpoint)
        self.error = body["error"]["code"]
        return status, body

    def finished(self) -> Finished:
        """The record for log and metrics."""
        parsed, reply = self.parsed, self.reply
        return Finished(
            id=self.id,
            endpoint=self.endpoint,
            model=parsed.model if parsed else "",
            routed=self.routed,
            expert=reply.expert if reply else None,
            answer=reply.answer if reply else None,
            error=self.error,
            status=self.status or CLIENT_GONE,
            streamed=parsed is not None and parsed.stream,
            seed=parsed.request.seed if parsed else None,
            registry_version=self.orchestrator.snapshot.version,
            started_at=self.started_at,
            route_s=self.route_s,
            first_s=self.first_s,
            total_s=self.elapsed_s,
            done=reply.done if reply else {},
        )


class Service:
    """Admits, routes and answers requests. Use inside one event loop.

    Args:
        settings: `deadline_s` and `max_in_flight` are enforced here, limits of a body by `uploads`, hosts and origins
            by the API.
        health: returns the state of every expert host; None if experts run in this process.
        clock: monotonic seconds; wall: seconds since the epoch.
    """

    def __init__(
        self,
        orchestrator: Orchestrator,
        *,
        settings: ServeConfig,
        log: Log | None = None,
        metrics: Metrics | None = None,
        health: Callable[[], Awaitable[Sequence[Mapping[str, Any]]]] | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.orchestrator, self.settings, self.metrics = orchestrator, settings, metrics
        self.started_at = int(wall())
        self.uploads = Uploads(settings)
        self._large = LargeBodies(settings.max_uploads_bytes)
        self.in_flight = 0
        self.warnings: tuple[str, ...] = ()
        self._log, self._health, self._clock, self._wall = log, health, clock, wall
        self._batch = MicroBatch()
        self._mean_s = 0.0

    def update(self, orchestrator: Orchestrator) -> None:
        """Use another orchestrator for new requests; requests in progress keep theirs."""
        self.orchestrator = orchestrator

    def close(self) -> None:
        """End the routing thread."""
        self._batch.close()

    @asynccontextmanager
    async def call(self, endpoint: str) -> AsyncIterator[Call]:
        """A request, from arrival until its answer is sent. Log and metrics record it however it ends."""
        deadline_s = self.settings.deadline_s
        call = Call(
            id=uuid4().hex,
            endpoint=endpoint,
            orchestrator=self.orchestrator,
            started_at=self._wall(),
            started=self._clock(),
            clock=self._clock,
            ends=asyncio.timeout(deadline_s),
            deadline_s=deadline_s,
        )
        try:
            yield call
        except BaseException:
            call.error = call.error or CANCELLED  # only a client disconnect gets here
            raise
        finally:
            self.in_flight -= call.admitted
            self._tell(call.finished())

    @asynccontextmanager
    async def within_deadline(self, call: Call) -> AsyncIterator[None]:
        """Bound the block by the deadline of the service or of the request, whichever is earlier.

        Raises:
            DeadlineExceeded: the deadline passed.
        """
        try:
            async with call.ends:
                yield
        except TimeoutError as error:
            if not call.ends.expired():
                raise
            raise DeadlineExceeded(f"the request did not finish within {call.deadline_s:g} s") from error

    def admit(self, call: Call) -> None:
        """Count a call as in flight until it ends. Its body is read and parsed by then, so slow clients take no place.

        Raises:
            Overloaded: too many are in flight; with the expected time until one ends.
        """
        most = self.settings.max_in_flight
        if self.in_flight >= most:
            raise Full(
                f"{most} requests are in flight already (serve.max_in_flight); try again later", self._mean_s / most
            )
        call.admitted = True
        self.in_flight += 1

    async def accept(self, call: Call, body: bytes, parse: Callable[[object], Parsed]) -> Parsed:
        """Parse the body of a call, then admit the call.

        Raises:
            InvalidRequest: `parse` refuses the body, it is not JSON within the bounds, or it names unknown experts.
            Overloaded: as `admit`, or too many large bodies are waiting.
        """

        def known(value: object) -> Parsed:
            call.parsed = parse(value)
            if call.parsed.size > 1:
                raise InvalidRequest(
                    "several answers to one request are not supported yet: leave out n, send one prompt"
                )
            call.parsed.query_among(call.orchestrator.snapshot.experts)  # names take time too: there may be thousands
            return call.parsed

        parsed = await self._large.parse(body, known)
        self.admit(call)
        return parsed

    async def route(self, call: Call, parsed: Parsed) -> Routed:
        """The routing decision. No expert is called.

        Raises:
            InvalidRequest, NoEligibleExpert: no expert may answer; the message says why.
        """
        call.parsed = parsed
        self._shorten(call, parsed.request.deadline_s)
        query = parsed.query_among(call.orchestrator.snapshot.experts)
        long = call.orchestrator.may_count(query)
        call.routed = await self._batch.route(call.orchestrator, query, parsed.model, long=long)
        call.route_s = call.elapsed_s
        return call.routed

    async def answer(self, call: Call, parsed: Parsed) -> AsyncGenerator[Chunk, None]:
        """Route and answer. `call.reply.expert` is set from the first chunk on, `call.reply.answer` after the last."""
        routed = await self.route(call, parsed)
        left_s = max(call.deadline_s - call.elapsed_s, 1e-3)
        call.reply = call.orchestrator.reply(replace(parsed.request, deadline_s=left_s, id=call.id), routed)
        async with aclosing(call.reply.chunks) as chunks:
            async for chunk in chunks:
                if call.first_s is None:
                    call.first_s = call.elapsed_s
                yield chunk

    async def health(self) -> tuple[bool, dict[str, Any]]:
        """Whether requests can be answered now, and the body of `/health`."""
        orchestrator = self.orchestrator
        about: dict[str, Any] = {
            "registry_version": orchestrator.snapshot.version,
            "experts": len(orchestrator.snapshot),
            "policies": sorted(orchestrator.policies),
            "in_flight": self.in_flight,
        } | ({"warnings": list(self.warnings)} if self.warnings else {})
        problem = None if orchestrator.snapshot.experts else "no experts are registered"
        if self._health is not None:
            try:
                about["hosts"] = list(await asyncio.wait_for(self._health(), HEALTH_S))
                problem = problem or (None if about["hosts"] else "no expert host is running")
            except Exception as error:
                logger.warning("the expert hosts do not respond", exc_info=error)
                problem = "the expert hosts do not respond"
        return problem is None, {"status": "ok" if problem is None else "unavailable", "problem": problem, **about}

    def _shorten(self, call: Call, deadline_s: float | None) -> None:
        """Apply the request's own deadline: it counts from arrival and never exceeds that of the service."""
        if deadline_s is None or deadline_s >= call.deadline_s:
            return
        call.deadline_s = deadline_s
        call.ends.reschedule(asyncio.get_running_loop().time() + max(deadline_s - call.elapsed_s, 0.0))

    def _tell(self, finished: Finished) -> None:
        if finished.answer is not None:
            self._mean_s += RECENT * (finished.total_s - self._mean_s)
        with _only_logged("the decision log"):
            if self._log is not None:
                self._log.write(finished)
        with _only_logged("the metrics"):
            if self.metrics is not None:
                self.metrics.observe(finished)


def error_response(error: BaseException, id: str, endpoint: str) -> tuple[int, dict[str, Any]]:  # noqa: A002
    """HTTP status and OpenAI's body of an error. Details of an internal error are logged under `id`, not sent."""
    if isinstance(error, CoeError) and error.public is not None:  # its traceback is in the log of where it was raised
        logger.warning("request %s to %s failed: %s", id, endpoint, text_of(error))
    elif is_internal(error):
        logger.error("request %s to %s failed", id, endpoint, exc_info=error)
    return error_body(error, logged_as=id)


@contextmanager
def _only_logged(what: str) -> Iterator[None]:
    """A failure of the log or the metrics must not fail the request."""
    try:
        yield
    except Exception:
        logger.exception("%s failed to record a finished request", what)
