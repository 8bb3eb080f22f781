"""A request in progress: what is known of it so far, and its records at the end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from coe.compose import WithFallback, named_experts
from coe.errors import CoeError
from coe.orchestrator import Orchestrator, Reply
from coe.protocol.answers import total_usage
from coe.protocol.errors import error_body, is_internal
from coe.protocol.parsed import Parsed
from coe.routing import Routed
from coe.seam import text_of
from coe.serve.http.finished import Finished, first_token_parts
from coe.serve.http.keyring import OPEN, Access
from coe.telemetry.origin import Handled
from coe.telemetry.tracing import Span
from coe.types import Answer, Failure
from registry.snapshot import expert_of
from registry.usage import Reserve
from routers.base import Query
from routers.errors import NoEligibleExpert

CANCELLED = "cancelled"
CLIENT_GONE = 499
"""Logged status of a request whose client disconnected before any status was sent."""
logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Call:
    """A request in progress; it becomes a `Finished` for each of its prompts.

    Attributes:
        orchestrator: the one current at arrival; later changes of experts or policies do not affect this request.
        access: what it may see and do, by its API key.
        held: what is reserved of the limits of its key.
        admitted: how many answers of it count as in flight.
        decisions: of each prompt, once they are made. replies: of each prompt, `Parsed.runs_each` in a row.
        handled: its ids, for log lines. span: of the whole request; None: it is not traced.
        logs_ids: whether its log lines have these ids on the hosts, too.
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
    handled: Handled
    logs_ids: bool = False
    span: Span | None = None
    access: Access = OPEN
    held: Reserve | None = None
    admitted: int = 0
    parsed: Parsed | None = None
    decisions: list[Routed] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    status: int = 0
    error: str | None = None
    route_s: float | None = None
    first_s: float | None = None

    @property
    def elapsed_s(self) -> float:
        """Seconds since arrival."""
        return self.clock() - self.started

    @property
    def visible(self) -> frozenset[str] | None:
        """The experts that may answer it; None: all."""
        return self.access.experts(self.orchestrator.snapshot)

    def queries(self, parsed: Parsed, *, first: bool = False) -> list[Query]:
        """The query of each prompt, or of the first one, restricted to the experts that it allows and may use.

        Raises:
            InvalidFields: it names experts that it does not know.
        """
        visible = self.visible
        known = self.orchestrator.snapshot.experts if visible is None else visible
        if first:
            return [parsed.query_among(known, others=visible is not None)]
        return parsed.queries_among(known, others=visible is not None)

    def discreet(self, error: NoEligibleExpert) -> NoEligibleExpert:
        """The error, or one in its place that names no expert which the caller may not know."""
        visible, text = self.visible, str(error)
        if visible is None or not any(name in text for name in self.orchestrator.snapshot if name not in visible):
            return error
        return NoEligibleExpert(
            f"no expert that the key {self.access.id} may use can answer this request by this policy",
            constraints=error.constraints,
        )

    def may_call(self, experts: Collection[str]) -> bool:
        """Whether it calls one of these experts, or may yet: all versions of an expert count as it."""
        if not self.decisions:
            snapshot = self.orchestrator.snapshot
            return any(name in snapshot and name not in snapshot.drained for name in experts)
        return any(expert_of(name) in experts for routed in self.decisions for name in _callable(routed))

    @property
    def experts(self) -> list[str]:
        """The experts of the answers, as far as known, each once."""
        if len(self.replies) == 1:
            return [self.replies[0].expert] if self.replies[0].expert is not None else []
        return list(dict.fromkeys(reply.expert for reply in self.replies if reply.expert is not None))

    @property
    def notes(self) -> tuple[str, ...]:
        """The notes of all answers, each once."""
        if len(self.replies) == 1:
            return self.replies[0].notes
        return tuple(dict.fromkeys(note for reply in self.replies for note in reply.notes))

    def id_of(self, reply: int) -> str:
        """The id of a reply, or of a decision: that of the request with the position of all but the first."""
        return f"{self.id}-{reply}" if reply else self.id

    def failed(self, error: BaseException) -> tuple[int, dict[str, Any]]:
        """Record an error. Returns its HTTP status and OpenAI's body."""
        status, body = error_response(error, self.id, self.endpoint)
        self.error = body["error"]["code"]
        return status, body

    def finished(self) -> Iterator[Finished]:
        """The records for log and metrics: one for each prompt, which has its own decision."""
        parsed = self.parsed
        each = parsed.runs_each if parsed else 1
        for i in range(max(1, len(self.decisions))):
            replies = self.replies[i * each : (i + 1) * each]
            yield Finished(
                id=self.id_of(i),
                endpoint=self.endpoint,
                model=parsed.model if parsed else "",
                key=self.access.id,
                routed=self.decisions[i] if self.decisions else None,
                expert=replies[0].expert if replies else None,
                answer=_together([reply.answer for reply in replies]),
                error=self.error,
                status=self.status or CLIENT_GONE,
                streamed=parsed is not None and parsed.stream,
                seed=parsed.request.seed if parsed else None,
                registry_version=self.orchestrator.snapshot.version,
                started_at=self.started_at,
                route_s=self.route_s,
                first_s=self.first_s,
                total_s=self.elapsed_s,
                done=_outcomes(replies),
                first_parts=first_token_parts(self.first_s, self.replies),
            )


def _callable(routed: Routed) -> Iterator[str]:
    """The experts that the composition of a decision may call."""
    yield from routed.decision.experts
    yield from named_experts(routed.composition)
    if isinstance(routed.composition, WithFallback):
        yield routed.composition.expert
        yield from named_experts(routed.composition.composition)


def _together(answers: list[Answer | None]) -> Answer | None:
    """The first of several answers to a prompt, with the tokens and the cost of all; None unless all are there."""
    given = [answer for answer in answers if answer is not None]
    if len(given) < 2 or len(given) < len(answers):
        return given[0] if len(given) == len(answers) == 1 else None
    costs = [answer.cost_usd for answer in given]
    return replace(
        given[0],
        usage=total_usage([answer.usage for answer in given]),
        cost_usd=None if None in costs else sum(cost for cost in costs if cost is not None),
        notes=tuple(dict.fromkeys(note for answer in given for note in answer.notes)),
    )


def _outcomes(replies: list[Reply]) -> dict[str, Answer | Failure]:
    """The outcomes of the calls of all replies; the ids of all but the first reply have its position, as in `0#2`."""
    if len(replies) == 1:
        return replies[0].done
    return {
        f"{call}#{i}" if i else call: outcome for i, reply in enumerate(replies) for call, outcome in reply.done.items()
    }


def error_response(error: BaseException, id: str, endpoint: str) -> tuple[int, dict[str, Any]]:  # noqa: A002
    """HTTP status and OpenAI's body of an error. Details of an internal error are logged under `id`, not sent."""
    if isinstance(error, CoeError) and error.public is not None:  # its traceback is in the log of where it was raised
        logger.warning("request %s to %s failed: %s", id, endpoint, text_of(error))
    elif is_internal(error):
        logger.error("request %s to %s failed", id, endpoint, exc_info=error)
    return error_body(error, logged_as=id)
