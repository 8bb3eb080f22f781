"""Adapters that would change their base, or are broken: refused at registration and at load, for the same reason.

Whatever is loaded, refused, evicted or left half-way, the base keeps its tensors bit by bit, and it and its other
adapters answer as before.
"""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import adapter_spec, model_spec, save_adapter, save_tiny_model
from safetensors.torch import load_file, save_file

from coe.engines.base import Adapter
from coe.engines.hf.load import load_model
from coe.engines.hf.lora.adapters import AdapterSlots
from coe.errors import WeightsError
from registry.describe import describe
from registry.errors import SourceError

Tensors = dict[str, torch.Tensor]
IDS = torch.tensor([[5, 60, 70, 80]])
PREFIX = "base_model.model.model.layers.0.self_attn."
FIRST, EMBEDDING = f"{PREFIX}q_proj.lora_A.weight", "base_model.model.model.embed_tokens.weight"


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "base"
    return save_tiny_model(folder, tokenizer, tie_word_embeddings=True, attention_bias=True)


@pytest.fixture(scope="session")
def good(base: Path) -> Path:
    return save_adapter(base.parent / "good", base)


@pytest.fixture(scope="session")
def other(base: Path) -> Path:
    return save_adapter(base.parent / "another", base, target_modules=["lm_head", "q_proj"])


def adapter_of(folder: Path) -> Adapter:
    return Adapter(adapter_spec(folder), folder)


