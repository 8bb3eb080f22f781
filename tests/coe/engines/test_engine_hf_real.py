"""The hf engine on a real small model: SmolLM2-135M-Instruct."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from engine_models import say

from coe.engines.hf.engine import HFEngine
from coe.types import GenerateRequest
from registry.spec import ExpertSpec, Kind
from routers.base import Message

pytestmark = pytest.mark.integration


def ask(text: str, **fields: object) -> GenerateRequest:
    return GenerateRequest(messages=(Message("user", text),), max_tokens=16, **fields)  # type: ignore[arg-type]


async def test_it_answers_streams_and_stops(smollm2: Path) -> None:
    engine = HFEngine(device="cpu")
    expert = await engine.load(ExpertSpec(name="smollm2", kind=Kind.MODEL, source=str(smollm2)), smollm2)
    try:
        paris, cut, special, plain, sampled, again = await asyncio.gather(
            say(expert, ask("What is the capital of France?")),
            say(expert, ask("What is the capital of France?", stop=(" France",))),
            say(expert, ask("What is the capital of France?", stop=(" Paris.<|im_end|>", "<|im_start|>"))),
            say(expert, GenerateRequest(prompt="The capital of France is", max_tokens=1)),
            say(expert, ask("Tell me a story.", temperature=0.9, top_p=0.9, seed=1)),
            say(expert, ask("Tell me a story.", temperature=0.9, top_p=0.9, seed=1)),
        )
    finally:
        await engine.unload(expert)
    assert (paris.text, paris.reason) == ("The capital of France is Paris.", "stop")
    assert len(paris.chunks) > 1
    assert paris.usage is not None
    assert paris.usage.completion_tokens == 8  # the end token included
    assert (cut.text, cut.reason) == ("The capital of", "stop")
    assert (special.text, special.reason, special.usage) == ("The capital of France is", "stop", paris.usage)
    assert (plain.text, plain.reason) == (" Paris", "length")
    assert sampled.text == again.text
    assert sampled.text
