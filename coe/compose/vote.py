"""`vote`: all chosen experts answer, and the majority wins."""

from __future__ import annotations

from dataclasses import dataclass

from coe.compose.answer_key import KeyKind, key_of
from coe.compose.ballots import drawn, poll
from coe.compose.base import Done, ExpertCalls, Final
from coe.types import GenerateRequest
from routers.base import RoutingDecision


@dataclass(frozen=True, slots=True)
class Vote:
    """Majority of the extracted answers, as in self-consistency (arXiv 2203.11171) but over several experts.

    All experts are called side by side. The result is the answer of the best expert on the winning side, with the usage
    and cost of all calls. Ties go to the expert with the highest utility. Experts that fail or refuse do not vote, nor
    do answers without a key; if all fail, the last failure is raised. An expert listed n times in the decision has n
    votes. A decision of one expert needs no vote.

    key: which answers count as the same, see `coe.compose.answer_key`.
    keep_thinking: compare the thinking text of answers, too.
    """

    key: KeyKind = "auto"
    keep_thinking: bool = False

    def __post_init__(self) -> None:
        key_of(self.key)

    def step(self, request: GenerateRequest, decision: RoutingDecision, done: Done) -> ExpertCalls | Final:
        """All calls, then the count. A vote cannot stream: the answer is known after the last call."""
        decision, counts = drawn(request, decision)
        return poll(request, decision, done, key_of(self.key, keep_thinking=self.keep_thinking), counts)
