"""vLLM's own parsers: their names, what they read of streamed and whole answers, and their failures."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from engine_models import make_tokenizer, say

from coe.chunks import Joined
from coe.engines.answer import AnswerStreams
from coe.engines.base import Adapter
from coe.engines.logprobs import TokenTexts
from coe.engines.render import Renderer
from coe.engines.vllm.answer import AnswerChunks
from coe.engines.vllm.engine import VLLMEngine
from coe.engines.vllm.expert import VLLMExpert
from coe.engines.vllm.options import Options
from coe.engines.vllm.parsers import AnswerParsers, ParserNames
from coe.engines.vllm.prepare import Preparation
from coe.engines.vllm.process import set_environment
from coe.engines.vllm.running import Running
from coe.errors import ConfigError, EngineError
from coe.types import Answer, Chunk, GenerateRequest
from registry.spec import ExpertSpec, Kind
from routers.base import Message

pytestmark = [pytest.mark.vllm, pytest.mark.integration, pytest.mark.asyncio(loop_scope="session")]

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "strict": True,
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    },
}
END = 1
RENDERER = Renderer()
HERMES = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
XML = (
    "<tool_call><function=get_weather><parameter=city>Zürich</parameter><parameter=days>2</parameter></function>"
    "</tool_call>"
)
PYTHONIC = '[get_weather(city="Zürich"), get_weather(city="Bern", days=2)]'
ONE = [("get_weather", '{"city": "Zürich"}')]
TYPED = [("get_weather", '{"city": "Zürich", "days": 2}')]
TWO = [*ONE, ("get_weather", '{"city": "Bern", "days": 2}')]


@dataclass
class Completion:
    token_ids: list[int]
    finish_reason: str | None = None
    text: str = ""
    logprobs: None = None


@dataclass
class Output:
    outputs: list[Completion]
    prompt_logprobs: None = field(default=None)


@pytest.fixture(scope="module")
def running() -> Running:
    """What the answers of a model need, without its process."""
    set_environment(Options())  # before vLLM is imported, as when the engine starts
    tokenizer = make_tokenizer()
    config = SimpleNamespace(
        hf_config=SimpleNamespace(model_type="llama"),
        hf_text_config=SimpleNamespace(model_type="llama"),
        hf_overrides=None,
    )
    none: Any = None
    return Running(
        llm=none,
        adapters=none,
        tokenizer=tokenizer,
        texts=TokenTexts(tokenizer),
        answers=AnswerStreams(tokenizer),
        grammars=none,
        parsers=AnswerParsers(tokenizer, config),
        ends=frozenset({END}),
        n_ids=len(tokenizer),
        context_length=4096,
    )


async def answered(running: Running, text: str, *, stream: bool, tools: bool = True, **names: Any) -> Answer:
    """The answer of an expert with these parsers, whose model generates `text`."""
    spec = ExpertSpec(name="sql", kind=Kind.MODEL, source="/x", **names)
    preparation = Preparation(spec, RENDERER)
    request = GenerateRequest(
        messages=(Message("user", "hi"),), tools=(WEATHER,) if tools else (), stream=stream, max_tokens=2000
    )
    prepared = await preparation.prepare(running, request, None)
    chunks, joined = AnswerChunks(prepared, running.texts), Joined()
    ids = [*running.tokenizer(text, add_special_tokens=False)["input_ids"], END]
    last: Chunk | None = None
    for token in ids:
        reason = "stop" if token == END else None
        if (last := chunks.chunk(Output([Completion([token], reason)]))) is not None:
            joined.add(last)
    preparation.close()
    assert last is not None and last.finish_reason is not None
    return joined.answer("sql", last)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("parser", "text", "calls"),
    [
        ("hermes", "so: " + HERMES, ONE),
        ("hermes", HERMES + HERMES.replace("Zürich", "Bern"), [*ONE, ("get_weather", '{"city": "Bern"}')]),
        ("qwen3_coder", XML, TYPED),
        ("pythonic", PYTHONIC, TWO),
        ("granite4", HERMES, ONE),
    ],
)
async def test_calls_are_read_as_the_named_parser_does(
    running: Running, parser: str, text: str, calls: list[tuple[str, str]], stream: bool
) -> None:
    answer = await answered(running, text, stream=stream, tool_call_parser=parser)
    assert [(call.name, call.arguments) for call in answer.tool_calls] == calls
    assert answer.finish_reason == "tool_calls"
    assert answer.text.strip() == ("so:" if text.startswith("so") else "")
    assert all(call.id.startswith("call_") for call in answer.tool_calls)


@pytest.mark.parametrize("stream", [True, False])
async def test_reasoning_and_calls_of_one_answer(running: Running, stream: bool) -> None:
    names = {"tool_call_parser": "qwen3_coder", "reasoning_parser": "qwen3"}
    answer = await answered(running, f"<think>Grüezi</think>{XML}", stream=stream, **names)
    assert (answer.reasoning, answer.text.strip()) == ("Grüezi", "")
    assert [(call.name, call.arguments) for call in answer.tool_calls] == TYPED


@pytest.mark.parametrize("stream", [True, False])
async def test_without_tools_a_call_is_text(running: Running, stream: bool) -> None:
    answer = await answered(running, HERMES, stream=stream, tools=False, tool_call_parser="hermes")
    assert (answer.text, answer.tool_calls, answer.finish_reason) == (HERMES, (), "stop")


async def test_every_parser_loads_or_states_why_and_none_fails_otherwise(running: Running) -> None:
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    found: dict[str, list[str]] = {"loads": [], "does not": []}
    every = [("tool_call_parser", name) for name in ToolParserManager.list_registered()]
    every += [("reasoning_parser", name) for name in ReasoningParserManager.list_registered()]
    for option, name in every:
        try:
            running.parsers.load(ParserNames(*((name, None) if option[0] == "t" else (None, name))), expert="sql")
        except ConfigError as error:
            assert name in str(error) and "'sql'" in str(error)
            found["does not"].append(name)  # most need tokens that this tokenizer lacks
            continue
        found["loads"].append(name)
        for text in (HERMES, XML, "plain é text", "<think>x"):
            for stream in (True, False):
                try:
                    await answered(running, text, stream=stream, **{option: name})
                except EngineError as error:
                    assert "'sql'" in str(error)
    assert len(every) > 80 and {"hermes", "qwen3", "deepseek_v4"} & set(found["loads"])
    assert len(found["loads"]) > 50


async def test_names_that_vllm_does_not_have_are_errors_with_near_matches() -> None:
    engine = VLLMEngine()
    spec = ExpertSpec(name="sql", kind=Kind.MODEL, source="/x", tool_call_parser="hermess")
    with pytest.raises(ConfigError, match="`tool_call_parser` of 'sql': vLLM has no parser 'hermess'.*'hermes'"):
        engine.check_expert(spec)
    with pytest.raises(ConfigError, match="vllm serve --reasoning-parser.*") as error:
        engine.check_expert(spec.model_copy(update={"tool_call_parser": None, "reasoning_parser": "zzzz"}))
    assert "there are: " in str(error.value) and "qwen3" in str(error.value)
    with pytest.raises(ConfigError, match="without a limit of time: leave it out"):
        engine.check_expert(spec.model_copy(update={"tool_call_parser": "hf"}))
    engine.check_expert(spec.model_copy(update={"tool_call_parser": "hermes", "reasoning_parser": "qwen3"}))


def parsed_by(adapter: Adapter, parser: str) -> Adapter:
    return Adapter(adapter.spec.model_copy(update={"tool_call_parser": parser}), adapter.path)


@pytest.mark.parametrize("stream", [True, False])
async def test_answers_of_the_engine_pass_through_the_parser(
    expert: VLLMExpert, adapters: list[Adapter], stream: bool
) -> None:
    request = GenerateRequest(messages=(Message("user", "the"),), tools=(WEATHER,), max_tokens=20, stream=stream)
    plain, read = await asyncio.gather(
        say(expert, request, adapters[0]), say(expert, request, parsed_by(adapters[0], "hermes"))
    )
    assert read.text.rstrip("\ufffd") == plain.text.rstrip("\ufffd") and read.usage == plain.usage


async def test_a_parser_that_fails_costs_its_request_and_nothing_else(
    expert: VLLMExpert, adapters: list[Adapter]
) -> None:
    request = GenerateRequest(messages=(Message("user", "the"),), tools=(WEATHER,), max_tokens=20)
    fine = asyncio.ensure_future(say(expert, request, adapters[0]))
    with pytest.raises(EngineError, match="parser failed on the answer"):
        await say(expert, request, parsed_by(adapters[0], "openai"))  # for gpt-oss only
    with pytest.raises(ConfigError, match="vLLM has no parser 'hermees'"):
        await say(expert, request, parsed_by(adapters[0], "hermees"))
    assert (await fine).usage is not None
    llm = (await expert.core.live()).llm
    assert llm.get_num_unfinished_requests() == 0
