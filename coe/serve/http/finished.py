"""A finished request, as the decision log and the metrics record it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from coe.orchestrator import Reply
from coe.routing import Routed
from coe.types import Answer, Failure


@dataclass(frozen=True, slots=True)
class Finished:
    """A finished request: answered, refused, failed or cancelled.

    Attributes:
        id: id of the decision; also in the answer's headers and in the log.
        endpoint: path, such as "/v1/chat/completions".
        model: as requested.
        key: id of the API key; None without one.
        routed: None if the request was refused before a decision.
        expert: the expert that answered or had started to; differs from the decision if the fallback answered.
        answer: the whole answer, with the usage of all expert calls; None if there is none.
        error: OpenAI-style error code ("overloaded", ...), "cancelled" if the client disconnected, otherwise None.
        status: HTTP status sent.
        seed: requested sampling seed.
        registry_version: of the snapshot used for routing.
        started_at: seconds since the epoch.
        route_s, first_s, total_s: seconds to the decision, to the first text, to the end. None if never reached.
        done: outcome of each expert call, by the id of the call (`coe.compose`).
        first_parts: seconds of `first_s` by where they were spent (`first_token_parts`).
    """

    id: str
    endpoint: str
    model: str
    routed: Routed | None
    expert: str | None
    answer: Answer | None
    error: str | None
    status: int
    streamed: bool
    seed: int | None
    registry_version: int
    started_at: float
    route_s: float | None
    first_s: float | None
    total_s: float
    done: Mapping[str, Answer | Failure] = field(default_factory=dict)
    key: str | None = None
    first_parts: Mapping[str, float] = field(default_factory=dict)

    @property
    def gateway_s(self) -> float | None:
        """Seconds spent outside the expert host: parsing, routing, transport. None without an answer."""
        timing = self.answer.timing if self.answer else None
        return None if timing is None else max(0.0, self.total_s - timing.queue_s - timing.load_s - timing.engine_s)


def first_token_parts(first_s: float | None, replies: Sequence[Reply]) -> dict[str, float]:
    """The seconds to the first text of a streamed answer, by where they were spent.

    `queue`, `load`, `engine`: on the host of the call that is streamed; `calls`: calls of earlier steps of the
    composition, if any; `gateway`: all else, that is reading, routing and transport. Empty for what is not streamed,
    for several answers, and if the call has not ended or has no text.
    """
    if first_s is None or len(replies) != 1 or (streamed := replies[0].streamed) is None:
        return {}
    answer = replies[0].done.get(streamed)
    timing = answer.timing if isinstance(answer, Answer) else None
    if timing is None or timing.first_s is None:
        return {}
    parts = {"queue": timing.queue_s, "load": timing.load_s, "engine": timing.first_s}
    if len(replies[0].done) > 1:
        parts["calls"] = replies[0].earlier_s
    return {"gateway": max(0.0, first_s - sum(parts.values())), **parts}
