"""Sampling options of hf experts in whole answers, alone and in mixed batches."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from engine_models import say  # noqa: E402

from coe.engines.base import Adapter  # noqa: E402
from coe.engines.hf.expert import HFExpert  # noqa: E402
from coe.sampling import SamplingOptions  # noqa: E402
from coe.types import GenerateRequest  # noqa: E402

PROMPTS = ["the capital of france is", "paris", "the end of the answer, the end" * 3, "e"]
OPTIONS = [
    SamplingOptions(),
    SamplingOptions(top_k=4, frequency_penalty=0.8),
    SamplingOptions(min_p=0.1, repetition_penalty=1.4),
    SamplingOptions(presence_penalty=-1.0, logit_bias={80: 6.0, 81: -100.0}, min_tokens=5, ignore_eos=True),
]


def ask(prompt: str, options: SamplingOptions, **fields: Any) -> GenerateRequest:
    return GenerateRequest(prompt=prompt, sampling=options, **{"max_tokens": 14, **fields})


async def test_rows_with_different_options_answer_as_each_alone(expert: HFExpert, adapters: list[Adapter]) -> None:
    asked = [
        (ask(prompt, options, temperature=0.9 * (i % 2), seed=i), (None, adapters[0], adapters[1])[i % 3])
        for i, (prompt, options) in enumerate((p, o) for p in PROMPTS for o in OPTIONS)
    ]
    alone = [await say(expert, *each) for each in asked]
    mixed = await asyncio.gather(*(say(expert, *each) for each in asked))
    assert [said.text for said in mixed] == [said.text for said in alone]
    assert len({said.text for said in alone}) > 12


async def test_greedy_answers_with_a_penalty_are_those_of_transformers(expert: HFExpert, tiny: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    options = SamplingOptions(repetition_penalty=1.5)
    mixed = await asyncio.gather(*(say(expert, ask(prompt, options)) for prompt in PROMPTS))
    for prompt, said in zip(PROMPTS, mixed, strict=True):
        inputs = tokenizer(prompt, return_tensors="pt")
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=14, repetition_penalty=1.5)[0]
        whole = tokenizer.decode(ids, skip_special_tokens=True)
        assert prompt + said.text == whole  # padding is not penalised


async def test_an_end_token_does_not_end_the_answer_before_its_least_length(expert: HFExpert, tokenizer: Any) -> None:
    end = {tokenizer.eos_token_id: 100.0}
    at_once = await say(expert, ask("the", SamplingOptions(logit_bias=end)))
    later = await say(expert, ask("the", SamplingOptions(logit_bias=end, min_tokens=6)))
    never = await say(expert, ask("the", SamplingOptions(logit_bias=end, ignore_eos=True), logprobs=0))
    assert [said.usage.completion_tokens for said in (at_once, later, never)] == [1, 7, 14]  # type: ignore[union-attr]
    assert [said.reason for said in (at_once, later, never)] == ["stop", "stop", "length"]
    assert never.text == ""
    assert {entry.token for chunk in never.chunks for entry in chunk.logprobs} == {"<|im_end|>"}


async def test_a_stop_string_does_not_stop_before_the_least_length(expert: HFExpert) -> None:
    whole = await say(expert, ask("the", SamplingOptions(logit_bias={70: 100.0})))
    stop = whole.text[0]
    assert whole.text == stop * 14
    cut = await say(expert, ask("the", SamplingOptions(logit_bias={70: 100.0}), stop=(stop,)))
    least = await say(expert, ask("the", SamplingOptions(logit_bias={70: 100.0}, min_tokens=5), stop=(stop,)))
    assert (cut.text, least.text, least.reason) == ("", stop * 4, "stop")
    assert least.usage is not None and least.usage.completion_tokens == 5
