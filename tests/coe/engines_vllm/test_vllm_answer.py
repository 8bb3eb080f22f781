"""vLLM's outputs as chunks, and requests as its sampling parameters; vLLM is not needed."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

import pytest
from engine_models import make_tokenizer

from coe.engines.logprobs import TokenTexts
from coe.engines.vllm.answer import AnswerChunks
from coe.engines.vllm.prepare import Prepared
from coe.engines.vllm.sampling import sampling_arguments
from coe.errors import EngineError
from coe.sampling import SamplingOptions
from coe.types import Chunk, GenerateRequest, Usage


@dataclass
class Logprob:
    logprob: float
    rank: int


@dataclass
class Completion:
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    logprobs: list[dict[int, Logprob]] | None = None


@dataclass
class Output:
    outputs: list[Completion]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = field(default=None)


@pytest.fixture(scope="module")
def texts() -> TokenTexts:
    return TokenTexts(make_tokenizer())


def chunks(
    texts: TokenTexts, request: GenerateRequest, *outputs: Output, max_tokens: int = 9, stream: Any = None
) -> list[Chunk]:
    prepared = Prepared(request, "hi", [40, 41], "", max_tokens, frozenset({1}), {}, None, stream)
    answer = AnswerChunks(prepared, texts)
    return [chunk for output in outputs if (chunk := answer.chunk(output)) is not None]


def test_pieces_come_as_they_are_and_the_last_has_reason_and_usage(texts: TokenTexts) -> None:
    outputs = Output([Completion("a", [1])]), Output([Completion("", [2])]), Output([Completion("é", [3, 4], "stop")])
    found = chunks(texts, GenerateRequest(prompt="hi"), *outputs)
    assert [(chunk.text, chunk.finish_reason) for chunk in found] == [("a", None), ("é", "stop")]
    assert found[-1].usage == Usage(2, 4)


@pytest.mark.parametrize(
    ("reason", "ours"), [("length", "length"), ("abort", "cancelled"), ("repetition", "stop"), ("stop", "stop")]
)
def test_reasons(texts: TokenTexts, reason: str, ours: str) -> None:
    [chunk] = chunks(texts, GenerateRequest(prompt="hi"), Output([Completion("", [1], reason)]))
    assert chunk.finish_reason == ours


@dataclass
class Watching:
    watches: bool


@pytest.mark.parametrize(
    ("streams", "reader", "whole"),
    [
        (False, None, True),
        (False, Watching(False), True),
        (False, Watching(True), False),
        (True, None, False),
        (True, Watching(False), False),
    ],
)
def test_vllm_keeps_an_answer_to_its_end_if_only_the_whole_is_read(streams: bool, reader: Any, whole: bool) -> None:
    request = GenerateRequest(prompt="hi", stream=streams)
    prepared = Prepared(request, "hi", [40], "", 9, frozenset({1}), {}, None, reader)
    assert prepared.is_read_whole is whole


def test_an_error_of_vllm_is_no_answer(texts: TokenTexts) -> None:
    with pytest.raises(EngineError, match="'error'"):
        chunks(texts, GenerateRequest(prompt="hi"), Output([Completion("", [1], "error")]))


def test_echo_without_new_tokens_drops_what_vllm_generates(texts: TokenTexts) -> None:
    request = GenerateRequest(prompt="hi", echo=True, max_tokens=0)
    [chunk] = chunks(texts, request, Output([Completion("x", [1], "length")]), max_tokens=0)
    assert (chunk.text, chunk.finish_reason, chunk.usage) == ("hi", "length", Usage(2, 0))


def test_logprobs_have_the_chosen_token_and_only_as_many_others_as_asked(texts: TokenTexts) -> None:
    places = [{50: Logprob(-2.0, 3), 51: Logprob(-0.5, 1), 52: Logprob(-1.0, 2)}]
    request = GenerateRequest(prompt="hi", logprobs=1)
    [chunk] = chunks(texts, request, Output([Completion("x", [50], "length", places)]))
    [found] = chunk.logprobs
    assert (found.token, found.logprob) == (texts.of(50)[0], -2.0)
    assert [each[:2] for each in found.top] == [(texts.of(51)[0], -0.5)]


def test_prompt_logprobs_and_scores_come_from_the_prompt(texts: TokenTexts) -> None:
    prompt: list[dict[int, Logprob] | None] = [None, {41: Logprob(-0.25, 1)}]
    output = Output([Completion("x", [1], "length")], prompt)
    [shown] = chunks(texts, GenerateRequest(prompt="hi", prompt_logprobs=0), output)
    assert [each.logprob for each in shown.prompt_logprobs] == [None, -0.25]
    [scores] = chunks(texts, GenerateRequest(prompt="hi", wants="scores"), output)
    assert scores.prompt_logprobs == () and scores.value is not None
    assert struct.unpack("<2f", scores.value)[1] == -0.25


def params(max_tokens: int = 5, **fields: Any) -> dict[str, Any]:
    return sampling_arguments(GenerateRequest(prompt="x", **fields), max_tokens=max_tokens, ends={7, 3})


def test_a_request_as_sampling_parameters() -> None:
    options = SamplingOptions(top_k=5, min_p=0.1, logit_bias={1: 2.0}, min_tokens=9)
    found = params(temperature=0.5, top_p=0.9, stop=("a",), seed=4, sampling=options)
    assert {name: found[name] for name in ("temperature", "top_p", "top_k", "min_p", "seed", "stop", "logit_bias")} == {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "seed": 4,
        "stop": ["a"],
        "logit_bias": {1: 2.0},
    }
    assert (found["stop_token_ids"], found["min_tokens"], found["max_tokens"]) == ([3, 7], 5, 5)


def test_values_that_vllm_reads_otherwise() -> None:
    assert params(seed=-1)["seed"] == 2**63 - 1  # vLLM takes -1 as no seed
    assert params(max_tokens=0)["max_tokens"] == 1
    assert params(sampling=SamplingOptions(ignore_eos=True))["stop_token_ids"] == []
    assert params(wants="scores")["prompt_logprobs"] == 0


class Stream:
    """Reads tokens as an AnswerStream does; token 9 completes the answer, and token 8 is a tool call."""

    def __init__(self, demands: bool = False) -> None:
        self.stopped, self.n_calls, self.demands = False, 0, demands
        self.read: list[int] = []
        self.ended_by: list[int] = []

    @property
    def lacks_call(self) -> bool:
        return self.demands and not self.n_calls

    def push(self, token: int) -> None:
        self.read.append(token)
        self.n_calls += token == 8
        self.stopped = token == 9

    def push_end(self, token: int) -> None:
        self.ended_by.append(token)

    def take(self, *, last: bool = False, search: bool = True) -> Chunk:
        text, self.read = "".join(map(str, self.read)), []
        return Chunk(text)


def test_an_answer_that_is_complete_ends_before_vllm_does(texts: TokenTexts) -> None:
    found = chunks(texts, GenerateRequest(prompt="hi"), Output([Completion("", [5, 9, 6])]), stream=Stream())
    assert [(chunk.text, chunk.finish_reason, chunk.usage) for chunk in found] == [("59", "stop", Usage(2, 2))]


def test_tool_calls_are_the_reason_and_the_end_token_is_no_text(texts: TokenTexts) -> None:
    stream = Stream()
    [chunk] = chunks(texts, GenerateRequest(prompt="hi"), Output([Completion("", [8, 1], "stop")]), stream=stream)
    assert (chunk.text, chunk.finish_reason, stream.ended_by) == ("8", "tool_calls", [1])


def test_a_demanded_call_that_is_missing_is_an_error(texts: TokenTexts) -> None:
    with pytest.raises(EngineError, match="did not call a tool"):
        chunks(texts, GenerateRequest(prompt="hi"), Output([Completion("", [5], "stop")]), stream=Stream(demands=True))
