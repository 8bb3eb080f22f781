"""AdapterSlots: which adapters are loaded, kept, dropped and refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import adapter_spec
from safetensors.torch import load_file, save_file

from coe.engines.base import Adapter
from coe.engines.hf.load import load_model
from coe.engines.hf.lora.adapters import AdapterSlots
from coe.errors import WeightsError

PROMPT = torch.tensor([[5, 60, 70, 80]])


@pytest.fixture
def model(tiny: Path) -> Any:
    return load_model("tiny", tiny, "cpu", torch.float32).model


@pytest.fixture
def copied(adapters: list[Adapter], tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapters[0].path, tmp_path / "copied"))


def answer(slots: AdapterSlots, model: Any, names: list[str | None]) -> list[list[int]]:
    out: list[list[list[int]]] = []

    def watch(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        out.append(input_ids.tolist())
        return torch.zeros(len(input_ids), dtype=torch.bool)

    slots.generate(
        names,
        inputs=PROMPT.repeat(len(names), 1),
        attention_mask=torch.ones(len(names), 4, dtype=torch.long),
        do_sample=False,
        max_new_tokens=6,
        stopping_criteria=[watch],
    )
    return out[-1]


def test_an_adapter_is_loaded_once_and_told_apart_by_digest(model: Any, adapters: list[Adapter]) -> None:
    slots = AdapterSlots(model, "tiny", n_slots=4)
    path = adapters[0].path
    old = slots.acquire(Adapter(adapter_spec(path, digest="sha256:1"), path))
    assert slots.acquire(Adapter(adapter_spec(path, digest="sha256:1"), path)) == old
    other = Adapter(adapter_spec(path, digest="sha256:2"), adapters[1].path)  # a new version under the same name
    new = slots.acquire(other)
    assert new != old
    assert len(slots) == 2
    assert answer(slots, model, [old]) != answer(slots, model, [new])


def test_the_least_recently_used_adapter_makes_room(model: Any, adapters: list[Adapter]) -> None:
    slots = AdapterSlots(model, "tiny", n_slots=2)
    alone = {a.spec.name: answer(slots, model, [slots.acquire(a)]) for a in adapters}
    assert len(slots) == 2
    first, second = slots.acquire(adapters[0]), slots.acquire(adapters[1])
    assert slots.acquire(adapters[0]) == first
    slots.acquire(adapters[2])
    assert slots.acquire(adapters[0]) == first
    assert slots.acquire(adapters[1]) != second
    for adapter in reversed(adapters):
        assert answer(slots, model, [slots.acquire(adapter)]) == alone[adapter.spec.name]


def test_an_adapter_of_the_batch_is_never_dropped(model: Any, adapters: list[Adapter]) -> None:
    slots = AdapterSlots(model, "tiny", n_slots=2)
    first, second = (slots.acquire(a) for a in adapters[:2])
    third = slots.acquire(adapters[2], in_use={first})  # the oldest, but in use
    assert slots.acquire(adapters[0]) == first
    assert slots.acquire(adapters[2]) == third
    assert slots.acquire(adapters[1], in_use={first}) != second


def test_mixed_and_single_batches_agree(model: Any, adapters: list[Adapter]) -> None:
    slots = AdapterSlots(model, "tiny", n_slots=4)
    bare = answer(slots, model, [None])
    names: list[str | None] = [None, *(slots.acquire(a) for a in adapters)]
    single = [answer(slots, model, [name])[0] for name in names]
    assert single[0] == bare[0]
    assert len({tuple(s) for s in single}) == 5
    assert answer(slots, model, names) == single
    assert answer(slots, model, [names[1]] * 3) == [single[1]] * 3
    assert answer(slots, model, [None, None]) == [single[0]] * 2


def test_adapters_take_the_bases_dtype(tiny: Path, adapters: list[Adapter]) -> None:
    model = load_model("tiny", tiny, "cpu", torch.bfloat16).model
    slots = AdapterSlots(model, "tiny", n_slots=4)
    for adapter in adapters[:2]:
        slots.acquire(adapter)
    found = [matrix for updates in slots._low_rank._updates.values() for pair in updates.values() for matrix in pair]
    assert {matrix.dtype for matrix in found} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters())


def edit(**fields: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return spoil


def weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return spoil


def drop_one(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[sorted(tensors)[0]]


def add_layer(tensors: dict[str, torch.Tensor]) -> None:
    tensors |= {k.replace("layers.1.", "layers.7."): t.clone() for k, t in list(tensors.items()) if "layers.1." in k}


def other_width(tensors: dict[str, torch.Tensor]) -> None:
    tensors |= {k: torch.zeros(t.shape[0], 48) for k, t in tensors.items() if "lora_A" in k}


def spoil_number(tensors: dict[str, torch.Tensor]) -> None:
    tensors[sorted(tensors)[0]][0, 0] = float("nan")


def truncate(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])


def pickle_instead(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    torch.save(load_file(file), folder / "adapter_model.bin")
    file.unlink()


SPOILT: list[tuple[str, Callable[[Path], None], str]] = [
    ("no config", lambda f: (f / "adapter_config.json").unlink(), "has no adapter_config.json"),
    ("broken config", lambda f: (f / "adapter_config.json").write_text("{"), "cannot be read"),
    ("list config", lambda f: (f / "adapter_config.json").write_text("[]"), "is not a JSON object"),
    ("no method", edit(peft_type=None), "peft_type None"),
    ("other method", edit(peft_type="PREFIX_TUNING"), "peft_type 'PREFIX_TUNING'"),
    ("dora", edit(use_dora=True), "sets use_dora"),
    ("routed", edit(arrow_config={"top_k": 1}), "sets arrow_config, which is not supported: it routes"),
    ("changed base", edit(init_lora_weights="pissa"), "which modifies the base: convert it"),
    ("whole modules", edit(modules_to_save=["lm_head"]), "lm_head.weight is in modules_to_save of the config"),
    ("no weights", lambda f: (f / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    ("pickle", pickle_instead, "only LoRA adapters in safetensors"),
    ("truncated", truncate, "cannot be read"),
    ("not numbers", weights(spoil_number), "not finite numbers"),
    ("other modules", edit(target_modules=["no_such_layer"]), "does not fit its base 'tiny'"),
    ("other rank", edit(r=2), "does not fit its base 'tiny'"),
    ("other width", weights(other_width), "does not fit its base 'tiny'"),
    ("lacking", weights(drop_one), "module model.layers.0.self_attn.q_proj has only lora_B"),
    ("more layers", weights(add_layer), "module model.layers.7.self_attn.q_proj is not in the base"),
]


@pytest.mark.parametrize("second", [False, True], ids=["first", "later"])
@pytest.mark.parametrize(("spoil", "match"), [s[1:] for s in SPOILT], ids=[s[0] for s in SPOILT])
def test_adapters_that_are_wrong_are_refused_and_leave_no_trace(
    model: Any, adapters: list[Adapter], copied: Path, spoil: Callable[[Path], None], match: str, second: bool
) -> None:
    slots = AdapterSlots(model, "tiny", n_slots=2)
    bare = answer(slots, model, [None])
    if second:
        expected = answer(slots, model, [slots.acquire(adapters[1])])
    spoil(copied)
    with pytest.raises(WeightsError, match=match) as info:
        slots.acquire(Adapter(adapter_spec(copied), copied))
    assert "adapter 'copied'" in str(info.value)
    assert len(slots) == second
    assert answer(slots, model, [None]) == bare
    if second:
        assert answer(slots, model, [slots.acquire(adapters[1])]) == expected
    name = slots.acquire(adapters[0])
    mixed = answer(slots, model, [name, None])
    assert mixed == [answer(slots, model, [name])[0], bare[0]]
