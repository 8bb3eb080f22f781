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
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any, Protocol
from uuid import uuid4

from coe.config import ServeConfig
from coe.errors import DeadlineExceeded, InvalidRequest
from coe.orchestrator import Orchestrator
from coe.protocol.parsed import Parsed
from coe.routing import Routed
from coe.serve.http import access_log
from coe.serve.http.amounts import expected, spent
from coe.serve.http.batch_store import Batches
from coe.serve.http.brownout import Brownout
from coe.serve.http.call import CANCELLED, Call
from coe.serve.http.changes import Drains, ExpertChanges
from coe.serve.http.choices import interleaved
from coe.serve.http.finished import Finished
from coe.serve.http.keyring import Keyring
from coe.serve.http.large_bodies import LargeBodies
from coe.serve.http.ledger import Ledger
from coe.serve.http.micro_batch import MicroBatch
from coe.serve.http.recent import RecentDecisions
from coe.serve.http.refusals import Full
from coe.serve.http.request_spans import origin_of
from coe.serve.http.request_spans import routing as spanned_routing
from coe.serve.http.retry_after import RetryAfter
from coe.serve.http.uploads import Uploads
from coe.telemetry.json_logs import writes_json
from coe.telemetry.origin import Handled, bind
from coe.types import Chunk
from registry.usage import Amounts
from routers.errors import NoEligibleExpert

GRACE_S = 60.0
"""Seconds after the deadline of a request for which its reservation holds."""
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


class Weights(Protocol):
    """The weights of experts in the memory of the hosts."""

    def residence(self) -> Mapping[str, Mapping[str, Any]]:
        """Whether each expert is in memory (`coe.protocol.residence`), at once."""
        ...

    async def load(self, *names: str) -> Sequence[Mapping[str, Any]]:
        """Load experts; what each host says."""
        ...

    async def unload(self, *names: str, wait_s: float) -> Sequence[Mapping[str, Any]]:
        """Unload experts; what each host says."""
        ...

    async def states(self) -> Sequence[Mapping[str, Any]]:
        """The state of every host, with its `weights`."""
        ...


