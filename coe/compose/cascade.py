"""`cascade`: experts are asked in order until their answers leave little doubt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from coe.compose.answer_key import KeyKind, key_of
from coe.compose.ballots import asks, cast, elected, give_up, rounds, strength
from coe.compose.base import Asks, Done, Final
from coe.compose.weighted_vote import check_options, evidence
from coe.errors import ConfigError
from coe.types import Answer, GenerateRequest
from routers.base import RoutingDecision

_SLACK = 1e-9
"""Sums that differ by so little are equal: the order in which votes are added up must not decide."""


@dataclass(frozen=True, slots=True)
class Cascade:
    """A weighted vote that stops early: cheap and confident answers spare the rest of the experts.

    After each round, side s has the summed evidence S_s (see `weighted-vote`), and its answer is right with probability

        P(s) = exp(S_s) / (sum over sides of exp(S) + options not named yet)

    which after one answer is just its expert's estimated quality. It stops when the strongest side has P >= confidence,
    or when those who are left could not outvote it. With confidence 1 the answer is thus that of `weighted-vote`, for
    fewer calls. Experts come in the decision's order: cheap first with the `cascade` selector, best first with `top-k`.

    Asked side by side are as many as must be asked anyway: the fewest whose agreement would end it. So a cascade takes
    few rounds, and not a call more than one by one. Where the first expert's estimate alone suffices, its answer is
    final whatever it says, and is streamed.

    Agreement as the ground to stop: FrugalGPT (arXiv 2305.05176) learns a scorer, mixture-of-thought cascades (arXiv
    2310.03094) count agreeing samples; here experts' estimated qualities weigh them.

    confidence: in (0, 1]; choose it on training rows (`coe.evaluation.replay.confidence_for_calls`).
    key, options: as in `weighted-vote`.
    """

    confidence: float = 0.9
    key: KeyKind = "auto"
    options: int = 10

    def __post_init__(self) -> None:
        key_of(self.key)
        check_options(self.options)
        check_confidence(self.confidence)

    def step(self, request: GenerateRequest, decision: RoutingDecision, done: Done) -> Asks | Final:
        """The next asks, or the answer when there is no point in more."""
        weights, ballots = evidence(decision, self.options), cast(done, key_of(self.key))
        first = done.get("0.0")
        if isinstance(first, Answer) and self._needed({}, weights) == 1:
            return Final(first)
        asked = sum("." in name for name in done)
        sides, left = strength(ballots, weights), weights[asked:]
        if asked and (not left or self._settled(sides, left)):
            if not ballots:
                raise give_up(decision, done)
            return elected(decision, ballots, sides)
        if not left:
            raise give_up(decision, done)
        count = self._needed(sides, left)
        following = asks(request, decision, range(asked, asked + count), round=rounds(done))
        return replace(following, last=count == 1 and not ballots and (len(left) == 1 or not asked))

    def _settled(self, sides: Mapping[str, float], left: Sequence[float]) -> bool:
        """Whether the strongest side suffices, or cannot be outvoted by experts of these weights."""
        strengths = sorted(sides.values(), reverse=True)
        if not strengths:
            return False
        runner_up = strengths[1] if len(strengths) > 1 else 0.0
        return strengths[0] > runner_up + sum(left) + _SLACK or self._probability(strengths) >= self.confidence - _SLACK

    def _probability(self, strengths: Sequence[float]) -> float:
        """That the first of these strengths, the largest, is of the right answer."""
        rivals = sum(math.exp(other - strengths[0]) for other in strengths[1:])
        unnamed = max(0, self.options - len(strengths)) * math.exp(-strengths[0])
        return 1.0 / (1.0 + rivals + unnamed)

    def _needed(self, sides: Mapping[str, float], left: Sequence[float]) -> int:
        """The fewest further experts whose agreement with the strongest side would settle it."""
        leader = max(sides, key=lambda key: sides[key], default="")
        for count in range(1, len(left)):
            if self._settled({**sides, leader: sides.get(leader, 0.0) + sum(left[:count])}, left[count:]):
                return count
        return len(left)


def check_confidence(confidence: object) -> None:
    """Raises ConfigError where `confidence` is not a number in (0, 1]."""
    if isinstance(confidence, bool) or not isinstance(confidence, int | float) or not 0 < confidence <= 1:
        raise ConfigError(f"confidence must be a number in (0, 1], got {confidence!r}")
