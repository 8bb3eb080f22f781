"""Several adapters in one batch: the same figures as those of peft, which runs each adapter on its own rows."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import adapter_spec, save_adapter, say
from peft import LoraConfig, get_peft_model

from coe.engines.base import Adapter
from coe.engines.hf.expert import HFExpert
from coe.engines.hf.load import load_model
from coe.engines.hf.lora import adapters as hf_adapters
from coe.engines.hf.lora import mixing
from coe.engines.hf.lora.mixing import can_mix, mixed
from coe.types import GenerateRequest

IDS = torch.tensor([[5, 60, 70, 80], [9, 61, 71, 81], [5, 60, 70, 80], [7, 62, 72, 82]])


@pytest.fixture
def peft(tiny: Path) -> Any:
    """The tiny model with adapters of other ranks, scales and layers; their weights are random."""
    model = load_model("tiny", tiny, "cpu", torch.float32).model
    both = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    one = LoraConfig(r=7, lora_alpha=3, target_modules=["q_proj"], init_lora_weights=False, use_rslora=True)
    peft = get_peft_model(model, both, adapter_name="both")
    peft.add_adapter("one", one)
    return peft.eval()


def alone(peft: Any, name: str | None, ids: torch.Tensor) -> torch.Tensor:
    if name is None:
        with peft.disable_adapter():
            return peft(input_ids=ids).logits  # type: ignore[no-any-return]
    peft.set_adapter(name)
    return peft(input_ids=ids).logits  # type: ignore[no-any-return]


@torch.inference_mode()
def test_every_row_gets_its_own_adapter(peft: Any) -> None:
    names = ["both", None, "one", "both"]
    expected = torch.cat([alone(peft, name, IDS[i : i + 1]) for i, name in enumerate(names)])
    assert can_mix(peft, names)
    with mixed(peft, names) as rows:
        torch.testing.assert_close(peft(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
        rows.keep([3, 1])
        torch.testing.assert_close(peft(input_ids=IDS[[3, 1]]).logits, expected[[3, 1]], rtol=1e-4, atol=1e-5)
    assert (expected[0] - expected[2]).abs().max() > 1e-3  # the same tokens, and other adapters
    torch.testing.assert_close(alone(peft, "one", IDS[2:3]), expected[2:3])  # nothing of it remains


def test_embeddings_with_adapters_are_left_to_peft(tiny: Path) -> None:
    model = load_model("tiny", tiny, "cpu", torch.float32).model
    peft = get_peft_model(model, LoraConfig(target_modules=["q_proj", "embed_tokens"]))
    assert not can_mix(peft, ["default", None])


def test_stacks_that_would_take_much_memory_are_left_to_peft(peft: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    n_weights = sum(p.numel() for name, p in peft.named_parameters() if ".both." in name)
    monkeypatch.setattr(mixing, "_MOST_BYTES", 4 * n_weights)
    assert can_mix(peft, ["both", None, "both"])
    assert not can_mix(peft, ["both", "one"])


@pytest.mark.parametrize("mixes", [True, False])
async def test_rows_that_leave_a_mixed_batch_take_their_adapters_along(
    expert: HFExpert, adapters: list[Adapter], mixes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_adapters, "can_mix", lambda peft, names: mixes)
    lengths = (3, 12, 6, 9)
    used = (adapters[0], None, adapters[1], adapters[0])
    requests = [
        (GenerateRequest(prompt="the capital of france", max_tokens=n), adapter)
        for n, adapter in zip(lengths, used, strict=True)
    ]
    expected = [(await say(expert, *request)).text for request in requests]
    said = await asyncio.gather(*(say(expert, *request) for request in requests))
    assert [each.text for each in said] == expected
    assert len(set(expected)) > 2


async def test_requests_for_every_kind_of_adapter_at_once(
    expert: HFExpert, adapters: list[Adapter], tiny: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """Those that cannot be mixed run in batches of their own; every answer is that of the request alone."""
    start = tokenizer("the capital of france is", add_special_tokens=False)["input_ids"][-3:-1]
    kinds: dict[str, dict[str, Any]] = {
        "dora": {"use_dora": True},
        "tokens": {"trainable_token_indices": start},
        "activated": {"alora_invocation_tokens": start},
        "saved": {"modules_to_save": ["lm_head"]},
        "bias": {"lora_bias": True},
    }
    folders = [save_adapter(tmp_path / kind, tiny, **settings) for kind, settings in kinds.items()]
    used = [None, adapters[0], *(Adapter(adapter_spec(folder), folder) for folder in folders)]
    prompts = ("the capital of france is", "of france", "the end of the answer")
    requests = [
        (GenerateRequest(prompt=prompt, max_tokens=3 + 4 * n), adapter)
        for n, prompt in enumerate(prompts)
        for adapter in used
    ]
    expected = [(await say(expert, *request)).text for request in requests]
    said = await asyncio.gather(*(say(expert, *request) for request in requests))
    assert [each.text for each in said] == expected
    assert len(set(expected)) >= 15
    activated = 4
    assert expected[activated] != expected[0]
    assert expected[2 * len(used) + activated] == expected[2 * len(used)]  # the base's, without the invocation tokens
