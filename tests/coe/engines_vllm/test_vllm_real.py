"""The vLLM engine with vLLM: the answers of the hf engine, every option of a request, cancellation and failures."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine_models import Said, save_other_weights, say

from coe.engines.base import Adapter
from coe.engines.hf.engine import HFEngine
from coe.engines.hf.expert import HFExpert
from coe.engines.vllm.expert import VLLMExpert
from coe.engines.vllm.slot import VLLMSlot
from coe.errors import ContextLengthExceeded, HostLost, Rejected, WeightsError
from coe.sampling import SamplingOptions
from coe.types import GenerateRequest, Usage
from registry.digest import digest_of_text
from registry.spec import ExpertSpec
from registry.storage import coe_home
from routers.base import Message

pytestmark = [pytest.mark.vllm, pytest.mark.integration, pytest.mark.asyncio(loop_scope="session")]

LONG = "the capital of france is paris, " * 30  # more than a block of the cache, 128 tokens on a CPU
PROMPTS = ("the capital of france", "the end", "of the answer is", "paris, the end of the")


def ask(text: str, max_tokens: int = 12, **fields: Any) -> GenerateRequest:
    return GenerateRequest(prompt=text, max_tokens=max_tokens, **fields)


def shown(said: Said) -> tuple[str, str | None, Usage | None]:
    """vLLM leaves out bytes at the end that are no whole characters; the hf engine shows replacements."""
    return said.text.rstrip("\ufffd"), said.reason, said.usage


async def all_of(expert: Any, requests: list[tuple[GenerateRequest, Adapter | None]]) -> list[Said]:
    return await asyncio.gather(*(say(expert, request, adapter) for request, adapter in requests))


async def test_answers_equal_those_of_the_hf_engine_with_and_without_adapters(
    expert: VLLMExpert, hf: HFExpert, adapters: list[Adapter]
) -> None:
    requests = [(ask(text), adapter) for text in PROMPTS for adapter in (None, *adapters[:2])]
    requests += [(GenerateRequest(messages=(Message("user", PROMPTS[0]),), max_tokens=12), adapters[0])]
    ours, theirs = await all_of(expert, requests), await all_of(hf, requests)
    assert list(map(shown, ours)) == list(map(shown, theirs))
    assert len({said.text for said in ours[:3]}) == 3  # an adapter answers otherwise


async def test_log_probabilities_equal_those_of_the_hf_engine(expert: VLLMExpert, hf: HFExpert) -> None:
    request = ask(PROMPTS[0], 6, logprobs=3, prompt_logprobs=2, echo=True)
    ours, theirs = await say(expert, request), await say(hf, request)
    assert shown(ours) == shown(theirs)
    for field in ("prompt_logprobs", "logprobs"):
        mine = [each for chunk in ours.chunks for each in getattr(chunk, field)]
        other = [each for chunk in theirs.chunks for each in getattr(chunk, field)]
        assert [each.token for each in mine] == [each.token for each in other]
        assert [[t[0] for t in each.top] for each in mine] == [[t[0] for t in each.top] for each in other]
        assert [each.logprob for each in mine[1:]] == pytest.approx([each.logprob for each in other[1:]], abs=1e-3)


async def test_text_streams_whole_characters_and_token_prompts_give_the_same(expert: VLLMExpert) -> None:
    said = await say(expert, ask("the", 40, temperature=1.5, seed=3))
    assert len(said.chunks) > 3
    tokenizer = (await expert.core.live()).tokenizer
    ids = tuple(tokenizer("the")["input_ids"])
    again = await say(expert, GenerateRequest(prompt="", prompt_ids=ids, max_tokens=40, temperature=1.5, seed=3))
    assert again.text == said.text


async def test_an_answer_that_is_read_whole_leaves_vllm_at_once_and_is_the_streamed_one(
    expert: VLLMExpert, adapters: list[Adapter]
) -> None:
    chat = GenerateRequest(messages=(Message("user", PROMPTS[0]),), max_tokens=20)
    scored = ask(PROMPTS[0], 20, logprobs=2, prompt_logprobs=1, echo=True)
    for request, adapter in ((ask(PROMPTS[0], 20), None), (chat, None), (chat, adapters[0]), (scored, None)):
        streamed, whole = [await say(expert, replace(request, stream=s), adapter) for s in (True, False)]
        assert shown(whole) == shown(streamed)
        assert len(whole.chunks) == 1 < len(streamed.chunks)
        for field in ("prompt_logprobs", "logprobs"):
            pieces = tuple(each for chunk in streamed.chunks for each in getattr(chunk, field))
            assert [each.token for each in pieces] == [each.token for each in getattr(whole.chunks[0], field)]
    stop = streamed.text[len(PROMPTS[0]) + 4 :][:2]
    stopping = [await say(expert, replace(chat, stop=(stop,), stream=s)) for s in (True, False)]
    assert shown(stopping[0]) == shown(stopping[1])


async def test_a_seed_decides_whatever_else_is_in_the_batch(expert: VLLMExpert) -> None:
    alone = await say(expert, ask(PROMPTS[1], temperature=1.0, seed=5))
    others = [(ask(text, temperature=1.0), None) for text in PROMPTS]
    beside = await all_of(expert, [(ask(PROMPTS[1], temperature=1.0, seed=5), None), *others])
    assert beside[0].text == alone.text
    different = await all_of(expert, [(ask(PROMPTS[1], temperature=1.0, seed=i), None) for i in range(6)])
    assert len({said.text for said in different}) > 1


async def test_options_change_what_is_generated(expert: VLLMExpert, hf: HFExpert) -> None:
    plain = await say(expert, ask(PROMPTS[0], 20, sampling=SamplingOptions(ignore_eos=True)))
    cut = plain.text[3:5]
    requests = [
        ask(PROMPTS[0], 20, stop=(cut,), sampling=SamplingOptions(ignore_eos=True)),
        ask(PROMPTS[0], 8, sampling=SamplingOptions(logit_bias={40: 100.0})),
        ask(PROMPTS[0], 8, sampling=SamplingOptions(repetition_penalty=1.5)),
        ask(PROMPTS[0], 8, sampling=SamplingOptions(frequency_penalty=2.0, presence_penalty=1.0)),
        ask(PROMPTS[0], 0, echo=True),
    ]
    ours = await all_of(expert, [(request, None) for request in requests])
    theirs = await all_of(hf, [(request, None) for request in requests])
    assert list(map(shown, ours)) == list(map(shown, theirs))
    assert ours[0].reason == "stop" and cut not in ours[0].text


async def test_what_a_request_may_not_ask_fails_alone(expert: VLLMExpert) -> None:
    fine = asyncio.ensure_future(say(expert, ask(PROMPTS[0])))
    with pytest.raises(ContextLengthExceeded):
        await say(expert, ask("the " * 600, 4))
    with pytest.raises(Rejected, match="vocabulary"):
        await say(expert, GenerateRequest(prompt="", prompt_ids=(10**6,), max_tokens=2))
    with pytest.raises(Rejected, match="at most 20"):
        await say(expert, ask("the", 2, logprobs=21))
    assert (await fine).usage is not None


async def test_closing_or_cancelling_ends_the_work_in_vllm(expert: VLLMExpert) -> None:
    llm = (await expert.core.live()).llm
    endless = ask("the", 400, sampling=SamplingOptions(ignore_eos=True))
    async with aclosing(expert.generate(endless)) as chunks:
        await anext(chunks)
        assert llm.get_num_unfinished_requests() == 1
    assert llm.get_num_unfinished_requests() == 0
    began = asyncio.Event()

    async def read() -> None:
        async for _ in expert.generate(endless):
            began.set()

    task = asyncio.ensure_future(read())
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert llm.get_num_unfinished_requests() == 0


async def test_every_expert_has_a_cache_of_its_own(expert: VLLMExpert, adapters: list[Adapter]) -> None:
    running = await expert.core.live()
    prompt = "the capital of france is paris, " * 4
    salts = {(await expert._preparation.prepare(running, ask(prompt), each)).salt for each in (None, *adapters)}
    assert len(salts) == len(adapters) + 1


async def test_a_broken_adapter_fails_alone_and_more_adapters_than_fit_take_turns(
    expert: VLLMExpert, adapters: list[Adapter], tmp_path: Any
) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    for file in adapters[0].path.iterdir():
        (folder / file.name).write_bytes(
            file.read_bytes()[:-64] if file.suffix == ".safetensors" else file.read_bytes()
        )
    broken = Adapter(adapters[0].spec.model_copy(update={"name": "broken", "digest": "0" * 64}), folder)
    running = [(ask(text), adapter) for text in PROMPTS for adapter in adapters]  # four, where three fit
    failed, *said = await asyncio.gather(
        say(expert, ask(PROMPTS[0]), broken), *(say(expert, *each) for each in running), return_exceptions=True
    )
    assert isinstance(failed, WeightsError)
    alone = [await say(expert, *each) for each in running]
    assert [each.text for each in said if isinstance(each, Said)] == [each.text for each in alone]
    assert len(await (await expert.core.live()).llm.list_loras()) <= 3


async def test_weights_that_answer_the_canary_otherwise_are_quarantined(expert: VLLMExpert) -> None:
    running = await expert.core.live()
    await expert._check_weights(running)  # the first in the home of this test: kept
    await expert._check_weights(running)
    [file] = (coe_home() / "canaries").iterdir()
    kept = json.loads(file.read_text())
    kept["tokens"][4] += 1
    file.write_text(json.dumps(kept))
    with pytest.raises(WeightsError, match=r"quarantined.*token 5 of 16"):
        await expert._check_weights(running)


async def test_a_schema_constrains_the_answer_and_a_bad_one_is_refused(expert: VLLMExpert) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    messages = (Message("user", PROMPTS[0]),)
    said = await say(
        expert, GenerateRequest(messages=messages, max_tokens=60, format="json", json_schema={"schema": schema})
    )
    assert json.loads(said.text)["n"] in (1, 2) and said.reason == "stop"
    wrong = {"schema": {"type": "object", "not": {}}}
    with pytest.raises(Rejected, match="'not'"):
        await say(expert, GenerateRequest(messages=messages, max_tokens=9, format="json", json_schema=wrong))


async def cached_tokens(llm: Any, ids: list[int], salt: str) -> int:
    """Tokens of a prompt that vLLM has in its prefix cache under a salt."""
    from vllm.inputs import tokens_input
    from vllm.sampling_params import SamplingParams

    found = 0
    async for output in llm.generate(tokens_input(ids, cache_salt=salt), SamplingParams(max_tokens=1), "c"):
        found = output.num_cached_tokens
    return found


async def test_experts_take_turns_in_one_process_and_none_uses_the_cache_of_another(
    slot: VLLMSlot, spec: ExpertSpec, tiny: Path, tmp_path: Path, adapters: list[Adapter]
) -> None:
    folder = save_other_weights(tiny, tmp_path / "other")
    second = spec.model_copy(update={"name": "other", "digest": digest_of_text("other"), "source": str(folder)})
    request = GenerateRequest(prompt=LONG, max_tokens=8)
    expected = []
    for each, path in ((spec, tiny), (second, folder)):
        engine = HFEngine(device="cpu", dtype="float32")
        expert = await engine.load(each, path)
        expected.append((await say(expert, request)).text.rstrip("\ufffd"))
        await engine.unload(expert)
    assert expected[0] != expected[1]

    async def answer() -> str:
        assert slot.expert is not None
        processes.add((await slot.expert.core.live()).llm.engine_core.resources.engine_manager.processes[0].pid)
        return (await say(slot.expert, request)).text.rstrip("\ufffd")

    processes: set[int] = set()
    first = await slot.switch(spec, tiny)
    with_adapter = (await say(first, request, adapters[0])).text
    assert await answer() == expected[0]
    prepared = await first._preparation.prepare(await first.core.live(), request, None)

    async def cached(by: ExpertSpec) -> int:
        assert slot.expert is not None and by.digest is not None
        return await cached_tokens((await slot.expert.core.live()).llm, prepared.prompt_ids, by.digest)

    await slot.switch(second, folder)
    assert await cached(second) == 0
    assert await answer() == expected[1]
    again = await slot.switch(spec, tiny)
    assert await cached(spec) > 0  # from before the switches
    assert await answer() == expected[0]
    assert (await say(again, request, adapters[0])).text == with_adapter  # added again: the reload drops adapters
    assert len(processes) == 1


async def test_a_process_that_has_slept_answers_as_before(
    slot: VLLMSlot, spec: ExpertSpec, tiny: Path, adapters: list[Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, sleep mode frees no memory; scheduler and prefix cache behave as on a GPU."""
    monkeypatch.setattr(slot, "_sleeps", True)
    expert = slot.expert
    assert expert is not None  # of the test before
    requests = [(ask(LONG), None), (ask(LONG), adapters[0])]
    expected = [each.text for each in await all_of(expert, requests)]
    llm = (await expert.core.live()).llm
    ids = (await expert._preparation.prepare(await expert.core.live(), ask(LONG), None)).prompt_ids
    await slot.park()
    assert await llm.is_sleeping() and slot.expert is None
    await slot.unpark()
    assert not await llm.is_sleeping() and slot.expert is None
    again = await slot.switch(spec, tiny)
    assert (await again.core.live()).llm is llm
    assert await cached_tokens(llm, ids, spec.digest or "") == 0  # the memory of the cache was discarded
    assert [each.text for each in await all_of(again, requests)] == expected


