"""HFEngine on a tiny random model in float32: answers, batches, streaming, cancellation, errors."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import CONTEXT, Said, adapter_spec, model_spec, save_adapter, say

from coe.engines.base import Adapter
from coe.engines.fake import FakeEngine
from coe.engines.hf import decoding
from coe.engines.hf.engine import HFEngine
from coe.engines.hf.expert import HFExpert
from coe.engines.hf.lora.adapters import AdapterSlots
from coe.errors import ContextLengthExceeded, DeadlineExceeded, EngineError, InvalidRequest, OutOfMemory, WeightsError
from coe.host import Host
from coe.types import GenerateRequest, Usage
from registry.store import Snapshot
from routers.base import Message

QUESTIONS = [f"{word} the answer" * n for n, word in enumerate(("paris", "of", "the end", "is", "a"), start=1)]


def ask(text: str = "the capital of france", **fields: Any) -> GenerateRequest:
    return GenerateRequest(messages=(Message("user", text),), **{"max_tokens": 24, **fields})


def bare_answer(folder: Path, request: GenerateRequest, adapter: Adapter | None = None) -> str:
    """The answer of transformers and peft to one request, without any code of this project."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter.path)
    turns = [{"role": m.role, "content": m.content} for m in request.messages]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**prompt, do_sample=False, max_new_tokens=request.max_tokens)
    text: str = tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


async def together(expert: HFExpert, asked: Sequence[tuple[GenerateRequest, Adapter | None]]) -> list[Said]:
    return await asyncio.gather(*(say(expert, request, adapter) for request, adapter in asked))


# Answers


async def test_greedy_answers_are_those_of_transformers(expert: HFExpert, tiny: Path, adapters: list[Adapter]) -> None:
    texts = []
    for adapter in (None, adapters[0], adapters[1]):
        said = await say(expert, ask(), adapter)
        assert said.text == bare_answer(tiny, ask(), adapter)
        texts.append(said.text)
    assert len(set(texts)) == 3  # adapters do change the answer


async def test_many_requests_with_mixed_adapters_answer_as_each_alone(
    expert: HFExpert, adapters: list[Adapter]
) -> None:
    experts = [None, *adapters]
    asked = [
        (ask(QUESTIONS[i % 4] + "!" * i, max_tokens=6 + i % 9, temperature=(i % 3) * 0.6, seed=i), experts[i % 5])
        for i in range(32)
    ]
    alone = [await say(expert, request, adapter) for request, adapter in asked]
    mixed = await together(expert, asked)
    assert [s.text for s in mixed] == [s.text for s in alone]
    assert [s.usage for s in mixed] == [s.usage for s in alone]
    assert len({s.text for s in alone}) > 25


async def test_an_adapter_whose_scores_overflow_fails_alone(
    expert: HFExpert, adapters: list[Adapter], tiny: Path, tmp_path: Path
) -> None:
    folder = save_adapter(tmp_path / "huge", tiny, lora_alpha=1e308)
    huge = Adapter(adapter_spec(folder), folder)
    alone = [await say(expert, ask(q), adapter) for q, adapter in zip(QUESTIONS, adapters, strict=False)]
    for request in (ask("the end"), ask("the end", temperature=0.7, seed=1)):
        asked = [(ask(q), adapter) for q, adapter in zip(QUESTIONS, adapters, strict=False)]
        *others, failed = await asyncio.gather(
            *(say(expert, *each) for each in [*asked, (request, huge)]), return_exceptions=True
        )
        assert [said.text for said in others] == [said.text for said in alone]
        assert isinstance(failed, EngineError) and "weights of 'huge' are damaged, or too large" in str(failed)


async def test_the_base_is_unchanged_beside_and_after_adapters(expert: HFExpert, adapters: list[Adapter]) -> None:
    before = [await say(expert, ask(q)) for q in QUESTIONS]
    beside = await together(expert, [(ask(q), None) for q in QUESTIONS] + [(ask(), a) for a in adapters])
    after = [await say(expert, ask(q)) for q in QUESTIONS]
    assert [s.text for s in before] == [s.text for s in beside[: len(QUESTIONS)]] == [s.text for s in after]


