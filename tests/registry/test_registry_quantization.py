"""Quantised checkpoints: their method, and the parameters in packed tensors; nothing is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import LlamaFileType
from model_files import HIDDEN, write_gguf, write_model

from registry.inspection import inspect
from registry.quantization import quantization_of

OUT, GROUP = 16, 4
WEIGHTS = HIDDEN * OUT
KEPT = 24
"""Weights that are not quantised, such as those of a norm."""


def ints(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.int32)


def floats(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float16)


def linear(method: str, bits: int = 4) -> dict[str, np.ndarray]:
    """The tensors of one layer of HIDDEN x OUT weights, as each method stores them."""
    groups = HIDDEN // GROUP
    packed = {
        "gptq": {
            "qweight": ints(HIDDEN * bits // 32, OUT),
            "qzeros": ints(groups, OUT * bits // 32),
            "scales": floats(groups, OUT),
            "g_idx": ints(HIDDEN),
        },
        "awq": {
            "qweight": ints(HIDDEN, OUT * bits // 32),
            "qzeros": ints(groups, OUT * bits // 32),
            "scales": floats(groups, OUT),
        },
        "compressed-tensors": {
            "weight_packed": ints(OUT, HIDDEN * bits // 32),
            "weight_scale": floats(OUT, groups),
            "weight_zero_point": ints(OUT * bits // 32, groups),
            "weight_shape": ints(2),
        },
        "fp8": {"weight": np.zeros((OUT, HIDDEN), np.int8), "weight_scale_inv": floats(1, 1), "input_scale": floats(1)},
        "bitsandbytes": {
            "weight": np.zeros((WEIGHTS // 2, 1), np.uint8),
            "weight.absmax": np.zeros(2, np.uint8),
            "weight.quant_map": floats(16),
            "weight.nested_absmax": floats(1),
            "weight.quant_state.bitsandbytes__nf4": np.zeros(90, np.uint8),
        },
    }
    return packed[method]


CONFIGS: dict[str, dict[str, Any]] = {
    "gptq": {"bits": 4},
    "awq": {"w_bit": 4},
    "compressed-tensors": {"config_groups": {"group_0": {"weights": {"num_bits": 4}}}},
    "fp8": {"activation_scheme": "dynamic"},
    "bitsandbytes": {"load_in_4bit": True},
}


def save(folder: Path, method: str, config: dict[str, Any], *names: str, bits: int = 4, **model: Any) -> Path:
    tensors = {"model.norm.weight": floats(KEPT)}
    for name in names:
        tensors |= {f"{name}.{part}": tensor for part, tensor in linear(method, bits).items()}
    quantization = {"quantization_config": {"quant_method": method} | config}
    return write_model(folder, tensors, {"architectures": ["LlamaForCausalLM"]} | model | quantization)


@pytest.mark.parametrize("method", CONFIGS)
def test_packed_weights_count_and_scales_do_not(method: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "m", method, CONFIGS[method], "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")
    facts = inspect(folder)
    assert (facts.quantization, facts.parameters_total) == (method, 2 * WEIGHTS + KEPT)
    assert facts.parameters_active == facts.parameters_total
    assert facts.size_bytes == (folder / "model.safetensors").stat().st_size - header_bytes(folder)


def header_bytes(folder: Path) -> int:
    return 8 + int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")


def test_eight_and_three_bits(tmp_path: Path) -> None:
    assert inspect(save(tmp_path / "8", "gptq", {"bits": 8}, "a", bits=8)).parameters_total == WEIGHTS + KEPT
    tensors = {"a.qweight": ints(3 * 32 // 32, OUT), "a.qzeros": ints(1, 2)}  # 32 rows of 3 bits in 3 numbers
    config = {"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 3}}
    assert inspect(write_model(tmp_path / "3", tensors, config)).parameters_total == 32 * OUT


def test_a_quantised_mixture_of_experts_states_its_active_parameters(tmp_path: Path) -> None:
    names = [f"model.layers.0.mlp.experts.{i}.up_proj" for i in range(4)]
    moe = {"num_local_experts": 4, "num_experts_per_tok": 2}
    facts = inspect(save(tmp_path / "m", "awq", CONFIGS["awq"], *names, **moe))
    assert (facts.parameters_total, facts.parameters_active) == (4 * WEIGHTS + KEPT, 2 * WEIGHTS + KEPT)


def test_the_experts_of_mxfp4_are_blocks_of_halves(tmp_path: Path) -> None:
    experts = "model.layers.0.mlp.experts"
    tensors = {
        f"{experts}.gate_up_proj_blocks": np.zeros((4, OUT, 2, 16), np.uint8),
        f"{experts}.gate_up_proj_scales": np.zeros((4, OUT, 2), np.uint8),
        f"{experts}.gate_up_proj_bias": floats(4, OUT),
    }
    config = {"model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 1}
    facts = inspect(write_model(tmp_path / "m", tensors, config | {"quantization_config": {"quant_method": "mxfp4"}}))
    one = OUT * 64 + OUT
    assert (facts.quantization, facts.parameters_total, facts.parameters_active) == ("mxfp4", 4 * one, one)


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({}, None),
        ({"quantization_config": {}}, None),
        ({"quantization_config": None}, None),
        ({"quantization_config": {"quant_method": "AWQ"}}, "awq"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "fp8"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"bits": 4}}, "unknown"),
        ({"quantization_config": {"quant_method": "x" * 99}}, "unknown"),
        ({"quantization_config": {"quant_method": ["awq"]}}, "unknown"),
        ({"quantization_config": {"quant_method": "../awq\n"}}, "unknown"),
    ],
)
def test_the_method_that_a_config_states(config: dict[str, Any], method: str | None) -> None:
    assert quantization_of(config) == method


@pytest.mark.parametrize("bits", [0, -4, 33, "4", 4.0, True, None, [4]])
def test_bits_that_are_none_leave_packed_numbers_as_they_are(bits: object, tmp_path: Path) -> None:
    config = {"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": bits}}
    folder = write_model(tmp_path / "m", {"a.qweight": ints(2, OUT)}, config)
    assert inspect(folder).parameters_total == 2 * OUT


@pytest.mark.parametrize("groups", [[], {}, {"g": None}, {"g": {"weights": 3}}, {"g": {"weights": {"num_bits": -1}}}])
def test_groups_that_are_none_do_the_same(groups: object, tmp_path: Path) -> None:
    section = {"quant_method": "compressed-tensors", "config_groups": groups}
    config = {"model_type": "llama", "quantization_config": section}
    folder = write_model(tmp_path / "m", {"a.weight_packed": ints(2, OUT)}, config)
    assert inspect(folder).parameters_total == 2 * OUT


def test_a_gguf_file_states_its_type(tmp_path: Path) -> None:
    assert inspect(write_gguf(tmp_path / "m.gguf")).quantization == "gguf"
    typed = inspect(write_gguf(tmp_path / "q.gguf", file_type=LlamaFileType.MOSTLY_Q4_K_M))
    assert typed.quantization == "gguf-q4_k_m"
    assert inspect(write_gguf(tmp_path / "u.gguf", file_type=9999)).quantization == "gguf"
