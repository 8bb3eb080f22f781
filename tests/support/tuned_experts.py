"""A tiny base, a model fine-tuned from it by a ternary difference, and questions that the tuned one answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from engine_models import make_tokenizer, save_adapter, save_tiny_model
from safetensors.torch import load_file, save_file

from coe.local import open_local

TUNED_SHARE = 0.1
"""Share of the weights that fine-tuning changed."""
SERVICE = "host: {budget: 64MiB}\nengines: {hf: {dtype: float32, device: cpu}}\npolicies: {default: {expert: tuned}}\n"
EXPERTS = """
experts:
  - {name: base, kind: model, source: base}
  - {name: tuned, kind: model, source: tuned}
  - {name: small, kind: adapter, base: base, source: adapter}
"""


def save_experts(root: Path) -> Path:
    """`base`, `tuned` and `adapter` in `root`, experts.yaml, and service.yaml over the registry of $COE_HOME."""
    base = save_tiny_model(root / "base", make_tokenizer())
    shutil.copytree(base, root / "tuned")
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(base / "model.safetensors")
    for name, tensor in tensors.items():
        draws = torch.rand(tensor.shape, generator=generator)
        tensors[name] = tensor + 0.25 * ((draws < TUNED_SHARE / 2).float() - (draws > 1 - TUNED_SHARE / 2).float())
    save_file(tensors, root / "tuned" / "model.safetensors", {"format": "pt"})
    save_adapter(root / "adapter", base)
    (root / "experts.yaml").write_text(EXPERTS)
    (root / "service.yaml").write_text(SERVICE)
    (root / "files.yaml").write_text("experts: [experts.yaml]\n" + SERVICE)
    return root


PROMPTS = ("the capital", "france", "paris is", "the end", "of the answer", "is", "capital of", "answer", "a", "the of")


async def answers(config: Path, expert: str) -> list[str]:
    """The answers of an expert to PROMPTS."""
    async with open_local(config) as system:
        return [await system.ask(prompt, model=expert, max_tokens=6) for prompt in PROMPTS]


def write_task(folder: Path, name: str, right: list[str]) -> None:
    """A task whose right answers are these."""
    folder.mkdir(exist_ok=True)
    rows = [{"id": str(i), "prompt": p, "answer": a} for i, (p, a) in enumerate(zip(PROMPTS, right, strict=True))]
    (folder / f"{name}.yaml").write_text(f"name: {name}\ndata: {name}.jsonl\ngrader: exact\nmax_tokens: 6\n")
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
