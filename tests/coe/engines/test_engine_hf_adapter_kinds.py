"""Every kind of LoRA adapter that peft can serve: registered, and the same figures as those of peft on its own base."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import adapter_spec, model_spec, save_adapter, save_tiny_model
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from coe.engines.base import Adapter
from coe.engines.hf.load import load_model
from coe.engines.hf.lora.adapters import AdapterSlots
from registry.describe import describe
from registry.errors import SourceError

IDS = torch.tensor([[5, 60, 70, 80, 9], [9, 61, 71, 81, 12], [5, 60, 33, 80, 14]])
MLP = ["gate_proj", "up_proj", "down_proj"]

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "patterns": {
        "rank_pattern": {r"layers\.0\.self_attn\.q_proj": 2, "v_proj": 7},
        "alpha_pattern": {r"layers\.[1-9].*q_proj": 5, "v_proj": 1},
    },
    "layers_to_transform": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "one layer": {"layers_to_transform": 0},
    "all-linear": {"target_modules": "all-linear"},
    "target pattern": {"target_modules": r".*\.(q|k)_proj"},
    "excluded": {"target_modules": MLP, "exclude_modules": r".*layers\.0.*"},
    "full names": {"target_modules": ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.o_proj"]},
    "dora": {"use_dora": True},
    "dora all": {"use_dora": True, "target_modules": "all-linear"},
    "lora_bias": {"lora_bias": True},
    "bias": {"bias": "lora_only"},
    "all biases": {"bias": "all"},
    "saved head": {"modules_to_save": ["lm_head"]},
    "saved norm": {"modules_to_save": ["norm", "post_attention_layernorm"]},
    "saved embedding": {"modules_to_save": ["embed_tokens"]},
    "tokens": {"trainable_token_indices": [60, 5]},
    "tokens by module": {"trainable_token_indices": {"embed_tokens": [80, 9]}},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "head and embedding": {"target_modules": ["lm_head", "embed_tokens"]},
    "activated": {"alora_invocation_tokens": [80, 9]},
    "other start": {"init_lora_weights": "gaussian"},
}


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A model with biases, whose head is its embedding, like those of SmolLM2 and Gemma."""
    return save_tiny_model(
        tmp_path_factory.mktemp("kinds") / "tied", tokenizer, tie_word_embeddings=True, attention_bias=True
    )


@pytest.fixture(scope="session")
def untied(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("kinds") / "untied", tokenizer, attention_bias=True)


