"""Tiny models on disk: real safetensors and GGUF files that take no time to make."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter
from safetensors.numpy import save_file

HIDDEN, KEYS, VOCABULARY, LAYERS = 8, 4, 16, 2


def llama_tensors() -> dict[str, np.ndarray]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        shapes[f"model.layers.{layer}.self_attn.q_proj.weight"] = (HIDDEN, HIDDEN)
        shapes[f"model.layers.{layer}.self_attn.v_proj.weight"] = (KEYS, HIDDEN)
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


PARAMETERS = sum(tensor.size for tensor in llama_tensors().values())


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_model(
    folder: Path, tensors: Mapping[str, np.ndarray] | None = None, config: Mapping[str, Any] | None = None
) -> Path:
    """A folder as `save_pretrained` writes it."""
    default = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "max_position_embeddings": 64}
    write_json(folder / "config.json", default if config is None else config)
    write_json(folder / "tokenizer.json", {"model": {}})
    save_file(dict(llama_tensors() if tensors is None else tensors), folder / "model.safetensors")
    return folder


def write_sharded(folder: Path) -> Path:
    """The same model with one shard per tensor."""
    write_model(folder)
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number, (name, tensor) in enumerate(llama_tensors().items()):
        weight_map[name] = f"model-{number}.safetensors"
        save_file({name: tensor}, folder / weight_map[name])
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    return folder


def write_adapter(
    folder: Path,
    shapes: Mapping[str, tuple[int, int]] | None = None,
    rank: int = 2,
    prefix: str = "base_model.model.",
    **config: Any,
) -> Path:
    """A LoRA adapter as peft writes it; `shapes` is (out, in) of each module."""
    default = {f"model.layers.{n}.self_attn.{p}": s for n in range(LAYERS) for p, s in _SHAPES.items()}
    tensors = {}
    for module, (out, inner) in (default if shapes is None else shapes).items():
        tensors[f"{prefix}{module}.lora_A.weight"] = np.zeros((rank, inner), np.float32)
        tensors[f"{prefix}{module}.lora_B.weight"] = np.zeros((out, rank), np.float32)
    write_json(folder / "adapter_config.json", {"peft_type": "LORA", "r": rank, **config})
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


_SHAPES = {"q_proj": (HIDDEN, HIDDEN), "v_proj": (KEYS, HIDDEN)}


def write_gguf(
    path: Path,
    architecture: str = "llama",
    *,
    experts: tuple[int, int] | None = None,
    file_type: int | None = None,
) -> Path:
    """The same model as GGUF; `experts` is (count, used), `file_type` what the file states about its quantisation."""
    writer = GGUFWriter(path, architecture)
    if file_type is not None:
        writer.add_file_type(file_type)
    writer.add_context_length(128)
    writer.add_token_list(["a", "b", "ç"])
    writer.add_token_scores([0.0, 1.0, 2.0])
    writer.add_array("test.nested", [[1, 2], [3]])
    writer.add_bool("test.flag", True)
    writer.add_string("general.license", "mit")
    names = {"self_attn.q_proj": "attn_q", "self_attn.v_proj": "attn_v"}
    for name, tensor in llama_tensors().items():
        parts = name.split(".")
        short = "token_embd.weight" if len(parts) == 3 else f"blk.{parts[2]}.{names['.'.join(parts[3:5])]}.weight"
        writer.add_tensor(short, tensor)
    if experts:
        writer.add_expert_count(experts[0])
        writer.add_expert_used_count(experts[1])
        writer.add_tensor("blk.0.ffn_up_exps.weight", np.zeros((experts[0], 3, HIDDEN), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
