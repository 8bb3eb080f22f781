"""A batch without its experts: really routed and stepped, answered by stand-ins, to count the calls.

The batch's own code (`run.Batch`, `parts`) does the work, in a temporary folder, so no second planner can disagree with
the run. Only the executor differs. A stand-in's answer has the length that the expert's may have. All answers of a
rehearsal differ, or all are equal: a composition that stops early on agreement makes its most, or its fewest, calls.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from coe.batch.answering import WorkReport
from coe.batch.budget import most_new_tokens
from coe.batch.parts import (
    Job,
    PartRouter,
    PlannedPart,
    copy_routed,
    planned_stage,
    read_calls,
    routing_errors,
    step_part,
    write_answers,
)
from coe.batch.records import dump_outcome
from coe.batch.source import Split
from coe.batch.stages import WorkItem
from coe.compose import ExpertCall
from coe.orchestrator import Orchestrator, query_of
from coe.runs.storage import Folder
from coe.types import DEFAULT_MAX_TOKENS, Answer, GenerateRequest, Usage
from routers.constraints import context_length, estimate_tokens

_LETTERS = ("klmnopqrst", "uvwxyzfghi")
"""Letters of the stand-ins' answers, in turns: neither options nor numbers, which answer keys would extract, and never
one letter twice in a row, so that all answers have as many tokens."""
_DIGITS = 10
"""Letters of an answer: equal and different answers have the same length."""
_WORD_TOKENS = 5
"""Tokens of a word of that many letters."""


@dataclass(slots=True)
class Demand:
    """Calls to one expert in a work item, and their tokens.

    Attributes:
        prompt_tokens: an estimate (`routers.constraints.estimate_tokens`).
        tokens_at_most: new tokens by the limits of the requests.
        tokens: expected new tokens; None where the mean length of the expert's answers is unknown.
        too_long: calls that probably do not fit the expert's context.
    """

    calls: int = 0
    prompt_tokens: int = 0
    tokens_at_most: int = 0
    tokens: float | None = 0.0
    too_long: int = 0

    def __add__(self, other: Demand) -> Demand:
        return Demand(
            self.calls + other.calls,
            self.prompt_tokens + other.prompt_tokens,
            self.tokens_at_most + other.tokens_at_most,
            None if self.tokens is None or other.tokens is None else self.tokens + other.tokens,
            self.too_long + other.too_long,
        )


@dataclass(slots=True)
class PlannedItem:
    """A work item: a residency, and the calls to its experts."""

    residency: str
    experts: dict[str, Demand] = field(default_factory=dict)


class Rehearsal:
    """An executor (`run.Executor`) that calls no expert and records the calls.

    Args:
        router: routes the input.
        mean_tokens: mean new tokens of experts' answers, where known.

    Attributes:
        agree: whether all answers are equal.
        stages: the work items of each stage, in order.
        errors: rows that fail before any call, by the code of their error.
    """

    def __init__(self, hosts: int, router: Orchestrator, mean_tokens: Mapping[str, float]) -> None:
        self.hosts, self.agree = hosts, False
        self.stages: list[list[PlannedItem]] = []
        self.errors: Counter[str] = Counter()
        self._router, self._mean_tokens = router, mean_tokens
        self._routed: list[tuple[PlannedPart, Folder]] = []

    def agreeing(self) -> Rehearsal:
        """A second rehearsal of the same routed input, with equal answers."""
        other = Rehearsal(self.hosts, self._router, self._mean_tokens)
        other.agree, other._routed = True, self._routed
        return other

    def route(self, job: Job, bundles: Sequence[tuple[Split, ...]]) -> Iterator[PlannedPart]:
        """Route in this process, or copy what the first rehearsal routed."""
        if self._routed:
            for routed, folder in self._routed:
                stepped = planned_stage(folder, routed.part, stage=0) or routed  # assigned since it was routed
                copy_routed(folder, job.folder, stepped.part)
                yield stepped
            return
        router = PartRouter(job, self._router)
        for bundle in bundles:
            for stepped in router.route(bundle):
                if job.budget is None:
                    self.errors += routing_errors(job.folder, stepped.part)
                self._routed.append((stepped, job.folder))
                yield stepped

    def step(self, job: Job, stage: int, parts: Sequence[int]) -> Iterator[PlannedPart]:
        """BatchPlan the stage of each part."""
        for part in parts:
            stepped = step_part(job, part, stage)
            if stage == 0:
                self.errors += routing_errors(job.folder, part)
            yield stepped

    def answer(self, job: Job, stage: int, items: Sequence[WorkItem]) -> Iterator[WorkReport]:
        """Write stand-in answers."""
        self.stages.append([])
        for units in items:
            self.stages[-1].append(item := PlannedItem(units[0].residency))
            for unit in units:
                demand = item.experts.setdefault(unit.expert, Demand())
                calls = read_calls(job.folder, stage, unit)
                answers = [(row, call, self._stand_in(job, call, demand)) for row, call in calls]
                records = [dump_outcome(row, call.id, answer) for row, call, answer in answers]
                write_answers(job.folder, stage, unit, records)
                yield WorkReport(done=Counter({unit.expert: unit.calls}))

    def _stand_in(self, job: Job, call: ExpertCall, demand: Demand) -> Answer:
        """An answer in place of the expert's; adds the call to `demand`."""
        spec = job.snapshot.experts[call.expert]
        prompt_tokens = estimate_tokens(query_of(call.request))
        at_most, fits = _limit(call.request, prompt_tokens, context_length(spec, job.snapshot.experts))
        mean = self._mean_tokens.get(call.expert)
        demand.calls += 1
        demand.prompt_tokens += prompt_tokens
        demand.tokens_at_most += at_most
        demand.tokens = None if mean is None or demand.tokens is None else demand.tokens + min(mean, at_most)
        demand.too_long += not fits
        n_tokens = at_most if mean is None else max(1, round(min(mean, at_most)))
        return Answer(call.expert, self._text(call, n_tokens), "stop", Usage(prompt_tokens, n_tokens))

    def _text(self, call: ExpertCall, n_tokens: int) -> str:
        number = 0 if self.agree else zlib.crc32(f"{call.expert} {call.id}".encode())
        word = "".join(_LETTERS[i % 2][int(digit)] for i, digit in enumerate(f"{number:0{_DIGITS}}"))
        return word + " and" * max(0, n_tokens - _WORD_TOKENS)


def _limit(request: GenerateRequest, prompt_tokens: int, context_length: int | None) -> tuple[int, bool]:
    """Largest number of new tokens, and whether prompt and answer fit the context."""
    wanted = request.max_tokens or DEFAULT_MAX_TOKENS
    most = int(most_new_tokens(np.array(wanted), np.array(prompt_tokens), context_length))
    if context_length is None or prompt_tokens + wanted <= context_length:
        return most, True
    return most, request.max_tokens is None and prompt_tokens < context_length