def logits_of(slots: AdapterSlots, names: list[str | None], ids: torch.Tensor) -> torch.Tensor:
    seen: list[torch.Tensor] = []

    def look(model: Any, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        seen.append(model(input_ids=input_ids).logits)
        return input_ids

    for rows in slots.batches(names):
        with torch.inference_mode():
            slots.generate(
                [names[row] for row in rows],
                inputs=ids[rows],
                attention_mask=torch.ones(len(rows), ids.shape[1], dtype=torch.long),
                max_new_tokens=1,
                custom_generate=look,
            )
    order = [row for rows in slots.batches(names) for row in rows]
    together = torch.cat(seen)
    return together[[order.index(row) for row in range(len(names))]]


def logits_of_peft(base: Path, folder: Path, ids: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder).eval()
        return peft(input_ids=ids).logits  # type: ignore[no-any-return]


def state(model: Any) -> dict[str, tuple[int, torch.Tensor]]:
    """Which tensors the parameters are, and their values."""
    return {name: (id(p), p.detach().clone()) for name, p in model.named_parameters(remove_duplicate=False)}


def assert_same_base(before: dict[str, tuple[int, torch.Tensor]], model: Any) -> None:
    now = {name.replace(".base_layer.", "."): p for name, p in model.named_parameters(remove_duplicate=False)}
    for name, (identity, values) in before.items():
        assert id(now[name]) == identity, name
        assert torch.equal(now[name], values), name


def register(base: Path, folder: Path) -> Any:
    """Raises SourceError where `coe registry apply` does."""
    return describe(adapter_spec(folder), describe(model_spec(base)))


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_every_kind_answers_as_with_peft(base: Path, kind: str, tmp_path: Path) -> None:
    check_against_peft(base, kind, tmp_path)


@pytest.mark.parametrize("kind", ["plain", "saved head", "saved embedding", "tokens", "head and embedding"])
def test_and_on_a_base_with_a_head_of_its_own(untied: Path, kind: str, tmp_path: Path) -> None:
    check_against_peft(untied, kind, tmp_path)


def check_against_peft(base: Path, kind: str, tmp_path: Path) -> None:
    """Alone, mixed with others, and between others; the base stays the same tensors with the same values."""
    folder = save_adapter(tmp_path / "it", base, **KINDS[kind])
    plain = save_adapter(tmp_path / "plain", base)
    register(base, folder)
    expected, beside = (logits_of_peft(base, each, IDS) for each in (folder, plain))
    model = load_model("tiny", base, "cpu", torch.float32).model
    before = state(model)
    slots = AdapterSlots(model, "tiny", n_slots=2)
    bare = logits_of(slots, [None] * 3, IDS)
    it, other = (slots.acquire(Adapter(adapter_spec(each), each)) for each in (folder, plain))
    torch.testing.assert_close(logits_of(slots, [it] * 3, IDS), expected, rtol=1e-4, atol=1e-4)
    assert (expected - bare).abs().max() > 0.05
    mixed = logits_of(slots, [it, None, other], IDS)
    torch.testing.assert_close(mixed, torch.stack([expected[0], bare[1], beside[2]]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits_of(slots, [other] * 3, IDS), beside, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits_of(slots, [None] * 3, IDS), bare)
    assert_same_base(before, model)


def renamed(change: Callable[[str], str]) -> Callable[[Path], None]:
    def rename(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        save_file({change(name): tensor for name, tensor in load_file(file).items()}, file)

    return rename


PREFIXES = {
    "compiled base": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
    "compiled peft": lambda name: f"_orig_mod.{name}",
    "compiled layers": lambda name: name.replace(".self_attn", "._orig_mod.self_attn"),
    "data parallel": lambda name: f"module.{name}",
    "multimodal": lambda name: name.replace("base_model.model.model.", "base_model.model.model.language_model."),
    "multimodal, old": lambda name: name.replace("base_model.model.", "base_model.model.language_model."),
    "inner model": lambda name: name.replace("base_model.model.model.", "base_model.model."),
    "peft twice": lambda name: name.replace("base_model.model.", "base_model.model.base_model.model."),
    "no prefix": lambda name: name.removeprefix("base_model.model."),
}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_wrappers_are_understood(base: Path, prefix: str, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "it", base)
    expected = logits_of_peft(base, folder, IDS)
    renamed(PREFIXES[prefix])(folder)
    register(base, folder)
    slots = AdapterSlots(load_model("tiny", base, "cpu", torch.float32).model, "tiny", n_slots=2)
    name = slots.acquire(Adapter(adapter_spec(folder), folder))
    torch.testing.assert_close(logits_of(slots, [name] * 3, IDS), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens"], ["lm_head"]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_of_base_weights_that_equal_them_are_ignored(
    base: Path, targets: list[str], dtype: torch.dtype, tmp_path: Path
) -> None:
    """peft writes them with `save_embedding_layers=True`, and beside an adapter of the embedding."""
    folder = save_adapter(tmp_path / "it", base, {"save_embedding_layers": True}, target_modules=targets)
    assert any("lora" not in name for name in load_file(folder / "adapter_model.safetensors"))
    register(base, folder)
    model = load_model("tiny", base, "cpu", dtype).model
    before = state(model)
    slots = AdapterSlots(model, "tiny", n_slots=2)
    name = slots.acquire(Adapter(adapter_spec(folder), folder))
    if dtype == torch.float32:
        expected = logits_of_peft(base, folder, IDS)
        torch.testing.assert_close(logits_of(slots, [name] * 3, IDS), expected, rtol=1e-4, atol=1e-4)
    assert_same_base(before, model)


@pytest.fixture(scope="session")
def mixture(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A tiny Mixtral, whose experts transformers fuses when it loads them."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("kinds") / "mixture"
    config = MixtralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    MixtralForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_adapter_of_experts(folder: Path, mixture: Path, **config: Any) -> Path:
    """An adapter of every expert by itself, as peft wrote it with transformers 4."""
    targets = ["q_proj", "w1", "w2", "w3"]
    tensors = {}
    for name, weight in load_file(mixture / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in targets:
            tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(4, weight.shape[1])
            tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(weight.shape[0], 4)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(settings | config))
    return folder


def test_experts_of_a_mixture_are_adapted_as_with_peft(mixture: Path, tmp_path: Path) -> None:
    folder, plain = save_adapter_of_experts(tmp_path / "it", mixture), save_adapter(tmp_path / "plain", mixture)
    register(mixture, folder)
    expected, beside = (logits_of_peft(mixture, each, IDS) for each in (folder, plain))
    model = load_model("tiny", mixture, "cpu", torch.float32).model
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    slots = AdapterSlots(model, "tiny", n_slots=2)
    bare = logits_of(slots, [None] * 3, IDS)
    it, other = (slots.acquire(Adapter(adapter_spec(each), each)) for each in (folder, plain))
    mixed = logits_of(slots, [it, None, other], IDS)
    torch.testing.assert_close(mixed, torch.stack([expected[0], bare[1], beside[2]]), rtol=1e-4, atol=1e-4)
    assert torch.equal(logits_of(slots, [None] * 3, IDS), bare)
    assert (expected - bare).abs().max() > 1e-3
    now = {name.replace(".base_layer", ""): p for name, p in model.named_parameters() if "lora_" not in name}
    assert now.keys() == before.keys()
    assert all(torch.equal(now[name], values) for name, (_, values) in before.items())


@pytest.mark.parametrize("setting", [{"use_dora": True}, {"rank_pattern": {"w1": 4}}, {"alpha_pattern": {"w2": 2}}])
def test_fused_experts_cannot_have_every_setting(mixture: Path, tmp_path: Path, setting: dict[str, Any]) -> None:
    folder = save_adapter_of_experts(tmp_path / "it", mixture, **setting)
    if "use_dora" in setting:
        tensors = load_file(folder / "adapter_model.safetensors")
        for name, tensor in list(tensors.items()):
            if "lora_B" in name:
                tensors[name.replace("lora_B.weight", "lora_magnitude_vector")] = torch.ones(len(tensor))
        save_file(tensors, folder / "adapter_model.safetensors")
    [name] = setting
    with pytest.raises(SourceError, match=f"an expert of a fused layer, which cannot be adapted with {name}"):
        register(mixture, folder)


@pytest.mark.integration
def test_kinds_on_a_real_base(smollm2: Path, tmp_path: Path) -> None:
    """SmolLM2 has tied embeddings, and no biases. Both on one load of it."""
    kinds = ("head", "dora")
    folders = [save_adapter(tmp_path / kind, smollm2, **KINDS[kind]) for kind in kinds]
    for folder in folders:
        register(smollm2, folder)
    model = load_model("smollm2", smollm2, "cpu", torch.float32).model
    before = state(model)
    slots = AdapterSlots(model, "smollm2", n_slots=2)
    bare = logits_of(slots, [None] * 3, IDS)
    for folder in folders:
        name = slots.acquire(Adapter(adapter_spec(folder), folder))
        torch.testing.assert_close(
            logits_of(slots, [name] * 3, IDS), logits_of_peft(smollm2, folder, IDS), rtol=1e-3, atol=1e-3
        )
        assert torch.equal(logits_of(slots, [None] * 3, IDS), bare)
        assert_same_base(before, model)
