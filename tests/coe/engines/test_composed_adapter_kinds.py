"""Every kind of adapter that a composition accepts answers in it as it does alone."""

from __future__ import annotations

import warnings
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine_models import adapter_spec, make_tokenizer, save_adapter, save_tiny_model, say
from latent_experts import asked, composition, interactions, left, loaded, noted, said

from coe.engines.base import Adapter, Member
from coe.engines.hf.composed import compose
from coe.engines.hf.expert import HFExpert
from coe.types import GenerateRequest
from registry.spec import ExpertSpec, Kind

KINDS: dict[str, dict[str, Any]] = {
    "another rank": {"r": 7},
    "dora": {"use_dora": True},
    "biases": {"lora_bias": True},
    "saved head": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [60, 5]},
    "tied head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
}
REQUEST = asked("the end of the answer the capital of france is paris", 8)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kinds") / "tiny"
    return save_tiny_model(folder, make_tokenizer(), num_hidden_layers=4, tie_word_embeddings=True)


@pytest.fixture
async def model(tied: Path) -> AsyncIterator[HFExpert]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns about a tied head
        async with loaded(tied) as expert:
            yield expert


@pytest.mark.parametrize("kind", KINDS)
async def test_it_answers_as_alone(model: HFExpert, tied: Path, tmp_path: Path, kind: str) -> None:
    folder = save_adapter(tmp_path / "tuned", tied, **KINDS[kind])
    adapter = Adapter(adapter_spec(folder), folder)
    alone = (await say(model, REQUEST, adapter)).text
    assert alone != (await say(model, REQUEST)).text
    _, states = await noted(model, REQUEST, adapter)
    reading = composition(tmp_path / "notes", ("sql",), interactions(("sql",), reads=False))
    with_notes = replace(REQUEST, notes=(left(replace(states, digest=None), "sql"),))
    assert (await said(reading.on(model, adapter).generate(with_notes))).text == alone

    spec = ExpertSpec(
        name="both",
        kind=Kind.COMPOSED,
        architecture="logits",
        members=("tuned", "tiny"),
        settings={"mode": "mean", "weights": {"tuned": 1, "tiny": 0}, "certain": 1},
    )
    in_step = compose(spec, {"tuned": Member(model, adapter), "tiny": Member(model)}, None)
    assert (await said(in_step.generate(REQUEST))).text == alone


@pytest.mark.parametrize("kind", KINDS)
async def test_its_own_entries_are_as_if_it_had_answered_before(
    model: HFExpert, tied: Path, tmp_path: Path, kind: str
) -> None:
    folder = save_adapter(tmp_path / "tuned", tied, **KINDS[kind])
    adapter = Adapter(adapter_spec(folder), folder)
    _, entries = await noted(model, REQUEST, adapter, channel="cache")
    cached = composition(tmp_path / "cache", ("sql",), architecture="cache").on(model, adapter)
    request = replace(REQUEST, notes=(left(replace(entries, digest=None), "sql"),))
    own, reading = cached.read(request)
    row = await model._preparation.row(replace(request, notes=None), own, None, reading)
    once = GenerateRequest(prompt="", prompt_ids=tuple(row.prompt_ids), max_tokens=8)
    assert (await said(cached.generate(request))).text == (await say(model, once, adapter)).text
