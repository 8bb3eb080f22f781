"""SmolLM2 and adapters of the zoo on vLLM: the answers of the hf engine, token for token, in float32."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from engine_models import Said, adapter_spec, say

from coe.engines.base import Adapter
from coe.engines.hf.engine import HFEngine
from coe.engines.hf.expert import HFExpert
from coe.engines.vllm.engine import VLLMEngine
from coe.engines.vllm.expert import VLLMExpert
from coe.types import GenerateRequest
from registry.digest import digest_of_text
from registry.spec import ExpertSpec, Kind
from routers.base import Message

pytestmark = [pytest.mark.vllm, pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]

ADAPTERS = Path(__file__).parents[3] / "examples" / "zoo" / "adapters"
QUESTIONS = (
    "What is the capital of France?",
    "delete the file old.log",
    "Table birds (id, name, weight). How many birds weigh more than 3?",
)
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture(scope="module")
def smollm2(zoo_bases: Path) -> tuple[ExpertSpec, Path]:
    folder = zoo_bases / "smollm2-135m-instruct"
    return ExpertSpec(
        name="smollm2", kind=Kind.MODEL, source=str(folder), digest=digest_of_text("smollm2"), size_bytes=1
    ), folder


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def expert(smollm2: tuple[ExpertSpec, Path]) -> AsyncIterator[VLLMExpert]:
    engine = VLLMEngine(dtype="float32", kv_cache_bytes=128 * 2**20, max_num_seqs=16, max_loras=3, max_cpu_loras=3)
    slot = await engine.open_slot(engine.shape(smollm2[0]))
    yield await slot.switch(*smollm2)
    await slot.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def hf(smollm2: tuple[ExpertSpec, Path]) -> AsyncIterator[HFExpert]:
    engine = HFEngine(device="cpu", dtype="float32")
    expert = await engine.load(*smollm2)
    yield expert
    await engine.unload(expert)


def ask(text: str, **fields: Any) -> GenerateRequest:
    return GenerateRequest(messages=(Message("user", text),), **{"max_tokens": 24} | fields)


async def test_answers_equal_those_of_the_hf_engine(expert: VLLMExpert, hf: HFExpert) -> None:
    folders = [ADAPTERS / name for name in ("sql", "shell", "dates")]
    adapters = [Adapter(adapter_spec(f, digest=digest_of_text(str(f))), f) for f in folders]
    requests = [(ask(text), adapter) for text in QUESTIONS for adapter in (None, *adapters)]

    async def answers(engine: Any) -> list[Said]:
        return await asyncio.gather(*(say(engine, *request) for request in requests))

    ours, theirs = await answers(expert), await answers(hf)
    assert [(said.text, said.reason, said.usage) for said in ours] == [
        (said.text, said.reason, said.usage) for said in theirs
    ]
    running = await expert.core.live()
    assert 1024 < running.context_length < 8192  # what fits the cache, of the model's 8192
    assert ours[0].text == "The capital of France is Paris."
    assert len({said.text for said in ours[:4]}) > 2


async def test_a_demanded_call_has_arguments_that_satisfy_the_schema_of_the_tool(expert: VLLMExpert) -> None:
    said = await say(expert, ask("Weather in Paris?", tools=(TOOL,), tool_choice="required", max_tokens=60))
    calls = [call for chunk in said.chunks for call in chunk.tool_calls]
    assert said.reason == "tool_calls" and calls[0].name == "get_weather"
    assert isinstance(json.loads("".join(call.arguments for call in calls if call.index == 0))["city"], str)


async def test_an_answer_is_the_json_object_that_was_asked_for(expert: VLLMExpert) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"]}
    said = await say(expert, ask("Capital of France, as JSON", format="json", json_schema={"schema": schema}))
    assert "city" in json.loads(said.text)
