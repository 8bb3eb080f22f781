"""Batches of several stages, grouped by expert: one load per expert and stage, the answers
of single requests, the same files after any interruption."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from batch_runs import InProcess, Quiet, Stop, records, results, run, write_lines

from coe.compose import COMPOSITIONS, ExpertCall, ExpertCalls, Final
from coe.compose.base import Done
from coe.local import open_local
from coe.types import Answer, GenerateRequest, Usage
from registry.storage import atomic_path
from routers.base import Message, RoutingDecision

MODELS = ("ant", "bee", "cat", "dog", "elk")
ADAPTERS = ("fox", "gnu")
AGGREGATORS = ("cat", "fox", "gnu")
ROWS = 66
CHECKED = len(range(0, ROWS, 5))


class Panel:
    """Two of seven experts answer; one of three merges their answers; a last one checks every fifth row."""

    def step(self, request: GenerateRequest, decision: RoutingDecision, done: Done) -> ExpertCalls | Final:
        number = int(request.messages[-1].content.split()[-1])
        pool = MODELS + ADAPTERS
        if not done:
            two = (pool[number % 7], pool[(number + 3) % 7])
            return ExpertCalls(tuple(ExpertCall(f"0.{i}", expert, request) for i, expert in enumerate(two)))
        said = [outcome.text for outcome in done.values() if isinstance(outcome, Answer)]
        if "1" not in done:
            return self._ask("1", AGGREGATORS[number % 3], said, request, last=number % 5 > 0)
        if number % 5 == 0 and "2" not in done:
            return self._ask("2", "ant", said[-1:], request, last=True)
        usage = [outcome.usage for outcome in done.values() if isinstance(outcome, Answer)]
        total = Usage(sum(u.prompt_tokens for u in usage), sum(u.completion_tokens for u in usage))
        last = done["2" if number % 5 == 0 else "1"]
        assert isinstance(last, Answer)
        return Final(replace(last, usage=total))

    def _ask(self, call: str, expert: str, said: list[str], request: GenerateRequest, *, last: bool) -> ExpertCalls:
        shown = GenerateRequest(messages=(*request.messages, Message("user", " | ".join(said))))
        return ExpertCalls((ExpertCall(call, expert, shown),), last=last)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Memory for two; `fox` and `gnu` are adapters of `elk`."""
    monkeypatch.setitem(COMPOSITIONS, "panel", Panel)
    specs = [
        {"name": name, "kind": "model", "source": f"fake://{'upper' if i % 2 else 'echo'}", "size_bytes": 100}
        for i, name in enumerate(MODELS)
    ]
    specs += [{"name": name, "kind": "adapter", "base": "elk", "source": "fake://upper"} for name in ADAPTERS]
    service: Mapping[str, Any] = {
        "experts": ["experts.yaml"],
        "host": {"budget": 200},
        "policies": {"default": {"expert": "ant", "composition": "panel"}},
        "batch": {"part_rows": 64},
    }
    for name, content in (("experts.yaml", {"experts": specs}), ("service.yaml", service)):
        with atomic_path(tmp_path / name) as path:
            path.write_text(json.dumps(content))
    write_lines(tmp_path / "in.jsonl", [{"id": f"{i:03d}", "prompt": f"row {i}"} for i in range(ROWS)])
    return tmp_path


def go(place: Path, output: str = "out", executor: InProcess | None = None, **options: Any) -> dict[str, Any]:
    return run(place / "service.yaml", place / "in.jsonl", place / output, executor, **options)


def test_each_expert_is_loaded_once_a_stage_and_adapters_of_a_base_together(place: Path) -> None:
    executor = InProcess()
    [session] = go(place, executor=executor)["sessions"]
    first, second, third = executor.items
    assert sorted(first) == [("ant",), ("bee",), ("cat",), ("dog",), ("elk", "fox", "gnu")]
    assert sorted(second) == [("cat",), ("fox", "gnu")] and third == [("ant",)]
    assert session["loads"] == {"ant": 2, "bee": 1, "cat": 2, "dog": 1, "elk": 2}  # hosts end with their stage
    assert session["loaded_bytes"] == 800 and sum(session["answers"].values()) == ROWS * 3 + CHECKED


def test_progress_is_by_expert_in_every_stage(place: Path) -> None:
    watch = Quiet()
    go(place, watch=watch)
    phases = dict(watch.phases)
    aggregated = Counter(AGGREGATORS[i % 3] for i in range(ROWS))
    assert phases["answering, stage 2"] == aggregated and phases["answering, stage 3"] == {"ant": CHECKED}
    for name, totals in phases.items():
        assert {each: watch.done[name, each] for each in totals} == totals


def test_what_is_answered_by_expert_is_what_is_answered_one_by_one(place: Path) -> None:
    go(place)
    rows = records(place / "out")

    async def one_by_one() -> list[Answer]:
        answers = []
        async with open_local(place / "service.yaml") as system:
            for i in range(ROWS):
                reply = system.answer(GenerateRequest(messages=(Message("user", f"row {i}"),)))
                text = await reply.text()
                assert reply.answer is not None and reply.answer.text == text
                answers.append(reply.answer)
        return answers

    for i, answer in enumerate(asyncio.run(one_by_one())):
        row = rows[f"{i:03d}"]
        assert (row["expert"], row["answer"]) == (answer.expert, answer.text)
        assert (row["prompt_tokens"], row["completion_tokens"]) == (
            answer.usage.prompt_tokens,
            answer.usage.completion_tokens,
        )


def test_stopped_at_every_moment_of_every_stage_and_resumed_the_file_is_the_same(place: Path) -> None:
    counting = InProcess(stop_after=10**6)
    go(place, "counted", counting)
    assert counting.left is not None and len(counting.items) == 3
    moments, whole = 10**6 - counting.left, results(place / "counted")
    assert moments > 20
    stages = set()
    for moment in range(moments):
        stopped, output = InProcess(stop_after=moment), f"stopped-{moment}"
        with pytest.raises(Stop):
            go(place, output, stopped)
        stages.add(len(stopped.items))
        go(place, output, resume=True)
        assert results(place / output) == whole
    assert stages == {0, 1, 2, 3}


def test_several_hosts_give_the_same_file_and_a_resumed_run_may_have_another_number_of_them(place: Path) -> None:
    go(place)
    go(place, "three", InProcess(hosts=3))
    with pytest.raises(Stop):
        go(place, "changed", InProcess(hosts=3, stop_after=12))
    go(place, "changed", InProcess(hosts=2), resume=True)
    assert results(place / "three") == results(place / "changed") == results(place / "out")
