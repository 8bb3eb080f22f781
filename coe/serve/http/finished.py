"""One request that is over: what the decision log and the metrics are told of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from coe.routing import Routed
from coe.types import Answer, Failure


@dataclass(frozen=True, slots=True)
class Finished:
    """A request that is over, however it ended.

    Attributes:
        id: of the decision; the answer's headers and its log line carry the same.
        endpoint: path, as "/v1/chat/completions".
        model: as asked.
        routed: None when it was refused before anybody was chosen.
        expert: who answered, or had begun to; another than decided when the fallback stepped in.
        answer: the whole answer, with what all asks took; None when there is none.
        error: OpenAI-style code of what went wrong ("overloaded", ...), "cancelled" when the client left, else None.
        status: HTTP status that was sent.
        seed: of the sampling, as asked.
        registry_version: of the snapshot that it was routed over.
        started_at: seconds since the epoch.
        route_s: until the decision; first_s: until the first text; total_s: until the end. None where it never came.
        done: what each expert said that was asked, by the id of the ask (`coe.compose`).
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

    @property
    def gateway_s(self) -> float | None:
        """Seconds outside the expert's host: parsing, routing, the way there and back. None without an answer."""
        timing = self.answer.timing if self.answer else None
        return None if timing is None else max(0.0, self.total_s - timing.queue_s - timing.load_s - timing.engine_s)
