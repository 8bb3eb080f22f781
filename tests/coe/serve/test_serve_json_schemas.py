"""Hostile JSON schemas through the API, to an `hf` expert: a clear 400 or a bounded answer, and others are answered."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from api_server import EXPERTS, Gateway, gateway
from engine_models import make_tokenizer, model_spec, save_tiny_model
from jsonschema import Draft202012Validator

from coe.engines.hf.engine import HFEngine
from coe.engines.hf.expert import HFExpert
from registry.spec import ExpertSpec

FLAT: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "level": {"enum": ["low", "high"]}},
    "required": ["name", "level"],
    "additionalProperties": False,
}
INTEGER = {"type": "integer"}


def having(schema: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"e": schema}, "required": ["e"], "additionalProperties": False}


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Gateway]:
    folder = save_tiny_model(tmp_path / "tiny", make_tokenizer())

    class Tiny(HFEngine):
        async def load(self, spec: ExpertSpec, path: Path) -> HFExpert:
            return await super().load(spec, folder)

    engine, spec = Tiny(device="cpu", dtype="float32"), model_spec(folder, parameters_total=10_000)
    async with gateway(experts=[*EXPERTS, spec], engines={"hf": engine}) as served:
        yield served


async def post(served: Gateway, schema: Any, *, stream: bool = False, max_tokens: int = 60) -> tuple[int, str]:
    """Status and body of a chat."""
    asked: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "the capital"}]}
    asked |= {"max_tokens": max_tokens, "stream": stream}
    if schema is not None:
        asked["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    answer = await served.http.post("/v1/chat/completions", json=asked, timeout=60)
    return answer.status_code, answer.text


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        (having({"not": INTEGER}), "the keyword 'not' of its JSON schema is not supported (at /properties/e/not)"),
        (having({"type": "string", "pattern": "^(?=a)b"}), "(at /properties/e/pattern)"),
        (having({"enum": [f"{i:01000}" for i in range(300)]}), "262,144"),
        (having({"type": "array", "items": INTEGER, "minItems": 10**9}), "lower its counts"),
        (having({"type": "array", "items": INTEGER, "maxItems": 10**9}), "lower its counts"),
        (having({"$ref": "#/$defs/a"}) | {"$defs": {"a": {"$ref": "#/$defs/a"}}}, "a part that no value satisfies"),
        (having({"type": "string", "pattern": "^((a{1000}){1000}){1000}$"}), "its JSON schema is too complex"),
        ({"type": "object", "properties": {f"p{i}": INTEGER for i in range(1_000)}}, "its JSON schema is too complex"),
    ],
)
async def test_a_hostile_schema_is_a_clear_error_and_others_are_answered(
    served: Gateway, schema: dict[str, Any], words: str
) -> None:
    async with asyncio.timeout(120):
        refused, plain, flat = await asyncio.gather(
            post(served, schema, max_tokens=200), post(served, None), post(served, FLAT)
        )
    error = json.loads(refused[1])["error"]
    assert refused[0] == 400 and words in error["message"] and len(error["message"]) < 1000
    assert plain[0] == flat[0] == 200
    assert is_valid(flat[1])


@pytest.mark.parametrize(
    "schema",
    [
        having({"type": "string", "maxLength": 10**9}),
        having({"type": "string", "pattern": "^(a+)+$"}),
        having({"type": "string", "pattern": "^.*a.{40}$"}),
        {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"], "additionalProperties": False},
    ],
)
async def test_a_hostile_schema_that_can_be_compiled_is_answered_within_max_tokens(
    served: Gateway, schema: dict[str, Any]
) -> None:
    async with asyncio.timeout(120):
        answered, flat = await asyncio.gather(post(served, schema), post(served, FLAT))
    body = json.loads(answered[1])
    assert answered[0] == flat[0] == 200 and is_valid(flat[1])
    assert body["usage"]["completion_tokens"] <= 60
    assert body["choices"][0]["finish_reason"] in ("length", "stop")


async def test_a_stream_ends_with_the_error_of_a_schema_that_is_too_complex(served: Gateway) -> None:
    large = {"type": "object", "properties": {f"p{i}": INTEGER for i in range(1_000)}}
    status, body = await post(served, large, stream=True)
    assert status in (200, 400)  # 200 if text was sent before
    assert "its JSON schema is too complex" in body and '"type":"invalid_request_error"' in body.replace(": ", ":")


def is_valid(body: str) -> bool:
    text = json.loads(body)["choices"][0]["message"]["content"]
    return Draft202012Validator(FLAT).is_valid(json.loads(text))
