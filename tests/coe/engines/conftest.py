"""A tiny random Llama with a byte-level tokenizer and LoRA adapters, made once per session; the real base."""

from __future__ import annotations

import gc
import importlib.util
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_models import CONTEXT, N_ADAPTERS, adapter_spec, make_tokenizer, model_spec

from coe.engines.base import Adapter
from coe.engines.hf.engine import HFEngine
from coe.engines.hf.expert import HFExpert
from coe.engines.render import Renderer


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """The folder of a tiny model; adapters `a0`.. are in its sibling `adapters`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,  # wide, so that logits lie far apart and answers depend on the prompt
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    root = tmp_path_factory.mktemp("tiny")
    model = LlamaForCausalLM(config)
    # Never the end token by itself: answers of random weights must be long enough for the tests.
    model.lm_head.weight.data[tokenizer.eos_token_id] = 0.0
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft = get_peft_model(model, lora, adapter_name="a0")
    for i in range(1, N_ADAPTERS):
        peft.add_adapter(f"a{i}", lora)
    for name, weights in peft.named_parameters():
        if "lora_B" in name:
            weights.data.mul_(20)
    peft.save_pretrained(root / "adapters")
    gc.freeze()  # peft was imported here: engines collect garbage as they unload, and need not visit its modules
    return root / "model"


@pytest.fixture(scope="session")
def adapters(tiny: Path) -> list[Adapter]:
    folders = [tiny.parent / "adapters" / f"a{i}" for i in range(N_ADAPTERS)]
    return [Adapter(adapter_spec(folder), folder) for folder in folders]


@pytest.fixture(scope="session")
def renderer() -> Iterator[Renderer]:
    renderer = Renderer()
    yield renderer
    renderer.close()


@pytest.fixture(scope="session")
def engine() -> HFEngine:
    return HFEngine(device="cpu", dtype="float32")


@pytest.fixture
async def expert(engine: HFEngine, tiny: Path) -> AsyncIterator[HFExpert]:
    expert = await engine.load(model_spec(tiny), tiny)
    yield expert
    await engine.unload(expert)


@pytest.fixture(scope="session")
def smollm2() -> Iterator[Path]:
    """The folder of SmolLM2-135M-Instruct, fetched and converted on first use by the zoo's script."""
    script = Path(__file__).parents[3] / "examples" / "zoo" / "fetch.py"
    spec = importlib.util.spec_from_file_location("zoo_fetch", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module.fetch("smollm2")
    del sys.modules[spec.name]
