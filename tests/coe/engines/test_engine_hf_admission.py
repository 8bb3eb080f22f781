"""Requests that come while others of the same model are being answered."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import Said, adapter_spec, model_spec, save_adapter, say
from test_engine_hf_batch import limits, row

from coe.chunks import Joined
from coe.engines.base import Adapter
from coe.engines.hf import decoding, row_caches
from coe.engines.hf.batch import BatchRow
from coe.engines.hf.decoding import Decoding
from coe.engines.hf.engine import HFEngine
from coe.engines.hf.expert import HFExpert
from coe.engines.hf.waiting import PASSED_OVER_S, WaitingRows, choose_joining
from coe.errors import EngineError, WeightsError
from coe.host import Host
from coe.sampling import SamplingOptions
from coe.types import Answer, GenerateRequest
from registry.describe import describe
from registry.store import Registry
from routers.base import Message

LONG = GenerateRequest(prompt="the capital of france", max_tokens=400)
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}


def ask(text: str = "the end", **fields: Any) -> GenerateRequest:
    return GenerateRequest(prompt=text, **{"max_tokens": 6, **fields})


def chat(text: str, **fields: Any) -> GenerateRequest:
    return GenerateRequest(messages=(Message("user", text),), **{"max_tokens": 60, **fields})


def whole(said: Said) -> Answer:
    joined = Joined()
    for chunk in said.chunks:
        joined.add(chunk)
    return joined.answer("tiny", said.chunks[-1])


@pytest.fixture
def joins(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the groups that have joined a running batch, whose steps take at least 2 ms."""
    sizes: list[int] = []
    join, forward = Decoding.join, decoding._forward

    def counted(self: Decoding, other: Decoding) -> None:
        join(self, other)
        sizes.append(len(other.rows))

    def slow(*args: Any) -> Any:
        time.sleep(0.002)
        return forward(*args)

    monkeypatch.setattr(Decoding, "join", counted)
    monkeypatch.setattr(decoding, "_forward", slow)
    return sizes


@asynccontextmanager
async def running(
    expert: HFExpert, request: GenerateRequest = LONG, adapter: Adapter | None = None
) -> AsyncIterator[Any]:
    """A long answer that has begun, as a task."""
    begun = asyncio.Event()

    async def read() -> str:
        texts = []
        async for chunk in expert.generate(request):
            texts.append(chunk.text)
            begun.set()
        return "".join(texts)

    task = asyncio.create_task(read())
    async with asyncio.timeout(60):
        await begun.wait()
    try:
        yield task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError, EngineError):
            await task


# Through the engine


async def test_a_request_does_not_wait_for_the_running_batch(
    expert: HFExpert, adapters: list[Adapter], joins: list[int]
) -> None:
    alone = [await say(expert, ask(), adapter) for adapter in (None, *adapters)]
    long = await say(expert, LONG)
    async with running(expert) as task:
        for adapter, expected in zip((None, *adapters), alone, strict=True):
            said = await say(expert, ask(), adapter)
            assert (said.text, said.usage) == (expected.text, expected.usage)
            assert not task.done()
        assert await task == long.text
    assert joins == [1] * 5


async def test_the_first_adapter_of_a_base_joins_a_running_answer(
    engine: HFEngine, tiny: Path, adapters: list[Adapter], joins: list[int]
) -> None:
    """The layers of the running base are wrapped while it answers; and unwrapped, as its only adapter changes."""
    reference = await engine.load(model_spec(tiny), tiny)
    long, *alone = [await say(reference, r, a) for r, a in [(LONG, None), *((ask(), a) for a in adapters[:2])]]
    await engine.unload(reference)
    one = HFEngine(device="cpu", dtype="float32", max_adapters=1)
    expert = await one.load(model_spec(tiny), tiny)
    async with running(expert) as task:
        assert [(await say(expert, ask(), a)).text for a in adapters[:2]] == [s.text for s in alone]
        assert not task.done() and await task == long.text
    assert [(await say(expert, ask(), a)).text for a in adapters[:2]] == [s.text for s in alone]  # loaded by no batch
    await one.unload(expert)
    assert joins == [1, 1]


