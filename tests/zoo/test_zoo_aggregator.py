"""The aggregator is trained on the prompts of `aggregate`, and no expert answers a question twice."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path

import pytest

from coe.compose.synthesis import synthesis
from coe.config import Config
from coe.errors import EngineError
from coe.orchestrator import Orchestrator
from coe.types import Chunk, GenerateRequest, NotesWanted, Usage
from examples.zoo.aggregator import aggregator_rows, questions, request
from examples.zoo.families import PARTS, Row, Split
from examples.zoo.remembered import Remembered, dtype_of
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot

F32 = "torch.float32"
EXPERTS = ("fields", "dates", "units", "sentiment", "intent", "sql")


def snapshot(digest: str = "sha256:1") -> Snapshot:
    specs = [ExpertSpec(name=name, kind=Kind.MODEL, source="fake://echo", digest=f"{digest}{name}") for name in EXPERTS]
    return Snapshot(version=1, experts={spec.name: spec for spec in specs})


class Experts:
    """Each expert answers the rows it knows correctly, after some reasoning, and other rows with its name."""

    def __init__(self, fail: str | None = None) -> None:
        self.fail, self.asked = fail, list[tuple[str, str]]()
        self.parts = {row.prompt: dict(zip(pair.experts, row.extras[PARTS], strict=True)) for row, pair in ROWS}

    async def __call__(self, expert: str, asked: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        prompt = asked.messages[-1].content
        self.asked.append((expert, prompt))
        if expert == self.fail:
            raise EngineError(f"{expert} is gone")
        yield Chunk("<think>hm</think> ")
        yield Chunk(self.parts[prompt].get(expert, expert), "stop", Usage(len(prompt), 7))


ROWS = questions(Split.TRAIN, 6, seed=1)
PLAN = [(row, pair, (pair.experts[1], "sql", pair.experts[0])) for row, pair in ROWS]


async def test_a_training_row_is_what_the_composition_shows_with_the_same_right_answer() -> None:
    rows = await aggregator_rows(PLAN, Experts(), snapshot())
    for made, (row, pair, _) in zip(rows, PLAN, strict=True):
        first, second = row.extras[PARTS]
        shown = synthesis(request(row, pair), [second, "sql", first])
        assert made == Row(shown.messages[-1].content, row.answer, row.extras)
        assert made.prompt.startswith(f"{row.prompt}\n\nExperts answered:\n1. {second}\n2. sql\n3. {first}\n")


async def test_an_expert_that_fails_stops_it() -> None:
    with pytest.raises(EngineError, match="sql is gone"):
        await aggregator_rows(PLAN, Experts(fail="sql"), snapshot())


async def said(ask: Remembered, expert: str, asked: GenerateRequest) -> list[Chunk]:
    return [chunk async for chunk in ask(expert, asked)]


async def test_an_answer_is_remembered_over_runs_and_by_the_expert_s_content(tmp_path: Path) -> None:
    file, experts = tmp_path / "deep" / "answers.jsonl", Experts()
    (row, pair), counted = ROWS[0], list[int]()
    asked = request(row, pair)
    first = Remembered(experts, snapshot(), F32, file, counted.append)
    whole = [Chunk(f"<think>hm</think> {row.extras[PARTS][0]}", "stop", Usage(len(row.prompt), 7))]
    assert await said(first, "fields", asked) == await said(first, "fields", asked) == whole
    with file.open("a") as out:
        out.write('{"key": "cut off in the mid')
    assert await said(Remembered(experts, snapshot(), F32, file), "fields", asked) == whole
    assert (len(experts.asked), counted) == (1, [1])

    await said(Remembered(experts, snapshot(digest="sha256:2"), F32, file), "fields", asked)
    await said(Remembered(experts, snapshot(), F32, file), "dates", asked)
    await said(Remembered(experts, snapshot(), F32, file), "fields", request(*ROWS[3]))
    assert len(experts.asked) == 4
    await said(Remembered(experts, snapshot(), "torch.bfloat16", file), "fields", asked)
    assert len(experts.asked) == 5
    assert await said(Remembered(experts, snapshot(), F32, file), "fields", asked) == whole
    assert len(experts.asked) == 5


def test_the_type_of_an_engine_is_that_of_this_machine() -> None:
    assert dtype_of(Config.model_validate({"engines": {"hf": {"device": "cpu", "dtype": "float32"}}})) == F32
    assert dtype_of(Config.model_validate({"engines": {"hf": {"device": "cpu", "dtype": "auto"}}})) in (
        F32,
        "torch.bfloat16",
    )


async def test_failures_are_not_remembered(tmp_path: Path) -> None:
    experts, asked = Experts(fail="fields"), request(*ROWS[0])
    ask = Remembered(experts, snapshot(), F32, tmp_path / "answers.jsonl")
    with pytest.raises(EngineError):
        await said(ask, "fields", asked)
    experts.fail = None
    orchestrator = Orchestrator(snapshot(), {}, ask=ask)
    assert await orchestrator.answer(asked, model="fields").text() == (await said(ask, "fields", asked))[0].text
    assert len(experts.asked) == 2


async def test_calls_for_notes_are_made_every_time(tmp_path: Path) -> None:
    experts, asked = Experts(), request(*ROWS[0])
    ask = Remembered(experts, snapshot(), F32, tmp_path / "answers.jsonl")
    wanted = replace(asked, wants="latent", notes_wanted=NotesWanted())
    for each in (wanted, wanted, replace(asked, notes=()), replace(asked, notes=())):
        await said(ask, "fields", each)
    assert (len(experts.asked), (tmp_path / "answers.jsonl").exists()) == (4, False)
