"""Quantised copies of a tiny model, and the same weights as floats, which another engine can read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

_WHOLE = {"num_bits": 8, "type": "int", "symmetric": True}
INT8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**_WHOLE, "strategy": "channel", "dynamic": False},
            "input_activations": {**_WHOLE, "strategy": "token", "dynamic": True},
        }
    },
}
"""Weights and activations of 8 bits, which vLLM multiplies as integers."""


def save_int8(model: Path, packed: Path, floats: Path) -> None:
    """Round the projections of a model to 8 bits a channel; save them as compressed-tensors, and as floats."""
    from safetensors.torch import load_file, save_file

    tensors: dict[str, Any] = load_file(model / "model.safetensors")
    quantised, rounded = dict(tensors), dict(tensors)
    for name in (name for name in tensors if name.endswith("_proj.weight")):
        scales = tensors[name].abs().amax(-1, keepdim=True) / 127  # (n_out, 1)
        whole = (tensors[name] / scales).round()
        rounded[name], quantised[name], quantised[f"{name}_scale"] = whole * scales, whole.char(), scales
    for folder, saved in ((packed, quantised), (floats, rounded)):
        shutil.copytree(model, folder)
        save_file({name: tensor.contiguous() for name, tensor in saved.items()}, folder / "model.safetensors")
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(config | {"quantization_config": INT8}))
