"""Tool calls and reasoning of hf experts: rendered, generated, parsed, demanded."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine_models import adapter_spec, model_spec

from coe.chunks import Joined
from coe.engines.base import Adapter
from coe.engines.hf.engine import HFEngine
from coe.engines.hf.expert import HFExpert
from coe.errors import EngineError, Scope
from coe.types import Answer, GenerateRequest
from registry.spec import ExpertSpec, Kind
from routers.base import Message

CHATML = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t.function.name }} {% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}CALL"
    "{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
TEMPLATES = {
    "hermes": CHATML + "{# <tool_call> </think> #}",
    "thinking": CHATML + "<think>\n{# <tool_call> </think> #}",
    "mistral": CHATML + "{# [TOOL_CALLS] #}",
    "mistral-args": CHATML + "{# [TOOL_CALLS] [ARGS] #}",
    "llama3": CHATML + '{# <|start_header_id|> "parameters" #}',
    "harmony": CHATML + "{# <|channel|> <|message|> analysis #}",
    "qwen-xml": CHATML + "{# <tool_call> <function= <parameter= #}",
    "none": CHATML,
}
PLACE = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": PLACE}}
NOW = {"type": "function", "function": {"name": "now", "parameters": {"additionalProperties": False}}}
QUESTION = Message("user", "The weather in Oslo for the next 3 days?")


@pytest.fixture
async def expert(engine: HFEngine, tiny: Path) -> AsyncIterator[HFExpert]:
    loaded = await engine.load(model_spec(tiny), tiny)
    yield loaded
    await engine.unload(loaded)


def with_template(adapters: Sequence[Adapter], folder: Path, template: str) -> Adapter:
    shutil.copytree(adapters[0].path, folder)
    (folder / "chat_template.jinja").write_text(template)
    return Adapter(adapter_spec(folder), folder)


def request(**fields: Any) -> GenerateRequest:
    return GenerateRequest((QUESTION,), **{"tools": (WEATHER, NOW), "max_tokens": 200} | fields)


async def answer(expert: HFExpert, request: GenerateRequest, adapter: Adapter | None = None) -> Answer:
    joined = Joined()
    async for chunk in expert.generate(request, adapter):
        joined.add(chunk)
    return joined.answer("e", chunk)


def script(monkeypatch: pytest.MonkeyPatch, tokenizer: Any, text: str) -> None:
    """Let the model generate this text, whatever its weights."""
    ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]

    def pick(decoding: Any, input_ids: Any, scores: Any) -> Any:
        import torch

        for i, row in enumerate(decoding._rows):
            scores[i] = float("-inf")
            scores[i, ids[min(row.n_generated, len(ids) - 1)]] = 0.0
        return torch.argmax(scores, dim=-1), [None] * len(decoding._rows)

    monkeypatch.setattr("coe.engines.hf.decoding.Decoding._choose", pick)


@pytest.mark.parametrize("name", TEMPLATES)
async def test_a_named_tool_is_called_with_valid_arguments_in_every_format(
    expert: HFExpert, adapters: list[Adapter], tmp_path: Path, name: str
) -> None:
    adapter = with_template(adapters, tmp_path / "a", TEMPLATES[name])
    demanded = request(tool_choice="required", tool_name="get_weather", temperature=1.0, seed=1)
    whole = await answer(expert, demanded, adapter)
    [call] = whole.tool_calls
    arguments = json.loads(call.arguments)
    assert (whole.text, whole.reasoning, whole.finish_reason, call.name) == ("", "", "tool_calls", "get_weather")
    assert arguments["city"] in ("Rome", "Oslo") and arguments["days"] in range(1, 10) and len(arguments) == 2
    assert (await answer(expert, demanded, adapter)).tool_calls == whole.tool_calls  # the id, too


async def test_any_of_the_tools_is_called_if_a_call_is_required(
    expert: HFExpert, adapters: list[Adapter], tmp_path: Path
) -> None:
    adapter = with_template(adapters, tmp_path / "a", TEMPLATES["hermes"])
    found = set()
    for seed in range(6):
        one = request(tool_choice="required", parallel_tool_calls=False, temperature=2.0, seed=seed)
        whole = await answer(expert, one, adapter)
        assert len(whole.tool_calls) == 1
        found.add(whole.tool_calls[0].name)
    assert found == {"get_weather", "now"}


async def test_a_scripted_answer_is_parsed_while_it_streams(
    expert: HFExpert, adapters: list[Adapter], tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coe.engines.hf.batch.COALESCE_S", 0.0)
    adapter = with_template(adapters, tmp_path / "a", TEMPLATES["thinking"])
    call = '<tool_call>{"name": "get_weather", "arguments": {"city": "Köln 🙂"}}</tool_call>'
    script(monkeypatch, tokenizer, f"Look it up.\n</think>\n\nOne moment.\n{call}")
    chunks = [chunk async for chunk in expert.generate(request(), adapter)]
    assert "".join(c.reasoning for c in chunks) == "Look it up."
    assert "".join(c.text for c in chunks) == "One moment."
    assert sum(bool(c.reasoning) for c in chunks) > 2 and sum(bool(c.text) for c in chunks) > 2
    [delta] = [delta for c in chunks for delta in c.tool_calls]
    assert (delta.name, json.loads(delta.arguments)) == ("get_weather", {"city": "Köln 🙂"})
    assert chunks[-1].finish_reason == "tool_calls"


@pytest.mark.parametrize("name", ["hermes", "llama3", "none"])
async def test_a_stop_string_in_a_demanded_call_that_max_tokens_cuts_is_no_end_of_it(
    expert: HFExpert, adapters: list[Adapter], tmp_path: Path, name: str
) -> None:
    adapter = with_template(adapters, tmp_path / "a", TEMPLATES[name])
    demanded = request(tool_choice="required", tool_name="get_weather", stop=('"', "\n"))
    cut = await answer(expert, replace(demanded, max_tokens=14), adapter)
    assert (cut.finish_reason, cut.tool_calls) == ("length", ()) and '{"n' in cut.text
    assert (await answer(expert, demanded, adapter)).finish_reason == "tool_calls"


@pytest.mark.parametrize("anchor", ["<|im_start|>assistant", "not in the prompt"])
async def test_a_special_token_marks_calls_and_is_not_shown(
    expert: HFExpert,
    adapters: list[Adapter],
    tmp_path: Path,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    anchor: str,
) -> None:
    own = {
        "start_anchor": anchor,
        "fields": {"content": {}, "tool_calls": {"open": "<|im_start|>", "content": "json"}},
    }
    adapter = with_template(adapters, tmp_path / "a", CHATML)
    (tmp_path / "a" / "tokenizer_config.json").write_text(json.dumps({"response_template": own}))
    script(monkeypatch, tokenizer, 'Hi <|im_start|>{"name": "now", "arguments": {}}')
    whole = await answer(expert, request(), adapter)
    assert (whole.text, [call.name for call in whole.tool_calls]) == ("Hi", ["now"])
    whole = await answer(expert, request(tools=()), adapter)
    assert whole.tool_calls == ()


async def test_an_answer_without_the_demanded_call_fails_so_that_another_expert_may_answer(
    expert: HFExpert, adapters: list[Adapter], tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unconstrained(*_: Any) -> None:
        return None

    monkeypatch.setattr(expert._preparation, "_call_matcher", unconstrained)
    adapter = with_template(adapters, tmp_path / "a", TEMPLATES["hermes"])
    script(monkeypatch, tokenizer, "I do not know.")
    stream = expert.generate(request(tool_choice="required"), adapter)
    with pytest.raises(EngineError, match="without a valid call of the tools") as caught:
        await anext(stream)  # before anything is shown
    assert caught.value.scope is Scope.EXPERT
    cut = await answer(expert, request(tool_choice="required", max_tokens=3), adapter)
    assert (cut.finish_reason, cut.tool_calls) == ("length", ())


async def test_a_slow_response_template_fails_its_row_and_no_other(
    expert: HFExpert, adapters: list[Adapter], tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {
        "start_anchor": "\0",
        "fields": {"content": {}, "thinking": {"open_pattern": "(?=x)", "close_pattern": "(?=x)"}},
    }
    adapter = with_template(adapters, tmp_path / "a", CHATML)
    (tmp_path / "a" / "tokenizer_config.json").write_text(json.dumps({"response_template": own}))
    script(monkeypatch, tokenizer, "a x b")
    with pytest.raises(EngineError, match="the response template of 'a' takes more than"):
        await answer(expert, request(), adapter)
    assert (await answer(expert, request())).text == "a x b"


@pytest.mark.integration
async def test_a_real_model_calls_a_named_tool_and_the_required_one(smollm2: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(smollm2, model)
    (model / "chat_template.jinja").write_text(TEMPLATES["hermes"])
    engine = HFEngine(device="cpu")
    expert = await engine.load(ExpertSpec(name="smollm2", kind=Kind.MODEL, source=str(model)), model)
    try:
        named = await answer(expert, request(tool_choice="required", tool_name="get_weather"))
        required = await answer(expert, request(tool_choice="required", tools=(WEATHER,), parallel_tool_calls=False))
        free = await answer(expert, request(tool_choice="none", max_tokens=16))
    finally:
        await engine.unload(expert)
    for whole in (named, required):
        [call] = whole.tool_calls
        assert (call.name, whole.finish_reason, whole.text) == ("get_weather", "tool_calls", "")
        assert set(json.loads(call.arguments)) == {"city", "days"}
    assert json.loads(named.tool_calls[0].arguments)["city"] == "Oslo"
    assert free.text and not free.tool_calls
