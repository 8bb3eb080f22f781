"""Tiny folders of experts and their deltas."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from registry.deltas.restoring import restore
from registry.deltas.writing import Compression, write_delta

DIGEST = "sha256:" + "0" * 64


def model_folder(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    """A folder with a model's weights and a config."""
    path.mkdir(parents=True)
    save_file(dict(tensors), path / "model.safetensors", metadata or {"format": "pt"})
    (path / "config.json").write_text(json.dumps({"architectures": ["TinyForCausalLM"], "hidden_size": 4}))
    return path


def adapter_folder(path: Path, pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> Path:
    """A folder with LoRA matrices by module: A [rank, in] and B [out, rank]."""
    path.mkdir(parents=True)
    tensors = {}
    for module, (a, b) in pairs.items():
        tensors |= {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
    save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    return path


def compressed(folder: Path, base: Path | None, out: Path, density: float | None = None, alpha: float = 1.0) -> Path:
    """The delta of a folder, in the new folder `out`."""
    out.mkdir(parents=True)
    write_delta(folder, out, Compression(density, alpha), expert=DIGEST, base=base, base_digest=DIGEST)
    return out


def restored_in(delta: Path, base: Path | None, out: Path) -> Path:
    """What a delta restores, in the new folder `out`."""
    out.mkdir(parents=True)
    restore(delta, base, out)
    return out
