"""`/v1/embeddings`: OpenAI's client, the forms of inputs and vectors, refusals, bounds, and what is logged."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import openai
import pytest
from api_server import EXPERTS, Gateway, expert, gateway

from coe.engines.fake_answers import N_NUMBERS, vectors_of
from coe.protocol import embeddings
from coe.protocol.bounds import MOST_INPUTS
from registry.spec import ExpertSpec, Kind, Price

PRICE = Price(input_usd_per_mtok=3, output_usd_per_mtok=0)


def embedder(name: str = "vectors", source: str = "fake://echo", **fields: Any) -> ExpertSpec:
    capabilities = frozenset({"embedding"})
    return ExpertSpec(name=name, kind=Kind.EMBEDDING, source=source, capabilities=capabilities, **fields)


ALL = (*EXPERTS, embedder(price=PRICE), embedder("broken vectors".replace(" ", "-"), "fake://fail"))


async def post(served: Gateway, status: int = 200, **body: Any) -> dict[str, Any]:
    content = json.dumps({"model": "vectors"} | body)  # ASCII: it may hold a lone surrogate
    response = await served.http.post("/v1/embeddings", content=content, headers={"content-type": "application/json"})
    assert response.status_code == status, response.text
    return dict(response.json())


@pytest.mark.parametrize("given", ["a text", ["a text", "two"], [5, 6], [[5, 6], [7]]])
async def test_openais_client_gets_a_vector_for_each_input(given: Any) -> None:
    async with gateway(experts=ALL) as served:
        for encoding in (openai.omit, "float", "base64"):  # without one, the client asks for base64, and reads it
            answer = await served.client.embeddings.create(
                model="vectors", input=given, encoding_format=encoding, user="me"
            )
            inputs = [given] if isinstance(given, str) or isinstance(given[0], int) else given
            wanted = vectors_of([each if isinstance(each, str) else tuple(each) for each in inputs])
            found: list[Any] = [one.embedding for one in answer.data]
            if encoding == "base64":
                found = [np.frombuffer(base64.b64decode(one), "<f4") for one in found]
            assert np.array_equal(np.array(found, np.float32), wanted)
            assert [one.index for one in answer.data] == list(range(len(inputs)))
            assert answer.model == "vectors"
            assert answer.usage.prompt_tokens == answer.usage.total_tokens > 0


async def test_dimensions_shorten_vectors_to_length_one() -> None:
    async with gateway(experts=ALL) as served:
        short = await served.client.embeddings.create(model="vectors", input="a text", dimensions=4)
        whole = vectors_of(["a text"])[0, :4]
        assert short.data[0].embedding == pytest.approx(list(whole / np.linalg.norm(whole)), abs=1e-6)
        error = (await post(served, 400, input="a", dimensions=N_NUMBERS + 1))["error"]
        assert error["param"] == "dimensions" and f"have {N_NUMBERS}" in error["message"]
        assert len((await post(served, input="a", dimensions=N_NUMBERS))["data"][0]["embedding"]) == N_NUMBERS


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "input", "is required"),
        ({"input": ""}, "input", "must not be empty"),
        ({"input": []}, "input", "should be a string, an array of strings"),
        ({"input": ["a", ""]}, "input[1]", "must not be empty"),
        ({"input": ["a", 5]}, "input[1]", "should be a string, as the first input is"),
        ({"input": [[]]}, "input[0]", "must not be empty"),
        ({"input": [5, -1]}, "input[1]", "should be a token id"),
        ({"input": {"text": "a"}}, "input", "should be a string"),
        ({"input": "\ud800"}, "input", "not text"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", "'float' or 'base64'"),
        ({"input": "a", "dimensions": 0}, "dimensions", "greater than or equal to 1"),
        ({"input": "a", "dimensions": 65_537}, "dimensions", "less than or equal to 65536"),
        ({"input": "a", "truncate_prompt_tokens": 5}, "truncate_prompt_tokens", "not supported"),
        ({"input": "a", "dimension": 5}, "dimension", "did you mean 'dimensions'"),
        (
            {"input": "a", "model": "auto"},
            "model",
            "no policy chooses only among embedding models: name one of vectors",
        ),
        ({"input": "a", "coe": {"experts": []}}, "coe.experts", "must not be empty"),
        ({"input": "a", "coe": {"exclude": ["vektors"]}}, "coe.exclude", "did you mean 'vectors'"),
        ({"input": "a", "coe": {"cost_weight": 1}}, "coe.cost_weight", "is not a known field"),
        ({"input": "a", "model": "echo"}, "model", "'echo' returns no embeddings: name one of vectors, broken-vec"),
    ],
)
async def test_what_is_refused(body: dict[str, Any], param: str, message: str) -> None:
    async with gateway(experts=ALL) as served:
        error = (await post(served, 400, **body))["error"]
        assert error["param"] == param and message in error["message"]


async def test_the_number_of_inputs_is_bounded() -> None:
    async with gateway(experts=ALL) as served:
        assert len((await post(served, input=["a"] * MOST_INPUTS))["data"]) == MOST_INPUTS
        error = (await post(served, 400, input=["a"] * (MOST_INPUTS + 1)))["error"]
        assert error["code"] == "too_many" and "has 2,049 inputs, at most 2,048 are read" in error["message"]


async def test_the_numbers_of_a_response_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "MOST_NUMBERS", 3 * N_NUMBERS)
    async with gateway(experts=ALL) as served:
        assert len((await post(served, input=["a"] * 3))["data"]) == 3
        error = (await post(served, 400, input=["a"] * 4))["error"]
        assert "4 vectors of 16 numbers are more than 48 numbers" in error["message"]


async def test_models_that_do_not_exist_and_none_that_embeds() -> None:
    async with gateway(experts=ALL) as served:
        error = (await post(served, 404, input="a", model="vektors"))["error"]
        assert error["code"] == "model_not_found" and "did you mean 'vectors'" in error["message"]
    async with gateway(experts=(expert("echo"),)) as served:
        error = (await post(served, 400, input="a", model="echo"))["error"]
        assert "no expert of kind 'embedding' is registered" in error["message"]


async def test_an_embedding_model_refuses_to_chat_and_to_complete() -> None:
    async with gateway(experts=ALL) as served:
        for send in (
            served.client.chat.completions.create(model="vectors", messages=[{"role": "user", "content": "hi"}]),
            served.client.completions.create(model="vectors", prompt="hi"),
        ):
            with pytest.raises(openai.BadRequestError, match="cannot chat; send texts to /v1/embeddings"):
                await send


async def test_it_is_admitted_logged_and_priced_as_any_request() -> None:
    async with gateway(experts=ALL) as served:
        response = await served.http.post(
            "/v1/embeddings",
            json={"model": "vectors", "input": ["a b", "c"], "user": "x"},
            headers={"x-coe-debug": "1"},
        )
        assert response.headers["x-coe-expert"] == "vectors" and response.headers["x-coe-router"] == "direct"
        assert response.headers["x-coe-warning"] == "ignored: user"
        assert response.json()["coe"]["asked"] == ["vectors"]
        [line] = await served.log.ended(1)
        assert (line.endpoint, line.expert, line.status, line.error) == ("/v1/embeddings", "vectors", 200, None)
        assert line.answer is not None
        assert line.answer.usage.prompt_tokens == 3 and line.answer.cost_usd == pytest.approx(9e-6)
        assert served.engine.tally.generations["vectors"] == 1 and served.service.in_flight == 0


async def test_a_failing_model_and_a_full_service_answer_as_for_chat() -> None:
    async with gateway(experts=ALL) as served:
        error = (await post(served, 500, input="a", model="broken-vectors"))["error"]
        assert "broken-vectors" in error["message"]
    async with gateway(experts=ALL, token_delay_s=60, settings={"deadline_s": 0.2}) as served:
        assert (await post(served, 504, input="a"))["error"]["code"] == "deadline_exceeded"
    async with gateway(experts=ALL, token_delay_s=60) as served:
        assert (await post(served, 504, input="a", coe={"deadline_s": 0.1}))["error"]["code"] == "deadline_exceeded"
