"""`aggregate`: all chosen experts answer, and one more expert combines their answers into one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from coe.answers.thinking import without_thoughts
from coe.compose.answer_key import auto
from coe.compose.ballots import Ballot, calls, cast, drawn, elected, give_up, only_one, strength, together
from coe.compose.base import Done, ExpertCall, ExpertCalls, Final, no_expert
from coe.compose.notes import failures, refusals
from coe.compose.settings import check_count, check_name, check_seconds
from coe.compose.synthesis import TEMPLATE, check_template, shortened, synthesis
from coe.errors import ConfigError, ContextLengthExceeded
from coe.seam import public_text
from coe.types import DEFAULT_MAX_TOKENS, Answer, Failure, GenerateRequest
from routers.base import RoutingDecision

DEFAULT = "default"
"""The label of the aggregator for all labels without one of their own."""
MOST_CALLS = 4
"""Most calls to an aggregator whose context cannot hold the answers; each call shows less of them."""
LEAST_CHARACTERS = 16
"""Answers are not cut shorter than this."""
_MARGIN, _MOST_KEPT, _LEAST_KEPT = 0.8, 0.75, 0.125
"""Characters are not tokens: the next call shows _MARGIN of what seems to fit, but at most _MOST_KEPT of the previous
call, so that it differs, and at least _LEAST_KEPT, so that one bad estimate does not discard an answer."""


@dataclass(frozen=True, slots=True)
class Aggregate:
    """Experts side by side, then an aggregator that is shown their answers (Symbolic-MoE, arXiv 2503.05641).

    The aggregator's answer is final, and streams. As in the paper, it sees the request and the answers in the
    decision's order, without thoughts (the text before a closing think tag); the answer of an expert that was drawn
    twice is shown twice. Experts that fail, refuse, pass their deadline or give an empty answer are left out and named
    in `Answer.notes`. A single remaining answer still goes to the aggregator, which may improve it, unless it is its
    own.

    If the answers exceed its context, the aggregator is called again with the longest answers cut; the notes name them.
    How far is computed from the engine's error, which has the exact token counts: a composition is pure and holds no
    tokenizer, and in a batch the error's numbers are stored with the call. If the question alone does not fit, or the
    aggregator fails or is not allowed, the result is a majority vote of the experts (as `vote` with the key `auto`; the
    best expert's answer if all differ), with the reason in the notes: experts have answered, and an error would discard
    that.

    aggregator: an expert; or label -> expert with a `default`, chosen by the decision's label.
    template: the prompt of the aggregator, with the placeholders {question} and {answers}.
    expert_deadline_s: seconds for each expert of the decision, loading included. A batch ignores it.
    max_answer_tokens: most new tokens of each expert of the decision; by default the request's.
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
        """The possible aggregators."""
        named = [self.aggregator] if isinstance(self.aggregator, str) else self.aggregator.values()
        return tuple(dict.fromkeys(named))

    def step(self, request: GenerateRequest, decision: RoutingDecision, done: Done) -> ExpertCalls | Final:
        """Calls to the experts; then to the aggregator, repeated with less if necessary; then its answer."""
        decision, counts = drawn(request, decision)
        if not decision.experts:
            raise no_expert(decision)
        aggregator = self._aggregator(decision)
        if not done:
            if decision.experts == (aggregator,):
                return only_one(request, decision)  # nothing to aggregate
            return calls(self._recruiting(request), decision, range(len(decision.experts)))
        panel = _Panel(decision, counts, done)
        if not panel.ballots:
            raise give_up(decision, done)
        if panel.answered in ([], [aggregator]):
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
        """The next call to the aggregator, or the answer."""
        shown = _Shown(panel.answers)
        for attempt in range(1, MOST_CALLS + 1):
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
        why = f"{aggregator} could not aggregate: {public_text(outcome.error)}"
        return panel.vote(f"{why}; the answer is the majority of the experts")


@dataclass(frozen=True)
class _Panel:
    """The answers of a decision's experts. `counts`: how often each was drawn."""

    decision: RoutingDecision
    counts: Sequence[int]
    done: Done

    @cached_property
    def ballots(self) -> list[Ballot]:
        """Of all experts that answered."""
        return cast(self.done, _key)

    @cached_property
    def answers(self) -> list[tuple[str, str]]:
        """`(expert, text)` of each answer that is not empty and no refusal, as often as its expert was drawn."""
        texts = [(b, without_thoughts(b.answer.text)) for b in self.ballots if not b.refused]
        return [(b.answer.expert, text) for b, text in texts if text for _ in range(self.counts[b.position])]

    @property
    def answered(self) -> list[str]:
        """The experts with an answer that is not empty and no refusal, once for each answer."""
        answered = (ballot for ballot in self.ballots if not ballot.refused)
        return [ballot.answer.expert for ballot in answered if without_thoughts(ballot.answer.text)]

    @property
    def notes(self) -> tuple[str, ...]:
        """The experts that failed, that refused, and those with an empty answer."""
        recruits = {name: outcome for name, outcome in self.done.items() if name.startswith("0.")}
        silent = {ballot.answer.expert: None for ballot in self.ballots if not without_thoughts(ballot.answer.text)}
        return (*failures(recruits), *refusals(recruits), *(f"{expert} gave an empty answer" for expert in silent))

    def vote(self, *more: str) -> Final:
        """The majority answer, with additional notes."""
        final = elected(self.decision, self.ballots, strength(self.ballots, self.counts), self.done)
        return Final(replace(final.answer, notes=(*self.notes, *more)))


@dataclass(frozen=True, slots=True)
class _Shown:
    """The answers as the aggregator sees them: of each at most `limit` characters."""

    answers: Sequence[tuple[str, str]]
    limit: int | None = None
    why: str = ""

    @property
    def texts(self) -> list[str]:
        """The answers, cut to the limit."""
        return [text if self.limit is None else shortened(text, self.limit) for _, text in self.answers]

    @property
    def notes(self) -> tuple[str, ...]:
        """Which answers are cut, and where."""
        if self.limit is None:
            return ()
        whose = ", ".join(dict.fromkeys(expert for expert, text in self.answers if len(text) > self.limit))
        return (f"the aggregator saw the first {self.limit} characters of the answers of {whose}: {self.why}",)

    def fitting(self, asked: GenerateRequest, error: Exception) -> _Shown | None:
        """Shorter answers that should fit by the numbers of an error; None if shorter ones do not help."""
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
    """The limit for each length so that they sum to `total`: long ones get what short ones leave."""
    left = len(lengths)
    for length in sorted(lengths):
        if length * left >= total:
            break
        total, left = total - length, left - 1
    return int(total / left) if left else max(lengths)


def _key(text: str) -> str | None:
    return auto(without_thoughts(text))


def _ended(request: GenerateRequest, answer: Answer) -> tuple[str, ...]:
    """A note if the context ended the answer, and not the request's limit."""
    limit = request.max_tokens or DEFAULT_MAX_TOKENS
    if answer.finish_reason != "length" or answer.usage.completion_tokens >= limit:
        return ()
    return (f"the context of {answer.expert} ended its answer after {answer.usage.completion_tokens} tokens",)


def _check_aggregator(aggregator: object) -> None:
    """Raises ConfigError unless it is an expert's name, or a mapping of labels to names with a default."""
    if not isinstance(aggregator, Mapping):
        check_name("aggregator", aggregator)
        return
    if DEFAULT not in aggregator:
        labels = ", ".join(map(str, aggregator)) or "nothing"
        raise ConfigError(f"aggregator by label needs `{DEFAULT}`, for all other labels; it has: {labels}")
    for label, expert in aggregator.items():
        check_name(f"aggregator of {label!r}", expert)
