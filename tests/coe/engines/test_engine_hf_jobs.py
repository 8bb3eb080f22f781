"""Functions on the worker thread of a model: between the steps of a batch, with their own adapters."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import adapter_spec, model_spec, save_adapter, say
from test_engine_hf_admission import joins, running

from coe.engines.base import Adapter
from coe.engines.hf.engine import HFEngine
from coe.engines.hf.expert import HFExpert
from coe.engines.hf.lora.adapters import AdapterSlots
from coe.errors import EngineError, OutOfMemory, Unsupported, WeightsError
from coe.types import GenerateRequest

__all__ = ["joins"]
IDS = torch.tensor([[5, 60, 70, 80], [5, 60, 70, 80]])
SHORT = GenerateRequest(prompt="the end", max_tokens=6)


def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits  # type: ignore[no-any-return]


async def run(expert: HFExpert, call: Any, adapters: Sequence[Adapter | None] = (None,)) -> Any:
    async with asyncio.timeout(60):
        return await asyncio.wrap_future(expert.run(call, adapters))


def reference(tiny: Path, adapter: Adapter | None) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter.path)
    with torch.no_grad():
        return model.eval()(input_ids=IDS[:1]).logits  # type: ignore[no-any-return]


async def test_each_row_of_a_job_has_its_adapter(expert: HFExpert, tiny: Path, adapters: list[Adapter]) -> None:
    pairs: list[tuple[Adapter | None, Adapter | None]] = [(None, None), (adapters[1], None), (adapters[0], adapters[1])]
    for pair in pairs:
        found = await run(expert, logits, pair)
        expected = torch.cat([reference(tiny, adapter) for adapter in pair])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (reference(tiny, None) - reference(tiny, adapters[0])).abs().max() > 1e-3


async def test_jobs_run_on_the_worker_thread_in_inference_mode(expert: HFExpert) -> None:
    thread, mode = await run(expert, lambda model: (threading.current_thread(), torch.is_inference_mode_enabled()))
    assert thread is expert._worker.thread
    assert mode


async def test_a_job_runs_between_the_steps_of_a_batch(
    expert: HFExpert, adapters: list[Adapter], joins: list[int]
) -> None:
    """The batch goes on with its own adapters, and its answer does not change."""
    long = GenerateRequest(prompt="the capital of france", max_tokens=400)
    alone = (await say(expert, long)).text
    expected = [await run(expert, logits, (adapter, None)) for adapter in adapters]
    async with running(expert) as task:
        assert len(await run(expert, lambda model: list(expert._worker.batch))) == 1
        for adapter, found in zip(adapters, expected, strict=True):
            beside = await run(expert, logits, (adapter, None))
            torch.testing.assert_close(beside, found, rtol=1e-4, atol=1e-4)
        assert not task.done()
        short = await say(expert, SHORT, adapters[0])  # rows join between jobs as ever
        assert await task == alone
    assert short.text == (await say(expert, SHORT, adapters[0])).text


async def test_an_adapter_that_cannot_be_mixed_runs_between_the_steps_too(
    expert: HFExpert, tiny: Path, tmp_path: Path, joins: list[int]
) -> None:
    folder = save_adapter(tmp_path / "dora", tiny, use_dora=True)
    dora = Adapter(adapter_spec(folder), folder)
    expected = await run(expert, logits, (dora, dora))
    alone = (await say(expert, GenerateRequest(prompt="the capital of france", max_tokens=400))).text
    async with running(expert) as task:
        torch.testing.assert_close(await run(expert, logits, (dora, dora)), expected)
        assert await task == alone
    with pytest.raises(EngineError, match="batch of its own"):
        await run(expert, logits, (dora, None))
    assert (expected - reference(tiny, None)).abs().max() > 1e-3


async def test_jobs_wait_for_a_batch_with_an_alora_and_none_is_one(
    expert: HFExpert, tiny: Path, tokenizer: Any, tmp_path: Path, joins: list[int]
) -> None:
    start = tokenizer("the", add_special_tokens=False)["input_ids"]
    folder = save_adapter(tmp_path / "activated", tiny, alora_invocation_tokens=start)
    activated = Adapter(adapter_spec(folder), folder)
    with pytest.raises(Unsupported, match=r"on 'tiny' acts from its invocation tokens on \(aLoRA\)"):
        await run(expert, logits, (activated,))
    request = GenerateRequest(prompt="the capital of the", max_tokens=60)
    alone = (await say(expert, request, activated)).text
    begun = asyncio.Event()

    async def answer() -> str:
        texts = []
        async for chunk in expert.generate(request, activated):
            texts.append(chunk.text)
            begun.set()
        return "".join(texts)

    task = asyncio.create_task(answer())
    await begun.wait()
    rows = await run(expert, lambda model: list(expert._worker.batch))
    assert rows == []  # the batch had ended
    assert await task == alone


async def test_errors_of_a_job_are_its_own(expert: HFExpert, adapters: list[Adapter], tmp_path: Path) -> None:
    def fail(model: Any) -> None:
        raise RuntimeError("no luck")

    def exhaust(model: Any) -> None:
        raise RuntimeError("[enforce fail at alloc] not enough memory: you tried to allocate")

    async with running(expert) as task:
        with pytest.raises(EngineError, match="'tiny' failed while generating: RuntimeError: no luck"):
            await run(expert, fail)
        with pytest.raises(OutOfMemory, match="memory ran out"):
            await run(expert, exhaust)
        with pytest.raises(WeightsError):
            await run(expert, logits, (Adapter(adapter_spec(tmp_path / "none"), tmp_path / "none"),))
        assert len(await task) > 10


async def test_a_cancelled_job_does_not_run(expert: HFExpert) -> None:
    going, ran = threading.Event(), []
    first = expert.run(lambda model: going.wait(60))
    second = expert.run(lambda model: ran.append(1))
    assert second.cancel()
    going.set()
    await run(expert, lambda model: None)
    assert first.result() and ran == []


async def test_closing_fails_the_jobs_that_wait(engine: HFEngine, tiny: Path) -> None:
    expert = await engine.load(model_spec(tiny), tiny)
    assert isinstance(expert, HFExpert)
    going, begun = threading.Event(), threading.Event()
    first = expert.run(lambda model: (begun.set(), going.wait(60)))
    second = expert.run(logits)
    await asyncio.to_thread(begun.wait, 60)
    closing = asyncio.create_task(engine.unload(expert))
    with pytest.raises(EngineError, match="'tiny' was unloaded: load it again"):
        await asyncio.wrap_future(second)
    going.set()
    await closing
    assert first.result()[1]
    with pytest.raises(EngineError, match="'tiny' was unloaded"):
        expert.run(logits).result(60)


async def test_rows_do_not_starve_beside_jobs_that_follow_each_other(expert: HFExpert) -> None:
    done = False

    async def jobs() -> int:
        n = 0
        while not done:
            await run(expert, lambda model: None)
            n += 1
        return n

    task = asyncio.create_task(jobs())
    async with asyncio.timeout(60):
        said = await say(expert, SHORT)
    done = True
    assert await task > 1
    assert said.usage is not None and said.usage.completion_tokens == 6


async def test_adapters_in_use_are_kept_beyond_the_slots(tiny: Path, adapters: list[Adapter]) -> None:
    """A job loads its adapter beside those of a batch; the surplus leaves when it is not in use."""
    from coe.engines.hf.load import load_model

    slots = AdapterSlots(load_model("tiny", tiny, "cpu", torch.float32).model, "tiny", 2)
    first, second = (slots.acquire(adapter) for adapter in adapters[:2])
    third = slots.acquire(adapters[2], {first, second})
    assert len({first, second, third}) == 3 and len(slots) == 3
    slots.acquire(adapters[3], {third})
    assert len(slots) == 2
    assert slots.acquire(adapters[2]) == third
