"""A quantised checkpoint as users load it: registered, and placed on vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_models import make_tokenizer, save_tiny_model
from quantised_models import save_int8

from coe.engines.vllm.engine import VLLMEngine
from registry.describe import describe
from registry.spec import ExpertSpec, Kind


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny Llama with weights of 8 bits, and the same weights as floats."""
    root = tmp_path_factory.mktemp("int8")
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = save_tiny_model(root / "model", make_tokenizer(), hidden_size=64, intermediate_size=128, **heads)
    save_int8(model, root / "packed", root / "floats")
    return root / "packed", root / "floats"


def test_it_is_registered_with_its_method_and_the_parameters_of_its_weights(folders: tuple[Path, Path]) -> None:
    packed, floats = (describe(ExpertSpec(name="m", kind=Kind.MODEL, source=str(folder))) for folder in folders)
    assert (packed.quantization, floats.quantization) == ("compressed-tensors", None)
    assert packed.parameters_total == floats.parameters_total and packed.price == floats.price
    engine = VLLMEngine(dtype="float32", kv_cache_bytes=1)
    assert engine.footprint(packed) == packed.size_bytes < engine.footprint(floats)
    assert engine.shape(packed) != engine.shape(floats)
