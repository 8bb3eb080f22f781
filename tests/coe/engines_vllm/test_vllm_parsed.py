"""Answers that a parser of vLLM reads, with a scripted parser; vLLM is not needed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import regex  # type: ignore[import-untyped]
from engine_models import make_tokenizer

from coe.chunks import Joined, merged
from coe.engines.answer import AnswerStream
from coe.engines.parsing.ids import call_ids
from coe.engines.parsing.parser import MOST_CALLS
from coe.engines.vllm import parsed
from coe.engines.vllm.parsed import ParsedAnswer
from coe.engines.vllm.parsers import ParserNames, ReadText, reads_with_parser
from coe.engines.vllm.patterns import limit_patterns
from coe.errors import EngineError
from coe.types import Chunk, GenerateRequest, Usage
from registry.spec import ExpertSpec, Kind
from routers.base import Message

TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}
END = 1
TOKENIZER = make_tokenizer()


def delta(content: str | None = None, reasoning: str | None = None, *calls: tuple[Any, ...]) -> SimpleNamespace:
    """A DeltaMessage of vLLM; a call is (index, id, name, arguments)."""
    pieces = [SimpleNamespace(index=c[0], id=c[1], function=SimpleNamespace(name=c[2], arguments=c[3])) for c in calls]
    return SimpleNamespace(content=content, reasoning=reasoning, tool_calls=pieces)


class Script:
    """A parser of vLLM: `step(text, tokens)` reads a delta, `whole(text, tokens)` a whole answer."""

    def __init__(self, step: Any = None, whole: Any = None) -> None:
        self.step, self.whole = step or (lambda text, tokens: delta(text or None)), whole
        self.texts: list[str] = []
        self.tokens: list[list[int]] = []
        self.finished: list[bool] = []
        self.prompts: list[list[int]] = []

    def parse_delta(self, text: str, tokens: list[int], asked: Any, prompt_ids: list[int], *, finished: bool) -> Any:
        self.texts.append(text)
        self.tokens.append(tokens)
        self.finished.append(finished)
        self.prompts.append(prompt_ids)
        return self.step(text, tokens)

    def set_prompt_token_ids(self, prompt_ids: list[int]) -> None:
        self.prompts.append(prompt_ids)

    def parse(self, text: str, asked: Any, *, enable_auto_tools: bool, model_output_token_ids: list[int]) -> Any:
        assert enable_auto_tools
        return self.whole(text, model_output_token_ids)


def asked(**fields: Any) -> GenerateRequest:
    return GenerateRequest(messages=(Message("user", "hi"),), tools=(TOOL,), **fields)


def read(script: Script, text: str, **fields: Any) -> tuple[Chunk, AnswerStream]:
    """The answer `text`, read token by token, and an end token."""
    request = asked(**fields)
    answer = ParsedAnswer(script, None, request, [40, 41], expert="sql")
    stream = AnswerStream(ReadText(TOKENIZER.decode, request.stop, {}, answer), answer)
    whole = Chunk("")
    for token in TOKENIZER(text, add_special_tokens=False)["input_ids"]:
        stream.push(token)
        whole = merged(whole, stream.take())
        if stream.stopped:
            break
    stream.push_end(END)
    return merged(whole, stream.take(last=True)), stream


def test_steps_have_whole_characters_all_tokens_and_the_prompt() -> None:
    script = Script()
    said, _ = read(script, "the é answer")
    ids = TOKENIZER("the é answer", add_special_tokens=False)["input_ids"]
    assert said.text == "the é answer" == "".join(script.texts)
    assert not any("\ufffd" in text for text in script.texts)
    assert [token for tokens in script.tokens for token in tokens] == [*ids, END]
    assert script.finished == [False] * (len(script.finished) - 1) + [True]
    assert script.prompts[0] == [40, 41]


def test_reasoning_text_and_pieces_of_calls_keep_their_order_and_have_our_ids() -> None:
    steps = iter(
        [
            delta(reasoning="hm"),
            delta("so"),
            delta(None, None, (0, "chatcmpl-tool-1", "find", None)),
            delta(None, None, (0, None, None, '{"a":')),
            None,
            delta(None, None, (0, None, None, " 1}"), (1, "chatcmpl-tool-2", "find", "{}")),
        ]
    )
    said, stream = read(Script(lambda text, tokens: next(steps, None)), "abcdef")
    joined = Joined()
    joined.add(said)
    answer = joined.answer("sql", Chunk("", "stop", Usage(0, 0)))
    ids = call_ids(asked())
    assert (answer.reasoning, answer.text) == ("hm", "so")
    assert [(c.id, c.name, c.arguments) for c in answer.tool_calls] == [
        (ids[0], "find", '{"a": 1}'),
        (ids[1], "find", "{}"),
    ]
    assert stream.n_calls == 2


def test_a_whole_answer_is_parsed_at_once() -> None:
    call = SimpleNamespace(id=None, name="find", arguments='{"a": 1}')
    seen: list[tuple[str, Sequence[int]]] = []

    def whole(text: str, tokens: Sequence[int]) -> Any:
        seen.append((text, tokens))
        return "hm", "so", [call]

    script = Script(whole=whole)
    said, stream = read(script, "the é", stream=False)
    assert (said.reasoning, said.text, said.tool_calls[0].arguments) == ("hm", "so", '{"a": 1}')
    assert seen == [("the é", [*TOKENIZER("the é", add_special_tokens=False)["input_ids"], END])]
    assert (script.texts, script.prompts, stream.n_calls) == ([], [[40, 41]], 1)


def test_an_answer_without_calls_may_have_none_for_all_of_its_parts() -> None:
    said, stream = read(Script(whole=lambda text, tokens: (None, None, None)), "x", stream=False)
    assert said.is_empty and not stream.n_calls


def test_ids_that_the_model_reads_are_kept() -> None:
    call = SimpleNamespace(id="functions.find:0", name="find", arguments="{}")
    said, _ = read(Script(whole=lambda text, tokens: (None, None, [call])), "x", stream=False)
    assert said.tool_calls[0].id == "functions.find:0"


@pytest.mark.parametrize("stream", [True, False])
def test_what_a_parser_raises_is_about_the_answer(stream: bool) -> None:
    def fails(text: str, tokens: Sequence[int]) -> Any:
        raise ValueError("no such token\nat all")

    with pytest.raises(
        EngineError, match="parser failed on the answer of 'sql': ValueError: no such token at all"
    ) as e:
        read(Script(fails, fails), "x", stream=stream)
    assert e.value.client_text == "the answer of 'sql' cannot be read by its parser"


def test_the_time_of_a_parser_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(parsed.time, "thread_time", lambda: float(next(clock)))
    script = Script()
    with pytest.raises(EngineError, match="more than 10 s"):
        read(script, "a b c d e f g h i j k l m n")
    assert len(script.texts) == 10


def test_a_long_answer_is_not_parsed_at_every_token() -> None:
    script = Script()
    said, _ = read(script, "x" * 20_000)
    assert said.text == "x" * 20_000
    assert len(script.texts) < 4000


def test_only_one_call_where_the_request_allows_no_other() -> None:
    steps = iter([delta(None, None, (0, "a", "find", "{}")), delta(None, None, (1, "b", "find", "{}")), delta("later")])
    said, stream = read(Script(lambda text, tokens: next(steps, None)), "abcdef", parallel_tool_calls=False)
    assert stream.stopped and stream.n_calls == 1
    assert said.text == ""


def test_calls_of_an_answer_are_bounded() -> None:
    calls = [SimpleNamespace(id=None, name="find", arguments="{}")] * (MOST_CALLS + 1)
    said, stream = read(Script(whole=lambda text, tokens: (None, None, calls)), "x", stream=False)
    assert (len(said.tool_calls), stream.n_calls, stream.stopped) == (MOST_CALLS, MOST_CALLS, True)
    said, stream = read(Script(whole=lambda text, tokens: (None, None, calls[:-1])), "x", stream=False)
    assert (stream.n_calls, stream.stopped) == (MOST_CALLS, False)


@pytest.mark.parametrize("stream", [True, False])
def test_a_stop_string_ends_the_text_but_not_reasoning(stream: bool) -> None:
    def step(text: str, tokens: Sequence[int]) -> Any:
        return delta(reasoning="the end") if "a" in text else delta(text)

    said, found = read(Script(step), "abc end x", stream=stream, stop=("end",))
    assert (said.reasoning, said.text, found.stopped) == ("the end", "bc ", True)


def spec(**fields: Any) -> ExpertSpec:
    return ExpertSpec(**{"name": "x", "kind": Kind.MODEL, "source": "/x"} | fields)


def test_an_adapter_has_the_parsers_of_its_base_where_it_names_none() -> None:
    base = spec(tool_call_parser="hermes", reasoning_parser="qwen3")
    adapter = spec(kind=Kind.ADAPTER, base="x", tool_call_parser="llama3_json")
    assert ParserNames.of(adapter, base) == ParserNames("llama3_json", "qwen3")
    assert not ParserNames.of(spec(tool_call_parser="auto")) and ParserNames.of(base)


def test_answers_that_follow_our_grammars_have_no_parser_of_vllm() -> None:
    assert reads_with_parser(asked())
    assert not reads_with_parser(asked(tool_choice="required"))
    assert not reads_with_parser(asked(format="json"))
    assert not reads_with_parser(GenerateRequest(prompt="x"))


class Slow:
    """A tool parser with a pattern of cubic time, as those of DeepSeek V3, on its class and its instance."""

    of_class = regex.compile(r"<b>(.*)<s>(.*)\n```json\n(.*)\n```<e>")

    def __init__(self) -> None:
        self.of_instance = regex.compile(self.of_class.pattern)
        self.name = "slow"


@pytest.mark.parametrize("pattern", ["of_class", "of_instance"])
def test_a_pattern_that_takes_too_long_ends_the_answer(monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    monkeypatch.setattr(parsed, "MOST_SECONDS", 0.2)
    slow, began = Slow(), time.thread_time()
    script = Script(whole=lambda text, tokens: getattr(slow, pattern).findall("<b><s>" * 5000))
    script._tool_parser = slow  # type: ignore[attr-defined]
    with pytest.raises(EngineError, match="'sql'"):
        read(script, "hello", stream=False)
    assert time.thread_time() - began < 20  # without a limit, many minutes
    assert Slow.of_class.findall("<b>x<s>f\n```json\n{}\n```<e>") == [("x", "f", "{}")]


def test_a_pattern_with_a_limit_finds_what_it_found_before() -> None:
    slow, text = Slow(), "a<b>x<s>f\n```json\n{}\n```<e>z"
    plain = slow.of_instance
    limit_patterns(slow, lambda: 5.0)
    timed = slow.of_instance
    assert timed is not plain and slow.name == "slow" and timed.pattern == plain.pattern
    assert timed.findall(text) == plain.findall(text) == [("x", "f", "{}")]
    assert [found.span() for found in timed.finditer(text)] == [plain.search(text).span()]
    assert timed.search(text).groups() == plain.search(text).groups()
    assert timed.match(text, 1).span() == plain.match(text, 1).span() and timed.fullmatch(text) is None
    assert timed.sub("-", text) == plain.sub("-", text) == "a-z" and timed.split(text) == plain.split(text)
