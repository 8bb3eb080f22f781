"""`aggregate`: all chosen experts answer, and one more expert makes one answer of theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from coe.compose.answer_key import auto
from coe.compose.ballots import Ballot, calls, cast, drawn, elected, give_up, only_one, strength, together
from coe.compose.base import Done, ExpertCall, ExpertCalls, Final, nobody
from coe.compose.notes import failures, said
from coe.compose.settings import check_count, check_name, check_seconds
from coe.compose.synthesis import TEMPLATE, check_template, shortened, synthesis, without_thoughts
from coe.errors import ConfigError, ContextLengthExceeded
from coe.types import DEFAULT_MAX_TOKENS, Answer, Failure, GenerateRequest
from routers.base import RoutingDecision

DEFAULT = "default"
"""The label whose aggregator takes every label that has none of its own."""
MOST_ASKS = 4
"""How often an aggregator is asked whose context cannot hold the answers: shorter ones each time."""
LEAST_CHARACTERS = 16
"""Of answers cut shorter than that nothing can be made."""
_MARGIN, _MOST_KEPT, _LEAST_KEPT = 0.8, 0.75, 0.125
"""Characters are not tokens: of the answers this share of what seems to fit is kept, and, each time, between a share of
what was shown that makes a difference and one that gives up no answer for a bad guess."""


@dataclass(frozen=True, slots=True)
class Aggregate:
    """Experts side by side, then an aggregator that is shown what they said (Symbolic-MoE, arXiv 2503.05641).

    Its answer is the answer, and streams. As in the source, it sees the request and the answers in the decision's
    order without their thoughts (what stands before a closing think tag); an expert that was drawn twice is seen twice.
    Who fails, passes its deadline or says nothing is left out, and `Answer.notes` says so; with one answer left the
    aggregator is still asked, since it may mend it, unless that answer is its own.

    Where its context cannot hold the answers, it is asked again with the longest ones cut, by the numbers of its error:
    the notes say whose and where. Where even the question does not fit, where it fails, or where the caller does not
    allow it, the answer is what most of the experts say (as in `vote` with the key `auto`; if all differ that is the
    best expert's), and the notes say why: experts have answered, so there is no reason to return an error.

    aggregator: an expert; or label -> expert with `default`, of which the decision's label picks.
    template: what the aggregator is asked, with the places {question} and {answers}.
    expert_deadline_s: seconds for each expert of the decision, loading included. A batch does not hold to it.
    max_answer_tokens: most new tokens of each of them; left out, as many as the request allows.
    """

    aggregator: str | Mapping[str, str]
    template: str = TEMPLATE
    expert_deadline_s: float | None = None
    max_answer_tokens: int | None = None

    def __post_init__(self) -> None:
        _check_aggregator(self.aggregator)
        check_template(self.template)
        check_seconds("expert_deadline_s", self.expert_deadline_s)
        if self.max_answer_tokens is not None:
            check_count("max_answer_tokens", self.max_answer_tokens, least=1)

    @property
    def experts(self) -> tuple[str, ...]:
        """Whom it may ask to aggregate."""
        named = [self.aggregator] if isinstance(self.aggregator, str) else self.aggregator.values()
        return tuple(dict.fromkeys(named))

    def step(self, request: GenerateRequest, decision: RoutingDecision, done: Done) -> ExpertCalls | Final:
        """The experts' calls; the aggregator's, again with less where it has to be; its answer."""
        decision, counts = drawn(request, decision)
        if not decision.experts:
            raise nobody(decision)
        aggregator = self._aggregator(decision)
        if not done:
            if decision.experts == (aggregator,):
                return only_one(request, decision)  # nothing to aggregate
            return calls(self._recruiting(request), decision, range(len(decision.experts)))
        panel = _Panel(decision, counts, done)
        if not panel.ballots:
            raise give_up(decision, done)
        if panel.speakers in ([], [aggregator]):
            return panel.vote()
        return self._aggregated(request, aggregator, panel)

    def _aggregator(self, decision: RoutingDecision) -> str:
        if isinstance(self.aggregator, str):
            return self.aggregator
        return self.aggregator.get(decision.label or DEFAULT, self.aggregator[DEFAULT])

    def _recruiting(self, request: GenerateRequest) -> GenerateRequest:
        return replace(
            request,
            deadline_s=self.expert_deadline_s or request.deadline_s,
            max_tokens=self.max_answer_tokens or request.max_tokens,
        )

    def _aggregated(self, request: GenerateRequest, aggregator: str, panel: _Panel) -> ExpertCalls | Final:
        """The aggregator's next call, or the answer."""
        shown = _Shown(panel.answers)
        for attempt in range(1, MOST_ASKS + 1):
            call = ExpertCall(f"{attempt}.aggregator", aggregator, synthesis(request, shown.texts, self.template))
            outcome = panel.done.get(call.id)
            if outcome is None:
                return ExpertCalls((call,), last=True, notes=panel.notes + shown.notes)
            if isinstance(outcome, Answer):
                return Final(together(outcome, panel.done, panel.notes + shown.notes + _ended(request, outcome)))
            shorter = shown.fitting(call.request, outcome.error)
            if shorter is None:
                break
            shown = shorter
        assert isinstance(outcome, Failure)
        why = f"{aggregator} could not aggregate: {said(outcome.error)}"
        return panel.vote(f"{why}; this is what most of the experts say")


@dataclass(frozen=True)
class _Panel:
    """What the experts of a decision said. `counts`: how often each was drawn."""

    decision: RoutingDecision
    counts: Sequence[int]
    done: Done

    @cached_property
    def ballots(self) -> list[Ballot]:
        """Of all that answered."""
        return cast(self.done, _key)

    @cached_property
    def answers(self) -> list[tuple[str, str]]:
        """`(expert, text)` of those that said something, as often as they were drawn."""
        texts = [(ballot, without_thoughts(ballot.answer.text)) for ballot in self.ballots]
        return [(b.answer.expert, text) for b, text in texts if text for _ in range(self.counts[b.position])]

    @property
    def speakers(self) -> list[str]:
        """Who said something: once for each answer, however often it counts."""
        return [ballot.answer.expert for ballot in self.ballots if without_thoughts(ballot.answer.text)]

    @property
    def notes(self) -> tuple[str, ...]:
        """Who failed, and who said nothing."""
        recruits = {name: outcome for name, outcome in self.done.items() if name.startswith("0.")}
        silent = {ballot.answer.expert: None for ballot in self.ballots if not without_thoughts(ballot.answer.text)}
        return (*failures(recruits), *(f"{expert} said nothing" for expert in silent))

    def vote(self, *more: str) -> Final:
        """What most of them say, with these notes beside their own."""
        final = elected(self.decision, self.ballots, strength(self.ballots, self.counts), self.done)
        return Final(replace(final.answer, notes=(*self.notes, *more)))


@dataclass(frozen=True, slots=True)
class _Shown:
    """What the aggregator is shown of the answers: of each at most `limit` characters."""

    answers: Sequence[tuple[str, str]]
    limit: int | None = None
    why: str = ""

    @property
    def texts(self) -> list[str]:
        """As far as they are shown."""
        return [text if self.limit is None else shortened(text, self.limit) for _, text in self.answers]

    @property
    def notes(self) -> tuple[str, ...]:
        """Whose answers are cut, and where."""
        if self.limit is None:
            return ()
        whose = ", ".join(dict.fromkeys(expert for expert, text in self.answers if len(text) > self.limit))
        return (f"the aggregator saw the first {self.limit} characters of what was said by {whose}: {self.why}",)

    def fitting(self, asked: GenerateRequest, error: Exception) -> _Shown | None:
        """Less, so that it fits by the numbers of an error; None where less does not help."""
        if not isinstance(error, ContextLengthExceeded):
            return None
        room = asked.max_tokens or min(DEFAULT_MAX_TOKENS, error.context_length // 4)
        excess = max(1, error.prompt_tokens + room - error.context_length)
        characters = len(asked.prompt or "") + sum(len(message.content) for message in asked.messages)
        now = sum(map(len, self.texts))
        fits = _MARGIN * (now - excess * characters / max(1, error.prompt_tokens))
        limit = _level([len(text) for _, text in self.answers], max(min(fits, _MOST_KEPT * now), _LEAST_KEPT * now))
        if limit < LEAST_CHARACTERS:
            return None
        why = f"the context of {error.expert} holds {error.context_length} tokens"
        return replace(self, limit=limit, why=why)


def _level(lengths: Sequence[int], total: float) -> int:
    """The share of each where they have `total` in all, and what the short ones leave goes to the long ones."""
    left = len(lengths)
    for length in sorted(lengths):
        if length * left >= total:
            break
        total, left = total - length, left - 1
    return int(total / left) if left else max(lengths)


def _key(text: str) -> str | None:
    return auto(without_thoughts(text))


def _ended(request: GenerateRequest, answer: Answer) -> tuple[str, ...]:
    """A note, where it is not the request that ended the answer."""
    limit = request.max_tokens or DEFAULT_MAX_TOKENS
    if answer.finish_reason != "length" or answer.usage.completion_tokens >= limit:
        return ()
    return (f"the context of {answer.expert} ended its answer after {answer.usage.completion_tokens} tokens",)


def _check_aggregator(aggregator: object) -> None:
    """Raises ConfigError where it is neither an expert's name nor a mapping of labels to some, with a default."""
    if not isinstance(aggregator, Mapping):
        check_name("aggregator", aggregator)
        return
    if DEFAULT not in aggregator:
        labels = ", ".join(map(str, aggregator)) or "nothing"
        raise ConfigError(f"aggregator by label needs `{DEFAULT}`, for every other label; it has: {labels}")
    for label, expert in aggregator.items():
        check_name(f"aggregator of {label!r}", expert)