async def test_usage_is_exact_and_length_says_so(expert: HFExpert, tokenizer: Any) -> None:
    turns = [{"role": "user", "content": "the end"}]
    n_prompt = len(tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"])
    said = await say(expert, ask("the end", max_tokens=5))
    assert (said.reason, said.usage) == ("length", Usage(n_prompt, 5))


async def test_plain_prompts_are_continued_without_a_template(expert: HFExpert, tokenizer: Any) -> None:
    said = await say(expert, GenerateRequest(prompt="the end", max_tokens=3))
    assert said.usage == Usage(len(tokenizer("the end")["input_ids"]), 3)


async def test_a_whole_answer_is_streamed_in_order(expert: HFExpert) -> None:
    said = await say(expert, ask(max_tokens=60))
    assert len(said.chunks) > 1
    assert said.text == "".join(c.text for c in said.chunks)
    assert said.text == (await say(expert, ask(max_tokens=60))).text


async def test_seeds_repeat_and_differ(expert: HFExpert) -> None:
    def sampled(seed: int | None) -> GenerateRequest:
        return ask(temperature=1.0, top_p=0.95, seed=seed)

    first, again = await say(expert, sampled(1)), await say(expert, sampled(1))
    company = await together(expert, [(sampled(s), None) for s in (5, 1, 9)])
    assert first.text == again.text == company[1].text
    others = await together(expert, [(sampled(s), None) for s in (2, None, None)])
    assert len({first.text, *(s.text for s in others)}) == 4


async def test_a_tiny_nucleus_is_greedy(expert: HFExpert) -> None:
    greedy, narrow = await together(expert, [(ask(), None), (ask(temperature=1.5, top_p=1e-6, seed=3), None)])
    assert greedy.text == narrow.text


async def test_stop_strings_with_special_tokens_end_each_row_by_its_own(
    expert: HFExpert, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows generate the same tokens: `the` <|im_start|> `end` <|im_end|>, which is the end token."""
    ids = tokenizer("the\n<|im_start|>the end<|im_end|>", add_special_tokens=False)["input_ids"]
    n_prompt = len(tokenizer("the", add_special_tokens=False)["input_ids"])

    def scripted(rows: Any) -> Any:
        def forced(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            scores[:] = 0.0
            scores[:, ids[input_ids.shape[1] - n_prompt]] = 1.0
            return scores

        return forced

    monkeypatch.setattr("coe.engines.hf.decoding.RowSampler", scripted)
    stops = (
        (),
        ("<|im_start|>",),
        ("\n<|im_start|>the",),
        ("end<|im_end|>",),
        ("<|im_end|>",),
        ("|", "start"),
        ("th",),
    )
    said = await together(expert, [(GenerateRequest(prompt="the", max_tokens=40, stop=stop), None) for stop in stops])
    assert [one.text for one in said] == [
        "the\nthe end",
        "the\n",
        "the",
        "the\nthe ",
        "the\nthe end",
        "the\nthe end",
        "",
    ]
    assert {one.reason for one in said} == {"stop"}
    n_until = [len(ids), ids.index(tokenizer.bos_token_id) + 1]
    counts = [one.usage.completion_tokens for one in said if one.usage is not None]
    assert (counts[0], counts[1], counts[3:6]) == (n_until[0], n_until[1], [n_until[0]] * 3)
    assert n_until[1] < counts[2] < n_until[0] and counts[6] < n_until[1]
    assert all("<|im" not in chunk.text for one in said for chunk in one.chunks)


async def test_stop_strings_cut_across_tokens_and_other_rows_go_on(expert: HFExpert) -> None:
    whole = await say(expert, ask(max_tokens=40))
    middle = len(whole.text) // 2
    stop = whole.text[middle : middle + 3]
    cut, other = await together(expert, [(ask(max_tokens=40, stop=(stop,)), None), (ask(max_tokens=40), None)])
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.reason == "stop"
    assert other.text == whole.text
    assert cut.usage is not None
    assert cut.usage.completion_tokens < 40


async def test_finished_rows_leave_the_batch(
    expert: HFExpert, adapters: list[Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[tuple[GenerateRequest, Adapter | None]] = [
        (ask(question, max_tokens=n), adapter)
        for question, n, adapter in zip(
            QUESTIONS, (3, 12, 6, 9), (adapters[0], None, adapters[1], adapters[0]), strict=False
        )
    ]
    expected = [(await say(expert, *request)).text for request in requests]
    sizes: list[int] = []
    forward = decoding._forward

    def counted(model: Any, input_ids: torch.Tensor, *args: Any) -> Any:
        sizes.append(len(input_ids))
        return forward(model, input_ids, *args)

    monkeypatch.setattr(decoding, "_forward", counted)
    assert [said.text for said in await together(expert, requests)] == expected
    assert sizes == [4] * 3 + [3] * 3 + [2] * 3 + [1] * 3


async def test_rows_stay_in_a_cache_that_cannot_drop_them(expert: HFExpert, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [(ask(question, max_tokens=n), None) for question, n in zip(QUESTIONS, (2, 8, 5), strict=False)]
    expected = [(await say(expert, *request)).text for request in requests]
    monkeypatch.setattr(decoding, "is_selectable", lambda inputs: False)
    said = await together(expert, requests)
    assert [each.text for each in said] == expected
    assert [each.usage and each.usage.completion_tokens for each in said] == [2, 8, 5]


async def test_an_end_token_ends_an_answer(engine: HFEngine, tiny: Path, tokenizer: Any) -> None:
    expert = await engine.load(model_spec(tiny), tiny)
    loaded = expert.loaded
    assert loaded is not None
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "the capital of france"}], add_generation_prompt=True, return_tensors="pt"
    )
    ids = loaded.model.generate(**prompt, do_sample=False, max_new_tokens=12)[
        0, prompt["input_ids"].shape[1] :
    ].tolist()
    end = next(i for i in range(3, 12) if ids[i] not in ids[:i])
    object.__setattr__(loaded, "eos", frozenset({ids[end]}))
    said = await say(expert, ask(max_tokens=12))
    assert (said.reason, said.text) == ("stop", tokenizer.decode(ids[:end]))
    assert said.usage is not None
    assert said.usage.completion_tokens == end + 1
    await engine.unload(expert)


async def test_an_adapters_own_template_and_end_token_are_used(
    expert: HFExpert, adapters: list[Adapter], tmp_path: Path, tokenizer: Any
) -> None:
    folder = tmp_path / "styled"
    folder.mkdir()
    for file in adapters[0].path.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    said = await say(expert, ask("the end"), Adapter(adapter_spec(folder), folder))
    assert said.usage is not None
    assert said.usage.prompt_tokens == len(tokenizer("the end")["input_ids"])


# Cancellation and the end


async def test_closing_the_iterator_ends_the_row_and_frees_the_model(expert: HFExpert) -> None:
    endless = expert.generate(ask(max_tokens=400))
    await anext(endless)
    await endless.aclose()  # type: ignore[attr-defined]
    said = await asyncio.wait_for(say(expert, ask(max_tokens=2)), timeout=60)
    assert said.usage is not None
    assert said.usage.completion_tokens == 2


async def test_a_cancelled_row_does_not_disturb_the_others(expert: HFExpert) -> None:
    expected = await say(expert, ask(max_tokens=40))

    async def give_up_early() -> None:
        answer = expert.generate(ask("the end", max_tokens=400))
        await anext(answer)
        await answer.aclose()  # type: ignore[attr-defined]

    said, _ = await asyncio.gather(say(expert, ask(max_tokens=40)), give_up_early())
    assert said.text == expected.text


async def test_a_cancelled_task_leaves_nothing_running(engine: HFEngine, tiny: Path) -> None:
    expert = await engine.load(model_spec(tiny), tiny)
    task = asyncio.create_task(say(expert, ask(max_tokens=400)))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(engine.unload(expert), timeout=60)
    assert not any(t.name == "hf:tiny" for t in threading.enumerate())


async def test_a_deadline_ends_the_row_and_frees_its_place(engine: HFEngine, tiny: Path) -> None:
    """The batch has one row: only if the late answer stops is the next one generated."""
    one = HFEngine("cpu", "float32", max_batch=1)
    snapshot = Snapshot(1, {"tiny": model_spec(tiny, size_bytes=2**20)})
    host = Host(snapshot, {"hf": one}, budget_bytes=2**30, locate=lambda spec: tiny, kind_of=lambda spec: "hf")
    await host.load("tiny")
    worker = host.cache.peek("tiny")._worker  # type: ignore[union-attr]
    answered = 0
    for _ in range(20):
        try:
            async for _ in host.ask("tiny", ask(max_tokens=480, deadline_s=0.02)):
                answered += 1
        except DeadlineExceeded:
            break
    else:
        pytest.fail("480 tokens are generated within 20 ms")
    assert not host.in_flight
    async with asyncio.timeout(60):
        while worker.batch:  # the row leaves at its next token  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        assert [chunk async for chunk in host.ask("tiny", ask(max_tokens=2))][-1].finish_reason
    await host.aclose()


async def test_unloading_waits_for_answers_then_frees_the_weights(engine: HFEngine, tiny: Path) -> None:
    expert = await engine.load(model_spec(tiny), tiny)
    weights = weakref.ref(expert.loaded.model)
    answer = asyncio.create_task(say(expert, ask(max_tokens=60)))
    while not expert._worker.batch:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    await engine.unload(expert)
    assert (await answer).reason == "length"
    gc.collect()
    assert weights() is None
    with pytest.raises(EngineError, match="'tiny' was unloaded: load it again"):
        await say(expert, ask())
    with pytest.raises(TypeError, match="not loaded by this engine"):
        await engine.unload(await FakeEngine().load(model_spec(tiny), tiny))


async def test_a_queue_closed_under_way_refuses(expert: HFExpert) -> None:
    expert._waiting.close()
    with pytest.raises(EngineError, match="was unloaded"):
        await say(expert, ask())


# Errors


async def test_what_does_not_fit_the_context_is_refused_before_generating(engine: HFEngine, tiny: Path) -> None:
    expert = await engine.load(model_spec(tiny, context_length=9999), tiny)
    with pytest.raises(ContextLengthExceeded, match=f"max_tokens is {CONTEXT}, but 'tiny' has a context of {CONTEXT}"):
        await say(expert, ask(max_tokens=CONTEXT))
    with pytest.raises(ContextLengthExceeded) as info:
        await say(expert, ask("q" * 600, max_tokens=1))
    assert info.value.prompt_tokens > 600
    await engine.unload(expert)


async def test_a_registered_context_bounds_the_models(engine: HFEngine, tiny: Path, adapters: list[Adapter]) -> None:
    expert = await engine.load(model_spec(tiny, context_length=64), tiny)
    assert expert.context_length == 64
    narrow = Adapter(adapter_spec(adapters[0].path, context_length=40), adapters[0].path)
    with pytest.raises(ContextLengthExceeded, match="'a0' has a context of 40"):
        await say(expert, ask("a", max_tokens=30), narrow)
    await engine.unload(expert)


async def test_a_failing_request_harms_no_other(expert: HFExpert, adapters: list[Adapter], tmp_path: Path) -> None:
    broken = Adapter(adapter_spec(tmp_path), tmp_path)
    good, bad, empty = await asyncio.gather(
        say(expert, ask(), adapters[0]),
        say(expert, ask(), broken),
        say(expert, GenerateRequest(prompt="")),
        return_exceptions=True,
    )
    assert isinstance(good, Said)
    assert isinstance(bad, WeightsError)
    assert isinstance(empty, InvalidRequest)


async def test_a_failing_model_fails_its_requests_and_lives_on(
    expert: HFExpert, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: Any, **__: Any) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    with monkeypatch.context() as patch:
        patch.setattr(AdapterSlots, "generate", crash)
        with pytest.raises(EngineError, match="'tiny' failed while generating: RuntimeError: shapes cannot"):
            await say(expert, ask())
    assert (await say(expert, ask(max_tokens=2))).reason == "length"


async def test_a_batch_that_runs_out_of_memory_is_split(expert: HFExpert, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    generate = AdapterSlots.generate

    def small_memory(self: AdapterSlots, names: Sequence[str | None], **kwargs: Any) -> None:
        sizes.append(len(names))
        if len(names) > 2:
            raise torch.OutOfMemoryError("out of memory")
        generate(self, names, **kwargs)

    expected = [(await say(expert, ask(q, max_tokens=5))).text for q in QUESTIONS[:4]]
    monkeypatch.setattr(AdapterSlots, "generate", small_memory)
    said = await together(expert, [(ask(q, max_tokens=5), None) for q in QUESTIONS[:4]])
    assert [s.text for s in said] == expected
    assert sorted(sizes)[-1] > 2


async def test_a_request_that_fits_in_no_memory_says_so(expert: HFExpert, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(AdapterSlots, "generate", no_memory)
    with pytest.raises(OutOfMemory, match="'tiny' failed while generating: memory ran out"):
        await say(expert, ask())


async def test_a_worker_that_ends_leaves_no_request_waiting(engine: HFEngine, tiny: Path) -> None:
    def lost(device: str) -> int:
        if threading.current_thread().name.startswith("hf:"):
            raise RuntimeError("the device is lost")
        return 2**40

    broken = HFEngine("cpu", "float32", free=lost)
    expert = await broken.load(model_spec(tiny), tiny)
    answers = await asyncio.gather(*(say(expert, ask()) for _ in range(3)), return_exceptions=True)
    assert {type(a) for a in answers} == {EngineError}
    assert any("the worker of 'tiny' ended: RuntimeError: the device is lost" in str(a) for a in answers)
    await broken.unload(expert)


async def test_threads_are_set_only_when_asked_for(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    for threads in (None, 1):
        engine = HFEngine("cpu", "float32", threads=threads)
        await engine.unload(await engine.load(model_spec(tiny), tiny))
    assert set_to == [1]
