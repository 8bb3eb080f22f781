"""A service of tiny models to train compositions of, and rows whose answers only the peers know."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import yaml
from engine_models import make_tokenizer, save_adapter, save_tiny_model

from coe.engines.latent.notes import Notes
from coe.latent.config import TrainFile, read_train_file
from coe.types import PeerNotes

ANSWERS = ("a", "b", "c", "d")
WIDTHS = {"base": 32, "other": 24}
"""Of the hidden states of the models that `make_service` writes."""


def make_service(folder: Path) -> Path:
    """`service.yaml`: models `base` and `other`, of other widths and tokenizers; adapters `one`, `second` of `base`."""
    tokenizer = make_tokenizer()
    save_tiny_model(folder / "base", tokenizer)
    another = make_tokenizer("what is this or that? it is what it was", size=290)
    save_tiny_model(folder / "other", another, hidden_size=24, num_hidden_layers=4)
    experts: list[dict[str, Any]] = [
        {"name": name, "kind": "model", "source": str(folder / name), "engine": "hf"} for name in WIDTHS
    ]
    for name in ("one", "second"):
        save_adapter(folder / name, folder / "base")
        experts.append({"name": name, "kind": "adapter", "base": "base", "source": str(folder / name)})
    (folder / "experts.yaml").write_text(yaml.safe_dump({"experts": experts}))
    service = {"experts": ["experts.yaml"], "engines": {"hf": {"device": "cpu", "dtype": "float32", "threads": 1}}}
    (folder / "service.yaml").write_text(yaml.safe_dump(service))
    return folder / "service.yaml"


def teach_format(folder: Path, *, steps: int = 150) -> None:
    """Train a tiny model to answer such rows with one of the letters, each as likely: more it cannot know."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    optimizer, chance = torch.optim.AdamW(model.parameters(), lr=5e-3), Random(0)
    for _ in range(steps):
        for group in optimizer.param_groups:
            group["lr"] *= 0.98
        loss = torch.zeros(())
        for letter in ANSWERS:
            question = [{"role": "user", "content": prompt_of(9, chance)}]
            text = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
            prompt = tokenizer(text, add_special_tokens=False).input_ids
            answer = [*tokenizer(letter, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
            ids = torch.tensor([[*prompt, *answer]])
            logits = model(ids).logits[0, len(prompt) - 1 : -1]
            loss = loss + torch.nn.functional.cross_entropy(logits, torch.tensor(answer)) / len(ANSWERS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)


def prompt_of(seed: int, chance: Random) -> str:
    """A prompt that says nothing about its answer."""
    return f"what is {seed} {chance.random():.6f}?"


def write_rows(path: Path, n: int, *, seed: int, permuted: bool = False) -> list[str]:
    """Rows with prompts that say nothing about their answers; returns the letters that the peers are told.

    permuted: the answers stand in another order than the letters.
    """
    chance = Random(seed)
    letters = [ANSWERS[i % len(ANSWERS)] for i in range(n)]
    chance.shuffle(letters)
    answers = letters.copy()
    if permuted:
        chance.shuffle(answers)
    rows = [{"id": i, "prompt": prompt_of(seed, chance), "answer": a} for i, a in enumerate(answers)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return letters


def write_config(folder: Path, **fields: Any) -> Path:
    """`train.yaml` of a short training of `base` with the peer `other`; fields replace its own."""
    document = {
        "preset": "notes",
        "config": "service.yaml",
        "members": ["base", "other"],
        "train": "train.jsonl",
        "valid": "valid.jsonl",
        "out": "out",
        "settings": {"interactions": 1, "shared_width": 16, "heads": 2},
        "training": {"steps": 3, "batch": 4, "accumulate": 1, "validate_every": 2, "learning_rate": 1e-2},
    }
    document |= fields
    (folder / "train.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    return folder / "train.yaml"


def read_config(folder: Path, **fields: Any) -> TrainFile:
    """The same, read."""
    return read_train_file(write_config(folder, **fields))


@dataclass(frozen=True)
class PlantedNotes:
    """Notes of rows that carry a letter each: a fixed direction for it, and noise. `missing`: peer -> rows without."""

    letters: Sequence[str]
    widths: Mapping[str, int]
    depths: int = 1
    layers: tuple[int, ...] = ()
    missing: Mapping[str, Sequence[int]] = field(default_factory=dict)
    too_long: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.letters)

    def of(self, row: int, peer: str) -> tuple[PeerNotes, ...]:
        if row in self.missing.get(peer, ()):
            return ()
        rng = np.random.default_rng([row, len(peer)])
        width = self.widths[peer]
        directions = np.random.default_rng(width).standard_normal((len(ANSWERS), width))
        states = directions[ANSWERS.index(self.letters[row])] + 0.3 * rng.standard_normal((self.depths, 3, width))
        spans = np.array([[0, 4], [-1, -1], [-1, -1]], np.int32)
        notes = Notes(peer, layers=self.layers, states=states.astype(np.float16), spans=spans)
        return (PeerNotes(peer, notes.pack()),)
