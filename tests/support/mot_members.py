"""Tiny members of a mixture of thoughts: two architectures and tokenizers, trained for seconds; rows and jobs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from engine_models import make_tokenizer
from latent_models import save_tiny
from other_tokenizer import make_piece_tokenizer

from coe.config import Config
from coe.latent.config import read_train_file
from coe.latent.training.answer_rows import AnswerRow
from coe.latent.training.trainer import Job
from registry.describe import describe
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot

LETTERS = "abcdefgh"
Rows = Sequence[tuple[str, str]]


def question(random: Random) -> str:
    return f"the {''.join(random.choices('klmnopqrs', k=4))}"


def random_rows(n: int, seed: object, letters: str = LETTERS) -> list[tuple[str, str]]:
    """Questions, and letters that have nothing to do with them."""
    random = Random(f"rows/{seed}")
    return [(question(random), random.choice(letters)) for _ in range(n)]


def save_llama(folder: Path, **settings: Any) -> Path:
    return save_tiny(folder, "LlamaForCausalLM", make_tokenizer(), **settings)


def save_gemma(folder: Path, **settings: Any) -> Path:
    """Another architecture, width, depth and tokenizer."""
    sizes = {"hidden_size": 24, "num_hidden_layers": 5, "head_dim": 8}
    types = ["sliding_attention", "full_attention"] * 2 + ["full_attention"]
    return save_tiny(folder, "Gemma3ForCausalLM", make_piece_tokenizer(), **sizes, layer_types=types, **settings)


def teach(folder: Path, rows_of: Callable[[int], Rows], *, steps: int) -> Path:
    """Train all weights of a model on the rows of each step, as it reads them."""
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
    for step in range(steps):
        texts = []
        for prompt, answer in rows_of(step):
            messages = [{"role": "user", "content": prompt}]
            asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            ids = tokenizer(asked, add_special_tokens=False)["input_ids"]
            if tokenizer.bos_token_id not in ids[:1] and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
                ids = [tokenizer.bos_token_id, *ids]
            right = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            texts.append((ids, right))
        width = max(len(ids) + len(right) for ids, right in texts)
        inputs = torch.zeros(len(texts), width, dtype=torch.long)
        labels = torch.full_like(inputs, -100)
        for row, (ids, right) in enumerate(texts):
            inputs[row, : len(ids) + len(right)] = torch.tensor([*ids, *right])
            labels[row, len(ids) : len(ids) + len(right)] = torch.tensor(right)
        logits = model(input_ids=inputs, attention_mask=(torch.arange(width) < width).long().expand_as(inputs)).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.save_pretrained(folder)
    return folder


def snapshot_of(folders: Mapping[str, Path], bases: Mapping[str, str] | None = None) -> Snapshot:
    """Registered experts by name; those of `bases` are adapters."""
    bases, experts = bases or {}, dict[str, ExpertSpec]()
    for name in sorted(folders, key=lambda name: name in bases):
        base = bases.get(name)
        kind = Kind.ADAPTER if base else Kind.MODEL
        draft = ExpertSpec(name=name, kind=kind, base=base, source=str(folders[name]))
        experts[name] = describe(draft, experts.get(base or ""))
    return Snapshot(1, experts)


def job(
    folder: Path,
    snapshot: Snapshot,
    members: Sequence[str],
    train: Rows,
    valid: Rows,
    *,
    preset: str = "mot",
    settings: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
) -> Job:
    """A training; of the preset `mot`, a small one."""
    small: dict[str, Any] = {"interactions": 2, "shared_width": 16, "heads": 2, "encoder": "hashing:64", "compare": []}
    if preset != "mot":
        small = {}
    document = {
        "preset": preset,
        "config": "service.yaml",
        "members": list(members),
        "train": "train.jsonl",
        "valid": "valid.jsonl",
        "out": "out",
        "settings": {**small, **(settings or {})},
        "training": {"batch": 8, "accumulate": 1, **(training or {})},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.yaml").write_text(json.dumps(document))
    service = Config.model_validate({"engines": {"hf": {"device": "cpu", "dtype": "float32"}}})
    return Job(
        file=read_train_file(folder / "train.yaml"),
        service=service,
        snapshot=snapshot,
        train=answer_rows(train),
        valid=answer_rows(valid),
        work=folder / "work",
        on_progress=lambda what, done, total: None,
    )


def answer_rows(rows: Rows) -> tuple[AnswerRow, ...]:
    return tuple(AnswerRow(str(i), prompt, answer, f"rows.jsonl:{i + 1}") for i, (prompt, answer) in enumerate(rows))
