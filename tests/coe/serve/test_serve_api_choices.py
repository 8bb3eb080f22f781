"""Several answers to one request: `n` choices, several prompts, as one body and as a stream."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from api_server import EXPERTS, Gateway, expert, gateway

from coe.engines.fake import FakeExpert
from coe.types import Chunk, GenerateRequest, Usage

QUESTION: list[Any] = [{"role": "user", "content": "hello upper world"}]


async def completions(g: Gateway, **options: Any) -> Any:
    return await g.client.completions.create(**{"model": "auto", "prompt": ["be upper", "stay echo here"], **options})


async def test_several_prompts_are_decided_each_and_answered_in_order() -> None:
    async with gateway() as g:
        raw = await g.client.completions.with_raw_response.create(model="auto", prompt=["be upper", "stay echo here"])
        answer, headers = raw.parse(), raw.headers
        assert [(choice.index, choice.text) for choice in answer.choices] == [(0, "BE UPPER"), (1, "stay echo here")]
        assert answer.model == "auto" and answer.model_extra["coe"] == {"experts": ["upper", "echo"]}
        assert (headers["x-coe-expert"], headers["x-coe-router"]) == ("upper, echo", "default")
        assert answer.usage is not None and (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 5)
        first, second = await g.log.ended(2)
        assert (first.id, second.id) == (headers["x-coe-decision-id"], headers["x-coe-decision-id"] + "-1")
        assert [line.expert for line in (first, second)] == ["upper", "echo"]
        assert [line.routed and line.routed.query.text for line in (first, second)] == ["be upper", "stay echo here"]
        assert first.answer is not None and first.answer.usage == Usage(2, 2) and first.answer.cost_usd == 6e-6


async def test_one_expert_for_all_prompts_is_the_model_of_the_body() -> None:
    async with gateway() as g:
        answer = await completions(g, model="upper", n=2)
        assert answer.model == "upper" and "coe" not in answer.model_extra
        assert [choice.text for choice in answer.choices] == ["BE UPPER"] * 2 + ["STAY ECHO HERE"] * 2
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]


async def test_sampled_choices_run_each_with_a_seed_of_its_own_and_the_prompt_counts_once() -> None:
    seeds: list[int | None] = []

    async def sampled(self: FakeExpert, request: GenerateRequest, adapter: object = None) -> AsyncIterator[Chunk]:
        seeds.append(request.seed)
        yield Chunk(f"seed {request.seed}")
        yield Chunk("", "stop", Usage(3, 2))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeExpert, "generate", sampled)
        async with gateway() as g:
            answer = await g.client.chat.completions.create(
                model="auto", messages=QUESTION, n=3, temperature=0.7, seed=2**63 - 2
            )
            assert Counter(seeds) == Counter([2**63 - 2, 2**63 - 1, -(2**63)])
            assert [choice.message.content for choice in answer.choices] == [
                f"seed {2**63 - 2}",
                f"seed {2**63 - 1}",
                f"seed {-(2**63)}",
            ]
            assert answer.usage is not None and (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 6)
            [line] = await g.log.ended(1)
            assert line.answer is not None and line.answer.usage == Usage(3, 6)
            assert line.answer.cost_usd == pytest.approx(3 * (3 + 2 * 2) * 1e-6), "each answer reads the prompt"
            assert len(line.done) == 3


async def test_greedy_choices_are_generated_once_and_repeated() -> None:
    async with gateway() as g:
        answer = await g.client.chat.completions.create(model="auto", messages=QUESTION, n=3)
        assert [choice.message.content for choice in answer.choices] == ["HELLO UPPER WORLD"] * 3
        assert g.engine.tally.generations["upper"] == 1
        assert answer.usage is not None and answer.usage.completion_tokens == 3
        stream = await g.client.chat.completions.create(
            model="auto", messages=QUESTION, n=2, stream=True, stream_options={"include_usage": True}
        )
        texts, reasons = ["", ""], {}
        async for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                if choice.finish_reason:
                    reasons[choice.index] = choice.finish_reason
        assert texts == ["HELLO UPPER WORLD"] * 2 and reasons == {0: "stop", 1: "stop"}
        assert chunk.usage is not None and chunk.usage.completion_tokens == 3


async def test_streamed_choices_have_their_index_their_expert_and_one_end() -> None:
    async with gateway(token_delay_s=0.002) as g:
        body = {"model": "auto", "prompt": ["be upper", "stay echo here"], "stream": True, "n": 2, "temperature": 1}
        body |= {"stream_options": {"include_usage": True}, "coe": {"answers": True}}
        response = await g.http.post("/v1/completions", json=body)
        events = response.text.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
        texts, models, ends = [""] * 4, [set[str]() for _ in range(4)], Counter[int]()
        for chunk in chunks[:-1]:
            [choice] = chunk["choices"]
            texts[choice["index"]] += choice["text"]
            models[choice["index"]].add(chunk["model"])
            ends[choice["index"]] += choice["finish_reason"] is not None
        assert texts == ["BE UPPER"] * 2 + ["stay echo here"] * 2
        assert models == [{"upper"}] * 2 + [{"echo"}] * 2 and ends == Counter(range(4))
        last = chunks[-1]
        assert (last["choices"], last["model"]) == ([], "auto")
        assert last["usage"] == {"prompt_tokens": 5, "completion_tokens": 10, "total_tokens": 15}
        assert last["coe"]["experts"] == ["upper", "upper", "echo", "echo"]
        assert [(a["reply"], a["text"]) for a in last["coe"]["answers"]] == list(enumerate(texts))


async def test_one_failing_answer_fails_the_request_and_ends_the_others() -> None:
    async with gateway(token_delay_s=0.01) as g:
        with pytest.raises(openai.InternalServerError, match="failed after 0 tokens"):
            await completions(g, prompt=["broken", "a long echo of some more words that never ends"])
        lines = await g.log.ended(2)
        assert {line.error for line in lines} == {"engine_error"} and {line.status for line in lines} == {500}
        assert g.engine.tally.cancelled["echo"] == 1 and not g.engine.tally.in_flight["echo"]
        stream = await g.client.chat.completions.create(
            model="half", messages=[{"role": "user", "content": "a b c d"}], n=2, temperature=1, stream=True
        )
        with pytest.raises(openai.APIError, match="failed after 2 tokens"):
            async for _ in stream:
                pass


async def test_a_prompt_that_no_expert_can_take_is_named() -> None:
    async with gateway(experts=[expert("echo", context_length=16)]) as g:
        with pytest.raises(openai.BadRequestError, match=r"no expert can take query prompt\[0\]") as caught:
            await completions(g, max_tokens=100)
        assert caught.value.code == "context_length_exceeded" and not g.engine.tally.generations


async def test_a_client_that_leaves_ends_all_answers_and_frees_all_places() -> None:
    async with gateway(token_delay_s=0.05) as g:
        task = asyncio.create_task(completions(g, prompt=["a b c d e f g h"] * 5, n=2, temperature=1))
        async with asyncio.timeout(30):
            while g.engine.tally.in_flight["echo"] < 10:  # there is no event  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            assert g.service.in_flight == 10, "each answer takes a place"
            task.cancel()
            while g.service.in_flight or g.engine.tally.in_flight["echo"]:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        lines = await g.log.ended(5)
        assert {line.error for line in lines} == {"cancelled"} and g.engine.tally.cancelled["echo"] == 10


async def test_a_request_takes_a_place_for_each_answer() -> None:
    async with gateway(settings={"max_in_flight": 3}) as g:
        assert len((await completions(g, prompt=["a", "b", "c"])).choices) == 3
        with pytest.raises(openai.BadRequestError, match="4 answers in one request; only 3 may be in flight"):
            await completions(g, prompt=["a", "b"], n=2, temperature=1)
        assert len((await completions(g, prompt=["a"], n=9)).choices) == 9, "a greedy answer is generated once"


async def test_the_deadline_holds_for_all_answers_together() -> None:
    async with gateway(token_delay_s=0.2) as g:
        with pytest.raises(openai.APIStatusError, match="did not finish within 0.1 s") as caught:
            await completions(g, prompt=["a b c", "d e f"], extra_body={"coe": {"deadline_s": 0.1}})
        assert caught.value.status_code == 504 and g.service.in_flight == 0


async def test_the_route_of_several_prompts_lists_each_decision() -> None:
    async with gateway(experts=EXPERTS) as g:
        response = await g.http.post("/v1/route", json={"model": "auto", "prompt": ["be upper", "stay echo here"]})
        body = response.json()
        assert body["decision"]["experts"] == ["upper"]
        assert [(other["id"], other["decision"]["experts"]) for other in body["others"]] == [
            (body["id"] + "-1", ["echo"])
        ]
        assert not g.engine.tally.generations