async def test_every_feature_works_for_requests_that_join(
    tiny: Path, adapters: list[Adapter], joins: list[int]
) -> None:
    """Prompts longer than `prefill_tokens` are read in parts, scores of prompts included."""
    engine = HFEngine(device="cpu", dtype="float32", prefill_tokens=7)
    expert = await engine.load(model_spec(tiny), tiny)
    options = SamplingOptions(frequency_penalty=1.5, min_tokens=3, top_k=40)
    told = "the capital of france is paris, the end of the answer " * 3
    plain = await say(expert, ask(max_tokens=30))
    requests: list[tuple[GenerateRequest, Adapter | None]] = [
        (ask(told, logprobs=3, prompt_logprobs=2, echo=True), adapters[0]),
        (ask(told, max_tokens=1, wants="scores"), None),
        (ask(max_tokens=30, stop=(plain.text[9:12],)), None),
        (chat("a", format="json", json_schema={"name": "a", "schema": SCHEMA}, temperature=1.0, seed=4), adapters[1]),
        (chat("b", tools=(TOOL,), tool_choice="required", temperature=1.0, seed=2, max_tokens=200), None),
        *((ask(told[:i], temperature=1.0, top_p=0.9, seed=5, sampling=options), adapters[i % 3]) for i in (9, 31, 80)),
        (ask(told, max_tokens=0, echo=True, prompt_logprobs=0), adapters[2]),
        (ask("é" * 40, logprobs=0, sampling=SamplingOptions(logit_bias={70: 5.0})), adapters[3]),
    ]
    alone = [whole(await say(expert, *request)) for request in requests]
    async with running(expert) as task:
        joined = [whole(said) for said in await asyncio.gather(*(say(expert, *request) for request in requests))]
        assert not task.done()
    await engine.unload(expert)
    assert sum(joins) == len(requests)
    for one, other in zip(joined, alone, strict=True):
        assert (one.text, one.finish_reason, one.usage) == (other.text, other.finish_reason, other.usage)
        assert one.tool_calls == other.tool_calls
        for mine, theirs in ((one.logprobs, other.logprobs), (one.prompt_logprobs, other.prompt_logprobs)):
            assert [e.token for e in mine] == [e.token for e in theirs]
            numbers = [e.logprob for e in mine if e.logprob is not None]
            assert numbers == pytest.approx([e.logprob for e in theirs if e.logprob is not None], abs=1e-4)
    values = [torch.frombuffer(bytearray(each[1].value or b""), dtype=torch.float32) for each in (joined, alone)]
    torch.testing.assert_close(*values, rtol=0, atol=1e-4, equal_nan=True)
    assert json.loads(joined[3].text)["city"] in ("Rome", "Oslo") and joined[4].tool_calls[0].name == "get_weather"
    assert joined[2].text == plain.text[:9] and len(joined[0].prompt_logprobs) > 21


async def test_running_answers_go_on_while_a_long_prompt_is_read(tiny: Path, joins: list[int]) -> None:
    engine = HFEngine(device="cpu", dtype="float32", prefill_tokens=10)
    expert = await engine.load(model_spec(tiny), tiny)
    n_read: list[int] = []
    forward = decoding._forward

    def counted(model: Any, input_ids: Any, inputs: Any, n_new: int | None, run: Any) -> Any:
        n_read.append(len(input_ids) * (input_ids.shape[1] if n_new is None else n_new))
        return forward(model, input_ids, inputs, n_new, run)

    async with running(expert) as task:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decoding, "_forward", counted)
            await say(expert, ask("q" * 95, max_tokens=2))
        assert not task.done()
    await engine.unload(expert)
    start = n_read.index(10)
    assert n_read[start : start + 19] == [10, 1] * 9 + [5] and joins == [1]


async def test_a_cancelled_request_leaves_and_others_stay(expert: HFExpert, joins: list[int]) -> None:
    expected, long = await say(expert, ask(max_tokens=40)), await say(expert, LONG)
    async with running(expert) as task:
        async with running(expert, replace(LONG, prompt="the end", max_tokens=300)):
            said = asyncio.create_task(say(expert, ask(max_tokens=40)))
            await asyncio.sleep(0.02)
        assert (await said).text == expected.text
        assert await task == long.text


async def test_an_adapter_that_cannot_be_loaded_fails_alone(expert: HFExpert, tmp_path: Path) -> None:
    long = await say(expert, LONG)
    async with running(expert) as task:
        with pytest.raises(WeightsError):
            await say(expert, ask(), Adapter(adapter_spec(tmp_path), tmp_path))
        assert await task == long.text


