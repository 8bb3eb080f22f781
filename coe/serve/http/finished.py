"""A finished request, as the decision log and the metrics record it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

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

    @property
    def gateway_s(self) -> float | None:
        """Seconds spent outside the expert host: parsing, routing, transport. None without an answer."""
        timing = self.answer.timing if self.answer else None
        return None if timing is None else max(0.0, self.total_s - timing.queue_s - timing.load_s - timing.engine_s)