class Service:
    """Admits, routes and answers requests. Use inside one event loop.

    Args:
        settings: `deadline_s` and `max_in_flight` are enforced here, limits of a body by `uploads`, hosts and origins
            by the API.
        health: returns the state of every expert host; None if experts run in this process.
        weights: those of the hosts, for `/v1/models` and admin calls; None: nothing is known of them.
        changes: of the experts, for admin calls; None: they cannot be changed here.
        wait_s: the longest predicted wait of a new request for any expert.
        keyring: the API keys; None: there are none. ledger: their limits; None: there are none.
        batches: files and batches; None: they are off.
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
        weights: Weights | None = None,
        changes: ExpertChanges | None = None,
        keyring: Keyring | None = None,
        ledger: Ledger | None = None,
        wait_s: Callable[[], float] = float,
        recent: RecentDecisions | None = None,
        batches: Batches | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.orchestrator, self.settings, self.metrics, self.weights = orchestrator, settings, metrics, weights
        self.changes = changes
        self._calls: dict[str, Call] = {}
        self._drains = Drains(clock)
        self.keyring = Keyring() if keyring is None else keyring
        self.recent = RecentDecisions() if recent is None else recent
        self._ledger, self.batches = ledger, batches
        self.started_at = int(wall())
        self.uploads = Uploads(settings)
        self._large = LargeBodies(settings.max_uploads_bytes)
        self.in_flight = 0
        self.warnings: tuple[str, ...] = ()
        self._log, self._health, self._clock, self._wall = log, health, clock, wall
        self._batch = MicroBatch()
        self._retry = RetryAfter(settings.max_in_flight)
        self.brownout = Brownout(settings.brownout, wait_s=wait_s, clock=clock)

    def update(self, orchestrator: Orchestrator) -> None:
        """Use another orchestrator for new requests; requests in progress keep theirs."""
        self.orchestrator = self._drains.applied(orchestrator)

    def rule_out(self, version: int, drained: Mapping[str, str]) -> None:
        """Rule out these experts, and no others, for new requests, before the catalog comes that says so.

        Args:
            version: of the registry that has it.
            drained: expert -> why it takes no new requests.
        """
        self._drains.state(version, drained)
        self.orchestrator = self._drains.applied(self.orchestrator)

    def requests_with(self, experts: Collection[str]) -> int:
        """Number of requests in progress that call one of these experts, or may yet."""
        return sum(call.may_call(experts) for call in self._calls.values())

    def close(self) -> None:
        """End the routing thread."""
        self._batch.close()

    @asynccontextmanager
    async def call(self, endpoint: str) -> AsyncIterator[Call]:
        """A request, from arrival until its answer is sent. Log and metrics record it however it ends."""
        deadline_s, id_ = self.settings.deadline_s, uuid4().hex
        call = Call(
            id=id_,
            endpoint=endpoint,
            orchestrator=self.orchestrator,
            started_at=self._wall(),
            started=self._clock(),
            clock=self._clock,
            ends=asyncio.timeout(deadline_s),
            deadline_s=deadline_s,
            handled=bind(Handled(id_)),
            logs_ids=writes_json(),
        )
        self._calls[call.id] = call
        try:
            yield call
        except BaseException:
            call.error = call.error or CANCELLED  # only a client disconnect gets here
            raise
        finally:
            del self._calls[call.id]
            self.in_flight -= call.admitted
            self._look()
            if call.held is not None and self._ledger is not None:
                self._ledger.settle(call.held, spent(call, call.held.amounts))
            for finished in call.finished():
                self._tell(finished)
            call.handled.over = True

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

    def admit(self, call: Call, places: int = 1) -> None:
        """Count a call as in flight until it ends. Its body is read and parsed by then, so slow clients take no place.

        Args:
            places: the answers that are generated for it; each counts as a request.

        Raises:
            InvalidRequest: it has more answers than may ever be in flight.
            Overloaded: too many are in flight; with the time after which a place is expected (`RetryAfter`).
        """
        most = self.settings.max_in_flight
        if places > most:
            raise InvalidRequest(
                f"{places} answers in one request; only {most} may be in flight (serve.max_in_flight): "
                "lower n, or send fewer prompts"
            )
        if self.in_flight + places > most:
            raise Full(
                f"{self.in_flight} requests are in flight already, of {most} (serve.max_in_flight); try again later",
                self._retry.seconds(places, self._clock(), self.brownout.longest_wait_s),
            )
        call.admitted = places
        self.in_flight += places

    async def accept(self, call: Call, body: bytes, parse: Callable[[object], Parsed]) -> Parsed:
        """Parse the body of a call, then admit the call.

        Raises:
            InvalidRequest: `parse` refuses the body, it is not JSON within the bounds, or it names unknown experts, or
                such as its key may not use.
            Overloaded: as `admit`, or too many large bodies are waiting.
        """

        def known(value: object) -> Parsed:
            call.parsed = parse(value)
            call.access.check(call.parsed.model, call.orchestrator)
            call.access.priority(call.parsed.request.priority)
            call.queries(call.parsed, first=True)  # names take time too: there may be thousands
            return call.parsed

        parsed = await self._large.parse(body, known)
        self.admit(call, len(parsed.requests) * parsed.runs_each)
        return parsed

    async def route(self, call: Call, parsed: Parsed) -> list[Routed]:
        """The routing decision of each prompt, in one batch. No expert is called.

        Raises:
            InvalidRequest, NoEligibleExpert: no expert may answer; the message says why.
        """
        call.parsed = parsed
        self._shorten(call, parsed.request.deadline_s)
        queries = call.queries(parsed)
        long = len(queries) > 1 or call.orchestrator.may_count(queries[0])
        self._look()
        orchestrator = self.brownout.applied(call.orchestrator)
        routing = [self._batch.route(orchestrator, query, parsed.model, long=long) for query in queries]
        with spanned_routing(call):
            try:
                call.decisions = [await routing[0]] if len(routing) == 1 else await asyncio.gather(*routing)
            except NoEligibleExpert as error:
                raise call.discreet(error) from error
        call.route_s = call.elapsed_s
        return call.decisions

    async def reserve(self, call: Call, amounts: Amounts) -> None:
        """Reserve what a call may use of the limits of its key; what it has used is settled when it ends.

        Raises:
            LimitReached: a limit leaves no room.
        """
        if self._ledger is not None and call.access.key is not None:
            ends_at = self._wall() + max(call.deadline_s - call.elapsed_s, 0.0) + GRACE_S
            call.held = await self._ledger.reserve(call.access.key, call.id, amounts, ends_at)

    async def answer(self, call: Call, parsed: Parsed) -> AsyncGenerator[tuple[int, Chunk], None]:
        """Route and answer: chunks with the index of their reply in `call.replies`.

        `Reply.expert` is set from the first chunk of a reply on, `Reply.answer` after its last.
        """
        decisions = await self.route(call, parsed)
        if self._ledger is not None and call.access.key is not None:  # a megabyte of texts takes 30 ms to estimate
            await self.reserve(call, expected(call, parsed, decisions))
        left_s = max(call.deadline_s - call.elapsed_s, 1e-3)
        origin, priority = origin_of(call), call.access.priority(parsed.request.priority)
        call.replies = [
            call.orchestrator.reply(
                replace(request, deadline_s=left_s, id=call.id_of(i), origin=origin, priority=priority),
                decisions[prompt],
            )
            for i, (prompt, request) in enumerate(parsed.runs)
        ]
        streams = [reply.chunks for reply in call.replies]
        if parsed.others:
            streams = [_of_prompt(i // parsed.runs_each, stream) for i, stream in enumerate(streams)]
        async with aclosing(interleaved(streams)) as chunks:
            async for index, chunk in chunks:
                if call.first_s is None:
                    call.first_s = call.elapsed_s
                yield index, chunk

    async def health(self, *, all_of_it: bool = True) -> tuple[bool, dict[str, Any]]:
        """Whether requests can be answered now, and the body of `/health`: to strangers, that alone and the problem."""
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
                about["hosts"] = list(map(_for_anyone, await asyncio.wait_for(self._health(), HEALTH_S)))
                problem = problem or (None if about["hosts"] else "no expert host is running")
            except Exception as error:
                logger.warning("the expert hosts do not respond", exc_info=error)
                problem = "the expert hosts do not respond"
        said = {"status": "ok" if problem is None else "unavailable", "problem": problem}
        return problem is None, said | about if all_of_it else said

    def _shorten(self, call: Call, deadline_s: float | None) -> None:
        """Apply the request's own deadline: it counts from arrival and never exceeds that of the service."""
        if deadline_s is None or deadline_s >= call.deadline_s:
            return
        call.deadline_s = deadline_s
        call.ends.reschedule(asyncio.get_running_loop().time() + max(deadline_s - call.elapsed_s, 0.0))

    def _look(self) -> None:
        self.brownout.look(self.in_flight / self.settings.max_in_flight)

    def _tell(self, finished: Finished) -> None:
        if finished.answer is not None:
            self._retry.ended(finished.total_s)
        with _only_logged("the decision log"):
            if self._log is not None:
                self._log.write(finished)
        if writes_json():
            with _only_logged("the access log"):
                access_log.write(finished)
        with _only_logged("the last decisions"):
            self.recent.write(finished)
        with _only_logged("the metrics"):
            if self.metrics is not None:
                self.metrics.observe(finished)


async def _of_prompt(prompt: int, chunks: AsyncGenerator[Chunk, None]) -> AsyncGenerator[Chunk, None]:
    """The chunks of one of several prompts; an error of the request names the prompt."""
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                yield chunk
    except InvalidRequest as error:
        error.param = f"prompt[{prompt}]" if error.param in (None, "prompt") else error.param
        raise


@contextmanager
def _only_logged(what: str) -> Iterator[None]:
    """A failure of the log or the metrics must not fail the request."""
    try:
        yield
    except Exception:
        logger.exception("%s failed to record a finished request", what)


def _for_anyone(host: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state of a host without the errors of loads, which name files, and without the URLs and errors of endpoints;
    `/admin/residency` has them."""
    shown = dict(host)
    if any(each.get("reason") for each in host.get("weights", ())):
        shown["weights"] = [{**each, "reason": None} for each in host["weights"]]
    if host.get("endpoints"):
        hidden = ("url", "last_error")
        shown["endpoints"] = [{k: v for k, v in each.items() if k not in hidden} for each in host["endpoints"]]
    return shown
