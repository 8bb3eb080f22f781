"""The composition of a request that only one expert's own answer can satisfy, under a policy that combines texts."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Final

from coe.compose.base import Composition, Done, ExpertCalls
from coe.compose.base import Final as FinalAnswer
from coe.compose.fallback import WithFallback
from coe.compose.fallback_only import FallbackOnly
from coe.compose.ruled_out import Without
from coe.compose.single import Single
from coe.types import GenerateRequest
from routers.base import EMBEDDING, RoutingDecision
from routers.constraints import LOGPROBS, PROMPT_LOGPROBS, TOKEN_PROMPTS, TOOLS

NEEDS_ONE: Final = frozenset({TOOLS, LOGPROBS, PROMPT_LOGPROBS, TOKEN_PROMPTS, EMBEDDING})
"""Needs whose results cannot be voted on or combined: tool calls, tokens of one tokenizer, and vectors of one model."""


def as_one_answer(composition: Composition, needs: Collection[str]) -> Composition:
    """The composition of a policy, or `OneAnswer` if a need of the request rules it out."""
    ruling = NEEDS_ONE.intersection(needs)
    return OneAnswer(ruling) if ruling and not isinstance(composition, Single) else composition


def as_one_echo(composition: Composition) -> Composition:
    """The composition of a request with `echo`, whose answers begin with the prompt of their call: `OneAnswer` in place
    of one that combines texts."""
    match composition:
        case WithFallback():
            return WithFallback(as_one_echo(composition.composition), composition.expert)
        case Without():
            return Without(as_one_echo(composition.composition), composition.barred)
        case Single() | FallbackOnly() | OneAnswer():
            return composition
    return OneAnswer({"echo"})


class OneAnswer:
    """Call the chosen experts one after the other, best first, until one answers; a note says why.

    Args:
        needs: the needs of the request that rule the policy's composition out.
    """

    def __init__(self, needs: Collection[str]) -> None:
        self.note = f"one expert answers: the composition of the policy combines texts, not {', '.join(sorted(needs))}"

    def step(self, request: GenerateRequest, decision: RoutingDecision, done: Done) -> ExpertCalls | FinalAnswer:
        """The step of `Single` over the experts by utility: a cascade orders them by price."""
        order = sorted(range(len(decision.experts)), key=lambda i: -decision.scores[i])
        experts = tuple(dict.fromkeys(decision.experts[i] for i in order))
        step = Single().step(request, replace(decision, experts=experts), done)
        if isinstance(step, FinalAnswer):
            return FinalAnswer(replace(step.answer, notes=(self.note, *step.answer.notes)))
        return replace(step, notes=(self.note, *step.notes))