def hashes(model: Any) -> dict[str, tuple[int, bytes]]:
    """Identity and bytes of every parameter and buffer of the base, whatever peft wraps around its layers."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {
        name.replace(".base_layer.", "."): (id(tensor), tensor.detach().view(torch.uint8).numpy().tobytes())
        for name, tensor in named
        if "lora_" not in name
    }


def logits(slots: AdapterSlots, name: str | None) -> torch.Tensor:
    seen: list[torch.Tensor] = []

    def look(model: Any, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        seen.append(model(input_ids=input_ids).logits)
        return input_ids

    with torch.inference_mode():
        slots.generate([name], inputs=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=1, custom_generate=look)
    return seen[0]


def changed(change: Callable[[Tensors], Any], **config: Any) -> Callable[[Path], None]:
    """An edit of the tensors, and of the config."""

    def spoil(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
        settings = folder / "adapter_config.json"
        settings.write_text(json.dumps(json.loads(settings.read_text()) | config))

    return spoil


def adding(name: str, shape: tuple[int, ...], **config: Any) -> Callable[[Path], None]:
    return changed(lambda tensors: tensors.update({name: torch.full(shape, 0.5)}), **config)


def configured(**config: Any) -> Callable[[Path], None]:
    return changed(lambda tensors: None, **config)


def twice(tensors: Tensors) -> None:
    tensors["_orig_mod." + FIRST] = tensors[FIRST].clone()


def twice_by_suffix(tensors: Tensors) -> None:
    for part in ("A", "B"):
        name = f"{PREFIX}q_proj.lora_{part}.weight"
        tensors[name.replace("model.layers", "language_model.layers")] = tensors[name].clone()


def not_a_number(tensors: Tensors) -> None:
    tensors[FIRST][0, 0] = float("nan")


def without_layer(tensors: Tensors) -> None:
    for name in [name for name in tensors if "layers.1." in name]:
        del tensors[name]


def one_more_row(tensors: Tensors) -> None:
    tensors[FIRST] = torch.zeros(tensors[FIRST].shape[0], 33)


def pickled(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    torch.save(load_file(file), folder / "adapter_model.bin")
    file.unlink()


V = 290  # the tokenizer's size
HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "embedding": (adding(EMBEDDING, (V, 32)), "embed_tokens.weight differs from model.embed_tokens.weight of the base"),
    "head": (adding("base_model.model.lm_head.weight", (V, 32)), "lm_head.weight differs from lm_head.weight"),
    "base layer": (adding(f"{PREFIX}q_proj.base_layer.weight", (32, 32)), "differs from .*q_proj.weight of the base"),
    "original": (adding("base_model.model.lm_head.original_module.weight", (V, 32)), "differs from lm_head.weight"),
    "norm": (adding("base_model.model.model.norm.weight", (32,)), "norm.weight differs from"),
    "bias": (adding(f"{PREFIX}q_proj.bias", (32,)), "q_proj.bias differs from"),
    "compiled base": (adding("_orig_mod.model.norm.weight", (32,)), "norm.weight differs from"),
    "multimodal base": (adding("base_model.model.language_model.model.norm.weight", (32,)), "norm.weight differs from"),
    "no prefix": (adding("lm_head.weight", (V, 32)), "differs from lm_head.weight"),
    "larger embedding": (adding(EMBEDDING, (V + 2, 32)), "embed_tokens.weight differs from"),
    "unknown": (adding("base_model.model.extra.weight", (2,)), "extra.weight is neither a LoRA weight nor in the base"),
    "slot name": (adding(f"{PREFIX}q_proj.lora_A.slot1.weight", (4, 32)), "slot1.weight is neither a LoRA weight"),
    "undeclared bias": (adding(f"{PREFIX}q_proj.lora_B.bias", (32,)), "lora_B.bias is present, but the config"),
    "undeclared dora": (adding(f"{PREFIX}q_proj.lora_magnitude_vector", (32,)), "lora_magnitude_vector is present"),
    "no dora": (configured(use_dora=True), "lora_magnitude_vector is missing, though the config sets use_dora"),
    "undeclared tokens": (
        adding("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", (1, 32)),
        "trainable_token_indices of the config does not declare",
    ),
    "tokens without weights": (configured(trainable_token_indices=[1]), "names tokens that have no weights"),
    "tokens beyond": (
        adding(
            "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
            (1, 32),
            trainable_token_indices=[V],
        ),
        "up to 290, but the base has 290 rows",
    ),
    "saved without weights": (configured(modules_to_save=["lm_head"]), "is in modules_to_save of the config, and has"),
    "saved in another shape": (
        adding("base_model.model.lm_head.weight", (V, 31), modules_to_save=["lm_head"]),
        r"lm_head.weight has shape \(290, 31\)",
    ),
    "saved module with LoRA": (
        configured(modules_to_save=["q_proj"]),
        "q_proj has LoRA weights, and .* modules_to_save",
    ),
    "twice": (changed(twice), "are both the lora_A.weight of"),
    "twice by suffix": (changed(twice_by_suffix), "are both for model.layers.0.self_attn.q_proj of the base"),
    "not a number": (changed(not_a_number), "not finite numbers"),
    "other width": (changed(one_more_row), r"needs a weight of shape \(32, 33\), but the base has \(32, 32\)"),
    "missing layer": (changed(without_layer), "model.layers.1.self_attn.q_proj is targeted by the config and has no"),
    "other layers": (configured(layers_to_transform=[1]), "layers.0.* has weights, but the config does not target it"),
    "other rank": (configured(r=5), "has rank 4, but the config states 5"),
    "other rank by pattern": (configured(rank_pattern={"v_proj": 9}), "has rank 4, but the config states 9"),
    "huge rank": (configured(r=10**9), "a rank of 1000000000"),
    "rank of text": (configured(r="4"), "a rank of '4'"),
    "endless alpha": (configured(lora_alpha=1e999), "lora_alpha is inf"),
    "pissa": (configured(init_lora_weights="pissa_niter_4"), "which modifies the base: convert it"),
    "olora": (configured(init_lora_weights="olora"), "which modifies the base: convert it"),
    "loftq": (configured(init_lora_weights="loftq"), "which modifies the base: convert it"),
    "replicated": (configured(layer_replication=[[0, 2], [1, 2]]), "sets layer_replication, which is not supported"),
    "qalora": (configured(use_qalora=True), "sets use_qalora"),
    "parameters": (configured(target_parameters=["mlp.experts"]), "sets target_parameters"),
    "tied": (
        lambda folder: (
            shutil.copytree(
                save_adapter(folder.parent / "head", folder.parent.parent / "base", target_modules=["lm_head"]),
                folder,
                dirs_exist_ok=True,
            )
            and configured(ensure_weight_tying=True)(folder)
        ),
        "ensure_weight_tying, with which embedding and head share one adapter",
    ),
    "pickle": (pickled, "has pickled weights only|only LoRA adapters in safetensors"),
    "broken pattern": (configured(target_modules="(q_proj"), "'\\(q_proj' is not a regular expression"),
    "slow pattern": (configured(target_modules=r"(.|[\w.])+[!-]"), "takes longer than 1 s"),
    "unrolled pattern": (configured(target_modules="((a{1000}){1000}){1000}"), "repeats more than 100 times"),
    "long pattern": (configured(target_modules=".*" * 1_001), "a pattern has 2,002 characters; the most: 2,000"),
}


@pytest.fixture
def spoilt(good: Path, tmp_path: Path, base: Path, request: Any) -> Path:
    folder = tmp_path / "it" / "spoilt"
    (tmp_path / "base").symlink_to(base)
    shutil.copytree(good, folder)
    HOSTILE[request.param][0](folder)
    return folder


@pytest.mark.parametrize(("spoilt", "reason"), [(key, HOSTILE[key][1]) for key in HOSTILE], indirect=["spoilt"])
def test_a_hostile_adapter_is_refused_twice_and_changes_nothing(
    base: Path, good: Path, other: Path, spoilt: Path, reason: str
) -> None:
    began = time.monotonic()
    with pytest.raises(SourceError, match=reason):
        describe(adapter_spec(spoilt), describe(model_spec(base)))
    model = load_model("tiny", base, "cpu", torch.float32).model
    before, bare = hashes(model), None
    slots = AdapterSlots(model, "tiny", n_slots=2)
    bare = logits(slots, None)
    for resident in ([], [good, other]):
        names = [slots.acquire(adapter_of(folder)) for folder in resident]
        expected = [logits(slots, name) for name in names]
        with pytest.raises(WeightsError, match=reason):
            slots.acquire(adapter_of(spoilt))
        assert hashes(model) == before
        assert torch.equal(logits(slots, None), bare)
        assert all(torch.equal(logits(slots, name), was) for name, was in zip(names, expected, strict=True))
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("kind", "fails_at"),
    [
        ({}, "scaling"),
        *itertools.product(
            [{"target_modules": ["lm_head", "embed_tokens", "up_proj"]}, {"use_dora": True}],
            ["matrices", "layers", "replacements"],
        ),
    ],
)
@pytest.mark.parametrize("resident", [0, 1])
def test_an_adapter_that_fails_half_way_leaves_no_trace(
    base: Path,
    good: Path,
    tmp_path: Path,
    kind: dict[str, Any],
    resident: int,
    fails_at: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Such as memory that runs out after some layers have the adapter."""
    model = load_model("tiny", base, "cpu", torch.float32).model
    before = hashes(model)
    slots = AdapterSlots(model, "tiny", n_slots=2)
    bare = logits(slots, None)
    names = [slots.acquire(adapter_of(good)) for _ in range(resident)]
    expected = [logits(slots, name) for name in names]
    folder = save_adapter(tmp_path / "it", base, **kind)
    place, method = {
        "scaling": ("torch.Tensor.float", 1),
        "matrices": ("peft.set_peft_model_state_dict", None),
        "layers": ("peft.tuners.lora.LoraModel._create_and_replace", 1),
        "replacements": ("coe.engines.hf.lora.base_parameters.BaseParameters.replacements", None),
    }[fails_at]
    with monkeypatch.context() as patch:
        fail_after(patch, place, method or 0)
        with pytest.raises(MemoryError, match="planned"):
            slots.acquire(adapter_of(folder))
    assert len(slots) == resident
    assert len(slots._low_rank._updates) == resident
    assert hashes(model) == before
    assert torch.equal(logits(slots, None), bare)
    assert all(torch.equal(logits(slots, name), was) for name, was in zip(names, expected, strict=True))
    assert len({parameter for parameter in model.state_dict() if "slot2" in parameter}) == 0
    name = slots.acquire(adapter_of(folder))  # and with memory it loads
    assert not torch.equal(logits(slots, name), bare)
    assert torch.equal(logits(slots, None), bare)


