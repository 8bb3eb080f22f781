"""Schemas that take long to compile delay no others, and few of them wait."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from engine_models import say
from jsonschema import Draft202012Validator
from llguidance import LLMatcher

from coe.engines.constrained.checker import CheckLimits, GrammarChecker, SlowGrammar
from coe.engines.hf.expert import HFExpert
from coe.errors import Overloaded
from coe.types import GenerateRequest
from routers.base import Message

FLAT: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}},
    "required": ["name"],
    "additionalProperties": False,
}
OTHER = {"type": "array", "items": {"enum": [1, 2, 3]}, "minItems": 1, "maxItems": 3}


def request(schema: Mapping[str, Any], max_tokens: int = 300) -> GenerateRequest:
    given = {"name": "answer", "schema": schema}
    return GenerateRequest((Message("user", "the capital"),), max_tokens=max_tokens, format="json", json_schema=given)


def is_valid(text: str, schema: Mapping[str, Any]) -> bool:
    return Draft202012Validator(schema).is_valid(json.loads(text))


@dataclass
class Slow:
    """A checker for which schemas with the word `slow` take until they are `released`."""

    real: GrammarChecker
    released: threading.Event = field(default_factory=threading.Event)
    started: list[str] = field(default_factory=list)

    def problem(self, grammar: str) -> str | None:
        if "slow" in grammar:
            raise SlowGrammar
        return self.real.problem(grammar)

    def slow_problem(self, grammar: str) -> str | None:
        self.started.append(grammar)
        assert self.released.wait(30)
        return self.real.slow_problem(grammar)


@pytest.fixture
def slow(expert: HFExpert) -> Iterator[Slow]:
    grammars = expert._preparation.grammars
    grammars._checker = found = Slow(grammars._checker)  # type: ignore[assignment]
    yield found
    found.released.set()


def slow_schema(number: int) -> dict[str, Any]:
    return {**FLAT, "title": f"slow {number}"}


async def test_a_slow_schema_delays_neither_kept_nor_new_ones(expert: HFExpert, slow: Slow) -> None:
    assert is_valid((await say(expert, request(FLAT))).text, FLAT)
    waiting = [asyncio.create_task(say(expert, request(slow_schema(number)))) for number in range(4)]
    async with asyncio.timeout(30):
        assert is_valid((await say(expert, request(FLAT))).text, FLAT)
        assert is_valid((await say(expert, request(OTHER))).text, OTHER)
    assert not any(task.done() for task in waiting)
    slow.released.set()
    assert all(is_valid(answer.text, FLAT) for answer in await asyncio.gather(*waiting))


async def test_requests_with_the_same_slow_schema_wait_for_one_compilation(expert: HFExpert, slow: Slow) -> None:
    waiting = [asyncio.create_task(say(expert, request(slow_schema(0)))) for _ in range(12)]
    async with asyncio.timeout(30):
        while not slow.started:  # set in a thread  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    waiting[0].cancel()
    slow.released.set()
    answers = await asyncio.gather(*waiting[1:])
    assert all(is_valid(answer.text, FLAT) for answer in answers) and len(slow.started) == 1


async def test_few_slow_schemas_wait_at_a_time(expert: HFExpert, slow: Slow) -> None:
    waiting = [asyncio.create_task(say(expert, request(slow_schema(number)))) for number in range(9)]
    async with asyncio.timeout(30):
        done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    [refused] = [task.exception() for task in done]
    assert isinstance(refused, Overloaded) and "8 JSON schemas are waiting to be compiled" in str(refused)
    slow.released.set()
    answers = await asyncio.gather(*(task for task in waiting if task not in done))
    assert len(answers) == 8 and all(is_valid(answer.text, FLAT) for answer in answers)


async def test_a_large_schema_is_compiled_in_the_second_attempt(expert: HFExpert) -> None:
    names = [f"p{i:05}" for i in range(2_500)]
    large = {"type": "object", "properties": {name: {"type": "null"} for name in names}, "required": names}
    grammar = LLMatcher.grammar_from_json_schema(json.dumps(large))
    checker = GrammarChecker(CheckLimits(quick_cpu_s=0.02))
    with pytest.raises(SlowGrammar, match="more than 0.02 s"):
        checker.problem(grammar)
    assert checker.problem('start: "a"') is None  # with another process
    assert checker.slow_problem(grammar) is None
    checker.close()
    assert (await say(expert, request(large, max_tokens=4))).reason == "length"
