"""Notes and entries with SmolLM2 in bfloat16, as it is served."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_models import say
from latent_experts import asked, composition, left, loaded, noted, row_of, said, scores_of

from coe.engines.latent.interaction import Interactions
from coe.engines.latent.shape import InteractionShape

pytestmark = pytest.mark.integration


async def test_smollm2_reads_its_own_notes_and_entries(smollm2: Path, tmp_path: Path) -> None:
    """Untrained notes change nothing; its own entries are as if it had answered once before."""
    request = asked("What is the capital of France?", 12)
    shape = InteractionShape(576, 30, {"peer": 576}, interactions=4)
    untrained = composition(tmp_path / "notes", ("peer",), Interactions(shape))
    cached = composition(tmp_path / "cache", ("peer",), architecture="cache")
    async with loaded(smollm2, dtype="bfloat16", threads=1) as model:
        plain = await say(model, request)
        answer, states = await noted(model, request)
        assert answer.text == plain.text
        assert "Paris" in plain.text
        assert states.states is not None
        assert states.states.shape == (1, 1 + len(states.tokens), 576)
        of_peer = left(replace(states, digest=None), "peer")
        read = await said(untrained.on(model).generate(replace(request, notes=(of_peer,))))
        assert read.text == plain.text
        _, entries = await noted(model, request, channel="cache")
        of_peer = left(replace(entries, digest=None), "peer")
        row = await row_of(model, replace(request, notes=(of_peer,)), cached.on(model))
        as_text = await model.prepare(replace(request, messages=(), prompt="", prompt_ids=tuple(row.prompt_ids)))
        one, two = (scores_of(model, [each], 1)[0, 0] for each in (row, as_text))
    assert int(one.argmax()) == int(two.argmax())
    assert float((one.softmax(-1) - two.softmax(-1)).abs().max()) < 0.1
    assert bool(torch.isfinite(one).all())
