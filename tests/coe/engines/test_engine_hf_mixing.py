"""Several adapters in one batch: the same figures as those of peft."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import adapter_spec, save_adapter, say, wrapped_with
from peft import LoraConfig

from coe.engines.base import Adapter
from coe.engines.hf.expert import HFExpert
from coe.engines.hf.load import load_model
from coe.engines.hf.lora import low_rank
from coe.engines.hf.lora.adapters import AdapterSlots
from coe.engines.hf.lora.mixture import RowSlot
from coe.types import GenerateRequest

IDS = torch.tensor([[5, 60, 70, 80], [9, 61, 71, 81], [5, 60, 70, 80], [7, 62, 72, 82]])


@pytest.fixture
def peft(tiny: Path, tmp_path: Path) -> Any:
    """The tiny model with adapters of other ranks, scales and layers; their weights are random."""
    model = load_model("tiny", tiny, "cpu", torch.float32).model
    both = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    one = LoraConfig(r=7, lora_alpha=3, target_modules=["q_proj"], init_lora_weights=False, use_rslora=True)
    return wrapped_with(model, {"both": both, "one": one}, tmp_path / "adapters")


def alone(peft: Any, name: str | None, ids: torch.Tensor) -> torch.Tensor:
    if name is None:
        with peft.disable_adapter():
            return peft(input_ids=ids).logits  # type: ignore[no-any-return]
    peft.set_adapter(name)
    return peft(input_ids=ids).logits  # type: ignore[no-any-return]


def logits(peft: Any, names: list[str | None], ids: torch.Tensor = IDS) -> torch.Tensor:
    """The rows in one batch."""
    with peft.disable_adapter(), peft.low_rank.applied([name for name in names if name]) as rows:
        rows.select(names)
        return peft(input_ids=ids).logits  # type: ignore[no-any-return]


@torch.inference_mode()
@pytest.mark.parametrize("most_stacked", [2**30, 0], ids=["stacked", "in turn"])
def test_every_row_gets_its_own_adapter(peft: Any, most_stacked: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other where the stacks would take much memory."""
    monkeypatch.setattr(low_rank, "_MOST_STACKED", most_stacked)
    names = ["both", None, "one", "both"]
    expected = torch.cat([alone(peft, name, IDS[i : i + 1]) for i, name in enumerate(names)])
    torch.testing.assert_close(logits(peft, names), expected, rtol=1e-4, atol=1e-5)
    assert (expected[0] - expected[2]).abs().max() > 1e-3  # the same tokens, and other adapters
    torch.testing.assert_close(logits(peft, ["one"] * 4)[2:3], alone(peft, "one", IDS[2:3]), rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(peft, [None] * 4), alone(peft, None, IDS))  # nothing of them remains


@torch.inference_mode()
def test_rows_that_change_between_forwards(peft: Any) -> None:
    """Prompts that join are read between the tokens of the running rows; rows leave."""
    expected = {name: alone(peft, name, IDS) for name in ("both", "one", None)}
    with peft.disable_adapter(), peft.low_rank.applied(["both", "one"]) as rows:
        for kinds in (["both", None, "one"], ["one"], ["both", None, "one"], ["one", "both"], [None], ["one", None]):
            rows.select(kinds)
            found = peft(input_ids=IDS[: len(kinds)]).logits
            for row, name in enumerate(kinds):
                torch.testing.assert_close(found[row], expected[name][row], rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_layers_whose_input_has_no_rows(peft: Any) -> None:
    """Such as those that choose experts by token: (n_rows * n_tokens, n_in)."""
    layer, module = next(peft.low_rank.layers(["both"]))
    x = torch.randn(3, 5, module.in_features)
    with peft.low_rank.applied(["both", "one"]) as rows:
        rows.select(["both", None, "one"])
        torch.testing.assert_close(module(x.reshape(15, -1)).reshape(3, 5, -1), module(x))
        rows.select(["one"] * 3)
        torch.testing.assert_close(module(x.reshape(15, -1)).reshape(3, 5, -1), module(x))
    assert layer == "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"target_modules": ["q_proj", "embed_tokens"]}, "an embedding"),
        ({"lora_bias": True}, "biases"),
        ({"use_dora": True}, "such as DoRA"),
        ({"modules_to_save": ["lm_head"]}, "replaces parameters"),
    ],
)
def test_what_is_left_to_peft(tiny: Path, tmp_path: Path, settings: dict[str, Any], reason: str) -> None:
    slots = AdapterSlots(load_model("tiny", tiny, "cpu", torch.float32).model, "tiny", n_slots=4)
    folder = save_adapter(tmp_path / "it", tiny, **settings)
    name = slots.acquire(Adapter(adapter_spec(folder), folder))
    [slot] = slots._slots.values()
    assert slot.unmixed is not None and reason in slot.unmixed
    assert name not in slots._low_rank


def test_adapters_that_come_and_go_leave_the_model_alone(tiny: Path, tmp_path: Path) -> None:
    model = load_model("tiny", tiny, "cpu", torch.float32).model
    modules = dict(model.named_modules())
    slots = AdapterSlots(model, "tiny", n_slots=2)
    for i in range(5):
        folder = save_adapter(tmp_path / ("a" * (i + 1)), tiny)
        slots.acquire(Adapter(adapter_spec(folder), folder))
        assert dict(model.named_modules()) == modules
    assert len(slots) == len(slots._low_rank._updates) == 2
    slots.close()
    assert not slots._low_rank._updates


@pytest.mark.parametrize("most_stacked", [2**30, 0], ids=["stacked", "in turn"])
async def test_rows_that_leave_a_mixed_batch_take_their_adapters_along(
    expert: HFExpert, adapters: list[Adapter], most_stacked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(low_rank, "_MOST_STACKED", most_stacked)
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


@torch.inference_mode()
@pytest.mark.parametrize("settings", [{"use_dora": True}, {"target_modules": ["q_proj", "embed_tokens"]}])
@pytest.mark.parametrize("fails", [False, True])
def test_an_adapter_of_peft_that_comes_during_a_batch_is_not_its(
    tiny: Path, tmp_path: Path, settings: dict[str, Any], fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """peft enables the layers that it wraps: rows that run have their own adapter afterwards, too, or none."""
    model = load_model("tiny", tiny, "cpu", torch.float32).model
    slots = AdapterSlots(model, "tiny", n_slots=2)
    folders = save_adapter(tmp_path / "plain", tiny), save_adapter(tmp_path / "other", tiny, **settings)
    plain, other = (Adapter(adapter_spec(folder), folder) for folder in folders)
    rows: list[RowSlot] = [slots.acquire(plain), None]
    slots.select(rows)
    expected = model(input_ids=IDS[:2]).logits
    if fails:
        monkeypatch.setattr("peft.set_peft_model_state_dict", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            slots.acquire(other, rows)
    else:
        slots.acquire(other, rows)
    slots.select(rows)
    assert torch.equal(model(input_ids=IDS[:2]).logits, expected)


@torch.inference_mode()
def test_stacks_that_are_kept_have_a_limit(peft: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "_MOST_STACKED", most := peft.low_rank.n_bytes(["both", "one", "both"]))
    with peft.disable_adapter(), peft.low_rank.applied(["both", "one"]) as rows:
        for kinds in (["both", "one", "both"], ["one", "both"], ["both", "one"], ["both", None, "one"]):
            rows.select(kinds)
            peft(input_ids=IDS[: len(kinds)])
            kept = [pair for stack in rows._stacks.values() for pair in stack.values() if pair is not None]
            assert sum(a.nbytes + b.nbytes for a, b in kept) <= 2 * most  # rows without an adapter have zeros
