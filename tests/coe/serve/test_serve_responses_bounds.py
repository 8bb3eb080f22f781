"""`/v1/responses` within API keys, limits, metrics, deadlines and places: it is a request like any other."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from api_server import Gateway, gateway

from coe.serve.http.keyring import Keyring, StoredKeys
from coe.serve.http.ledger import Ledger
from coe.serve.http.metrics import Metrics
from registry.keys import KeySpec, Limit
from registry.store import Registry


async def post(there: Gateway, headers: dict[str, str] | None = None, **body: Any) -> Any:
    given = {"model": "auto", "input": "one two three", **body}
    return await there.http.post("/v1/responses", json=given, headers=headers or {})


def code(response: Any) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


async def test_a_key_hides_experts_and_pays_for_tokens(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'registry.db'}"
    limit = Limit(what="tokens", per="month", most=5)
    with Registry(url) as registry:
        spec = KeySpec(name="ada", experts=("echo",), policies=("default",), limits=(limit,))
        key, text = registry.create_api_key(spec, time.time())
    ada = {"authorization": f"Bearer {text}"}
    async with gateway(keyring=Keyring(StoredKeys(url)), ledger=Ledger(lambda: Registry(url))) as there:
        assert code(await post(there)) == (401, "invalid_api_key")
        assert (await there.http.get("/v1/responses/resp_1")).status_code == 401
        assert code(await there.http.get("/v1/responses/resp_1", headers=ada)) == (404, "response_not_found")
        assert code(await post(there, ada, model="upper")) == (404, "model_not_found")
        assert code(await post(there, ada, model="coe/safe")) == (404, "model_not_found")
        assert code(await post(there, ada, coe={"experts": ["upper"]})) == (400, "unknown_expert")
        answer = await post(there, ada, input="upper or echo", max_output_tokens=10)
        assert answer.status_code == 200 and answer.json()["model"] == "echo", "the router's choice may not answer it"
        async with asyncio.timeout(20):  # it is written after the answer
            with Registry(url) as registry:
                while [*registry.used(key, time.time())] != [pytest.approx(6)]:  # another process's file  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
        refused = await post(there, ada)
        assert code(refused) == (429, "rate_limit_exceeded") and int(refused.headers["retry-after"]) > 0
        assert code(await post(there, ada, stream=True)) == (429, "rate_limit_exceeded")


async def test_metrics_count_it_under_its_own_path() -> None:
    metrics = Metrics("gateway")
    async with gateway(metrics=metrics) as there:
        assert (await post(there)).status_code == (await post(there, stream=True)).status_code == 200
        assert (await post(there, input=3)).status_code == 400
        await there.log.ended(3)
        page = (await there.http.get("/metrics")).text
        labels = 'endpoint="/v1/responses",expert="echo",gateway="gateway",policy="default",status="200"'
        assert f"coe_requests_total{{{labels}}} 2.0" in page
        refused = 'endpoint="/v1/responses",expert="",gateway="gateway",policy="",status="400"'
        assert f"coe_requests_total{{{refused}}} 1.0" in page


async def test_places_deadlines_and_bodies_are_bounded() -> None:
    async with gateway(token_delay_s=0.05, settings={"max_in_flight": 1, "max_body_bytes": 200_000}) as there:
        first = asyncio.create_task(post(there, input="word " * 60))
        while not there.service.in_flight:  # set from within  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        assert code(await post(there)) == (429, "overloaded")
        assert (await first).status_code == 200
        late = await post(there, input="word " * 200, coe={"deadline_s": 0.3})
        assert code(late) == (504, "deadline_exceeded")
        text = (await post(there, input="word " * 200, coe={"deadline_s": 0.3}, stream=True)).text
        assert "event: error" in text and text.strip().rpartition("event: ")[2].startswith("response.failed")
        assert code(await post(there, input="x" * 200_001)) == (413, "request_too_large")
        assert there.service.in_flight == 0


async def test_hostile_bodies_get_one_short_error() -> None:
    async with gateway() as there:
        item = {"role": "user", "content": [{"type": "input_text", "text": "a"}]}
        deep: Any = "x"
        for _ in range(90):
            deep = {"a": deep}
        for given in (
            {"input": [item] * 8193},
            {"input": [{**item, "content": [{"type": "input_text"}] * 9000}]},
            {"input": [{"type": "nothing"}] * 8000},
            {"input": [{str(i): i for i in range(5000)}]},
            {"input": {"role": "user"}},
            {"input": [[]] * 8000},
            {"tools": [{"type": "function", "name": "f", "parameters": deep}]},
            {"tools": [{}] * 600},
            {"metadata": {str(i): i for i in range(20_000)}},
            {"text": {"format": {"type": "json_schema", "name": "s", "schema": deep}}},
            {"text": {str(i): i for i in range(200)}},
            {"reasoning": {"effort": deep}},
            {"include": ["x"] * 20_000},
            {"instructions": ["a"]},
            {"tool_choice": {"type": deep}},
        ):
            response = await post(there, **given)
            assert response.status_code == 400, given
            assert len(response.text) < 12_000 and response.json()["error"]["message"]
