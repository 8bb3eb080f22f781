"""Notes as decoding reads them: the sums of `Interactions.read`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from coe.engines.latent import prepared_reading
from coe.engines.latent.interaction import Interactions
from coe.engines.latent.memory import Memories, Memory, PeerStates
from coe.engines.latent.prepared_reading import PreparedReading
from coe.engines.latent.shape import InteractionShape

SHAPES: dict[str, dict[str, Any]] = {
    "default": {},
    "no null note": {"null_note": False},
    "no spans": {"spans": False},
    "same layers": {"layers": "same", "depths": 2},
    "two depths": {"depths": 2},
    "order": {"order": True},
}


def made(**settings: Any) -> Interactions:
    sizes: dict[str, Any] = {"shared_width": 12, "heads": 3, "interactions": 2} | settings
    module = Interactions(InteractionShape(10, 6, {"a": 7, "b": 5}, **sizes), seed=1)
    for each in module.interactions:
        torch.nn.init.normal_(each.output)
    return module


def memory(module: Interactions, counts: dict[str, int], *, weight: float | None = None) -> Memory:
    states = {}
    for peer, n in counts.items():
        spans = torch.full((n, 2), -1)
        for place in range(n // 2):
            spans[place] = torch.tensor((place, place + 2))
        states[peer] = PeerStates(
            torch.randn(module.shape.depths, n, module.shape.peers[peer]),
            spans,
            order=torch.arange(n),
            weight=None if weight is None else torch.tensor(weight),
        )
    return module.memory(states)


@pytest.mark.parametrize("settings", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("with_spans", [False, True])
@pytest.mark.parametrize("most_scores", [2**24, 40])
def test_what_is_added_is_what_interactions_read(
    settings: dict[str, Any], with_spans: bool, most_scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of several lengths and weights, in whole or part by part, and a batch without padding."""
    monkeypatch.setattr(prepared_reading, "_MOST_SCORES", most_scores)
    torch.manual_seed(0)
    module = made(**settings)
    batches = [
        [memory(module, {"a": 3, "b": 6}), memory(module, {"b": 1}, weight=0.3), memory(module, {"a": 4})],
        [memory(module, {"a": 5})],
    ]
    spans = torch.randint(0, 5, (3, 9, 1)).expand(-1, -1, 2) + torch.tensor([0, 2]) if with_spans else None
    with torch.inference_mode():
        for memories in batches:
            stacked = Memories.stacked(memories)
            assert stacked is not None
            prepared = PreparedReading(module, stacked)
            hidden = torch.randn(len(memories), 9, 10)
            own = None if spans is None else spans[: len(memories)]
            for q in range(2):
                expected = hidden + module.read(q, hidden, stacked, spans=own)
                torch.testing.assert_close(prepared.add(q, hidden, own), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_output_weights_add_nothing(dtype: torch.dtype) -> None:
    module = made()
    for each in module.interactions:
        torch.nn.init.zeros_(each.output)
    stacked = Memories.stacked([memory(module, {"a": 3}), memory(module, {"a": 1, "b": 2})])
    assert stacked is not None
    hidden = (torch.randn(2, 5, 10) * 100).to(dtype)
    with torch.inference_mode():
        assert torch.equal(PreparedReading(module, stacked).add(1, hidden).to(dtype), hidden)
