"""OpenAI's answers: the official client's own types take every body."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from coe.compose import Single
from coe.policy import Always, Policy
from coe.protocol.answers import ChatAnswer, TextAnswer, usage_chunk
from coe.protocol.logprobs import TextLogprobs
from coe.protocol.responses import model_body, model_list, route_body
from coe.routing import DecisionInputs, Routed
from coe.types import Answer, Chunk, TokenLogprob, ToolCallDelta, Usage
from registry.spec import ExpertSpec, Kind, Price
from registry.store import Snapshot
from routers.base import Estimate, Query, RoutingDecision
from routers.decision import Utility

ANSWER = Answer("sql", "SELECT 1", "stop", Usage(5, 2))
USAGE = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}


def test_a_whole_chat_answer_is_what_the_client_expects() -> None:
    body = ChatAnswer("77", 1, "sql").whole(ANSWER)
    parsed = ChatCompletion.model_validate(body, strict=True)
    assert (parsed.id, parsed.model, parsed.created) == ("chatcmpl-77", "sql", 1)
    assert (parsed.choices[0].message.content, parsed.choices[0].finish_reason) == ("SELECT 1", "stop")
    assert body["usage"] == USAGE


def test_a_whole_completion_is_what_the_client_expects() -> None:
    parsed = Completion.model_validate(TextAnswer("77", 1, "sql").whole(ANSWER), strict=True)
    assert (parsed.id, parsed.object, parsed.choices[0].text) == ("cmpl-77", "text_completion", "SELECT 1")
    assert parsed.usage is not None and parsed.usage.total_tokens == 7


def test_the_chunks_of_a_chat_answer_open_with_the_role_and_end_with_the_reason() -> None:
    bodies = ChatAnswer("77", 1, "sql", include_usage=True)
    chunks = [*bodies.opening(), *bodies.pieces(Chunk("SELECT")), bodies.ending("length")]
    assert all(chunk["usage"] is None for chunk in chunks)
    parsed = [ChatCompletionChunk.model_validate(chunk, strict=True) for chunk in chunks]
    deltas = [chunk.choices[0].delta.model_dump(exclude_unset=True) for chunk in parsed]
    assert deltas == [{"role": "assistant", "content": "", "refusal": None}, {"content": "SELECT"}, {}]
    assert [chunk.choices[0].finish_reason for chunk in parsed] == [None, None, "length"]
    last = usage_chunk(bodies, Usage(5, 2))
    assert last["choices"] == [] and last["usage"] == USAGE
    assert "usage" not in ChatAnswer("77", 1, "sql").pieces(Chunk("x"))[0], "only where it is asked for"


def test_a_chunk_has_at_most_one_tool_call_in_one_piece() -> None:
    """openai-python and llama-index lose or misread further pieces of a chunk."""
    calls = (
        ToolCallDelta(0, "a", "get_time", ""),
        ToolCallDelta(0, arguments="{"),
        ToolCallDelta(0, arguments="}"),
        ToolCallDelta(1, "b", "get_time", "{"),
    )
    chunks = ChatAnswer("77", 1, "sql").pieces(Chunk("Let me look.", tool_calls=calls))
    deltas = [ChatCompletionChunk.model_validate(chunk, strict=True).choices[0].delta for chunk in chunks]
    assert [delta.content for delta in deltas] == ["Let me look.", None, None]
    pieces = [(call.index, call.id, call.function) for delta in deltas for call in delta.tool_calls or ()]
    assert [(i, name, f.name, f.arguments) for i, name, f in pieces if f] == [
        (0, "a", "get_time", "{}"),
        (1, "b", "get_time", "{"),
    ]


def test_the_chunks_of_a_completion_have_text_only() -> None:
    bodies = TextAnswer("77", 1, "sql")
    assert bodies.opening() == []
    (piece,) = bodies.pieces(Chunk("SELECT"))
    assert piece["choices"][0] == {"index": 0, "text": "SELECT", "logprobs": None, "finish_reason": None}
    assert bodies.ending("stop")["choices"][0]["finish_reason"] == "stop"
    assert usage_chunk(bodies, Usage(5, 2))["object"] == "text_completion"


def test_the_models_are_auto_the_policies_and_the_experts() -> None:
    base = ExpertSpec(name="base", kind=Kind.MODEL, source="fake://echo", context_length=64, tags=frozenset({"b", "a"}))
    price = Price(input_usd_per_mtok=1, output_usd_per_mtok=2)
    adapter = ExpertSpec(name="x", kind=Kind.ADAPTER, base="base", source="fake://echo", price=price)
    body = model_list(Snapshot(3, {"base": base, "x": adapter}), ["default"], created=9)
    assert [Model.model_validate(model).id for model in body["data"]] == ["auto", "coe/default", "base", "x"]
    assert body["data"][0] == {
        "id": "auto",
        "object": "model",
        "created": 9,
        "owned_by": "coe",
        "coe": {"kind": "policy"},
    }
    about = body["data"][3]["coe"]
    assert (about["kind"], about["base"], about["context_length"]) == ("adapter", "base", 64)
    assert about["price"] == {"input_usd_per_mtok": 1, "output_usd_per_mtok": 2}
    assert body["data"][2]["coe"]["tags"] == ["a", "b"] and body["data"][2]["coe"]["price"] is None


def test_a_model_has_the_capabilities_of_the_expert_and_its_engine_together() -> None:
    def able(kind: Kind = Kind.MODEL, **fields: Any) -> list[str]:
        spec = ExpertSpec(name="x", kind=kind, **{"source": "fake://echo", **fields})
        body = model_list(Snapshot(3, {"x": spec}), [], created=9)["data"][-1]
        assert body == model_body("x", Snapshot(3, {"x": spec}), 9)
        found: list[str] = body["coe"]["capabilities"]
        return found

    assert able() == ["chat"], "the engine can call tools, and the expert cannot"
    assert able(capabilities=frozenset({"chat", "tools", "vision", "logprobs"})) == ["chat", "logprobs", "tools"]
    assert able(capabilities=frozenset({"chat", "json_schema", "own"})) == ["chat", "json", "json_schema", "own"]
    assert able(Kind.EMBEDDING, capabilities=frozenset({"embedding", "tools"})) == ["embedding", "tools"]
    missing = able(engine="not-installed", capabilities=frozenset({"chat", "tools"}))
    assert missing == ["chat", "tools"], "an engine of another machine is not held against it"


def test_a_decision_is_told_with_what_it_was_made_from() -> None:
    estimate = Estimate(("a", "b"), np.array([[0.5, np.nan]]), cost_usd=np.array([[0.01, 0.02]]), labels=("sql",))
    inputs = DecisionInputs(estimate, Utility(), frozenset({"b", "a"}))
    policy = Policy("default", Always("a"), router_digest="sha256:1")
    body = json.loads(
        json.dumps(
            route_body("77", Routed(Query.of("hi"), inputs.decide(), policy, inputs, Single()), 4), allow_nan=False
        )
    )
    assert (body["id"], body["policy"], body["router_digest"], body["registry_version"]) == (
        "77",
        "default",
        "sha256:1",
        4,
    )
    assert body["estimate"] == {"a": {"quality": 0.5, "cost_usd": 0.01}, "b": {"quality": None, "cost_usd": 0.02}}
    assert body["decision"]["experts"] == ["a"] and body["decision"]["label"] == "sql" and body["allowed"] == ["a", "b"]


def test_the_utilities_of_a_decision_are_those_that_it_ranked_by() -> None:
    estimate = Estimate(("a", "b"), np.array([[0.5, 0.9]]), cost_usd=np.array([[0.01, 0.03]]))
    inputs = DecisionInputs(
        estimate, Utility(cost_weight=30, latency_weight=0.1), frozenset({"a", "b"}), load_s={"a": 1}
    )
    routed = Routed(Query.of("hi"), inputs.decide(), Policy("default", Always("a")), inputs, Single())
    utility = route_body("77", routed, 4)["utility"]
    assert utility["experts"] == pytest.approx({"a": 0.5 - 0.3 - 0.1, "b": 0.9 - 0.9})
    assert (utility["cost_weight"], utility["latency_weight"], utility["switch_weight"]) == (30, 0.1, 0)
    [score] = routed.decision.scores
    assert score == utility["experts"][routed.decision.experts[0]] == max(utility["experts"].values())
    assert route_body("77", routed, 4, frozenset({"b"}))["utility"]["experts"].keys() == {"b"}


def test_a_named_expert_has_no_estimate() -> None:
    decision = RoutingDecision(("a",), (1.0,), (1.0,), 1.0, reason="named by the request")
    body = route_body("77", Routed(Query.of("hi"), decision, None, None, Single()), 4)
    assert body["policy"] is body["estimate"] is body["router_digest"] is None and body["allowed"] == ["a"]


def test_of_two_likely_tokens_with_one_text_the_more_likely_one_is_listed() -> None:
    entry = TokenLogprob("a", -2.5, b"a", (("a", -0.5, b"a"), ("b", -1.0, b"b"), ("b", -3.0, b"b")))
    body = TextLogprobs().body([TokenLogprob("x", None, b"x"), entry])
    assert body is not None
    assert body["token_logprobs"] == [None, -2.5]
    assert body["top_logprobs"] == [None, {"a": -0.5, "b": -1.0}]  # lm-eval takes the largest for the greedy token
