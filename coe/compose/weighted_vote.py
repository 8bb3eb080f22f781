"""`weighted-vote`: all chosen experts answer, and each vote counts by how good its expert is on such queries."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coe.compose.answer_key import KeyKind, key_of
from coe.compose.ballots import drawn, poll
from coe.compose.base import Done, ExpertCalls, Final
from coe.compose.option_prior import OptionPrior
from coe.errors import ConfigError
from coe.types import GenerateRequest
from routers.base import RoutingDecision
from routers.errors import InvalidArtifact

LEAST_QUALITY, MOST_QUALITY = 0.02, 0.98
"""Estimates beyond these count as these: none is so sure that it should decide alone."""


@dataclass(frozen=True, slots=True)
class WeightedVote:
    """A vote weighted by estimated quality.

    The weight of an expert whose estimated quality is q is log(q / (1 - q)) + log(options - 1), at least 0. That is the
    evidence of its vote where experts err independently and evenly over the other options: then the strongest side is
    the likeliest answer (Nitzan and Paroush 1982; one-coin Dawid and Skene 1979). The more options there are, the more
    an agreement of weak experts is worth. With a prior, each listed option begins with log(P(option) * options), which
    makes it Bayes' rule (`coe.compose.option_prior`).

    key: what counts as the same answer. options: how many answers are plausible: those of a multiple choice; for free
    text, where wrong answers seldom agree, more. prior: file of a trained OptionPrior, or the prior itself.
    """

    key: KeyKind = "auto"
    options: int = 10
    prior: OptionPrior | str | None = None

    def __post_init__(self) -> None:
        key_of(self.key)
        check_options(self.options)
        object.__setattr__(self, "prior", read_prior(self.prior))

    def step(self, request: GenerateRequest, decision: RoutingDecision, done: Done) -> ExpertCalls | Final:
        """All calls, then the count."""
        decision, counts = drawn(request, decision)
        weights, ahead = evidence(decision, self.options, counts), head_start(self.prior, request)
        return poll(request, decision, done, key_of(self.key), weights, ahead)


def evidence(decision: RoutingDecision, options: int, counts: Sequence[int] = ()) -> list[float]:
    """The weight of each expert's vote; 1 where nothing was estimated. counts: how often each has it."""
    counts = counts or (1,) * len(decision.experts)
    if not decision.quality:
        return [float(count) for count in counts]
    clipped = (min(max(quality, LEAST_QUALITY), MOST_QUALITY) for quality in decision.quality)
    weights = (max(0.0, math.log(q / (1 - q)) + math.log(options - 1)) for q in clipped)
    return [weight * count for weight, count in zip(weights, counts, strict=True)]


def head_start(prior: OptionPrior | str | None, request: GenerateRequest) -> Mapping[str, float]:
    """letter -> log(P(option) * options) of each option that the request lists; empty without any, or without a prior.

    An even prior gives 0 to all.
    """
    if not isinstance(prior, OptionPrior):
        return {}
    texts = [message.content for message in request.messages if message.role == "user"]
    found = prior.log_prior(texts[-1] if texts else request.prompt or "")
    return {letter: value + math.log(len(found)) for letter, value in found.items()}


def read_prior(prior: OptionPrior | str | None) -> OptionPrior | None:
    """The prior of a setting.

    Raises:
        ConfigError: it names a file that holds none.
    """
    if prior is None or isinstance(prior, OptionPrior):
        return prior
    try:
        return OptionPrior.read(prior)
    except InvalidArtifact as error:
        raise ConfigError(f"prior: {error}") from error


def check_options(options: object) -> None:
    """Raises ConfigError where `options` is not a whole number of at least 2."""
    if isinstance(options, bool) or not isinstance(options, int) or options < 2:
        raise ConfigError(f"options must be at least 2, a whole number; got {options!r}")