async def test_an_adapter_with_a_batch_of_its_own_gets_its_turn(
    expert: HFExpert, tiny: Path, adapters: list[Adapter], tmp_path: Path
) -> None:
    """Requests that keep coming, and could join, wait for one that cannot."""
    folder = save_adapter(tmp_path / "dora", tiny, use_dora=True)
    dora = Adapter(adapter_spec(folder), folder)
    expected = [await say(expert, ask(), dora), await say(expert, ask(max_tokens=40), adapters[0])]
    ended = False

    async def keep_coming() -> list[str]:
        texts = []
        while not ended:
            texts.append((await say(expert, ask(max_tokens=40), adapters[0])).text)
        return texts

    others = [asyncio.create_task(keep_coming()) for _ in range(3)]
    async with asyncio.timeout(60):
        await asyncio.sleep(0.1)
        assert (await say(expert, ask(), dora)).text == expected[0].text
    ended = True
    for texts in await asyncio.gather(*others):
        assert set(texts) == {expected[1].text}


async def test_requests_for_which_memory_runs_out_wait_and_harm_no_other(
    expert: HFExpert, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs out while their prompts are read, and while the caches of a later layer are joined."""
    long, short = await say(expert, replace(LONG, max_tokens=60)), await say(expert, ask())
    joined, seen = row_caches._joined, []

    def full(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        seen.append(a.shape)
        if len(seen) == 3:  # the keys of the second layer
            raise torch.OutOfMemoryError("out of memory")
        return joined(a, b)

    monkeypatch.setattr(row_caches, "_joined", full)
    async with running(expert, replace(LONG, max_tokens=60)) as task:
        assert (await say(expert, ask())).text == short.text
        assert await task == long.text
    assert len(seen) == 3
    prefill, tries = Decoding.prefill, []

    def no_memory(self: Decoding, n_tokens: int | None = None) -> bool:
        tries.append(n_tokens)
        if n_tokens is not None:
            raise MemoryError
        return prefill(self, n_tokens)

    monkeypatch.setattr(Decoding, "prefill", no_memory)
    async with running(expert, replace(LONG, max_tokens=60)) as task:
        assert (await say(expert, ask())).text == short.text
        assert await task == long.text
    assert tries == [None, 256, None]  # once, then as a batch of its own


async def test_a_failure_while_a_prompt_is_read_fails_this_request(
    expert: HFExpert, monkeypatch: pytest.MonkeyPatch
) -> None:
    long, prefill = await say(expert, LONG), Decoding.prefill

    def crash(self: Decoding, n_tokens: int | None = None) -> bool:
        if n_tokens is not None:
            raise RuntimeError("shapes cannot be multiplied")
        return prefill(self, n_tokens)

    monkeypatch.setattr(Decoding, "prefill", crash)
    async with running(expert) as task:
        with pytest.raises(EngineError, match="RuntimeError: shapes cannot"):
            await say(expert, ask())
        assert await task == long.text


async def test_a_failure_of_the_model_fails_those_that_have_joined_too(
    expert: HFExpert, monkeypatch: pytest.MonkeyPatch, joins: list[int]
) -> None:
    async with running(expert) as task:
        other = asyncio.create_task(say(expert, replace(LONG, prompt="the end", max_tokens=300)))
        async with asyncio.timeout(60):
            while not joins:  # noqa: ASYNC110
                await asyncio.sleep(0.002)

        def crash(*args: Any) -> Any:
            raise RuntimeError("lost")

        with monkeypatch.context() as patch:
            patch.setattr(decoding, "_forward", crash)
            results = await asyncio.gather(task, other, return_exceptions=True)
    assert [str(result) for result in results] == ["'tiny' failed while generating: RuntimeError: lost"] * 2
    assert (await say(expert, ask(max_tokens=2))).reason == "length"


async def test_a_cache_that_rows_cannot_join_is_left_alone(
    expert: HFExpert, joins: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = await say(expert, ask())
    monkeypatch.setattr(decoding, "is_joinable", lambda inputs: False)
    async with running(expert, replace(LONG, max_tokens=50)) as task:
        assert (await say(expert, ask())).text == expected.text
        assert task.done() and joins == []


async def test_hidden_states_follow_their_row(expert: HFExpert, joins: list[int]) -> None:
    class Seen:
        def __init__(self, fails_at: int = -1) -> None:
            self.states: list[torch.Tensor] = []
            self._fails_at = fails_at

        def read(self, hidden: torch.Tensor) -> None:
            self.states.append(hidden)
            if len(self.states) == self._fails_at:
                raise ValueError("planned")

    async def states(prompt: str, n: int, fails_at: int = -1) -> torch.Tensor:
        seen = Seen(fails_at)
        request = ask(prompt, max_tokens=n)
        async for _ in expert.generate(request, state=seen):
            pass
        return torch.stack(seen.states)

    asked = [("the end", 9), ("paris", 30), ("the capital of", 20)]
    alone = [await states(*each) for each in asked]
    assert [len(each) for each in alone] == [9, 30, 20] and alone[0].shape[1] == 32
    async with running(expert) as task:
        mine = await asyncio.gather(*(states(*each) for each in asked), return_exceptions=False)
        with pytest.raises(EngineError, match="ValueError: planned"):
            await states("the end", 9, fails_at=3)
        assert not task.done()
    assert sum(joins) == 4
    for one, other in zip(mine, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-3)


async def test_a_request_to_the_same_base_joins_through_the_host(
    tiny: Path, adapters: list[Adapter], joins: list[int]
) -> None:
    model = describe(model_spec(tiny))
    with Registry("sqlite://") as registry:
        registry.change([model, *(describe(adapter.spec, model) for adapter in adapters[:2])])
        snapshot = registry.snapshot()
    engine = HFEngine(device="cpu", dtype="float32")
    host = Host(snapshot, {"hf": engine}, budget_bytes=2**30, locate=lambda spec: Path(spec.source))
    first = host.ask("tiny", LONG)
    await anext(first)
    for name in ("a0", "a1", "tiny"):
        chunks = [chunk async for chunk in host.ask(name, ask())]
        assert chunks[-1].finish_reason == "length" and chunks[-1].timing is not None
    assert host.in_flight.total() == 1 and joins == [1, 1, 1]
    await first.aclose()
    await host.aclose()


# Which rows join


def choose(
    waiting: Sequence[BatchRow],
    running: Sequence[BatchRow],
    can_join: Callable[[BatchRow], bool] = lambda row: True,
    now: float = 0.0,
    **fields: Any,
) -> list[BatchRow]:
    return choose_joining(waiting, running, limits(**fields), can_join, now)


def test_rows_join_in_their_order_up_to_the_limit() -> None:
    rows = [row() for _ in range(5)]
    assert choose(rows[2:], rows[:2]) == rows[2:]
    assert choose(rows[2:], rows[:2], rows=4) == rows[2:4]
    assert choose(rows[2:], rows[:2], rows=2) == []


def test_adapters_and_memory_of_the_whole_batch_bound_those_that_join() -> None:
    a, b, base, c = row(adapter="a"), row(adapter="b"), row(), row(adapter="c")
    assert choose([b, base, c], [a], adapters=2) == [b, base]
    running, small, wide = [row(10, max_tokens=40)], row(5, max_tokens=20), row(30, max_tokens=60)
    assert choose([wide, small], running, tokens=179) == [small]  # two rows of 90 columns
    assert choose([wide], running, tokens=180) == [wide]


def test_prompts_that_are_read_together_are_alike_and_within_the_bound() -> None:
    running, short, long = [row()], [row(20), row(20)], row(600)
    assert choose([*short, long], running, prefill=40) == short
    assert choose(short, running, prefill=39) == short[:1]
    assert choose([long, *short], running, prefill=40) == [long]  # alone, in parts


def test_a_row_that_cannot_join_is_passed_over_for_a_while_only() -> None:
    lone, others = row(), [row(), row()]
    lone.arrived = 5.0
    for now, expected in ((5.0 + PASSED_OVER_S, others), (5.1 + PASSED_OVER_S, [])):
        assert choose([lone, *others], [row()], lambda r: r is not lone, now) == expected


def test_the_queue_gives_at_once_and_takes_back_before_others() -> None:
    queue, rows = WaitingRows(n_full=4), [row() for _ in range(4)]
    assert queue.take_joining(list) == []
    for r in rows:
        queue.put(r)
    assert all(r.arrived > 0 for r in rows)
    rows[0].cancelled = True
    assert queue.take_joining(lambda waiting: list(waiting[:2])) == rows[1:3]
    queue.close()
    queue.put_back(rows[1:3])
    assert queue.take(limits) == [rows[1], rows[2], rows[3]] and queue.take(limits) == []
