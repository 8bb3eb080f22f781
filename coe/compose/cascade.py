"""`cascade`: experts are called in order until their answers agree well enough."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from coe.compose.answer_key import key_of
from coe.compose.ballots import calls, cast, drawn, elected, give_up, rounds, strength
from coe.compose.base import Done, ExpertCalls, Final
from coe.compose.notes import failures, has_refused
from coe.compose.settings import check_share
from coe.compose.weighted_vote import WeightedVote, evidence, head_start
from coe.types import Answer, GenerateRequest
from routers.base import RoutingDecision

_SLACK = 1e-9
"""Tolerance of comparisons: the order in which votes are summed must not decide."""


@dataclass(frozen=True, slots=True)
class Cascade(WeightedVote):
    """A weighted vote that stops early: cheap and confident answers save calls to the other experts.

    After each round, side s has the summed evidence S_s (see `weighted-vote`), and its answer is right with probability

        P(s) = exp(S_s) / (sum over sides of exp(S) + options not named yet)

    which after one answer equals the estimated quality of its expert. The cascade stops when the strongest side has
    P >= confidence, or when the remaining experts could not outvote it. With confidence 1 the answer is that of
    `weighted-vote`, for fewer calls. Experts are called in the decision's order: cheap first with the `cascade`
    selector, best first with `top-k`.

    Each round calls as many experts as are needed in any case: the fewest whose agreement would stop it. So a cascade
    takes few rounds, and no more calls than one by one. If the first expert's estimate alone suffices, its answer is
    final unless it is a refusal, and streams. A refusal or "I don't know" does not vote and settles nothing.

    Agreement as the criterion to stop: FrugalGPT (arXiv 2305.05176) learns a scorer, mixture-of-thought cascades (arXiv
    2310.03094) count agreeing samples; here the estimated qualities of experts weigh them.

    confidence: in (0, 1]; solve it on training rows with `coe router train --max-calls N --compose cascade`.
    key, options, keep_thinking: as in `weighted-vote`.
    prior: as in `weighted-vote`: each option starts with the evidence of its prior.
    """

    confidence: float = 0.9

    def __post_init__(self) -> None:
        WeightedVote.__post_init__(self)
        check_share("confidence", self.confidence)

    def step(self, request: GenerateRequest, decision: RoutingDecision, done: Done) -> ExpertCalls | Final:
        """The next calls, or the answer if more calls could not change it enough."""
        decision, counts = drawn(request, decision)
        weights, ballots = (
            evidence(decision, self.options, counts),
            cast(done, key_of(self.key, keep_thinking=self.keep_thinking)),
        )
        first, alone = done.get("0.0"), self._needed({}, weights, {}) == 1
        if alone and isinstance(first, Answer) and not (len(weights) > 1 and has_refused(first)):
            return Final(first)
        asked = sum("." in name for name in done)
        ahead = head_start(self.prior, request)
        sides, left = strength(ballots, weights, ahead), weights[asked:]
        if asked and (not left or self._settled(sides, left, ahead)):
            if not ballots:
                raise give_up(decision, done)
            return elected(decision, ballots, sides, done)
        if not left:
            raise give_up(decision, done)
        alone = len(left) == 1 or (alone and not asked)
        count = 1 if alone else self._needed(sides, left, ahead)
        following = calls(request, decision, range(asked, asked + count), round=rounds(done))
        last = alone and not ballots
        return replace(following, last=last, held=last and len(left) > 1, notes=failures(done))

    def _settled(self, sides: Mapping[str, float], left: Sequence[float], ahead: Mapping[str, float]) -> bool:
        """Whether the strongest side reaches the confidence, or experts of these weights cannot outvote it."""
        if not sides:
            return False
        strongest, *rivals = sorted(sides.values(), reverse=True)
        unnamed = [value for key, value in ahead.items() if key not in sides]
        rivals += unnamed if ahead else [0.0] * max(0, self.options - len(sides))
        if strongest > max(rivals, default=0.0) + sum(left) + _SLACK:
            return True
        probability = 1.0 / (1.0 + sum(math.exp(rival - strongest) for rival in rivals))
        return probability >= self.confidence - _SLACK

    def _needed(self, sides: Mapping[str, float], left: Sequence[float], ahead: Mapping[str, float]) -> int:
        """The fewest further experts whose agreement with the leading side would settle it."""
        known = {**ahead, **sides} or {"": 0.0}
        leader = max(known, key=lambda key: known[key])
        for count in range(1, len(left)):
            if self._settled({**sides, leader: known[leader] + sum(left[:count])}, left[count:], ahead):
                return count
        return len(left)
