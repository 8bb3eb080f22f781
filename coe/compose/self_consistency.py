"""`self-consistency`: the best expert answers several times, and its most frequent answer wins."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

from coe.compose.answer_key import KeyKind, key_of
from coe.compose.ballots import poll
from coe.compose.base import Done, ExpertCalls, Final
from coe.compose.settings import check_count, check_temperature
from coe.types import GenerateRequest
from routers.base import RoutingDecision


@dataclass(frozen=True, slots=True)
class SelfConsistency:
    """Majority of n sampled answers of the decision's first expert (arXiv 2203.11171).

    The samples run side by side with the seeds s, s + 1, ..., where s is the request's seed. Without one, s is derived
    from the request's text, so that the same question has the same answer; a request with a temperature above 0 and no
    seed gets new samples each time. Ties go to the first sample. Samples that fail, refuse or have no key do not vote;
    if all fail, the last failure is raised. The paper samples at temperatures of 0.5 to 0.7 and returns the extracted
    answer; here the result is the whole text of the first sample that has it.

    n: samples, at least 2.
    temperature: of the samples, in place of the request's; above 0.
    key: which answers count as the same.
    keep_thinking: compare the thinking text of answers, too.
    """

    n: int = 5
    temperature: float = 0.7
    key: KeyKind = "auto"
    keep_thinking: bool = False

    def __post_init__(self) -> None:
        check_count("n", self.n, least=2)
        check_temperature("temperature", self.temperature)
        key_of(self.key)

    def step(self, request: GenerateRequest, decision: RoutingDecision, done: Done) -> ExpertCalls | Final:
        """All samples, then the count."""
        sampled = replace(request, temperature=self.temperature, seed=_seed(request))
        return poll(
            sampled, self._samples(decision), done, key_of(self.key, keep_thinking=self.keep_thinking), [1.0] * self.n
        )

    def _samples(self, decision: RoutingDecision) -> RoutingDecision:
        """The decision with its first expert n times."""
        if not decision.experts:
            return decision
        return replace(
            decision,
            experts=decision.experts[:1] * self.n,
            weights=(1 / self.n,) * self.n,
            scores=decision.scores[:1] * self.n,
            quality=decision.quality[:1] * self.n,
        )


def _seed(request: GenerateRequest) -> int | None:
    if request.seed is not None or request.temperature:
        return request.seed
    turns = [part for message in request.messages for part in (message.role, message.content)]
    text = "\0".join([*turns, request.prompt or ""])
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:4], "big")