def fail_after(patch: pytest.MonkeyPatch, place: str, n_calls: int) -> None:
    """Let a function fail after so many calls."""
    path, _, name = place.rpartition(".")
    owner: Any = __import__(path.split(".")[0])
    for part in path.split(".")[1:]:
        owner = getattr(owner, part)
    real, calls = getattr(owner, name), iter(range(n_calls))

    def failing(*args: Any, **kwargs: Any) -> Any:
        if next(calls, None) is None:
            raise MemoryError("planned")
        return real(*args, **kwargs)

    patch.setattr(owner, name, failing)


def test_eviction_and_reload_leave_the_base_as_it_is(base: Path, good: Path, other: Path, tmp_path: Path) -> None:
    folders = [
        good,
        other,
        save_adapter(tmp_path / "a", base, use_dora=True),
        save_adapter(tmp_path / "bc", base, modules_to_save=["lm_head"]),
        save_adapter(tmp_path / "def", base, trainable_token_indices=[5, 60]),
        save_adapter(tmp_path / "ghij", base, bias="all"),
    ]
    model = load_model("tiny", base, "cpu", torch.float32).model
    before = hashes(model)
    slots = AdapterSlots(model, "tiny", n_slots=2)
    bare = logits(slots, None)
    answers = [logits(slots, slots.acquire(adapter_of(folder))) for folder in folders]
    assert len({answer.numpy().tobytes() for answer in (bare, *answers)}) == 7
    for position in (3, 0, 4, 1, 5, 2, 3, 0):
        assert torch.equal(logits(slots, slots.acquire(adapter_of(folders[position]))), answers[position])
        assert torch.equal(logits(slots, None), bare)
        assert hashes(model) == before


