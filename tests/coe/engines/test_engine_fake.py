"""FakeEngine: behaviours, limits, cancellation and counts."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from coe.engines import Adapter, create_engine, engine_kind
from coe.engines.fake import FakeEngine, tokenize
from coe.errors import ConfigError, ContextLengthExceeded, EngineError, InvalidRequest, WeightsError
from coe.types import Chunk, GenerateRequest
from registry.spec import ExpertSpec, Kind
from routers.base import Message

NOWHERE = Path("nowhere")


def spec_of(source: str, name: str = "e", **fields: object) -> ExpertSpec:
    return ExpertSpec(name=name, kind=Kind.MODEL, source=source, **fields)  # type: ignore[arg-type]


def ask(text: str, **fields: object) -> GenerateRequest:
    return GenerateRequest(messages=(Message("user", text),), **fields)  # type: ignore[arg-type]


async def chunks_of(engine: FakeEngine, source: str, request: GenerateRequest, **fields: object) -> list[Chunk]:
    expert = await engine.load(spec_of(source, **fields), NOWHERE)
    return [c async for c in expert.generate(request)]


async def say(source: str, request: GenerateRequest, **fields: object) -> str:
    return "".join(c.text for c in await chunks_of(FakeEngine(), source, request, **fields))


@pytest.mark.parametrize(
    ("source", "answer"),
    [
        ("fake://echo", "The capital of France?"),
        ("fake://upper", "THE CAPITAL OF FRANCE?"),
        ("fake://script?france=Paris&spain=Madrid", "Paris"),
        ("fake://script?spain=Madrid", "The capital of France?"),
        ("fake://script?spain=Madrid&default=no%20idea", "no idea"),
        ("models/real", "The capital of France?"),
    ],
)
async def test_the_source_says_how_to_answer(source: str, answer: str) -> None:
    assert await say(source, ask("The capital of France?")) == answer


async def test_answers_of_the_engine_come_first_and_prompts_need_no_messages() -> None:
    engine = FakeEngine({"france": "Paris"})
    [*texts, last] = await chunks_of(engine, "fake://upper", GenerateRequest(prompt="France: its capital is"))
    assert [c.text for c in texts] == ["Paris"]
    assert (last.text, last.finish_reason) == ("", "stop")
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (4, 1)


async def test_it_streams_a_token_a_chunk_and_only_the_last_chunk_ends() -> None:
    chunks = await chunks_of(FakeEngine(), "fake://echo", ask("one two  three\n"))
    assert [c.text for c in chunks] == ["one", " two", "  three\n", ""]
    assert [c.finish_reason for c in chunks] == [None, None, None, "stop"]
    assert [c.usage is not None for c in chunks] == [False, False, False, True]


@pytest.mark.parametrize("text", ["", " ", "a", " a b ", "a\n\nb  ", "ä b\t"])
def test_tokens_joined_are_the_text(text: str) -> None:
    assert "".join(tokenize(text)) == text


async def test_max_tokens_and_stop_strings_cut() -> None:
    cut = await chunks_of(FakeEngine(), "fake://echo", ask("a b c d", max_tokens=2))
    assert ("".join(c.text for c in cut), cut[-1].finish_reason) == ("a b", "length")
    assert cut[-1].usage is not None
    assert cut[-1].usage.completion_tokens == 2
    stopped = await chunks_of(FakeEngine(), "fake://echo", ask("a b. c. d", stop=("zz", ". ")))
    assert ("".join(c.text for c in stopped), stopped[-1].finish_reason) == ("a b", "stop")


@pytest.mark.parametrize(("most", "text", "n"), [(None, "say hi SAY HI", 2), (1, "say hi SAY", 1), (0, "say hi ", 0)])
async def test_an_answer_with_echo_begins_with_the_prompt(most: int | None, text: str, n: int) -> None:
    chunks = await chunks_of(
        FakeEngine(), "fake://upper", GenerateRequest(prompt="say hi ", max_tokens=most, echo=True)
    )
    assert "".join(chunk.text for chunk in chunks).rstrip() == text.rstrip()
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == n
    with pytest.raises(EngineError, match="after 0 tokens"):
        await chunks_of(FakeEngine(), "fake://fail", GenerateRequest(prompt="a", echo=True))


async def test_a_prompt_over_the_context_is_refused_with_both_numbers() -> None:
    with pytest.raises(ContextLengthExceeded, match="has 3 tokens and max_tokens is 10") as info:
        await say("fake://echo", ask("a b c", max_tokens=10), context_length=12)
    assert info.value.context_length == 12


async def test_an_adapter_shows_in_the_answer_and_brings_its_own_behaviour() -> None:
    engine = FakeEngine()
    expert = await engine.load(spec_of("fake://echo"), NOWHERE)

    async def with_adapter(source: str) -> str:
        adapter = Adapter(ExpertSpec(name="sql", kind=Kind.ADAPTER, source=source, base="e"), NOWHERE)
        return "".join([c.text async for c in expert.generate(ask("hi"), adapter)])

    assert await with_adapter("adapters/sql") == "[sql] hi"
    assert await with_adapter("fake://upper") == "[sql] HI"
    assert engine.tally.generations == {"sql": 2}


async def test_failures_are_injected_where_the_source_says() -> None:
    with pytest.raises(EngineError, match="failed after 0 tokens"):
        await say("fake://fail", ask("a b c"))
    engine = FakeEngine()
    expert = await engine.load(spec_of("fake://fail?after=2"), NOWHERE)
    answer = expert.generate(ask("a b c"))
    assert [(await anext(answer)).text, (await anext(answer)).text] == ["a", " b"]
    with pytest.raises(EngineError, match="failed after 2 tokens"):
        await anext(answer)
    assert engine.tally.cancelled["e"] == 0
    with pytest.raises(EngineError, match="failed at the end"):
        await say("fake://fail?after=9", ask("a"))
    with pytest.raises(WeightsError, match="failed to load"):
        await say("fake://fail?at=load", ask("a"))
    for source, problem in {
        "fake://ehco": "; there are: fake://echo",
        "fake://echo/upper": "; there are: fake://echo",
        "fake://[": ": Invalid IPv6 URL",
        "fake://upper?x=1": ": upper has no settings, and 'x' is one",
        "fake://fail?when=load": ": fail has no setting 'when'; there are: at, after",
        "fake://fail?after=two": ": after must be a number of tokens, got 'two'",
    }.items():
        with pytest.raises(WeightsError, match=re.escape(f"{source!r} is not a fake expert{problem}")):
            await say(source, ask("a"))


async def test_closing_the_iterator_cancels_and_frees_the_place() -> None:
    engine = FakeEngine(capacity=1)
    expert = await engine.load(spec_of("fake://echo"), NOWHERE)
    answer = expert.generate(ask("a b c"))
    assert (await anext(answer)).text == "a"
    with pytest.raises(EngineError, match="is generating"):
        await engine.unload(expert)
    await answer.aclose()  # type: ignore[attr-defined]
    assert (engine.tally.cancelled["e"], engine.tally.in_flight["e"]) == (1, 0)
    assert [c.text async for c in expert.generate(ask("next"))] == ["next", ""]


async def test_no_more_than_the_capacity_run_at_once() -> None:
    engine = FakeEngine(capacity=2, token_delay_s=0.001)
    expert = await engine.load(spec_of("fake://echo"), NOWHERE)

    async def one(text: str) -> str:
        return "".join([c.text async for c in expert.generate(ask(text))])

    assert await asyncio.gather(*map(one, "abcde")) == list("abcde")
    assert engine.tally.most_in_flight["e"] == 2


async def test_loads_and_unloads_are_counted_and_time_is_the_callers() -> None:
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    engine = FakeEngine(load_delay_s=2.0, token_delay_s=0.5, sleep=sleep)
    expert = await engine.load(spec_of("fake://echo", size_bytes=7), NOWHERE)
    assert [c.text async for c in expert.generate(ask("a b"))] == ["a", " b", ""]
    assert waited == [2.0, 0.5, 0.5]
    assert (engine.footprint(expert.spec), engine.footprint(spec_of("fake://echo"))) == (7, 0)
    await engine.unload(expert)
    assert (engine.tally.loads["e"], engine.tally.unloads["e"], engine.resident) == (1, 1, set())
    with pytest.raises(EngineError, match="not loaded"):
        await anext(expert.generate(ask("a")))
    with pytest.raises(EngineError, match="not loaded"):
        await engine.unload(expert)


async def test_a_late_timer_shortens_the_next_delay() -> None:
    waited: list[float] = []

    async def late(seconds: float) -> None:
        waited.append(seconds)
        await asyncio.sleep(0.05 if len(waited) == 1 else 0.0)

    engine = FakeEngine(token_delay_s=0.02, sleep=late)
    expert = await engine.load(spec_of("fake://echo"), NOWHERE)
    waited.clear()
    assert [c.text async for c in expert.generate(ask("a b c"))] == ["a", " b", " c", ""]
    assert waited[:2] == [0.02, 0.0]


def test_wrong_engines_and_options_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"no engine 'hff'; did you mean 'hf'\? there are: command, fake, hf, remote"):
        create_engine("hff")
    with pytest.raises(ConfigError, match="engine 'fake' cannot be created with"):
        create_engine("fake", colour="red")
    with pytest.raises(InvalidRequest, match="capacity"):
        FakeEngine(capacity=0)


def test_engine_kind_follows_the_spec() -> None:
    remote = ExpertSpec(name="r", kind=Kind.REMOTE, source="https://example.org/v1")
    assert [engine_kind(remote), engine_kind(spec_of("fake://echo")), engine_kind(spec_of("models/x"))] == [
        "remote",
        "fake",
        "hf",
    ]
