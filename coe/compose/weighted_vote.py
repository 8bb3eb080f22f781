"""`weighted-vote`: all chosen experts answer, and votes count by the estimated quality of their experts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coe.compose.answer_key import KeyKind, key_of
from coe.compose.ballots import drawn, poll
from coe.compose.base import Done, ExpertCalls, Final
from coe.compose.option_prior import OptionPrior
from coe.compose.settings import check_count
from coe.errors import ConfigError
from coe.types import GenerateRequest
from routers.base import RoutingDecision
from routers.errors import InvalidArtifact

LEAST_QUALITY, MOST_QUALITY = 0.02, 0.98
"""Estimates are clipped to this range, so that no expert decides alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedVote:
    """A vote weighted by estimated quality.

    An expert of estimated quality q has the weight log(q / (1 - q)) + log(options - 1), at least 0: the evidence of its
    vote if experts err independently and evenly over the other options. Then the strongest side is the likeliest answer
    (Nitzan and Paroush 1982; one-coin Dawid and Skene 1979). With more options, agreement of weak experts counts more.
    With a prior, each listed option starts with log(P(option) * options), which makes it Bayes' rule
    (`coe.compose.option_prior`).

    key: which answers count as the same.
    options: number of plausible answers: those of a multiple choice; more for free text, where wrong answers seldom
        agree.
    prior: JSON file written by `coe outcomes prior`.
    keep_thinking: compare the thinking text of answers, too.
    """

    key: KeyKind = "auto"
    options: int = 10
    prior: OptionPrior | str | None = None
    keep_thinking: bool = False

    def __post_init__(self) -> None:
        key_of(self.key)
        check_count("options", self.options, least=2)
        object.__setattr__(self, "prior", read_prior(self.prior))

    def step(self, request: GenerateRequest, decision: RoutingDecision, done: Done) -> ExpertCalls | Final:
        """All calls, then the count."""
        decision, counts = drawn(request, decision)
        weights, ahead = evidence(decision, self.options, counts), head_start(self.prior, request)
        return poll(request, decision, done, key_of(self.key, keep_thinking=self.keep_thinking), weights, ahead)


def evidence(decision: RoutingDecision, options: int, counts: Sequence[int] = ()) -> list[float]:
    """The weight of each expert's vote; 1 without estimated quality. counts: votes of each expert."""
    counts = counts or (1,) * len(decision.experts)
    if not decision.quality:
        return [float(count) for count in counts]
    clipped = (min(max(quality, LEAST_QUALITY), MOST_QUALITY) for quality in decision.quality)
    weights = (max(0.0, math.log(q / (1 - q)) + math.log(options - 1)) for q in clipped)
    return [weight * count for weight, count in zip(weights, counts, strict=True)]


def head_start(prior: OptionPrior | str | None, request: GenerateRequest) -> Mapping[str, float]:
    """letter -> log(P(option) * options) of each option that the request lists; 0 for all under an even prior.

    Empty without options or without a prior.
    """
    if not isinstance(prior, OptionPrior):
        return {}
    texts = [message.content for message in request.messages if message.role == "user"]
    found = prior.log_prior(texts[-1] if texts else request.prompt or "")
    return {letter: value + math.log(len(found)) for letter, value in found.items()}


def read_prior(prior: OptionPrior | str | None) -> OptionPrior | None:
    """The prior of a setting.

    Raises:
        ConfigError: its file does not contain an option prior.
    """
    if prior is None or isinstance(prior, OptionPrior):
        return prior
    try:
        return OptionPrior.read(prior)
    except InvalidArtifact as error:
        raise ConfigError(f"prior: {error}") from error