def test_a_batch_that_fails_gives_the_base_its_parameters_back(base: Path, tmp_path: Path) -> None:
    model = load_model("tiny", base, "cpu", torch.float32).model
    before = hashes(model)
    slots = AdapterSlots(model, "tiny", n_slots=2)
    name = slots.acquire(adapter_of(save_adapter(tmp_path / "a", base, modules_to_save=["lm_head", "norm"])))

    def fail(model: Any, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        assert hashes(model) != before
        raise RuntimeError("planned")

    with pytest.raises(RuntimeError, match="planned"):
        slots.generate([name], inputs=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=1, custom_generate=fail)
    assert hashes(model) == before


def test_adapters_that_need_a_batch_of_their_own_are_never_mixed(base: Path, good: Path, tmp_path: Path) -> None:
    slots = AdapterSlots(load_model("tiny", base, "cpu", torch.float32).model, "tiny", n_slots=3)
    plain = slots.acquire(adapter_of(good))
    dora = slots.acquire(adapter_of(save_adapter(tmp_path / "a", base, use_dora=True)))
    assert slots.batches([plain, dora, None, dora]) == [[0, 2], [1, 3]]
    assert slots.batches([]) == []
    with pytest.raises(ValueError, match="needs a batch of its own"):
        slots.generate([plain, dora], inputs=IDS.repeat(2, 1), max_new_tokens=1)


def test_every_setting_of_peft_is_known() -> None:
    """A new one must be read, ignored or refused on purpose: it may change what an adapter answers."""
    from dataclasses import fields

    from peft import LoraConfig as PeftConfig

    from registry.lora.config import IGNORED, REFUSED, LoraConfig

    read = {each.name for each in fields(LoraConfig)} | {"peft_type", "init_lora_weights", "trainable_token_indices"}
    read |= {"task_type", "auto_mapping"}
    assert {each.name for each in fields(PeftConfig)} - IGNORED - REFUSED.keys() - read == set()
