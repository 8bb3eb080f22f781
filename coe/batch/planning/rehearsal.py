"""A batch without its experts: routed and stepped in earnest, answered by stand-ins, to see what would be asked.

The work of a run is done by the run's own code (`run.Batch`, `parts`), in a folder that is thrown away. Only who
answers is another: a stand-in, whose answer has the length that the expert's may have and says what nobody else says,
or what everybody says. So compositions that stop early on agreement show the most, or the least, that they may ask.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from coe.batch.answering import WorkReport
from coe.batch.parts import (
    Job,
    PartRouter,
    PlannedPart,
    copy_routed,
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
from registry.spec import ExpertSpec
from routers.constraints import ASCII_CHARS_PER_TOKEN, estimate_tokens

_LETTERS = "klmnopqrst"
"""Of which the stand-ins' own words are made: neither options nor numbers, which keys of answers could take for one."""
_DIGITS = 10
"""Letters of a word: whether the stand-ins agree or not, their answers are of the same length."""


@dataclass(slots=True)
class Demand:
    """What one expert is asked in a item.

    Attributes:
        prompt_tokens: estimated (`routers.constraints.estimate_tokens`).
        tokens_at_most: new tokens, by the limits of the requests.
        tokens: new tokens as they are expected; None where nothing is known of the expert's answers.
        too_long: calls that seem not to fit the expert's context.
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
    """The work on one residency, by expert."""

    residency: str
    experts: dict[str, Demand] = field(default_factory=dict)


class Rehearsal:
    """An executor (`run.Executor`) that asks nobody, and keeps what would have been asked.

    Args:
        router: routes the input.
        mean_tokens: of the experts' answers, where that is known.

    Attributes:
        agree: whether all stand-ins say the same.
        stages: the items of each stage, in their order.
        errors: rows that nobody is asked for, by the code of their error.
    """

    def __init__(self, hosts: int, router: Orchestrator, mean_tokens: Mapping[str, float]) -> None:
        self.hosts, self.agree = hosts, False
        self.stages: list[list[PlannedItem]] = []
        self.errors: Counter[str] = Counter()
        self._router, self._mean_tokens = router, mean_tokens
        self._routed: list[tuple[PlannedPart, Folder]] = []

    def agreeing(self) -> Rehearsal:
        """Another one, of the same input, that need not be routed again: all its stand-ins say the same."""
        other = Rehearsal(self.hosts, self._router, self._mean_tokens)
        other.agree, other._routed = True, self._routed
        return other

    def route(self, job: Job, bundles: Sequence[tuple[Split, ...]]) -> Iterator[PlannedPart]:
        """Route in this process, or take over what is routed."""
        if self._routed:
            for stepped, folder in self._routed:
                copy_routed(folder, job.folder, stepped.part)
                yield stepped
            return
        router = PartRouter(job, self._router)
        for bundle in bundles:
            for stepped in router.route(bundle):
                self.errors += routing_errors(job.folder, stepped.part)
                self._routed.append((stepped, job.folder))
                yield stepped

    def step(self, job: Job, stage: int, parts: Sequence[int]) -> Iterator[PlannedPart]:
        """BatchPlan the stage of each part."""
        for part in parts:
            yield step_part(job, part, stage)

    def answer(self, job: Job, stage: int, items: Sequence[WorkItem]) -> Iterator[WorkReport]:
        """Write stand-in answers."""
        self.stages.append([])
        for units in items:
            self.stages[-1].append(item := PlannedItem(units[0].residency))
            for unit in units:
                asked = item.experts.setdefault(unit.expert, Demand())
                calls = read_calls(job.folder, stage, unit)
                answers = [(row, call, self._stand_in(job, call, asked)) for row, call in calls]
                records = [dump_outcome(row, call.id, answer) for row, call, answer in answers]
                write_answers(job.folder, stage, unit, records)
                yield WorkReport(done=Counter({unit.expert: unit.calls}))

    def _stand_in(self, job: Job, call: ExpertCall, asked: Demand) -> Answer:
        """An answer in the expert's place; what it would take is added to `asked`."""
        spec = job.snapshot.experts[call.expert]
        prompt_tokens = estimate_tokens(query_of(call.request))
        at_most, fits = _limit(call.request, prompt_tokens, _context_length(spec, job))
        mean = self._mean_tokens.get(call.expert)
        asked.calls += 1
        asked.prompt_tokens += prompt_tokens
        asked.tokens_at_most += at_most
        asked.tokens = None if mean is None or asked.tokens is None else asked.tokens + min(mean, at_most)
        asked.too_long += not fits
        n_tokens = at_most if mean is None else max(1, round(min(mean, at_most)))
        return Answer(call.expert, self._text(call, n_tokens), "stop", Usage(prompt_tokens, n_tokens))

    def _text(self, call: ExpertCall, n_tokens: int) -> str:
        number = 0 if self.agree else zlib.crc32(f"{call.expert} {call.id}".encode())
        word = "".join(_LETTERS[int(digit)] for digit in f"{number:0{_DIGITS}}")
        return word + " and" * max(0, n_tokens - _DIGITS // ASCII_CHARS_PER_TOKEN)


def _limit(request: GenerateRequest, prompt_tokens: int, context_length: int | None) -> tuple[int, bool]:
    """Most new tokens, and whether the prompt and what is asked for fit the context."""
    wanted = request.max_tokens or DEFAULT_MAX_TOKENS
    if context_length is None or prompt_tokens + wanted <= context_length:
        return wanted, True
    left = max(1, context_length - prompt_tokens)
    return left, request.max_tokens is None and prompt_tokens < context_length


def _context_length(spec: ExpertSpec, job: Job) -> int | None:
    """Of an expert that states none, that of the weights it runs on, the shortest."""
    if spec.context_length is not None:
        return spec.context_length
    experts = job.snapshot.experts
    weights = (experts[name].context_length for name in spec.residency_keys(experts))
    return min((length for length in weights if length is not None), default=None)
