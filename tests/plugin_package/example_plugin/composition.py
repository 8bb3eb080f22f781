"""A composition: every expert of the decision answers, and the longest answer wins."""

from __future__ import annotations

from dataclasses import dataclass

from coe import Abstained, Answer, Done, ExpertCall, ExpertCalls, Failure, Final, GenerateRequest
from routers import RoutingDecision


@dataclass(frozen=True, slots=True)
class Longest:
    """least: characters that the answer must have; shorter ones count as empty."""

    least: int = 0

    def step(self, request: GenerateRequest, decision: RoutingDecision, done: Done) -> ExpertCalls | Final:
        """All experts first, then the answer; where every expert failed, the error of the last one."""
        if not decision.experts:
            raise Abstained(f"no expert may answer: {decision.reason}")
        calls = [ExpertCall(str(i), expert, request) for i, expert in enumerate(decision.experts)]
        if not done:
            return ExpertCalls(tuple(calls))
        outcomes = [done[call.id] for call in calls]
        answers = [outcome for outcome in outcomes if isinstance(outcome, Answer)]
        if not answers:
            raise [outcome.error for outcome in outcomes if isinstance(outcome, Failure)][-1]
        return Final(max(answers, key=lambda answer: len(answer.text) if len(answer.text) >= self.least else 0))
