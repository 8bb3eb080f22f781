"""Experts with given answers, for the tests of compositions."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from coe.compose import Composition, ExpertCalls
from coe.compose.option_prior import FEATURES, OptionPrior
from coe.types import Answer, Failure, GenerateRequest, Timing, Usage
from routers.base import Message, RoutingDecision

REQUEST = GenerateRequest(messages=(Message("user", "Which is it?"),))

LISTED = GenerateRequest(
    messages=(Message("user", "Which of them is the capital of the north?\nA. paris\nB. capital\nC. rome"),)
)
"""A question with options; only the words of B occur in it."""


Said = str | Exception | Answer
Says = Mapping[str, Said | Callable[[GenerateRequest], Said]]
"""The answer of each expert, or a function from its request to the answer."""


def prior(**weights: float) -> OptionPrior:
    """A prior with these weights; the others are 0."""
    return OptionPrior({name: weights.get(name, 0.0) for name in FEATURES})


def decision(**quality: float) -> RoutingDecision:
    """Experts in this order, with their qualities as utilities."""
    values = tuple(quality.values())
    return RoutingDecision(tuple(quality), (1 / len(values),) * len(values), values, values[0], quality=values)


def answer(expert: str, text: str, cost_usd: float | None = 1.0, timing: Timing | None = None) -> Answer:
    return Answer(expert, text, "stop", Usage(10, 2), cost_usd, timing)


def run(
    composition: Composition,
    of: RoutingDecision,
    says: Says,
    request: GenerateRequest = REQUEST,
) -> tuple[Answer, list[list[str]]]:
    """The final answer, and the experts called in each round. A stream must end in the answer of the next step."""
    done: dict[str, Answer | Failure] = {}
    rounds = []
    while isinstance(step := composition.step(request, of, done), ExpertCalls):
        rounds.append([call.expert for call in step.calls])
        for call in step.calls:
            told = says[call.expert]
            said = told(call.request) if callable(told) else told
            assert call.id not in done
            if isinstance(said, Exception):
                done[call.id] = Failure(call.expert, said)
            else:
                done[call.id] = answer(call.expert, said) if isinstance(said, str) else said
        if step.last and isinstance(streamed := done[step.calls[0].id], Answer):
            following = composition.step(request, of, done)
            if step.held and isinstance(following, ExpertCalls):
                continue  # nothing is sent of a refusal
            assert not isinstance(following, ExpertCalls) and following.answer.text == streamed.text
    return step.answer, rounds
