"""`vote`: all chosen experts answer, and what most of them say is the answer."""

from __future__ import annotations

from dataclasses import dataclass

from coe.compose.answer_key import KeyKind, key_of
from coe.compose.ballots import drawn, poll
from coe.compose.base import Done, ExpertCalls, Final
from coe.types import GenerateRequest
from routers.base import RoutingDecision


@dataclass(frozen=True, slots=True)
class Vote:
    """Majority of the extracted answers, as in self-consistency (arXiv 2203.11171) but of several experts.

    All are asked side by side; the answer of the best expert on the winning side is returned, with the usage and the
    cost of all. Equal sides: the one of the expert with the highest utility. Experts that fail or say nothing do not
    vote; where all fail, the last failure is raised. A decision of one expert is just asked. Experts that were drawn
    several times have as many votes.

    key: what counts as the same answer, see `coe.compose.answer_key`.
    """

    key: KeyKind = "auto"

    def __post_init__(self) -> None:
        key_of(self.key)

    def step(self, request: GenerateRequest, decision: RoutingDecision, done: Done) -> ExpertCalls | Final:
        """All calls, then the count. Nothing can be streamed: the answer stands when the last vote is cast."""
        decision, counts = drawn(request, decision)
        return poll(request, decision, done, key_of(self.key), counts)
