"""Tool calls, reasoning and log-probabilities in a batch: kept from call to result, with the bodies of the endpoint."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from batch_runs import InProcess, openai_row, records, run, save_router, service, write_lines
from openai.types import Completion
from openai.types.chat import ChatCompletion

from coe.batch.openai_lines import batch_line
from coe.batch.records import RoutedRow, dump_outcome, dump_request, load_outcome, load_request
from coe.batch.results import merge, result, write_run
from coe.local import open_local
from coe.protocol.answers import ChatAnswer, TextAnswer
from coe.protocol.requests import parse_chat, parse_completion
from coe.runs.storage import Folder
from coe.types import Answer, TokenLogprob, Usage
from routers.base import RoutingDecision, ToolCall

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALLER = """
  - {name: caller, kind: model, context_length: 64, capabilities: [chat, tools], size_bytes: 100,
     source: 'fake://script?sunny=@think:Look it up. @call:weather:{"city": "Köln"}'}
"""
POLICIES = """
  default: {router: router, fallback: caller}
  vote: {router: router, composition: vote, k: 3, fallback: caller}
"""
LOGPROBS = (
    TokenLogprob("é", -0.5, "é".encode(), ((" a", -0.7, b" a"), ("bytes:\\xff", float("-inf"), b"\xff"))),
    TokenLogprob(" x", -1e-300),
)
SCORED = Answer(
    "a",
    "é x",
    "stop",
    Usage(2, 2),
    reasoning="hm\nhm",
    tool_calls=(ToolCall("c1", "weather", '{"city": "Köln"}'), ToolCall("", "f", "{broken")),
    logprobs=LOGPROBS,
    prompt_logprobs=(TokenLogprob("p", None, b"p"),),
)
DECISION = RoutingDecision(("a",), (1.0,), (0.9,), 0.75)
HISTORY: list[Any] = [
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://e.org/a.png"}}], "name": "Ann"},
    {"role": "assistant", "reasoning_content": "hm", "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}]},
    {"role": "tool", "tool_call_id": "c1", "content": "warm"},
]  # fmt: skip


def test_every_field_of_a_request_survives_a_part_file() -> None:
    chat = parse_chat(
        {
            "model": "auto",
            "messages": HISTORY,
            "tools": [WEATHER],
            "tool_choice": {"type": "function", "function": {"name": "weather"}},
            "parallel_tool_calls": False,
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}},
            "logprobs": True,
            "top_logprobs": 2,
            "reasoning_effort": "low",
            "chat_template_kwargs": {"enable_thinking": False},
            "temperature": 0.5,
            "top_k": 5,
            "logit_bias": {"7": -3},
        }
    ).request
    completion = parse_completion(
        {"model": "auto", "prompt": [5, 6], "echo": True, "logprobs": 1, "max_tokens": 0}
    ).request
    for request in (chat, completion):
        assert load_request(dump_request(request)) == request


def test_every_field_of_an_answer_survives_a_part_file() -> None:
    assert load_outcome(dump_outcome(0, "0", SCORED)) == SCORED
    plain = Answer("a", "x", "stop", Usage(1, 1))
    record = dump_outcome(0, "0", plain)
    assert load_outcome(record) == plain
    earlier = {name: value for name, value in record.items() if name not in ("reasoning", "tool_calls")}
    assert load_outcome({name: earlier[name] for name in earlier if "logprobs" not in name}) == plain


@pytest.mark.parametrize("endpoint", ["/v1/chat/completions", "/v1/completions"])
def test_a_line_of_the_results_has_the_body_of_the_endpoint(tmp_path: Path, endpoint: str) -> None:
    row = RoutedRow(1, "one", "auto", endpoint, policy="default", answers=True, decision=DECISION)
    folder = Folder.of(str(tmp_path))
    write_run(folder, "0.arrows", [result(row, SCORED, {"0": SCORED})])
    merge(folder, ["0.arrows"], lines=True)
    body = json.loads((tmp_path / "results.jsonl").read_text())["response"]["body"]
    bodies, model = (ChatAnswer, ChatCompletion) if "chat" in endpoint else (TextAnswer, Completion)
    own = {"id": body["id"], "created": body["created"], "coe": body["coe"]}
    assert body == bodies("77", 0, "a").whole(SCORED) | own
    assert model.construct(**body).choices[0].logprobs is not None  # its types know no null for the first token
    [answer] = body["coe"]["answers"]
    assert [call["function"]["name"] for call in answer["tool_calls"]] == ["weather", "f"]
    [kept] = records(tmp_path).values()
    assert kept["reasoning"] == "hm\nhm" and kept["tool_calls"][0]["function"]["arguments"] == '{"city": "Köln"}'
    assert "logprobs" not in kept
    nothing = batch_line(result(row, Answer("a", "x", "stop", Usage(1, 1)), {}))["response"]["body"]
    assert nothing["choices"][0]["logprobs"] is None and "tool_calls" not in str(nothing)


async def online(place: Path, body: dict[str, Any]) -> Answer:
    parsed = parse_chat(body)
    async with open_local(place / "service.yaml") as system:
        reply = system.answer(parsed.request, model=parsed.model, query=parsed.query)
        await reply.text()
        assert reply.answer is not None
        return reply.answer


@pytest.mark.parametrize("policy", ["default", "vote"])
def test_a_row_with_tools_answers_as_online(tmp_path: Path, policy: str) -> None:
    save_router(tmp_path / "router")
    service(tmp_path, POLICIES)
    with (tmp_path / "experts.yaml").open("a") as file:
        file.write(CALLER)
    row = openai_row("one", "is it sunny?", f"coe/{policy}", tools=[WEATHER])
    write_lines(tmp_path / "in.jsonl", [row, openai_row("two", "is it sunny?", "base", tools=[WEATHER])])
    run(tmp_path / "service.yaml", tmp_path / "in.jsonl", tmp_path / "out", InProcess())
    answer, kept = asyncio.run(online(tmp_path, row["body"])), records(tmp_path / "out")
    written = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    lines = {line["custom_id"]: line for line in map(json.loads, written)}
    body = lines["one"]["response"]["body"]
    assert body["model"] == answer.expert == "caller", "the others cannot call tools"
    assert body["choices"] == ChatAnswer("77", 0, "caller").whole(answer)["choices"]
    assert body["choices"][0]["finish_reason"] == "tool_calls"
    assert kept["one"]["reasoning"] == "Look it up." and tuple(kept["one"]["notes"]) == answer.notes
    assert lines["two"]["response"]["status_code"] == 400 and "it cannot call tools" in kept["two"]["error"]["message"]
