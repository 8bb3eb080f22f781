"""`chain`: each expert refines the draft of the previous one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from coe.answers.refusals import refuses
from coe.answers.thinking import without_thoughts
from coe.compose.ballots import give_up, together
from coe.compose.base import Done, ExpertCall, ExpertCalls, Final, no_expert
from coe.compose.notes import failures
from coe.compose.settings import check_name, check_seconds
from coe.compose.synthesis import DRAFT, QUESTION, REFINE, check_template, refinement
from coe.errors import ConfigError
from coe.types import Answer, GenerateRequest
from routers.base import RoutingDecision

ORDERS = ("rising", "falling")


@dataclass(frozen=True, slots=True)
class Chain:
    """A draft passes from expert to expert; each sees the request and the draft, and the last one's answer streams.

    The first expert gets the request unchanged. An expert that fails, refuses, passes its deadline or gives an empty
    answer is skipped and named in `Answer.notes`: the next one gets the same draft. If the last one fails, the
    current draft is the answer. Thoughts (the text before a closing think tag) are not passed on.

    order: "rising": by utility, so that the decision's best expert is the last; "falling": the best one drafts.
    experts: names in order, instead of the decision's.
    template: the prompt of all but the first, with the placeholders {question} and {draft}.
    expert_deadline_s: seconds for each but the last, loading included. A batch ignores it.
    """

    order: Literal["rising", "falling"] = "rising"
    experts: Sequence[str] | None = None
    template: str = REFINE
    expert_deadline_s: float | None = None

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ConfigError(f"order must be 'rising' or 'falling', got {self.order!r}")
        if self.experts is not None:
            if isinstance(self.experts, str) or len(self.experts) < 2:
                raise ConfigError(f"experts of a chain must be a list of at least two names, got {self.experts!r}")
            for name in self.experts:
                check_name("each of `experts`", name)
        check_template(self.template, QUESTION, DRAFT)
        check_seconds("expert_deadline_s", self.expert_deadline_s)

    def step(self, request: GenerateRequest, decision: RoutingDecision, done: Done) -> ExpertCalls | Final:
        """The next expert's call, or the last draft."""
        if not decision.experts:
            raise no_expert(decision)
        experts = self._experts(decision)
        answer, draft, empty = None, "", list[str]()
        for place, expert in enumerate(experts):
            call, last = f"{place}.0", place == len(experts) - 1
            outcome = done.get(call)
            if outcome is None:
                asked = self._asked(request, draft, last)
                return ExpertCalls((ExpertCall(call, expert, asked),), last=last, notes=(*failures(done), *empty))
            if isinstance(outcome, Answer):
                text = without_thoughts(outcome.text)
                if not last and refuses(text):
                    text, why = "", "gave no answer (refusal)"
                else:
                    why = "gave an empty answer"
                empty += [] if text or last else [f"{expert} {why}"]
                answer, draft = (outcome, text) if text or last or answer is None else (answer, draft)
        if answer is None:
            raise give_up(decision, done)
        return Final(together(answer, done, (*failures(done), *empty)))

    def _experts(self, decision: RoutingDecision) -> Sequence[str]:
        if self.experts is not None:
            return self.experts
        best_first = sorted(range(len(decision.experts)), key=lambda i: -decision.scores[i])
        ordered = best_first if self.order == "falling" else reversed(best_first)
        return [decision.experts[i] for i in ordered]

    def _asked(self, request: GenerateRequest, draft: str, last: bool) -> GenerateRequest:
        asked = refinement(request, draft, self.template) if draft else request
        return asked if last else replace(asked, deadline_s=self.expert_deadline_s or request.deadline_s)
