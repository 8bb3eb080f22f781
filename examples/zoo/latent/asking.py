"""The answers of a method to the rows of a bench, kept as they come, with their tokens and operations."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from coe.host import Host
from coe.orchestrator import AskExpert, Orchestrator, Reply
from coe.types import Answer, Chunk, GenerateRequest
from examples.zoo.families import Family, Row, Split
from examples.zoo.latent.benches import Bench
from examples.zoo.latent.clock import Clock
from examples.zoo.latent.service import COMPOSED, TRAINED
from examples.zoo.latent.ways import Way
from examples.zoo.remembered import Remembered
from examples.zoo.scoring import grades
from registry.store import Snapshot
from routers.base import Message

_CHUNK: Final = 20
_TIMED: Final = 6


@dataclass(frozen=True, slots=True)
class Scored:
    """One answer.

    Attributes:
        score: in [0, 1].
        prompt_tokens, completion_tokens: of all expert calls.
        flops: 2 x active parameters x tokens, of all expert calls.
    """

    text: str
    score: float
    prompt_tokens: int
    completion_tokens: int
    flops: float


def request(row: Row, family: Family) -> GenerateRequest:
    """The query as a request."""
    return GenerateRequest(messages=(Message("user", row.prompt),), max_tokens=family.max_tokens)


def remembering(host: Host, dtype: str, file: Path) -> AskExpert:
    """Calls experts; the zoo's experts answer a request once for all methods, a run's own experts every time.

    Args:
        dtype: see `Remembered`.
    """
    remembered = Remembered(host.ask, host.snapshot, dtype, file)

    def ask(expert: str, asked: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        return host.ask(expert, asked) if expert in (TRAINED, COMPOSED) else remembered(expert, asked)

    return ask


class Answers:
    """The scored answers of a run in a file of JSON lines, by split, family and number of the row."""

    def __init__(self, file: Path) -> None:
        self._file, self._known = file, dict[tuple[str, str, int], Scored]()
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists():
            whole = file.read_text(encoding="utf-8").rpartition("\n")[0]  # what was cut off in its last line is lost
            file.write_text(whole + "\n" if whole else "", encoding="utf-8")
            for line in map(json.loads, whole.splitlines()):
                split, family, number = line.pop("row")
                self._known[split, family, number] = Scored(**line)

    def missing(self, split: Split, family: str, n: int) -> list[int]:
        """Numbers of the rows without an answer."""
        return [i for i in range(n) if (str(split), family, i) not in self._known]

    def add(self, split: Split, family: str, found: Mapping[int, Scored]) -> None:
        """Keep answers by number of the row."""
        with self._file.open("a", encoding="utf-8") as out:
            for number, scored in found.items():
                out.write(json.dumps({"row": [split, family, number]} | asdict(scored)) + "\n")
                self._known[str(split), family, number] = scored

    def of(self, split: Split, family: str) -> list[Scored]:
        """The answers of a family, in the order of its rows."""
        rows = sorted(number for s, f, number in self._known if (s, f) == (str(split), family))
        return [self._known[str(split), family, number] for number in rows]


async def answer_all(
    bench: Bench,
    splits: Iterable[Split],
    way: Way,
    orchestrator: Orchestrator,
    answers: Answers,
    clock: Clock,
    report: Callable[[str], None] = lambda _: None,
) -> None:
    """Answer every row that has no answer yet. Raises OutOfTime between two groups of rows."""
    for split in splits:
        for family, (name, rows) in zip(bench.families, bench.scored(split).items(), strict=True):
            missing = answers.missing(split, name, len(rows))
            for numbers in _groups(missing):
                clock.check()
                found = await _answered([rows[i] for i in numbers], family, way, orchestrator)
                answers.add(split, name, dict(zip(numbers, found, strict=True)))
            if missing:
                right = [scored.score for scored in answers.of(split, name)]
                report(f"{name}, {split}: {sum(right) / len(right):.1%}")


async def seconds_alone(bench: Bench, way: Way, orchestrator: Orchestrator) -> float:
    """Median seconds of a query asked alone, with everything loaded by a first one that is not counted."""
    rows = [
        (row, family)
        for family, asked in zip(bench.families, bench.scored(Split.TEST).values(), strict=True)
        for row in asked[: -(-_TIMED // len(bench.families))]
    ]
    times = []
    for row, family in [rows[0], *rows]:
        began = time.perf_counter()
        await way.of(family).reply(request(row, family), orchestrator).text()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def flops_of(reply: Reply, snapshot: Snapshot) -> float:
    """2 x active parameters x tokens of every call of a reply.

    The members of a composed expert without stages compute the same tokens each: its usage counts them all, so a token
    costs the mean of the members' parameters. A staged one computes with its first member; its peers are calls of
    their own.
    """
    return sum(
        2.0 * _active(outcome.expert, snapshot) * (outcome.usage.prompt_tokens + outcome.usage.completion_tokens)
        for outcome in reply.done.values()
        if isinstance(outcome, Answer)
    )


def _active(name: str, snapshot: Snapshot) -> float:
    spec = snapshot.experts[name]
    if spec.is_staged:
        return _active(spec.members[0], snapshot)
    if spec.members:
        return statistics.fmean(_active(member, snapshot) for member in spec.members)
    return float(spec.parameters_active or 0)


def _groups(numbers: Sequence[int]) -> Iterator[Sequence[int]]:
    return (numbers[start : start + _CHUNK] for start in range(0, len(numbers), _CHUNK))


async def _answered(rows: Sequence[Row], family: Family, way: Way, orchestrator: Orchestrator) -> list[Scored]:
    replies = [way.of(family).reply(request(row, family), orchestrator) for row in rows]
    texts = await asyncio.gather(*(reply.text() for reply in replies))
    found = []
    for reply, text, score in zip(replies, texts, grades(family, rows, texts), strict=True):
        assert reply.answer is not None  # the chunks were read to their end
        usage = reply.answer.usage
        flops = flops_of(reply, orchestrator.snapshot)
        found.append(Scored(text, score, usage.prompt_tokens, usage.completion_tokens, flops))
    return found