async def test_an_engine_process_that_hangs_is_killed_and_starts_again(
    slot: VLLMSlot, adapters: list[Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Last in this file: it takes an engine start."""
    expert = slot.expert
    assert expert is not None  # of the test before
    expected = [await say(expert, ask(PROMPTS[0]), each) for each in (None, adapters[0])]
    whole = ask("the", 300, stream=False, sampling=SamplingOptions(ignore_eos=True))
    expected_whole = (await say(expert, whole)).text
    llm = (await expert.core.live()).llm
    async with aclosing(expert.generate(ask("the", 400, sampling=SamplingOptions(ignore_eos=True)))) as answer:
        held = asyncio.ensure_future(say(expert, whole))
        await anext(answer)
        [process] = llm.engine_core.resources.engine_manager.processes
        assert expert.unhealthy() is None
        for name, seconds in {"_slow_s": 0.2, "_hung_s": 2.0}.items():
            monkeypatch.setattr(expert.watch, name, seconds)
        os.kill(process.pid, signal.SIGSTOP)
        async with asyncio.timeout(30):
            while expert.unhealthy() is None:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        monkeypatch.undo()
        again = asyncio.gather(*(say(expert, ask(PROMPTS[0]), each) for each in (None, adapters[0])))
        with pytest.raises(HostLost, match="retry the request"):
            async for _ in answer:
                pass
    assert [said.text for said in await again] == [said.text for said in expected]
    assert (await held).text == expected_whole  # it was asked again: no text of it had been read
    assert (await expert.core.live()).llm is not llm and expert.unhealthy() is None
