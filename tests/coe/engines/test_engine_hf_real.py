"""The hf engine on a real small model: SmolLM2-135M-Instruct."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from engine_models import adapter_spec, save_adapter, say

from coe.engines.base import Adapter
from coe.engines.hf.engine import HFEngine
from coe.types import GenerateRequest
from registry.spec import ExpertSpec, Kind
from routers.base import Message

pytestmark = pytest.mark.integration


def ask(text: str, max_tokens: int = 16, **fields: object) -> GenerateRequest:
    return GenerateRequest(messages=(Message("user", text),), max_tokens=max_tokens, **fields)  # type: ignore[arg-type]


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


async def test_answers_that_join_a_running_batch_are_those_of_each_alone(smollm2: Path, tmp_path: Path) -> None:
    """In float32, since shorter types round by the shape of a batch."""
    engine = HFEngine(device="cpu", dtype="float32", prefill_tokens=64)
    expert = await engine.load(ExpertSpec(name="smollm2", kind=Kind.MODEL, source=str(smollm2)), smollm2)
    folder = save_adapter(tmp_path / "lora", smollm2)
    adapter = Adapter(adapter_spec(folder), folder)
    told = "Rome is in Italy, Oslo is in Norway, and Lima is in Peru. " * 6
    asked = [
        (ask("Tell me a story about a fox.", 32), None),
        (ask("What is the capital of France?", 5), None),
        (ask("What is the capital of France?", 5), adapter),
        (ask(told + "Where is Oslo?", 8), None),  # in parts
        (ask("Tell me a joke.", 10, temperature=0.9, top_p=0.9, seed=3), None),
        (ask(told[:120] + "Where is Lima?", 8, logprobs=1), adapter),
    ]
    try:
        alone = [await say(expert, *each) for each in asked]
        begun = asyncio.Event()

        async def first() -> str:
            texts = []
            async for chunk in expert.generate(*asked[0]):
                texts.append(chunk.text)
                begun.set()
            return "".join(texts)

        task = asyncio.create_task(first())
        await begun.wait()
        others = []
        for each in asked[1:]:
            others.append(asyncio.create_task(say(expert, *each)))
            await asyncio.sleep(0.15)
        joined = await asyncio.gather(*others)
        assert await task == alone[0].text
    finally:
        await engine.unload(expert)
    assert [(said.text, said.usage) for said in joined] == [(said.text, said.usage) for said in alone[1:]]
